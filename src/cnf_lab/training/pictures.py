"""Pictures of a flow of images: samples, reconstructions, the way from noise to picture, interpolations.

Flows and pixels in, matplotlib figures and GIF frames out. Solves run in evaluation mode without
gradients, and random numbers come from the generator that is handed in: training does not notice.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cnf_lab.errors import SolverError
from cnf_lab.flows import Flow, continuous_blocks, fixed_layers
from cnf_lab.training import panels
from cnf_lab.training.plots import evaluating

if TYPE_CHECKING:
    import matplotlib.figure

CHUNK = 100  # images per solve
WIDTH = 600  # pixels of a grid to look at, at least
MARGIN, TITLE, GAP = 12, 36, 36  # pixels of a figure around its grids, above and between them
TEMPERATURES = (0.5, 0.7, 0.8, 0.9, 1.0)


# -- images of a flow -----------------------------------------------------------------------------


def draw(flow: Flow, n: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
    """Draw n images, float and not yet whole (n, channels, height, width)."""
    return decode(flow, temperature * flow.base.sample(n, generator))


def decode(flow: Flow, z: Tensor) -> Tensor:
    """Return the images of latents."""
    with evaluating(flow):
        parts = [flow.push_forward(part, with_log_det=False).value.double().cpu() for part in z.split(CHUNK)]
    return torch.cat(parts)


def encode(flow: Flow, rows: Tensor) -> Tensor:
    """Return the latents of images, each pixel taken at the middle of its cell."""
    with evaluating(flow):
        anchor = flow.base.sample(0)
        probes = torch.Generator(anchor.device).manual_seed(0)  # of log-dets that nobody asks for
        return torch.cat([flow.pull_back(part.to(anchor) + 0.5, None, probes).value for part in rows.split(CHUNK)])


def way(flow: Flow, z: Tensor, points: int) -> list[Tensor]:
    """Return the images on the way from latents to samples, at some times of it with both ends.

    States between the blocks are shown as pixels too, by the inverse of the fixed layers before them.
    """
    layers = fixed_layers(flow)
    # The latent comes besides, so that the times of one block are evenly spaced.
    per_block = max(1, math.ceil((points - 1) / max(1, len(continuous_blocks(flow)))))
    with evaluating(flow):
        states = list(flow.trajectory(z, points=per_block))
        inner = states[: len(states) - len(layers)] or states
        chosen = [inner[round(share * (len(inner) - 1))] for share in np.linspace(0, 1, points)]
        for layer in reversed(layers):
            chosen = [layer.push_forward(state, with_log_det=False).value for state in chosen]
    return [state.double().cpu() for state in chosen]


def to_pixels(images: Tensor | np.ndarray, levels: int) -> np.ndarray:
    """Return whole pixels, uint8 or uint16, of images in [0, L): a cell's value, and the ends beyond them."""
    values = np.floor(np.nan_to_num(np.asarray(images, dtype=np.float64))).clip(0, levels - 1)
    return values.astype(np.uint8 if levels <= 256 else np.uint16)


# -- grids ----------------------------------------------------------------------------------------


def shown(images: Tensor | np.ndarray, levels: int) -> np.ndarray:
    """Return images as bytes to look at, uint8 (n, height, width, 3)."""
    bright = np.round(to_pixels(images, levels) * (255 / (levels - 1))).astype(np.uint8)
    return np.broadcast_to(bright, (len(bright), 3, *bright.shape[2:])).transpose(0, 2, 3, 1)


