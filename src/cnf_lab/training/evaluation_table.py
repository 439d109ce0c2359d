"""An evaluation in one table, and what it must warn of."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from scipy.stats import t as student

from cnf_lab.training.budget import CONFIDENCE, SOURCES, largest_source
from cnf_lab.training.evaluation import Findings
from cnf_lab.training.settings import FINEST, Settings

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
#: What tells an error that is not known.
UNKNOWN = {"rows": "Evaluate more rows", "probes": "Type probes=4", "draws": "Type draws=4", "solver": "Type check=20"}
SURE = 1 - 1e-6  # that probes and exact divergences disagree


def report(name: str, found: Findings, context: dict[str, Any]) -> None:
    """Log the table, what else was found, and warnings.

    Args:
        name: What was evaluated.
        found: What was found.
        context: What the numbers depend on.
    """
    numbers, counts, digits = found.numbers, found.counts, context["digits"]
    draws = counts.get("draws", 1)
    noise = "one draw of noise" if draws == 1 else f"mean over {draws} draws of noise"
    mean = "negative ELBO" if found.quantity == "negative_elbo" else noise
    given = ", given the context of the first row" if context["conditional"] else ""
    said = {"iwae_draws": "", "mean": mean, "given": given, **counts}
    rows = "images" if found.quantity != "nll" else "rows"
    log.info("%s: %s %s, %s", name, f"{counts['rows']:,}", rows, _how(context))
    for line in table(found, digits, said):
        log.info("%s", line)
    log.info(
        "± holds the truth with probability %g: rows (with what probes and draws leave in them) and solver%s",
        CONFIDENCE,
        # Not where nothing is solved or rounded: a closed form in float64.
        ""
        if found.main.sources.get("solver") is None
        else f", bounded by {counts['checked']:,} {rows} solved at a hundredth of the tolerance in float64",
    )
    for quality, words in QUALITIES.items():
        if quality in numbers:
            log.info("%s: %.4g", words.format(**said), numbers[quality])
    for line in checks(found, said):
        log.info("%s", line)
    for line in warnings(found, digits, context["converge"]):
        log.warning("%s", line)


def table(found: Findings, digits: int, said: dict[str, Any]) -> list[str]:
    """Return the lines of a table of numbers, each with its standard error over rows and its budget by source.

    Args:
        found: What was found.
        digits: Decimals of a number.
        said: What stands in the names of numbers.
    """
    budgets = found.budgets
    shown = [source for source in SOURCES if any(source in own.sources for own in budgets.values())]
    lines = [["", "mean", "s.e.", "±", *shown]]
    for name, own in budgets.items():
        title = f"{NAMES[name].format(**said)}, {own.unit}"
        widths = [found.numbers.get(f"{name}_standard_error"), own.half_width]
        cells = [_width(own.sources[source]) if source in own.sources else "" for source in shown]
        lines.append([title, f"{own.value:.{digits}f}", *map(_width, widths), *cells])
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
        lines.append(f"computed more tightly the mean changes by {gap:+.1e} {found.unit}, one by up to {largest:.1e}")
    if f"{quantity}_exact_gap" in numbers:
        gap, error = numbers[f"{quantity}_exact_gap"], numbers.get(f"{quantity}_exact_gap_standard_error")
        spread = "" if error is None else f" ± {error:.1e}"
        lines.append(f"exact divergences of {said['checked_exactly']}: {gap:+.1e}{spread} {found.unit}")
    if "invertibility_error" in numbers:
        largest, median = numbers["invertibility_error"], numbers["invertibility_error_median"]
        lines.append(f"there and back again: off by up to {largest:.1e} deviations of a feature, median {median:.1e}")
    if "nfe" in numbers:
        lines.append(f"{numbers['nfe']:.0f} evaluations of the field for a batch, {numbers['nfe_most']:.0f} at most")
    if "mass" in numbers:
        points, resolution, outside = (numbers[f"mass_{key}"] for key in ("points", "resolution", "outside"))
        lines.append(
            f"total mass {numbers['mass']:.5f} on a grid of {points:.0f} points an axis, {resolution:.0e} off with "
            f"half of them; {100 * outside:.2g} % of samples lie outside{said['given']}"
        )
    return lines


def warnings(found: Findings, digits: int, converge: bool = False) -> list[str]:
    """Return what a reader must not overlook.

    Args:
        found: What was found.
        digits: Decimals of a number.
        converge: Whether the computation was to come below the last of them.
    """
    lines, digit, settings = list(found.problems), 10.0**-digits, found.settings
    lost = (~found.per_row.isfinite()).any(dim=0).nonzero().flatten().tolist()
    if lost:
        lines.append(
            f"Expected finite numbers of all rows, got others of {len(lost)}: numbers "
            f"{', '.join(map(str, lost[:10]))}, from 0. Look at these rows, or type precision=float64."
        )
    computation = found.main.computation
    if converge and computation is not None and computation > digit:
        lines.append(
            f"Expected converge=true to bring the computation's part of {found.quantity} below {digit:g}, got "
            f"{_width(computation)} with {settings.described()}. Type digits={max(0, digits - 1)}."
        )
    wide: dict[tuple[str, str], list[str]] = {}
    widest: dict[tuple[str, str], float] = {}
    for name, own in found.budgets.items():
        if own.half_width is not None and own.half_width > digit:
            kind = (largest_source(own), own.unit)
            wide.setdefault(kind, []).append(f"{name} {own.value:.{digits}f} ± {_width(own.half_width)}")
            widest[kind] = max(widest.get(kind, 0.0), own.half_width)
        for source, width in own.sources.items():
            if width is None:
                lines.append(f"The error of {name} from {source} is not known. {UNKNOWN[source]}.")
    for (source, unit), told in wide.items():
        lines.append(
            f"Expected errors within the last digit printed, {digit:g} {unit}, got {'; '.join(told)}, most of it from "
            f"{source}. {_remedy(source, settings, digits, widest[source, unit], converge)}."
        )
    gap, error = (found.numbers.get(f"{found.quantity}_exact_gap{key}") for key in ("", "_standard_error"))
    rows = found.counts.get("checked_exactly", 0)
    if gap is not None and error is not None and abs(gap) > student.ppf(0.5 + SURE / 2, rows - 1) * error > 0:
        lines.append(f"Expected exact divergences to agree with probes, got a change of {gap:+.1e}. Trust neither.")
    if "mass" in found.numbers:
        mass, resolution, outside = (found.numbers[key] for key in ("mass", "mass_resolution", "mass_outside"))
        if not abs(mass - 1) <= 0.02 + resolution + outside:
            lines.append(
                f"Expected a total mass of 1, got {mass:.4f}: the density has parts that its samples do not reach, or "
                "is none. Look at plots/, and type atol=1e-9 rtol=1e-9 for both."
            )
    return lines


def _remedy(source: str, settings: Settings, digits: int, width: float, converge: bool) -> str:
    """Return what makes a source smaller."""
    if source == "rows":
        fewer = max(0, math.floor(-math.log10(width))) if math.isfinite(width) else 0
        return "Quote it with its error" + (f", or print fewer digits: digits={fewer}" if fewer < digits else "")
    finer = f"atol={max(settings.atol / 100, FINEST):.0e} rtol={max(settings.rtol / 100, FINEST):.0e}"
    by_hand = {
        "probes": "divergence=exact",
        "draws": f"draws={4 * settings.draws}, or iwae_draws, of that bound",
        "solver": finer if settings.precision == "float64" else f"precision=float64 {finer}",
    }[source]
    return f"Type {by_hand}" if converge else f"Type converge=true, or {by_hand}"


def _how(context: dict[str, Any]) -> str:
    solver = context["solver"]
    if solver is None:
        return f"closed form, {context['precision']}"
    divergence = "exact divergence" if context["trace"] == "exact" else f"divergence by {context['trace']}"
    tolerances = f"{solver['method']}, atol {solver['atol']:g}, rtol {solver['rtol']:g}"
    return f"{divergence}, {tolerances}, {context['precision']}"


def _width(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "unknown"
    if value == 0:
        return "0"
    value = float(f"{value:.1e}")  # two digits, and no third by rounding up
    return f"{value:.1e}" if value < 1e-4 else f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
