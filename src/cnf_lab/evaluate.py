"""Evaluate a run: ``python -m cnf_lab.evaluate run=outputs/density/miniboone/...``."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from cnf_lab.data import Rows
from cnf_lab.data.custom import read_rows
from cnf_lab.data.images import read_images
from cnf_lab.errors import ConfigError
from cnf_lab.flows import Flow, UniformDequantiser, continuous_blocks
from cnf_lab.trace import DivergenceEstimator, Exact, Hutchinson, Rademacher
from cnf_lab.training.build import build_data
from cnf_lab.training.command import check_number, run_command
from cnf_lab.training.likelihoods import (
    Likelihoods,
    image_numbers,
    log_likelihoods,
    nll_numbers,
    solver_gap,
    uniformly,
)
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
#: Options that are numbers: kind, least value, a value to type, and whether null is admitted.
NUMBERS = (
    ("batch_size", int, 1, "2000", False),
    ("atol", float, 0, "1e-7", True),
    ("rtol", float, 0, "1e-7", True),
    ("memory", float, 0, "1.0", False),
    ("limit", int, 1, "1000", True),
    ("chunk", int, 1, "16", True),
    ("draws", int, 1, "10", False),
    ("probes", int, 1, "4", False),
    ("check", int, 0, "20", False),
    ("seed", int, 0, "0", False),
)
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
MANY = 256  # entries of an image above which divergence=auto goes by probes
BOUNDS = {
    "uniform_1": "one draw of uniform noise, as published numbers have it",
    "importance_weighted": "importance-weighted with {draws} draws",
}


def evaluate(config: DictConfig) -> float:
    """Rebuild a flow from its checkpoint alone and report the likelihood of rows or images.

    Args:
        config: The composed configuration of ``evaluate.yaml``.

    Returns:
        The mean NLL in nats per row, or in bits/dim for images.
    """
    for name, kind, least, typed, optional in NUMBERS:
        check_number(config, name, kind, least, typed, optional)
    run = require_run(config.run)
    flow, rebuild = restore_flow(run)
    images = flow.dequantiser is not None
    choices = chosen(config, flow)
    solver = converged_solver(config.method, choices["atol"], choices["rtol"])
    divergence = choices["divergence"]
    flow.set_evaluation(solver, divergence)
    flow.to(choose_device(config.device), PRECISIONS[choices["precision"]])

    name, rows, notes = open_rows(config, flow, rebuild)
    draws = config.draws if images else 1
    found = log_likelihoods(flow, rows, config.batch_size, config.limit, draws, config.seed)
    solved = bool(continuous_blocks(flow))  # or mapped in closed form
    numbers = image_likelihoods(flow, rows, found, config) if images else nll_numbers(found)
    if images and solved and config.check:
        tight = converged_solver(config.method, choices["atol"] / 100, choices["rtol"] / 100)
        numbers |= solver_gap(flow, rows, config.check, tight, divergence, config.seed)

    folder = Path(config.output) if config.output else run_folder(run) / "evaluation"
    context = {
        "run": str(run),
        "split": config.split if config.data is None else None,
        "file": config.data,
        "limit": config.limit,
        "rows": found.log_prob.shape[1],
        "draws": draws if images else None,
        "unit": rebuild["data"]["unit"],
        "notes": notes,
        "solver": solver.describe() if solved else None,
        "trace": told(divergence, flow) if solved else None,
        "precision": choices["precision"],
        "nfe": found.nfe,
        "seed": rebuild["config"]["seed"],
        **environment(),
    }
    write_json(folder / f"{name}.json", {**numbers, "context": context})
    np.save(folder / f"{name}_log_prob.npy", (found.log_prob if draws > 1 else found.log_prob[0]).numpy())
    for note in notes:
        log.warning("%s", note)
    report(name, numbers, context, images)
    log.info("log-likelihood of every row: %s", folder / f"{name}_log_prob.npy")
    return numbers["bits_per_dim" if images else "nll"]


def chosen(config: DictConfig, flow: Flow) -> dict[str, Any]:
    """Return precision, tolerances and divergence, with what is left open decided by what is modelled."""
    images = flow.dequantiser is not None
    precision = config.precision or ("float32" if images else "float64")
    if precision not in PRECISIONS:
        raise ConfigError(f"Expected precision float64 or float32, got {precision}. Type precision=float64.")
    traces = {"exact": Exact(config.memory, config.chunk), "hutchinson": Hutchinson(Rademacher(), config.probes)}
    if config.divergence not in (*traces, "auto"):
        raise ConfigError(
            f"Expected divergence to be auto, exact or hutchinson, got {config.divergence}. Type divergence=auto."
        )
    large = images and math.prod(flow.event_shape) > MANY
    usual = 1e-5 if images else 1e-7
    return {
        "precision": precision,
        "atol": config.atol or usual,
        "rtol": config.rtol or usual,
        "divergence": traces[config.divergence if config.divergence != "auto" else "hutchinson" if large else "exact"],
    }


def image_likelihoods(flow: Flow, rows: Rows, found: Likelihoods, config: DictConfig) -> dict[str, float]:
    """Return the numbers of images, with those of one draw of uniform noise beside any other."""
    uniform = found
    if not isinstance(flow.dequantiser, UniformDequantiser):
        own, flow.dequantiser = flow.dequantiser, uniformly(flow)
        uniform = log_likelihoods(flow, rows, config.batch_size, config.limit, 1, config.seed)
        flow.dequantiser = own
    return image_numbers(found, uniform, math.prod(flow.event_shape))


def told(divergence: DivergenceEstimator, flow: Flow) -> str:
    """Say in some words how divergences were taken."""
    return "exact" if divergence.exact else divergence.describe(continuous_blocks(flow)[0].field)


def report(name: str, numbers: dict[str, float], context: dict[str, Any], images: bool) -> None:
    """Log the numbers, each with the errors that it has, and how they were solved."""
    quantity = "bits_per_dim" if images else "nll"
    count = f"{context['rows']:,} {'images' if images else 'rows'}"
    log.info("%s: %s %s %s over %s", name, quantity, spread(numbers, quantity), context["unit"], count)
    for bound, words in BOUNDS.items():
        if f"bits_per_dim_{bound}" in numbers:
            log.info("%s: %s", words.format(draws=context["draws"]), spread(numbers, f"bits_per_dim_{bound}"))
    for source in ("dequantisation", "trace"):
        if f"{quantity}_{source}_standard_error" in numbers:
            error = numbers[f"{quantity}_{source}_standard_error"]
            log.info("of it by %s: ± %.1e", {"trace": "probes"}.get(source, "dequantisation draws"), error)
    if "bits_per_dim_solver_gap" in numbers:
        gap, largest = numbers["bits_per_dim_solver_gap"], numbers["bits_per_dim_largest_solver_gap"]
        log.info(
            "a solve at a hundredth of the tolerance in float64 changes it by %+.1e, an image by up to %.1e",
            gap,
            largest,
        )
        if abs(gap) > 5e-4:
            log.warning("Expected a converged solve, got a change of %+.1e bits/dim. Type atol=1e-7 rtol=1e-7.", gap)
    if context["solver"] is None:
        log.info("closed form, %s", context["precision"])
    else:
        solver = context["solver"]
        how = f"{context['trace']} divergence, {solver['method']}, atol {solver['atol']:g}, rtol {solver['rtol']:g}"
        log.info("%s, %s, %d evaluations", how, context["precision"], context["nfe"])


def spread(numbers: dict[str, float], quantity: str) -> str:
    """Return a mean with its standard error over rows."""
    return f"{numbers[quantity]:.4f} ± {numbers[f'{quantity}_standard_error']:.4f}"


def open_rows(config: DictConfig, flow: Flow, rebuild: dict[str, Any]) -> tuple[str, Rows, list[str]]:
    """Return a name, the rows to evaluate, and what every number from them must say."""
    if config.data is not None:
        described, shape, name = rebuild["data"], rebuild["event_shape"], f"rows_{Path(str(config.data)).stem}"
        if flow.dequantiser is not None:
            return name, read_images(str(config.data), shape, flow.dequantiser.levels, config.key), []
        names = described["column_names"], described["context_names"]
        return name, read_rows(str(config.data), math.prod(shape), *names, key=config.key), []
    saved = OmegaConf.create(rebuild["config"])
    for key in ("root", "path"):
        if config.root is not None and key in saved.dataset:
            saved.dataset[key] = str(config.root)
    data = build_data(saved)
    check_same_rows(data.describe()["rows"], rebuild["data"]["rows"], str(data.name))
    return config.split, data.split(config.split), data.notes


def main() -> None:
    """Run the command."""
    run_command(evaluate, "evaluate")


if __name__ == "__main__":
    main()
