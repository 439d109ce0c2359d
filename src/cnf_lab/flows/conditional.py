r"""Maps in closed form whose parameters come from the context: the finite posteriors of autoencoders.

They go one way, from :math:`z_0` to :math:`z_K`, which is all that a posterior needs.

References:
    Rezende & Mohamed, Variational inference with normalizing flows (2015), https://arxiv.org/abs/1505.05770.
    Kingma et al., Improved variational inference with inverse autoregressive flow (2016),
    https://arxiv.org/abs/1606.04934.
    van den Berg et al., Sylvester normalizing flows for variational inference (2018) and its code,
    https://arxiv.org/abs/1803.05649.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnf_lab.errors import ConfigError
from cnf_lab.flows.base import Mapped, Transform
from cnf_lab.flows.riders import Rider
from cnf_lab.shapes import Float

ORTHOGONALISATIONS = ("orthogonal", "householder", "triangular")
_ITERATIONS = 100  # of the orthogonalisation at most, as published


class ConditionalMap(Transform):
    r"""A map :math:`z' = f(z; \theta(c))` in closed form, of rows (batch, D).

    There is no time to integrate over, so that no regulariser can ride along. Autocast is left:
    the maps are small, and a log-det in low precision would be wrong.

    Args:
        dimension: D.

    Raises:
        ConfigError: If a map is asked to go back, or to measure a regulariser.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.dimension = dimension

    @abstractmethod
    def map(self, z: Float[Tensor, "batch d"], context: Float[Tensor, "batch features"]) -> tuple[Tensor, Tensor]:
        """Return the mapped rows (batch, D) and log|det| of the map (batch,)."""

    def pull_back(
        self,
        x: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        integrands: Sequence[Rider] = (),
    ) -> Mapped:
        """Map rows by the parameters of their context; integrands are refused."""
        if integrands:
            kinds = ", ".join(type(integrand).__name__ for integrand in integrands)
            raise ConfigError(
                f"Expected no regulariser on a posterior without a vector field, got {kinds}. Type regulariser=none."
            )
        assert context is not None
        with torch.autocast(x.device.type, enabled=False):
            return Mapped(*self.map(x, context.to(x)))

    def push_forward(
        self,
        z: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        with_log_det: bool = True,
    ) -> Mapped:
        """Refuse: there is no closed form of the inverse."""
        raise ConfigError(
            f"Expected a map with an inverse, got {type(self).__name__}, which goes from z0 to zK only. "
            "Choose a continuous posterior: posterior=cnf_gated."
        )


class Planar(ConditionalMap):
    r"""A planar map, :math:`z' = z + \hat u \tanh(w^\top z + b)`, invertible by the choice of u.

    .. math:: \hat u = u + (\mathrm{softplus}(w^\top u) - 1 - w^\top u)\, w / \lVert w \rVert^2, \qquad
              \log\left|\det\right| = \log\left|1 + \hat u^\top w (1 - \tanh^2)\right|

    Args:
        dimension: D.
        context_features: Size of the context, from which u, w and b are linear.
    """

    def __init__(self, dimension: int, context_features: int) -> None:
        super().__init__(dimension)
        self.amortiser = nn.Linear(context_features, 2 * dimension + 1)

    def map(self, z: Float[Tensor, "batch d"], context: Float[Tensor, "batch features"]) -> tuple[Tensor, Tensor]:
        """Return z' and the log-det."""
        u, w, b = self.amortiser(context).split([self.dimension, self.dimension, 1], dim=1)
        product = (w * u).sum(dim=1, keepdim=True)
        u = u + (F.softplus(product) - 1 - product) * w / w.square().sum(dim=1, keepdim=True)
        bent = torch.tanh((w * z).sum(dim=1, keepdim=True) + b)
        slope = 1 + (u * w).sum(dim=1) * (1 - bent.square()).squeeze(1)
        return z + u * bent, slope.abs().log()


