"""The density of a picture: the darker a pixel, the more of the mass it holds."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cnf_lab.data.drawn import EXTENT, Distribution, DrawnDataModule, in_pieces
from cnf_lab.errors import ConfigError, DataError


class Picture(Distribution):
    r"""A mixture of Gaussians, one per pixel, weighted by how dark the pixel is.

    .. math:: p(x) \propto \sum_{ij} (\max I - I_{ij}) \, \mathcal{N}(x; c_{ij}, \mathrm{diag}(s_x^2, s_y^2)),

    with standard deviations of half a pixel. The picture stands upright in the plane. Differences
    from the FFJORD code (Grathwohl et al., 2019): the first row of pixels is at the top; the
    aspect ratio is kept, where theirs stretches every picture to the square; the centres
    :math:`c_{ij}` are those of pixels that tile the square, where theirs put the outermost centres
    on its edge; what is transparent counts as white.

    Args:
        weights: Weight of each pixel (height, width), not negative.
        stretch: Whether the picture fills the square; otherwise its longer side does.
    """

    #: Pixels on each side of a row that count: 12 standard deviations.
    reach = 6

    def __init__(self, weights: np.ndarray, stretch: bool = False) -> None:
        # First row at the bottom, so that the index grows with the coordinate.
        self.weights = weights[::-1] / weights.sum()
        self._cumulative = np.cumsum(self.weights)
        sides = np.array(weights.shape[::-1])
        self.corner = -EXTENT * (np.ones(2) if stretch else sides / sides.max())
        self.pixel = -2 * self.corner / sides

    def draw(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        index = np.searchsorted(self._cumulative, rng.random(rows) * self._cumulative[-1], side="right")
        position = np.stack(np.unravel_index(index, self.weights.shape)[::-1], axis=1)
        return self.corner + self.pixel * (position + 0.5 + rng.normal(0, 0.5, (rows, 2)))

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Return the log-density in nats (rows,); -inf where no pixel within 12 deviations has weight."""
        with np.errstate(divide="ignore"):
            return np.log(in_pieces(self._density, (x - self.corner) / self.pixel, (2 * self.reach + 1) ** 2))

    def _density(self, position: np.ndarray) -> np.ndarray:
        # Position is in pixels; a border of zero weight stands for all that lies outside.
        window = np.arange(-self.reach, self.reach + 1)
        nearest = np.floor(np.clip(position, -1e9, 1e9)).astype(int)
        column, row = nearest[:, :1] + window, nearest[:, 1:] + window  # (rows, window)
        height, width = self.weights.shape
        local = np.pad(self.weights, 1)[
            np.clip(row + 1, 0, height + 1)[:, :, None], np.clip(column + 1, 0, width + 1)[:, None, :]
        ]
        across, along = _kernel(position[:, :1] - column), _kernel(position[:, 1:] - row)
        return np.einsum("nij,ni,nj->n", local, along, across) / self.pixel.prod()

    @cached_property
    def entropy(self) -> float:
        """Differential entropy in nats, by quadrature with four points per pixel and axis."""
        height, width = self.weights.shape
        x, y = (np.arange(-self.reach, side + self.reach, 0.25)[:, None] for side in (width, height))
        across = self.weights @ _kernel(x - np.arange(width)).T  # (height, points)
        total = 0.0
        for part in np.array_split(y, max(1, len(x) * len(y) // 2**20)):
            density = _kernel(part - np.arange(height)) @ across
            total -= (density * np.log(np.maximum(density, 1e-300))).sum()
        return float(total / 4**2 + np.log(self.pixel.prod()))


def _kernel(distance: np.ndarray) -> np.ndarray:
    # Gaussian around a pixel's centre, half a pixel wide, from the distance to its corner.
    return np.exp(-2 * (distance - 0.5) ** 2) * np.sqrt(2 / np.pi)


def read_picture(path: str, invert: bool = False, max_side: int = 800) -> np.ndarray:
    """Read a picture as the weights of its pixels (height, width): the darkest weighs most.

    Args:
        path: File of any format that Pillow reads.
        invert: Whether the brightest pixel weighs most instead.
        max_side: Longer side in pixels above which a picture is made smaller.

    Raises:
        DataError: If the file is missing, no picture, or of a single shade.
    """
    from PIL import Image, ImageOps

    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"Expected dataset.path to be a picture, got no file {path}. Type dataset.path=cat.png.")
    try:
        with Image.open(file) as image:
            gray = _gray(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"Expected {path} to be a picture, got an error on reading it: {error}. Save it as a .png."
        ) from error
    gray.thumbnail((max_side, max_side), Image.Resampling.BOX)  # averages pixels, so it keeps the mass
    intensity = np.asarray(gray, dtype=np.float64)
    weights = intensity - intensity.min() if invert else intensity.max() - intensity
    if not weights.any():
        raise DataError(f"Expected a picture with at least two shades, got one shade in {path}. Use another one.")
    return weights


def _gray(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # more than 8 bits: only the differences matter
        return image.convert("F")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L")


class PictureDataModule(DrawnDataModule):
    """Rows drawn from the density of the user's picture.

    Args:
        name: Name of the data set in folders and reports.
        path: The picture.
        invert: Whether the brightest pixel weighs most, instead of the darkest.
        stretch: Whether the picture fills the square; otherwise its longer side does.
        max_side: Longer side in pixels above which a picture is made smaller.
        batch_size: Rows per training step and process.
        evaluation_batch_size: Rows per evaluation step and process.
        evaluation_rows: Rows of the validation split, and of the test split.
        steps_per_epoch: Training steps between two validations.
        num_workers: Worker processes of each loader; drawing needs none.
        seed: Seed of all rows.
    """

    def __init__(
        self,
        name: str,
        path: str | None,
        invert: bool = False,
        stretch: bool = False,
        max_side: int = 800,
        batch_size: int = 1000,
        evaluation_batch_size: int = 2000,
        evaluation_rows: int = 10_000,
        steps_per_epoch: int | None = 100,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(name, batch_size, evaluation_batch_size, evaluation_rows, steps_per_epoch, num_workers, seed)
        if max_side < 1:
            raise ConfigError(f"Expected dataset.max_side of at least 1, got {max_side}. Type dataset.max_side=800.")
        self.path, self.invert, self.stretch, self.max_side = path, invert, stretch, max_side

    @cached_property
    def distribution(self) -> Picture:
        """The picture's density, read when first asked for."""
        if self.path is None:
            raise ConfigError("Expected dataset.path to be a picture, got null. Type dataset.path=cat.png.")
        return Picture(read_picture(self.path, self.invert, self.max_side), self.stretch)
