"""What the LightningModules of all model families share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cnf_lab.flows import Flow
from cnf_lab.metrics import MeanWithError
from cnf_lab.objectives import LossTerms, Objective
from cnf_lab.ode import backward_failures

STAGES = ("train", "val", "test")


class FlowModule(pl.LightningModule):
    """A flow, its objective and its optimiser in Lightning's terms.

    Random numbers of a step come from a generator seeded by (seed, stage, rank, epoch, step):
    processes draw different probes, and a resumed run draws the same ones.

    Args:
        flow: The density.
        objective: What training minimises.
        optimiser: Makes the optimiser from ``params``.
        schedule: Makes the learning-rate schedule from ``optimizer``; it is stepped once per
            epoch. None keeps the rate.
        seed: Seed of the steps' generators.
        rebuild: Plain values from which the same flow can be built again; kept in checkpoints.
    """

    #: The quantity that model selection, early stopping and plateau schedules watch.
    monitor: str = "val/nll"

    def __init__(
        self,
        flow: Flow,
        objective: Objective,
        optimiser: Callable[..., Optimizer],
        schedule: Callable[..., LRScheduler | ReduceLROnPlateau] | None,
        seed: int,
        rebuild: dict[str, Any],
    ) -> None:
        super().__init__()
        # Plain values only: objects in a checkpoint would not load with weights_only=True.
        self.save_hyperparameters(rebuild, logger=False)
        self.flow, self.objective, self.seed = flow, objective, seed
        self._optimiser, self._schedule = optimiser, schedule

    def step_generator(self, stage: str, step: int) -> torch.Generator:
        """Return the generator of one step of this process."""
        epoch = self.current_epoch if stage == "train" else 0
        words = np.random.SeedSequence([self.seed, STAGES.index(stage), self.global_rank, epoch, step])
        seed = int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.Generator(self.device).manual_seed(seed)

    def log_terms(self, result: LossTerms) -> dict[str, Any]:
        """Log the parts of a training loss and return what Lightning and the callbacks need."""
        for name, values in result.terms.items():
            mean = values.detach().mean()
            self.log(f"train/{name}", mean, on_step=False, on_epoch=True, batch_size=len(values), sync_dist=True)
        self.log("train/loss", result.loss.detach(), on_step=True, on_epoch=False)
        return {"loss": result.loss, "solves": result.solves}

    def log_mean(self, stage: str, name: str, metric: MeanWithError) -> None:
        """Log a metric's mean and standard error over all processes, and reset it."""
        mean, error = metric.compute()
        # Every process has the same number here; sync_dist only keeps Lightning from warning.
        self.log(f"{stage}/{name}", mean, prog_bar=True, sync_dist=True)
        self.log(f"{stage}/{name}_standard_error", error, sync_dist=True)
        metric.reset()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; a failed adjoint solve becomes a SolverError."""
        with backward_failures():
            loss.backward(*args, **kwargs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Tell CUDA graphs of compiled steps that the results of the last training step may be overwritten."""
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()

    def on_train_start(self) -> None:
        """Let schedules step with the last batch of an epoch.

        Lightning's own interval "epoch" steps them after the epoch's checkpoint is written, and
        a resumed run would miss that step.
        """
        for config in self.trainer.lr_scheduler_configs:
            config.frequency = int(self.trainer.num_training_batches)

    def lr_scheduler_step(self, scheduler: LRScheduler | ReduceLROnPlateau, metric: Any | None) -> None:
        """Step a schedule; one that waits for improvement counts validations, not epochs."""
        validated = (self.current_epoch + 1) % (self.trainer.check_val_every_n_epoch or 1) == 0
        if validated or not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimiser and its schedule."""
        optimiser = self._optimiser(params=[p for p in self.parameters() if p.requires_grad])
        if self._schedule is None:
            return optimiser
        schedule: LRSchedulerConfigType = {
            "scheduler": self._schedule(optimizer=optimiser),
            "interval": "step",  # once per epoch all the same: see on_train_start
            "monitor": self.monitor,
            "strict": False,  # the first epochs may go without validation
        }
        return {"optimizer": optimiser, "lr_scheduler": schedule}
