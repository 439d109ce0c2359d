"""Evaluate a run: ``python -m cnf_lab.evaluate run=outputs/density/miniboone/...``."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.data import FlowDataModule, Rows
from cnf_lab.data.custom import read_rows
from cnf_lab.data.images import read_images
from cnf_lab.errors import ConfigError
from cnf_lab.flows import Flow, UniformDequantiser, continuous_blocks
from cnf_lab.ode import OdeSolver
from cnf_lab.trace import DivergenceEstimator, Exact, Hutchinson, Rademacher
from cnf_lab.training.bounds import elbo_gap, elbo_numbers, elbos, importance_numbers, importance_weighted
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
from cnf_lab.training.sample_metrics import check_samples, report_samples, sample_findings

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
    ("check", int, 0, "20", False),
    ("iwae_draws", int, 0, "5000", False),
    ("iwae_limit", int, 1, "100", True),
    ("seed", int, 0, "0", False),
)
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
MANY = 256  # entries of an image above which divergence=auto goes by probes
#: What else bounds the likelihood, with some words on it.
BOUNDS = {
    "bits_per_dim": "in bits/dim",
    "bits_per_dim_uniform_1": "one draw of uniform noise, as published numbers have it",
    "bits_per_dim_importance_weighted": "importance-weighted with {draws} draws",
    "negative_iwae_bound": "minus the importance-weighted bound with {iwae_draws} draws, of the first images",
    "bits_per_dim_iwae": "the same in bits/dim",
}
#: Where errors of a mean come from, besides the finite number of rows.
SOURCES = {"dequantisation": "dequantisation draws", "draws": "draws of the posterior", "trace": "probes"}
#: Numbers that no error belongs to.
QUALITIES = {
    "reconstruction": "reconstruction, nats",
    "negative_elbo_of_iwae_images": "negative ELBO of the images of that bound",
    "kl": "KL of the posterior from the prior, nats",
    "active_units": "active units",
    "effective_sample_size_median": "effective sample size of {iwae_draws}, median",
    "effective_sample_size_least": "effective sample size of {iwae_draws}, least",
}
VISIBLE = {"bits_per_dim": 5e-4, "negative_elbo": 5e-3}  # changes that a number to two decimals would show


def evaluate(config: DictConfig) -> float:
    """Rebuild a model from its checkpoint alone and report the likelihood of rows or images, or a bound of it.

    Args:
        config: The composed configuration of ``evaluate.yaml``.

    Returns:
        The mean NLL in nats per row, or in bits/dim for images, or the mean negative ELBO in nats.
    """
    for name, kind, least, typed, optional in NUMBERS:
        check_number(config, name, kind, least, typed, optional)
    check_samples(config)
    run = require_run(config.run)
    model, rebuild = restore_flow(run)
    choices = chosen(config, model)
    solver = converged_solver(config.method, choices["atol"], choices["rtol"])
    divergence = choices["divergence"]
    model.set_evaluation(solver, divergence)
    model.to(choose_device(config.device), PRECISIONS[choices["precision"]])

    data = open_data(config, rebuild) if config.data is None or config.samples else None
    name, rows, notes = open_rows(config, model, rebuild, data)
    tight = converged_solver(config.method, choices["atol"] / 100, choices["rtol"] / 100)
    samples = {}
    if config.samples:  # first, for a check leaves the model in float64 and with a tight solver
        assert data is not None
        together = pass_rows(config, model)
        samples["samples"] = sample_findings(model, rows, data.split("train"), config.sample_metrics, together)
    if isinstance(model, VariationalAutoencoder):
        found = autoencoder_findings(model, rows, config, tight, divergence)
    else:
        found = flow_findings(model, rows, config, tight, divergence)

    solved = bool(continuous_blocks(model))  # or mapped in closed form
    folder = Path(config.output) if config.output else run_folder(run) / "evaluation"
    context = {
        "run": str(run),
        "split": config.split if config.data is None else None,
        "file": config.data,
        "limit": config.limit,
        "rows": found.per_row.shape[1],
        "draws": found.draws,
        "iwae_draws": config.iwae_draws or None,
        "iwae_limit": config.iwae_limit,
        "unit": found.unit,
        "notes": notes,
        "solver": solver.describe() if solved else None,
        "trace": told(divergence, model) if solved else None,
        "precision": choices["precision"],
        "nfe": found.nfe,
        "seed": rebuild["config"]["seed"],
        **environment(),
    }
    write_json(folder / f"{name}.json", {**found.numbers, **samples, "context": context})
    per_row = found.per_row if len(found.per_row) > 1 else found.per_row[0]
    np.save(folder / f"{name}_{found.per_row_name}.npy", per_row.numpy())
    for note in notes:
        log.warning("%s", note)
    report(name, found, context)
    if config.samples:
        report_samples(samples["samples"])
    log.info("%s of every row: %s", found.per_row_name, folder / f"{name}_{found.per_row_name}.npy")
    return found.numbers[found.quantity]


@dataclass(frozen=True)
class Findings:
    """What was found of some rows.

    Attributes:
        numbers: Means and their errors by name.
        quantity: The name of the first of them.
        unit: Its unit.
        per_row: The same per draw and row, as log-densities or bounds of them (draws, rows).
        per_row_name: What these are.
        nfe: Evaluations of all solves.
        draws: Draws per row; None where nothing is drawn.
    """

    numbers: dict[str, float]
    quantity: str
    unit: str
    per_row: Tensor
    per_row_name: str
    nfe: int
    draws: int | None


def flow_findings(
    flow: Flow, rows: Rows, config: DictConfig, tight: OdeSolver, divergence: DivergenceEstimator
) -> Findings:
    """Return the likelihood of rows, in nats, or of images, in bits/dim too."""
    images = flow.dequantiser is not None
    draws = config.draws if images else 1
    found = log_likelihoods(flow, rows, pass_rows(config, flow), config.limit, draws, config.seed)
    if not images:
        return Findings(nll_numbers(found), "nll", "nats", found.log_prob, "log_prob", found.nfe, None)
    numbers = image_likelihoods(flow, rows, found, config)
    if draws > 1 and found.trace_error is not None:
        log.info(
            "no importance-weighted bound: the noise of probes would pass for a better one. Type divergence=exact."
        )
    if config.check and continuous_blocks(flow):
        numbers |= solver_gap(flow, rows, config.check, tight, divergence, config.seed)
    return Findings(numbers, "bits_per_dim", "bits/dim", found.log_prob, "log_prob", found.nfe, draws)


def autoencoder_findings(
    model: VariationalAutoencoder, rows: Rows, config: DictConfig, tight: OdeSolver, divergence: DivergenceEstimator
) -> Findings:
    """Return the ELBO of images and, if asked for, the importance-weighted bound."""
    found = elbos(model, rows, pass_rows(config, model), config.limit, config.draws, config.seed)
    numbers = elbo_numbers(found, model)
    if config.iwae_draws:
        limit = min(config.iwae_limit or len(rows), config.limit or len(rows))
        if found.trace_error is not None:
            raise ConfigError(
                "Expected divergence=exact for the importance-weighted bound, which the noise of probes would pass "
                f"for a better one, got {config.divergence}. Type divergence=exact, or iwae_draws=0."
            )
        weighted = importance_weighted(model, rows, config.iwae_draws, pass_rows(config, model), limit, config.seed)
        numbers |= importance_numbers(weighted, model)
        numbers["negative_elbo_of_iwae_images"] = -float(found.log_weight[:, :limit].mean())
    if config.check and continuous_blocks(model):
        numbers |= elbo_gap(model, rows, config.check, tight, divergence, config.seed)
    return Findings(numbers, "negative_elbo", "nats", found.log_weight, "elbo", found.nfe, config.draws)


def pass_rows(config: DictConfig, model: Flow | VariationalAutoencoder) -> int:
    """Return how many rows, images or latents are solved and decoded at once."""
    return config.batch_size or (200 if is_of_images(model) else 2000)


def is_of_images(model: Flow | VariationalAutoencoder) -> bool:
    """Whether a model is one of pixels."""
    return isinstance(model, VariationalAutoencoder) or model.dequantiser is not None


def chosen(config: DictConfig, model: Flow | VariationalAutoencoder) -> dict[str, Any]:
    """Return precision, tolerances and divergence, with what is left open decided by what is modelled."""
    images = is_of_images(model)
    precision = config.precision or ("float32" if images else "float64")
    if precision not in PRECISIONS:
        raise ConfigError(f"Expected precision float64 or float32, got {precision}. Type precision=float64.")
    traces = {"exact": Exact(config.memory, config.chunk), "hutchinson": Hutchinson(Rademacher(), config.probes)}
    if config.divergence not in (*traces, "auto"):
        raise ConfigError(
            f"Expected divergence to be auto, exact or hutchinson, got {config.divergence}. Type divergence=auto."
        )
    fields = [block.field for block in continuous_blocks(model)]
    large = images and any(math.prod(field.event_shape) > MANY and not field.has_closed_form for field in fields)
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
        uniform = log_likelihoods(flow, rows, pass_rows(config, flow), config.limit, 1, config.seed)
        flow.dequantiser = own
    return image_numbers(found, uniform, math.prod(flow.event_shape))


def told(divergence: DivergenceEstimator, model: Flow | VariationalAutoencoder) -> str:
    """Say in some words how divergences were taken."""
    return "exact" if divergence.exact else divergence.describe(continuous_blocks(model)[0].field)


def report(name: str, found: Findings, context: dict[str, Any]) -> None:
    """Log the numbers, each with the errors that it has, and how they were solved."""
    numbers, quantity = found.numbers, found.quantity
    count = f"{context['rows']:,} {'rows' if quantity == 'nll' else 'images'}"
    log.info("%s: %s %s %s over %s", name, quantity, spread(numbers, quantity), found.unit, count)
    for bound, words in BOUNDS.items():
        if bound in numbers and bound != quantity:
            log.info("%s: %s", words.format(**context), spread(numbers, bound))
    for source, words in SOURCES.items():
        if f"{quantity}_{source}_standard_error" in numbers:
            log.info("of it by %s: ± %.1e", words, numbers[f"{quantity}_{source}_standard_error"])
    for quality, words in QUALITIES.items():
        if quality in numbers:
            log.info("%s: %.4g", words.format(**context), numbers[quality])
    if f"{quantity}_solver_gap" in numbers:
        gap, largest = numbers[f"{quantity}_solver_gap"], numbers[f"{quantity}_largest_solver_gap"]
        log.info(
            "a solve at a hundredth of the tolerance in float64 changes it by %+.1e, an image by up to %.1e",
            gap,
            largest,
        )
        if abs(gap) > VISIBLE[quantity]:
            log.warning(
                "Expected a converged solve, got a change of %+.1e %s. Type atol=1e-7 rtol=1e-7.", gap, found.unit
            )
    if context["solver"] is None:
        log.info("closed form, %s", context["precision"])
    else:
        solver = context["solver"]
        how = f"{context['trace']} divergence, {solver['method']}, atol {solver['atol']:g}, rtol {solver['rtol']:g}"
        log.info("%s, %s, %d evaluations", how, context["precision"], context["nfe"])


def spread(numbers: dict[str, float], quantity: str) -> str:
    """Return a mean with its standard error over rows."""
    return f"{numbers[quantity]:.4f} ± {numbers[f'{quantity}_standard_error']:.4f}"


def open_rows(
    config: DictConfig, model: Flow | VariationalAutoencoder, rebuild: dict[str, Any], data: FlowDataModule | None
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
