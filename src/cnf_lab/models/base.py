"""What the LightningModules of all model families share."""

import logging
import math
from collections.abc import Callable
from typing import Any, Generic

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cnf_lab.objectives import LossTerms, Model, Objective, Stage, StagedObjective
from cnf_lab.ode import backward_failures

log = logging.getLogger("cnf_lab")
PHASES = ("train", "val", "test")


class FlowModule(pl.LightningModule, Generic[Model]):
    """A flow, its objective and its optimiser in Lightning's terms.

    Random numbers of a step come from a generator seeded by (seed, stage, rank, epoch, step):
    processes draw different probes, and a resumed run draws the same ones.

    An objective in stages is trained one stage after the other. The weights go on as they are, or
    from the best so far where the stage asks for it or patience ended the one before; optimiser
    and schedule start anew.

    Args:
        flow: The density, or the autoencoder.
        objective: What training minimises, in one stage or several.
        optimiser: Makes the optimiser from ``params``, and from ``lr`` where a stage has its own.
        schedule: Makes the learning-rate schedule from ``optimizer``, and from ``epochs`` where a
            stage has a number of its own; it is stepped once per epoch. None keeps the rate.
        seed: Seed of the steps' generators.
        rebuild: Plain values from which the same flow can be built again; kept in checkpoints.

    Raises:
        ConfigError: If the objective cannot train the flow.
    """

    #: The quantity that model selection, early stopping and plateau schedules watch.
    monitor: str = "val/nll"
    #: Unit of that quantity.
    unit: str = "nats"

    def __init__(
        self,
        flow: Model,
        objective: Objective[Model] | StagedObjective,
        optimiser: Callable[..., Optimizer],
        schedule: Callable[..., LRScheduler | ReduceLROnPlateau] | None,
        seed: int,
        rebuild: dict[str, Any],
    ) -> None:
        super().__init__()
        # Plain values only: objects in a checkpoint would not load with weights_only=True.
        self.save_hyperparameters(rebuild, logger=False)
        self.flow: Model = flow
        self.seed = seed
        self.stages = objective.stages if isinstance(objective, StagedObjective) else (Stage("training", objective),)
        for stage in self.stages:
            stage.objective.check(flow)
        self.stage_index = 0
        self._stage_epochs = 0  # finished epochs of the stage
        self._stage_cut = False  # whether something ended it before its budget
        self.began_from_best = False
        self._usual_validation: int | None = None
        self._optimiser, self._schedule = optimiser, schedule

    @property
    def stage(self) -> Stage:
        """The stage that training is in."""
        return self.stages[self.stage_index]

    @property
    def solves(self) -> bool:
        """Whether any stage's steps solve."""
        return any(stage.objective.solves for stage in self.stages)

    @property
    def in_last_stage(self) -> bool:
        """Whether no stage comes after this one."""
        return self.stage_index == len(self.stages) - 1

    def end_stage(self) -> None:
        """End the stage with this epoch, whatever is left of its budget."""
        self._stage_cut = True

    def staged_loss(self, x: Tensor, context: Tensor | None, step: int) -> dict[str, Any]:
        r"""Evaluate the stage's objective on a training batch, log its parts, and return what Lightning needs.

        Args:
            x: Rows (batch, \*event).
            context: Conditioning (batch, features) or None.
            step: Number of the batch in the epoch.
        """
        rows = self.stage.plan.rows
        context = None if context is None else context[:rows]
        return self.log_terms(self.stage.objective(self.flow, x[:rows], context, self.step_generator("train", step)))

    def step_generator(self, stage: str, step: int) -> torch.Generator:
        """Return the generator of one step of this process."""
        epoch = self.current_epoch if stage == "train" else 0
        words = np.random.SeedSequence([self.seed, PHASES.index(stage), self.global_rank, epoch, step])
        seed = int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.Generator(self.device).manual_seed(seed)

    def log_terms(self, result: LossTerms) -> dict[str, Any]:
        """Log the parts of a training loss and return what Lightning and the callbacks need."""
        for name, values in result.terms.items():
            mean = values.detach().mean()
            self.log(f"train/{name}", mean, on_step=False, on_epoch=True, batch_size=len(values), sync_dist=True)
        self.log("train/loss", result.loss.detach(), on_step=True, on_epoch=False)
        return {"loss": result.loss, "solves": result.solves}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; a failed adjoint solve becomes a SolverError."""
        with backward_failures():
            loss.backward(*args, **kwargs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Tell CUDA graphs of compiled steps that the results of the last training step may be overwritten."""
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()

    def on_train_start(self) -> None:
        """Let schedules step with the last batch of an epoch, and keep a finished run from going on."""
        self._usual_validation = self.trainer.check_val_every_n_epoch
        self._step_schedules_by_epoch()
        for stage in self.stages[self.stage_index + 1 :]:
            self._optimisation(stage)  # what it refuses is said now, not at the hand-over
        before = self._epochs_before_last
        if before and 0 <= (self.trainer.max_epochs or -1) <= before and self.trainer.is_global_zero:
            log.warning(
                "Expected epochs for every stage, got trainer.max_epochs=%d where the stages before %s take %d: it "
                "will not begin. Type trainer.max_epochs=-1, or lower recipe.flow_matching_steps.",
                self.trainer.max_epochs,
                self.stages[-1].name,
                before,
            )
        self.trainer.should_stop |= self._stage_over and self.in_last_stage

    def on_train_epoch_start(self) -> None:
        """Begin the next stage where it is due, and settle when validation comes."""
        if self._stage_over and not self.in_last_stage:
            self._hand_over()
        self.stage.objective.begin_epoch(self._stage_epochs)
        last = self._stage_epochs + 1 == self._epochs_of(self.stage)
        every = self.stage.plan.validate_every_n_epochs or self._usual_validation
        self.trainer.check_val_every_n_epoch = 1 if last else every
        if len(self.stages) > 1:
            self.log("train/stage", float(self.stage_index), on_step=False, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        """Count the stage's epochs; the run stops with those of the last stage."""
        self._stage_epochs += 1
        self.trainer.should_stop |= self._stage_over and self.in_last_stage

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep where the stages are."""
        checkpoint["stage"] = [self.stage_index, self._stage_epochs, int(self._stage_cut)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go back to where the stages were, before Lightning makes the optimiser."""
        self.stage_index, self._stage_epochs, cut = checkpoint.get("stage", (0, 0, 0))
        self._stage_cut = bool(cut)

    @property
    def _stage_over(self) -> bool:
        epochs = self._epochs_of(self.stage)
        return self._stage_cut or (epochs is not None and self._stage_epochs >= epochs)

    @property
    def _epochs_before_last(self) -> int:
        return sum(self._epochs_of(stage) or 0 for stage in self.stages[:-1])

    def _epochs_of(self, stage: Stage) -> int | None:
        """Return the epochs of a stage's step budget, or None without one."""
        if stage.plan.steps is None:
            return None
        if self.trainer.train_dataloader is None:  # the optimiser is made before the data are loaded
            self.trainer.fit_loop.setup_data()
        per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        return math.ceil(stage.plan.steps / per_epoch)

    def _hand_over(self) -> None:
        before, cut = self.stage.name, self._stage_cut
        self.stage_index, self._stage_epochs, self._stage_cut = self.stage_index + 1, 0, False
        # What ran out of patience has got worse since its best.
        self.began_from_best = (cut or self.stage.plan.from_best) and self._load_best()
        self.trainer.strategy.setup_optimizers(self.trainer)
        self._step_schedules_by_epoch()
        if self.trainer.is_global_zero:
            log.info("step %d: %s hands over to %s", self.trainer.global_step, before, self.stage.name)

    def _load_best(self) -> bool:
        for callback in self.trainer.checkpoint_callbacks:
            path = getattr(callback, "best_model_path", "")
            if path and getattr(callback, "monitor", None) == self.monitor:
                self.load_state_dict(torch.load(path, map_location=self.device, weights_only=True)["state_dict"])
                return True
        return False

    def _step_schedules_by_epoch(self) -> None:
        # Lightning's own interval "epoch" steps them after the epoch's checkpoint is written, and
        # a resumed run would miss that step.
        for config in self.trainer.lr_scheduler_configs:
            config.frequency = int(self.trainer.num_training_batches)

    def lr_scheduler_step(self, scheduler: LRScheduler | ReduceLROnPlateau, metric: Any | None) -> None:
        """Step a schedule; one that waits for improvement counts validations, not epochs."""
        validated = (self.current_epoch + 1) % (self.trainer.check_val_every_n_epoch or 1) == 0
        if validated or not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimiser and its schedule for the stage."""
        return self._optimisation(self.stage)

    def _optimisation(self, stage: Stage) -> OptimizerLRScheduler:
        own = {} if stage.plan.lr is None else {"lr": stage.plan.lr}
        optimiser = self._optimiser(params=[p for p in self.parameters() if p.requires_grad], **own)
        if self._schedule is None:
            return optimiser
        epochs = self._epochs_of(stage)
        limit = self.trainer.max_epochs or -1
        if epochs is None and len(self.stages) > 1 and limit > 0:  # what the stages before leave
            epochs = max(1, limit - self._epochs_before_last)
        schedule: LRSchedulerConfigType = {
            "scheduler": self._schedule(optimizer=optimiser, **({} if epochs is None else {"epochs": epochs})),
            "interval": "step",  # once per epoch all the same: see _step_schedules_by_epoch
            "monitor": self.monitor,
            "strict": False,  # the first epochs may go without validation
        }
        return {"optimizer": optimiser, "lr_scheduler": schedule}
