"""What an evaluation finds of some rows: likelihoods or bounds of them, each with its error budget."""

import logging
import math
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.errors import ConfigError
from cnf_lab.flows import Flow, UniformDequantiser, continuous_blocks
from cnf_lab.training.bounds import Elbos, elbo_numbers, elbos, importance_numbers, importance_weighted
from cnf_lab.training.budget import (
    Budget,
    budget,
    of_draws,
    of_errors,
    of_solver,
    of_some,
    of_weights,
    sample_size,
)
from cnf_lab.training.checks import GRID, Evaluated, change, inversion_errors, negative, total_mass
from cnf_lab.training.likelihoods import Likelihoods, image_numbers, log_likelihoods, nll_numbers, uniformly
from cnf_lab.training.settings import AnyModel, Settings, tangents

log = logging.getLogger("cnf_lab")
EXACTLY = 4  # of them by an exact divergence as well, where it takes many tangents
FEW_TANGENTS = 64
CHECKED_DRAWS = 100  # of an importance-weighted bound, in its check
ROUNDS = 6  # of converge=true


@dataclass(frozen=True)
class Findings:
    """What was found of some rows.

    Attributes:
        numbers: Means and their errors by name.
        budgets: Error budgets by the name of the number.
        quantity: The name of the first of them.
        unit: Its unit.
        per_row: The same per draw and row, as log-densities or bounds of them (draws, rows).
        per_row_name: What these are.
        nfe: Evaluations for each batch and draw.
        settings: How it was computed.
        counts: Rows and draws that the numbers come from, by name.
    """

    numbers: dict[str, float]
    budgets: dict[str, Budget]
    quantity: str
    unit: str
    per_row: Tensor
    per_row_name: str
    nfe: tuple[int, ...]
    settings: Settings
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def main(self) -> Budget:
        """The budget of the first number."""
        return self.budgets[self.quantity]


@dataclass(frozen=True)
class Changes:
    """What other ways of computing change, per row.

    Attributes:
        solver: NLL by a solve at a hundredth of the tolerance in float64 less the usual one (checked,); None
            where nothing is checked.
        exact: NLL by exact divergences less that by probes, both at the tight solve (checked exactly,);
            None where divergences are exact.
        pairs: NLLs of two draws (2, checked); None where nothing is drawn or more are drawn of every row.
        checked: Number of rows that were checked.
        computed: Whether there is an error of a solve or of float32 to look for.
    """

    solver: Tensor | None
    exact: Tensor | None
    pairs: Tensor | None
    checked: int
    computed: bool

    def counts(self) -> dict[str, int]:
        """Return how many rows were checked, and how many of them by exact divergences."""
        exactly = {} if self.exact is None else {"checked_exactly": len(self.exact)}
        return {"checked": self.checked, **exactly}


def findings(model: AnyModel, what: Evaluated, config: DictConfig, settings: Settings) -> Findings:
    """Return what is found of rows; under ``converge=true`` with settings that the last digit printed can bear.

    Args:
        model: The model, in evaluation mode.
        what: The rows.
        config: The composed configuration of ``evaluate.yaml``.
        settings: How to compute, at first.

    Raises:
        ConfigError: If the options do not go together.
    """
    find = autoencoder_findings if isinstance(model, VariationalAutoencoder) else flow_findings
    digit = 10.0**-config.digits
    for left in reversed(range(ROUNDS)):
        settings.apply(model)
        found = find(model, what, config, settings)  # type: ignore[arg-type]
        better = settings.tightened(_excess(found, digit), tangents(model)) if config.converge and left else None
        if better is None:
            break
        if what.shares.first:
            log.info("converge: %s", better.described())
        settings = better
    return replace(found, numbers={**found.numbers, **_further(model, what, config, found)})


def _excess(found: Findings, digit: float) -> dict[str, float]:
    # A third of the digit for each source: together they stay below it.
    widths = {name: found.main.sources.get(name) for name in ("solver", "probes", "draws")}
    return {name: 3 * width / digit for name, width in widths.items() if width is not None}


