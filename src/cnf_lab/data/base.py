r"""What every data set shares: batches, row sets, samplers and the LightningDataModule.

A data set is a :class:`FlowDataModule` that implements :meth:`~FlowDataModule.load`; the
order of rows, the shards of several processes and the resumption of a run are settled here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cnf_lab.errors import ConfigError, DataError


class Batch(NamedTuple):
    """Rows of one step: ``x`` with shape (batch, \\*event), ``context`` (batch, features) or None."""

    x: Tensor
    context: Tensor | None = None


@runtime_checkable
class Rows(Protocol):
    """Rows that are fetched many at a time; in memory, memory-mapped, in a file, or generated."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the rows with these numbers as one batch."""
        ...


class ArrayRows(Dataset[Batch]):
    """Rows of an array, which may be memory-mapped: only the rows asked for are read.

    Args:
        array: Rows with shape (rows, \\*event); float32 or float64 is kept, other types become float32.
        context: Conditioning columns with shape (rows, features), or None.
        indices: Row numbers that belong to this split; None means all of them.
    """

    def __init__(self, array: np.ndarray, context: np.ndarray | None = None, indices: np.ndarray | None = None) -> None:
        self.array, self.context, self.indices = array, context, indices

    def __len__(self) -> int:
        return len(self.array) if self.indices is None else len(self.indices)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = np.asarray(indices) if self.indices is None else self.indices[np.asarray(indices)]
        x = as_tensor(self.array[rows])
        return Batch(x, None if self.context is None else as_tensor(self.context[rows]))


def as_tensor(array: np.ndarray) -> Tensor:
    """Copy an array into a float tensor that does not share memory with a mapped file."""
    dtype = array.dtype if array.dtype in (np.float32, np.float64) else np.float32
    return torch.from_numpy(np.array(array, dtype=dtype))


class Splits(NamedTuple):
    """The three parts of a data set."""

    train: Rows
    val: Rows
    test: Rows