def tile(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Return a grid of images, row after row on white.

    Args:
        images: Bytes (n, height, width, 3).
        columns: Images in a row.
        gap: Pixels between two images.
    """
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def enlarged(grid: np.ndarray, width: int = WIDTH) -> np.ndarray:
    """Return a grid with every pixel repeated until it is wide enough to look at."""
    factor = math.ceil(width / grid.shape[1])
    return grid.repeat(factor, axis=0).repeat(factor, axis=1)


def save_grid(path: Path, images: Tensor | np.ndarray, levels: int) -> None:
    """Write a square grid of images as a PNG."""
    from PIL import Image

    columns = math.ceil(math.sqrt(len(images)))
    Image.fromarray(enlarged(tile(shown(images, levels), columns))).save(path)


# -- figures --------------------------------------------------------------------------------------


def sample_grid(
    flow: Flow, rows: Tensor, levels: int, generator: torch.Generator, n: int = 64
) -> "matplotlib.figure.Figure":
    """Draw data and samples side by side, n of each.

    Args:
        flow: The density.
        rows: Images of the data (rows, channels, height, width).
        levels: Number of values of a pixel.
        generator: Source of the samples.
        n: Number of images in each grid.
    """
    columns = math.ceil(math.sqrt(n))
    panes = {"data": rows[:n], "samples": draw(flow, n, generator)}
    return figure_of({title: tile(shown(images, levels), columns) for title, images in panes.items()})


def reconstructions(flow: Flow, rows: Tensor, levels: int, n: int = 8) -> "matplotlib.figure.Figure":
    """Draw images above what comes back from their latents, with the largest error in the title."""
    images = rows[:n].double().cpu()
    back = decode(flow, encode(flow, rows[:n]))
    error = float((back - images - 0.5).abs().max())
    grid = tile(shown(torch.cat([images, back]), levels), len(images))
    return figure_of({f"data, and back from latent; largest error {error:.1e} of a level": grid})


def strip(
    flow: Flow, levels: int, generator: torch.Generator, n: int = 6, points: int = 9
) -> "matplotlib.figure.Figure":
    """Draw samples on their way from noise, at the left, to picture."""
    states = torch.stack(way(flow, flow.base.sample(n, generator), points), dim=1)  # (n, points, *event)
    return figure_of({"from noise to picture": tile(shown(states.flatten(0, 1), levels), points)})


def interpolations(flow: Flow, rows: Tensor, levels: int, n: int = 5, steps: int = 9) -> "matplotlib.figure.Figure":
    """Draw what lies between pairs of images, on great circles in latent space."""
    pairs = min(n, len(rows) // 2)
    first, second = encode(flow, rows[: 2 * pairs]).unflatten(0, (pairs, 2)).unbind(1)
    between = torch.stack([spherical(first, second, share) for share in np.linspace(0, 1, steps)], dim=1)
    images = decode(flow, between.flatten(0, 1))
    return figure_of({"between two images, in latent space": tile(shown(images, levels), steps)})


def spherical(first: Tensor, second: Tensor, share: float) -> Tensor:
    r"""Return the point at a share of the great circle between latents, their norms interpolated too.

    .. math:: \frac{\sin((1 - s)\omega)\, a + \sin(s\,\omega)\, b}{\sin\omega}, \qquad
              \cos\omega = \frac{a \cdot b}{\lVert a \rVert \lVert b \rVert}

    References:
        Shoemake, Animating rotation with quaternion curves (1985).
    """
    cosine = torch.cosine_similarity(first.flatten(1), second.flatten(1)).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = cosine.acos().reshape(-1, *[1] * (first.dim() - 1))
    return (((1 - share) * angle).sin() * first + (share * angle).sin() * second) / angle.sin()


def temperatures(
    flow: Flow, levels: int, generator: torch.Generator, n: int = 10, values: Sequence[float] = TEMPERATURES
) -> "matplotlib.figure.Figure":
    """Draw the same latents at several temperatures, a row for each."""
    z = flow.base.sample(n, generator)
    images = decode(flow, torch.cat([value * z for value in values]))
    title = f"the same latents at temperatures {', '.join(f'{value:g}' for value in values)}"
    return figure_of({title: tile(shown(images, levels), n)})


def figures(
    flow: Flow, rows: Tensor, levels: int, samples: int, generator: torch.Generator
) -> Iterator[tuple[str, "matplotlib.figure.Figure"]]:
    """Yield the figures of a flow of images, each with its name, drawn when it is asked for.

    A solve that fails costs its own figure: the error comes after the others.

    Args:
        flow: The density.
        rows: Images of the data (rows, channels, height, width), whole numbers; of a single one
            there are no interpolations.
        levels: Number of values of a pixel.
        samples: Number of samples in the grid, at most.
        generator: Source of all samples.

    Raises:
        SolverError: If a solve failed; the first of them.
    """
    drawings: dict[str, Callable[[], matplotlib.figure.Figure]] = {
        "samples": lambda: sample_grid(flow, rows, levels, generator, min(samples, 64)),
        "reconstructions": lambda: reconstructions(flow, rows, levels),
        "strip": lambda: strip(flow, levels, generator),
        "interpolations": lambda: interpolations(flow, rows, levels),
        "temperatures": lambda: temperatures(flow, levels, generator),
    }
    if len(rows) < 2:
        del drawings["interpolations"]
    yield from each(drawings)


def each(
    drawings: Mapping[str, "Callable[[], matplotlib.figure.Figure]"],
) -> Iterator[tuple[str, "matplotlib.figure.Figure"]]:
    """Yield figures by name, drawn when they are asked for; a solve that fails costs its own figure.

    Args:
        drawings: What draws each.

    Raises:
        SolverError: If a solve failed; the first of them, after the other figures.
    """
    failures = []
    for name, drawing in drawings.items():
        try:
            figure = drawing()
        except SolverError as failure:
            failures.append(failure)
        else:
            yield name, figure
    if failures:
        raise failures[0]


def film(flow: Flow, levels: int, generator: torch.Generator, n: int = 16, points: int = 24) -> list[np.ndarray]:
    """Return frames of samples on their way from noise to picture, bytes (height, width, 3)."""
    columns = math.ceil(math.sqrt(n))
    states = way(flow, flow.base.sample(n, generator), points)
    return [enlarged(tile(shown(state, levels), columns), WIDTH // 2) for state in states]


def write_gif(path: Path, frames: Sequence[np.ndarray], seconds: float = 0.1, hold: float = 1.5) -> None:
    """Write frames as a GIF that repeats.

    Args:
        path: The file.
        frames: Bytes (height, width, 3) each.
        seconds: Duration of a frame.
        hold: Duration of the last one.
    """
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * hold)]
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)


def figure_of(grids: dict[str, np.ndarray]) -> "matplotlib.figure.Figure":
    """Make a figure of grids side by side, each under its title, where every pixel of theirs has one size."""
    large = {title: enlarged(grid) for title, grid in grids.items()}
    width = 2 * MARGIN - GAP + sum(grid.shape[1] + GAP for grid in large.values())
    height = TITLE + max(grid.shape[0] for grid in large.values()) + MARGIN
    figure = panels.new_figure(1.0, 1.0)
    figure.set_layout_engine("none")  # a layout would put the grids between the figure's pixels
    figure.set_size_inches(width / figure.dpi, height / figure.dpi)
    left = MARGIN
    for title, grid in large.items():
        tall, wide, _ = grid.shape
        axes = figure.add_axes((left / width, 1 - (TITLE + tall) / height, wide / width, tall / height))
        axes.imshow(grid, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        axes.set_title(title, fontsize=9, color=panels.INK)
        left += wide + GAP
    return figure
