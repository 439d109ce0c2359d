"""Runs as their folders tell them; a file that cannot be read is named, and the rest is shown."""

import csv
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

#: Any of them makes a folder that of a run.
MARKS = ("metrics.json", "FAILED", "config_resolved.yaml", "metrics.csv", ".hydra/overrides.yaml")
#: Folders inside a run, and others that hold none.
SKIPPED = {"checkpoints", "plots", "wandb", "evaluation", "samples", ".hydra", ".git", "__pycache__"}
LONGEST = 2_000_000  # bytes of a file of text that is still read
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Series = dict[str, list[tuple[float, float]]]


@dataclass
class Run:
    """One run folder.

    Attributes:
        path: The folder.
        name: The folder as seen from the one that was given.
        status: done, failed, unfinished or damaged.
        reason: Why it failed, or when it was last written.
        problems: Files that could not be read.
        metrics: Numbers of metrics.json by name.
        context: What metrics.json says of them.
        config: The configuration; resolved, where the run came so far.
        config_text: The same as written.
        overrides: What was typed.
        evaluation: What evaluations found, by the name of what was evaluated.
        series: Steps done and values by column of metrics.csv.
        parameters: Number of parameters, if the log tells.
        written: When a file of it was last written, in seconds since 1970.
    """

    path: Path
    name: str
    status: str = "unfinished"
    reason: str = ""
    problems: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    overrides: list[str] = field(default_factory=list)
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    series: Series = field(default_factory=dict)
    parameters: int | None = None
    written: float = 0.0

    def option(self, *keys: str) -> Any:
        """Return a value of the configuration, or None."""
        node: Any = self.config
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    @property
    def data(self) -> str:
        """Name of the data set."""
        described = self.context.get("data")
        name = described.get("name") if isinstance(described, dict) else None
        return str(name or self.option("dataset", "name") or "?")

    @property
    def notes(self) -> list[str]:
        """What every number of the run must say."""
        described = self.context.get("data")
        notes = described.get("notes") if isinstance(described, dict) else None
        return [str(note) for note in notes] if isinstance(notes, list) else []

    @property
    def family(self) -> str:
        """Model family."""
        return str(self.option("model", "name") or "?")

    @property
    def quantity(self) -> str:
        """The watched likelihood without its split: nll, bits_per_dim or negative_elbo."""
        return str(self.option("model", "monitor") or "val/nll").rpartition("/")[2]

    @property
    def unit(self) -> str:
        """Unit of the watched likelihood."""
        return "bits/dim" if self.quantity == "bits_per_dim" else "nats"

    @property
    def command(self) -> str:
        """The command that made the run, as far as it is known."""
        said = self.context.get("command")
        return str(said) if said else f"python -m cnf_lab.train {shlex.join(self.overrides)}".strip()

    def value(self, split: str, quantity: str = "") -> float | None:
        """Return a likelihood of a split, or None; an error of it under its suffix."""
        return self.metrics.get(f"{split}/{self.quantity}{quantity}")

    def first(self, *names: str) -> float | None:
        """Return the first metric that there is, from the last row of the table where there is no other."""
        for name in names:
            if name in self.metrics:
                return self.metrics[name]
            if name in self.series:
                return self.series[name][-1][1]
        return None

    @property
    def steps(self) -> float | None:
        """Optimiser steps."""
        logged = [points[-1][0] for name, points in self.series.items() if not name.startswith("test/")]
        return self.metrics.get("train/steps", max(logged) if logged else None)

    @property
    def seconds(self) -> float | None:
        """Wall-clock seconds of training, validation included."""
        return self.first("time/fit_seconds", "time/elapsed_seconds")


