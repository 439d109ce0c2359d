"""Figures of a density, its samples and its training: flows and arrays in, matplotlib figures out.

Solves run in evaluation mode without gradients, and random numbers come from a generator that is
handed in, or from one of their own that always starts the same: a flow in training does not notice.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from cnf_lab.flows import FiniteTransform, Flow
from cnf_lab.training import panels
from cnf_lab.training.panels import DATA, FLOW, INK, Window

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

#: The log-density of rows (rows, columns) in nats.
LogDensity = Callable[[np.ndarray], np.ndarray]

CHUNK = 5000  # rows per solve
CONDITIONS = 3  # densities shown of a conditional flow
LINES = 200  # trajectories drawn as lines


# -- numbers of a flow ----------------------------------------------------------------------------


@contextmanager
def evaluating(flow: nn.Module) -> Iterator[None]:
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
    """Draw n rows from a flow, the same number for each row of context as far as possible."""
    anchor, generator = _anchor(flow), generator or _generator(flow)
    parts = []
    with evaluating(flow):
        for numbers in torch.arange(n).split(CHUNK):
            given = None if context is None else context[numbers * len(context) // n].to(anchor)
            parts.append(flow.sample(len(numbers), given, generator).double().cpu().numpy())
    return np.concatenate(parts)


def log_density(
    flow: Flow, rows: np.ndarray, context: Tensor | None = None, generator: torch.Generator | None = None
) -> np.ndarray:
    """Return the log-density of each row in nats, under one row of context where there is one."""
    anchor, generator = _anchor(flow), generator or _generator(flow)
    parts = []
    with evaluating(flow):
        for x in torch.as_tensor(rows).split(CHUNK):
            given = None if context is None else context.to(anchor).expand(len(x), -1)
            parts.append(flow.log_prob(x.to(anchor), given, generator).double().cpu().numpy())
    return np.concatenate(parts)


def trajectory(
    flow: Flow, n: int, points: int, context: Tensor | None = None, generator: torch.Generator | None = None
) -> np.ndarray:
    """Return the states (times, n, columns) of n rows from latent to data, under one row of context."""
    anchor, generator = _anchor(flow), generator or _generator(flow)
    given = None if context is None else context.to(anchor).expand(n, -1)
    with evaluating(flow):
        return flow.trajectory(flow.base.sample(n, generator), given, points).double().cpu().numpy()


def _anchor(flow: Flow) -> Tensor:
    # No rows, but the device and dtype of those that the flow makes.
    return flow.base.sample(0)


def _generator(flow: Flow) -> torch.Generator:
    return torch.Generator(_anchor(flow).device).manual_seed(0)


# -- figures of one and two columns ---------------------------------------------------------------


def density_1d(
    flow: Flow,
    rows: np.ndarray,
    truth: LogDensity | None = None,
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
        truth: The true log-density.
        context: Conditions (conditions, features): samples are shared among them, and densities
            drawn for up to three of them.
        resolution: Points of the line.
        samples: Number of samples.
        generator: Source of the samples.
        name: Name of the column.
    """
    low, high = panels.limits_of(rows[:, 0], 0.001)
    x = np.linspace(low, high, resolution)[:, None]
    figure = panels.new_figure(5.2, 3.4)
    axes = figure.add_subplot()
    panels.histograms(axes, rows[:, 0], draw_samples(flow, samples, context, generator)[:, 0], (low, high))
    for condition, style in zip(_conditions(context), ("-", "--", ":"), strict=False):
        density = np.exp(log_density(flow, x, condition, generator))
        label = f"flow{_given(condition)}, mass {np.trapezoid(density, x[:, 0]):.3f}"
        axes.plot(x[:, 0], density, style, color=FLOW, lw=1.8, label=label)
    if truth is not None:
        axes.plot(x[:, 0], np.exp(truth(x)), "--", color=INK, lw=1, label="true density")
    panels.dress(axes, xlabel=name or "$x$", ylabel="density")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def density_2d(
    flow: Flow,
    rows: np.ndarray,
    window: Window | None = None,
    truth: LogDensity | None = None,
    context: Tensor | None = None,
    resolution: int = 200,
    samples: int = 2000,
    generator: torch.Generator | None = None,
    names: Sequence[str] | None = None,
) -> "matplotlib.figure.Figure":
    """Draw rows, samples and the density of two columns side by side.

    The title of a density carries its mass in the window: 1 where the window holds all of it
    and the solver did its work. Densities share a colour scale, but those of several
    conditions have one each.

    Args:
        flow: The density.
        rows: Data (rows, 2).
        window: What to show; None takes it from the rows.
        truth: The true log-density, for a panel of its own.
        context: Conditions (conditions, features): samples are shared among them, and densities
            drawn for up to three of them.
        resolution: Cells of the density along each axis.
        samples: Number of samples.
        generator: Source of the samples.
        names: Names of the columns.
    """
    window, conditions = window or panels.window_of(rows), _conditions(context)
    cells = panels.grid(window, resolution)
    densities = [(f"flow{_given(c)}", np.exp(log_density(flow, cells, c, generator))) for c in conditions]
    if truth is not None:
        densities.append(("true density", np.exp(truth(cells))))
    drawn = draw_samples(flow, samples, context, generator)

    top = max(density.max() for _, density in densities) if len(conditions) == 1 else None
    width = 2.7 * (2 + len(densities)) + (0.2 if top is None else 0.8)
    figure = panels.new_figure(width, 2.7 * panels.aspect(window) + 0.45)
    left, middle, *right = figure.subplots(1, 2 + len(densities), sharey=True)
    labels = panels.column_labels(names, 2)
    _scatter(left, "data", rows, window, DATA, labels)
    _scatter(middle, "samples", drawn, window, FLOW, labels[:1])
    for axes, (title, density) in zip(right, densities, strict=True):
        panels.density_image(axes, density, window, top, scale=top is not None and axes is right[-1])
        mass = density.mean() * panels.area(window)
        panels.dress_plane(axes, f"{title}, mass {mass:.3f}", window, labels[:1])
    return figure


