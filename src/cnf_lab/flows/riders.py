r"""What an objective sends along with a solve: integrals, points of the way, and a change of its end."""

import functools
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cnf_lab.ode import OdeSolver, RungeKuttaSolver, TorchdiffeqSolver
from cnf_lab.shapes import Float
from cnf_lab.trace import Linearised, Needs

ROUND_OFF = 1e-9  # of times, in steps


class Rider:
    """What rides along with a solve; it gets one number per example back, zero where it measures nothing."""

    #: Factor of the mean of what it measures in a loss; None leaves it out of loss and logs.
    weight: float | None = None


class Integrand(Rider, ABC):
    """A quantity to integrate over time along with a solve, one number per example."""

    #: What it needs of the field besides value and divergence.
    needs: Needs = Needs(0)

    @abstractmethod
    def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
        r"""Return the integrand (batch,) at one time.

        Args:
            t: Time.
            x: State (batch, \*event).
            found: The field there, its divergence, and what else is needed.
        """


def needs_of(integrands: Iterable[Integrand]) -> Needs:
    """Return what some integrands need together."""
    return functools.reduce(operator.or_, (integrand.needs for integrand in integrands), Needs(0))


class Waypoints(Rider, ABC):
    """A quantity of where a row is at some moments of its way, the start and the end among them."""

    @abstractmethod
    def draw(self, generator: torch.Generator | None, device: torch.device) -> list[float]:
        """Return the moments between start and end, as fractions of the solve's time.

        Args:
            generator: Source of the random numbers.
            device: Where the generator lives.
        """

    @abstractmethod
    def __call__(self, moments: Sequence[float], states: Float[Tensor, "points batch *event"]) -> Tensor:
        r"""Return the quantity (batch,).

        Args:
            moments: Fractions of the time, increasing from 0 to 1.
            states: States there (points, batch, \*event).
        """


class EndTime(Rider, ABC):
    """A choice of the end time of a solve in training."""

    @abstractmethod
    def draw(self, end: float, generator: torch.Generator | None, device: torch.device) -> float:
        """Return the end time of one solve.

        Args:
            end: The end time T otherwise.
            generator: Source of the random numbers.
            device: Where the generator lives.
        """


def halts(solver: OdeSolver, t1: float, moments: Iterable[float]) -> list[float]:
    """Return the times of some moments of a solve from 0 to t1, start and end included, in order.

    On a fixed grid they move to the nearest of its inner points: the steps stay as they are, and
    nothing is evaluated besides (but by multistep methods, which begin anew). A grid of one step
    has no inner points.

    Args:
        solver: The solver.
        t1: End time.
        moments: Fractions of the time.
    """
    size = _step_size(solver, t1)
    times = [moment * t1 for moment in moments]
    if size is not None:
        # Not to the ends, which are among the points already.
        inner = math.ceil(t1 / size - ROUND_OFF) - 1
        times = [min(max(round(t / size), 1), inner) * size for t in times] if inner else []
    return sorted([0.0, *times, t1])


def legs(solver: OdeSolver, t0: float, t1: float, times: Iterable[float]) -> list[tuple[OdeSolver, float, float]]:
    """Divide a solve from t0 to t1 at some times between; return solver, start and end of each part.

    On a fixed grid each part takes the steps that it would have taken of the whole.

    Args:
        solver: The solver.
        t0: Start time.
        t1: End time.
        times: Times to halt at.
    """
    inside = sorted(set(times) - {t0, t1})
    size = _step_size(solver, t1) if inside else None
    return [(_part(solver, size, start, stop), start, stop) for start, stop in pairwise([t0, *inside, t1])]


def _part(solver: OdeSolver, size: float | None, start: float, stop: float) -> OdeSolver:
    if size is None or not isinstance(solver, RungeKuttaSolver | TorchdiffeqSolver):
        return solver
    steps = round((stop - start) / size)
    if abs(stop - start - steps * size) > ROUND_OFF * size:
        return solver  # the last part of a grid whose last step is shorter
    options = {name: value for name, value in solver.options.items() if name != "step_size"}
    return solver.changed(steps=steps, options=options)


def _step_size(solver: OdeSolver, t1: float) -> float | None:
    """Return the step size of a solve from 0 to t1 on a fixed grid; None where the error chooses the steps."""
    if not isinstance(solver, RungeKuttaSolver | TorchdiffeqSolver):
        return None
    return solver.options.get("step_size") if solver.steps is None else t1 / solver.steps
