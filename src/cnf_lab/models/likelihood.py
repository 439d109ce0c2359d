"""What modules that report a likelihood share: validation and test."""

from typing import Any

import torch
from torch import Tensor, nn

from cnf_lab.data import Batch
from cnf_lab.errors import ConfigError
from cnf_lab.flows import Flow
from cnf_lab.metrics import ErrorOfMean, MeanWithError
from cnf_lab.models.base import FlowModule
from cnf_lab.ode import SolveStats


class Likelihoods(nn.Module):
    """The mean over the rows of a split, and what it owes to random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.nll, self.trace, self.dequantisation = MeanWithError(), ErrorOfMean(), ErrorOfMean()

    def take(self) -> dict[str, Tensor]:
        """Return the mean under the name ``""`` and the errors under theirs, and begin anew."""
        mean, error = self.nll.compute()
        found = {"": mean, "_standard_error": error}
        self.nll.reset()
        for name, metric in (("trace", self.trace), ("dequantisation", self.dequantisation)):
            if metric.update_called:
                found[f"_{name}_standard_error"] = metric.compute()
                metric.reset()
        return found


class LikelihoodModule(FlowModule[Flow]):
    """A density whose NLL is validated and tested, in nats per row.

    Validation and test use the flow in evaluation mode: its evaluation solver and divergence, and
    the same random numbers each time. Besides the mean ``nll`` with its standard error over rows
    there are, where they apply, ``nll_trace_standard_error``, what the probes of an estimated
    divergence leave open of the mean, and ``nll_dequantisation_standard_error``, what the draws of
    dequantisation noise do (with the probes of each).

    Args:
        draws: Draws of dequantisation noise per row, averaged; 1 where the data are continuous.
        **parts: Arguments of :class:`~cnf_lab.models.FlowModule`.

    Raises:
        ConfigError: If there is no draw.
    """

    #: Whether evaluations and log-dets are logged for each block as well.
    by_block: bool = False

    def __init__(self, draws: int = 1, **parts: Any) -> None:
        super().__init__(**parts)
        if draws < 1:
            raise ConfigError(f"Expected model.module.draws of at least 1, got {draws}. Type model.module.draws=1.")
        self.draws = draws
        self.val_likelihood, self.test_likelihood = Likelihoods(), Likelihoods()

    def training_step(self, batch: Batch, step: int) -> dict[str, Any]:
        """Evaluate the objective on a batch."""
        return self.staged_loss(batch.x, batch.context, step)

    def validation_step(self, batch: Batch, step: int) -> None:
        """Add a validation batch to the mean."""
        self._evaluate("val", self.val_likelihood, batch, step)

    def test_step(self, batch: Batch, step: int) -> None:
        """Add a test batch to the mean."""
        self._evaluate("test", self.test_likelihood, batch, step)

    def on_validation_epoch_end(self) -> None:
        """Log the validation likelihood."""
        self._log("val", self.val_likelihood)

    def on_test_epoch_end(self) -> None:
        """Log the test likelihood."""
        self._log("test", self.test_likelihood)

    def log_likelihood(self, stage: str, quantity: str, value: Tensor) -> None:
        """Log a likelihood or an error of it, in nats per row; a subclass adds its own unit.

        Args:
            stage: train, val or test.
            quantity: ``""`` for the mean, else what is appended to the name of the likelihood.
            value: Nats per row.
        """
        # Every process has the same number here; sync_dist only keeps Lightning from warning.
        self.log(f"{stage}/nll{quantity}", value, prog_bar=not quantity, sync_dist=True)

    def _evaluate(self, stage: str, likelihoods: Likelihoods, batch: Batch, step: int) -> None:
        generator = self.step_generator(stage, step)
        values, errors = [], []
        for _ in range(self.draws):
            x, log_q = self.flow.dequantise(batch.x, generator)
            mapped = self.flow.pull_back(x, batch.context, generator)
            values.append(log_q - self.flow.base.log_prob(mapped.value) - mapped.log_det)
            errors.append(mapped.log_det_error)
            for name, value in self._solves(mapped.solves, mapped.block_log_dets).items():
                self.log(f"{stage}/{name}", value, batch_size=len(batch.x), sync_dist=True)
        draws = torch.stack(values)
        likelihoods.nll.update(draws.mean(dim=0))
        if self.draws > 1:
            likelihoods.dequantisation.update(draws.std(dim=0) / self.draws**0.5)
        estimated = [error for error in errors if error is not None]
        if estimated:
            likelihoods.trace.update(torch.stack(estimated).square().sum(dim=0).sqrt() / self.draws)

    def _solves(self, solves: tuple[SolveStats, ...], log_dets: tuple[Tensor, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {"nfe": float(SolveStats.total(solves).nfe_forward)} if solves else {}
        if self.by_block:
            for k, (solve, log_det) in enumerate(zip(solves, log_dets, strict=True)):
                found |= {f"nfe_block_{k}": float(solve.nfe_forward), f"log_det_block_{k}": log_det.mean()}
        return found

    def _log(self, stage: str, likelihoods: Likelihoods) -> None:
        for quantity, value in likelihoods.take().items():
            self.log_likelihood(stage, quantity, value)
