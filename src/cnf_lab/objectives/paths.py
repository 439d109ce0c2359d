r"""Simulation-free training: paths from data to latent rows, times on them, and who is paired with whom.

Time u = 0 is data and u = 1 is latent, as everywhere in the lab (papers on flow matching often
run it the other way round).

References:
    Lipman et al., Flow Matching for Generative Modeling (2023), https://arxiv.org/abs/2210.02747.
    Albergo & Vanden-Eijnden, Stochastic interpolants (2023), https://arxiv.org/abs/2209.15571.
    Tong et al., Improving and generalizing flow-based generative models with minibatch optimal
    transport (2024), https://arxiv.org/abs/2302.00482.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cnf_lab.errors import ConfigError
from cnf_lab.shapes import Float

_INSIDE = 1e-6  # uniform numbers keep this distance from 0 and 1, whose quantiles may be infinite


class Path(ABC):
    """Where a pair of a data row and a latent row is at a time, and how fast it moves."""

    @abstractmethod
    def weights(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the weights of data and latent row, and their derivatives, at times u of any shape."""

    def __call__(
        self, x: Float[Tensor, "batch *event"], z: Float[Tensor, "batch *event"], u: Float[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch *event"]]:
        r"""Return the state :math:`a(u)\, x + b(u)\, z` and its velocity :math:`a'(u)\, x + b'(u)\, z`.

        Args:
            x: Data.
            z: Latent rows.
            u: Times in [0, 1].
        """
        a, b, da, db = self.weights(u.reshape(-1, *[1] * (x.dim() - 1)))
        return a * x + b * z, da * x + db * z


class LinearPath(Path):
    """(1 - u) x + u z: straight, at constant speed."""

    def weights(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return 1 - u, u, -1 and 1."""
        return 1 - u, u, -torch.ones_like(u), torch.ones_like(u)


class TrigonometricPath(Path):
    """cos(πu/2) x + sin(πu/2) z: where x and z are independent, of the same variance at all times."""

    def weights(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return cosine, sine, and their derivatives."""
        angle, rate = 0.5 * math.pi * u, 0.5 * math.pi
        return angle.cos(), angle.sin(), -rate * angle.sin(), rate * angle.cos()


class Times(ABC):
    r"""A distribution of times on [0, 1]: where on the path the field is taught most.

    Draws are stratified, one in each of n equal shares of probability, which takes away much
    of the noise between batches.
    """

    @abstractmethod
    def quantile(self, probabilities: Tensor) -> Tensor:
        """Return the times below which a share of the draws lies."""

    def sample(self, n: int, generator: torch.Generator | None, like: Tensor) -> Float[Tensor, " n"]:
        """Draw n times in increasing order, in dtype and on the device of another tensor."""
        within = torch.rand(n, generator=generator, dtype=like.dtype, device=like.device)
        shares = (torch.arange(n, dtype=like.dtype, device=like.device) + within) / n
        return self.quantile(shares.clamp(_INSIDE, 1 - _INSIDE))


class UniformTimes(Times):
    """All times alike."""

    def quantile(self, probabilities: Tensor) -> Tensor:
        """Return the probabilities themselves."""
        return probabilities


class BetaTimes(Times):
    """Beta(α, β): α < 1 draws more times near the data, β < 1 near the latent end.

    Args:
        alpha: α, positive.
        beta: β, positive.

    Raises:
        ConfigError: If one of them is not positive.
    """

    def __init__(self, alpha: float, beta: float) -> None:
        if min(alpha, beta) <= 0:
            raise ConfigError(
                f"Expected objective.times.alpha and .beta above 0, got {alpha} and {beta}. "
                "Type objective.times.alpha=0.5 objective.times.beta=1.0."
            )
        self.alpha, self.beta = alpha, beta

    def quantile(self, probabilities: Tensor) -> Tensor:
        """Return the inverse of the regularised incomplete beta function."""
        if self.beta == 1:
            return probabilities ** (1 / self.alpha)
        if self.alpha == 1:
            return 1 - (1 - probabilities) ** (1 / self.beta)
        from scipy.special import betaincinv

        return torch.as_tensor(betaincinv(self.alpha, self.beta, probabilities.double().cpu().numpy())).to(
            probabilities
        )


class LogitNormalTimes(Times):
    """The logistic function of a normal number: the middle of the path more than its ends.

    Args:
        mean: Mean of the normal; below 0 is towards the data.
        deviation: Its standard deviation, positive.

    Raises:
        ConfigError: If the deviation is not positive.

    References:
        Esser et al., Scaling Rectified Flow Transformers (2024), https://arxiv.org/abs/2403.03206.
    """

    def __init__(self, mean: float = 0.0, deviation: float = 1.0) -> None:
        if deviation <= 0:
            raise ConfigError(
                f"Expected objective.times.deviation above 0, got {deviation}. Type objective.times.deviation=1.0."
            )
        self.mean, self.deviation = mean, deviation

    def quantile(self, probabilities: Tensor) -> Tensor:
        """Return the logistic function of the normal's quantiles."""
        return torch.sigmoid(self.mean + self.deviation * torch.special.ndtri(probabilities))


class Coupling(ABC):
    """How the latent rows of a batch are paired with its data rows."""

    #: Whether pairs look at more than their own row, which biases a conditional density.
    joint: bool = False

    @abstractmethod
    def __call__(self, x: Float[Tensor, "batch *event"], z: Float[Tensor, "batch *event"]) -> Tensor:
        """Return the latent rows in the order of the data rows that they are paired with."""


class Independent(Coupling):
    """As they were drawn."""

    def __call__(self, x: Float[Tensor, "batch *event"], z: Float[Tensor, "batch *event"]) -> Tensor:
        """Return z."""
        return z


class OptimalTransport(Coupling):
    r"""The pairing of least total squared distance within groups of the batch.

    Straighter paths in fewer evaluations. The assignment is scipy's, exact, and costs about the
    cube of the group's size on one CPU core.

    Args:
        group: Rows of a group.

    Raises:
        ConfigError: If a group has fewer than two rows.
    """

    joint = True

    def __init__(self, group: int = 256) -> None:
        if group < 2:
            raise ConfigError(
                f"Expected objective.coupling.group of at least 2, got {group}. Type objective.coupling.group=256."
            )
        self.group = group

    def __call__(self, x: Float[Tensor, "batch *event"], z: Float[Tensor, "batch *event"]) -> Tensor:
        """Return z in another order."""
        return torch.cat([_assigned(a, b) for a, b in zip(x.split(self.group), z.split(self.group), strict=True)])


def _assigned(x: Tensor, z: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(x.flatten(1).double(), z.flatten(1).double()).square()
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return z[torch.as_tensor(columns, device=z.device)]
