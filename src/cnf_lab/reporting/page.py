"""The page: one HTML file that needs nothing else and asks no network."""

import base64
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnf_lab.reporting.budgets import CONFIDENCE, SOURCES, budgets, grouped, sample_rows
from cnf_lab.reporting.collect import Run, differing
from cnf_lab.reporting.curves import curve_data, points_each
from cnf_lab.reporting.pictures import choose
from cnf_lab.reporting.published import beside
from cnf_lab.reporting.tables import STATES, details, short, spread, table_row, to_csv, to_markdown, when

ASSETS = Path(__file__).parent / "assets"
LONGEST = 60_000  # characters of a configuration on the page


@dataclass(frozen=True)
class Limits:
    """What keeps a page small.

    Attributes:
        pictures: Most pictures of a run.
        runs: Most runs on the page; the newest are kept.
        megabytes: Most millions of bytes of the page.
    """

    pictures: int = 3
    runs: int = 1000
    megabytes: float = 4.8


def write_report(
    runs: Sequence[Run], problems: Sequence[str], folder: Path, title: str, limits: Limits, now: float
) -> Path:
    """Write report.html, report.md and report.csv, and return the page.

    Args:
        runs: The runs.
        problems: What could not be looked into.
        folder: Where to write.
        title: Title of the report.
        limits: What keeps the page small; Markdown and CSV have all runs.
        now: Seconds since 1970.
    """
    choices = [choice[:400] for choice in differing(runs)]
    rows = [table_row(run, choice) for run, choice in zip(runs, choices, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.csv").write_text(to_csv(rows, runs), encoding="utf-8", newline="")
    names = [run.name for run in runs]
    (folder / "report.md").write_text(to_markdown(title, rows, runs, beside(list(runs), names)), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(render(runs, choices, problems, title, limits, now), encoding="utf-8")
    return page


def render(
    runs: Sequence[Run], choices: Sequence[str], problems: Sequence[str], title: str, limits: Limits, now: float
) -> str:
    """Return the page, with fewer runs where all of them would not fit.

    Args:
        runs: The runs.
        choices: What not all runs have, by run.
        problems: What could not be looked into.
        title: Title of the report.
        limits: What keeps the page small.
        now: Seconds since 1970.
    """
    newest = sorted(range(len(runs)), key=lambda number: -runs[number].written)
    shown = min(len(runs), limits.runs)
    most = int(limits.megabytes * 1e6)
    while True:
        kept = sorted(newest[:shown])
        some, told = [runs[number] for number in kept], [choices[number] for number in kept]
        page = _Page(some, told, problems, title, len(runs), now)
        bare = page.html([], 0, limits)
        room = most - len(bare.encode()) - 20_000
        if room > 0 or shown <= 1:
            pictures, left_out = choose(some, limits.pictures, max(room, 0))
            return page.html(pictures, left_out, limits)
        shown //= 2


@dataclass
class _Page:
    runs: Sequence[Run]
    choices: Sequence[str]
    problems: Sequence[str]
    title: str
    total: int
    now: float

    def html(self, pictures: Sequence[Any], left_out: int, limits: Limits) -> str:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            loader=FileSystemLoader(ASSETS),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"short": short, "spread": spread, "significant": _significant}
        runs, labels = self.runs, [run.name.rpartition("/")[2] for run in self.runs]
        found = [budget for number, run in enumerate(runs) for budget in budgets(number, run)]
        gallery: dict[int, list[Any]] = {}
        for picture in pictures:
            gallery.setdefault(picture.run, []).append(picture)
        most = points_each(len(runs))
        return environment.get_template("report.html").render(
            title=self.title,
            made=when(self.now),
            runs=runs,
            rows=[table_row(run, choice) for run, choice in zip(runs, self.choices, strict=True)],
            labels=labels,
            counts={state: sum(run.status == state for run in runs) for state in STATES},
            total=self.total,
            problems=[problem[:400] for problem in self.problems[:50]],
            ages=[_age(self.now - run.written) if run.written else "unknown" for run in runs],
            whens=[when(run.written) for run in runs],
            details=[details(run) for run in runs],
            curves=curve_data(
                runs,
                [_label(run, choice, label) for run, choice, label in zip(runs, self.choices, labels, strict=True)],
                most,
            ),
            points=most,
            gallery=gallery,
            left_out=left_out,
            limits=limits,
            budgets=grouped(found, runs),
            sources=SOURCES,
            confidence=CONFIDENCE,
            samples=[row for number, run in enumerate(runs) for row in sample_rows(number, run)],
            published=beside(list(runs), labels),
            configurations=packed([run.config_text[:LONGEST] for run in runs]),
            style=(ASSETS / "report.css").read_text("utf-8"),
            script=(ASSETS / "report.js").read_text("utf-8"),
        )


def packed(texts: Sequence[str]) -> str:
    """Return texts as base64 of gzip: configurations of a sweep are nearly the same."""
    distinct = list(Counter(texts))
    places = {text: number for number, text in enumerate(distinct)}
    content = json.dumps({"texts": distinct, "of": [places[text] for text in texts]})
    return base64.b64encode(gzip.compress(content.encode(), mtime=0)).decode()


def _label(run: Run, choice: str, label: str) -> str:
    return f"{choice[:80]}" if choice else label


def _age(seconds: float) -> str:
    for size, word in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {word}"
    return f"{max(seconds, 0):.0f} seconds"


def _significant(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, int | float) and not isinstance(value, bool)
        else "–"
        if value is None
        else str(value)
    )
