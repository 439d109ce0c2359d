"""Loggers: CSV always, Weights & Biases beside it; the only place of a run that knows wandb."""

import csv
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

from cnf_lab.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("offline", "online", "disabled")
#: What wandb draws everything against: optimiser steps, under the name that Lightning gives them.
STEP = "trainer/global_step"
METRICS_FILE = "metrics.csv"
ID_FILE = "wandb_id.txt"
#: Quantities of which less is better, whatever the stage: bounds and losses, errors, costs.
LESS = frozenset(
    (
        "nll",
        "bits_per_dim",
        "negative_elbo",
        "loss",
        "flow_matching",
        "likelihood_gap",
        "nfe",
        "forward",
        "backward",
        "rejected_steps",
        "step_seconds",
        "peak_mebibytes",
    )
)
#: Quantities of which more is better.
MORE = frozenset(("elbo",))


def direction(name: str) -> str:
    """Return which values of a logged metric are better: ``min`` or ``max``, or ``last`` where none are.

    It goes by the quantity, what stands behind the last slash, a block's number left out:

    * ``min``: likelihood bounds and losses, every standard error, and what solves cost (evaluations,
      rejected steps, seconds of a step, memory). ``solver/likelihood_gap`` has a sign; where it is
      positive training overstates, which is the failure that the guard is there for.
    * ``max``: the ELBO.
    * ``last``: what is only a setting (``lr-Adam``, ``beta``), a counter (``epoch``, ``train/stage``,
      ``time/elapsed_seconds``), or one side of a balance, of which a smaller value alone says nothing:
      ``kl`` against ``reconstruction``, ``log_det``, penalties. Names that are not known stay with
      their last value too, as wandb would have it.

    Args:
        name: Name of the metric, such as ``val/nll``.
    """
    quantity = re.sub(r"_block_\d+$", "", name.rpartition("/")[2])
    if quantity in LESS or quantity.endswith("_standard_error"):
        return "min"
    return "max" if quantity in MORE else "last"


class _ContinuedWriter(ExperimentWriter):
    """Lightning's writer, which starts by deleting an existing file; this one goes on with it."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])


class CsvLogger(CSVLogger):
    """metrics.csv in the run folder, continued when the run is resumed.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1000)

    @property
    def experiment(self) -> ExperimentWriter:
        """The writer of metrics.csv; other processes than the first write nothing."""
        if self._experiment is None and _is_first_process():
            self._experiment = _ContinuedWriter(self.log_dir)
        return self._experiment if self._experiment is not None else _Silent()  # type: ignore[return-value]


class _Silent:
    """A writer that writes nothing."""

    def __getattr__(self, name: str) -> object:
        return lambda *args, **kwargs: None