class Sylvester(ConditionalMap):
    r"""A Sylvester map, :math:`z' = z + Q R_1 \tanh(R_2 Q^\top z + b)`, with M orthonormal columns in Q.

    .. math:: \log\left|\det\right| = \sum_m \log\left|1 + (1 - \tanh^2)_m\, r_{1,mm}\, r_{2,mm}\right|

    :math:`R_1` and :math:`R_2` are upper triangular with diagonals in (-1, 1), so that the map is
    invertible; above their diagonals they hold the two halves of one matrix. Q is

    - ``orthogonal``: columns made orthonormal by the iteration :math:`A \leftarrow A (I + \tfrac12 (I - A^\top A))`;
    - ``householder``: a product of reflections, with M = D;
    - ``triangular``: the identity, or the reversal of the order, with M = D.

    Args:
        dimension: D.
        context_features: Size of the context, from which all parameters are linear.
        orthogonalisation: How Q comes about.
        size: M of ``orthogonal``, and the number of reflections of ``householder``.
        reverse: Whether Q of ``triangular`` is the reversal.

    Raises:
        ConfigError: If the orthogonalisation is unknown or the size out of range.
    """

    def __init__(
        self,
        dimension: int,
        context_features: int,
        orthogonalisation: str = "orthogonal",
        size: int = 8,
        reverse: bool = False,
    ) -> None:
        super().__init__(dimension)
        if orthogonalisation not in ORTHOGONALISATIONS:
            raise ConfigError(
                f"Expected posterior.orthogonalisation to be one of {', '.join(ORTHOGONALISATIONS)}, "
                f"got {orthogonalisation}. Type posterior.orthogonalisation=orthogonal."
            )
        if orthogonalisation != "triangular" and not 1 <= size <= dimension:
            raise ConfigError(
                f"Expected posterior.size of 1 to {dimension}, the dimension of the latent, got {size}. "
                f"Type posterior.size={min(8, dimension)}."
            )
        self.orthogonalisation, self.size, self.reverse = orthogonalisation, size, reverse
        self.columns = size if orthogonalisation == "orthogonal" else dimension
        m = self.columns
        self.full, self.bias = nn.Linear(context_features, m * m), nn.Linear(context_features, m)
        self.diagonals = nn.Linear(context_features, 2 * m)
        self.q = nn.Linear(context_features, dimension * size) if orthogonalisation != "triangular" else None

    def map(self, z: Float[Tensor, "batch d"], context: Float[Tensor, "batch features"]) -> tuple[Tensor, Tensor]:
        """Return z' and the log-det."""
        full = self.full(context).unflatten(1, (self.columns, self.columns))
        d1, d2 = torch.tanh(self.diagonals(context)).chunk(2, dim=1)
        r1, r2 = full.triu(1) + d1.diag_embed(), full.mT.triu(1) + d2.diag_embed()
        q = self._orthonormal(context, z)
        inner = torch.einsum("bdm,bd->bm", q, z)
        bent = torch.tanh(torch.einsum("bmn,bn->bm", r2, inner) + self.bias(context))
        moved = z + torch.einsum("bdm,bm->bd", q, torch.einsum("bmn,bn->bm", r1, bent))
        return moved, (1 + (1 - bent.square()) * d1 * d2).abs().log().sum(dim=1)

    def _orthonormal(self, context: Tensor, z: Tensor) -> Float[Tensor, "rows d m"]:
        identity = torch.eye(self.dimension, dtype=z.dtype, device=z.device).unsqueeze(0)
        if self.q is None:
            return (identity.flip(2) if self.reverse else identity).expand(len(z), -1, -1)
        given = self.q(context).unflatten(1, (self.dimension, self.size))
        if self.orthogonalisation == "orthogonal":
            return orthonormal_columns(given)
        q = identity.expand(len(z), -1, -1)
        for v in F.normalize(given, dim=1).unbind(2):
            q = q - 2 * (q @ v.unsqueeze(2)) * v.unsqueeze(1)
        return q


