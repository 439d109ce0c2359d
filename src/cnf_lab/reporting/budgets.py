"""Errors of likelihoods, and sample metrics, of runs: out of their evaluations, else out of metrics.json."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cnf_lab.reporting.collect import Run, is_number

SOURCES = ("rows", "probes", "dequantisation", "draws", "solver")
#: Suffixes of standard errors, by source.
SUFFIXES = {"rows": "", "probes": "_trace", "dequantisation": "_dequantisation", "draws": "_draws"}
NORMAL = 1.96  # standard errors of a 95 % interval


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
        sources: Half-width by source.
        whole: Whether it comes from an evaluation that has solved again at a tighter tolerance.
    """

    run: int
    name: str
    quantity: str
    value: float
    unit: str
    half_width: float | None
    confidence: float
    sources: dict[str, float]
    whole: bool


def budgets(number: int, run: Run) -> list[Budget]:
    """Return the budgets of a run's evaluations; that of metrics.json where it was not evaluated.

    Args:
        number: Number of the run.
        run: The run.
    """
    found = [_evaluated(number, run, name, numbers) for name, numbers in run.evaluation.items()]
    return [budget for budget in found if budget is not None] or list(_standard_errors(number, run))


def _evaluated(number: int, run: Run, name: str, numbers: dict[str, Any]) -> Budget | None:
    quantity = run.quantity
    if not is_number(numbers.get(quantity)):
        return None
    sources = _half_widths(numbers, quantity)
    if is_number(numbers.get(f"{quantity}_solver_gap")):
        sources["solver"] = abs(numbers[f"{quantity}_solver_gap"])
    # The spread of rows holds that of their probes and draws; an error of the solver is no chance, and adds.
    half = sources["rows"] + sources.get("solver", 0.0) if "rows" in sources else None
    return Budget(number, name, quantity, float(numbers[quantity]), run.unit, half, 0.95, sources, "solver" in sources)


def _half_widths(numbers: Mapping[str, Any], quantity: str) -> dict[str, float]:
    names = {source: f"{quantity}{suffix}_standard_error" for source, suffix in SUFFIXES.items()}
    return {source: NORMAL * abs(numbers[name]) for source, name in names.items() if is_number(numbers.get(name))}


def _standard_errors(number: int, run: Run) -> Iterator[Budget]:
    for split in ("test", "val"):
        value = run.value(split)
        sources = _half_widths(run.metrics, f"{split}/{run.quantity}")
        if value is not None and sources:
            yield Budget(number, split, run.quantity, value, run.unit, None, 0.95, sources, False)
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
    return max((width for row in rows for width in (*row.sources.values(), row.half_width or 0.0)), default=0.0) or 1.0


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
