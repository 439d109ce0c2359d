"""Published numbers, and whether a run's may stand beside them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cnf_lab.reporting.collect import Run


@dataclass(frozen=True)
class Row:
    """A number, ours or a published one.

    Attributes:
        name: Model, or run.
        value: In the unit of the table; lower is better.
        error: What stands behind ±: of published ones a deviation over runs, of ours the standard error.
        told: Its source, or what to know.
        run: Number of the run; None of a published one.
        reasons: Why a run of ours cannot be compared.
    """

    name: str
    value: float
    error: float | None
    told: str
    run: int | None = None
    reasons: tuple[str, ...] = ()


@cache
def published() -> dict[str, Any]:
    """Return the file of published numbers."""
    loaded: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text("utf-8"))
    return loaded


def protocol_of(run: Run) -> dict[str, Any] | None:
    """Return the entry of a run's data set and watched likelihood, or None where nothing was published."""
    for entry in published()["benchmarks"]:
        if entry["data"] == run.data and entry["watched"] == run.quantity:
            found: dict[str, Any] = entry
            return found
    return None


def reasons(run: Run, entry: dict[str, Any]) -> tuple[str, ...]:
    """Return why a run's number cannot stand beside published ones; nothing if it can.

    Args:
        run: The run.
        entry: The protocol of its data set.
    """
    found = list(run.notes)
    rows = run.context.get("data", {}).get("rows", {}) if isinstance(run.context.get("data"), dict) else {}
    tested = rows.get("test") if isinstance(rows, dict) else None
    if f"test/{entry['quantity']}" not in run.metrics:
        found.append("validation rows, not the test split")
    elif tested != entry["test_rows"]:
        found.append(f"{tested} test rows, published: {entry['test_rows']}")
    if run.status != "done":
        found.append(f"the run is {run.status}")
    noise = str(run.option("model", "dequantisation", "_target_") or "")
    if entry["watched"] == "bits_per_dim" and noise and "Uniform" not in noise and "uniform" not in noise:
        found.append("other dequantisation than one draw of uniform noise")
    for key, value in entry.get("model", {}).items():
        if run.option("model", key) not in (None, value):
            found.append(f"model.{key} is {run.option('model', key)}, published: {value}")
    return tuple(found)


def beside(runs: list[Run], labels: list[str]) -> list[dict[str, Any]]:
    """Return a table per published data set that some run is of: rows by value, then those not comparable.

    Args:
        runs: The runs.
        labels: What the report calls them.
    """
    tables: dict[int, dict[str, Any]] = {}
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        entry = protocol_of(run)
        if entry is None:
            continue
        split = "test" if f"test/{entry['quantity']}" in run.metrics else "val"
        name = f"{split}/{entry['quantity']}"
        if name not in run.metrics:
            continue
        table = tables.setdefault(id(entry), {"entry": entry, "ranked": _published(entry), "apart": []})
        why = reasons(run, entry)
        row = Row(label, run.metrics[name], run.metrics.get(f"{name}_standard_error"), "ours", number, why)
        table["apart" if why else "ranked"].append(row)
    for table in tables.values():
        table["ranked"].sort(key=lambda row: row.value)
        table["apart"].sort(key=lambda row: row.value)
    return list(tables.values())


def _published(entry: dict[str, Any]) -> list[Row]:
    sources = published()["sources"]
    rows = []
    for name, numbers in entry["models"].items():
        value, error, source, *note = numbers
        rows.append(Row(name, float(value), error, "; ".join([sources[source], *note])))
    return rows
