"""The user's own rows: one interface to .npy, .npz, .csv and .parquet files.

.npy files are memory-mapped and .parquet files are read by row group, so both may be larger
than memory. .npz and .csv files are read whole; write a large .csv as .parquet.
"""

import csv
import re
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnf_lab.errors import ConfigError, DataError


class Table(ABC):
    """Rows of numbers under named columns, in a file.

    Args:
        path: The file.
        column_names: Names in the order of the file; numbers from 0 where it has no names.
        text_columns: Columns that hold no numbers, with a word on what they hold.
        named: Whether the file itself names its columns.
    """

    #: First row of each group that is cheap to read as a whole; None where any row is.
    group_starts: np.ndarray | None = None

    def __init__(self, path: Path, column_names: Sequence[str], text_columns: dict[str, str], named: bool) -> None:
        self.path, self.column_names, self.text_columns = path, list(column_names), text_columns
        self.named = named

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def dtype(self, columns: Sequence[int]) -> np.dtype:
        """Return float32 where it holds these columns' values exactly, else float64."""

    @abstractmethod
    def read(self, rows: np.ndarray, columns: Sequence[int]) -> np.ndarray:
        """Return rows by number, in the order asked for, as (rows, columns)."""

    def chunks(self, columns: Sequence[int]) -> Iterator[np.ndarray]:
        """Go through all rows in order, up to 100,000 at a time and fewer of many columns."""
        size = int(np.clip(2**23 // max(1, len(columns)), 1, 100_000))
        for start in range(0, len(self), size):
            yield self.read(np.arange(start, min(start + size, len(self))), columns)


class ArrayTable(Table):
    """An array in memory, or memory-mapped: only the rows asked for are read.

    Args:
        path: The file.
        array: Values with shape (rows, columns).
        column_names: Names of the columns; None numbers them.
        text_columns: Columns that hold no numbers, with a word on what they hold.
    """

    def __init__(
        self,
        path: Path,
        array: np.ndarray,
        column_names: Sequence[str] | None = None,
        text_columns: dict[str, str] | None = None,
    ) -> None:
        _check_array(path, array)
        names = map(str, range(array.shape[1])) if column_names is None else column_names
        super().__init__(path, list(names), text_columns or {}, named=column_names is not None)
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def dtype(self, columns: Sequence[int]) -> np.dtype:
        return _float_type(self.array.dtype)

    def read(self, rows: np.ndarray, columns: Sequence[int]) -> np.ndarray:
        return np.array(self.array[np.ix_(rows, np.asarray(columns))], dtype=self.dtype(columns))

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file would be pickled whole into every worker process.
        mapped = isinstance(self.array, np.memmap)
        return self.__dict__ | ({"array": None} if mapped else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        if state["array"] is None:
            self.array = _map_npy(self.path)


class ParquetTable(Table):
    """A parquet file, of which the row groups last used are held in memory.

    Args:
        path: The file.
    """

    #: Row groups held. Batches of a stream that goes group by group touch the end of one and
    #: the start of the next.
    held = 2

    def __init__(self, path: Path) -> None:
        self.metadata = _damage_named(path, _parquet_metadata, path)
        self.schema = self.metadata.schema.to_arrow_schema()
        # Pandas stores its index as a column of such a name; it holds row labels, not data.
        names = [name for name in self.schema.names if not re.fullmatch(r"__index_level_\d+__", name)]
        if len(set(names)) < len(names):
            raise DataError(
                f"Expected each column of {path} to have its own name, got {', '.join(names)}. Rename some."
            )
        texts = {name: str(self.schema.field(name).type) for name in names if self._number_type(name) is None}
        super().__init__(path, names, texts, named=True)
        sizes = [self.metadata.row_group(group).num_rows for group in range(self.metadata.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self.group_starts = np.unique(self._starts[:-1])
        self._groups: OrderedDict[tuple[int, tuple[int, ...]], np.ndarray] = OrderedDict()
        _check_size(path, len(self), len(names))

    def __len__(self) -> int:
        return self.metadata.num_rows

    def dtype(self, columns: Sequence[int]) -> np.dtype:
        types = [self._number_type(self.column_names[column]) for column in columns]
        return _float_type(np.result_type(*(kind for kind in types if kind is not None), np.float32))

    def read(self, rows: np.ndarray, columns: Sequence[int]) -> np.ndarray:
        values = np.empty((len(rows), len(columns)), dtype=self.dtype(columns))
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        # In order of appearance, so that the group where a batch ends is still held for the next.
        for group in dict.fromkeys(groups.tolist()):
            chosen = groups == group
            values[chosen] = self._group(group, tuple(columns))[rows[chosen] - self._starts[group]]
        return values

    def _group(self, number: int, columns: tuple[int, ...]) -> np.ndarray:
        key = (number, columns)
        if key not in self._groups:
            while len(self._groups) >= self.held:
                self._groups.popitem(last=False)
            self._groups[key] = _damage_named(self.path, self.read_group, number, columns)
        self._groups.move_to_end(key)
        return self._groups[key]

    def read_group(self, number: int, columns: Sequence[int]) -> np.ndarray:
        """Read one row group from the file as (rows, columns); missing values become NaN."""
        import pyarrow
        import pyarrow.parquet

        dtype, names = self.dtype(columns), [self.column_names[column] for column in columns]
        # Opened anew each time: a handle can be shared neither with a forked process nor pickled.
        with pyarrow.parquet.ParquetFile(self.path, metadata=self.metadata) as file:
            group = file.read_row_group(number, columns=names)
        kind = pyarrow.from_numpy_dtype(dtype)
        return np.stack([group[name].cast(kind, safe=False).to_numpy() for name in names], axis=1)

    def _number_type(self, name: str) -> np.dtype | None:
        import pyarrow

        kind = self.schema.field(name).type
        if pyarrow.types.is_decimal(kind):
            return np.dtype(np.float64)
        plain = (
            pyarrow.types.is_integer(kind),
            pyarrow.types.is_floating(kind),
            pyarrow.types.is_boolean(kind),
        )
        return np.dtype(kind.to_pandas_dtype()) if any(plain) else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_groups": OrderedDict()}


# -- opening --------------------------------------------------------------------------------------


def open_table(path: str, key: str | None = None) -> Table:
    """Open a file of rows; the ending of its name decides how.

    Args:
        path: A .npy, .npz, .csv or .parquet file.
        key: Name of the array in a .npz file that holds several.

    Raises:
        ConfigError: If the ending is unknown, or key is missing or names no array.
        DataError: If the file is missing, empty, damaged, or holds something else than rows of numbers.
    """
    openers = {".npy": _open_npy, ".npz": _open_npz, ".csv": _open_csv, ".parquet": _open_parquet}
    file = Path(path).expanduser()
    opener = openers.get(file.suffix.lower())
    if opener is None:
        raise ConfigError(
            f"Expected a file of rows that ends in {', '.join(openers)}, got {path}. "
            "Write the rows in one of these forms."
        )
    if not file.is_file():
        raise DataError(f"Expected a file of rows, got {path}, which is no file. Check the path.")
    return opener(file, key)


def _open_npy(path: Path, key: str | None) -> Table:
    return ArrayTable(path, _map_npy(path))


def _map_npy(path: Path) -> np.ndarray:
    return _damage_named(path, np.lib.format.open_memmap, path, "r")


def _open_npz(path: Path, key: str | None) -> Table:
    with _damage_named(path, np.lib.npyio.NpzFile, path) as file:
        names = list(file.files)
        if key is None and len(names) == 1:
            key = names[0]
        if key not in names:
            raise ConfigError(
                f"Expected key to name one of the arrays of {path}, got {key or 'null'}. "
                f"Choose one of {', '.join(names) or 'another file'}."
            )
        return ArrayTable(path, _damage_named(path, file.__getitem__, key))


def _open_csv(path: Path, key: str | None) -> Table:
    import pandas as pd

    frame, named = _damage_named(path, _read_csv, path)
    _check_size(path, *frame.shape)
    texts = {}
    for name in [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name].dtype)]:
        numbers = pd.to_numeric(frame[name], errors="coerce")
        wrong = frame[name][numbers.isna() & frame[name].notna()]
        if len(wrong):
            texts[str(name)] = repr(str(wrong.iloc[0])[:30])
        frame[name] = numbers
    names = [str(name) for name in frame.columns] if named else None
    return ArrayTable(path, frame.to_numpy(dtype=np.float64), names, texts)


def _read_csv(path: Path) -> tuple[Any, bool]:
    # The frame, and whether the file names its columns. A first line of numbers is a row, except
    # for 0, 1, 2, ..., which is how pandas writes a frame without names. A first line that
    # begins with an empty cell is how it writes row labels, which are no data.
    import pandas as pd

    with path.open(encoding="utf-8-sig", newline="") as file:
        line = file.readline()
    delimiter = max(",;\t", key=line.count)
    cells = [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    filled = [cell for cell in cells if cell]
    named = filled == list(map(str, range(len(filled)))) or not all(map(_is_number, filled))
    labelled = named and len(cells) > 1 and not cells[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            frame = pd.read_csv(
                path,
                sep=delimiter,
                header=0 if named else None,
                index_col=0 if labelled else False,
                skipinitialspace=True,
                low_memory=False,
            )
        except pd.errors.ParserWarning as error:  # pandas would drop the last cells of each row
            raise ValueError("rows are longer than the header") from error
    return frame, named


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _open_parquet(path: Path, key: str | None) -> Table:
    return ParquetTable(path)


def _parquet_metadata(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path)


def _damage_named(path: Path, read: Any, *arguments: Any, **options: Any) -> Any:
    # Every library has its own errors for a damaged file.
    import zipfile

    known = (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile)
    try:
        return read(*arguments, **options)
    except known as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"Expected {path} to be a whole {path.suffix} file of numbers, got an error on reading it: "
            f"{cause.rstrip('.')}. Write the file again."
        ) from error


def _check_array(path: Path, array: np.ndarray) -> None:
    if array.dtype.kind not in "biuf":
        raise DataError(f"Expected numbers in {path}, got dtype {array.dtype}. Write them as float32 or float64.")
    if array.ndim != 2:
        raise DataError(
            f"Expected {path} to have the shape (rows, columns), got {array.shape}. "
            "Reshape it, for one column with array[:, None]."
        )
    _check_size(path, *array.shape)


def _check_size(path: Path, rows: int, columns: int) -> None:
    if rows == 0 or columns == 0:
        raise DataError(f"Expected rows and columns in {path}, got {rows} x {columns}. Use another file.")


def _float_type(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32 if np.can_cast(dtype, np.float32) else np.float64)
