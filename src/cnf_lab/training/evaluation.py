"""What an evaluation finds of some rows: likelihoods or bounds of them, each with its error budget."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from omegaconf import DictConfig
from torch import Tensor

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.errors import SolverError
from cnf_lab.flows import Flow, UniformDequantiser, continuous_blocks
from cnf_lab.training.bounds import ImportanceWeighted, elbo_numbers, elbos, importance_numbers, importance_weighted
from cnf_lab.training.budget import Budget, budget, less, of_draws, of_errors, of_solver, of_some
from cnf_lab.training.checks import GRID, Evaluated, change, inversion_errors, negative, total_mass
from cnf_lab.training.likelihoods import (
    Likelihoods,
    error_over_draws,
    image_numbers,
    jackknife_error,
    log_likelihoods,
    nats_in_bits,
    nll_numbers,
    uniformly,
)
from cnf_lab.training.settings import AnyModel, Settings, tangents

log = logging.getLogger("cnf_lab")
Found = TypeVar("Found")
EXACTLY = 4  # rows that are checked by exact divergences, where they take many tangents
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
        problems: What could not be checked, and why.
    """

    numbers: dict[str, float]
    budgets: dict[str, Budget]
    quantity: str
    unit: str
    per_row: Tensor
    per_row_name: str
    nfe: tuple[int, ...]
    settings: Settings
    counts: dict[str, int]
    problems: list[str]

    @property
    def main(self) -> Budget:
        """The budget of the first number."""
        return self.budgets[self.quantity]


@dataclass
class Changes:
    """What other ways of computing change, per row.

    Attributes:
        checked: Number of rows that are computed again.
        computed: Whether there is an error of a solve or of float32 to look for.
        solver: NLL by a solve at a hundredth of the tolerance in float64 less the usual one (checked,); None
            where nothing is checked.
        exact: NLL by exact divergences less that by probes, both at the tight solve (checked exactly,);
            None where divergences are exact.
        pairs: NLLs of two draws (2, checked); None where nothing is drawn or more are drawn of every row.
        problems: What could not be checked, and why.
    """

    checked: int
    computed: bool
    solver: Tensor | None = None
    exact: Tensor | None = None
    pairs: Tensor | None = None
    problems: list[str] = field(default_factory=list)

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
    if isinstance(model, VariationalAutoencoder) and config.iwae_draws:
        found = _with_bound(model, what, config, found)
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
        return log_likelihoods(flow, what.rows, what.pass_rows, what.count, draws, what.seed, what.shares)

    found = likelihoods(draws)
    rows = what.count
    changes = _changes(flow, what, config, settings, drawn=images)
    others = _others(found.trace_error, settings, changes, rows)
    counts = {"rows": rows, **changes.counts()}
    if not images:
        budgets = {"nll": budget(-found.log_prob[0], "nats", others)}
        numbers = nll_numbers(found) | _gaps("nll", changes, 1.0)
        parts = ("nll", "nats", found.log_prob, "log_prob", found.nfe, settings, counts, changes.problems)
        return Findings(numbers, budgets, *parts)

    uniform, pairs = found, changes.pairs
    if not isinstance(flow.dequantiser, UniformDequantiser):
        own, flow.dequantiser = flow.dequantiser, uniformly(flow)
        uniform = likelihoods(1)
        pairs = negative(flow, what.some(changes.checked), draws=2) if changes.checked else None
        flow.dequantiser = own
    pixels = math.prod(flow.event_shape)
    scale = nats_in_bits(1.0, pixels)
    numbers = image_numbers(found, uniform, pixels) | _gaps("bits_per_dim", changes, scale)
    nats = {"": budget(-found.log_prob.mean(dim=0), "nats", _drawn(of_draws(found.log_prob, changes.pairs), others))}
    if draws > 1 or uniform is not found:  # else it is the same number
        single = uniform.log_prob
        alone = of_errors(single.std(dim=0), draws - 1) if len(single) > 1 else of_draws(single, pairs)
        error = None if uniform.trace_error is None else uniform.trace_error[:1]
        nats["_uniform_1"] = budget(-single[0], "nats", _drawn(alone, _others(error, settings, changes, rows)))
    if "bits_per_dim_importance_weighted" in numbers:
        weighted = {"draws": of_errors(jackknife_error(found.log_prob), draws - 1), **others}
        nats["_importance_weighted"] = budget(-found.importance_weighted(), "nats", weighted)
    elif draws > 1:
        changes.problems.append(
            "No importance-weighted bound: the noise of probes would pass for a better one. Type divergence=exact."
        )
    budgets = {f"bits_per_dim{name}": own.scaled(scale, "bits/dim") for name, own in nats.items()}
    counts["draws"] = draws
    parts = ("bits_per_dim", "bits/dim", found.log_prob, "log_prob", found.nfe, settings, counts, changes.problems)
    return Findings(numbers, budgets, *parts)


def autoencoder_findings(
    model: VariationalAutoencoder, what: Evaluated, config: DictConfig, settings: Settings
) -> Findings:
    """Return the ELBO of images.

    Args:
        model: The autoencoder, with the settings applied.
        what: The images.
        config: The composed configuration of ``evaluate.yaml``.
        settings: How to compute.
    """
    found = elbos(model, what.rows, what.pass_rows, what.count, settings.draws, what.seed, what.shares)
    changes = _changes(model, what, config, settings, drawn=True)
    numbers = elbo_numbers(found, model) | _gaps("negative_elbo", changes, 1.0)
    others = _others(found.trace_error, settings, changes, what.count)
    drawn = _drawn(of_draws(found.log_weight, changes.pairs), others)
    budgets = {"negative_elbo": budget(-found.log_weight.mean(dim=0), "nats", drawn)}
    counts = {"rows": what.count, "draws": settings.draws, **changes.counts()}
    parts = ("negative_elbo", "nats", found.log_weight, "elbo", found.nfe, settings, counts, changes.problems)
    return Findings(numbers, _in_bits_too(budgets, model), *parts)


