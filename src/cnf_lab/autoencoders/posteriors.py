r"""Posteriors q(z \| x): a Gaussian whose mean and variance come from the encoder, and a flow after it.

The flow starts where data do in a density: :math:`z_0` at t = 0, :math:`z_K` at t = T, so that

.. math:: \log q(z_K \mid x) = \log N(z_0; \mu, \sigma^2) - \log\left|\det \partial z_K / \partial z_0\right|.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnf_lab.errors import ConfigError
from cnf_lab.fields import Amortised, VectorField
from cnf_lab.flows import Chain, ContinuousFlow, Mapped, Transform
from cnf_lab.flows.conditional import InverseAutoregressive, Planar, Sylvester
from cnf_lab.flows.riders import Rider
from cnf_lab.ode import OdeSolver
from cnf_lab.shapes import Float
from cnf_lab.trace import DivergenceEstimator


@dataclass(frozen=True)
class PosteriorDraw:
    """Draws of a posterior.

    Attributes:
        log_start: log N(z0; mean, variance) in nats (rows,).
        mapped: z_K (rows, D) with the log-det of the flow.
    """

    log_start: Tensor
    mapped: Mapped


class Posterior(nn.Module):
    r"""A diagonal Gaussian with mean and variance from features, and a flow that gets them as its context.

    The variance is a softplus of a linear map, as published: not a deviation, and no exponential.

    Args:
        features: Size of the features.
        latent: D, the size of the latent.
        transform: The flow from z0 to zK; an empty chain for none.
        variance_bounds: Least and greatest variance; None for no bounds.
    """

    def __init__(
        self, features: int, latent: int, transform: Transform, variance_bounds: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        self.mean, self.variance = nn.Linear(features, latent), nn.Linear(features, latent)
        self.transform, self.variance_bounds = transform, variance_bounds

    def gaussian(self, features: Float[Tensor, "batch features"]) -> tuple[Tensor, Tensor]:
        """Return mean and variance of z0, (batch, D)."""
        variance = F.softplus(self.variance(features))
        # A softplus far below zero rounds to it, and its logarithm to minus infinity.
        least, most = self.variance_bounds or (torch.finfo(variance.dtype).tiny, None)
        return self.mean(features), variance.clamp(least, most)

    def forward(
        self,
        features: Float[Tensor, "batch features"],
        draws: int = 1,
        generator: torch.Generator | None = None,
        riders: Sequence[Rider] = (),
    ) -> PosteriorDraw:
        """Draw latents.

        Args:
            features: The encoder's features.
            draws: Draws K for each row of features; the rows of a draw stay together.
            generator: Source of the draws and of the probes of the flow.
            riders: What rides along the flow.

        Returns:
            K times batch latents.
        """
        with torch.autocast(features.device.type, enabled=False):  # a latent in low precision has no log-det
            mean, variance = (part.repeat(draws, 1) for part in self.gaussian(features))
        # In one precision whatever that of the model: a check in float64 meets the same draws.
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32, device=mean.device).to(mean)
        log_start = -0.5 * (noise.square() + variance.log() + math.log(2 * math.pi)).sum(dim=1)
        z0 = mean + variance.sqrt() * noise
        return PosteriorDraw(
            log_start, self.transform.pull_back(z0, features.repeat(draws, 1), generator, list(riders))
        )


class Unconditional(nn.Module):
    """The amortiser of a field without a context: it hands nothing on."""

    def forward(self, context: Tensor | None) -> None:
        """Return no context."""


def no_flow(dimension: int, context_features: int) -> Transform:
    """Return the flow of a Gaussian posterior, which does nothing.

    Args:
        dimension: D.
        context_features: Size of the features.
    """
    return Chain([])


def planar_flow(dimension: int, context_features: int, flows: int = 4) -> Transform:
    """Return planar maps.

    Args:
        dimension: D.
        context_features: Size of the features.
        flows: Number of maps.
    """
    return Chain([Planar(dimension, context_features) for _ in range(_positive(flows, "flows", 4))])


def sylvester_flow(
    dimension: int, context_features: int, flows: int = 4, orthogonalisation: str = "orthogonal", size: int = 8
) -> Transform:
    """Return Sylvester maps; of triangular ones every second reverses the order.

    Args:
        dimension: D.
        context_features: Size of the features.
        flows: Number of maps.
        orthogonalisation: ``orthogonal``, ``householder`` or ``triangular``.
        size: Columns of Q of ``orthogonal``, reflections of ``householder``.
    """
    return Chain(
        [
            Sylvester(dimension, context_features, orthogonalisation, size, reverse=bool(number % 2))
            for number in range(_positive(flows, "flows", 4))
        ]
    )


def autoregressive_flow(dimension: int, context_features: int, flows: int = 4, width: int = 320) -> Transform:
    """Return an inverse autoregressive flow.

    Args:
        dimension: D.
        context_features: Size of the features.
        flows: Number of steps.
        width: Units of the hidden layers of each step.
    """
    return InverseAutoregressive(dimension, context_features, flows, width)


def continuous_flow(
    dimension: int,
    context_features: int,
    field: Callable[..., VectorField],
    solver: OdeSolver,
    evaluation_solver: OdeSolver,
    divergence: DivergenceEstimator,
    evaluation_divergence: DivergenceEstimator,
    blocks: int = 1,
    end_time: float = 1.0,
    zero_amortiser: bool = False,
) -> Transform:
    """Return continuous flows; those with an amortised field get its values from the features, linearly.

    Args:
        dimension: D.
        context_features: Size of the features.
        field: Makes a vector field from ``event_shape``.
        solver: Solver in training mode.
        evaluation_solver: Solver in evaluation mode.
        divergence: Divergence estimator in training mode.
        evaluation_divergence: Divergence estimator in evaluation mode.
        blocks: Number of continuous flows, each with an amortiser of its own.
        end_time: End time T of each block.
        zero_amortiser: Whether the amortised values start at zero, the same for all rows.

    Raises:
        ConfigError: If there are no blocks, or the parts do not fit together.
    """
    made = []
    for _ in range(_positive(blocks, "blocks", 1)):
        own = field(event_shape=(dimension,), context_features=0)
        amortiser: nn.Module = Unconditional()
        if isinstance(own, Amortised):
            amortiser = nn.Linear(context_features, own.amortised_features)
            if zero_amortiser:
                nn.init.zeros_(amortiser.weight)
                nn.init.zeros_(amortiser.bias)
        parts = (solver, divergence, evaluation_solver, evaluation_divergence, end_time)
        made.append(ContinuousFlow(own, *parts, amortiser=amortiser))
    return Chain(made)


def _positive(number: int, name: str, usual: int) -> int:
    if number < 1:
        raise ConfigError(f"Expected posterior.{name} of at least 1, got {number}. Type posterior.{name}={usual}.")
    return number
