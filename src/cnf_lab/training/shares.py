"""An evaluation's batches among processes: the same batches and numbers as in one process.

A batch takes every n-th row, n the number of batches: whatever order the rows lie in, all batches are alike,
and so are the steps of their solves.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor
from tqdm import tqdm

from cnf_lab.data import Batch, Rows
from cnf_lab.errors import ConfigError

Found = TypeVar("Found")


class Shares:
    """This process's share of the batches, and the way to all results.

    Args:
        fabric: What connects the processes; None for one process alone.
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        self._fabric = fabric
        self.rank, self.processes = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    def by_batch(
        self, rows: Rows, batch_size: int, limit: int | None, one: Callable[[int, Batch], Found]
    ) -> list[Found]:
        """Return what a function finds of every batch of the first rows, in every process.

        Batches do not depend on the number of processes, and neither do their results where the function
        takes its random numbers from the batch's number. A failure in one process is one in all.

        Args:
            rows: The rows.
            batch_size: Most rows of a batch.
            limit: Only the first rows; None for all.
            one: Function of the number of a batch, which is that of its first row, and of the batch.
        """
        count = min(len(rows), limit or len(rows))
        batches = -(-count // batch_size)
        # disable=None: a bar on a terminal, nothing in a file.
        own = tqdm(range(batches)[self.rank :: self.processes], unit="batch", disable=None if self.first else True)
        found: list[Found] = []
        failure: Exception | None = None
        try:
            for number in own:
                found.append(one(number, rows.__getitems__(range(number, count, batches))))
        except Exception as error:
            if self._fabric is None:
                raise
            failure = error  # the others wait for this process: they learn of it first
        if self._fabric is None:
            return found
        shares: list[tuple[list[Found], Exception | None]] = [([], None)] * self.processes
        torch.distributed.all_gather_object(shares, (found, failure))
        for _, theirs in shares:
            if theirs is not None:
                raise theirs
        return [shares[k % self.processes][0][k // self.processes] for k in range(batches)]


def in_order(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return what was found of batches as one tensor, in the order of the rows.

    Args:
        parts: Tensors of the batches, each with its rows along a dimension.
        dim: That dimension.
    """
    joined = torch.cat(list(parts), dim=dim)
    numbers = [torch.arange(k, joined.shape[dim], len(parts)) for k in range(len(parts))]
    return joined.index_select(dim, torch.cat(numbers).argsort())


class EvenRows:
    """Some of the rows, evenly spaced over all of them.

    Args:
        rows: The rows.
        count: Number of rows among which they are chosen, the first ones.
        some: Number of rows to choose, at most as many.
    """

    def __init__(self, rows: Rows, count: int, some: int) -> None:
        self.rows, self.numbers = rows, torch.linspace(0, count - 1, some).round().long().tolist()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.rows.__getitems__([self.numbers[index] for index in indices])


def started(processes: int, device: torch.device) -> tuple[Shares, torch.device]:
    """Start the other processes of an evaluation, each of which runs the same command.

    Args:
        processes: Number of processes; on GPUs each has one.
        device: The kind of device.

    Returns:
        The share of this process, and its device.

    Raises:
        ConfigError: If there are not as many GPUs.
    """
    if processes == 1:
        return Shares(), device
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise ConfigError(
            f"Expected at most {torch.cuda.device_count()} processes, one for each GPU, got {processes}. "
            f"Type processes={torch.cuda.device_count()}, or device=cpu."
        )
    # One process may check for hours while the others wait.
    strategy = DDPStrategy(timeout=timedelta(days=7))
    fabric = Fabric(accelerator=device.type, devices=processes, strategy=strategy)
    fabric.launch()
    return Shares(fabric), fabric.device
