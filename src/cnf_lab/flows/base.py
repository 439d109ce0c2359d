r"""The seam of all invertible layers, and the density that they make.

t = 0 is data and t = T is latent: :meth:`Transform.pull_back` goes from data to latent and
gives likelihoods, :meth:`Transform.push_forward` goes from latent to data and gives samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from cnf_lab.flows.base_distribution import StandardNormal
from cnf_lab.flows.dequantise import Dequantiser
from cnf_lab.flows.riders import Integrand as Integrand
from cnf_lab.flows.riders import Rider
from cnf_lab.ode import OdeSolver, SolveStats
from cnf_lab.shapes import Float
from cnf_lab.trace import DivergenceEstimator


@dataclass(frozen=True)
class Mapped:
    r"""Rows after an invertible map.

    Attributes:
        value: Mapped rows (batch, \*event).
        log_det: log \|det\| of the Jacobian of the map that was applied (batch,).
        integrals: What was measured along the way, (batch,) for each rider.
        solves: What each solve cost, in the order of the map.
        log_det_error: Standard error of log_det over the probes of a stochastic divergence
            (batch,), in evaluation mode; NaN with one probe, None where log_det is exact.
        block_log_dets: What each solve gave of log_det (batch,), in the order of ``solves``.
    """

    value: Tensor
    log_det: Tensor
    integrals: tuple[Tensor, ...] = ()
    solves: tuple[SolveStats, ...] = ()
    log_det_error: Tensor | None = None
    block_log_dets: tuple[Tensor, ...] = ()


class Transform(nn.Module, ABC):
    """An invertible map between data and latent space.

    In training mode a transform may use its training solver and trace estimator, and update
    statistics; in evaluation mode it is a fixed function.
    """

    @abstractmethod
    def pull_back(
        self,
        x: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        integrands: Sequence[Rider] = (),
    ) -> Mapped:
        """Map data to latent.

        Args:
            x: Data (batch, \\*event).
            context: Conditioning (batch, features) or None.
            generator: Source of the probes of stochastic trace estimators.
            integrands: Quantities to integrate along the way, and what else rides along.
        """

    @abstractmethod
    def push_forward(
        self,
        z: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        with_log_det: bool = True,
    ) -> Mapped:
        """Map latent to data.

        Args:
            z: Latent (batch, \\*event).
            context: Conditioning (batch, features) or None.
            generator: Source of the probes of stochastic trace estimators.
            with_log_det: Whether log_det is wanted; without, samples cost less and it is zero.
        """

    def set_evaluation(self, solver: OdeSolver, divergence: DivergenceEstimator, autocast: bool = False) -> None:
        """Choose the solver and the divergence estimator of evaluation mode, where there is a solve.

        Args:
            solver: The solver.
            divergence: The divergence estimator.
            autocast: Whether the field honours an autocast around it, as in training.
        """

    def trajectory(self, z: Tensor, context: Tensor | None = None, points: int = 2) -> list[Tensor]:
        """Return the states on the way from latent to data, z itself left out.

        A map without a time of its own has one: its result.
        """
        return [self.push_forward(z, context, with_log_det=False).value]


class UnconditionalTransform(Transform):
    """A map in closed form that needs no context: a subclass says how it maps, and its log-det."""

    @abstractmethod
    def to_latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mapped rows and log|det| of this map (batch,)."""

    @abstractmethod
    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows mapped back and log|det| of the inverse map (batch,)."""

    def pull_back(
        self,
        x: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        integrands: Sequence[Rider] = (),
    ) -> Mapped:
        """Map data to latent."""
        return Mapped(*self.to_latent(x))

    def push_forward(
        self,
        z: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        with_log_det: bool = True,
    ) -> Mapped:
        """Map latent to data."""
        return Mapped(*self.to_data(z))


class Chain(Transform):
    """Transforms one after the other, the first one next to the data.

    Args:
        transforms: The transforms from data to latent.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        super().__init__()
        self.transforms = cast(Sequence[Transform], nn.ModuleList(transforms))

    def pull_back(
        self,
        x: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        integrands: Sequence[Rider] = (),
    ) -> Mapped:
        """Map data to latent; log-dets and integrals add up."""
        total = Mapped(x, x.new_zeros(len(x)), tuple(x.new_zeros(len(x)) for _ in integrands))
        for transform in self.transforms:
            total = _then(total, transform.pull_back(total.value, context, generator, integrands))
        return total

    def push_forward(
        self,
        z: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        with_log_det: bool = True,
    ) -> Mapped:
        """Map latent to data; log-dets add up."""
        total = Mapped(z, z.new_zeros(len(z)))
        for transform in reversed(self.transforms):
            total = _then(total, transform.push_forward(total.value, context, generator, with_log_det))
        return total

    def trajectory(self, z: Tensor, context: Tensor | None = None, points: int = 2) -> list[Tensor]:
        """Return the states of every transform in turn."""
        states = [z]
        for transform in reversed(self.transforms):
            states += transform.trajectory(states[-1], context, points)
        return states[1:]


def _then(first: Mapped, second: Mapped) -> Mapped:
    # A transform without a time (an affine layer, say) has no integrals: they stay as they are.
    pairs = zip(first.integrals, second.integrals, strict=True) if second.integrals else ()
    return Mapped(
        second.value,
        first.log_det.to(second.log_det) + second.log_det,
        tuple(a + b for a, b in pairs) or first.integrals,
        first.solves + second.solves,
        _in_quadrature(first.log_det_error, second.log_det_error),
        first.block_log_dets + second.block_log_dets,
    )


