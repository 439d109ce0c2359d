"""Choosing columns of a file of rows by name or number, and refusing those without a density."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np

from cnf_lab.data.readers import Table
from cnf_lab.errors import ConfigError, DataError

#: Columns with fewer distinct values than this are reported as discrete.
FEW_VALUES = 20


def find_columns(table: Table, chosen: Sequence[str | int], option: str) -> list[int]:
    """Return the positions of columns given by name or by number.

    Args:
        table: The file.
        chosen: Names, or numbers from 0; a name goes before a number.
        option: The option that they come from, for the error.

    Raises:
        ConfigError: If one is not a column of the file, or is given twice.
    """
    names, positions = table.column_names, []
    for column in map(str, chosen):
        if column in names:
            positions.append(names.index(column))
        elif column.isdecimal() and int(column) < len(names):
            positions.append(int(column))
        else:
            near = get_close_matches(column, names, n=3) or names[:10]
            raise ConfigError(
                f"Expected {option} to name columns of {table.path}, got {column}. "
                f"Type one of its {len(names)} columns, such as {', '.join(near)}."
            )
    if len(set(positions)) < len(positions):
        raise ConfigError(f"Expected {option} to name each column once, got {_listed(chosen)}. Remove the repetition.")
    return positions


def check_columns(table: Table, columns: Sequence[int], advice: str, varying: bool = True) -> dict[str, int]:
    """Go once through the columns, chunk by chunk; refuse what has no density.

    Args:
        table: The file.
        columns: Positions of the columns.
        advice: What to do about faults; ``{columns}`` becomes the list of the faulty ones.
        varying: Whether constant columns are faults.

    Returns:
        The columns with fewer than 20 distinct values among the first rows, and how many.

    Raises:
        DataError: If a column holds text, NaN or infinities, or is constant; it names all of them.
    """
    names = {column: table.column_names[column] for column in columns}
    faults = {name: f"text ({table.text_columns[name]})" for name in names.values() if name in table.text_columns}
    numbers = [column for column, name in names.items() if name not in faults]
    scan = _Scan(len(numbers))
    for chunk in table.chunks(numbers) if numbers else ():
        scan.add(chunk)
    found = {names[column]: scan.fault(position, varying) for position, column in enumerate(numbers)}
    faults |= {name: fault for name, fault in found.items() if fault is not None}
    if faults:
        shown = [f"column {name}: {fault}" for name, fault in list(faults.items())[:10]]
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise DataError(
            f"Expected finite{', varying' if varying else ''} numbers in every column of {table.path}, "
            f"got {'; '.join(shown)}{more}. {advice.format(columns=_listed(list(faults)))}"
        )
    return {name: count for name, count in zip(found, scan.distinct, strict=True) if count < scan.few}


class _Scan:
    # What one pass over the columns finds; rows are counted from 0.
    def __init__(self, columns: int) -> None:
        self.rows, self.few = 0, 0
        self.nan, self.infinite = np.zeros(columns, dtype=int), np.zeros(columns, dtype=int)
        self.first = np.full(columns, -1)
        self.low, self.high = np.full(columns, np.inf), np.full(columns, -np.inf)
        self.distinct: list[int] = []

    def add(self, chunk: np.ndarray) -> None:
        bad = ~np.isfinite(chunk)
        self.nan += np.isnan(chunk).sum(axis=0)
        self.infinite += np.isinf(chunk).sum(axis=0)
        self.first = np.where((self.first < 0) & bad.any(axis=0), self.rows + bad.argmax(axis=0), self.first)
        self.low = np.fmin(self.low, np.fmin.reduce(chunk, axis=0))
        self.high = np.fmax(self.high, np.fmax.reduce(chunk, axis=0))
        if self.rows == 0:
            self.distinct = [len(np.unique(column)) for column in chunk.T]
            self.few = min(FEW_VALUES, len(chunk))
        self.rows += len(chunk)

    def fault(self, column: int, varying: bool) -> str | None:
        counts = {"NaN": self.nan[column], "infinities": self.infinite[column]}
        kinds = " and ".join(kind for kind, count in counts.items() if count)
        if kinds:
            return f"{kinds} ({sum(counts.values())} values, the first in row {self.first[column]})"
        return f"only the value {self.low[column]:g}" if varying and self.low[column] == self.high[column] else None


def _listed(columns: Sequence[str | int]) -> str:
    # As Hydra reads them: names with anything but letters, digits and _ stand in quotes.
    quoted = (str(c) if re.fullmatch(r"\w+", str(c)) else f"'{c}'" for c in columns)
    return f"[{','.join(quoted)}]"
