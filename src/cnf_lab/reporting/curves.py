"""Learning curves of runs as points to draw: against steps, seconds and evaluations of the vector field."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cnf_lab.reporting.collect import Run

POINTS = 40_000  # of all curves of a page together
MOST, LEAST = 300, 12  # of one curve


def points_each(runs: int) -> int:
    """Return how many points a curve of a page with so many runs may have."""
    return max(LEAST, min(MOST, POINTS // max(1, 4 * runs)))


def curves(run: Run, most: int = MOST) -> dict[str, list[list[float]]]:
    """Return curves by name, each a list of [steps, seconds, evaluations, value].

    Evaluations are those of training's solves, forward and backward; a step of flow matching, which
    does not solve, counts none.

    Args:
        run: The run.
        most: Points of a curve; longer ones are thinned, first and last point kept.
    """
    clock, count = _seconds(run), _evaluations(run)
    wanted = {
        "val": f"val/{run.quantity}",
        "train": f"train/{run.quantity}",
        "nfe": "nfe/forward",
        "nfe_val": "val/nfe",
    }
    found = {}
    for short, name in wanted.items():
        points = run.series.get(name, [])
        if points:
            steps, values = np.array(points, dtype=float).T
            columns = (steps, _at(steps, clock), _at(steps, count), values)
            table = np.stack(columns, axis=1)[_kept(len(steps), most)]
            found[short] = [[float(f"{value:.6g}") for value in row] for row in table]
    return found


def _kept(length: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int))


def _at(steps: np.ndarray, clock: Sequence[tuple[float, float]]) -> np.ndarray:
    if not clock:
        return np.zeros_like(steps)
    at, total = np.array([(0.0, 0.0), *clock]).T
    return np.interp(steps, at, total)


def _seconds(run: Run) -> list[tuple[float, float]]:
    elapsed = run.series.get("time/elapsed_seconds")
    return list(elapsed) if elapsed else _summed(run.series.get("time/step_seconds", []))


def _evaluations(run: Run) -> list[tuple[float, float]]:
    forward = run.series.get("nfe/forward", [])
    backward = dict(run.series.get("nfe/backward", []))
    both = dict((step, value + backward.get(step, 0.0)) for step, value in forward)
    # Epochs without solves count none: they are known by the time that they took.
    steps = sorted({step for step, _ in run.series.get("time/step_seconds", forward)} | set(both))
    return _summed([(step, both.get(step, 0.0)) for step in steps]) if both else []


def _summed(means: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    # From means per step of each epoch to totals.
    total, before, found = 0.0, 0.0, []
    for step, mean in means:
        total += (step - before) * mean
        before = step
        found.append((step, total))
    return found


def curve_data(runs: Sequence[Run], labels: Sequence[str], most: int) -> list[dict[str, Any]]:
    """Return what the page draws: a panel per data set and likelihood, that of most runs first.

    Args:
        runs: The runs of the page.
        labels: What tells each from the others.
        most: Points of a curve.
    """
    panels: dict[tuple[str, str], dict[str, Any]] = {}
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        drawn = curves(run, most)
        if drawn:
            key = (run.data, run.quantity)
            title = f"{run.data}: {run.quantity.replace('_', ' ').replace('nll', 'NLL').replace('elbo', 'ELBO')}"
            panel = panels.setdefault(key, {"title": title, "unit": run.unit, "runs": []})
            panel["runs"].append({"id": number, "label": label, **drawn})
    return [panels[key] for key in sorted(panels, key=lambda key: (-len(panels[key]["runs"]), key))]
