r"""Images with whole-number pixels: published sets read by torchvision, and scikit-learn's digits.

Batches hold the pixels as they are, floats with values 0..L-1; what makes a density of them
(dequantisation, logit) belongs to the flow. Files lie below the data folder in torchvision's own
layout; one that is missing is downloaded, and its checksum is compared before anything reads it:
CIFAR-10's batches are pickles.
"""

import gzip
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cnf_lab.data.base import ArrayRows, Batch, FlowDataModule, Rows, Splits
from cnf_lab.data.download import RemoteFile, extract, fetch
from cnf_lab.errors import ConfigError, DataError


class FlippedRows(Dataset[Batch]):
    """Images of which every one is mirrored left to right with probability 1/2, each time anew.

    Args:
        rows: The images.
        seed: Seed of the choices.
    """

    def __init__(self, rows: Rows, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = self.rows.__getitems__(indices)
        # By the numbers of the batch, which differ from pass to pass, and not by a running state:
        # a resumed run meets the same choices.
        rng = np.random.default_rng([self.seed, *map(int, indices)])
        mirrored = torch.from_numpy(rng.random(len(batch.x)) < 0.5).reshape(-1, 1, 1, 1)
        return Batch(torch.where(mirrored, batch.x.flip(-1), batch.x), batch.context)


class PixelDataModule(FlowDataModule):
    """Images (channels, height, width) with whole-number pixels, all in memory.

    Args:
        name: Name of the data set in folders and reports.
        batch_size: Images per training step and process.
        evaluation_batch_size: Images per evaluation step and process.
        limit: At most so many training images; None for all. Numbers then say so.
        val_limit: Likewise of the validation split.
        test_limit: Likewise of the test split.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; images in memory need none.
        seed: Seed of the order of images and of what is drawn for them.

    Raises:
        ConfigError: If a number is out of range.
    """

    #: Number L of values of a pixel.
    levels: int = 256

    def __init__(
        self,
        name: str,
        batch_size: int,
        evaluation_batch_size: int,
        limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(name, batch_size, evaluation_batch_size, steps_per_epoch, num_workers, seed)
        self.limits = {"train": limit, "val": val_limit, "test": test_limit}
        for split, value in self.limits.items():
            option = "limit" if split == "train" else f"{split}_limit"
            if value is not None and value < 1:
                raise ConfigError(
                    f"Expected dataset.{option} of at least 1, got {value}. Type dataset.{option}=null for all."
                )
        self._shape: tuple[int, ...] | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Channels, height and width; known after :meth:`setup`."""
        if self._shape is None:
            self.setup()
        assert self._shape is not None
        return self._shape

    def _limited(self, images: np.ndarray, order: np.ndarray, split: str) -> ArrayRows:
        self._shape = tuple(images.shape[1:])
        limit = self.limits[split]
        if limit is not None and limit < len(order):
            self.notes.append(
                f"{self.name}: {limit:,} of {len(order):,} {split} images (limit); "
                "numbers are not comparable with those of the whole set"
            )
            order = order[:limit]
        return ArrayRows(images, indices=order)


class ImageDataModule(PixelDataModule):
    r"""Images of which the validation split is cut by a seed of its own.

    So are test images where the set has none: nothing is ever selected on published test images.

    Args:
        name: Name of the data set in folders and reports.
        batch_size: Images per training step and process.
        evaluation_batch_size: Images per evaluation step and process.
        val_images: Images of the validation split, a number or a fraction of the training images.
        test_images: Likewise of the test split, where the set has no test images of its own.
        limit: At most so many training images; None for all. Numbers then say so.
        val_limit: Likewise of the validation split.
        test_limit: Likewise of the test split.
        flip: Whether training images are mirrored left to right at random.
        split_seed: Seed of the splits; apart from ``seed``, so that every run is tested on the same images.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; images in memory need none.
        seed: Seed of the order of images and of the mirroring.

    Raises:
        ConfigError: If a number is out of range.
        DataError: If files are missing or damaged.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        evaluation_batch_size: int,
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
        sizes = (batch_size, evaluation_batch_size, limit, val_limit, test_limit)
        super().__init__(name, *sizes, steps_per_epoch, num_workers, seed)
        self.val_images, self.test_images = val_images, test_images
        self.flip, self.split_seed = flip, split_seed

    @abstractmethod
    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Read training and test images, uint8 (images, channels, height, width); None where all are training."""

    def load(self) -> Splits:
        """Read the images and cut the splits."""
        images, test = self.read()
        order = np.random.RandomState(self.split_seed).permutation(len(images))
        val, order = self._cut("val_images", order, self.val_images, len(images))
        if test is None:
            held, order = self._cut("test_images", order, self.test_images, len(images))
            tested = self._limited(images, held, "test")
        else:
            tested = self._limited(test, np.arange(len(test)), "test")
        train: Rows = self._limited(images, order, "train")
        if self.flip:
            train = FlippedRows(train, self.seed)
        return Splits(train, self._limited(images, val, "val"), tested)

    def _cut(self, option: str, order: np.ndarray, asked: int | float, total: int) -> tuple[np.ndarray, np.ndarray]:
        number = round(asked * total) if isinstance(asked, float) else asked
        if not 1 <= number < len(order):
            raise ConfigError(
                f"Expected dataset.{option} of 1 to {len(order) - 1} images or a fraction of the {total}, got {asked}. "
                f"Type dataset.{option}=0.1."
            )
        return order[:number], order[number:]


class Digits(ImageDataModule):
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels with 17 levels; nothing to download."""

    levels = 17

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Read the digits; all are training images."""
        from sklearn.datasets import load_digits

        return load_digits().images[:, None].astype(np.uint8), None


class PublishedImages(ImageDataModule):
    """A published set with test images of its own, below a data folder.

    Args:
        name: Name of the data set in folders and reports.
        root: The data folder.
        batch_size: Images per training step and process.
        evaluation_batch_size: Images per evaluation step and process.
        val_images: Images of the validation split, a number or a fraction of the training images.
        limit: At most so many training images; None for all. Numbers then say so.
        val_limit: Likewise of the validation split.
        test_limit: Likewise of the test split.
        flip: Whether training images are mirrored left to right at random.
        split_seed: Seed of the splits.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; images in memory need none.
        seed: Seed of the order of images and of the mirroring.
        download: Whether missing files are downloaded.

    Raises:
        ConfigError: If a number is out of range.
        DataError: If files are missing or damaged.
    """

    def __init__(
        self,
        name: str,
        root: str,
        batch_size: int,
        evaluation_batch_size: int,
        val_images: int | float,
        limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        flip: bool = False,
        split_seed: int = 0,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        download: bool = True,
    ) -> None:
        super().__init__(
            name,
            batch_size,
            evaluation_batch_size,
            val_images,
            limit=limit,
            val_limit=val_limit,
            test_limit=test_limit,
            flip=flip,
            split_seed=split_seed,
            steps_per_epoch=steps_per_epoch,
            num_workers=num_workers,
            seed=seed,
        )
        self.root, self.download = Path(root).expanduser(), download

    def _fetch(self, *files: RemoteFile) -> list[Path]:
        return [fetch(file, self.root, self.download) for file in files]


def _idx(folder: str, addresses: Sequence[str], checksums: Sequence[str]) -> tuple[RemoteFile, ...]:
    """Return the four files of MNIST and its like."""
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    files = [f"{name}-ubyte.gz" for name in names]
    return tuple(
        RemoteFile(f"{folder}/raw/{file}", tuple(address + file for address in addresses), f"md5:{checksum}")
        for file, checksum in zip(files, checksums, strict=True)
    )


class Mnist(PublishedImages):
    """MNIST: 60,000 + 10,000 gray images of 28×28 pixels, in ``MNIST/raw/*.gz``."""

    files = _idx(
        "MNIST",
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "http://yann.lecun.com/exdb/mnist/",
        ),
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    )

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Read the four files."""
        return read_mnist(self.files, self.root, self.download)


class FashionMnist(Mnist):
    """Fashion-MNIST: 60,000 + 10,000 gray images of 28×28 pixels, in ``FashionMNIST/raw/*.gz``."""

    files = _idx(
        "FashionMNIST",
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    )


class Cifar10(PublishedImages):
    """CIFAR-10: 50,000 + 10,000 colour images of 32×32 pixels, in ``cifar-10-batches-py`` or its archive.

    With ``allow_partial`` a file ``cifar10/*.npz`` with some of the training images (``x``, uint8) will
    do where the set is not there; test images are then cut from it, and every number says so.

    Args:
        name: Name of the data set in folders and reports.
        root: The data folder.
        batch_size: Images per training step and process.
        evaluation_batch_size: Images per evaluation step and process.
        val_images: Images of the validation split, a number or a fraction of the training images.
        limit: At most so many training images; None for all. Numbers then say so.
        val_limit: Likewise of the validation split.
        test_limit: Likewise of the test split.
        flip: Whether training images are mirrored left to right at random.
        split_seed: Seed of the splits.
        allow_partial: Whether a part of the images will do.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; images in memory need none.
        seed: Seed of the order of images and of the mirroring.
        download: Whether missing files are downloaded.

    Raises:
        ConfigError: If a number is out of range.
        DataError: If files are missing or damaged.
    """

    archive = RemoteFile(
        "cifar-10-python.tar.gz",
        ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
        "md5:c58f30108f718f92721af3b95e74349a",
        170_498_071,
    )

    def __init__(
        self,
        name: str,
        root: str,
        batch_size: int,
        evaluation_batch_size: int,
        val_images: int | float,
        limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        flip: bool = True,
        split_seed: int = 0,
        allow_partial: bool = False,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        download: bool = True,
    ) -> None:
        sizes = (batch_size, evaluation_batch_size, val_images, limit, val_limit, test_limit)
        super().__init__(name, root, *sizes, flip, split_seed, steps_per_epoch, num_workers, seed, download)
        self.allow_partial = allow_partial

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Read the batches, whose checksums torchvision compares before it unpickles them."""
        folder = self.root / "cifar-10-batches-py"
        parts = sorted((self.root / "cifar10").glob("*.npz"))
        if self.allow_partial and parts and not folder.is_dir() and not (self.root / self.archive.path).is_file():
            return self._part(parts[0]), None
        datasets = torchvision_datasets()
        if not folder.is_dir():
            extract(self._fetch(self.archive)[0], {folder.name: folder})
        try:
            sets = [datasets.CIFAR10(str(self.root), train=train) for train in (True, False)]
        except RuntimeError as error:
            raise DataError(
                f"Expected the batches of CIFAR-10 with their published checksums in {folder}, got others. Delete the "
                f"folder to have them unpacked again from {self.archive}, in {self.root}."
            ) from error
        train, test = (part.data.transpose(0, 3, 1, 2) for part in sets)
        return train, test

    def _part(self, path: Path) -> np.ndarray:
        images = read_array_of(path, "x", "Replace the file, or type dataset.allow_partial=false.")
        check_pixels(images, (3, 32, 32), 256, path)
        self.notes.append(
            f"{self.name}: {len(images):,} of 50,000 training images, from which the test images are cut too "
            "(allow_partial); numbers are not comparable with published ones"
        )
        return images


class Svhn(PublishedImages):
    """SVHN: 73,257 + 26,032 colour images of 32×32 pixels, in ``train_32x32.mat`` and ``test_32x32.mat``."""

    files = tuple(
        RemoteFile(f"{split}_32x32.mat", (f"http://ufldl.stanford.edu/housenumbers/{split}_32x32.mat",), checksum)
        for split, checksum in (
            ("train", "md5:e26dedcc434d2e4c54c9b2d4a06d8373"),
            ("test", "md5:eb5a983be6a315427106f1b164d9cef3"),
        )
    )

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Read both files."""
        datasets = torchvision_datasets()
        self._fetch(*self.files)
        train, test = (datasets.SVHN(str(self.root), split=split).data for split in ("train", "test"))
        return train, test


def read_mnist(files: Sequence[RemoteFile], root: Path, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return training and test images of MNIST or its like, uint8 (images, 1, height, width).

    They are unpacked into a scratch folder, for the data folder may be one to read only.

    Args:
        files: The four files.
        root: The data folder.
        download: Whether missing files are downloaded.
    """
    reader = getattr(torchvision_datasets(), files[0].path.split("/")[0])
    paths = [fetch(file, root, download) for file in files]
    with tempfile.TemporaryDirectory() as scratch:
        for path, file in zip(paths, files, strict=True):
            target = Path(scratch) / file.path.removesuffix(".gz")
            target.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        train, test = (reader(scratch, train=train).data.numpy()[:, None] for train in (True, False))
    return train, test


def torchvision_datasets() -> Any:
    """Return ``torchvision.datasets``, or say why it cannot be imported."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"Expected a torchvision that fits torch {torch.__version__}, got: {str(error).splitlines()[0]}. "
            "Both must come from one index: type make setup, or pip install --force-reinstall torch torchvision."
        ) from error
    return datasets


def read_array_of(path: Path, key: str | None, advice: str) -> np.ndarray:
    """Read an array of a .npy file, or of a .npz file by its name; without a name the first one.

    Args:
        path: The file.
        key: The name; None for the first.
        advice: What the user can do, for the message.

    Raises:
        DataError: If the file is missing or damaged, or holds no such array.
    """
    try:
        with path.open("rb") as file:  # which numpy leaves open where it fails
            loaded = np.load(file)
            return loaded if isinstance(loaded, np.ndarray) else loaded[key or loaded.files[0]]
    except Exception as error:  # a damaged file can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        named = "" if key is None else f" named {key}"
        raise DataError(f"Expected images{named} in a .npy or .npz file, got {path} ({reason}). {advice}") from error


def check_pixels(images: np.ndarray, event_shape: Sequence[int], levels: int, path: Path) -> None:
    """Refuse an array of anything but images of a shape with whole-number pixels."""
    if images.shape[1:] != tuple(event_shape):
        wanted = ", ".join(("images", *map(str, event_shape)))
        raise DataError(f"Expected images of shape ({wanted}) in {path}, got {images.shape}. Choose another file.")
    number = np.issubdtype(images.dtype, np.number)
    whole = number and len(images) > 0 and np.array_equal(images, np.round(images))
    if not whole or images.min() < 0 or images.max() >= levels:
        found = f"{images.min():g} to {images.max():g}, " if number and len(images) else f"{len(images)} images, "
        raise DataError(
            f"Expected pixels with whole numbers from 0 to {levels - 1} in {path}, got {found}{images.dtype}. "
            "Scale and round them."
        )


def read_images(path: str, event_shape: Sequence[int], levels: int, key: str | None = None) -> ArrayRows:
    """Open a file of images for a flow that was trained on others.

    Args:
        path: A .npy or .npz file with shape (images, channels, height, width), or its rows flattened.
        event_shape: Channels, height and width.
        levels: Number of values of a pixel.
        key: Name of the array in a .npz file that holds several.

    Raises:
        DataError: If the file is missing, damaged, or holds anything else.
    """
    file = Path(path).expanduser()
    images = read_array_of(file, key, "Type data=images.npy.")
    if images.ndim == 2 and images.shape[1] == int(np.prod(event_shape)):
        images = images.reshape(-1, *event_shape)
    check_pixels(images, event_shape, levels, file)
    return ArrayRows(images.astype(np.uint8) if levels <= 256 else images)
