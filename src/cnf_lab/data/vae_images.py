r"""The image sets of variational autoencoders: small, binary, or gray with one class per value.

Formats, splits and binarisation are those of the published comparisons. Files are checked against
their checksums before anything reads them; pickles and MATLAB files are then read without running
or building anything but arrays of numbers.

References:
    van den Berg et al., Sylvester normalizing flows for variational inference (2018) and its code,
    https://arxiv.org/abs/1803.05649, whose loaders Grathwohl et al., FFJORD (2019) took over.
    Burda et al., Importance weighted autoencoders (2016), https://arxiv.org/abs/1509.00519, for Omniglot.
    Larochelle & Murray, The neural autoregressive distribution estimator (2011), for static MNIST.
    Marlin et al., Inductive principles for restricted Boltzmann machine learning (2010), for the silhouettes.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from cnf_lab.data.base import Batch, Rows, Splits
from cnf_lab.data.download import RemoteFile, fetch
from cnf_lab.data.images import Mnist, PixelDataModule, check_pixels, read_array_of, read_mnist
from cnf_lab.data.pickled import read_array
from cnf_lab.errors import ConfigError, DataError

BINARISATIONS = ("static", "seeded", "dynamic")
_PIXELS = 28 * 28


class BinarisedRows(Dataset[Batch]):
    """Images whose pixels are 1 with the probability that is their gray value, drawn anew each time.

    Args:
        rows: Gray values in [0, 1].
        seed: Seed of the draws.
    """

    def __init__(self, rows: Rows, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = self.rows.__getitems__(indices)
        # By the numbers of the batch, which differ from pass to pass: a resumed run meets the same draws.
        rng = np.random.default_rng([self.seed, *map(int, indices)])
        drawn = torch.from_numpy(rng.random(batch.x.shape, dtype=np.float32))
        return Batch((drawn < batch.x).to(batch.x.dtype), batch.context)


class VaeImages(PixelDataModule):
    """A published set below a data folder, with splits of its own.

    Args:
        name: Name of the data set in folders and reports.
        root: The data folder.
        batch_size: Images per training step and process.
        evaluation_batch_size: Images per evaluation step and process.
        limit: At most so many training images; None for all. Numbers then say so.
        val_limit: Likewise of the validation split.
        test_limit: Likewise of the test split.
        split_seed: Seed of a split that is drawn; not ``seed``, so that every run is tested on the same images.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; images in memory need none.
        seed: Seed of the order of images and of what is drawn for them.
        download: Whether missing files are downloaded.

    Raises:
        ConfigError: If a number is out of range.
        DataError: If files are missing or damaged.
    """

    levels = 2

    def __init__(
        self,
        name: str,
        root: str,
        batch_size: int,
        evaluation_batch_size: int,
        limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        split_seed: int = 0,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        download: bool = True,
    ) -> None:
        sizes = (batch_size, evaluation_batch_size, limit, val_limit, test_limit)
        super().__init__(name, *sizes, steps_per_epoch, num_workers, seed)
        self.root, self.split_seed, self.download = Path(root).expanduser(), split_seed, download

    @abstractmethod
    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read training, validation and test images (images, 1, height, width).

        Whole numbers from 0 to L - 1; training images may be gray values in [0, 1] instead, to be
        binarised anew each time.
        """

    def load(self) -> Splits:
        """Read the splits; gray training images become rows that are drawn."""
        images = dict(zip(Splits._fields, self.read(), strict=True))
        train, val, test = (self._limited(part, np.arange(len(part)), split) for split, part in images.items())
        gray = images["train"].dtype == np.float32
        return Splits(BinarisedRows(train, self.seed) if gray else train, val, test)

    def _fetch(self, *files: RemoteFile) -> list[Path]:
        return [fetch(file, self.root, self.download) for file in files]

    def _shuffled(self, images: np.ndarray, *sizes: int) -> list[np.ndarray]:
        """Cut shuffled images into parts."""
        order = np.random.RandomState(self.split_seed).permutation(len(images))
        return np.split(images[order], np.cumsum(sizes)[:-1])


