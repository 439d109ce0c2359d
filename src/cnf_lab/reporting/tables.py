"""The table of runs as rows, as Markdown and as CSV."""

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from cnf_lab.reporting.collect import Run

STATES = ("done", "failed", "unfinished", "damaged")


def table_row(run: Run, choices: str) -> dict[str, Any]:
    """Return the cells of a run.

    Args:
        run: The run.
        choices: What not all runs have.
    """
    return {
        "run": run.name,
        "status": run.status,
        "data": run.data,
        "family": run.family,
        "choices": choices,
        "quantity": run.quantity,
        "unit": run.unit,
        "test": run.value("test"),
        "test_standard_error": run.value("test", "_standard_error"),
        "val": run.value("val") if run.value("val") is not None else run.first(f"val/{run.quantity}"),
        "val_standard_error": run.value("val", "_standard_error"),
        "steps": run.steps,
        "seconds": run.seconds,
        "nfe": run.first("test/nfe", "val/nfe"),
        "nfe_training": run.first("nfe/forward"),
        "nfe_backward": run.first("nfe/backward"),
        "parameters": run.parameters,
    }


def details(run: Run) -> dict[str, str]:
    """Return what a number depends on, in words."""
    versions, solver = run.context.get("versions"), run.context.get("solver")
    seed = run.context.get("seed", run.option("seed"))
    found = {
        "seed": seed,
        "solver of the numbers": _words(solver),
        "trace of the numbers": _words(run.context.get("trace")),
        "training": _words(run.context.get("training")),
        "machine": run.context.get("machine"),
        "python": run.context.get("python"),
        "versions": _words(versions),
        "git commit": run.context.get("git"),
        "notes": "; ".join(run.notes),
        "last written": when(run.written),
        "folder": str(run.path),
    }
    return {name: str(value)[:1000] for name, value in found.items() if value not in (None, "")}


def when(seconds: float) -> str:
    """Return a time in words, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if seconds else "unknown"


def to_csv(rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> str:
    """Return all runs as CSV, numbers in full.

    Args:
        rows: Cells by :func:`table_row`.
        runs: The runs.
    """
    file = io.StringIO()
    extra = ("reason", "seed", "solver", "machine", "git", "written", "command", "folder")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*table_row(Run(runs[0].path, ""), ""), *extra])
    for row, run in zip(rows, runs, strict=True):
        context = run.context
        seed = context.get("seed", run.option("seed"))
        told = (run.reason, seed, _words(context.get("solver")), context.get("machine"), context.get("git"))
        writer.writerow(
            ["" if cell is None else cell for cell in (*row.values(), *told, when(run.written), run.command, run.path)]
        )
    return file.getvalue()


def to_markdown(
    title: str, rows: Sequence[dict[str, Any]], runs: Sequence[Run], tables: Sequence[dict[str, Any]]
) -> str:
    """Return the runs, those that did not end well, published numbers and commands as Markdown.

    Args:
        title: Title of the report.
        rows: Cells by :func:`table_row`.
        runs: The runs.
        tables: Published numbers beside ours.
    """
    counts = ", ".join(f"{sum(run.status == state for run in runs)} {state}" for state in STATES)
    lines = [f"# {_cell(title)}", "", f"{len(runs)} runs: {counts}.", ""]
    head = (
        "run",
        "status",
        "data",
        "family",
        "choices",
        "test",
        "val",
        "unit",
        "steps",
        "seconds",
        "NFE",
        "parameters",
    )
    lines += _markdown_table(head, [_markdown_row(row) for row in rows])
    ended = [(run.name, run.status, run.reason) for run in runs if run.reason]
    if ended:
        lines += ["", "## Not done", "", *_markdown_table(("run", "status", "reason"), ended)]
    for table in tables:
        entry = table["entry"]
        lines += ["", f"## {entry['data']}, {entry['quantity']} in {entry['unit']}: published and ours", ""]
        both = [(row.name, spread(row.value, row.error), row.told, "") for row in table["ranked"]]
        both += [(row.name, spread(row.value, row.error), row.told, "; ".join(row.reasons)) for row in table["apart"]]
        lines += _markdown_table(("model", "value", "source", "not comparable"), both)
    lines += ["", "## Commands", "", *_markdown_table(("run", "command"), [(run.name, run.command) for run in runs])]
    return "\n".join(lines) + "\n"


def _markdown_row(row: dict[str, Any]) -> tuple[str, ...]:
    tested = spread(row["test"], row["test_standard_error"])
    validated = spread(row["val"], row["val_standard_error"])
    numbers = [short(row[name]) for name in ("steps", "seconds", "nfe", "parameters")]
    return (
        row["run"],
        row["status"],
        row["data"],
        row["family"],
        row["choices"],
        tested,
        validated,
        row["unit"],
        *numbers,
    )


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]


def _cell(text: str) -> str:
    # Names and messages are anybody's: no tags, no links, no breaks of the table.
    plain = " ".join(str(text).split()).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for sign in "|`[]*_":
        plain = plain.replace(sign, "\\" + sign)
    return plain


def spread(value: float | None, error: float | None) -> str:
    """Return a number with its error, or nothing."""
    if value is None:
        return ""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def short(value: float | int | None) -> str:
    """Return a count or a time in a form that is read at once."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{str(key).strip('_')} {_words(item)}" for key, item in value.items() if item is not None)
    return "" if value is None else str(value)
