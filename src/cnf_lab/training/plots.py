"""Figures of a density, its samples and its training: flows and arrays in, matplotlib figures out.

Blue is always data and orange always the flow. Figures belong to nobody's global state: they
are freed like any other object.
"""

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cnf_lab.flows import Flow

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

#: Rows and columns (x min, x max, y min, y max) that a plot of two columns shows.
Window = tuple[float, float, float, float]

DATA, FLOW, INK, PALE = "#0072B2", "#D55E00", "#222222", "#B8B8B8"  # the first two: Okabe and Ito (2008)
DENSITY = "magma"
BINS = 50
CHUNK = 5000  # rows per solve
CONDITIONS = 3  # densities shown of a conditional flow
LINES = 200  # trajectories drawn as lines


# -- numbers of a flow ----------------------------------------------------------------------------


@contextmanager
def evaluating(flow: Flow) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is as it was."""
    training = [module for module in flow.modules() if module.training]
    flow.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def draw_samples(
    flow: Flow, n: int, context: Tensor | None = None, generator: torch.Generator | None = None
) -> np.ndarray:
    """Draw n rows from a flow; several rows of context are used in turn."""
    anchor = _anchor(flow)
    generator = generator or torch.Generator(anchor.device).manual_seed(0)
    parts = []
    with evaluating(flow):
        for numbers in torch.arange(n).split(CHUNK):
            given = None if context is None else context[numbers % len(context)].to(anchor)
            parts.append(flow.sample(len(numbers), given, generator).cpu().numpy())
    return np.concatenate(parts)


def log_density(
    flow: Flow, rows: np.ndarray, context: Tensor | None = None, generator: torch.Generator | None = None
) -> np.ndarray:
    """Return the log-density of each row in nats, under one row of context where there is one."""
    anchor = _anchor(flow)
    generator = generator or torch.Generator(anchor.device).manual_seed(0)
    parts = []
    with evaluating(flow):
        for x in torch.as_tensor(rows).split(CHUNK):
            given = None if context is None else context.to(anchor).expand(len(x), -1)
            parts.append(flow.log_prob(x.to(anchor), given, generator).double().cpu().numpy())
    return np.concatenate(parts)


def window_of(rows: np.ndarray) -> Window:
    """Return a window that leaves out at most the outermost 0.1 % of the rows at each edge of two columns."""
    (left, right), (bottom, top) = _range(rows[:, 0]), _range(rows[:, 1])
    return left, right, bottom, top


# -- figures of one and two columns ---------------------------------------------------------------


def density_1d(
    flow: Flow,
    rows: np.ndarray,
    truth: Callable[[np.ndarray], np.ndarray] | None = None,
    context: Tensor | None = None,
    resolution: int = 400,
    samples: int = 2000,
    generator: torch.Generator | None = None,
    name: str | None = None,
) -> "matplotlib.figure.Figure":
    """Draw a density of one column over histograms of rows and samples.

    Args:
        flow: The density.
        rows: Data (rows, 1).
        truth: The true log-density of rows.
        context: Conditions (conditions, features): samples take them in turn, densities are
            drawn for up to three of them.
        resolution: Points of the line.
        samples: Number of samples.
        generator: Source of the samples.
        name: Name of the column.
    """
    low, high = _range(rows[:, 0])
    x = np.linspace(low, high, resolution)[:, None]
    figure = _figure(5.2, 3.4)
    axes = figure.add_subplot()
    _histograms(axes, rows[:, 0], draw_samples(flow, samples, context, generator)[:, 0], (low, high))
    conditions = _conditions(context)
    for condition, style in zip(conditions, ("-", "--", ":"), strict=False):
        density = np.exp(log_density(flow, x, condition, generator))
        mass = density.mean() * (high - low)
        axes.plot(x[:, 0], density, style, color=FLOW, label=f"flow{_given(condition)}, mass {mass:.3f}")
    if truth is not None:
        axes.plot(x[:, 0], np.exp(truth(x)), "--", color=INK, linewidth=1, label="true density")
    _dress(axes, xlabel=_names(name and [name], 1)[0], ylabel="density")
    axes.set(xlim=(low, high), ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    return figure


def density_2d(
    flow: Flow,
    rows: np.ndarray,
    window: Window | None = None,
    truth: Callable[[np.ndarray], np.ndarray] | None = None,
    context: Tensor | None = None,
    resolution: int = 200,
    samples: int = 2000,
    generator: torch.Generator | None = None,
    names: Sequence[str] | None = None,
) -> "matplotlib.figure.Figure":
    """Draw rows, samples and the density of two columns side by side.

    A density's title carries its mass in the window: 1 where the window holds all of it and
    the solver did its work.

    Args:
        flow: The density.
        rows: Data (rows, 2).
        window: What to show; None takes it from the rows.
        truth: The true log-density of rows, for a panel of its own.
        context: Conditions (conditions, features): samples take them in turn, densities are
            drawn for up to three of them.
        resolution: Cells of the density along each axis.
        samples: Number of samples.
        generator: Source of the samples.
        names: Names of the columns.
    """
    window = window or window_of(rows)
    grid = _grid(window, resolution)
    densities = {f"flow{_given(c)}": log_density(flow, grid, c, generator) for c in _conditions(context)}
    if truth is not None:
        densities["true density"] = truth(grid)
    drawn = draw_samples(flow, samples, context, generator)
    figure = _figure(2.6 * (2 + len(densities)) + 0.5, 2.6 * _aspect(window) + 0.4)
    panels = figure.subplots(1, 2 + len(densities), sharey=True)
    titles = []
    for axes, title, points, colour in zip(panels, ("data", "samples"), (rows, drawn), (DATA, FLOW), strict=False):
        titles.append(" ".join((title, _points(axes, points, window, colour))))
    titles += _densities(figure, panels[2:], densities, window)
    labels = _names(names, 2)
    for axes, title in zip(panels, titles, strict=True):
        _show(axes, title, window, labels[0], labels[1] if axes is panels[0] else "")
    return figure


def trajectories_2d(
    flow: Flow,
    n: int = 1000,
    window: Window | None = None,
    points: int = 24,
    generator: torch.Generator | None = None,
    context: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> "matplotlib.figure.Figure":
    """Draw the way of samples from latent to data, coloured by the angle of the latent row.

    The large panel shows single trajectories from their latent row (grey dot) to the sample
    (coloured dot), the small ones all samples at six of the times.

    Args:
        flow: The density.
        n: Number of samples.
        window: What to show of the data; None takes it from the samples.
        points: Times per continuous block.
        generator: Source of the samples.
        context: Conditions (conditions, features), taken in turn.
        names: Names of the columns.
    """
    states = _trajectory(flow, n, points, generator, context)
    colours = _angle_colours(states[0])
    windows = _windows(states, window or window_of(states[-1]))
    labels = _names(names, 2)
    figure = _figure(11.2, 4.6)
    panels = figure.subplot_mosaic("LLabc;LLdef")
    _lines(panels["L"], states[:, :LINES], colours[:LINES])
    _show(panels["L"], "from latent (grey) to data (coloured)", _union((windows[0], windows[-1])), *labels)
    for key, index in zip("abcdef", np.linspace(0, len(states) - 1, 6).round().astype(int), strict=True):
        panels[key].scatter(*states[index].T, s=2.5, c=colours, linewidths=0, rasterized=True)
        share = index / (len(states) - 1)
        _show(panels[key], {0: "latent", 1: "data"}.get(share, f"{share:.0%} of the way"), windows[index])
    return figure


def _trajectory(
    flow: Flow, n: int, points: int, generator: torch.Generator | None, context: Tensor | None
) -> np.ndarray:
    anchor = _anchor(flow)
    generator = generator or torch.Generator(anchor.device).manual_seed(0)
    given = None if context is None else context[torch.arange(n) % len(context)].to(anchor)
    with evaluating(flow):
        return flow.trajectory(flow.base.sample(n, generator), given, points).double().cpu().numpy()


def _windows(states: np.ndarray, data: Window) -> list[Window]:
    """Return the window of each state: one for all, unless latent and data differ much in scale."""
    latent = (-3.5, 3.5, -3.5, 3.5)
    union = _union((latent, data))
    if all(_size(union) < 3 * _size(window) for window in (latent, data)):
        return len(states) * [union]
    return [window_of(state) for state in states[:-1]] + [data]


# -- figures of many columns ----------------------------------------------------------------------


def marginals(
    samples: np.ndarray,
    rows: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    max_columns: int = 12,
) -> "matplotlib.figure.Figure":
    """Draw a histogram of every column, samples against data.

    Args:
        samples: Samples (samples, columns).
        rows: Data (rows, columns), or None.
        names: Names of the columns.
        max_columns: Columns shown; of more, this many are taken evenly.
    """
    labels, columns = _names(names, samples.shape[1]), _spread(samples.shape[1], max_columns)
    across = min(4, len(columns))
    down = math.ceil(len(columns) / across)
    figure = _figure(2.5 * across, 1.75 * down + 0.35)
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes, column in zip(panels, columns, strict=False):
        _histograms(axes, None if rows is None else rows[:, column], samples[:, column])
        _dress(axes, xlabel=labels[column])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    for axes in panels[len(columns) :]:
        axes.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


def pairs(
    samples: np.ndarray,
    rows: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    max_columns: int = 5,
) -> "matplotlib.figure.Figure":
    """Draw the densities of pairs of columns: data below the diagonal, samples mirrored above it.

    Both triangles of a pair share window and colour scale, so that a faithful flow makes the
    figure symmetric. Without data the samples take the lower triangle.

    Args:
        samples: Samples (samples, columns).
        rows: Data (rows, columns), or None.
        names: Names of the columns.
        max_columns: Columns shown; of more, this many are taken evenly.
    """
    labels, columns = _names(names, samples.shape[1]), _spread(samples.shape[1], max_columns)
    reference = samples if rows is None else rows
    ranges = {column: _range(reference[:, column]) for column in columns}
    figure = _figure(1.8 * len(columns) + 0.4, 1.8 * len(columns) + 0.4)
    panels = figure.subplots(len(columns), len(columns), squeeze=False)
    for i, j in np.ndindex(panels.shape):
        axes, (row, column) = panels[i, j], (columns[i], columns[j])
        if i == j:
            _histograms(axes, None if rows is None else rows[:, row], samples[:, row], ranges[row])
        elif i < j and rows is None:
            axes.set_visible(False)
        else:
            shown, colours = (samples, "Oranges") if i < j or rows is None else (rows, "Blues")
            _pair(axes, shown[:, [column, row]], (*ranges[column], *ranges[row]), colours)
        _dress(axes, xlabel=labels[column] if i == len(columns) - 1 else "", ylabel=labels[row] if j == 0 else "")
        axes.tick_params(labelbottom=i == len(columns) - 1, labelleft=j == 0 and i > 0)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


def sample_plot(
    samples: np.ndarray, rows: np.ndarray | None = None, names: Sequence[str] | None = None
) -> "matplotlib.figure.Figure":
    """Draw samples, beside data where there are any: histogram, points or pairs by their columns.

    Args:
        samples: Samples (samples, columns).
        rows: Data (rows, columns), or None.
        names: Names of the columns.
    """
    if samples.shape[1] == 1:
        return marginals(samples, rows, names)
    if samples.shape[1] > 2:
        return pairs(samples, rows, names)
    window, labels = window_of(samples if rows is None else rows), _names(names, 2)
    shown = [("samples", samples, FLOW)] if rows is None else [("data", rows, DATA), ("samples", samples, FLOW)]
    figure = _figure(3.6 * len(shown), 3.6 * _aspect(window) + 0.3)
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, (title, points, colour) in zip(panels, shown, strict=True):
        note = _points(axes, points, window, colour)
        _show(axes, f"{title} {note}", window, labels[0], labels[1] if axes is panels[0] else "")
    return figure


def figures(
    flow: Flow,
    rows: np.ndarray,
    context: Tensor | None = None,
    window: Window | None = None,
    truth: Callable[[np.ndarray], np.ndarray] | None = None,
    names: Sequence[str] | None = None,
    resolution: int = 200,
    samples: int = 2000,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[str, "matplotlib.figure.Figure"]]:
    """Yield names and figures that suit the data; none for events that are not rows of columns.

    Args:
        flow: The density.
        rows: Data (rows, \\*event).
        context: Conditions of the rows (rows, features), or None.
        window: What to show of two columns; None takes it from the rows.
        truth: The true log-density of rows.
        names: Names of the columns.
        resolution: Cells of a density along each axis.
        samples: Number of samples.
        generator: Source of the samples.
    """
    if rows.ndim != 2:
        return
    if rows.shape[1] == 1:
        name = names[0] if names else None
        yield "density", density_1d(flow, rows, truth, context, 2 * resolution, samples, generator, name)
    elif rows.shape[1] == 2:
        window = window or window_of(rows)
        yield "density", density_2d(flow, rows, window, truth, context, resolution, samples, generator, names)
        yield "trajectories", trajectories_2d(flow, min(samples, 1000), window, 24, generator, context, names)
    else:
        drawn = draw_samples(flow, samples, context, generator)
        yield "marginals", marginals(drawn, rows, names)
        yield "pairs", pairs(drawn, rows, names)


# -- figures of a training run --------------------------------------------------------------------


def curves(metrics_csv_path: str | Path, metric: str = "nll", unit: str = "nats") -> "matplotlib.figure.Figure":
    """Draw a metric of training and validation against steps and time, and the NFE against steps.

    Args:
        metrics_csv_path: Table of a run's metrics, one row per time of logging.
        metric: Name of the metric after the slash.
        unit: Unit of the metric.
    """
    series = _series(Path(metrics_csv_path))
    steps, seconds = _clock(*series.get("time/step_seconds", (np.empty(0), np.empty(0))))
    figure = _figure(11, 3.2)
    by_step, by_time, cost = figure.subplots(1, 3)
    for name, label, colour in ((f"train/{metric}", "training", PALE), (f"val/{metric}", "validation", FLOW)):
        x, y = series.get(name, (np.empty(0), np.empty(0)))
        by_step.plot(x, y, color=colour, label=label)
        by_time.plot(np.interp(x, steps, seconds), y, color=colour, label=label)
    for name, label, colour in (("nfe/forward", "forward", DATA), ("nfe/backward", "backward", FLOW)):
        cost.plot(*series.get(name, (np.empty(0), np.empty(0))), color=colour, label=label)
    title = f"{metric.upper() if len(metric) < 5 else metric.replace('_', ' ')} ({unit})"
    _dress(by_step, xlabel="training steps", ylabel=title)
    _dress(by_time, xlabel="training time (s)", ylabel=title)
    _dress(cost, xlabel="training steps", ylabel="NFE per training step")
    for axes in (by_step, by_time, cost):
        axes.grid(color="#EEEEEE", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _series(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read steps done and values of every column; a step that is logged twice counts once."""
    columns: dict[str, dict[float, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name not in ("step", "epoch") and value:
                    columns.setdefault(name, {})[float(row["step"]) + 1] = float(value)
    return {name: (np.array(sorted(c)), np.array([c[step] for step in sorted(c)])) for name, c in columns.items()}


def _clock(steps: np.ndarray, step_seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and the seconds of training up to them, from the mean of each epoch."""
    seconds = np.cumsum(np.diff(steps, prepend=0) * step_seconds)
    return np.append(0, steps), np.append(0, seconds)


# -- parts of figures -----------------------------------------------------------------------------


def _figure(width: float, height: float) -> "matplotlib.figure.Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _dress(axes: "matplotlib.axes.Axes", title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    axes.set_title(title, fontsize=9, color=INK)
    axes.set_xlabel(xlabel, fontsize=8, color=INK)
    axes.set_ylabel(ylabel, fontsize=8, color=INK)
    axes.tick_params(labelsize=7, color=PALE, labelcolor=INK, length=2.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(PALE)


def _show(axes: "matplotlib.axes.Axes", title: str, window: Window, xlabel: str = "", ylabel: str = "") -> None:
    """Dress a panel of two columns: window, upright axes, equal scales where they can be."""
    _dress(axes, title, xlabel, ylabel)
    axes.set(xlim=window[:2], ylim=window[2:])
    axes.set_box_aspect(_aspect(window))


def _histograms(
    axes: "matplotlib.axes.Axes",
    rows: np.ndarray | None,
    samples: np.ndarray,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw data filled and samples as a line in the same bins, each as the density of all its rows."""
    limits = limits or _range(samples if rows is None else rows)
    edges = np.linspace(*limits, BINS + 1)
    if rows is not None:
        axes.stairs(_heights(rows, edges), edges, fill=True, color=DATA, alpha=0.35, linewidth=0, label="data")
    axes.stairs(_heights(samples, edges), edges, color=FLOW, linewidth=1.1, label="samples")
    axes.set_xlim(limits)
    note = _outside((samples < limits[0]) | (samples > limits[1]))
    axes.text(0.99, 0.97, note, transform=axes.transAxes, ha="right", va="top", fontsize=6.5, color=FLOW)


def _heights(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(values, edges)[0] / (len(values) * (edges[1] - edges[0]))


def _points(axes: "matplotlib.axes.Axes", rows: np.ndarray, window: Window, colour: str) -> str:
    """Draw rows as points, fainter the more there are; return how many the window leaves out."""
    alpha = min(1.0, max(0.1, 25 / math.sqrt(len(rows))))
    axes.scatter(*rows.T, s=4, color=colour, alpha=alpha, linewidths=0, rasterized=True)
    x, y = rows.T
    return _outside((x < window[0]) | (x > window[1]) | (y < window[2]) | (y > window[3]))


def _outside(outside: np.ndarray) -> str:
    share = outside.mean()
    return f"{share:.1%} outside" if share >= 0.01 else ""


def _densities(
    figure: "matplotlib.figure.Figure", panels: Any, log_densities: dict[str, np.ndarray], window: Window
) -> list[str]:
    """Draw densities on one colour scale; return their titles, each with its mass."""
    densities = {title: np.exp(values) for title, values in log_densities.items()}
    top = max(float(values.max()) for values in densities.values())
    for axes, values in zip(panels, densities.values(), strict=True):
        square = values.reshape(2 * (math.isqrt(len(values)),))
        image = axes.imshow(square, DENSITY, origin="lower", extent=window, vmin=0, vmax=top, aspect="auto")
    bar = figure.colorbar(image, ax=panels, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, color=PALE, labelcolor=INK, length=2.5)
    area = (window[1] - window[0]) * (window[3] - window[2])
    return [f"{title}, mass {values.mean() * area:.3f}" for title, values in densities.items()]


def _pair(axes: "matplotlib.axes.Axes", rows: np.ndarray, window: Window, colours: str) -> None:
    """Draw the density of two columns; the square root of the colour scale brings out the tails."""
    from matplotlib.colors import PowerNorm

    edges = [np.linspace(*window[:2], BINS + 1), np.linspace(*window[2:], BINS + 1)]
    counts = np.histogram2d(*rows.T, bins=edges)[0].T / len(rows)
    axes.imshow(counts, colours, norm=PowerNorm(0.5), origin="lower", extent=window, aspect="auto")


def _lines(axes: "matplotlib.axes.Axes", states: np.ndarray, colours: np.ndarray) -> None:
    from matplotlib.collections import LineCollection

    lines = LineCollection(list(states.transpose(1, 0, 2)), colors=colours, linewidths=0.6, alpha=0.6)
    axes.add_collection(lines)
    axes.scatter(*states[0].T, s=5, color=PALE, linewidths=0, zorder=3)
    axes.scatter(*states[-1].T, s=8, c=colours, linewidths=0, zorder=3)


def _angle_colours(latent: np.ndarray) -> np.ndarray:
    """Return a colour for each latent row by its angle."""
    from matplotlib import colormaps

    angle = np.arctan2(latent[:, 1], latent[:, 0]) / (2 * np.pi) + 0.5
    return colormaps["twilight"](angle)


# -- windows, grids and names ---------------------------------------------------------------------


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.001, 0.999)).tolist()
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def _aspect(window: Window) -> float:
    """Return height over width: that of the window, or 1 where it would be a thin strip."""
    ratio = (window[3] - window[2]) / (window[1] - window[0])
    return ratio if 0.4 <= ratio <= 2.5 else 1.0


def _size(window: Window) -> float:
    return math.hypot(window[1] - window[0], window[3] - window[2])


def _union(windows: Sequence[Window]) -> Window:
    left, right, bottom, top = zip(*windows, strict=True)
    return min(left), max(right), min(bottom), max(top)


def _grid(window: Window, resolution: int) -> np.ndarray:
    """Return the centres of a window's cells (resolution², 2), row by row from the bottom."""
    centres = (np.arange(resolution) + 0.5) / resolution
    x = window[0] + (window[1] - window[0]) * centres
    y = window[2] + (window[3] - window[2]) * centres
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _conditions(context: Tensor | None) -> list[Tensor | None]:
    """Return single rows of context (1, features), evenly taken; a single None without a context."""
    if context is None:
        return [None]
    return [context[i : i + 1] for i in _spread(len(context), CONDITIONS)]


def _given(condition: Tensor | None) -> str:
    if condition is None:
        return ""
    values = [f"{value:.3g}" for value in condition[0].tolist()]
    return f" given {', '.join(values[:3])}{', …' if len(values) > 3 else ''}"


def _spread(count: int, most: int) -> list[int]:
    """Return up to ``most`` of the numbers below ``count``, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _names(names: Sequence[str] | None, columns: int) -> list[str]:
    return list(names) if names else [f"$x_{{{column + 1}}}$" for column in range(columns)]


def _anchor(flow: Flow) -> Tensor:
    # No rows, but the device and dtype of those that the flow makes.
    return flow.base.sample(0)