def flow_findings(flow: Flow, what: Evaluated, config: DictConfig, settings: Settings) -> Findings:
    """Return the likelihood of rows, in nats, or of images, in bits/dim too.

    Args:
        flow: The density, with the settings applied.
        what: The rows.
        config: The composed configuration of ``evaluate.yaml``.
        settings: How to compute.
    """
    images = flow.dequantiser is not None
    draws = settings.draws if images else 1

    def likelihoods(draws: int) -> Likelihoods:
        return log_likelihoods(flow, what.rows, what.pass_rows, config.limit, draws, what.seed, what.shares)

    found = likelihoods(draws)
    rows = found.log_prob.shape[1]
    changes = _changes(flow, what, config, settings, rows, drawn=images)
    others = _others(found.trace_error, settings, changes, rows)
    counts = {"rows": rows, **changes.counts()}
    if not images:
        budgets = {"nll": budget(-found.log_prob[0], "nats", others)}
        numbers = nll_numbers(found) | _gaps("nll", changes, 1.0)
        return Findings(numbers, budgets, "nll", "nats", found.log_prob, "log_prob", found.nfe, settings, counts)

    uniform, pairs = found, changes.pairs
    if not isinstance(flow.dequantiser, UniformDequantiser):
        own, flow.dequantiser = flow.dequantiser, uniformly(flow)
        uniform = likelihoods(1)
        pairs = _pairs(flow, what, counts["checked"])
        flow.dequantiser = own
    scale = 1 / (math.prod(flow.event_shape) * math.log(2))
    numbers = image_numbers(found, uniform, math.prod(flow.event_shape)) | _gaps("bits_per_dim", changes, scale)
    nats = {
        "": budget(-found.log_prob.mean(dim=0), "nats", {"draws": of_draws(found.log_prob, changes.pairs), **others})
    }
    single = (
        of_some(uniform.log_prob.std(dim=0), rows) if len(uniform.log_prob) > 1 else of_draws(uniform.log_prob, pairs)
    )
    first_error = None if uniform.trace_error is None else uniform.trace_error[:1]
    alone = {"draws": single, **_others(first_error, settings, changes, rows)}
    nats["_uniform_1"] = budget(-uniform.log_prob[0], "nats", alone)
    if "bits_per_dim_importance_weighted" in numbers:
        weighted = {"draws": of_weights(sample_size(found.log_prob), draws), **others}
        nats["_importance_weighted"] = budget(-found.importance_weighted(), "nats", weighted)
    elif draws > 1 and what.shares.first:
        log.info(
            "no importance-weighted bound: the noise of probes would pass for a better one. Type divergence=exact."
        )
    budgets = {f"bits_per_dim{name}": own.scaled(scale, "bits/dim") for name, own in nats.items()}
    parts = ("bits_per_dim", "bits/dim", found.log_prob, "log_prob", found.nfe, settings)
    return Findings(numbers, budgets, *parts, counts | {"draws": draws})


def autoencoder_findings(
    model: VariationalAutoencoder, what: Evaluated, config: DictConfig, settings: Settings
) -> Findings:
    """Return the ELBO of images and, if asked for, the importance-weighted bound.

    Args:
        model: The autoencoder, with the settings applied.
        what: The images.
        config: The composed configuration of ``evaluate.yaml``.
        settings: How to compute.

    Raises:
        ConfigError: If the importance-weighted bound is asked for with an estimated divergence.
    """
    estimated = not settings.exact and bool(continuous_blocks(model))
    if config.iwae_draws and estimated:
        raise ConfigError(
            "Expected divergence=exact for the importance-weighted bound, which the noise of probes would pass "
            f"for a better one, got {config.divergence}. Type divergence=exact, or iwae_draws=0."
        )
    found = elbos(model, what.rows, what.pass_rows, config.limit, settings.draws, what.seed, what.shares)
    rows = found.log_weight.shape[1]
    numbers = elbo_numbers(found, model)
    changes = _changes(model, what, config, settings, rows, drawn=True)
    counts = {"rows": rows, "draws": settings.draws, **changes.counts()}
    numbers |= _gaps("negative_elbo", changes, 1.0)
    others = {"draws": of_draws(found.log_weight, changes.pairs), **_others(found.trace_error, settings, changes, rows)}
    budgets = {"negative_elbo": budget(-found.log_weight.mean(dim=0), "nats", others)}
    if config.iwae_draws:
        numbers |= _weighted(model, what, config, settings, found, budgets, counts)
    if model.likelihood.levels > 2:
        scale = 1 / (math.prod(model.event_shape) * math.log(2))
        names = {"negative_elbo": "bits_per_dim", "negative_iwae_bound": "bits_per_dim_iwae"}
        budgets |= {names[name]: own.scaled(scale, "bits/dim") for name, own in budgets.items()}
    parts = ("negative_elbo", "nats", found.log_weight, "elbo", found.nfe, settings)
    return Findings(numbers, budgets, *parts, counts)


