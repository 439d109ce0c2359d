"""Densities in the plane that rows are drawn from afresh in every step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from torch.utils.data import Dataset

from cnf_lab.data.base import ArrayRows, Batch, FlowDataModule, Splits, as_tensor
from cnf_lab.errors import ConfigError

LogDensity = Callable[[np.ndarray], np.ndarray]

#: Half the side of the square that the sets fill, and that plots show.
EXTENT = 4.0


class Distribution(ABC):
    """A density in the plane that rows can be drawn from."""

    #: What every number from this density must say.
    note: str | None = None
    #: The log-density in nats, rows (rows, 2) to (rows,), where there is one and it is known.
    log_density: LogDensity | None = None

    @property
    def entropy(self) -> float | None:
        """Differential entropy in nats, where it is known."""
        return None

    @abstractmethod
    def draw(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        """Draw rows with shape (rows, 2), float64."""


def in_pieces(log_density: LogDensity, x: np.ndarray, width: int) -> np.ndarray:
    """Apply a function of rows piece by piece, where each row needs ``width`` numbers on the way."""
    rows = max(1, 2**20 // width)
    return np.concatenate([log_density(x[start : start + rows]) for start in range(0, max(len(x), 1), rows)])


class DrawnRows(Dataset[Batch]):
    """Rows drawn afresh for every batch, a function of the seed and the batch's first number.

    Args:
        distribution: Where they come from.
        seed: Seed of the run and of the split.
        length: Rows that count as the whole of them where all are asked for.
    """

    def __init__(self, distribution: Distribution, seed: Sequence[int], length: int) -> None:
        self.distribution, self.seed, self.length = distribution, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rng = np.random.default_rng([*self.seed, indices[0]])
        return Batch(as_tensor(self.distribution.draw(len(indices), rng).astype(np.float32)))


class DrawnDataModule(FlowDataModule):
    """A density in the plane: fresh training rows in every step, fixed rows to evaluate on.

    Args:
        name: Name of the data set in folders and reports.
        batch_size: Rows per training step and process.
        evaluation_batch_size: Rows per evaluation step and process.
        evaluation_rows: Rows of the validation split, and of the test split.
        steps_per_epoch: Training steps between two validations.
        num_workers: Worker processes of each loader; drawing needs none.
        seed: Seed of all rows.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        evaluation_batch_size: int,
        evaluation_rows: int,
        steps_per_epoch: int | None,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(name, batch_size, evaluation_batch_size, steps_per_epoch, num_workers, seed)
        if evaluation_rows < 1:
            raise ConfigError(
                f"Expected dataset.evaluation_rows of at least 1, got {evaluation_rows}. "
                "Type dataset.evaluation_rows=10000."
            )
        self.evaluation_rows = evaluation_rows

    @property
    @abstractmethod
    def distribution(self) -> Distribution:
        """The density that rows are drawn from."""

    def load(self) -> Splits:
        """Draw the validation and the test rows."""
        if self.distribution.note is not None:
            self.notes.append(self.distribution.note)
        val, test = (ArrayRows(self._fixed(split)) for split in (1, 2))
        length = self.batch_size * (self.steps_per_epoch or 1)
        return Splits(DrawnRows(self.distribution, [self.seed, 0], length), val, test)

    def _fixed(self, split: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, split])
        return self.distribution.draw(self.evaluation_rows, rng).astype(np.float32)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Two coordinates."""
        return (2,)

    @property
    def entropy(self) -> float | None:
        """Differential entropy in nats, where it is known."""
        return self.distribution.entropy

    @property
    def truth(self) -> LogDensity | None:
        """The true log-density of rows in nats, (rows, 2) to (rows,), where it is known."""
        log_density = self.distribution.log_density
        # In float32 the squares alone would cost four digits of a thin ring's log-density.
        return None if log_density is None else lambda x: log_density(np.asarray(x, dtype=np.float64))

    @property
    def endless(self) -> bool:
        """Training rows are drawn afresh in every step."""
        return True

    @property
    def plot_window(self) -> tuple[float, float, float, float]:
        """The square that the sets fill."""
        return (-EXTENT, EXTENT, -EXTENT, EXTENT)