def _with_bound(model: VariationalAutoencoder, what: Evaluated, config: DictConfig, found: Findings) -> Findings:
    """Add the importance-weighted bound, whose number of draws stands, to what was found of the ELBO."""
    first = replace(what, count=min(config.iwae_limit or what.count, what.count))

    def bounds(draws: int, images: Evaluated) -> ImportanceWeighted:
        parts = (images.pass_rows, images.count, images.seed, images.shares)
        return importance_weighted(model, images.rows, draws, *parts)

    weighted = bounds(config.iwae_draws, first)
    sources = {"draws": of_errors(weighted.error, config.iwae_draws - 1)}
    checked = min(found.counts["checked"], first.count)
    if "solver" in found.main.sources:
        few, tight = min(config.iwae_draws, CHECKED_DRAWS), found.settings.tight()
        changed = None
        if checked:
            changed = _tried(
                found.problems,
                "the importance-weighted bound by a tighter solve",
                lambda: change(model, found.settings, tight, lambda: -bounds(few, first.some(checked)).bound),
            )
        sources["solver"] = None if changed is None else of_solver(changed, first.count)
    budgets = {"negative_iwae_bound": budget(-weighted.bound, "nats", sources)}
    numbers = importance_numbers(weighted, model)
    numbers["negative_elbo_of_iwae_images"] = -float(found.per_row[:, : first.count].mean())
    return replace(
        found,
        numbers={**found.numbers, **numbers},
        budgets={**found.budgets, **_in_bits_too(budgets, model)},
        counts={**found.counts, "iwae_rows": first.count, "iwae_draws": config.iwae_draws},
    )


def _in_bits_too(budgets: dict[str, Budget], model: VariationalAutoencoder) -> dict[str, Budget]:
    """Return budgets in bits/dim beside those in nats, where pixels have more than two values."""
    if model.likelihood.levels == 2:
        return budgets
    names = {"negative_elbo": "bits_per_dim", "negative_iwae_bound": "bits_per_dim_iwae"}
    scale = nats_in_bits(1.0, math.prod(model.event_shape))
    return budgets | {names[name]: own.scaled(scale, "bits/dim") for name, own in budgets.items()}


def _changes(model: AnyModel, what: Evaluated, config: DictConfig, settings: Settings, drawn: bool) -> Changes:
    """Compute some rows in other ways: as many as a batch has, for its size decides on its steps."""
    usual = max(2, what.pass_rows) if config.check is None else config.check
    some = what.some(min(what.count, usual))
    changes = Changes(some.count, bool(continuous_blocks(model)) or settings.precision != "float64")
    if not some.count:
        return changes
    tight, problems = settings.tight(), changes.problems
    if changes.computed:
        changes.solver = _tried(
            problems, "a tighter solve", lambda: change(model, settings, tight, lambda: negative(model, some)[0])
        )
    if not settings.exact and continuous_blocks(model):
        affordable = some.count if tangents(model) <= FEW_TANGENTS else EXACTLY
        few = what.some(min(some.count, affordable if config.check_exact is None else config.check_exact))
        tight.apply(model)
        if few.count:
            exactly = tight.exactly()
            changes.exact = _tried(
                problems, "exact divergences", lambda: change(model, tight, exactly, lambda: negative(model, few)[0])
            )
        settings.apply(model)
    if drawn and settings.draws == 1:
        changes.pairs = negative(model, some, draws=2)
    return changes


def _tried(problems: list[str], what: str, measure: Callable[[], Found]) -> Found | None:
    """Return a measurement, or None where its solve fails: what was found without it is not lost."""
    try:
        return measure()
    except SolverError as failure:
        problems.append(f"Not checked, {what}: {failure}")
        return None


def _drawn(draws: float | None, others: dict[str, float | None]) -> dict[str, float | None]:
    """Return half-widths with that of the draws, without the probes in it."""
    return {"draws": less(draws, others.get("probes", 0.0)), **others}


def _others(trace_error: Tensor | None, settings: Settings, changes: Changes, rows: int) -> dict[str, float | None]:
    """Return half-widths of probes, from the errors of K draws of them (K, rows), and of the solver."""
    found: dict[str, float | None] = {}
    if trace_error is not None and settings.probes > 1:
        found["probes"] = of_errors(error_over_draws(trace_error), settings.probes - 1)
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
    some = what.some(found.counts["checked"])
    if some.count and (isinstance(model, Flow) or continuous_blocks(model)):
        errors = _tried(found.problems, "the way back", lambda: inversion_errors(model, some))
        if errors is not None:
            largest, median = float(errors.max()), float(errors.median())
            numbers |= {"invertibility_error": largest, "invertibility_error_median": median}
    if isinstance(model, Flow) and model.dequantiser is None and math.prod(model.event_shape) in GRID and config.mass:
        whole = _tried(found.problems, "the total mass", lambda: total_mass(model, what, found.settings))
        if whole is not None:
            numbers |= {"mass": whole.mass, "mass_resolution": whole.resolution, "mass_outside": whole.outside}
            numbers["mass_points"] = float(whole.points)
    return numbers
