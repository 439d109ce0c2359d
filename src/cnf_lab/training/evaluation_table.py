"""An evaluation in one table, and what it must warn of."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from cnf_lab.training.budget import CONFIDENCE, SOURCES, Budget, largest_source
from cnf_lab.training.evaluation import Findings

log = logging.getLogger("cnf_lab")
#: What each number is called.
NAMES = {
    "nll": "NLL",
    "bits_per_dim": "{mean}",
    "bits_per_dim_uniform_1": "one draw of uniform noise",
    "bits_per_dim_importance_weighted": "importance-weighted with {draws} draws",
    "negative_elbo": "negative ELBO",
    "negative_iwae_bound": "minus importance-weighted bound, {iwae_draws} draws",
    "bits_per_dim_iwae": "minus importance-weighted bound, {iwae_draws} draws",
}
#: Numbers that no error belongs to.
QUALITIES = {
    "reconstruction": "reconstruction, nats",
    "kl": "KL of the posterior from the prior, nats",
    "active_units": "active units",
    "negative_elbo_of_iwae_images": "negative ELBO of the images of the importance-weighted bound",
    "effective_sample_size_median": "effective sample size of {iwae_draws}, median",
    "effective_sample_size_least": "effective sample size of {iwae_draws}, least",
}
#: What makes a source smaller.
REMEDIES = {
    "rows": "Quote it with its error, or print fewer digits: digits={fewer}",
    "probes": "Type converge=true, or probes={more_probes}, or divergence=exact",
    "draws": "Type converge=true, or draws={more_draws}",
    "solver": "Type converge=true, or atol={finer_atol:.0e} rtol={finer_rtol:.0e}",
}


def report(name: str, found: Findings, context: dict[str, Any]) -> None:
    """Log the table, what else was found, and warnings.

    Args:
        name: What was evaluated.
        found: What was found.
        context: What the numbers depend on.
    """
    numbers, counts, digits = found.numbers, found.counts, context["digits"]
    mean = (
        "negative ELBO" if found.quantity == "negative_elbo" else f"mean over {counts.get('draws', 1)} draws of noise"
    )
    said = {"iwae_draws": "", "mean": mean, **counts}
    rows = "images" if found.quantity != "nll" else "rows"
    log.info("%s: %s %s, %s", name, f"{counts['rows']:,}", rows, _how(context))
    for line in table(found.budgets, digits, said):
        log.info("%s", line)
    log.info(
        "± holds the truth with probability %g: rows (with what probes and draws leave in them) and solver%s",
        CONFIDENCE,
        ""
        if not counts["checked"]
        else f", bounded by {counts['checked']:,} {rows} solved at a hundredth of the tolerance in float64",
    )
    for quality, words in QUALITIES.items():
        if quality in numbers:
            log.info("%s: %.4g", words.format(**said), numbers[quality])
    for line in checks(found, said):
        log.info("%s", line)
    for line in warnings(found, digits, context["converge"]):
        log.warning("%s", line)


def table(budgets: dict[str, Budget], digits: int, said: dict[str, Any]) -> list[str]:
    """Return the lines of a table of numbers with their errors by source.

    Args:
        budgets: The budgets by the name of the number.
        digits: Decimals of a number.
        said: What stands in its name.
    """
    shown = [source for source in SOURCES if any(source in own.sources for own in budgets.values())]
    lines = [["", "mean", "±", *shown]]
    for name, own in budgets.items():
        title = f"{NAMES[name].format(**said)}, {own.unit}"
        width = _width(own.half_width)
        cells = [_width(own.sources[source]) if source in own.sources else "" for source in shown]
        lines.append([title, f"{own.value:.{digits}f}", width, *cells])
    return _aligned(lines)


def checks(found: Findings, said: dict[str, Any]) -> list[str]:
    """Return what checks found, in a line each.

    Args:
        found: What was found.
        said: Counts by name.
    """
    numbers, quantity, lines = found.numbers, found.quantity, []
    if f"{quantity}_solver_gap" in numbers:
        gap, largest = numbers[f"{quantity}_solver_gap"], numbers[f"{quantity}_largest_solver_gap"]
        lines.append(f"the tighter solve changes the mean by {gap:+.1e} {found.unit}, one by up to {largest:.1e}")
    if f"{quantity}_exact_gap" in numbers:
        gap, error = numbers[f"{quantity}_exact_gap"], numbers.get(f"{quantity}_exact_gap_standard_error")
        spread = "" if error is None else f" ± {error:.1e}"
        lines.append(f"exact divergences change {said['checked_exactly']} by {gap:+.1e}{spread} {found.unit}")
    if "invertibility_error" in numbers:
        largest, median = numbers["invertibility_error"], numbers["invertibility_error_median"]
        lines.append(f"there and back again: off by up to {largest:.1e} deviations of a feature, median {median:.1e}")
    if "nfe" in numbers:
        lines.append(f"{numbers['nfe']:.0f} evaluations of the field for a batch, {numbers['nfe_most']:.0f} at most")
    if "mass" in numbers:
        points, resolution, outside = (numbers[f"mass_{key}"] for key in ("points", "resolution", "outside"))
        lines.append(
            f"total mass {numbers['mass']:.5f} on a grid of {points:.0f} points an axis, {resolution:.0e} off with "
            f"half of them; {100 * outside:.2g} % of samples lie outside"
        )
    return lines


def warnings(found: Findings, digits: int, converge: bool = False) -> list[str]:
    """Return what a reader must not overlook.

    Args:
        found: What was found.
        digits: Decimals of a number.
        converge: Whether the computation was to come below the last of them.
    """
    lines, digit, settings = [], 10.0**-digits, found.settings
    said = {
        "more_probes": 4 * settings.probes,
        "more_draws": 4 * settings.draws,
        "finer_atol": settings.atol / 100,
        "finer_rtol": settings.rtol / 100,
    }
    computation = found.main.computation
    if converge and computation is not None and computation > digit:
        lines.append(
            f"Expected converge=true to bring the computation's part of {found.quantity} below {digit:g}, got "
            f"{_width(computation)} with {settings.described()}. Type digits={max(0, digits - 1)}."
        )
    wide: dict[str, list[Budget]] = {}
    names = {id(own): name for name, own in found.budgets.items()}
    for name, own in found.budgets.items():
        if own.half_width is not None and own.half_width > digit:
            wide.setdefault(largest_source(own), []).append(own)
        unknown = [source for source, width in own.sources.items() if width is None]
        if unknown:
            lines.append(f"The error of {name} from {', '.join(unknown)} is not known. Type check=20.")
    for source, budgets in wide.items():
        told = [f"{names[id(own)]} {own.value:.{digits}f} ± {_width(own.half_width)}" for own in budgets]
        fewer = max(0, math.floor(-math.log10(max(own.half_width or 0.0 for own in budgets))))
        lines.append(
            f"Expected errors within the last digit printed, {digit:g}, got {'; '.join(told)}, most of it from "
            f"{source}. {REMEDIES[source].format(fewer=fewer, **said)}."
        )
    gap, error = (found.numbers.get(f"{found.quantity}_exact_gap{key}") for key in ("", "_standard_error"))
    if gap is not None and error is not None and abs(gap) > 5 * error > 0:
        lines.append(f"Expected exact divergences to agree with probes, got a change of {gap:+.1e}. Trust neither.")
    if abs(found.numbers.get("mass", 1.0) - 1) > 0.02 + found.numbers.get("mass_resolution", 0.0):
        lines.append(f"Expected a total mass of 1, got {found.numbers['mass']:.4f}. Type atol=1e-9 rtol=1e-9.")
    return lines


def _how(context: dict[str, Any]) -> str:
    solver = context["solver"]
    if solver is None:
        return f"closed form, {context['precision']}"
    divergence = "exact divergence" if context["trace"] == "exact" else f"divergence by {context['trace']}"
    tolerances = f"{solver['method']}, atol {solver['atol']:g}, rtol {solver['rtol']:g}"
    return f"{divergence}, {tolerances}, {context['precision']}"


def _width(value: float | None) -> str:
    if value is None:
        return "unknown"
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-4 else f"{value:.{max(0, 1 - _magnitude(value))}f}"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(value))


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
