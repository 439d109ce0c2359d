r"""The five tabular benchmarks of density estimation, prepared as MAF prepared them.

All reported nats are nats of the *standardised* columns: the log-determinant of the
standardisation is not part of the published numbers. Which rows and which divisor enter the
standard deviations therefore decides whether numbers can be compared, and each of MAF's
choices is repeated here, the odd ones too.

References:
    Papamakarios, Pavlakou & Murray (2017), Masked Autoregressive Flow for Density Estimation,
    appendix D. Data: https://doi.org/10.5281/zenodo.1161203
"""

import warnings
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np

from cnf_lab.data.base import ArrayRows, FlowDataModule, Splits
from cnf_lab.data.download import RemoteFile, extract, fetch
from cnf_lab.data.pickled import read_frame
from cnf_lab.errors import DataError

#: The files of all five data sets, 819 MB.
ARCHIVE = RemoteFile(
    path="data.tar.gz",
    urls=(
        "https://zenodo.org/record/1161203/files/data.tar.gz?download=1",
        "https://zenodo.org/records/1161203/files/data.tar.gz?download=1",
    ),
    checksum="md5:9b9c9b0375315ad270eba4ce80c093ab",
)

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


class MafDataModule(FlowDataModule):
    """A data set of MAF's archive.

    Its files are looked for below the data folder as they are named in the archive, with or
    without the archive's leading ``data/``; those that are missing are unpacked from the
    archive, which is downloaded for them unless it has been placed in the data folder by hand.

    Args:
        name: Name of the data set in folders and reports.
        root: The data folder.
        batch_size: Rows per training step and process.
        evaluation_batch_size: Rows per evaluation step and process.
        allow_partial: Whether files with other sizes than the published ones are taken; every
            number then says so.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; rows in memory need none.
        seed: Seed of the order of rows. The splits do not depend on it.
        download: Whether missing files are downloaded.

    Raises:
        DataError: Files are missing, damaged or of another size than the published ones.
    """

    #: Files of the data set below the data folder.
    members: ClassVar[tuple[str, ...]]
    #: Published rows of train, validation and test.
    published: ClassVar[tuple[int, int, int]]
    #: Published columns after the preprocessing.
    columns: ClassVar[int]
    #: The only file, where it can be had without the archive.
    alone: ClassVar[RemoteFile | None] = None

    def __init__(
        self,
        name: str,
        root: str,
        batch_size: int,
        evaluation_batch_size: int,
        allow_partial: bool = False,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        download: bool = True,
    ) -> None:
        super().__init__(name, batch_size, evaluation_batch_size, steps_per_epoch, num_workers, seed)
        self.root = Path(root).expanduser()
        self.allow_partial, self.download = allow_partial, download
        self._width = self.columns
        self._names: list[str] | None = None

    @abstractmethod
    def preprocess(self, *files: Path) -> Parts:
        """Read the files, named in :attr:`members`, and return train, validation and test rows."""

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self._width,)

    @property
    def column_names(self) -> list[str] | None:
        return self._names

    def load(self) -> Splits:
        files = self._files()
        parts = self.preprocess(*files)
        self._width = parts[0].shape[1]
        self._compare_with_published(parts, files)
        for split, part in zip(Splits._fields, parts, strict=True):
            if not np.isfinite(part).all():
                raise _damaged(files[-1], f"NaN or infinity in the {split} rows")
        return Splits(*(ArrayRows(np.ascontiguousarray(part, dtype=np.float32)) for part in parts))

    def _files(self) -> list[Path]:
        if missing := [member for member in self.members if self._find(member) is None]:
            self._obtain(missing)
        return [self._find(member) or self.root / member for member in self.members]

    def _find(self, member: str) -> Path | None:
        candidates = (self.root / member, self.root / "data" / member)
        return next((path for path in candidates if path.is_file()), None)

    def _obtain(self, missing: list[str]) -> None:
        reasons = []
        if self.alone is not None and not (self.root / ARCHIVE.path).is_file():
            try:
                fetch(self.alone, self.root, self.download)
                return
            except DataError as error:
                reasons.append(str(error))
        try:
            archive = fetch(ARCHIVE, self.root, self.download)
        except DataError as error:
            reasons.append(str(error))
            files = " and ".join(missing)
            raise DataError(
                f"Expected {files} in dataset.root={self.root}, got no such file. {' Or: '.join(reasons)}"
            ) from error
        extract(archive, {f"data/{member}": self.root / member for member in missing})

    def _compare_with_published(self, parts: Parts, files: list[Path]) -> None:
        found = tuple(len(part) for part in parts)
        if found == self.published and self._width == self.columns:
            return
        if not self.allow_partial:
            raise DataError(
                f"Expected {_sizes(self.published, self.columns)} in {' and '.join(map(str, files))}, got "
                f"{_sizes(found, self._width)}. Place the whole published files there (they are in "
                f"{ARCHIVE.urls[0]}), or type dataset.allow_partial=true."
            )
        columns = "" if self._width == self.columns else f", {self._width} instead of {self.columns} columns"
        self.notes.append(
            f"{self.name}: {sum(found):,} of {sum(self.published):,} rows{columns} (allow_partial); "
            "numbers are not comparable with published ones"
        )


