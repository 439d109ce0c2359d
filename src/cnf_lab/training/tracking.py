"""Loggers: CSV always, Weights & Biases beside it; the only place that knows wandb."""

import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from cnf_lab.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("offline", "online", "disabled")
#: Metrics whose best value, not the last, belongs into wandb's summary.
BEST = {"val/nll": "min", "val/bits_per_dim": "min", "val/negative_elbo": "min", "val/elbo": "max"}


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


def wandb_logger(
    folder: str, mode: str, project: str, name: str | None, group: str | None, tags: Sequence[str]
) -> WandbLogger:
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
    in_sweep = (path.parent / "multirun.yaml").is_file()
    logger = WandbLogger(
        save_dir=folder,
        project=project,
        name=name or path.name,
        group=group or (path.parent.name if in_sweep else None),
        tags=list(tags),
        id=_run_id(path),
        resume="allow",
        mode=mode,
        log_model=False,
        settings=wandb.Settings(silent=True),
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning passes it, and wandb warns that it does nothing
    if _is_first_process() and mode != "disabled":
        for metric, goal in BEST.items():
            logger.experiment.define_metric(metric, summary=goal, step_metric="trainer/global_step")
    return logger


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
            import wandb

            logger.experiment.log({name: wandb.Video(str(path), format="gif"), "trainer/global_step": step})


def finish(failed: bool) -> None:
    """End the wandb run of a job, if there is one: a live run would swallow the next job of a multirun."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=int(failed))


def _is_first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _run_id(folder: Path) -> str:
    # Written once and read again on resume; wandb's own generator is not needed for that.
    file = folder / "wandb_id.txt"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(os.urandom(6).hex())
    return file.read_text().strip()
