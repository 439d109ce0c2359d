"""The seam of all solvers, and what a solve reports."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

State = tuple[Tensor, ...]
TIGHTEST = 1e-7  # below, the local error is round-off of float32
#: What a right-hand side depends on besides time and state, fixed over a solve.
Arguments = tuple[Any, ...]
#: (t, state, *arguments) -> the state's derivative.
RightHandSide = Callable[..., State]


class SolveStats:
    """What one solve cost.

    A plain class, not a dataclass: Lightning copies the dataclasses that a training step
    returns, and a copy would miss what the backward pass adds.

    ``nfe_backward`` grows while gradients are computed, so read it after ``backward()``. It
    counts evaluations of the field that are made again: by a continuous adjoint, and step by
    step by checkpointing. Gradients taken directly through the solver leave it at 0.
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
    log-det (batch,). Any further ones are integrals that ride along and do not steer the steps
    (but those of scipy's solvers and of implicit Adams methods, which look at the whole state).
    """

    @abstractmethod
    def solve(
        self,
        rhs: RightHandSide,
        state: State,
        t0: float,
        t1: float,
        arguments: Arguments = (),
        parameters: Sequence[Tensor] = (),
    ) -> tuple[State, SolveStats]:
        """Integrate from t0 to t1, in either direction.

        Args:
            rhs: Right-hand side; gets a scalar time, the state and the arguments.
            state: State at t0.
            t0: Start time.
            t1: End time.
            arguments: What the right-hand side gets besides, such as a context and a probe. A
                tensor among them receives its gradient.
            parameters: Further tensors that the right-hand side depends on and that need
                gradients.

        Returns:
            The state at t1, and what the solve cost.

        Raises:
            SolverError: If the solve fails or leaves the finite numbers.
        """

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Return method, tolerances and options as plain values, for reports."""

    def eager(self) -> "OdeSolver":
        """Return the same solver without compilation, for a few solves of unusual shapes."""
        return self

    def tightened(self) -> "OdeSolver | None":
        """Return a solver with about a tenth of the error, or None where there is none."""
        return None


def tighter_options(
    adaptive: bool, atol: float, rtol: float, steps: int | None, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the options of a solver with a tenth of the tolerances, or with twice the steps.

    None where the tolerances have come down to float32's round-off.
    """
    if adaptive:
        tenths = {"atol": max(atol / 10, TIGHTEST), "rtol": max(rtol / 10, TIGHTEST)}
        return None if max(atol, rtol) <= TIGHTEST else tenths
    if steps is not None:
        return {"steps": 2 * steps}
    return {"options": {**options, "step_size": options["step_size"] / 2}}


def differentiated(arguments: Arguments, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return every tensor besides the state that a solve must differentiate by."""
    wanted = [part for part in arguments if isinstance(part, Tensor) and part.requires_grad]
    return (*wanted, *(parameter for parameter in parameters if parameter.requires_grad))


def without_autocast(device_type: str) -> torch.autocast:
    """Return a context in which state, log-det and error norm keep float32 or better.

    A right-hand side opens the autocast that it wants by itself.
    """
    return torch.autocast(device_type, enabled=False)


@torch.no_grad()
def batch_error_norm(error: State) -> Tensor:
    """Root mean square over the whole batch, the larger of x and log-det: the original's norm.

    Cheap, but a single row may be much worse than the tolerance.
    """
    return functools.reduce(torch.maximum, [_rms(part, 0) for part in error[:2]])


@torch.no_grad()
def example_error_norm(error: State) -> Tensor:
    """Root mean square over each event, the largest over rows and over x and log-det.

    Every row meets the tolerance, whatever the others of its batch.
    """
    return functools.reduce(torch.maximum, [_rms(part, 1).max() for part in error[:2]])


def _rms(part: Tensor, first: int) -> Tensor:
    # `first` is the first axis of the mean; a log-det (batch,) has no axis beyond the batch.
    return part.flatten(first).square().mean(-1).sqrt() if part.dim() > first else part.abs()