def trajectories_2d(
    flow: Flow,
    n: int = 1000,
    window: Window | None = None,
    points: int = 25,
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
        context: One condition (1, features).
        names: Names of the columns.
    """
    states = trajectory(flow, n, points, context, generator)
    colours = panels.angle_colours(states[0])
    windows = _windows(states, window or panels.window_of(states[-1]))
    figure = panels.new_figure(11.2, 4.6)
    axes = figure.subplot_mosaic("LLabc;LLdef")
    panels.lines(axes["L"], states[:, :LINES], colours[:LINES])
    title = f"from latent (grey) to data (coloured){_given(context)}"
    panels.dress_plane(axes["L"], title, panels.union(windows[0], windows[-1]), panels.column_labels(names, 2))
    for share, panel in zip(np.linspace(0, 1, 6), "abcdef", strict=True):
        index = round(share * (len(states) - 1))
        x, y = states[index].T
        axes[panel].scatter(x, y, s=2.5, c=colours, linewidths=0, rasterized=True)
        title = {"a": "latent", "f": "data"}.get(panel, f"{share:.0%} of the way")
        panels.dress_plane(axes[panel], title, windows[index])
    return figure


def _scatter(
    axes: "matplotlib.axes.Axes",
    title: str,
    rows: np.ndarray,
    window: Window,
    colour: str,
    labels: Sequence[str],
) -> None:
    note = panels.points(axes, rows, window, colour)
    panels.dress_plane(axes, f"{title}, {note}" if note else title, window, labels)


def _windows(states: np.ndarray, data: Window) -> list[Window]:
    """Return the window of each state: one for all, unless latent and data differ much in scale."""
    latent = (-3.5, 3.5, -3.5, 3.5)
    both = panels.union(latent, data)
    if panels.area(both) < 8 * min(panels.area(latent), panels.area(data)):
        return len(states) * [both]
    return [*map(panels.window_of, states[:-1]), data]


def _conditions(context: Tensor | None) -> list[Tensor | None]:
    """Return rows (1, features) from low to high in the first feature; a single None without a context."""
    if context is None:
        return [None]
    ordered = context[context[:, 0].argsort()]
    middles = {(2 * k + 1) * len(ordered) // (2 * CONDITIONS) for k in range(CONDITIONS)}
    return [ordered[index : index + 1] for index in sorted(middles)]


def _given(condition: Tensor | None) -> str:
    if condition is None:
        return ""
    values = [f"{value:.3g}" for value in condition[0].tolist()]
    return f" given {', '.join(values[:3])}{', …' if len(values) > 3 else ''}"


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
    labels = panels.column_labels(names, samples.shape[1])
    columns = panels.spread(samples.shape[1], max_columns)
    across = min(4, len(columns))
    down = math.ceil(len(columns) / across)
    figure = panels.new_figure(*((2.5 * across, 1.75 * down + 0.35) if across > 1 else (5.2, 3.4)))
    places = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, column in zip(places, columns, strict=False):
        panels.histograms(axes, None if rows is None else rows[:, column], samples[:, column])
        panels.dress(axes, xlabel=labels[column])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    for axes in places[len(columns) :]:
        axes.set_visible(False)
    panels.legend_above(figure, places[0])
    return figure


def pairs(
    samples: np.ndarray,
    rows: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    max_columns: int = 5,
) -> "matplotlib.figure.Figure":
    """Draw pairs of columns: data below the diagonal, samples mirrored above it.

    A faithful flow makes the figure symmetric. Without data the samples take the lower triangle.

    Args:
        samples: Samples (samples, columns).
        rows: Data (rows, columns), or None.
        names: Names of the columns.
        max_columns: Columns shown; of more, this many are taken evenly.
    """
    labels = panels.column_labels(names, samples.shape[1])
    columns = panels.spread(samples.shape[1], max_columns)
    count = len(columns)
    limits = {c: panels.limits_of((samples if rows is None else rows)[:, c]) for c in columns}
    figure = panels.new_figure(1.8 * count + 0.4, 1.8 * count + 0.4)
    places = figure.subplots(count, count, squeeze=False)
    for i, j in product(range(count), repeat=2):
        axes, x, y = places[i, j], columns[j], columns[i]
        if i == j:
            panels.histograms(axes, None if rows is None else rows[:, x], samples[:, x], limits[x])
        elif i > j and rows is not None:
            panels.counts(axes, rows[:, [x, y]], (*limits[x], *limits[y]), panels.DATA_COUNTS)
        elif i > j or rows is not None:
            panels.counts(axes, samples[:, [x, y]], (*limits[x], *limits[y]), panels.FLOW_COUNTS)
        else:
            axes.set_visible(False)
        bottom, left = i == count - 1, j == 0
        panels.dress(axes, xlabel=labels[x] if bottom else "", ylabel=labels[y] if left else "")
        axes.tick_params(bottom=bottom, labelbottom=bottom, left=left and i > 0, labelleft=left and i > 0)
    panels.legend_above(figure, places[0, 0])
    return figure


def sample_plot(
    samples: np.ndarray, rows: np.ndarray | None = None, names: Sequence[str] | None = None
) -> "matplotlib.figure.Figure":
    """Draw samples, beside data where there are any: a histogram, points, or pairs of columns.

    Args:
        samples: Samples (samples, columns).
        rows: Data (rows, columns), or None.
        names: Names of the columns.
    """
    if samples.shape[1] == 1:
        return marginals(samples, rows, names)
    if samples.shape[1] > 2:
        return pairs(samples, rows, names)
    window = panels.window_of(samples if rows is None else rows)
    shown = ([] if rows is None else [("data", rows, DATA)]) + [("samples", samples, FLOW)]
    figure = panels.new_figure(3.6 * len(shown), 3.6 * panels.aspect(window) + 0.3)
    places = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, (title, points, colour) in zip(places, shown, strict=True):
        _scatter(axes, title, points, window, colour, panels.column_labels(names, 2)[: 1 + (axes is places[0])])
    return figure


def figures(
    flow: Flow,
    rows: np.ndarray,
    context: Tensor | None = None,
    window: Window | None = None,
    truth: LogDensity | None = None,
    names: Sequence[str] | None = None,
    resolution: int = 200,
    samples: int = 2000,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[str, "matplotlib.figure.Figure"]]:
    r"""Yield the figures that suit the data, each with its name; none where events are not rows of columns.

    Args:
        flow: The density.
        rows: Data (rows, \*event).
        context: Conditions of the rows (rows, features), or None.
        window: What to show of two columns; None takes it from the rows.
        truth: The true log-density.
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
        conditions = _conditions(context)
        middle = conditions[len(conditions) // 2]
        yield "density", density_2d(flow, rows, window, truth, context, resolution, samples, generator, names)
        if not any(isinstance(part, FiniteTransform) for part in flow.modules()):  # which has no way to show
            yield "trajectories", trajectories_2d(flow, min(samples, 1000), window, 25, generator, middle, names)
    else:
        drawn = draw_samples(flow, samples, context, generator)
        yield "marginals", marginals(drawn, rows, names)
        yield "pairs", pairs(drawn, rows, names)
