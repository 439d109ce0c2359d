"""The parts that figures are made of: style, panels, and the windows that they show.

Blue is always data and orange always the flow; no colour map needs red told from green.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

#: What a panel of two columns shows: x min, x max, y min, y max.
Window = tuple[float, float, float, float]

DATA, FLOW, INK, PALE = "#0072B2", "#D55E00", "#222222", "#B8B8B8"
ANGLES = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#0072B2")  # a cycle of Okabe and Ito's colours
DENSITY, DATA_COUNTS, FLOW_COUNTS = "magma", "Blues", "Oranges"
BINS, PAIR_BINS = 50, 36


# -- figures and axes -----------------------------------------------------------------------------


def new_figure(width: float, height: float) -> "matplotlib.figure.Figure":
    """Make a figure, in inches, that no global state of matplotlib knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def dress(axes: "matplotlib.axes.Axes", title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Give axes their labels and the common style."""
    axes.set_title(title, fontsize=9, color=INK)
    axes.set_xlabel(xlabel, fontsize=8, color=INK)
    axes.set_ylabel(ylabel, fontsize=8, color=INK)
    axes.tick_params(labelsize=7, color=PALE, labelcolor=INK, length=2.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(PALE)


def dress_plane(axes: "matplotlib.axes.Axes", title: str, window: Window, labels: Sequence[str] = ("", "")) -> None:
    """Dress a panel of two columns: its window, upright, with equal scales where they fit."""
    dress(axes, title, *labels)
    axes.set(xlim=window[:2], ylim=window[2:])
    axes.set_box_aspect(aspect(window))


def legend_above(figure: "matplotlib.figure.Figure", axes: "matplotlib.axes.Axes") -> None:
    """Put the legend of one panel above all of them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=8)


# -- panels ---------------------------------------------------------------------------------------


def histograms(
    axes: "matplotlib.axes.Axes",
    rows: np.ndarray | None,
    samples: np.ndarray,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw one column of data filled and of samples as a line, in the same bins.

    Both are densities of all their rows, so that samples outside the limits lower the line;
    many of them are noted.
    """
    low, high = limits or limits_of(samples if rows is None else rows)
    edges = np.linspace(low, high, BINS + 1)
    if rows is not None:
        axes.stairs(_heights(rows, edges), edges, fill=True, color=DATA, alpha=0.35, lw=0, label="data")
    axes.stairs(_heights(samples, edges), edges, color=FLOW, alpha=0.8, lw=1.1, label="samples")
    axes.set_xlim(low, high)
    note = _share_note((samples < low) | (samples > high))
    axes.text(
        1,
        1,
        note,
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        fontsize=6.5,
        color=FLOW,
        in_layout=False,
    )


def points(axes: "matplotlib.axes.Axes", rows: np.ndarray, window: Window, colour: str) -> str:
    """Draw rows of two columns as points, fainter the more there are; return a note on those outside."""
    x, y = rows[:, 0], rows[:, 1]
    alpha = min(1.0, max(0.1, 25 / math.sqrt(len(rows))))
    axes.scatter(x, y, s=4, color=colour, alpha=alpha, linewidths=0, rasterized=True)
    return _share_note((x < window[0]) | (x > window[1]) | (y < window[2]) | (y > window[3]))


def counts(axes: "matplotlib.axes.Axes", rows: np.ndarray, window: Window, colours: str) -> None:
    """Draw a histogram of two columns; the square root in its colour scale brings out the tails."""
    from matplotlib.colors import PowerNorm

    edges = [np.linspace(*window[:2], PAIR_BINS + 1), np.linspace(*window[2:], PAIR_BINS + 1)]
    cells = np.histogram2d(rows[:, 0], rows[:, 1], bins=edges)[0].T
    cells[cells == 0] = np.nan  # leaves empty cells white
    axes.imshow(cells, colours, norm=PowerNorm(0.5, vmin=0), origin="lower", extent=window, aspect="auto")


def density_image(
    axes: "matplotlib.axes.Axes", density: np.ndarray, window: Window, top: float | None, scale: bool
) -> None:
    """Draw a density on the cells of :func:`grid`, with its colour scale beside it if asked for."""
    side = math.isqrt(len(density))
    cells = density.reshape(side, side)
    image = axes.imshow(cells, DENSITY, origin="lower", extent=window, vmin=0, vmax=top, aspect="auto")
    if scale:
        bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.04, 0, 0.05, 1)))
        bar.outline.set_visible(False)
        bar.set_label("density", fontsize=8, color=INK)
        bar.ax.tick_params(labelsize=7, color=PALE, labelcolor=INK, length=2.5)


def lines(axes: "matplotlib.axes.Axes", states: np.ndarray, colours: np.ndarray) -> None:
    """Draw trajectories (times, n, 2) as lines, from a grey dot to a coloured one."""
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(list(states.swapaxes(0, 1)), colors=colours, linewidths=0.6, alpha=0.6))
    axes.scatter(states[0, :, 0], states[0, :, 1], s=5, color=PALE, linewidths=0, zorder=3)
    axes.scatter(states[-1, :, 0], states[-1, :, 1], s=8, c=colours, linewidths=0, zorder=3)


def angle_colours(rows: np.ndarray) -> np.ndarray:
    """Return a colour (n, 4) for each row of two columns by its angle."""
    from matplotlib.colors import LinearSegmentedColormap

    turns = np.arctan2(rows[:, 1], rows[:, 0]) / (2 * np.pi) + 0.5
    return LinearSegmentedColormap.from_list("angles", ANGLES)(turns)


def _heights(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(values, edges)[0] / (len(values) * (edges[1] - edges[0]))


def _share_note(outside: np.ndarray) -> str:
    share = outside.mean()
    return f"{share:.0%} outside" if share >= 0.02 else ""


# -- windows and names ----------------------------------------------------------------------------


def limits_of(values: np.ndarray, tail: float = 0.005) -> tuple[float, float]:
    """Return limits that leave out at most this share of the values at either end."""
    low, high = np.quantile(values, (tail, 1 - tail)).tolist()
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def window_of(rows: np.ndarray) -> Window:
    """Return a window that leaves out at most 0.1 % of the rows at each edge."""
    return (*limits_of(rows[:, 0], 0.001), *limits_of(rows[:, 1], 0.001))


def aspect(window: Window) -> float:
    """Return height over width: that of the window, or 1 where it would be a thin strip."""
    ratio = (window[3] - window[2]) / (window[1] - window[0])
    return ratio if 0.4 <= ratio <= 2.5 else 1.0


def area(window: Window) -> float:
    """Return the area of a window."""
    return (window[1] - window[0]) * (window[3] - window[2])


def union(*windows: Window) -> Window:
    """Return the smallest window that holds all."""
    left, right, bottom, top = zip(*windows, strict=True)
    return min(left), max(right), min(bottom), max(top)


def grid(window: Window, resolution: int) -> np.ndarray:
    """Return the centres of a window's cells (resolution², 2), row by row from the bottom."""
    centres = (np.arange(resolution) + 0.5) / resolution
    x = window[0] + (window[1] - window[0]) * centres
    y = window[2] + (window[3] - window[2]) * centres
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def spread(count: int, most: int) -> list[int]:
    """Return up to ``most`` of the numbers below ``count``, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def column_labels(names: Sequence[str] | None, columns: int) -> list[str]:
    """Return the names of the columns, x₁, x₂ and so on where they have none."""
    return list(names) if names else [f"$x_{{{column + 1}}}$" for column in range(columns)]
