"""A folder of the user's own pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnf_lab.data.images import ImageDataModule
from cnf_lab.errors import ConfigError, DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_MODES = {1: "L", 3: "RGB"}
_GRAY = ("L", "1", "LA")  # Pillow's modes of pictures without colour
_DEEP = ("I", "I;16", "I;16B", "I;16L", "F")  # more than 8 bits


class ImageFolder(ImageDataModule):
    """The pictures below a folder, with a seeded split into training, validation and test.

    Args:
        name: Name of the data set in folders and reports.
        path: The folder; folders in it are searched too.
        batch_size: Images per training step and process.
        evaluation_batch_size: Images per evaluation step and process.
        size: Height and width; pictures are cut to this aspect ratio around their centre, and resized.
            None takes the pictures as they are, which must then be of one size.
        channels: 1 for gray, 3 for colour; None takes what the pictures are, which must then be all gray
            or all in colour.
        val_images: Images of the validation split, a number or a fraction of all.
        test_images: Likewise of the test split.
        limit: At most so many training images; None for all. Numbers then say so.
        val_limit: Likewise of the validation split.
        test_limit: Likewise of the test split.
        flip: Whether training images are mirrored left to right at random.
        split_seed: Seed of the splits.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; images in memory need none.
        seed: Seed of the order of images and of the mirroring.

    Raises:
        ConfigError: If an option is out of range or the folder does not exist.
        DataError: If pictures are damaged or differ from one another.
    """

    def __init__(
        self,
        name: str,
        path: str | None,
        batch_size: int,
        evaluation_batch_size: int,
        size: Sequence[int] | None = None,
        channels: int | None = None,
        val_images: int | float = 0.1,
        test_images: int | float = 0.1,
        limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        flip: bool = False,
        split_seed: int = 0,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            name,
            batch_size,
            evaluation_batch_size,
            val_images,
            test_images,
            limit,
            val_limit,
            test_limit,
            flip,
            split_seed,
            steps_per_epoch,
            num_workers,
            seed,
        )
        if path is None or not Path(path).expanduser().is_dir():
            raise ConfigError(f"Expected a folder of pictures, got {path}. Type dataset.path=<folder>.")
        if channels not in (None, *_MODES):
            raise ConfigError(f"Expected dataset.channels of 1, 3 or null, got {channels}. Type dataset.channels=3.")
        if size is not None and not _is_size(size):
            raise ConfigError(f"Expected dataset.size of a height and a width, got {size}. Type dataset.size=[32,32].")
        self.path, self.size, self.channels = Path(path).expanduser(), size, channels

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Read all pictures, in the order of their names."""
        paths = sorted(path for path in self.path.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if len(paths) < 3:
            raise DataError(
                f"Expected at least 3 pictures ({', '.join(SUFFIXES)}) below {self.path}, got {len(paths)}. "
                "Type dataset.path=<another folder>."
            )
        pictures = [read_picture(path, self.channels, self.size) for path in paths]
        for path, picture in zip(paths, pictures, strict=True):
            self._check_alike(paths[0], pictures[0], path, picture)
        return np.stack(pictures), None

    def _check_alike(self, first: Path, expected: np.ndarray, path: Path, picture: np.ndarray) -> None:
        if picture.shape == expected.shape:
            return
        gray = len(picture) == 1
        if len(picture) != len(expected):
            kinds = ("gray", "in colour") if gray else ("in colour", "gray")
            raise DataError(
                f"Expected pictures that are all gray or all in colour, got {path} {kinds[0]} and {first} {kinds[1]}. "
                "Type dataset.channels=1 or dataset.channels=3."
            )
        sizes = [f"{shape[1]}x{shape[2]}" for shape in (picture.shape, expected.shape)]
        raise DataError(
            f"Expected pictures of one size, got {path} of {sizes[0]} and {first} of {sizes[1]} (height x width). "
            "Type dataset.size=[32,32]."
        )


def read_picture(path: Path, channels: int | None, size: Sequence[int] | None) -> np.ndarray:
    """Read a picture as uint8 (channels, height, width).

    Args:
        path: The file; of an animation its first frame is taken.
        channels: 1 for gray, 3 for colour, None for what it is.
        size: Height and width, or None for its own.

    Raises:
        DataError: If it is damaged, has more than 8 bits per channel, or is partly transparent.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened).copy()  # cameras turn pictures by a note
    except Exception as error:  # a damaged file can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _refused(path, reason, "Replace or remove it.") from error
    if picture.mode in _DEEP:
        raise _refused(path, f"one of mode {picture.mode}", "Convert it to 8 bits.")
    transparent = "A" in picture.getbands() or "transparency" in picture.info
    if transparent and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
        raise _refused(path, "one with transparent pixels", "Put it on a background.")
    converted = picture.convert(_MODES[channels or (1 if picture.mode in _GRAY else 3)])
    if size is not None:
        converted = ImageOps.fit(converted, (size[1], size[0]), Image.Resampling.LANCZOS)
    pixels = np.asarray(converted)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _is_size(size: Any) -> bool:
    pair = isinstance(size, Sequence) and len(size) == 2
    return pair and all(isinstance(side, int) and side >= 1 for side in size)


def _refused(path: Path, found: str, advice: str) -> DataError:
    return DataError(f"Expected a picture of 8 bits per channel at {path}, got {found}. {advice}")
