"""Jobs that are given again: what is done is not run twice, and what was cut off goes on."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from cnf_lab.errors import RunExistsError
from cnf_lab.training.build import plain
from cnf_lab.training.run import has_checkpoint

#: Options that change where numbers go or how a run comes to be, not the run.
BESIDE = ("resume", "skip_done", "threads", "logger")
#: What a run leaves besides Hydra's own files and its log.
LEFT = ("metrics.csv", "wandb_id.txt", "checkpoints", "plots", "wandb")


def is_again(config: DictConfig) -> bool:
    """Say whether a job may find a run of its own in its folder: ``skip_done=true``, or requeued by Slurm."""
    return bool(config.get("skip_done", False)) or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def earlier_value(config: DictConfig, folder: Path) -> float | None:
    """Return the best watched validation value of the finished run in a folder; None if there is none.

    A run without a finite value counts as infinitely bad.

    Args:
        config: The configuration of the job, its paths absolute.
        folder: The folder of the job.

    Raises:
        RunExistsError: If the folder holds a run of another configuration.
    """
    metrics = folder / "metrics.json"
    if metrics.is_file() or has_checkpoint(folder):
        _check_same(config, folder)
    if not metrics.is_file() or (folder / "FAILED").is_file():
        return None
    try:
        value = json.loads(metrics.read_text()).get(config.model.monitor)
    except ValueError:  # cut off while it was written
        return None
    return finite(value)


def go_on(config: DictConfig, folder: Path) -> None:
    """Make a job go on from the last checkpoint in its folder, or clear the folder of what a run without one left.

    Args:
        config: The configuration of the job, whose ``resume`` is set.
        folder: The folder of the job.
    """
    first = getattr(rank_zero_only, "rank", 0) == 0
    if first:
        (folder / "metrics.json").unlink(missing_ok=True)
    if (folder / "checkpoints" / "last.ckpt").is_file():
        config.resume = str(folder)
    elif first:
        for name in LEFT:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)


def finite(value: float | None) -> float:
    """Return a value for a sweeper that looks for the lowest: infinity where there is no finite one."""
    return float(value) if value is not None and math.isfinite(value) else math.inf


def _check_same(config: DictConfig, folder: Path) -> None:
    try:
        earlier = yaml.safe_load((folder / "config_resolved.yaml").read_text())
    except (OSError, yaml.YAMLError):
        earlier = None
    found = dict(_values(earlier)) if isinstance(earlier, dict) else {}
    # By way of yaml, as what is compared with it.
    wanted = dict(_values(yaml.safe_load(yaml.safe_dump(plain(config)))))
    for key in wanted:
        if key not in found or wanted[key] != found[key]:
            was = f"{key}={found[key]}" if key in found else f"no {key}"
            raise RunExistsError(
                f"Expected a run with {key}={wanted[key]} in {folder}, got one with {was}. "
                "Type another hydra.sweep.dir=..., or the options of the runs that are there."
            )


def _values(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    # The folder's name may have changed: its own paths are compared without it.
    run = str((config.get("paths") or {}).get("run"))

    def walk(node: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict) and node:
            for name, value in node.items():
                if key or name not in BESIDE:
                    yield from walk(value, f"{key}.{name}" if key else str(name))
        else:
            yield key, node.replace(run, "<run>") if isinstance(node, str) else node

    return walk(config, "")
