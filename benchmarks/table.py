"""Write the tables of results/bench_*.json into the READMEs: ``python benchmarks/table.py [--check]``.

Between the markers of README.md stands one row per figure, in benchmarks/README.md every contender.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BENCH, GRADIENTS = "bench", "gradients"  # what markers <!-- name:begin --> and <!-- name:end --> enclose
Report = dict[str, Any]


def short(reports: Sequence[Report]) -> str:
    """Return one table per report, with a row per figure."""
    tables = []
    for report in reports:
        rows = [row for figure in measured(report) if (row := short_row(figure))]
        head = ["| what | against | cnf_lab | gain |", "|---|---|---|---|"]
        tables.append("\n".join([caption(report), "", *head, *rows]))
    return "\n\n".join(tables)


def full(reports: Sequence[Report]) -> str:
    """Return one table per figure, with a row per contender."""
    parts = []
    for report in reports:
        parts.append(caption(report))
        for name, figure in report["figures"].items():
            if "skipped" in figure:
                parts.append(f"**{name}**: skipped, not installed: {figure['skipped']}.")
                continue
            ratio = figure["ratio"] if figure["reference"] else "–"
            head = f"| contender | evaluations | median | quartiles | peak memory | {ratio} |"
            rows = [full_row(contender) for contender in figure["contenders"]]
            note = f" {figure['note']}" if figure["note"] else ""
            title = f"**{name}**: {what(figure)}; {figure['case']['what']}.{note}"
            parts += [title, "\n".join([head, "|---|---|---|---|---|---|", *rows])]
    return "\n\n".join(parts)


def gradients(reports: Sequence[Report]) -> str:
    """Return time and memory of each gradient against the evaluations, from the figure of that name."""
    tables = []
    for report in reports:
        figure = report["figures"].get("gradients", {})
        kinds: dict[str, dict[str, str]] = {}
        for contender in figure.get("contenders", ()):
            kind, count = contender["name"].split(", ")
            cell = f"{seconds(contender['median_seconds'])}, {contender['peak_mib']:.3g} MiB"
            kinds.setdefault(count, {})[kind] = cell
        if kinds:
            names = list(next(iter(kinds.values())))
            rows = [f"| {count} | {' | '.join(cells[name] for name in names)} |" for count, cells in kinds.items()]
            head = [f"| forward | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (len(names) + 1) + "|"]
            tables.append("\n".join([f"{what(figure)}; {caption(report)}", "", *head, *rows]))
    return "\n\n".join(tables)


def caption(report: Report) -> str:
    """Return a line with the machine and the command of a report."""
    context = report["context"]
    machine = context["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['flags'])})"
    behind = f"torch {context['versions']['torch']}, commit {context['commit']}, {context['date'][:10]}"
    return f"{where}; {behind}; `{context['command']}`:"


def measured(report: Report) -> list[Report]:
    """Return the figures that were not skipped."""
    return [figure for figure in report["figures"].values() if "skipped" not in figure]


def what(figure: Report) -> str:
    """Return shape and title of a figure."""
    case = figure["case"]
    sizes = "-".join(map(str, case["hidden"]))
    shape = "×".join(map(str, case["event_shape"]))
    return f"{case['name']} ({shape}, {sizes}, {case['rows']} rows), {figure['title']}"


def short_row(figure: Report) -> str | None:
    """Return the row of a figure that has a headline with numbers."""
    found = {contender["name"]: contender for contender in figure["contenders"]}
    pair = [found.get(figure[key], {}) for key in ("reference", "headline")]
    if not all("median_seconds" in contender for contender in pair):
        return None
    cells = [f"{contender['name']}: {amount(contender, figure['quantity'])}" for contender in pair]
    gain = number(pair[1]["ratio"])
    return f"| {what(figure)} | {' | '.join(cells)} | {f'overhead {gain}' if figure['ratio'] == 'overhead' else gain} |"


def amount(contender: Report, quantity: str) -> str:
    """Return time with evaluations, or memory."""
    if quantity == "peak_mib":
        return f"{contender['peak_mib']:.3g} MiB"
    return f"{seconds(contender['median_seconds'])} ({evaluations(contender)})"


def full_row(contender: Report) -> str:
    """Return the row of a contender."""
    if "median_seconds" not in contender:
        error = contender.get("error", "not measured").replace("|", "\\|")
        return f"| {contender['name']} | – | {error} | – | – | – |"
    low, high = seconds(contender["lower_quartile_seconds"]), seconds(contender["upper_quartile_seconds"])
    ratio = number(contender["ratio"]) if "ratio" in contender else "–"
    memory = f"{contender['peak_mib']:.3g} MiB"
    median = seconds(contender["median_seconds"])
    return f"| {contender['name']} | {evaluations(contender)} | {median} | {low} – {high} | {memory} | {ratio} |"


def evaluations(contender: Report) -> str:
    """Return the evaluations forward and backward."""
    return f"{contender['nfe_forward']} + {contender['nfe_backward']}"


def seconds(value: float) -> str:
    """Return a time with three digits."""
    return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"


def number(ratio: float) -> str:
    """Return a ratio with as many digits as mean something."""
    return f"{ratio:.0f}×" if ratio >= 100 else f"{ratio:.3g}×" if ratio >= 10 else f"{ratio:.2f}×"


def filled(text: str, table: str, name: str) -> str:
    """Return a text with the table between the markers of a name.

    Raises:
        ValueError: If the markers are not there.
    """
    opening, closing = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end:
        raise ValueError(f"Expected the markers {opening} and {closing}, got none. Add them where the table goes.")
    return before + opening + "\n\n" + (table + "\n\n" if table else "") + closing + after


def main(arguments: Sequence[str], root: Path = Path(__file__).parents[1]) -> int:
    """Write the tables, or say which file is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where a table is stale, and write nothing")
    check = parser.parse_args(arguments).check
    reports = [json.loads(path.read_text()) for path in sorted((root / "results").glob("bench_*.json"))]
    Tables = dict[str, Callable[[Sequence[Report]], str]]
    targets: dict[str, Tables] = {
        "README.md": {BENCH: short, GRADIENTS: gradients},
        "benchmarks/README.md": {BENCH: full},
    }
    stale = False
    for name, tables in targets.items():
        path = root / name
        text = path.read_text()
        try:
            for marker, table in tables.items():
                text = filled(text, table(reports), marker)
        except ValueError as failure:
            print(f"{name}: {failure}", file=sys.stderr)
            return 1
        if text == path.read_text():
            continue
        if check:
            print(
                f"Expected {name} to hold the numbers of results/bench_*.json, got others. "
                "Type python benchmarks/table.py.",
                file=sys.stderr,
            )
            stale = True
        else:
            path.write_text(text)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
