r"""Stochastic divergence estimates from random probes.

References:
    Hutchinson (1990), A stochastic estimator of the trace of the influence matrix.
    Grathwohl et al., FFJORD (2019), https://arxiv.org/abs/1810.01367, sections 3.1 and 3.2.1.
    Meyer et al., Hutch++ (2021), https://arxiv.org/abs/2010.09649.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from cnf_lab.errors import ConfigError
from cnf_lab.fields.base import BottleneckField, Time, VectorField, value_and_jvp
from cnf_lab.trace.base import DivergenceEstimator, Linearised, Probe

MODES = ("forward", "reverse")


class Rademacher:
    """Probes of independent signs: the least variance among independent entries."""

    def __call__(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw signs of a shape, with dtype and device of another tensor."""
        bits = torch.randint(0, 2, shape, generator=generator, device=like.device)
        return bits.to(like.dtype) * 2 - 1


class Gaussian:
    """Standard normal probes, the original's choice for rows."""

    def __call__(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw normal numbers of a shape, with dtype and device of another tensor."""
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


class ProbeEstimator(DivergenceEstimator):
    """What estimators with random probes share.

    Args:
        distribution: What the probes are drawn from.
        probes: Probes per example; the estimate is their mean.
    """

    def __init__(self, distribution: Rademacher | Gaussian, probes: int = 1) -> None:
        if probes < 1:
            raise ConfigError(f"Expected trace.probes of at least 1, got {probes}. Type trace.probes=1.")
        self.distribution, self.probes, self.count = distribution, probes, probes

    @abstractmethod
    def probe_shape(self, field: VectorField) -> tuple[int, ...]:
        """Return the shape of one probe."""

    def describe(self, field: VectorField) -> str:
        """Name the estimator and its probes."""
        plural = "s" if self.probes > 1 else ""
        return f"{type(self).__name__}, {self.probes} {type(self.distribution).__name__} probe{plural}"

    def start(
        self,
        field: VectorField,
        x: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
        with_norm: bool = False,
    ) -> Probe:
        """Draw probes with shape (probes, batch, \\*space of the probe)."""
        return self.distribution((self.probes, len(x), *self.probe_shape(field)), x, generator)


class Hutchinson(ProbeEstimator):
    r"""The estimate :math:`\frac1k \sum_j v_j^\top J v_j` with :math:`E[v v^\top] = I`.

    Products :math:`J v` come from forward mode, all probes in one matrix product per layer, so
    that training needs no second derivative by reverse mode. A field that has
    operations without a forward derivative takes reverse mode: :math:`v^\top J`. The variance
    of one probe is :math:`2 \lVert S \rVert_F^2` for Gaussian probes, S the symmetric part of
    J, and the same without the diagonal of S for Rademacher probes.

    Args:
        distribution: What the probes are drawn from.
        probes: Probes per example; the estimate is their mean.
        mode: ``forward`` or ``reverse``; None takes forward mode where the field supports it.

    Raises:
        ConfigError: If an option is out of range.
    """

    def __init__(self, distribution: Rademacher | Gaussian, probes: int = 1, mode: str | None = None) -> None:
        super().__init__(distribution, probes)
        if mode is not None and mode not in MODES:
            raise ConfigError(f"Expected trace.mode forward, reverse or null, got {mode}. Type trace.mode=null.")
        self.mode = mode

    def probe_shape(self, field: VectorField) -> tuple[int, ...]:
        """Return the event shape."""
        return field.event_shape

    def linearise(self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, probe: Probe) -> Linearised:
        """Return dx/dt and the estimate."""
        forward = field.forward_mode if self.mode is None else self.mode == "forward"
        value, products = (field.value_and_jvp if forward else field.value_and_vjp)(t, x, probe, context)
        estimates = inner(probe, products)
        return Linearised(value, estimates.mean(dim=0), estimates, square(products).mean(dim=0))


class HutchPlusPlus(DivergenceEstimator):
    r"""Hutch++: the trace on a sketched range exactly, Hutchinson's estimate on the rest.

    .. math:: \mathrm{tr}(Q^\top J Q) + \frac1k \sum_j w_j^\top J w_j, \qquad
              w_j = (I - Q Q^\top) v_j, \quad Q = \mathrm{orth}(J S).

    Unbiased for any Q that does not depend on the v, which is why Q is a constant of the
    gradient. It wins over as many plain probes where few directions carry the Jacobian, at
    the price of a second pass and of an orthogonalisation per evaluation and row.

    Args:
        distribution: What sketch S and probes v are drawn from.
        sketch: Columns of S per example, at most D.
        probes: Probes v per example.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(self, distribution: Rademacher | Gaussian, sketch: int = 2, probes: int = 1) -> None:
        for name, number in (("sketch", sketch), ("probes", probes)):
            if number < 1:
                raise ConfigError(f"Expected trace.{name} of at least 1, got {number}. Type trace.{name}=1.")
        self.distribution, self.sketch, self.probes, self.count = distribution, sketch, probes, probes

    def describe(self, field: VectorField) -> str:
        """Name the estimator, its sketch and its probes."""
        return f"Hutch++, sketch of {self.sketch}, {self.probes} {type(self.distribution).__name__} on the rest"

    def chosen_for(self, field: VectorField) -> DivergenceEstimator:
        """Return itself; refuse a sketch that is larger than the event."""
        event = math.prod(field.event_shape)
        if self.sketch > event:
            raise ConfigError(
                f"Expected trace.sketch of at most {event}, the size of an event, got {self.sketch}. "
                f"Type trace.sketch={event}, or trace=exact."
            )
        return self

    def start(
        self,
        field: VectorField,
        x: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
        with_norm: bool = False,
    ) -> Probe:
        """Draw sketch and probes, (sketch, batch, \\*event) and (probes, batch, \\*event)."""
        return tuple(self.distribution((count, *x.shape), x, generator) for count in (self.sketch, self.probes))

    def linearise(self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, probe: Probe) -> Linearised:
        """Return dx/dt and the estimate."""
        sketch, probes = probe
        with torch.no_grad():
            image = field.value_and_jvp(t, x, sketch, context)[1].flatten(2)  # (sketch, batch, D)
            basis = torch.linalg.qr(image.permute(1, 2, 0).to(x.dtype))[0]  # (batch, D, sketch)
            flat = probes.flatten(2).permute(1, 2, 0)  # (batch, D, probes)
            rest = flat - basis @ (basis.mT @ flat)
            both = torch.cat([basis, rest], dim=-1).permute(2, 0, 1).reshape(-1, *x.shape)
        value, products = field.value_and_jvp(t, x, both, context)
        found = inner(both, products)  # (sketch + probes, batch)
        estimates = found[: self.sketch].sum(dim=0) + found[self.sketch :]
        squares = square(products)
        squared_norm = squares[: self.sketch].sum(dim=0) + squares[self.sketch :].mean(dim=0)
        return Linearised(value, estimates.mean(dim=0), estimates, squared_norm)


class Bottleneck(ProbeEstimator):
    r"""Hutchinson's estimate in the bottleneck of :math:`f = g \circ h`.

    .. math:: \mathrm{tr}\big(\tfrac{\partial g}{\partial h}\tfrac{\partial h}{\partial x}\big)
              = \mathrm{tr}\big(\tfrac{\partial h}{\partial x}\tfrac{\partial g}{\partial h}\big),

    so that probes live in the smaller space of h and there are fewer entries to be noisy in.
    The Jacobian's norm takes a probe of its own in the space of x.
    """

    def chosen_for(self, field: VectorField) -> DivergenceEstimator:
        """Return itself; refuse a field that has no bottleneck."""
        if not isinstance(field, BottleneckField):
            raise ConfigError(
                f"Expected a field with a bottleneck for trace=bottleneck, got architecture {type(field).__name__}. "
                "Type architecture=encoder_decoder, or trace=exact."
            )
        return self

    def probe_shape(self, field: VectorField) -> tuple[int, ...]:
        """Return the shape of the encoded event."""
        assert isinstance(field, BottleneckField)
        return field.bottleneck_shape

    def start(
        self,
        field: VectorField,
        x: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
        with_norm: bool = False,
    ) -> Probe:
        """Draw probes in the bottleneck, and one in the space of x for the norm where it is wanted."""
        outer = self.distribution((1, *x.shape), x, generator) if with_norm else None
        return super().start(field, x, context, generator), outer

    def linearise(self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, probe: Probe) -> Linearised:
        """Return dx/dt and the estimate."""
        assert isinstance(field, BottleneckField)
        vectors, outer = probe
        h = field.encode(t, x, context)
        value, decoded = value_and_jvp(lambda y: field.decode(t, y, context), h, vectors)
        _, encoded = value_and_jvp(lambda y: field.encode(t, y, context), x, decoded)
        estimates = inner(vectors, encoded)
        squared_norm = None if outer is None else square(field.value_and_jvp(t, x, outer, context)[1])[0]
        return Linearised(value, estimates.mean(dim=0), estimates, squared_norm)


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner products of probes and products, (k, batch, \\*space) twice to (k, batch).

    The sum is taken in the probes' precision, whatever the field ran in.
    """
    return (left * right.to(left.dtype)).flatten(2).sum(dim=-1)


def square(products: Tensor) -> Tensor:
    r"""Return the squared lengths of products, (k, batch, \*space) to (k, batch), in float32 at least."""
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    return products.square().flatten(2).sum(dim=-1)
