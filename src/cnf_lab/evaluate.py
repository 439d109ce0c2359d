"""Evaluate a run: ``python -m cnf_lab.evaluate run=outputs/density/miniboone/...``."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from cnf_lab.data import Batch, Rows
from cnf_lab.data.custom import read_rows
from cnf_lab.errors import ConfigError
from cnf_lab.flows import Flow, continuous_blocks
from cnf_lab.metrics import MeanWithError
from cnf_lab.ode import SolveStats
from cnf_lab.trace import Exact
from cnf_lab.training.build import build_data
from cnf_lab.training.command import check_number, run_command
from cnf_lab.training.run import (
    check_same_rows,
    choose_device,
    converged_solver,
    environment,
    require_run,
    restore_flow,
    run_folder,
    write_json,
)

log = logging.getLogger("cnf_lab")
NUMBERS = (
    ("batch_size", int, 1, "2000"),
    ("atol", float, 0, "1e-7"),
    ("rtol", float, 0, "1e-7"),
    ("memory", float, 0, "1.0"),
)
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


def evaluate(config: DictConfig) -> float:
    """Rebuild a flow from its checkpoint alone and report the NLL of rows.

    Args:
        config: The composed configuration of ``evaluate.yaml``.

    Returns:
        The mean negative log-density.
    """
    for name, kind, least, typed in NUMBERS:
        check_number(config, name, kind, least, typed)
    check_number(config, "limit", int, 1, "1000", optional=True)
    check_number(config, "chunk", int, 1, "16", optional=True)
    run = require_run(config.run)
    flow, rebuild = restore_flow(run)
    if config.precision not in PRECISIONS:
        raise ConfigError(f"Expected precision float64 or float32, got {config.precision}. Type precision=float64.")
    solver = converged_solver(config.method, config.atol, config.rtol)
    flow.set_evaluation(solver, Exact(config.memory, config.chunk))
    flow.to(choose_device(config.device), PRECISIONS[config.precision])

    name, rows, notes = open_rows(config, rebuild)
    log_prob, nfe = log_densities(flow, rows, config.batch_size, config.limit)
    nll = MeanWithError()
    nll.update(-log_prob)
    mean, error = (float(value) for value in nll.compute())

    folder = Path(config.output) if config.output else run_folder(run) / "evaluation"
    unit = rebuild["data"]["unit"]
    solved = bool(continuous_blocks(flow))  # or mapped in closed form
    context = {
        "run": str(run),
        "split": config.split if config.data is None else None,
        "file": config.data,
        "limit": config.limit,
        "rows": len(log_prob),
        "unit": unit,
        "notes": notes,
        "solver": solver.describe() if solved else None,
        "trace": "exact" if solved else None,
        "precision": config.precision,
        "nfe": nfe,
        "seed": rebuild["config"]["seed"],
        **environment(),
    }
    write_json(folder / f"{name}.json", {"nll": mean, "nll_standard_error": error, "context": context})
    np.save(folder / f"{name}_log_prob.npy", log_prob.numpy())
    for note in notes:
        log.warning("%s", note)
    log.info("%s: nll %.4f ± %.4f %s over %s rows", name, mean, error, unit, f"{len(log_prob):,}")
    tolerance = f"atol {config.atol:g}, rtol {config.rtol:g}"
    how = f"exact divergence, {config.method}, {tolerance}" if solved else "closed form"
    log.info("%s, %s, %d evaluations", how, config.precision, nfe)
    log.info("log-density of every row: %s", folder / f"{name}_log_prob.npy")
    return mean


def open_rows(config: DictConfig, rebuild: dict[str, Any]) -> tuple[str, Rows, list[str]]:
    """Return a name, the rows to evaluate, and what every number from them must say."""
    if config.data is not None:
        described, features = rebuild["data"], math.prod(rebuild["event_shape"])
        rows = read_rows(
            str(config.data), features, described["column_names"], described["context_names"], key=config.key
        )
        return f"rows_{Path(str(config.data)).stem}", rows, []
    saved = OmegaConf.create(rebuild["config"])
    for key in ("root", "path"):
        if config.root is not None and key in saved.dataset:
            saved.dataset[key] = str(config.root)
    data = build_data(saved)
    check_same_rows(data.describe()["rows"], rebuild["data"]["rows"], str(data.name))
    return config.split, data.split(config.split), data.notes


@torch.no_grad()
def log_densities(flow: Flow, rows: Rows, batch_size: int, limit: int | None) -> tuple[Tensor, int]:
    """Return the log-density of every row (rows,) in float64, and the evaluations of all solves."""
    device = next(flow.parameters()).device
    parts, nfe = [], 0
    for batch in _batches(rows, batch_size, limit):
        x = batch.x.to(device)
        context = None if batch.context is None else batch.context.to(device)
        mapped = flow.pull_back(x, context)
        parts.append((flow.base.log_prob(mapped.value) + mapped.log_det).double().cpu())
        nfe += SolveStats.total(mapped.solves).nfe_forward
    return torch.cat(parts), nfe


def _batches(rows: Rows, batch_size: int, limit: int | None) -> Iterator[Batch]:
    count = min(len(rows), limit or len(rows))
    # disable=None: a bar on a terminal, nothing in a file.
    for start in tqdm(range(0, count, batch_size), unit="batch", disable=None):
        yield rows.__getitems__(range(start, min(start + batch_size, count)))


def main() -> None:
    """Run the command."""
    run_command(evaluate, "evaluate")


if __name__ == "__main__":
    main()
