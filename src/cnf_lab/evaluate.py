"""Evaluate a run: ``python -m cnf_lab.evaluate run=outputs/density/miniboone/...``."""

import json
import logging
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.data import FlowDataModule, Rows
from cnf_lab.data.custom import read_rows
from cnf_lab.data.images import read_images
from cnf_lab.errors import ConfigError
from cnf_lab.flows import continuous_blocks
from cnf_lab.training.build import build_data
from cnf_lab.training.checks import Evaluated
from cnf_lab.training.command import check_number, run_command
from cnf_lab.training.evaluation import Findings, findings
from cnf_lab.training.evaluation_table import report
from cnf_lab.training.run import (
    check_same_rows,
    choose_device,
    environment,
    require_run,
    restore_flow,
    run_folder,
    write_json,
)
from cnf_lab.training.sample_metrics import check_samples, report_samples, sample_findings
from cnf_lab.training.settings import AnyModel, Settings, chosen, is_of_images
from cnf_lab.training.shares import started

log = logging.getLogger("cnf_lab")
#: Options that are numbers: kind, least value, a value to type, and whether null is admitted.
NUMBERS = (
    ("batch_size", int, 1, "2000", True),
    ("atol", float, 0, "1e-7", True),
    ("rtol", float, 0, "1e-7", True),
    ("memory", float, 0, "1.0", False),
    ("limit", int, 1, "1000", True),
    ("chunk", int, 1, "16", True),
    ("draws", int, 1, "10", False),
    ("probes", int, 1, "4", False),
    ("check", int, 0, "20", True),
    ("check_exact", int, 0, "4", True),
    ("digits", int, 0, "2", False),
    ("iwae_draws", int, 0, "5000", False),
    ("iwae_limit", int, 1, "100", True),
    ("processes", int, 1, "2", False),
    ("seed", int, 0, "0", False),
)


def evaluate(config: DictConfig) -> float:
    """Rebuild a model from its checkpoint alone and report the likelihood of rows or images, or a bound of it.

    Args:
        config: The composed configuration of ``evaluate.yaml``.

    Returns:
        The mean NLL in nats per row, or in bits/dim for images, or the mean negative ELBO in nats.
    """
    check(config)
    run = require_run(config.run)
    model, rebuild = restore_flow(run)
    settings = chosen(config, model)
    check_bound(config, model, settings)
    device = choose_device(config.device)
    data = open_data(config, rebuild) if config.data is None or config.samples else None
    name, rows, notes = open_rows(config, model, rebuild, data)
    # Not before all mistakes are told, which each process would tell again.
    shares, device = started(config.processes, device)
    model.to(device)
    together = config.batch_size or (200 if is_of_images(model) else 2000)
    what = Evaluated(rows, min(len(rows), config.limit or len(rows)), together, config.seed, shares)
    try:
        found = findings(model, what, config, settings)
    except Exception:
        if shares.first:
            raise
        sys.exit(0)  # the first process tells it, with an exit code of its own
    if not shares.first:
        return found.numbers[found.quantity]

    written: dict[str, Any] = {**found.numbers, "budget": {key: own.described() for key, own in found.budgets.items()}}
    if config.samples:
        assert data is not None
        written["samples"] = sample_findings(model, rows, data.split("train"), config.sample_metrics, together)
    context = described(config, run, model, found, rebuild, notes) | {"batch_size": together}
    folder = Path(config.output) if config.output else run_folder(run)
    per_row = folder / "evaluation" / f"{name}_{found.per_row_name}.npy"
    per_row.parent.mkdir(parents=True, exist_ok=True)
    values = found.per_row if len(found.per_row) > 1 else found.per_row[0]
    np.save(per_row, values.numpy())
    add(folder / "evaluation.json", name, {**written, "context": context})
    for note in notes:
        log.warning("%s", note)
    report(name, found, context)
    if config.samples:
        report_samples(written["samples"])
    log.info("%s, and %s of every row: %s", folder / "evaluation.json", found.per_row_name, per_row)
    return found.numbers[found.quantity]


