"""Density estimation on rows."""

from typing import Any

from cnf_lab.data import Batch
from cnf_lab.metrics import ErrorOfMean, MeanWithError
from cnf_lab.models.base import FlowModule
from cnf_lab.ode import SolveStats


class DensityModule(FlowModule):
    """A density of rows, conditional or not; reports ``nll`` in nats per row.

    Validation and test use the flow in evaluation mode: its evaluation solver and divergence.
    Where that divergence is an estimate of several probes, ``nll_trace_standard_error`` is what
    the probes leave open of the mean.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.val_nll, self.test_nll = MeanWithError(), MeanWithError()
        self.val_trace, self.test_trace = ErrorOfMean(), ErrorOfMean()

    def training_step(self, batch: Batch, step: int) -> dict[str, Any]:
        """Evaluate the objective on a batch."""
        return self.staged_loss(batch.x, batch.context, step)

    def validation_step(self, batch: Batch, step: int) -> None:
        """Add a validation batch to the mean."""
        self._evaluate("val", self.val_nll, self.val_trace, batch, step)

    def test_step(self, batch: Batch, step: int) -> None:
        """Add a test batch to the mean."""
        self._evaluate("test", self.test_nll, self.test_trace, batch, step)

    def on_validation_epoch_end(self) -> None:
        """Log the validation NLL."""
        self._log("val", self.val_nll, self.val_trace)

    def on_test_epoch_end(self) -> None:
        """Log the test NLL."""
        self._log("test", self.test_nll, self.test_trace)

    def _evaluate(self, stage: str, nll: MeanWithError, trace: ErrorOfMean, batch: Batch, step: int) -> None:
        mapped = self.flow.pull_back(batch.x, batch.context, self.step_generator(stage, step))
        nll.update(-self.flow.base.log_prob(mapped.value) - mapped.log_det)
        if mapped.log_det_error is not None:
            trace.update(mapped.log_det_error)
        if mapped.solves:
            nfe = SolveStats.total(mapped.solves).nfe_forward
            self.log(f"{stage}/nfe", float(nfe), batch_size=len(batch.x), sync_dist=True)

    def _log(self, stage: str, nll: MeanWithError, trace: ErrorOfMean) -> None:
        self.log_mean(stage, "nll", nll)
        if trace.update_called:
            self.log(f"{stage}/nll_trace_standard_error", trace.compute(), sync_dist=True)
            trace.reset()
