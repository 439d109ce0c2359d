"""Variational autoencoders."""

import math
from typing import Any

import torch
from torch import Tensor

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.data import Batch
from cnf_lab.errors import ConfigError
from cnf_lab.metrics import ErrorOfMean, MeanWithError, bits_per_dim
from cnf_lab.models.base import FlowModule
from cnf_lab.objectives import Elbo, LossTerms
from cnf_lab.ode import SolveStats


class VaeModule(FlowModule[VariationalAutoencoder]):
    """A variational autoencoder; reports ``negative_elbo`` and ``elbo`` in nats per image.

    Validation and test weight every image the same, use the evaluation solver and divergence, and the
    same random numbers each time. Besides the mean with its standard error over images there are its
    parts ``reconstruction`` and ``kl``, the posterior flow's ``log_det``, and for pixels of more than
    two values ``bits_per_dim``. The weight of the KL is 1 in them, whatever the warm-up.

    Args:
        draws: Draws of the posterior per image, averaged.
        **parts: Arguments of :class:`~cnf_lab.models.FlowModule`.

    Raises:
        ConfigError: If there is no draw.
    """

    monitor = "val/negative_elbo"

    def __init__(self, draws: int = 1, **parts: Any) -> None:
        super().__init__(**parts)
        if draws < 1:
            raise ConfigError(f"Expected model.module.draws of at least 1, got {draws}. Type model.module.draws=1.")
        self.draws = draws
        self.val_bound, self.test_bound = MeanWithError(), MeanWithError()
        self.val_probes, self.test_probes = ErrorOfMean(), ErrorOfMean()

    def training_step(self, batch: Batch, step: int) -> dict[str, Any]:
        """Evaluate the objective on a batch."""
        return self.staged_loss(batch.x, batch.context, step)

    def validation_step(self, batch: Batch, step: int) -> None:
        """Add a validation batch to the means."""
        self._evaluate("val", self.val_bound, self.val_probes, batch, step)

    def test_step(self, batch: Batch, step: int) -> None:
        """Add a test batch to the means."""
        self._evaluate("test", self.test_bound, self.test_probes, batch, step)

    def on_validation_epoch_end(self) -> None:
        """Log the validation ELBO."""
        self._log("val", self.val_bound, self.val_probes)

    def on_test_epoch_end(self) -> None:
        """Log the test ELBO."""
        self._log("test", self.test_bound, self.test_probes)

    def log_terms(self, result: LossTerms) -> dict[str, Any]:
        """Log the parts of a training loss, the ELBO in bits/dim too."""
        value = result.terms["negative_elbo"].detach().mean()
        self._log_in_bits("train", "", value, len(result.terms["negative_elbo"]))
        if isinstance(self.stage.objective, Elbo):
            beta = self.stage.objective.beta
            self.log("train/beta", beta, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        return super().log_terms(result)

    def _evaluate(self, stage: str, bound: MeanWithError, probes: ErrorOfMean, batch: Batch, step: int) -> None:
        found = self.flow.terms(batch.x, self.draws, self.step_generator(stage, step))
        bound.update(-found.log_weight.mean(dim=0))
        if found.log_det_error is not None:
            probes.update(found.log_det_error.square().sum(dim=0).sqrt() / self.draws)
        parts = {"reconstruction": -found.log_likelihood, "kl": found.kl, "log_det": found.log_det}
        if found.solves:
            parts["nfe"] = torch.tensor(float(SolveStats.total(found.solves).nfe_forward), device=self.device)
        for name, values in parts.items():
            self.log(f"{stage}/{name}", values.mean(), batch_size=len(batch.x), sync_dist=True)

    def _log(self, stage: str, bound: MeanWithError, probes: ErrorOfMean) -> None:
        mean, error = bound.compute()
        found = {"": mean, "_standard_error": error}
        bound.reset()
        if probes.update_called:
            found["_trace_standard_error"] = probes.compute()
            probes.reset()
        for quantity, value in found.items():
            # Every process has the same number here; sync_dist only keeps Lightning from warning.
            self.log(f"{stage}/negative_elbo{quantity}", value, prog_bar=not quantity, sync_dist=True)
            self._log_in_bits(stage, quantity, value)
        self.log(f"{stage}/elbo", -mean, sync_dist=True)

    def _log_in_bits(self, stage: str, quantity: str, value: Tensor, batch_size: int | None = None) -> None:
        if self.flow.likelihood.levels > 2:
            in_bits = bits_per_dim(value, math.prod(self.flow.event_shape))
            name = f"{stage}/bits_per_dim{quantity}"
            self.log(name, in_bits, on_step=False, on_epoch=True, sync_dist=True, batch_size=batch_size)
