r"""Stochastic divergence estimates from random probes.

References:
    Hutchinson (1990), A stochastic estimator of the trace of the influence matrix.
    Grathwohl et al., FFJORD (2019), https://arxiv.org/abs/1810.01367, sections 3.1 and 3.2.1.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from cnf_lab.errors import ConfigError
from cnf_lab.fields.base import BottleneckField, Time, VectorField, value_and_jvp
from cnf_lab.trace.base import DivergenceEstimator, Probe


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
        self.distribution, self.probes = distribution, probes

    @abstractmethod
    def probe_shape(self, field: VectorField) -> tuple[int, ...]:
        """Return the shape of one probe."""

    def start(self, field: VectorField, x: Tensor, generator: torch.Generator | None) -> Probe:
        """Draw probes with shape (probes, batch, \\*space of the probe)."""
        return self.distribution((self.probes, len(x), *self.probe_shape(field)), x, generator)


class Hutchinson(ProbeEstimator):
    r"""The estimate :math:`\frac1k \sum_j v_j^\top J v_j` with :math:`E[v v^\top] = I`.

    Products :math:`J v` come from forward mode, all probes in the same matrix products as
    the value, so that training needs no second derivative by reverse mode. The variance of
    one probe is :math:`2 \lVert S \rVert_F^2` for Gaussian probes, S the symmetric part of J,
    and the same without the diagonal of S for Rademacher probes.
    """

    def probe_shape(self, field: VectorField) -> tuple[int, ...]:
        """Return the event shape."""
        return field.event_shape

    def value_and_divergence(
        self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, probe: Probe
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and the estimate (batch,)."""
        assert probe is not None
        value, products = field.value_and_jvp(t, x, probe, context)
        return value, _mean_of_products(probe, products)


class Bottleneck(ProbeEstimator):
    r"""Hutchinson's estimate in the bottleneck of :math:`f = g \circ h`.

    .. math:: \mathrm{tr}\big(\tfrac{\partial g}{\partial h}\tfrac{\partial h}{\partial x}\big)
              = \mathrm{tr}\big(\tfrac{\partial h}{\partial x}\tfrac{\partial g}{\partial h}\big),

    so that probes live in the smaller space of h and there are fewer entries to be noisy in.
    """

    def check(self, field: VectorField) -> None:
        """Raise ConfigError for a field that has no bottleneck."""
        if not isinstance(field, BottleneckField):
            raise ConfigError(
                f"Expected a field with a bottleneck for trace=bottleneck, got architecture {type(field).__name__}. "
                "Type architecture=encoder_decoder, or trace=exact."
            )

    def probe_shape(self, field: VectorField) -> tuple[int, ...]:
        """Return the shape of the encoded event."""
        assert isinstance(field, BottleneckField)
        return field.bottleneck_shape

    def value_and_divergence(
        self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, probe: Probe
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and the estimate (batch,)."""
        assert isinstance(field, BottleneckField)
        assert probe is not None
        h = field.encode(t, x, context)
        value, decoded = value_and_jvp(lambda y: field.decode(t, y, context), h, probe)
        _, encoded = value_and_jvp(lambda y: field.encode(t, y, context), x, decoded)
        return value, _mean_of_products(probe, encoded)


def _mean_of_products(left: Tensor, right: Tensor) -> Tensor:
    # (probes, batch, *space) twice -> (batch,)
    return (left * right).flatten(2).sum(dim=-1).mean(dim=0)
