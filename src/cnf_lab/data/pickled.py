"""Reads numbers from a pickle, a pandas frame or an array, without running anything that is in it.

A pickle is a program: it names functions, and unpickling calls them. Here no function is looked
up. Every name that numbers need becomes a record of what was asked for, any other name ends
the reading, and the numbers are then taken from the records. This reads the frames of pandas
0.14 to 3 alike, which pandas itself does not: names have moved since.
"""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cnf_lab.errors import DataError

# By package: the modules within pandas and numpy differ from version to version.
_ADMITTED = {
    "pandas": {
        "DataFrame",
        "BlockManager",
        "_unpickle_block",
        "new_block",
        "_new_Index",
        "Index",
        "Int64Index",
        "RangeIndex",
        "ArrowStringArray",
        "StringArray",
        "StringDtype",
        "__pyx_unpickle_NDArrayBacked",
    },
    "numpy": {"_reconstruct", "_frombuffer", "ndarray", "dtype"},
    "pyarrow": {"_restore_array", "type_for_alias", "py_buffer"},
    "builtins": {"slice", "bytearray"},
    "__builtin__": {"slice", "bytearray"},
    "_codecs": {"encode"},
    "functools": {"partial"},
}


def read_frame(path: Path) -> tuple[list[str], np.ndarray]:
    """Return the column names of a pickled frame and its columns, float64 of shape (columns, rows).

    Args:
        path: The pickle, written by pandas 0.14 or newer under Python 2 or 3.

    Returns:
        The names and the columns in the order of the frame.

    Raises:
        DataError: The file is no pickle of a frame of numbers.
    """
    with _reading("pandas frame", path) as file:
        return _columns(_Recorder(file).load())


def read_array(path: Path) -> np.ndarray:
    """Return a pickled numpy array of numbers, or that of a list which holds one.

    Args:
        path: The pickle, written by numpy under Python 2 or 3.

    Raises:
        DataError: The file is no pickle of an array of numbers.
    """
    with _reading("array", path) as file:
        loaded = _Recorder(file).load()
        return _array(loaded[0] if isinstance(loaded, list | tuple) else loaded)


@contextmanager
def _reading(kind: str, path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except Exception as error:  # a damaged or hostile pickle can fail in any way
        raise DataError(
            f"Expected a pickled {kind} of numbers at {path}, got {type(error).__name__}: {error}. "
            "Delete the file and start again, or place a whole copy there."
        ) from error


class _Record:
    """What a pickle asked to be called, with which arguments, and the state it asked to set."""

    args: tuple
    state: Any = None

    def __new__(cls, *args: Any) -> "_Record":
        record = super().__new__(cls)
        record.args = args
        return record

    def __call__(self, *args: Any) -> "_Record":
        # pandas 1.3 writes a partial, and calls it with the block.
        return type(self)(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def name(self) -> str:
        return type(self).__name__


class _Recorder(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")  # the text and the raw bytes of Python 2

    def find_class(self, module: str, name: str) -> type[_Record]:
        if name not in _ADMITTED.get(module.partition(".")[0], ()):
            raise pickle.UnpicklingError(f"a pickle that asks for {module}.{name}, which was not run")
        return type(name, (_Record,), {})


def _columns(frame: _Record) -> tuple[list[str], np.ndarray]:
    manager = frame.state["_mgr"] if "_mgr" in frame.state else frame.state["_data"]
    if manager.args:  # since pandas 1.3
        blocks, axes = manager.args
        blocks = [block.args[:2] for block in blocks]
    else:
        saved = manager.state[3]["0.14.1"]
        blocks, axes = [(block["values"], block["mgr_locs"]) for block in saved["blocks"]], saved["axes"]
    names = _names(axes[0].args[1]["data"])
    values = [(_positions(positions), _array(block)) for block, positions in blocks]
    columns = np.full((len(names), values[0][1].shape[1]), np.nan)
    for positions, block in values:
        columns[positions] = block
    return names, columns


def _names(data: _Record) -> list[str]:
    if data.name == "ArrowStringArray":
        kind, length, _, start, buffers = data.state["_pa_array"].args[0][:5]
        width = np.int64 if kind.args[0] == "large_string" else np.int32
        bounds = np.frombuffer(_raw(buffers[1]), width)[start : start + length + 1]
        text = _raw(buffers[2])
        return [text[a:b].decode() for a, b in zip(bounds, bounds[1:], strict=False)]
    if data.name == "__pyx_unpickle_NDArrayBacked":
        data = data.state[1]
    return [str(name) for name in data.state[4]]


def _array(record: _Record) -> np.ndarray:
    if record.name == "_frombuffer":
        raw, dtype, shape, order = record.args[:4]
        if order not in ("C", "F"):
            raise ValueError(f"an array in the order {order}")
    else:
        _, shape, dtype, is_fortran, raw = record.state
        order = "F" if is_fortran else "C"
    return np.frombuffer(_raw(raw), _dtype(dtype)).reshape(shape, order=order)


def _dtype(record: _Record) -> np.dtype:
    if not re.fullmatch("[fiu][1248]", record.args[0]):
        raise TypeError(f"numbers of the type {record.args[0]}")
    return np.dtype(record.args[0]).newbyteorder(record.state[1])


def _positions(record: _Record) -> slice | np.ndarray:
    return slice(*record.args) if record.name == "slice" else _array(record)


def _raw(value: Any) -> bytes | bytearray:
    """Undo the ways in which protocols and versions of Python write bytes."""
    if isinstance(value, str):
        return value.encode("latin1")
    if isinstance(value, _Record):
        return _raw(value.args[0])
    return value