class Power(MafDataModule):
    """POWER: one household's electric power consumption by the minute, six columns.

    1. The rows are shuffled by ``RandomState(42)``, although they are a time series.
    2. Global intensity and global reactive power are dropped.
    3. The same generator draws uniform noise as wide as the columns' resolution, in this
       order: voltage 0.01, global active power 0.001, the three sub-meterings 1. The file's
       time of day already carries its noise.
    4. The last tenth is the test split, the last tenth of the rest the validation split.
    5. Mean and population standard deviation (ddof 0) come from train and validation together.
    """

    members = ("power/data.npy",)
    published = (1_659_917, 184_435, 204_928)
    columns = 6

    def preprocess(self, *files: Path) -> Parts:
        meters = ["sub_metering_1", "sub_metering_2", "sub_metering_3"]
        self._names = ["global_active_power", "voltage", *meters, "time"]
        stored = _read_npy(files[0], columns=8)
        rng = np.random.RandomState(42)
        # Shuffling row numbers draws the same order as shuffling the rows in place, and far faster.
        order = np.arange(len(stored))
        rng.shuffle(order)
        rows = stored[:, [0, 2, 4, 5, 6, 7]].astype(np.float64, copy=False)[order]
        rows[:, 1] += 0.01 * rng.rand(len(rows))
        rows[:, 0] += 0.001 * rng.rand(len(rows))
        rows[:, 2:5] += rng.rand(len(rows), 3)
        return _split_and_standardise(rows)


class Gas(MafDataModule):
    """GAS: sensors in a mixture of ethylene and carbon monoxide in air, eight columns.

    1. The file is a random quarter of the rows in random order; it is not shuffled again.
    2. The concentrations and the time (Meth, Eth, Time) are dropped.
    3. As long as there are columns that correlate above 0.98 with another one, the first of
       them is dropped. Strong negative correlations do not count.
    4. Mean and sample standard deviation (ddof 1) come from *all* rows, test rows included: a
       mild leak, kept because every published number has it.
    5. The last tenth is the test split, the last tenth of the rest the validation split.
    """

    members = ("gas/ethylene_CO.pickle",)
    published = (852_174, 94_685, 105_206)
    columns = 8

    def preprocess(self, *files: Path) -> Parts:
        names, stored = read_frame(files[0])
        dropped = ("Meth", "Eth", "Time")
        if missing := [name for name in dropped if name not in names]:
            raise DataError(
                f"Expected the columns {', '.join(dropped)} in {files[0]}, got none named "
                f"{', '.join(missing)}. Delete the file and start again, or place the published one there."
            )
        sensors = [position for position, name in enumerate(names) if name not in dropped]
        kept = [sensors[position] for position in _uncorrelated(stored[sensors])]
        self._names = [names[position] for position in kept]
        rows = np.ascontiguousarray(stored[kept].T)
        _standardise([rows], rows, ddof=1)
        return _split_tail(rows)


class Hepmass(MafDataModule):
    """HEPMASS: particle collisions, the signal at mass 1000, 21 columns.

    1. Only rows with label 1 are kept, and the label is dropped.
    2. The test file has a stray last column, which is dropped: its columns are those of the
       train file.
    3. Mean and sample standard deviation (ddof 1) come from the train file, validation rows
       included.
    4. Columns in which the *smallest* standardised train value occurs more than five times
       are dropped. The idea was to drop columns in which any value recurs often; what was
       published counts the smallest one.
    5. The last tenth of the train file is the validation split; nothing is shuffled.
    """

    members = ("hepmass/1000_train.csv", "hepmass/1000_test.csv")
    published = (315_123, 35_013, 174_987)
    columns = 21

    def preprocess(self, *files: Path) -> Parts:
        names, train = _read_signal(files[0])
        _, test = _read_signal(files[1], names)
        _standardise([train, test], train, ddof=1)
        kept = np.count_nonzero(train == train.min(axis=0), axis=0) <= 5
        self._names = [name for name, keep in zip(names, kept, strict=True) if keep]
        return *_hold_out(train[:, kept]), test[:, kept]