class MetricLogger(WandbLogger):
    """Lightning's wandb logger; whatever it logs is defined first, with the summary that suits it.

    A number is summarised by its best value and its last, or by its last alone where no direction
    is better; media have no summary. Everything is drawn against optimiser steps.

    wandb's own summary covers what this process has logged, and one NaN makes it NaN for good. So
    the best of the run is kept here too, a resumed run's from its metrics.csv on, and is written over
    wandb's when a stage ends and the two may differ.

    Args:
        before: File with the metrics of the run so far, where it is resumed.
        **options: Options of :class:`pytorch_lightning.loggers.WandbLogger`.
    """

    def __init__(self, before: Path | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._wandb_init.pop("anonymous", None)  # Lightning passes it, and wandb warns that it does nothing
        self._defined: set[str] = set()
        self._summary: dict[str, dict[str, float]] = {}
        self._corrected: set[str] = set()
        if before is not None and before.is_file():
            with before.open(newline="") as file:
                for row in csv.DictReader(file):
                    self._note(_numbers(row))
            self._corrected = set(self._summary)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers or media; what is logged for the first time is defined before.

        Args:
            metrics: Values by name.
            step: Optimiser steps so far.
        """
        for name, value in metrics.items():
            if name not in self._defined:
                self._define(name, direction(name) if _is_number(value) else "none")
        numbers = {name: float(value) for name, value in metrics.items() if _is_number(value)}
        self._note(numbers)
        self._corrected |= {name for name, value in numbers.items() if not math.isfinite(value)}
        super().log_metrics(metrics, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the run's own best and last values where wandb's summary may have others.

        Args:
            status: How the stage ended, in Lightning's words.
        """
        super().finalize(status)
        if self._experiment is not None and self._corrected:
            self.experiment.summary.update({name: dict(self._summary[name]) for name in sorted(self._corrected)})

    def _define(self, name: str, summary: str) -> None:
        if not self._defined:
            # Lightning's own definition of it has no summary.
            self.experiment.define_metric(STEP, summary="last")
            self._defined.add(STEP)
        both = f"{summary},last" if summary in ("min", "max") else summary
        self.experiment.define_metric(name, summary=both, step_metric=STEP)
        self._defined.add(name)

    def _note(self, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            goal, known = direction(name), self._summary.setdefault(name, {})
            known["last"] = value
            if goal != "last" and math.isfinite(value):
                known[goal] = (min if goal == "min" else max)(value, known.get(goal, value))


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a row of metrics.csv, whose last one may be torn where the run was killed."""
    found = {}
    for name, text in row.items():
        if name and name != "step" and isinstance(text, str):
            with suppress(ValueError):
                found[name] = float(text)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def wandb_logger(
    folder: str, mode: str, project: str, name: str | None, group: str | None, tags: Sequence[str]
) -> MetricLogger:
    """Make the wandb logger of a run folder; a resumed run continues the same wandb run.

    Args:
        folder: The run folder; holds ``wandb/`` and the run's id.
        mode: offline, online or disabled.
        project: The wandb project.
        name: Name of the run; None takes the folder's name.
        group: Group of the run; None takes the name of the sweep's folder, if there is one.
        tags: Tags of the run.

    Raises:
        ConfigError: If the mode is unknown or wandb is not installed.
    """
    if mode not in MODES:
        raise ConfigError(
            f"Expected logger.mode to be one of {', '.join(MODES)}, got {mode}. Type logger.mode=offline."
        )
    try:
        import wandb
    except ImportError as failure:
        raise ConfigError(
            f"Expected wandb to be installed for logger=wandb, got: {failure}. Type logger=csv, or pip install wandb."
        ) from failure
    path = Path(folder)
    begun = (path / ID_FILE).is_file()
    logger = MetricLogger(
        before=path / METRICS_FILE if begun else None,
        save_dir=folder,
        project=project,
        name=name or path.name,
        group=group or sweep_name(path),
        job_type="train",
        tags=list(tags),
        id=_run_id(path),
        resume="allow",
        mode=mode,
        log_model=False,
        settings=wandb.Settings(silent=True),
    )
    if _is_first_process():
        _ = logger.experiment  # begun now, so that a mistake in wandb's options is told before training
    return logger


def sweep_name(folder: Path) -> str | None:
    """Return the name of the sweep folder of a multirun's job, or None for a run of its own.

    By Hydra's own account of the job, which launchers hand to every process; ``multirun.yaml`` will
    not do, for only Hydra's basic sweeper writes it. A resumed job is no multirun to Hydra: what was
    saved when it first ran is asked.

    Args:
        folder: The run folder.
    """
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return Path(HydraConfig.get().sweep.dir).absolute().name
    saved = folder / ".hydra" / "hydra.yaml"
    if saved.is_file():
        job = OmegaConf.load(saved).hydra
        if str(job.mode) in (RunMode.MULTIRUN.name, str(RunMode.MULTIRUN)):
            return Path(str(job.runtime.output_dir)).parent.name
    return None


def log_config(loggers: Sequence[Logger], config: dict[str, Any]) -> None:
    """Send the configuration to the loggers that show one."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and _is_first_process():
            # A resumed run may have changed some of it.
            logger.experiment.config.update(config, allow_val_change=True)


def log_figure(loggers: Sequence[Logger], name: str, figure: "Figure", step: int) -> None:
    """Send a figure to the loggers that show images."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            logger.log_image(key=name, images=[wandb.Image(figure)], step=step)


def log_film(loggers: Sequence[Logger], name: str, path: Path, step: int) -> None:
    """Send a GIF to the loggers that show films."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_video(key=name, videos=[str(path)], step=step, format=["gif"])


def finish(failed: bool) -> None:
    """End the wandb run of a job, if there is one: a live run would swallow the next job of a multirun."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=int(failed))


def _is_first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _run_id(folder: Path) -> str:
    # Written once and read again on resume; wandb's own generator is not needed for that.
    file = folder / ID_FILE
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # The agent of a wandb sweep has chosen one, and wandb takes no other then.
        given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
        file.write_text(given or os.urandom(6).hex())
    return file.read_text().strip()
