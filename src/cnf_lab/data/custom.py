"""The user's own rows as a data set, with columns to model and columns to condition on."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from cnf_lab.data.base import Batch, FlowDataModule, Splits, as_tensor
from cnf_lab.data.columns import check_columns, find_columns
from cnf_lab.data.readers import Table, open_table
from cnf_lab.errors import ConfigError, DataError

Columns = str | int | Sequence[str | int]


class TableRows(Dataset[Batch]):
    """Chosen rows and columns of a file, read when they are asked for.

    Args:
        table: The file.
        columns: Positions of the event's columns.
        context: Positions of the conditioning columns.
        indices: Row numbers that belong to this split, ascending; None means all of them.
    """

    def __init__(
        self,
        table: Table,
        columns: Sequence[int],
        context: Sequence[int] = (),
        indices: np.ndarray | None = None,
    ) -> None:
        self.table, self.indices = table, indices
        self.columns, self.context = list(columns), list(context)
        #: First row of each group that is cheap to read as a whole, counted within the split.
        self.group_starts = self._group_starts()

    def __len__(self) -> int:
        return len(self.table) if self.indices is None else len(self.indices)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = np.asarray(indices) if self.indices is None else self.indices[np.asarray(indices)]
        values = self.table.read(rows, self.columns + self.context)
        event = len(self.columns)
        return Batch(as_tensor(values[:, :event]), as_tensor(values[:, event:]) if self.context else None)

    def _group_starts(self) -> np.ndarray | None:
        starts = self.table.group_starts
        if starts is None or self.indices is None:
            return starts
        starts = np.unique(np.searchsorted(self.indices, starts))
        return starts[starts < len(self.indices)]


def read_rows(
    path: str,
    features: int,
    column_names: Sequence[str] | None = None,
    context_names: Sequence[str] | None = None,
    key: str | None = None,
) -> TableRows:
    """Open the rows of another file for a model that was trained on columns of these names.

    Columns are found by name, in any order and among others; columns without names by their
    numbers in the training file. Where a file has none of these, and as many columns as the
    model, they are taken in order: first the event's, then the conditioning ones.

    Args:
        path: A .npy, .npz, .csv or .parquet file.
        features: Number of columns of the event.
        column_names: Names of the event's columns; numbers, as text, for those of a file without
            names; None where the data set names none.
        context_names: Names of the conditioning columns.
        key: Name of the array in a .npz file that holds several.

    Raises:
        ConfigError: If the kind of file is unknown.
        DataError: If the file is missing or damaged, lacks a column, or holds text, NaN or infinities.
    """
    table = open_table(path, key)
    names = [*(column_names or map(str, range(features))), *(context_names or [])]
    columns = _matching(table, names)
    check_columns(table, columns, "Fill in the values, or leave out the rows.", varying=False)
    return TableRows(table, columns[:features], columns[features:])


def _matching(table: Table, names: list[str]) -> list[int]:
    present, count = table.column_names, len(table.column_names)
    numbered = all(map(str.isdecimal, names))
    # Numbers without a gap are all the columns there were: another count of them is an error,
    # where a file of named columns may hold more.
    whole = set(names) == set(map(str, range(len(names))))
    if whole and count == len(names):
        return list(map(int, names))
    if not whole and set(names) <= set(present):
        return [present.index(name) for name in names]
    if not whole and count == len(names) and (numbered or not table.named):
        return list(range(count))
    missing = [name for name in names if name not in present]
    if whole or not table.named:
        raise DataError(
            f"Expected {table.path} to have {len(names)} columns, got {count}. "
            "Give the columns of the training data, those to condition on last."
        )
    raise DataError(
        f"Expected {table.path} to have the columns {', '.join(names)}, got none named {', '.join(missing)}. "
        "Name the columns as in the training data."
    )


class CustomDataModule(FlowDataModule):
    r"""The rows of a file: p(x), or p(x \| context) where columns are named as context.

    Rows keep their own units and precision; a ``preprocess`` layer standardises them with its
    log-det counted. Splits that have no file of their own are taken from ``path``, at random or
    from its end: first training rows, then validation, then test. Rows are read when they are
    needed, so a .npy or .parquet file may be larger than memory.

    Args:
        name: Name of the data set in folders and reports.
        path: A .npy, .npz, .csv or .parquet file.
        val_path: File of the validation rows; None takes them from path.
        test_path: File of the test rows; None takes them from path.
        key: Name of the array in a .npz file that holds several.
        columns: Columns to model, by name or number; None means all of them.
        drop_columns: Columns to leave out.
        context: Columns to condition on.
        val_fraction: Share of the rows of path for validation, where val_path is None.
        test_fraction: Share of the rows of path for the test, where test_path is None.
        shuffle: Whether the rows of path are split at random instead of in order.
        batch_size: Rows per training step and process.
        evaluation_batch_size: Rows per evaluation step and process.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; each reads row groups for itself.
        seed: Seed of the order of rows.
        split_seed: Seed of the split, apart from ``seed``: runs with other seeds are tested on the same rows.
    """

    def __init__(
        self,
        name: str,
        path: str | None,
        val_path: str | None = None,
        test_path: str | None = None,
        key: str | None = None,
        columns: Columns | None = None,
        drop_columns: Columns = (),
        context: Columns = (),
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        shuffle: bool = True,
        batch_size: int = 1000,
        evaluation_batch_size: int = 1000,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(name, batch_size, evaluation_batch_size, steps_per_epoch, num_workers, seed)
        for option, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 <= fraction < 1:
                raise ConfigError(f"Expected dataset.{option} in [0, 1), got {fraction}. Type dataset.{option}=0.1.")
        self.split_seed = split_seed
        self.path, self.val_path, self.test_path, self.key = path, val_path, test_path, key
        self.columns = None if columns is None else _as_list(columns)
        self.drop_columns, self.context = _as_list(drop_columns), _as_list(context)
        self.val_fraction, self.test_fraction, self.shuffle = val_fraction, test_fraction, shuffle
        self._column_names: list[str] = []
        self._context_names: list[str] = []

    def load(self) -> Splits:
        """Open the file, check its columns in one pass, and split its rows."""
        if self.path is None:
            raise ConfigError(
                "Expected dataset.path to be a file of rows, got null. "
                "Type dataset.path=rows.csv, or a .npy, .npz or .parquet file."
            )
        table = open_table(self.path, self.key)
        event, context = self._choose(table)
        advice = "Type dataset.drop_columns={columns}, or fill in the values."
        distinct = check_columns(table, event + context, advice)
        self._column_names = [table.column_names[column] for column in event]
        self._context_names = [table.column_names[column] for column in context]
        self._note_discrete(distinct)
        train, val, test = (TableRows(table, event, context, indices) for indices in self._indices(len(table)))
        return Splits(train, self._own(self.val_path, val), self._own(self.test_path, test))

    def _choose(self, table: Table) -> tuple[list[int], list[int]]:
        columns = self.columns if self.columns is not None else table.column_names
        chosen = find_columns(table, columns, "dataset.columns")
        dropped = find_columns(table, self.drop_columns, "dataset.drop_columns")
        context = find_columns(table, self.context, "dataset.context")
        both = [table.column_names[column] for column in context if column in dropped]
        if both:
            raise ConfigError(
                f"Expected dataset.context and dataset.drop_columns to have no column in common, got "
                f"{', '.join(both)} in both. Remove it from one of them."
            )
        event = [column for column in chosen if column not in (*dropped, *context)]
        if not event:
            raise ConfigError(
                "Expected at least one column to model, got none left by dataset.columns, drop_columns "
                "and context. Remove a column from dataset.drop_columns or dataset.context."
            )
        return event, context

    def _note_discrete(self, distinct: dict[str, int]) -> None:
        columns = [f"{name} ({distinct[name]})" for name in self._column_names if name in distinct]
        if columns:
            self.notes.append(
                f"Columns with few distinct values: {', '.join(columns)}. The density of a discrete column "
                "has no bound: add noise as wide as its steps, or name it in dataset.context."
            )

    def _indices(self, rows: int) -> list[np.ndarray]:
        order = np.arange(rows)
        if self.shuffle:
            # Not the generator of any pass over the rows, whose seeds are (seed, pass).
            order = np.random.default_rng([self.split_seed, 0, 1]).permutation(order)
        test = 0 if self.test_path else _share(rows, self.test_fraction)
        val = 0 if self.val_path else _share(rows, self.val_fraction)
        # Ascending within each part, so that evaluation goes through a file from start to end.
        return [np.sort(part) for part in np.split(order, [max(0, rows - test - val), max(0, rows - test)])]

    def _own(self, path: str | None, rows: TableRows) -> TableRows:
        if path is None:
            return rows
        return read_rows(path, len(self._column_names), self._column_names, self._context_names, self.key)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The number of columns to model."""
        assert self.splits
        return (len(self._column_names),)

    @property
    def context_features(self) -> int:
        """The number of columns to condition on."""
        return len(self.context)

    @property
    def column_names(self) -> list[str]:
        """Names of the columns to model; numbers, as text, where the file has no names."""
        assert self.splits
        return list(self._column_names)

    @property
    def context_names(self) -> list[str] | None:
        """Names of the columns to condition on."""
        assert self.splits
        return list(self._context_names) or None


def _as_list(columns: Columns) -> list[str | int]:
    return [columns] if isinstance(columns, str | int) else list(columns)


def _share(rows: int, fraction: float) -> int:
    return max(1, round(rows * fraction)) if fraction else 0
