"""Pictures of an autoencoder: samples, reconstructions, and walks between the latents of two images.

Models and pixels in, matplotlib figures out. Expected pixels are shown, not drawn ones, but for the
samples, where both are. Random numbers come from the generator that is handed in: training does not notice.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.training.pictures import each, figure_of, shown, spherical, tile
from cnf_lab.training.plots import evaluating

if TYPE_CHECKING:
    import matplotlib.figure


def sample_grid(
    model: VariationalAutoencoder, rows: Tensor, generator: torch.Generator, n: int = 64
) -> "matplotlib.figure.Figure":
    """Draw data, and samples of the prior through the decoder: their expected pixels and drawn ones.

    Args:
        model: The autoencoder.
        rows: Images of the data (rows, channels, height, width).
        generator: Source of latents and pixels.
        n: Number of images in each grid.
    """
    columns = math.ceil(math.sqrt(n))
    with evaluating(model):
        parameters = model.decoder(model.prior.sample(n, generator))
        panes = {
            "data": rows[:n],
            "samples, expected pixels": model.likelihood.mean(parameters).cpu(),
            "drawn pixels": model.likelihood.sample(parameters, generator).cpu(),
        }
    return figure_of({title: tile(_bytes(model, images), columns) for title, images in panes.items()})


def reconstructions(
    model: VariationalAutoencoder, rows: Tensor, generator: torch.Generator, n: int = 12
) -> "matplotlib.figure.Figure":
    """Draw images above what the decoder makes of a draw of their posterior.

    Args:
        model: The autoencoder.
        rows: Images of the data.
        generator: Source of the draws.
        n: Number of images.
    """
    images = rows[:n]
    with evaluating(model):
        back = model.decode(model.latents(_like(model, images), 1, generator)[0]).cpu()
    return figure_of({"data, and back from a latent": tile(_bytes(model, torch.cat([images, back])), len(images))})


def walks(
    model: VariationalAutoencoder, rows: Tensor, generator: torch.Generator, n: int = 6, steps: int = 11
) -> "matplotlib.figure.Figure":
    """Draw what lies between the latents of pairs of images, on great circles.

    Args:
        model: The autoencoder.
        rows: Images of the data, two at least.
        generator: Source of the latents.
        n: Number of pairs.
        steps: Images on each walk, both ends included.
    """
    pairs = min(n, len(rows) // 2)
    with evaluating(model):
        latents = model.latents(_like(model, rows[: 2 * pairs]), 1, generator)[0]
        first, second = latents.unflatten(0, (pairs, 2)).unbind(1)
        between = torch.stack([spherical(first, second, share) for share in np.linspace(0, 1, steps)], dim=1)
        images = model.decode(between.flatten(0, 1)).cpu()
    return figure_of({"walks between two latents": tile(_bytes(model, images), steps)})


def figures(
    model: VariationalAutoencoder, rows: Tensor, samples: int, generator: torch.Generator
) -> Iterator[tuple[str, "matplotlib.figure.Figure"]]:
    """Yield the figures of an autoencoder, each with its name, drawn when it is asked for.

    Args:
        model: The autoencoder.
        rows: Images of the data, whole numbers; of a single one there are no walks.
        samples: Number of samples in the grid, at most.
        generator: Source of all samples.

    Raises:
        SolverError: If a solve failed; the first of them, after the other figures.
    """
    drawings: dict[str, Callable[[], matplotlib.figure.Figure]] = {
        "samples": lambda: sample_grid(model, rows, generator, min(samples, 64)),
        "reconstructions": lambda: reconstructions(model, rows, generator),
        "walks": lambda: walks(model, rows, generator),
    }
    if len(rows) < 2:
        del drawings["walks"]
    yield from each(drawings)


def _like(model: VariationalAutoencoder, images: Tensor) -> Tensor:
    return images.to(model.prior.sample(0))


def _bytes(model: VariationalAutoencoder, images: Tensor) -> np.ndarray:
    """Return images as bytes to look at; expected pixels of binary images keep their shades."""
    levels = model.likelihood.levels
    if levels == 2:
        images, levels = 255 * images, 256
    return shown(images, levels)