def orthonormal_columns(a: Float[Tensor, "batch d m"]) -> Float[Tensor, "batch d m"]:
    r"""Return orthonormal columns near those of a, by an iteration that converges from norms below :math:`\sqrt 3`.

    It ends when the worst row is orthonormal within round-off, or after 100 steps; the published code
    asks for 1e-6 in float32, which some sizes never reach.

    Args:
        a: Matrices, which are divided by their Frobenius norms first.

    References:
        Björck & Bowie, An iterative algorithm for computing the best estimate of an orthogonal matrix (1971).
    """
    a = a / a.flatten(1).norm(dim=1).reshape(-1, 1, 1)
    identity = torch.eye(a.shape[2], dtype=a.dtype, device=a.device)
    close = 10 * torch.finfo(a.dtype).eps * a.shape[2]
    for _ in range(_ITERATIONS):
        rest = identity - a.mT @ a
        if float(rest.detach().flatten(1).norm(dim=1).max()) <= close:
            break
        a = a + 0.5 * (a @ rest)
    return a


class InverseAutoregressive(ConditionalMap):
    r"""Steps :math:`z' = g \circ z + (1 - g) \circ m` with gates g = σ(s + 1), s and m autoregressive in z.

    Each step's network is masked: entry i of m and s sees the entries before i. The order is
    reversed before every second step. The context joins the first hidden layer of each.

    Args:
        dimension: D.
        context_features: Size of the context.
        flows: Number of steps.
        width: Units of the two hidden layers; at least D.

    Raises:
        ConfigError: If there is no step, or fewer units than entries.
    """

    def __init__(self, dimension: int, context_features: int, flows: int = 4, width: int = 320) -> None:
        super().__init__(dimension)
        if flows < 1:
            raise ConfigError(f"Expected posterior.flows of at least 1, got {flows}. Type posterior.flows=4.")
        if width < dimension:
            raise ConfigError(
                f"Expected posterior.width of at least {dimension}, the dimension of the latent, got {width}. "
                f"Type posterior.width={5 * dimension}."
            )
        self.context = nn.Linear(context_features, width)
        steps = nn.ModuleList(_AutoregressiveNetwork(dimension, width) for _ in range(flows))
        self.steps = cast(Sequence[_AutoregressiveNetwork], steps)

    def map(self, z: Float[Tensor, "batch d"], context: Float[Tensor, "batch features"]) -> tuple[Tensor, Tensor]:
        """Return the rows after all steps and the log-det."""
        encoded, log_det = self.context(context), z.new_zeros(len(z))
        for number, network in enumerate(self.steps):
            z = z.flip(1) if number % 2 else z
            m, s = network(z, encoded)
            gate = torch.sigmoid(s + 1)
            z, log_det = gate * z + (1 - gate) * m, log_det + F.logsigmoid(s + 1).sum(dim=1)
        return z, log_det


class _AutoregressiveNetwork(nn.Module):
    """Two masked hidden layers and two masked heads, of which entry i sees the inputs before i."""

    def __init__(self, dimension: int, width: int) -> None:
        super().__init__()
        inputs, units = torch.arange(dimension), torch.arange(width) * dimension // width
        self.first = _MaskedLinear(units[:, None] >= inputs)
        self.second = _MaskedLinear(units[:, None] >= units)
        self.m = _MaskedLinear(inputs[:, None] > units)
        self.s = _MaskedLinear(inputs[:, None] > units)

    def forward(self, z: Tensor, encoded: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.elu(self.second(F.elu(self.first(z)) + encoded))
        return self.m(hidden), self.s(hidden)


class _MaskedLinear(nn.Module):
    """A linear layer of which a mask (out, in) keeps some weights."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(mask.shape)))
        self.bias = nn.Parameter(torch.zeros(len(mask)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)
