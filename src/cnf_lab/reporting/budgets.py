"""Errors of likelihoods, and sample metrics, of runs: out of their evaluations, else out of metrics.json."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cnf_lab.reporting.collect import Run, is_number

SOURCES = ("rows", "probes", "draws", "solver")
#: Suffixes of standard errors in metrics.json, by source.
SUFFIXES = {"rows": "", "probes": "_trace", "draws": "_dequantisation"}
CONFIDENCE, NORMAL = 0.99, 2.576  # of an interval of that many standard errors


@dataclass(frozen=True)
class Budget:
    """A number with its errors.

    Attributes:
        run: Number of the run.
        name: What was evaluated: test, val, or rows.
        quantity: Which likelihood.
        value: The number.
        unit: Its unit.
        half_width: Of the interval; None where only single errors are known.
        confidence: Of the interval.
        sources: Half-width by source; None where there is an error that is not known.
        whole: Whether it comes from an evaluation, and not from the run's own test.
    """

    run: int
    name: str
    quantity: str
    value: float
    unit: str
    half_width: float | None
    confidence: float
    sources: dict[str, float | None]
    whole: bool


def budgets(number: int, run: Run) -> list[Budget]:
    """Return the budgets of a run's evaluations; that of metrics.json where it was not evaluated.

    Args:
        number: Number of the run.
        run: The run.
    """
    found = [budget for name, numbers in run.evaluation.items() for budget in _evaluated(number, name, numbers)]
    return found or list(_standard_errors(number, run))


def _evaluated(number: int, name: str, numbers: dict[str, Any]) -> Iterator[Budget]:
    written = numbers.get("budget")
    for quantity, own in written.items() if isinstance(written, dict) else ():
        if not isinstance(own, dict) or not all(is_number(own.get(key)) for key in ("value", "confidence")):
            continue
        sources = own.get("sources")
        known = sources.items() if isinstance(sources, dict) else ()
        widths = {str(source): float(width) if is_number(width) else None for source, width in known}
        half = float(own["half_width"]) if is_number(own.get("half_width")) else None
        value, confidence = float(own["value"]), float(own["confidence"])
        yield Budget(number, name, str(quantity), value, str(own.get("unit")), half, confidence, widths, True)


def _standard_errors(number: int, run: Run) -> Iterator[Budget]:
    for split in ("test", "val"):
        value = run.value(split)
        names = {source: f"{split}/{run.quantity}{suffix}_standard_error" for source, suffix in SUFFIXES.items()}
        found = {source: run.metrics.get(name) for source, name in names.items()}
        widths: dict[str, float | None] = {
            source: NORMAL * abs(error) for source, error in found.items() if error is not None
        }
        if value is not None and widths:
            yield Budget(number, split, run.quantity, value, run.unit, None, CONFIDENCE, widths, False)
            return


def grouped(found: Sequence[Budget], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return budgets by data set and quantity, each with the longest bar of the group."""
    groups: dict[tuple[str, str, str], list[Budget]] = {}
    for budget in found:
        groups.setdefault((runs[budget.run].data, budget.quantity, budget.unit), []).append(budget)
    return [
        {"data": data, "quantity": quantity, "unit": unit, "rows": rows, "longest": _longest(rows)}
        for (data, quantity, unit), rows in sorted(groups.items())
    ]


def _longest(rows: Sequence[Budget]) -> float:
    return max((width or 0.0 for row in rows for width in (*row.sources.values(), row.half_width)), default=0.0) or 1.0


def sample_rows(number: int, run: Run) -> list[dict[str, Any]]:
    """Return the sample metrics of a run, each beside its oracle.

    Args:
        number: Number of the run.
        run: The run.
    """
    found = []
    for name, evaluated in run.evaluation.items():
        samples = evaluated.get("samples")
        for row in samples if isinstance(samples, list) else ():
            if isinstance(row, dict) and is_number(row.get("value")):
                found.append({**{str(key): value for key, value in row.items()}, "run": number, "of": name})
    return found
