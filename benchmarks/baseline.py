r"""The formulation that cnf_lab is measured against: what the original FFJORD code does.

Written on its own, without cnf_lab: a concatsquash network, or a convolutional one that
concatenates time; Hutchinson's estimate with one probe by reverse mode,
:math:`v^\top J`, whose graph is kept; log-det as a second state of torchdiffeq's
``odeint_adjoint``, all parameters under error control in the backward solve. Exact divergences
are a loop over the dimensions. Names of parameters follow cnf_lab, so that weights can be copied.

References:
    Grathwohl et al., FFJORD (2019), https://arxiv.org/abs/1810.01367, and its code.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torchdiffeq
from torch import Tensor, nn


class ConcatSquashLinear(nn.Module):
    """(W x + b) σ(a t + c) + v t."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)
        self.time_gate = nn.Linear(1, n_out)
        self.time_shift = nn.Linear(1, n_out, bias=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Apply the layer to rows."""
        column = t.reshape(1, 1)
        return self.linear(x) * torch.sigmoid(self.time_gate(column)) + self.time_shift(column)


class ConcatConv2d(nn.Module):
    """A 3 × 3 convolution with the time as an extra first channel."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(n_in + 1, n_out, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Apply the layer to images."""
        return self.linear(torch.cat([torch.ones_like(x[:, :1]) * t, x], dim=1))


class ConcatLinear(nn.Module):
    """W [t; x] + b, the time as an extra first input."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in + 1, n_out)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Apply the layer to rows."""
        return self.linear(torch.cat([torch.ones_like(x[:, :1]) * t, x], dim=1))


class Network(nn.Module):
    """Layers with a nonlinearity between them.

    Args:
        sizes: Features, or channels, of input, hidden layers and output.
        layer: Kind of layer.
        activation: Nonlinearity.
    """

    def __init__(
        self, sizes: Sequence[int], layer: Callable[[int, int], nn.Module], activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(n_in, n_out) for n_in, n_out in pairwise(sizes))
        self.activation = activation

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return dx/dt."""
        for index, layer in enumerate(self.layers):
            x = layer(t, x if index == 0 else self.activation(x))
        return x


class LowRankNetwork(Network):
    """Layers to which each row adds a low-rank product and a bias of its own, the original's ``cnf_rank``.

    Args:
        sizes: Features of input, hidden layers and output.
        activation: Nonlinearity.
        rank: Rank of the products.
    """

    def __init__(self, sizes: Sequence[int], activation: Callable[[Tensor], Tensor], rank: int) -> None:
        super().__init__(sizes, ConcatLinear, activation)
        self.shapes = [
            shape for n_in, n_out in pairwise(sizes) for shape in ((n_in, rank), (rank, n_out), (n_out,))
        ]  # of U, V and the bias of every layer

    def own(self, amortised: Tensor) -> list[Tensor]:
        """Cut the values of each row into U, V and bias of every layer."""
        parts = amortised.split([math.prod(shape) for shape in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def forward(self, t: Tensor, x: Tensor, *own: Tensor) -> Tensor:
        """Return dx/dt."""
        for index, (layer, u, v, bias) in enumerate(zip(self.layers, own[::3], own[1::3], own[2::3], strict=True)):
            x = x if index == 0 else self.activation(x)
            x = layer(t, x) + (x.unsqueeze(1) @ u @ v).squeeze(1) + bias
        return x


class Baseline:
    """A density in the original's formulation, data at t = 0.

    Args:
        network: The vector field.
        method: Method of torchdiffeq.
        tolerance: Absolute and relative bound of an adaptive method.
        steps: Equal steps of a fixed grid; None for an adaptive method.
        adjoint: Whether gradients are the continuous adjoint's, as in the original, or direct.
        keep_graph: Whether the graph of the divergence is kept where no gradient is wanted, as
            in the original.
        low_precision: Precision of the network under autocast; None for the state's.
        end_time: End time T.
    """

    def __init__(
        self,
        network: nn.Module,
        method: str = "dopri5",
        tolerance: float = 1e-5,
        steps: int | None = None,
        adjoint: bool = True,
        keep_graph: bool = True,
        low_precision: torch.dtype | None = None,
        end_time: float = 1.0,
    ) -> None:
        self.network, self.method, self.tolerance, self.steps = network, method, tolerance, steps
        self.adjoint, self.keep_graph, self.low_precision = adjoint, keep_graph, low_precision
        self.end_time = end_time
        self.evaluations = self.nfe_forward = 0

    @property
    def nfe_backward(self) -> int:
        """Evaluations since the end of the last solve."""
        return self.evaluations - self.nfe_forward

    def pull_back(self, x: Tensor, probe: Tensor | None = None, own: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        r"""Integrate from t = 0 to t = T.

        Args:
            x: Data (batch, \*event).
            probe: Probe of Hutchinson's estimate, like x; None for the exact divergence.
            own: Weights of each row's own, which are states with derivative zero as in the original.

        Returns:
            The latent (batch, \*event) and the log-det (batch,).
        """
        self.evaluations = 0
        state = (x, x.new_zeros(len(x), 1), *own)
        options = {} if self.steps is None else {"grid_constructor": self._grid}
        settings = {"atol": self.tolerance, "rtol": self.tolerance, "method": self.method, "options": options}
        times = torch.tensor([0.0, self.end_time]).to(x)

        def rhs(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return *self._derivative(t, state[0], probe, state[2:]), *map(torch.zeros_like, state[2:])

        if self.adjoint:
            parameters = tuple(self.network.parameters())
            z, minus_log_det, *_ = torchdiffeq.odeint_adjoint(rhs, state, times, adjoint_params=parameters, **settings)
        else:
            z, minus_log_det, *_ = torchdiffeq.odeint(rhs, state, times, **settings)
        self.nfe_forward = self.evaluations
        return z[-1], -minus_log_det[-1].squeeze(1)

    def log_prob(self, x: Tensor, probe: Tensor | None = None) -> Tensor:
        """Return the log-density of each row in nats."""
        z, log_det = self.pull_back(x, probe)
        return -0.5 * (z.flatten(1).square().sum(dim=1) + z[0].numel() * math.log(2 * math.pi)) + log_det

    def _derivative(self, t: Tensor, x: Tensor, probe: Tensor | None, own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        self.evaluations += 1
        wanted = torch.is_grad_enabled()
        graph = self.keep_graph or wanted
        with torch.enable_grad():
            # Without gradients x may be a view that autograd does not follow, of what another block made.
            x = x if wanted and x.requires_grad else x.detach().requires_grad_()
            with torch.autocast(x.device.type, self.low_precision, enabled=self.low_precision is not None):
                value = self.network(t, x, *own)
            value = value.to(x.dtype)
            div = _loop(value, x, graph) if probe is None else _estimate(value, x, probe, graph)
        return value, -div.unsqueeze(1)

    def _grid(self, func: object, y0: Tensor, t: Tensor) -> Tensor:
        assert self.steps is not None
        return torch.linspace(float(t[0]), float(t[-1]), self.steps + 1, dtype=t.dtype, device=t.device)


def _estimate(value: Tensor, x: Tensor, probe: Tensor, graph: bool) -> Tensor:
    (product,) = torch.autograd.grad(value, x, probe, create_graph=graph)
    return (product * probe).flatten(1).sum(dim=1)


def _loop(value: Tensor, x: Tensor, graph: bool) -> Tensor:
    div = torch.zeros_like(x[:, 0])
    for index in range(x.shape[1]):
        (row,) = torch.autograd.grad(value[:, index].sum(), x, create_graph=graph, retain_graph=True)
        div = div + row[:, index]
    return div


class Blocks(ABC):
    """Blocks of the original one after the other, whatever lies between them; their evaluations add up."""

    blocks: list[Baseline]

    @property
    def nfe_forward(self) -> int:
        """Evaluations of the solves forward."""
        return sum(block.nfe_forward for block in self.blocks)

    @property
    def nfe_backward(self) -> int:
        """Evaluations since the end of the solves."""
        return sum(block.nfe_backward for block in self.blocks)

    @abstractmethod
    def pull_back(self, x: Tensor, probes: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the latents (batch, D) and the log-det (batch,).

        Args:
            x: Data.
            probes: A probe for each block; None for the exact divergence.
        """

    def log_prob(self, x: Tensor, probes: Sequence[Tensor] | None = None) -> Tensor:
        """Return log-density of the standard normal at the latents plus log-det, in nats."""
        z, log_det = self.pull_back(x, probes)
        return -0.5 * (z.square().sum(dim=1) + z.shape[1] * math.log(2 * math.pi)) + log_det


class AmortisedBaseline(Blocks):
    """The original's posterior of an autoencoder: blocks whose weights each row gets from its features, linearly.

    Args:
        blocks: Baselines of the blocks in order, each with a :class:`LowRankNetwork`.
        amortisers: Linear maps from features to the weights of each block.
        features: The encoder's features (batch, features).
    """

    def __init__(self, blocks: Sequence[Baseline], amortisers: Sequence[nn.Module], features: Tensor) -> None:
        self.blocks, self.amortisers, self.features = list(blocks), list(amortisers), features
        parts = [part for pair in zip((block.network for block in blocks), amortisers, strict=True) for part in pair]
        self.network = nn.ModuleList(parts)

    def pull_back(self, x: Tensor, probes: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the latents (batch, D) at the end of the last block, and the log-det (batch,).

        Args:
            x: Draws of the Gaussian (batch, D), the first rows of the features.
            probes: A probe for each block; None for the exact divergence.
        """
        log_det = x.new_zeros(len(x))
        for block, amortiser, probe in zip(
            self.blocks, self.amortisers, probes or [None] * len(self.blocks), strict=True
        ):
            assert isinstance(block.network, LowRankNetwork)
            x, part = block.pull_back(x, probe, block.network.own(amortiser(self.features[: len(x)])))
            log_det = log_det + part
        return x, log_det


class MultiscaleBaseline(Blocks):
    """The original's multiscale flow of images: blocks, squeezes, and half of the channels factored out.

    Args:
        blocks: Baselines of the blocks in order, ``per_scale`` before and as many after each squeeze.
        scales: Number of scales.
        per_scale: Blocks before each squeeze, and at the last scale.
    """

    def __init__(self, blocks: Sequence[Baseline], scales: int, per_scale: int) -> None:
        self.blocks, self.scales, self.per_scale = list(blocks), scales, per_scale
        self.network = nn.ModuleList(block.network for block in blocks)

    def pull_back(self, x: Tensor, probes: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the latents (batch, D), what leaves first in front, and the log-det (batch,).

        Args:
            x: Images (batch, channels, height, width).
            probes: A probe for each block.
        """
        log_det, leaving, steps = (
            x.new_zeros(len(x)),
            [],
            zip(self.blocks, probes or [None] * len(self.blocks), strict=True),
        )
        for scale in range(self.scales):
            for half in range(1 if scale == self.scales - 1 else 2):
                if half == 1:
                    x = torch.nn.functional.pixel_unshuffle(x, 2)
                for _ in range(self.per_scale):
                    block, probe = next(steps)
                    x, part = block.pull_back(x, probe)
                    log_det = log_det + part
            if scale < self.scales - 1:
                x, out = x.chunk(2, dim=1)
                leaving.append(out.flatten(1))
        return torch.cat([*leaving, x.flatten(1)], dim=1), log_det