def _weighted(
    model: VariationalAutoencoder,
    what: Evaluated,
    config: DictConfig,
    settings: Settings,
    found: Elbos,
    budgets: dict[str, Budget],
    counts: dict[str, int],
) -> dict[str, float]:
    """Add the budget of the importance-weighted bound, and return its numbers."""
    limit = min(config.iwae_limit or len(what.rows), counts["rows"])

    def bounds(draws: int, count: int) -> Any:
        return importance_weighted(model, what.rows, draws, what.pass_rows, count, what.seed, what.shares)

    weighted = bounds(config.iwae_draws, limit)
    sources = {"draws": of_weights(weighted.sample_size, config.iwae_draws)}
    checked = min(counts["checked"], limit)
    if checked and "solver" in budgets["negative_elbo"].sources:
        few = min(config.iwae_draws, CHECKED_DRAWS)
        changed = change(model, settings, settings.tight(), lambda: -bounds(few, checked).bound)
        sources["solver"] = of_solver(changed, limit)
    elif "solver" in budgets["negative_elbo"].sources:
        sources["solver"] = None
    budgets["negative_iwae_bound"] = budget(-weighted.bound, "nats", sources)
    counts |= {"iwae_rows": limit, "iwae_draws": config.iwae_draws}
    elbo = -float(found.log_weight[:, :limit].mean())
    return importance_numbers(weighted, model) | {"negative_elbo_of_iwae_images": elbo}


def _changes(
    model: AnyModel, what: Evaluated, config: DictConfig, settings: Settings, rows: int, drawn: bool
) -> Changes:
    """Compute the first rows in other ways: a batch, for its size decides on its steps."""
    checked = min(rows, what.pass_rows if config.check is None else config.check)
    computed = bool(continuous_blocks(model)) or settings.precision != "float64"
    if not checked:
        return Changes(None, None, None, 0, computed)
    solver = exact = None
    if computed:
        solver = change(model, settings, settings.tight(), lambda: negative(model, what, checked)[0])
    if not settings.exact and continuous_blocks(model):
        affordable = checked if tangents(model) <= FEW_TANGENTS else EXACTLY
        few = min(checked, affordable if config.check_exact is None else config.check_exact)
        tight = settings.tight()
        tight.apply(model)
        try:
            exact = change(model, tight, tight.exactly(), lambda: negative(model, what, few)[0]) if few else None
        finally:
            settings.apply(model)
    return Changes(
        solver, exact, _pairs(model, what, checked) if drawn and settings.draws == 1 else None, checked, computed
    )


def _pairs(model: AnyModel, what: Evaluated, checked: int) -> Tensor | None:
    return negative(model, what, checked, draws=2) if checked else None


def _others(trace_error: Tensor | None, settings: Settings, changes: Changes, rows: int) -> dict[str, float | None]:
    """Return half-widths of probes, from the errors of K draws of them (K, rows), and of the solver."""
    found: dict[str, float | None] = {}
    if trace_error is not None and settings.probes > 1:
        spread = trace_error.square().sum(dim=0).sqrt() / len(trace_error)
        found["probes"] = of_errors(spread, settings.probes - 1)
    elif trace_error is not None:  # of a single probe: only its difference from the exact divergence tells
        found["probes"] = None if changes.exact is None else of_some(changes.exact, rows * len(trace_error))
    if changes.computed:
        found["solver"] = None if changes.solver is None else of_solver(changes.solver, rows)
    return found


def _gaps(quantity: str, changes: Changes, scale: float) -> dict[str, float]:
    """Return what the checks changed, as numbers."""
    numbers = {}
    if changes.solver is not None:
        numbers[f"{quantity}_solver_gap"] = scale * float(changes.solver.mean())
        numbers[f"{quantity}_largest_solver_gap"] = scale * float(changes.solver.abs().max())
    if changes.exact is not None:
        numbers[f"{quantity}_exact_gap"] = scale * float(changes.exact.mean())
        if len(changes.exact) > 1:
            error = float(changes.exact.std()) / math.sqrt(len(changes.exact))
            numbers[f"{quantity}_exact_gap_standard_error"] = scale * error
    return numbers


def _further(model: AnyModel, what: Evaluated, config: DictConfig, found: Findings) -> dict[str, float]:
    """Return evaluations per solve, errors of inversion, and the total mass in few dimensions."""
    numbers: dict[str, float] = {}
    if continuous_blocks(model):
        numbers = {"nfe": sum(found.nfe) / len(found.nfe), "nfe_most": float(max(found.nfe))}
    count = found.counts["checked"]
    if count and (isinstance(model, Flow) or continuous_blocks(model)):
        errors = inversion_errors(model, what, count)
        numbers |= {"invertibility_error": float(errors.max()), "invertibility_error_median": float(errors.median())}
    if isinstance(model, Flow) and model.dequantiser is None and math.prod(model.event_shape) in GRID and config.mass:
        whole = total_mass(model, what, found.settings)
        numbers |= {"mass": whole.mass, "mass_resolution": whole.resolution, "mass_outside": whole.outside}
        numbers["mass_points"] = float(whole.points)
    return numbers