def check(config: DictConfig) -> None:
    """Check the options that are numbers, yes or no, or belong together."""
    for name, kind, least, typed, optional in NUMBERS:
        check_number(config, name, kind, least, typed, optional)
    for name in ("converge", "mass"):
        if not isinstance(config[name], bool):
            raise ConfigError(f"Expected {name} to be true or false, got {config[name]}. Type {name}=true.")
    if config.converge and config.check == 0:
        raise ConfigError("Expected rows to check for converge=true, got check=0. Leave out check, or type check=20.")
    if config.processes > 1 and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ConfigError(
            f"Expected processes=1 in a multirun, got {config.processes}. Type hydra/launcher=parallel, by which "
            "several evaluations run at a time, or a command for each run."
        )
    if config.check == 1:
        raise ConfigError("Expected check to be 0 or at least 2, for one row tells no spread, got 1. Type check=20.")
    check_samples(config)


def check_bound(config: DictConfig, model: AnyModel, settings: Settings) -> None:
    """Refuse an importance-weighted bound out of estimated divergences."""
    weighted = isinstance(model, VariationalAutoencoder) and config.iwae_draws > 0
    if weighted and not settings.exact and continuous_blocks(model):
        raise ConfigError(
            "Expected divergence=exact for the importance-weighted bound, which the noise of probes would pass "
            f"for a better one, got {config.divergence}. Type divergence=exact, or iwae_draws=0."
        )


def described(
    config: DictConfig, run: Path, model: AnyModel, found: Findings, rebuild: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Return what the numbers depend on."""
    settings = found.settings
    solved = bool(continuous_blocks(model))  # or mapped in closed form
    return {
        "run": str(run),
        "split": config.split if config.data is None else None,
        "file": config.data,
        "limit": config.limit,
        **found.counts,
        "digits": config.digits,
        "conditional": bool(rebuild["context_features"]),
        "unit": found.unit,
        "notes": notes,
        "solver": settings.solver().describe() if solved else None,
        "trace": told(settings, model) if solved else None,
        "precision": settings.precision,
        "nfe": sum(found.nfe),
        "converge": config.converge,
        "processes": config.processes,
        "seed": rebuild["config"]["seed"],
        "evaluation_seed": config.seed,
        **environment(),
    }


def told(settings: Settings, model: AnyModel) -> str:
    """Say in some words how divergences were taken."""
    divergence = settings.estimator()
    return "exact" if divergence.exact else divergence.describe(continuous_blocks(model)[0].field)


def add(path: Path, name: str, found: dict[str, Any]) -> None:
    """Put what was found of some rows beside what other evaluations of the run have found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name("evaluation.lock")):
        known: Any = {}
        with suppress(OSError, ValueError):  # none yet, or damaged: what is new is not lost with it
            known = json.loads(path.read_text())
        write_json(path, {**(known if isinstance(known, dict) else {}), name: found})


def open_rows(
    config: DictConfig, model: AnyModel, rebuild: dict[str, Any], data: FlowDataModule | None
) -> tuple[str, Rows, list[str]]:
    """Return a name, the rows to evaluate, and what every number from them must say."""
    if config.data is not None:
        described, shape, name = rebuild["data"], rebuild["event_shape"], f"rows_{Path(str(config.data)).stem}"
        pixels = model.likelihood if isinstance(model, VariationalAutoencoder) else model.dequantiser
        if pixels is not None:
            return name, read_images(str(config.data), shape, pixels.levels, config.key), []
        names = described["column_names"], described["context_names"]
        return name, read_rows(str(config.data), math.prod(shape), *names, key=config.key), []
    assert data is not None
    return config.split, data.split(config.split), data.notes


def open_data(config: DictConfig, rebuild: dict[str, Any]) -> FlowDataModule:
    """Return the data set of the training, wherever it lies now."""
    saved = OmegaConf.create(rebuild["config"])
    for key in ("root", "path"):
        if config.root is not None and key in saved.dataset:
            saved.dataset[key] = str(config.root)
    data = build_data(saved)
    check_same_rows(data.describe()["rows"], rebuild["data"]["rows"], str(data.name))
    return data


def main() -> None:
    """Run the command."""
    run_command(evaluate, "evaluate")


if __name__ == "__main__":
    main()