class BinaryMnist(VaeImages):
    """Binary MNIST, 28×28; 50,000 / 10,000 / 10,000 images.

    ``static`` is the published binarisation, in three text files. ``seeded`` binarises the gray
    images once, by a seed of its own, where those files cannot be had; ``dynamic`` draws training
    images anew each time, and the others once. Both of the latter take the last 10,000 training
    images for validation.

    Args:
        name: Name of the data set in folders and reports.
        root: The data folder.
        batch_size: Images per training step and process.
        evaluation_batch_size: Images per evaluation step and process.
        binarisation: ``static``, ``seeded`` or ``dynamic``.
        limit: At most so many training images; None for all. Numbers then say so.
        val_limit: Likewise of the validation split.
        test_limit: Likewise of the test split.
        split_seed: Seed of the binarisation that is drawn once.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; images in memory need none.
        seed: Seed of the order of images and of what is drawn for them.
        download: Whether missing files are downloaded.

    Raises:
        ConfigError: If an option is out of range.
        DataError: If files are missing or damaged.
    """

    published = tuple(
        RemoteFile(
            f"binarized_mnist/binarized_mnist_{split}.amat",
            (f"http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/binarized_mnist_{split}.amat",),
        )
        for split in ("train", "valid", "test")
    )
    rows = (50_000, 10_000, 10_000)
    gray = Mnist.files

    def __init__(
        self,
        name: str,
        root: str,
        batch_size: int,
        evaluation_batch_size: int,
        binarisation: str = "static",
        limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        split_seed: int = 777,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        download: bool = True,
    ) -> None:
        sizes = (batch_size, evaluation_batch_size, limit, val_limit, test_limit)
        super().__init__(name, root, *sizes, split_seed, steps_per_epoch, num_workers, seed, download)
        if binarisation not in BINARISATIONS:
            raise ConfigError(
                f"Expected dataset.binarisation to be one of {', '.join(BINARISATIONS)}, got {binarisation}. "
                "Type dataset.binarisation=static."
            )
        self.binarisation = binarisation

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read the published binarisation, or make one."""
        if self.binarisation == "static":
            try:
                paths = self._fetch(*self.published)
            except DataError as error:
                raise DataError(f"{error} Or type dataset.binarisation=seeded, for one of our own.") from error
            train, val, test = (_amat(path, rows) for path, rows in zip(paths, self.rows, strict=True))
            return train, val, test
        pixels, tested = read_mnist(self.gray, self.root, self.download)
        cut = len(pixels) * self.rows[0] // (self.rows[0] + self.rows[1])
        gray = [_shares(part) for part in (pixels[:cut], pixels[cut:], tested)]
        self.notes.append(
            f"{self.name}: binarised by seed {self.split_seed}, training images {self.binarisation}; "
            "numbers are close to those of the published binarisation, not the same"
        )
        drawn = _drawn(gray, self.split_seed)
        return (gray[0] if self.binarisation == "dynamic" else drawn[0]), drawn[1], drawn[2]


class Omniglot(VaeImages):
    """Omniglot, 28×28, binarised; 23,000 / 1,345 / 8,070 images.

    Training images are drawn from gray values anew each time; validation and test images are
    binarised once, with the seed of the published code. The published validation split depends on
    the seed of a run; ours on ``split_seed``.

    With ``allow_partial`` a file ``omniglot/*.npz`` with some images (``x``, uint8, ink bright)
    will do where the set is not there: it is cut in the published proportions, and every number says so.

    Args:
        name: Name of the data set in folders and reports.
        root: The data folder.
        batch_size: Images per training step and process.
        evaluation_batch_size: Images per evaluation step and process.
        limit: At most so many training images; None for all. Numbers then say so.
        val_limit: Likewise of the validation split.
        test_limit: Likewise of the test split.
        split_seed: Seed of the validation split.
        allow_partial: Whether some images will do.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; images in memory need none.
        seed: Seed of the order of images and of what is drawn for them.
        download: Whether missing files are downloaded.

    Raises:
        ConfigError: If a number is out of range.
        DataError: If files are missing or damaged.
    """

    file = RemoteFile(
        "omniglot/chardata.mat",
        ("https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat",),
        "git:016a3536ffe5e1d38e42563a18d7a78bfaf643ec",
    )
    rows = (23_000, 1_345, 8_070)
    binarisation_seed = 777  # of the published code

    def __init__(
        self,
        name: str,
        root: str,
        batch_size: int,
        evaluation_batch_size: int,
        limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        split_seed: int = 0,
        allow_partial: bool = False,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        download: bool = True,
    ) -> None:
        sizes = (batch_size, evaluation_batch_size, limit, val_limit, test_limit)
        super().__init__(name, root, *sizes, split_seed, steps_per_epoch, num_workers, seed, download)
        self.allow_partial = allow_partial

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read the published file, or a part of the images."""
        parts = sorted((self.root / "omniglot").glob("*.npz"))
        if self.allow_partial and parts and not (self.root / self.file.path).is_file():
            if len(parts) > 1:
                raise DataError(
                    f"Expected one file of images in {parts[0].parent}, got {', '.join(part.name for part in parts)}. "
                    "Move the others away."
                )
            train, val, test = self._part(parts[0])
        else:
            (path,) = self._fetch(self.file)
            table = _matrices(path, {"data": (_PIXELS, None), "testdata": (_PIXELS, None)})
            known, test = (_upright(table[key].T.astype(np.float32)) for key in ("data", "testdata"))
            share = self.rows[0] / (self.rows[0] + self.rows[1])
            train, val = self._shuffled(known, round(share * len(known)), len(known) - round(share * len(known)))
        val, test = _drawn((val, test), self.binarisation_seed)
        return train, val, test

    def _part(self, path: Path) -> list[np.ndarray]:
        images = read_array_of(path, "x", "Replace the file, or type dataset.allow_partial=false.")
        check_pixels(images, (28, 28), 256, path)
        self.notes.append(
            f"{self.name}: {len(images):,} of {sum(self.rows):,} images, with a split of our own (allow_partial); "
            "numbers are not comparable with published ones"
        )
        shares = np.array(self.rows[1:]) / sum(self.rows)
        val, test = (round(share * len(images)) for share in shares)
        return self._shuffled(_shares(images[:, None]), len(images) - val - test, val, test)


class FreyFaces(VaeImages):
    """Frey Faces, 28×20, 256 gray values; 1,565 / 200 / 200 images after a shuffle.

    Published numbers are means over the seeds 123, 231 and 321 of this shuffle.

    Args:
        name: Name of the data set in folders and reports.
        root: The data folder.
        batch_size: Images per training step and process.
        evaluation_batch_size: Images per evaluation step and process.
        limit: At most so many training images; None for all. Numbers then say so.
        val_limit: Likewise of the validation split.
        test_limit: Likewise of the test split.
        split_seed: Seed of the shuffle.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; images in memory need none.
        seed: Seed of the order of images.
        download: Whether missing files are downloaded.

    Raises:
        ConfigError: If a number is out of range.
        DataError: If files are missing or damaged.
    """

    levels = 256
    file = RemoteFile(
        "freyfaces/freyfaces.pkl",
        ("https://github.com/riannevdberg/sylvester-flows/raw/master/data/Freyfaces/freyfaces.pkl",),
        "sha256:3b69410c6a5fd6e03f09012905168be3712373a094a776f7e58fcd0670d2138a",
    )
    held_out = 200  # images of validation, and of test

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read the pickle, shuffle, and cut."""
        (path,) = self._fetch(self.file)
        images = read_array(path)
        if images.ndim != 2 or images.shape[1] != 560 or images.dtype != np.uint8:
            raise DataError(
                f"Expected an array (images, 560) of uint8 in {path}, got {images.shape} of {images.dtype}. "
                "Replace the file."
            )
        images = images.reshape(-1, 1, 28, 20)
        held = min(self.held_out, len(images) // 4)
        train, val, test = self._shuffled(images, len(images) - 2 * held, held, held)
        return train, val, test


class Caltech101Silhouettes(VaeImages):
    """Caltech 101 Silhouettes, 28×28, objects 1 on 0; 4,100 / 2,264 / 2,307 images.

    Where only the file with all images is at hand, ``caltech101_silhouettes_28.mat``, it is
    shuffled by ``split_seed`` and cut into as many, and every number says so.

    Args:
        name: Name of the data set in folders and reports.
        root: The data folder.
        batch_size: Images per training step and process.
        evaluation_batch_size: Images per evaluation step and process.
        limit: At most so many training images; None for all. Numbers then say so.
        val_limit: Likewise of the validation split.
        test_limit: Likewise of the test split.
        split_seed: Seed of a split of our own.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; images in memory need none.
        seed: Seed of the order of images.
        download: Whether missing files are downloaded.

    Raises:
        ConfigError: If a number is out of range.
        DataError: If files are missing or damaged.
    """

    published = RemoteFile(
        "caltech101_silhouettes/caltech101_silhouettes_28_split1.mat",
        ("https://people.cs.umass.edu/~marlin/data/caltech101_silhouettes_28_split1.mat",),
        "md5:4483e9c14b188fd09937f9ea6f9ea777",
    )
    whole = RemoteFile(
        "caltech101_silhouettes/caltech101_silhouettes_28.mat",
        ("https://people.cs.umass.edu/~marlin/data/caltech101_silhouettes_28.mat",),
        "md5:1432d2809e8bf111f1104a234731ddb1",
    )
    rows = (4_100, 2_264, 2_307)

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read the published split, or cut one from all images."""
        if (self.root / self.whole.path).is_file() and not (self.root / self.published.path).is_file():
            (path,) = self._fetch(self.whole)
            images = _silhouettes(_matrices(path, {"X": (None, _PIXELS)})["X"], path)
            self.notes.append(
                f"{self.name}: a split of our own, seed {self.split_seed}, for only the unsplit file is at hand; "
                "numbers are not comparable with published ones"
            )
            train_share, val_share, _ = np.array(self.rows) / sum(self.rows)
            counts = round(train_share * len(images)), round(val_share * len(images))
            train, val, test = self._shuffled(images, *counts, len(images) - sum(counts))
        else:
            (path,) = self._fetch(self.published)
            keys = ("train_data", "val_data", "test_data")
            table = _matrices(path, {key: (None, _PIXELS) for key in keys})
            train, val, test = (_silhouettes(table[key], path) for key in keys)
        return train, val, test


def _amat(path: Path, rows: int) -> np.ndarray:
    """Return the images of a text file of zeros and ones, uint8 (rows, 1, 28, 28)."""
    digits = np.frombuffer(path.read_bytes().translate(None, b" \t\r\n"), dtype=np.uint8)
    if len(digits) != rows * _PIXELS or not np.isin(digits, (48, 49)).all():
        raise DataError(
            f"Expected {rows:,} lines of {_PIXELS} zeros and ones in {path}, got {len(digits):,} other characters in "
            "all. Delete the file to download it again, or type dataset.binarisation=seeded."
        )
    return (digits - 48).reshape(rows, 1, 28, 28)


def _matrices(path: Path, wanted: Mapping[str, tuple[int | None, int | None]]) -> dict[str, np.ndarray]:
    """Return matrices of numbers of a MATLAB file, of which nothing else is read."""
    from scipy.io import loadmat

    try:
        table = loadmat(path, variable_names=list(wanted), verify_compressed_data_integrity=True)
        found = {key: table[key] for key in wanted}
    except Exception as error:  # a damaged file can fail in any way
        reason = f"none named {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DataError(
            f"Expected the matrices {', '.join(wanted)} in {path}, got {reason}. Replace the file."
        ) from error
    for key, shape in wanted.items():
        fits = found[key].ndim == 2 and all(n in (None, m) for n, m in zip(shape, found[key].shape, strict=True))
        if not fits or found[key].dtype.kind not in "fiub":
            said = " x ".join("any" if n is None else str(n) for n in shape)
            raise DataError(
                f"Expected a matrix {key} of {said} numbers in {path}, got {found[key].shape} of {found[key].dtype}. "
                "Replace the file."
            )
    return found


def _silhouettes(matrix: np.ndarray, path: Path) -> np.ndarray:
    """Return silhouettes bright on dark, uint8; in the file they are dark on bright."""
    check_pixels(matrix, (_PIXELS,), 2, path)
    return _upright(1 - matrix.astype(np.uint8))


def _upright(rows: np.ndarray) -> np.ndarray:
    """Return images of rows in MATLAB's order, column after column."""
    return np.ascontiguousarray(rows.reshape(-1, 1, 28, 28).swapaxes(2, 3))


def _shares(pixels: np.ndarray) -> np.ndarray:
    """Return bytes as gray values in [0, 1]."""
    return pixels.astype(np.float32) / 255


def _drawn(gray: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Binarise gray values, one array after the other from one seed."""
    rng = np.random.RandomState(seed)
    return [rng.binomial(1, part.clip(0, 1)).astype(np.uint8) for part in gray]