class Miniboone(MafDataModule):
    """MINIBOONE: electron neutrino events of a particle detector, 43 columns.

    1. The file is already free of background events, of eleven outliers and of columns with
       recurring values; it is not shuffled.
    2. The last tenth is the test split, the last tenth of the rest the validation split.
    3. Mean and population standard deviation (ddof 0) come from train and validation together.
    """

    members = ("miniboone/data.npy",)
    published = (29_556, 3_284, 3_648)
    columns = 43
    alone = RemoteFile(
        path="miniboone/data.npy",
        urls=("https://raw.githubusercontent.com/EmoryMLIP/OT-Flow/master/data/miniboone/data.npy",),
        checksum="git:9737c80fa84df483ed368404e3110c324613d54c",
        size=12_551_952,
    )

    def preprocess(self, *files: Path) -> Parts:
        stored = _read_npy(files[0], columns=43)
        return _split_and_standardise(np.array(stored, dtype=np.float64))


class Bsds300(MafDataModule):
    """BSDS300: 8×8 patches of natural photographs, 63 columns, taken as stored.

    The file holds gray patches with uniform dequantisation noise, divided by 256, freed of
    their mean and of the last pixel, which the others determine then. They are not
    standardised, hence the large log-densities.
    """

    members = ("BSDS300/BSDS300.hdf5",)
    published = (1_000_000, 50_000, 250_000)
    columns = 63

    def preprocess(self, *files: Path) -> Parts:
        import h5py

        try:
            with h5py.File(files[0]) as file:
                train, val, test = (file[group].astype(np.float32)[:] for group in ("train", "validation", "test"))
        except (OSError, KeyError, AttributeError) as error:
            raise _damaged(files[0], error) from error
        return train, val, test


# -- steps of the preprocessing -------------------------------------------------------------


def _hold_out(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut off the last tenth, rounded down."""
    kept = len(rows) - int(0.1 * len(rows))
    return rows[:kept], rows[kept:]


def _split_tail(rows: np.ndarray) -> Parts:
    """Cut off the last tenth for the test split, then the last tenth of the rest for validation."""
    rest, test = _hold_out(rows)
    return *_hold_out(rest), test


def _split_and_standardise(rows: np.ndarray) -> Parts:
    _standardise([rows], _hold_out(rows)[0], ddof=0)
    return _split_tail(rows)


def _standardise(parts: list[np.ndarray], fitted: np.ndarray, ddof: int) -> None:
    """Subtract the mean of some rows and divide by their standard deviation, in place."""
    with np.errstate(invalid="ignore"):  # infinities are named below
        mean, deviation = fitted.mean(axis=0), fitted.std(axis=0, ddof=ddof)
    if not (varies := np.isfinite(deviation) & (deviation > 0)).all():
        raise DataError(
            f"Expected columns of finite numbers that vary, got columns {np.flatnonzero(~varies).tolist()} "
            f"that do not, in {len(fitted):,} rows. Place the published file under dataset.root."
        )
    for part in parts:
        part -= mean
        part /= deviation


def _uncorrelated(columns: np.ndarray) -> list[int]:
    """Drop the first column that correlates above 0.98 with another, until there is none."""
    with np.errstate(invalid="ignore"):  # a constant column correlates with none
        close = np.corrcoef(columns) > 0.98
    kept = list(range(len(columns)))
    while crowded := [position for position in kept if close[position, kept].sum() > 1]:
        kept.remove(crowded[0])
    return kept


# -- reading --------------------------------------------------------------------------------


def _read_npy(path: Path, columns: int) -> np.ndarray:
    try:
        stored = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, error) from error
    if stored.ndim != 2 or stored.shape[1] != columns:
        raise _damaged(path, f"the shape {stored.shape} instead of (rows, {columns})")
    return stored


def _read_signal(path: Path, names: list[str] | None = None) -> tuple[list[str], np.ndarray]:
    """Read the rows with label 1, without the label, and the columns with these names or all."""
    import pandas as pd

    try:
        with warnings.catch_warnings():
            # Rows may have a field more than the header names; MAF dropped it unseen.
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            frame = pd.read_csv(path, index_col=False, dtype=np.float64)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    names = names or list(frame.columns[1:])
    if missing := [name for name in names if name not in frame.columns]:
        raise _damaged(path, f"no columns named {', '.join(missing)}")
    signal = frame[frame.columns[0]].to_numpy() == 1
    return names, frame[names].to_numpy()[signal]


def _damaged(path: Path, reason: object) -> DataError:
    text = str(reason).split("\n")[0]
    return DataError(
        f"Expected the published file at {path}, got {text}. Delete it and start again, or place a whole copy there."
    )


def _sizes(rows: tuple[int, ...], columns: int) -> str:
    train, val, test = rows
    return f"{sum(rows):,} rows ({train:,} train, {val:,} validation, {test:,} test) of {columns} columns"
