"""Density estimation on rows."""

from typing import Any

from cnf_lab.data import Batch
from cnf_lab.metrics import MeanWithError
from cnf_lab.models.base import FlowModule
from cnf_lab.ode import SolveStats


class DensityModule(FlowModule):
    """A density of rows, conditional or not; reports ``nll`` in nats per row.

    Validation and test use the flow in evaluation mode: its evaluation solver and divergence.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.val_nll, self.test_nll = MeanWithError(), MeanWithError()

    def training_step(self, batch: Batch, step: int) -> dict[str, Any]:
        """Evaluate the objective on a batch."""
        return self.log_terms(self.objective(self.flow, batch.x, batch.context, self.step_generator("train", step)))

    def validation_step(self, batch: Batch, step: int) -> None:
        """Add a validation batch to the mean."""
        self._evaluate("val", self.val_nll, batch, step)

    def test_step(self, batch: Batch, step: int) -> None:
        """Add a test batch to the mean."""
        self._evaluate("test", self.test_nll, batch, step)

    def on_validation_epoch_end(self) -> None:
        """Log the validation NLL."""
        self.log_mean("val", "nll", self.val_nll)

    def on_test_epoch_end(self) -> None:
        """Log the test NLL."""
        self.log_mean("test", "nll", self.test_nll)

    def _evaluate(self, stage: str, metric: MeanWithError, batch: Batch, step: int) -> None:
        mapped = self.flow.pull_back(batch.x, batch.context, self.step_generator(stage, step))
        metric.update(-self.flow.base.log_prob(mapped.value) - mapped.log_det)
        nfe = SolveStats.total(mapped.solves).nfe_forward
        self.log(f"{stage}/nfe", float(nfe), batch_size=len(batch.x), sync_dist=True)
