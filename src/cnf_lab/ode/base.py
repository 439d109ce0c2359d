"""The seam of all solvers, and what a solve reports."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from cnf_lab.shapes import Float

State = tuple[Tensor, ...]
RightHandSide = Callable[[Float[Tensor, ""], State], State]


class SolveStats:
    """What one solve cost.

    A plain class, not a dataclass: Lightning copies the dataclasses that a training step
    returns, and a copy would miss what the backward pass adds.

    ``nfe_backward`` grows while gradients are computed, so read it after ``backward()``. It
    counts evaluations of the field, which only a continuous adjoint makes again: gradients
    taken directly through the solver reuse the forward ones and leave it at 0.
    """

    __slots__ = ("accepted_steps", "nfe_backward", "nfe_forward", "rejected_steps")

    def __init__(self) -> None:
        self.nfe_forward = self.nfe_backward = self.accepted_steps = self.rejected_steps = 0

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)}" for name in self.__slots__)
        return f"SolveStats({values})"

    @staticmethod
    def total(solves: "Iterable[SolveStats]") -> "SolveStats":
        """Add up several solves."""
        total = SolveStats()
        for solve in solves:
            for name in SolveStats.__slots__:
                setattr(total, name, getattr(total, name) + getattr(solve, name))
        return total


class OdeSolver(ABC):
    """A way to integrate ds/dt = rhs(t, s), where the state s is a tuple of tensors.

    The first tensor of the state is x (batch, \\*event), the second, where there is one, the
    log-det (batch,). Any further ones are integrals that ride along and do not steer the steps.
    """

    @abstractmethod
    def solve(
        self,
        rhs: RightHandSide,
        state: State,
        t0: float,
        t1: float,
        parameters: Sequence[Tensor] = (),
    ) -> tuple[State, SolveStats]:
        """Integrate from t0 to t1, in either direction.

        Args:
            rhs: Right-hand side; gets a scalar time and the state.
            state: State at t0.
            t0: Start time.
            t1: End time.
            parameters: Tensors besides the state that the right-hand side depends on and that
                need gradients: parameters, and tensors computed from them such as a context.

        Returns:
            The state at t1, and what the solve cost.

        Raises:
            SolverError: If the solve fails or leaves the finite numbers.
        """

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Return method, tolerances and options as plain values, for reports."""


@torch.no_grad()
def batch_error_norm(error: State) -> Tensor:
    """Root mean square over the whole batch, the larger of x and log-det: the original's norm.

    Cheap, but a single row may be much worse than the tolerance.
    """
    return max(_rms(part, 0) for part in error[:2])


@torch.no_grad()
def example_error_norm(error: State) -> Tensor:
    """Root mean square over each event, the largest over rows and over x and log-det.

    Every row meets the tolerance, whatever the others of its batch.
    """
    return max(_rms(part, 1).max() for part in error[:2])


def _rms(part: Tensor, first: int) -> Tensor:
    # `first` is the first axis of the mean; a log-det (batch,) has no axis beyond the batch.
    return part.flatten(first).square().mean(-1).sqrt() if part.dim() > first else part.abs()