def _in_quadrature(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    # Blocks draw their probes independently.
    if first is None or second is None:
        return second if first is None else first
    return torch.hypot(first, second)


class Flow(nn.Module):
    r"""A density: a transform between data and a base distribution.

    .. math:: \log p(x) = \log p_{\mathrm{base}}(z) + \log|\det \partial z / \partial x|,
              \qquad z = \mathrm{pull\_back}(x).

    Put it in evaluation mode (``flow.eval()``) before using its numbers: evaluation mode takes
    the evaluation solver and the exact divergence.

    Args:
        transform: The map from data to latent.
        base: The density of the latent.
        context_features: Size of the conditioning context; 0 for an unconditional density.
        context_encoder: Map from the context as the data give it to what the transform gets;
            None hands it on as it is.
        dequantiser: Turns pixels, which are whole numbers, into the continuous values whose
            density this is; None for data that are continuous.
    """

    def __init__(
        self,
        transform: Transform,
        base: StandardNormal,
        context_features: int = 0,
        context_encoder: nn.Module | None = None,
        dequantiser: Dequantiser | None = None,
    ) -> None:
        super().__init__()
        self.transform, self.base = transform, base
        self.context_features, self.context_encoder = context_features, context_encoder
        self.dequantiser = dequantiser

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event."""
        return self.base.event_shape

    def pull_back(
        self,
        x: Float[Tensor, "batch *event"],
        context: Float[Tensor, "rows features"] | None = None,
        generator: torch.Generator | None = None,
        integrands: Sequence[Rider] = (),
    ) -> Mapped:
        r"""Map data to latent.

        Args:
            x: Data (batch, \*event).
            context: Conditioning (batch, features), for a conditional density.
            generator: Source of the probes of stochastic trace estimators.
            integrands: Quantities to integrate along the way, and what else rides along.

        Raises:
            ValueError: If shapes of data or context do not fit the flow.
        """
        return self.transform.pull_back(x, self.encode(x, context), generator, integrands)

    def push_forward(
        self,
        z: Float[Tensor, "batch *event"],
        context: Float[Tensor, "rows features"] | None = None,
        generator: torch.Generator | None = None,
        with_log_det: bool = True,
    ) -> Mapped:
        r"""Map latent to data.

        Args:
            z: Latent (batch, \*event).
            context: Conditioning (batch, features), for a conditional density.
            generator: Source of the probes of stochastic trace estimators.
            with_log_det: Whether log_det is wanted; without, samples cost less and it is zero.

        Raises:
            ValueError: If shapes of latent or context do not fit the flow.
        """
        return self.transform.push_forward(z, self.encode(z, context), generator, with_log_det)

    def log_prob(
        self,
        x: Float[Tensor, "batch *event"],
        context: Float[Tensor, "rows features"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return the log-density of each row in nats."""
        mapped = self.pull_back(x, context, generator)
        return self.base.log_prob(mapped.value) + mapped.log_det

    def dequantise(
        self, x: Float[Tensor, "batch *event"], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, " batch"]]:
        r"""Return continuous values for rows as the data give them, and the log-density of what was added.

        .. math:: \log P(x) \ge E_{q(u \mid x)}\left[\log p(x + u) - \log q(u \mid x)\right].

        Args:
            x: Data (batch, \*event): whole numbers where there is a dequantiser.
            generator: Source of what is added.

        Returns:
            The rows, which are x itself without a dequantiser, and log q in nats.
        """
        return (x, x.new_zeros(len(x))) if self.dequantiser is None else self.dequantiser(x, generator)

    def sample(
        self,
        n: int,
        context: Float[Tensor, "rows features"] | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> Float[Tensor, "n *event"]:
        """Draw n rows without a gradient.

        Args:
            n: Number of rows.
            context: Conditioning, a row for each or one that is shared by all of them.
            generator: Source of the latent rows.
            temperature: Deviation of the latent rows; below 1 they keep to the likelier ones.
        """
        if context is not None and len(context) == 1:
            context = context.expand(n, -1)
        with torch.no_grad():
            latent = temperature * self.base.sample(n, generator)
            return self.push_forward(latent, context, with_log_det=False).value

    @torch.no_grad()
    def trajectory(self, z: Tensor, context: Tensor | None = None, points: int = 2) -> Float[Tensor, "times n *event"]:
        """Return the states from latent to data at ``points`` times per continuous block.

        The first entry is z itself.
        """
        return torch.stack([z, *self.transform.trajectory(z, self.encode(z, context), points)])

    def set_evaluation(self, solver: OdeSolver, divergence: DivergenceEstimator, autocast: bool = False) -> None:
        """Choose the solver and the divergence estimator of evaluation mode in every block.

        Args:
            solver: The solver.
            divergence: The divergence estimator.
            autocast: Whether fields honour an autocast around them, as in training.
        """
        for part in self.modules():
            if isinstance(part, Transform):
                part.set_evaluation(solver, divergence, autocast)

    def encode(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        r"""Check rows and their context, and return the context as transforms get it.

        Args:
            x: Rows, data or latent (batch, \*event).
            context: Conditioning (batch, features), for a conditional density.

        Raises:
            ValueError: If shapes of rows or context do not fit the flow.
        """
        if x.dim() != 1 + len(self.event_shape) or tuple(x.shape[1:]) != self.event_shape:
            expected = ", ".join(("batch", *map(str, self.event_shape)))
            raise ValueError(f"Expected rows with shape ({expected}), got {tuple(x.shape)}. Reshape the input.")
        wanted = (len(x), self.context_features) if self.context_features else None
        given = None if context is None else tuple(context.shape)
        if wanted != given:
            raise ValueError(
                f"Expected a context with shape {wanted}, got {given}. "
                + ("Give one row of context per row." if wanted else "Leave the context out: the density has none.")
            )
        return context if context is None or self.context_encoder is None else self.context_encoder(context)