class StreamSampler(Sampler[int]):
    r"""Row numbers of one epoch, the same whether a run was interrupted or not.

    Rows form an endless stream: pass after pass over the data, each in its own order. Epoch e
    takes the stream's slice :math:`[e S B W, (e+1) S B W)` for S steps of B rows on W processes,
    so an epoch may be shorter or longer than a pass, and nothing but (seed, epoch, rank)
    decides which rows come. Without ``steps_per_epoch`` an epoch is exactly one pass, its last
    batch partial, padded by rows of the same pass to the same number on every process.

    Args:
        length: Rows in the data set; None for generated data, which has no passes: the
            stream then counts upwards for ever and the data set draws fresh rows by number.
        batch_size: Rows per step and process.
        steps_per_epoch: Steps that make an epoch; None means one pass.
        world_size: Number of processes.
        rank: Number of this process.
        seed: Seed of the orders.
        group_starts: First row of each group that is cheap to read as a whole (a row group of
            a file). Groups are then shuffled, and rows within a group; None shuffles all rows.
    """

    def __init__(
        self,
        length: int | None,
        batch_size: int,
        steps_per_epoch: int | None,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        group_starts: np.ndarray | None = None,
    ) -> None:
        if length is None and steps_per_epoch is None:
            raise ConfigError(
                "Expected dataset.steps_per_epoch for generated data, which have no end, got null. "
                "Type dataset.steps_per_epoch=200."
            )
        self.length, self.batch_size, self.steps_per_epoch = length, batch_size, steps_per_epoch
        self.world_size, self.rank, self.seed = world_size, rank, seed
        self.group_starts = group_starts
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls it before each one."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.steps_per_epoch is not None:
            return self.steps_per_epoch * self.batch_size
        assert self.length is not None
        return -(-self.length // self.world_size)

    def __iter__(self) -> Iterator[int]:
        count = len(self)
        if self.steps_per_epoch is None:
            order = self._order(self.epoch)
            padded = np.resize(order, count * self.world_size)
            yield from padded[self.rank :: self.world_size].tolist()
            return
        first = self.epoch * count * self.world_size
        position = first + self.rank + self.world_size * np.arange(count)
        if self.length is None:
            yield from position.tolist()
            return
        passes, offsets = np.divmod(position, self.length)
        for number in range(passes[0], passes[-1] + 1):
            yield from self._order(number)[offsets[passes == number]].tolist()

    def _order(self, number: int) -> np.ndarray:
        assert self.length is not None
        rng = np.random.default_rng([self.seed, number])
        if self.group_starts is None:
            return rng.permutation(self.length)
        groups = np.split(np.arange(self.length), self.group_starts[1:])
        rng.shuffle(groups)
        return np.concatenate([rng.permutation(group) for group in groups])


class ShardSampler(Sampler[int]):
    """Every row exactly once over all processes, so that sums over them are exact.

    The stock distributed sampler pads to equal shares and counts some rows twice.
    """

    def __init__(self, length: int, world_size: int = 1, rank: int = 0) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def _as_is(batch: Any) -> Any:
    # A named function, not a lambda, so that worker processes can pickle it.
    return batch


class FlowDataModule(pl.LightningDataModule, ABC):
    """A data set as the lab sees it.

    Args:
        name: Name of the data set in folders and reports.
        batch_size: Rows per training step and process.
        evaluation_batch_size: Rows per evaluation step and process.
        steps_per_epoch: Training steps between two validations; None means one pass.
        num_workers: Worker processes of each loader; rows in memory need none.
        seed: Seed of the order of rows, of random splits and of generated rows.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        evaluation_batch_size: int,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for option, value in (("batch_size", batch_size), ("evaluation_batch_size", evaluation_batch_size)):
            if value < 1:
                raise ConfigError(f"Expected dataset.{option} of at least 1, got {value}. Type dataset.{option}=100.")
        if num_workers < 0:
            raise ConfigError(
                f"Expected dataset.num_workers of at least 0, got {num_workers}. Type dataset.num_workers=0."
            )
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ConfigError(
                f"Expected dataset.steps_per_epoch of at least 1, got {steps_per_epoch}. "
                "Type dataset.steps_per_epoch=200."
            )
        self.name = name
        self.batch_size, self.evaluation_batch_size = batch_size, evaluation_batch_size
        self.steps_per_epoch, self.num_workers, self.seed = steps_per_epoch, num_workers, seed
        #: What every number from these data must say, for example that rows are missing.
        self.notes: list[str] = []
        self._splits: Splits | None = None

    # -- what a data set defines ------------------------------------------------------------

    @abstractmethod
    def load(self) -> Splits:
        """Read or generate the three splits; may append to :attr:`notes`."""

    @property
    @abstractmethod
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event; known after :meth:`setup`."""

    @property
    def context_features(self) -> int:
        """Number of conditioning columns; 0 for an unconditional density."""
        return 0

    @property
    def column_names(self) -> list[str] | None:
        """Names of the event's columns, where the data have any."""
        return None

    @property
    def context_names(self) -> list[str] | None:
        """Names of the conditioning columns, where the data have any."""
        return None

    @property
    def entropy(self) -> float | None:
        """Differential entropy in nats, the NLL of the true density, where it is known."""
        return None

    @property
    def truth(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """The true log-density of rows in nats, (rows, \\*event) to (rows,), where it is known."""
        return None

    @property
    def endless(self) -> bool:
        """Whether training rows are generated afresh in every step."""
        return False

    @property
    def plot_window(self) -> tuple[float, float, float, float] | None:
        """Window (x min, x max, y min, y max) for plots of 2-D data; None: from the rows."""
        return None

    # -- what Lightning and the lab call ------------------------------------------------------

    @property
    def splits(self) -> Splits:
        """The loaded splits."""
        if self._splits is None:
            self.setup()
        assert self._splits is not None
        return self._splits

    def setup(self, stage: str | None = None) -> None:
        """Load the splits once, whatever the stage."""
        if self._splits is None:
            splits = self.load()
            for split, rows in zip(Splits._fields, splits, strict=True):
                if len(rows) == 0:
                    raise DataError(
                        f"Expected at least one row in the {split} split of {self.name}, got none. "
                        "Use more rows or larger split fractions."
                    )
            self._splits = splits

    def split(self, name: str) -> Rows:
        """Return one split by name: train, val or test."""
        if name not in Splits._fields:
            raise ConfigError(f"Expected split to be one of {', '.join(Splits._fields)}, got {name}. Type split=test.")
        return getattr(self.splits, name)

    def head(self, split: str, rows: int) -> Batch:
        """Return up to ``rows`` rows of a split, evenly spaced over it, for plots and checks."""
        chosen = self.split(split)
        count = min(rows, len(chosen))
        return chosen.__getitems__(np.linspace(0, len(chosen) - 1, count).astype(int).tolist())

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint must know of the data, as plain values."""
        return {
            "name": self.name,
            "notes": list(self.notes),
            "entropy": self.entropy,
            "column_names": self.column_names,
            "context_names": self.context_names,
            "rows": {split: len(rows) for split, rows in self.splits._asdict().items()},
        }

    def train_dataloader(self) -> DataLoader:
        """Batches of the current epoch for this process."""
        rows = self.splits.train
        sampler = StreamSampler(
            length=None if self.endless else len(rows),
            batch_size=self.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            world_size=self._world_size,
            rank=self._rank,
            seed=self.seed,
            group_starts=getattr(rows, "group_starts", None),
        )
        return self._loader(rows, self.batch_size, sampler)

    def val_dataloader(self) -> DataLoader:
        """Validation rows of this process, each row on exactly one process."""
        return self.evaluation_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Test rows of this process, each row on exactly one process."""
        return self.evaluation_dataloader("test")

    def evaluation_dataloader(self, split: str, batch_size: int | None = None) -> DataLoader:
        """Rows of any split in order, each on exactly one process."""
        rows = self.split(split)
        if len(rows) < self._world_size:
            raise ConfigError(
                f"Expected a row of the {split} split for each of {self._world_size} processes, got {len(rows)} rows. "
                "Type trainer.devices=1."
            )
        sampler = ShardSampler(len(rows), self._world_size, self._rank)
        return self._loader(rows, batch_size or self.evaluation_batch_size, sampler)

    def _loader(self, rows: Any, batch_size: int, sampler: Sampler[int]) -> DataLoader:
        return DataLoader(
            rows,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0