def find_runs(roots: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return run folders below some folders, each once, and what could not be looked into.

    Links to folders are followed after all real folders, and no folder is entered twice: a loop ends.

    Args:
        roots: Folders to look in.
    """
    found: list[Path] = []
    problems: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting, links = list(reversed(roots)), list[Path]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        if any((folder / mark).is_file() for mark in MARKS):
            found.append(folder)
        for entry in entries:
            if entry.name not in SKIPPED and _is_folder(entry):
                (links if entry.is_symlink() else waiting).append(Path(entry.path))
    return found, problems


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def read_run(path: Path, name: str) -> Run:
    """Read a run folder.

    Args:
        path: The folder.
        name: What the report calls it.
    """
    run = Run(path, name)
    metrics = _object(run, "metrics.json", json.loads)
    context = metrics.pop("context", {})
    run.context = context if isinstance(context, dict) else {}
    run.metrics = {key: float(value) for key, value in metrics.items() if is_number(value)}
    for file in ("config_resolved.yaml", ".hydra/config.yaml"):
        if not run.config_text and (path / file).is_file():
            run.config_text = _text(run, file)
            run.config = _object(run, file, lambda text: yaml.load(text, Loader))
    overrides = _parsed(run, ".hydra/overrides.yaml", lambda text: yaml.load(text, Loader))
    run.overrides = [str(item) for item in overrides] if isinstance(overrides, list) else []
    evaluated = _object(run, "evaluation.json", json.loads)
    run.evaluation = {name: found for name, found in evaluated.items() if isinstance(found, dict)}
    run.series = read_series(run)
    logged = re.search(r"model \S+ with ([\d,]+) parameters", _text(run, "train.log", tail=False))
    run.parameters = int(logged.group(1).replace(",", "")) if logged else None
    run.written = max((_time(path / file) for file in (*MARKS, "train.log", "checkpoints/last.ckpt")), default=0.0)
    _judge(run)
    return run


def _judge(run: Run) -> None:
    failure = run.path / "FAILED"
    if failure.is_file():
        run.status = "failed"
        run.reason = " ".join(_text(run, "FAILED").split())[:600] or "FAILED is empty"
    elif run.metrics:
        run.status = "done"
    elif (run.path / "metrics.json").is_file():
        run.status, run.reason = "damaged", "metrics.json holds no numbers"
    else:
        run.reason = "neither metrics.json nor FAILED: killed, or still running"
    if run.problems and run.status != "failed":
        run.status = "damaged" if run.status != "done" else "done"
        run.reason = "; ".join([run.reason, *run.problems]).strip("; ")[:600]


def read_series(run: Run) -> Series:
    """Return the columns of metrics.csv; a line that a kill cut off ends them.

    Args:
        run: The run, which learns of what could not be read.
    """
    columns: dict[str, dict[float, float]] = {}
    path = run.path / "metrics.csv"
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(line.replace("\0", "") for line in file):
                _take(row, columns)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, csv.Error) as error:
        run.problems.append(f"metrics.csv: {' '.join(str(error).split())[:120]}")
    return {name: sorted(values.items()) for name, values in columns.items()}


def _take(row: dict[Any, Any], columns: dict[str, dict[float, float]]) -> None:
    if not row.get("step"):
        return
    done = float(int(row["step"]) + 1)  # Lightning numbers the rows by the last step, from 0
    for name, text in row.items():
        if name not in (None, "step", "epoch") and text:
            value = float(text)
            if math.isfinite(value):
                columns.setdefault(name, {})[done] = value


def is_number(value: Any) -> bool:
    """Say whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(run: Run, file: str, tail: bool = True) -> str:
    path = run.path / file
    try:
        if tail and path.stat().st_size > LONGEST:
            run.problems.append(f"{file}: larger than {LONGEST:,} bytes")
            return ""
        with path.open(encoding="utf-8", errors="replace") as opened:
            return opened.read(LONGEST)
    except FileNotFoundError:
        return ""
    except OSError as error:
        run.problems.append(f"{file}: {error.strerror or error}")
        return ""


def _parsed(run: Run, file: str, parse: Callable[[str], Any]) -> Any:
    text = _text(run, file)
    if not text and not (run.path / file).is_file():
        return None
    try:
        return parse(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        run.problems.append(f"{file} cannot be read: {' '.join(str(error).split())[:120]}")
        return None


def _object(run: Run, file: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    found = _parsed(run, file, parse)
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def collect(roots: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read all runs below some folders.

    Args:
        roots: Folders to look in.

    Returns:
        The runs, and what could not be looked into.
    """
    paths, problems = find_runs(roots)
    return [read_run(path, name) for path, name in _named(paths, roots)], problems


def _named(paths: Sequence[Path], roots: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    for path in sorted(paths, key=lambda path: [_natural(part) for part in path.parts]):
        base = next((root for root in roots if path.is_relative_to(root)), path)
        inside = path.relative_to(base).as_posix()
        name = path.name or str(path) if inside == "." else inside
        yield path, name if len(roots) == 1 or inside == "." else f"{base.name}/{inside}"


def _natural(text: str) -> list[tuple[int, str]]:
    # Job 2 before job 10.
    return [(int(part), "") if part.isdigit() and part.isascii() else (-1, part) for part in re.split(r"(\d+)", text)]


def differing(runs: Sequence[Run]) -> list[str]:
    """Return for every run the choices in which it differs from its neighbours in a sweep; alone, all that were typed.

    Args:
        runs: The runs.
    """
    hidden = ("dataset=", "logger", "paths.", "threads=", "resume=")
    together: dict[Path, list[set[str]]] = {}
    for run in runs:
        together.setdefault(run.path.parent, []).append(set(run.overrides))
    common = {folder: set.intersection(*own) if len(own) > 1 else set() for folder, own in together.items()}
    own = [[item for item in run.overrides if item not in common[run.path.parent]] for run in runs]
    return [" ".join(item for item in items if not item.startswith(hidden)) for items in own]
