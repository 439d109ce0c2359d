"""Lightning callbacks: what solves cost, figures during training, and a line per epoch in a log file."""

import logging
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.data import Batch, FlowDataModule
from cnf_lab.errors import ConfigError, SolverError
from cnf_lab.flows import Flow
from cnf_lab.models import FlowModule
from cnf_lab.ode import SolveStats
from cnf_lab.training import autoencoder_pictures, pictures, plots
from cnf_lab.training.curves import curves
from cnf_lab.training.tracking import log_figure, log_film

if TYPE_CHECKING:
    import matplotlib.figure

log = logging.getLogger("cnf_lab")
MEBIBYTE = 2**20


class SolverMonitor(Callback):
    """Logs what training cost, as means over the steps of each epoch.

    ========================== =====================================================================
    ``nfe/forward``            Evaluations of all solves of a training step.
    ``nfe/backward``           Evaluations that a continuous adjoint adds.
    ``solver/rejected_steps``  Rejected solver steps of a training step.
    ``time/step_seconds``      Wall clock of a training step, backward pass and optimiser included,
                               loading of data left out.
    ``time/elapsed_seconds``   Wall clock since training began, validation and everything else
                               included; a resumed run counts on.
    ``memory/peak_mebibytes``  Peak of the epoch as torch's CUDA allocator counts it; without CUDA
                               the peak of the process since its start.
    ========================== =====================================================================

    It reads ``solves``, a sequence of :class:`~cnf_lab.ode.SolveStats`, from what
    ``training_step`` returns; a step without solves leaves the counts out. Steps are summed as
    plain numbers, and CUDA is waited for once, at the end of an epoch: its queued work counts.
    """

    def __init__(self) -> None:
        self._steps, self._seconds, self._started = 0, 0.0, 0.0
        self._solves: list[SolveStats] = []  # their sum so far, or nothing
        self._elapsed, self._began = 0.0, 0.0  # of the parts of the run before, and start of this one

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self._elapsed + time.monotonic() - self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._elapsed = state_dict["elapsed"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps, self._seconds, self._solves = 0, 0.0, []
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps += 1
        self._seconds += time.perf_counter() - self._started
        solves = outputs.get("solves", ()) if isinstance(outputs, Mapping) else ()
        if solves:
            self._solves = [SolveStats.total([*self._solves, *solves])]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._steps == 0:
            return
        if pl_module.device.type == "cuda":
            waiting = time.perf_counter()
            torch.cuda.synchronize(pl_module.device)
            self._seconds += time.perf_counter() - waiting
        totals = {"time/step_seconds": self._seconds}
        for solve in self._solves:
            totals["nfe/forward"], totals["nfe/backward"] = solve.nfe_forward, solve.nfe_backward
            totals["solver/rejected_steps"] = solve.rejected_steps
        for name, total in totals.items():
            pl_module.log(name, total / self._steps, on_epoch=True, sync_dist=True, batch_size=1)
        elapsed = self._elapsed + time.monotonic() - self._began
        pl_module.log("time/elapsed_seconds", elapsed, on_epoch=True, sync_dist=True, reduce_fx="max", batch_size=1)
        peak, name = _peak_mebibytes(pl_module.device), "memory/peak_mebibytes"
        pl_module.log(name, peak, on_epoch=True, sync_dist=True, reduce_fx="max", batch_size=1)


def _peak_mebibytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEBIBYTE
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MEBIBYTE if sys.platform == "darwin" else peak / 1024  # macOS counts bytes, Linux KiB


class MovableCheckpoint(ModelCheckpoint):
    """Lightning's, for a run whose folder may be moved before it is resumed.

    Lightning's own forgets what was best when the folder has another name, and the next epoch,
    however bad, would overwrite it.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state over, its paths pointed at the folder of today."""
        folder = Path(str(self.dirpath))
        moved = dict(state_dict, dirpath=self.dirpath)
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            if moved.get(key):
                moved[key] = str(folder / Path(moved[key]).name)
        kept = moved.get("best_k_models", {})
        moved["best_k_models"] = {str(folder / Path(path).name): score for path, score in kept.items()}
        super().load_state_dict(moved)


class StageAveraging(WeightAveraging):
    r"""An exponential moving average of the weights, begun anew with each stage of the objective.

    .. math:: \bar w \leftarrow d_n \bar w + (1 - d_n)\, w, \qquad d_n = \min\big(d, \tfrac{1 + n}{10 + n}\big)

    after n updates: the first weights are forgotten soon. Validation, test and the best
    checkpoint use the average. A stage starts from the averaged weights of the one before, which
    are the ones that were validated, unless it starts from the best.

    Args:
        decay: Weight d of the average in an update.
        use_buffers: Whether buffers are averaged too.

    Raises:
        ConfigError: If the decay is not a share.
    """

    def __init__(self, decay: float = 0.999, use_buffers: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"Expected callbacks.ema.decay in [0, 1), got {decay}. Type callbacks.ema.decay=0.999.")

        def average(averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
            # Without a number on the host: that would wait for the GPU at every weight.
            count = torch.as_tensor(updates, device=averaged.device).to(averaged.dtype)
            return torch.lerp(current, averaged, ((1 + count) / (10 + count)).clamp(max=decay))

        super().__init__(use_buffers=use_buffers, avg_fn=average)
        self._stage = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning calls it before the module is on its device, where the copy belongs too.
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        stage = getattr(pl_module, "stage_index", 0)
        if stage != self._stage:
            assert self._average_model is not None
            if not (isinstance(pl_module, FlowModule) and pl_module.began_from_best):
                self._copy_average_to_current(pl_module)
            self._average_model.n_averaged = torch.zeros_like(self._average_model.n_averaged)  # next comes a copy
            self._stage = stage

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "stage": self._stage}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._stage = state_dict.get("stage", 0)


class StageStopping(EarlyStopping):
    """Lightning's early stopping; in a stage before the last it ends the stage, not the run.

    Args:
        monitor: Name of the watched metric.
        mode: Whether ``min`` or ``max`` is better.
        patience: Validations without improvement before the end.
        min_delta: Least change that counts as improvement.
        check_finite: Whether a value that is not finite stops the run.
    """

    def __init__(
        self,
        monitor: str = "val/nll",
        mode: str = "min",
        patience: int = 31,
        min_delta: float = 0.0,
        check_finite: bool = True,
    ) -> None:
        # At the end of a training epoch the metric may be one of an earlier validation.
        super().__init__(monitor, min_delta, patience, False, mode, True, check_finite, check_on_train_epoch_end=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before = trainer.should_stop
        super().on_validation_end(trainer, pl_module)
        finite = math.isfinite(float(trainer.callback_metrics.get(str(self.monitor), math.nan)))
        stopped = trainer.should_stop and not before
        if stopped and finite and isinstance(pl_module, FlowModule) and not pl_module.in_last_stage:
            trainer.should_stop, self.wait_count, self.stopped_epoch = False, 0, 0
            pl_module.end_stage()


class Plots(Callback):
    """Figures of the flow against its data, into ``<run>/plots`` and to the loggers that show images.

    During training they come with validation, from the weights that validation uses (averaged
    ones, where they are averaged): ``density_epoch_0019.png``, say, epochs counted from 0, and
    the newest again as ``density_last.png``. The end of training brings the last ones and the
    learning curves, a test ``density_test.png`` with rows of its split. Random numbers come from
    a generator of their own that starts the same each time: training does not notice, and the
    epochs make a film of the same latent rows. Flows of images get grids, and at the end of
    training a GIF from noise to picture. A solve that fails costs a figure, never the run.

    Args:
        run_folder: The run folder.
        every_n_epochs: Epochs between figures; 0 draws at the end only.
        samples: Samples, and at most as many rows of data.
        resolution: Cells of a density along each axis.
        seed: Seed of the samples.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(
        self,
        run_folder: str,
        every_n_epochs: int = 10,
        samples: int = 2000,
        resolution: int = 200,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("every_n_epochs", every_n_epochs, 0),
            ("samples", samples, 1),
            ("resolution", resolution, 1),
        ):
            if value < least:
                raise ConfigError(
                    f"Expected callbacks.plots.{name} of at least {least}, got {value}. "
                    f"Type callbacks.plots.{name}={max(least, 10)}."
                )
        self.run_folder, self.every_n_epochs = Path(run_folder), every_n_epochs
        self.samples, self.resolution, self.seed = samples, resolution, seed
        self._drawn_at = -1

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw with the last batch.

        At the end of the epoch a callback that averages weights may have taken them back already.
        """
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or not self.every_n_epochs:
            return
        last = batch_idx + 1 == trainer.num_val_batches[dataloader_idx]
        if last and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module, "val", f"epoch_{trainer.current_epoch:04d}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the final weights, unless they have been drawn, and the learning curves."""
        if trainer.global_step != self._drawn_at:
            self._draw(trainer, pl_module, "val", "last")
        self._film(trainer, pl_module)
        table = self.run_folder / "metrics.csv"
        if trainer.is_global_zero and table.is_file():
            metric = _monitor(pl_module).rpartition("/")[2]
            unit = getattr(pl_module, "unit", "nats")
            self._save(trainer, "curves", "last", curves(table, metric, unit))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the weights that were tested, against rows of the test split."""
        self._draw(trainer, pl_module, "test", "test")

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str, tag: str) -> None:
        data, flow = getattr(trainer, "datamodule", None), getattr(pl_module, "flow", None)
        if not trainer.is_global_zero or not isinstance(data, FlowDataModule):
            return
        if not isinstance(flow, Flow | VariationalAutoencoder):
            return
        self._drawn_at = trainer.global_step
        rows = data.head(split, self.samples)
        generator = torch.Generator(pl_module.device).manual_seed(self.seed)
        try:
            for name, figure in self._figures(flow, data, rows, generator):
                self._save(trainer, name, tag, figure)
        except SolverError as failure:
            log.warning("Figures of epoch %d left out: %s", trainer.current_epoch, failure)

    def _figures(
        self, flow: Flow | VariationalAutoencoder, data: FlowDataModule, rows: Batch, generator: torch.Generator
    ) -> "Iterator[tuple[str, matplotlib.figure.Figure]]":
        if isinstance(flow, VariationalAutoencoder):
            return autoencoder_pictures.figures(flow, rows.x, self.samples, generator)
        if flow.dequantiser is not None:
            return pictures.figures(flow, rows.x, flow.dequantiser.levels, self.samples, generator)
        given = (data.plot_window, data.truth, data.column_names, self.resolution, self.samples, generator)
        return plots.figures(flow, rows.x.numpy(), rows.context, *given)

    def _film(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        flow = getattr(pl_module, "flow", None)
        if not trainer.is_global_zero or not isinstance(flow, Flow) or flow.dequantiser is None:
            return
        generator = torch.Generator(pl_module.device).manual_seed(self.seed)
        path = self.run_folder / "plots" / "film_last.gif"
        try:
            frames = pictures.film(flow, flow.dequantiser.levels, generator)
        except SolverError as failure:
            log.warning("The film is left out: %s", failure)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.write_gif(path, frames)
        log_film(trainer.loggers, "plots/film", path, trainer.global_step)

    def _save(self, trainer: pl.Trainer, name: str, tag: str, figure: "matplotlib.figure.Figure") -> None:
        path = self.run_folder / "plots" / f"{name}_{tag}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        if tag.startswith("epoch"):
            shutil.copyfile(path, path.with_name(f"{name}_last.png"))
        title = f"plots/{name}_test" if tag == "test" else f"plots/{name}"
        log_figure(trainer.loggers, title, figure, trainer.global_step)


class EpochLine(Callback):
    """A line of the log per validated epoch, where no progress bar shows the same.

    It comes with the start of the next epoch, when every callback has logged its numbers.
    Epochs count from 0, as in metrics.csv.
    """

    def __init__(self) -> None:
        self.best = math.inf
        self._due: int | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._due = trainer.current_epoch
            # Now, not with the line: the checkpoint of this epoch holds it.
            self.best = min(self.best, float(trainer.callback_metrics.get(_monitor(pl_module), math.inf)))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._due is None:
            return
        epoch, self._due = self._due, None
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.is_global_zero and trainer.progress_bar_callback is None:
            log.info("%s", epoch_line(epoch, trainer.global_step, values, _monitor(pl_module), self.best))


def epoch_line(epoch: int, step: int, values: Mapping[str, float], monitor: str, best: float) -> str:
    """Return the numbers of an epoch in one line; what was not logged is left out.

    Args:
        epoch: Number of the epoch.
        step: Optimiser steps so far.
        values: Metrics by name.
        monitor: Name of the watched metric.
        best: Lowest value of the watched metric so far.
    """
    parts = [f"epoch {epoch}", f"step {step}"]
    watched = (monitor.replace("val/", "train/"), monitor)
    parts += [f"{name} {values[name]:.4f}" for name in watched if name in values]
    if "nfe/forward" in values:
        parts.append(f"nfe {values['nfe/forward']:.0f}+{values['nfe/backward']:.0f}")
    if "time/step_seconds" in values:
        parts.append(f"{values['time/step_seconds']:.3g} s/step")
    if best < math.inf:
        parts.append(f"best {best:.4f}")
    return "  ".join(parts)


def _monitor(pl_module: pl.LightningModule) -> str:
    return getattr(pl_module, "monitor", "val/nll")
