"""An evaluation's batches among processes: the same batches, numbers and order as in one process."""

from collections.abc import Callable
from typing import TypeVar

import torch
from lightning_fabric import Fabric
from tqdm import tqdm

from cnf_lab.data import Batch, Rows

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
        """Return what a function finds of every batch of the first rows, in their order, in every process.

        Batches do not depend on the number of processes, and neither do their results where the function
        takes its random numbers from the first row's number. A failure in one process ends all of them, and the
        first one tells it.

        Args:
            rows: The rows.
            batch_size: Rows of a batch.
            limit: Only the first rows; None for all.
            one: Function of the number of a batch's first row, and of the batch.

        Raises:
            SystemExit: In the other processes, if any failed.
        """
        count = min(len(rows), limit or len(rows))
        starts = range(0, count, batch_size)
        # disable=None: a bar on a terminal, nothing in a file.
        own = tqdm(starts[self.rank :: self.processes], unit="batch", disable=None if self.first else True)
        found: list[Found] = []
        failure: Exception | None = None
        try:
            for start in own:
                found.append(one(start, rows.__getitems__(range(start, min(start + batch_size, count)))))
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
                raise theirs if self.first else SystemExit(2)
        return [shares[k % self.processes][0][k // self.processes] for k in range(len(starts))]


def started(processes: int, device: torch.device) -> tuple[Shares, torch.device]:
    """Start the other processes of an evaluation, each of which runs the same command.

    Args:
        processes: Number of processes; on GPUs each has one.
        device: The kind of device.

    Returns:
        The share of this process, and its device.
    """
    if processes == 1:
        return Shares(), device
    fabric = Fabric(accelerator=device.type, devices=processes, strategy="ddp")
    fabric.launch()
    return Shares(fabric), fabric.device
