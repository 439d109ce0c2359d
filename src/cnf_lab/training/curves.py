"""The learning curves of a run, from its table of metrics."""

import csv
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnf_lab.training import panels
from cnf_lab.training.panels import DATA, FLOW, PALE

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure


def curves(metrics_csv_path: str | Path, metric: str = "nll", unit: str = "nats") -> "matplotlib.figure.Figure":
    """Draw a metric of training and validation against steps and time, and the NFE against steps.

    A vertical line marks where one stage of the objective hands over to the next; without solves
    in training there is no panel of their evaluations.

    Args:
        metrics_csv_path: Table of a run's metrics, one row per time of logging.
        metric: Name of the metric after the slash.
        unit: Unit of the metric.
    """
    series = read_series(Path(metrics_csv_path))
    nothing = (np.empty(0), np.empty(0))
    solved = "nfe/forward" in series
    figure = panels.new_figure(11.0 if solved else 7.5, 3.2)
    by_step, by_time, *cost = figure.subplots(1, 3 if solved else 2)
    clock = _clock(*series.get("time/step_seconds", nothing))
    for stage, label, colour in (("train", "training", PALE), ("val", "validation", FLOW)):
        steps, values = series.get(f"{stage}/{metric}", nothing)
        _curve(by_step, steps, values, colour, label)
        _curve(by_time, np.interp(steps, *clock), values, colour, label)
    for axes, (name, colour) in product(cost, (("forward", DATA), ("backward", FLOW))):
        _curve(axes, *series.get(f"nfe/{name}", nothing), colour, name)
    for step in _hand_overs(*series.get("train/stage", nothing)):
        for axes, position in ((by_step, step), (by_time, np.interp(step, *clock)), *((axes, step) for axes in cost)):
            axes.axvline(position, color=PALE, lw=0.8, ls=":")
    title = f"{metric.replace('_', ' ').replace('nll', 'NLL')} ({unit})"
    panels.dress(by_step, xlabel="training steps", ylabel=title)
    panels.dress(by_time, xlabel="time in training steps (s)", ylabel=title)
    for axes in cost:
        panels.dress(axes, xlabel="training steps", ylabel="NFE per training step")
    for axes in (by_step, by_time, *cost):
        axes.grid(color="#EEEEEE", lw=0.6)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _hand_overs(steps: np.ndarray, stages: np.ndarray) -> np.ndarray:
    """Return the last step before each change of the stage."""
    return steps[:-1][np.diff(stages) != 0]


def _curve(axes: "matplotlib.axes.Axes", x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    # A line through one point would show nothing.
    axes.plot(x, y, color=colour, label=label, marker="." if len(x) < 10 else None)


def read_series(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return steps done and values of every column; of a step that was logged twice, the later."""
    columns: dict[str, dict[int, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            # Lightning numbers the rows by the last step, from 0.
            done = int(row.pop("step")) + 1
            for name, value in row.items():
                if value:
                    columns.setdefault(name, {})[done] = float(value)
    return {name: _ordered(values) for name, values in columns.items()}


def _ordered(values: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    steps = sorted(values)
    return np.array(steps, dtype=float), np.array([values[step] for step in steps])


def _clock(steps: np.ndarray, step_seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and the seconds of training until then, from the means of the epochs."""
    seconds = np.cumsum(np.diff(steps, prepend=0) * step_seconds)
    return np.append(0, steps), np.append(0, seconds)
