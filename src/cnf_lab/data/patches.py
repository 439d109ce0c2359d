r"""Patches of natural photographs, cut from the Berkeley segmentation data set (BSDS300).

They are made as the 63-column rows of the benchmark file were, from the photographs
themselves: other draws of the same density, with a seed, in any number.
"""

from pathlib import Path

import numpy as np

from cnf_lab.data.base import ArrayRows, FlowDataModule, Splits
from cnf_lab.data.download import RemoteFile, extract, fetch
from cnf_lab.errors import ConfigError, DataError

#: The 300 photographs. No checksum was published: their number and shapes are checked instead.
ARCHIVE = RemoteFile(
    path="bsds300/BSDS300-images.tgz",
    urls=(
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/segbench/BSDS300-images.tgz",
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/BSDS300-images.tgz",
    ),
)
SPLITS = ("auto", "published", "by_photograph")

_PUBLISHED = {"train": 200, "test": 100}
_SHAPES = ((321, 481), (481, 321))
_SIDE = 8
_CHUNK = 1 << 16  # patches that are in float64 at once


class Bsds300Patches(FlowDataModule):
    r"""Gray 8×8 patches of photographs, 63 columns.

    .. math:: x = \left(I - \tfrac{1}{64} 1 1^\top\right) \frac{u + \epsilon}{256},
        \qquad u \in \{0..255\}^{64}, \quad \epsilon \sim \mathcal{U}[0, 1)^{64}

    without the last (bottom-right) pixel, which the others determine. Gray is Pillow's ``L``:
    (299 R + 587 G + 114 B) / 1000 of the decoded JPEG. Photograph, row and column of a patch are
    uniform. Rows are not standardised.

    The splits are by photograph, never by patch: overlapping patches of one photograph in
    training and test would be the same pixels. The generator is numpy's frozen
    ``RandomState``, so that the same photographs give the same patches on every machine.

    Args:
        name: Name of the data set in folders and reports.
        root: The data folder; the photographs are its ``bsds300/images/train/*.jpg`` (or
            ``BSDS300/images``, or ``images``) and those of the folder ``test`` beside it.
        batch_size: Rows per training step and process.
        evaluation_batch_size: Rows per evaluation step and process.
        split: ``published`` takes the test patches from the folder of test photographs, and
            training and validation patches from the other one; ``by_photograph`` takes all three from
            the training photographs; ``auto`` is ``published`` where the test photographs are there.
        train_images: Photographs of the training split, a number or a fraction of those in
            the folder; None means the rest.
        val_images: Photographs of the validation split, likewise; None means a tenth.
        test_images: Photographs of the test split, likewise; None means all test photographs,
            or a tenth with ``by_photograph``.
        train_patches: Patches of the training split.
        val_patches: Patches of the validation split.
        test_patches: Patches of the test split.
        patch_seed: Seed of the split, the places and the noise; apart from ``seed``, so that runs
            with different seeds are tested on the same rows.
        allow_partial: Whether fewer photographs than the published 200 and 100 are taken;
            every number then says so.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; rows in memory need none.
        seed: Seed of the order of rows.
        download: Whether missing photographs are downloaded.

    Raises:
        ConfigError: The numbers of photographs do not fit together.
        DataError: Photographs are missing or damaged.

    References:
        Martin, Fowlkes, Tal & Malik (2001), A Database of Human Segmented Natural Images.
        Uria, Murray & Larochelle (2013), RNADE, section 5.2 (the recipe of the patches).
    """

    def __init__(
        self,
        name: str,
        root: str,
        batch_size: int,
        evaluation_batch_size: int,
        split: str = "auto",
        train_images: int | float | None = None,
        val_images: int | float | None = None,
        test_images: int | float | None = None,
        train_patches: int = 1_000_000,
        val_patches: int = 50_000,
        test_patches: int = 250_000,
        patch_seed: int = 0,
        allow_partial: bool = False,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        download: bool = True,
    ) -> None:
        super().__init__(name, batch_size, evaluation_batch_size, steps_per_epoch, num_workers, seed)
        if split not in SPLITS:
            raise ConfigError(f"Expected dataset.split of {', '.join(SPLITS)}, got {split}. Type dataset.split=auto.")
        counts = {"train_patches": train_patches, "val_patches": val_patches, "test_patches": test_patches}
        for option, value in counts.items():
            if value < 1:
                raise ConfigError(f"Expected dataset.{option} of at least 1, got {value}. Type dataset.{option}=50000.")
        if patch_seed < 0:
            raise ConfigError(
                f"Expected dataset.patch_seed of at least 0, got {patch_seed}. Type dataset.patch_seed=0."
            )
        self.root, self.split_by = Path(root).expanduser(), split
        self.images = (train_images, val_images, test_images)
        self.patches = tuple(counts.values())
        self.patch_seed, self.allow_partial, self.download = patch_seed, allow_partial, download

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (_SIDE * _SIDE - 1,)

    def load(self) -> Splits:
        parts = zip(self._photographs(), self.patches, strict=True)
        return Splits(
            *(
                ArrayRows(cut_patches([read_gray(path) for path in paths], count, [self.patch_seed, number]))
                for number, (paths, count) in enumerate(parts)
            )
        )

    def _photographs(self) -> tuple[list[Path], list[Path], list[Path]]:
        """Choose the photographs of train, validation and test."""
        folder = self._folder()
        pool, apart = (sorted((folder / part).glob("*.jpg")) for part in _PUBLISHED)
        published = self.split_by == "published" or (self.split_by == "auto" and len(apart) > 0)
        self._check_number(folder / "train", len(pool))
        if published:
            self._check_number(folder / "test", len(apart))
        else:
            self.notes.append(
                f"{self.name}: test patches come from held-out training photographs (by_photograph); "
                "numbers are not comparable with published ones"
            )
        rng = np.random.RandomState([self.patch_seed, len(Splits._fields)])
        pool, apart = ([paths[place] for place in rng.permutation(len(paths))] for paths in (pool, apart))
        total, tenth = len(pool), max(1, len(pool) // 10)
        train_images, val_images, test_images = self.images
        val, pool = _take("val_images", pool, val_images, total, tenth)
        if published:
            test, _ = _take("test_images", apart, test_images, len(apart), len(apart))
        else:
            test, pool = _take("test_images", pool, test_images, total, tenth)
        train, _ = _take("train_images", pool, train_images, total, len(pool))
        return train, val, test

    def _folder(self) -> Path:
        """Return the folder with the folders ``train`` and ``test``, after a download if it is missing."""
        first = self.root / "bsds300" / "images"
        for folder in (first, self.root / "BSDS300" / "images", self.root / "images"):
            if any((folder / "train").glob("*.jpg")):
                return folder
        extract(fetch(ARCHIVE, self.root, self.download), {"BSDS300/images": first})
        return first

    def _check_number(self, folder: Path, found: int) -> None:
        expected = _PUBLISHED[folder.name]
        if found == expected:
            return
        if found == 0 or not self.allow_partial:
            advice = "dataset.allow_partial=true" if found else "dataset.split=by_photograph"
            raise DataError(
                f"Expected {expected} photographs (*.jpg) in {folder}, got {found}. Place them all there "
                f"(they are in {ARCHIVE.urls[0]}), or type {advice}."
            )
        self.notes.append(
            f"{self.name}: {found} of {expected} {folder.name} photographs (allow_partial); "
            "numbers are not comparable with published ones"
        )


def _take(
    option: str, pool: list[Path], asked: int | float | None, total: int, default: int
) -> tuple[list[Path], list[Path]]:
    """Divide photographs into the number that an option asks for and the rest."""
    number = default if asked is None else round(asked * total) if isinstance(asked, float) else asked
    if not 1 <= number <= len(pool):
        raise ConfigError(
            f"Expected dataset.{option} of 1 to {len(pool)} photographs (those left) or a fraction of all "
            f"{total}, got {number if asked is None else asked}. Type dataset.{option}=null for the default."
        )
    return pool[:number], pool[number:]


def read_gray(path: Path) -> np.ndarray:
    """Read a photograph of the data set as gray levels, uint8 of shape (321, 481) or (481, 321).

    Args:
        path: The JPEG.

    Returns:
        The gray levels.

    Raises:
        DataError: The file is damaged or of another shape.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            gray = np.asarray(image.convert("L"))
    except (OSError, ValueError, SyntaxError) as error:
        raise _damaged(path, str(error).split("\n")[0]) from error
    if gray.shape not in _SHAPES:
        raise _damaged(path, f"one of {gray.shape[0]} by {gray.shape[1]} pixels")
    return gray


def _damaged(path: Path, found: str) -> DataError:
    return DataError(
        f"Expected a photograph of 321 by 481 or 481 by 321 pixels at {path}, got {found}. "
        f"Replace it by the original (in {ARCHIVE.urls[0]}), or delete the folder to download all again."
    )


def cut_patches(photographs: list[np.ndarray], count: int, seed: list[int]) -> np.ndarray:
    """Cut patches at uniform places, dequantise them and remove mean and last pixel.

    Args:
        photographs: Gray levels, uint8 of any shapes of at least 8 by 8.
        count: Number of patches.
        seed: Seed of places and noise.

    Returns:
        Patches, float32 of shape (count, 63).
    """
    rng = np.random.RandomState(seed)
    heights, widths = np.array([photograph.shape for photograph in photographs]).T
    starts = np.cumsum(heights * widths) - heights * widths
    pixels = np.concatenate([photograph.ravel() for photograph in photographs])
    which = rng.randint(len(photographs), size=count, dtype=np.int64)
    top = rng.randint(heights[which] - _SIDE + 1, dtype=np.int64)
    left = rng.randint(widths[which] - _SIDE + 1, dtype=np.int64)
    corner, stride = starts[which] + top * widths[which] + left, widths[which]
    within = np.arange(_SIDE)
    patches = np.empty((count, _SIDE * _SIDE - 1), dtype=np.float32)
    for first in range(0, count, _CHUNK):
        chunk = slice(first, first + _CHUNK)
        rows = corner[chunk, None] + stride[chunk, None] * within  # (chunk, 8)
        levels = pixels[rows[:, :, None] + within].reshape(len(rows), -1)  # (chunk, 64)
        values = (levels + rng.random_sample(levels.shape)) / 256
        values -= values.mean(axis=1, keepdims=True)
        patches[chunk] = values[:, :-1]
    return patches
