"""The choice of an estimator by what the field offers."""

import math

import torch
from torch import Tensor

from cnf_lab.fields.base import BottleneckField, Time, VectorField
from cnf_lab.trace.base import DivergenceEstimator, Linearised, Probe
from cnf_lab.trace.exact import Exact
from cnf_lab.trace.hutchinson import Bottleneck, Gaussian, Hutchinson, Rademacher


class Auto(DivergenceEstimator):
    """The cheapest estimator without variance where it costs about as much as a probe, else the least noisy one.

    1. A closed form is exact at the price of about one probe.
    2. A few tangents cost little more.
    3. A bottleneck of at most a quarter of the event takes its probes there.
    4. Anything else takes Hutchinson's estimate.

    Args:
        distribution: What probes are drawn from.
        probes: Probes per example.
        tangents: Most tangents that an exact divergence may take.
        memory: Budget in GiB of the exact divergence.
    """

    def __init__(
        self,
        distribution: Rademacher | Gaussian,
        probes: int = 1,
        tangents: int = 8,
        memory: float = 1.0,
    ) -> None:
        self.tangents = tangents
        self.by_tangents, self.by_probes = Exact(memory), Hutchinson(distribution, probes)
        self.by_bottleneck = Bottleneck(distribution, probes)

    def chosen_for(self, field: VectorField) -> DivergenceEstimator:
        """Return the estimator for a field."""
        return self._choice(field)[0]

    def describe(self, field: VectorField) -> str:
        """Say what is chosen for a field, and why."""
        choice, reason = self._choice(field)
        return f"{choice.describe(field)} (trace=auto: {reason})"

    def start(
        self,
        field: VectorField,
        x: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
        with_norm: bool = False,
    ) -> Probe:
        """Start the chosen estimator."""
        return self.chosen_for(field).start(field, x, context, generator, with_norm)

    def linearise(self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, probe: Probe) -> Linearised:
        """Evaluate with the chosen estimator."""
        return self.chosen_for(field).linearise(field, t, x, context, probe)

    def _choice(self, field: VectorField) -> tuple[DivergenceEstimator, str]:
        event = math.prod(field.event_shape)
        if field.has_closed_form:
            return self.by_tangents, "the field has a closed form"
        if field.divergence_tangents <= self.tangents:
            return self.by_tangents, f"{field.divergence_tangents} tangents are few"
        if isinstance(field, BottleneckField) and 4 * math.prod(field.bottleneck_shape) <= event:
            return self.by_bottleneck, "the field has a narrow bottleneck"
        return (
            self.by_probes,
            f"the field has no closed form, and an exact divergence would take {field.divergence_tangents} tangents",
        )
