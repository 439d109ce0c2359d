"""Every method of torchdiffeq behind the solver seam.

References:
    R. T. Q. Chen, torchdiffeq (2018), https://github.com/rtqichen/torchdiffeq.
    Chen et al., Neural Ordinary Differential Equations (2018), https://arxiv.org/abs/1806.07366.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torchdiffeq
from torch import Tensor

from cnf_lab.errors import ConfigError, SolverError
from cnf_lab.ode.base import (
    Arguments,
    OdeSolver,
    RightHandSide,
    SolveStats,
    State,
    batch_error_norm,
    differentiated,
    example_error_norm,
    tighter_options,
    without_autocast,
)
from cnf_lab.ode.failures import check_choice, first_line, solve_failure

T = TypeVar("T")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
RUNGE_KUTTA = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
FIXED_GRID = RUNGE_KUTTA + ADAMS
SCIPY = ("scipy_solver",)
METHODS = ADAPTIVE + FIXED_GRID + SCIPY
GRADIENTS = ("direct", "adjoint")
OPTIONS = {
    ADAPTIVE: (
        "min_step", "max_step", "first_step", "step_t", "jump_t", "safety", "ifactor", "dfactor", "max_num_steps",
    ),
    RUNGE_KUTTA: ("step_size", "perturb", "interp"),
    ADAMS: ("step_size", "perturb", "interp", "max_order", "max_iters"),
    SCIPY: ("solver", "min_step", "max_step"),
}  # fmt: skip
TEXTS = ("solver", "interp", "perturb", "step_t", "jump_t")  # options that are no single number
CONSTRUCTOR = (
    "method", "atol", "rtol", "steps", "error_norm", "gradient", "options",
    "adjoint_atol", "adjoint_rtol", "adjoint_seminorm",
)  # fmt: skip
ERROR_NORMS = {"batch": batch_error_norm, "example": example_error_norm}


class TorchdiffeqSolver(OdeSolver):
    """A method of torchdiffeq.

    Args:
        method: Name of the method, one of ``METHODS``.
        atol: Absolute local error bound (adaptive methods and scipy's).
        rtol: Relative local error bound.
        steps: Number of equal steps between t0 and t1 of a fixed-grid method; None leaves the
            grid to ``options``.
        error_norm: ``example`` bounds the error of every row, ``batch`` the mean over the batch.
        gradient: ``direct`` differentiates through the steps, ``adjoint`` solves the continuous
            adjoint backward with constant memory.
        options: Further options of the method, such as ``step_size`` or ``max_num_steps``.
        adjoint_atol: Absolute bound of the backward solve; None takes ``atol``.
        adjoint_rtol: Relative bound of the backward solve; None takes ``rtol``.
        adjoint_seminorm: Whether the parameters' gradients are left out of the backward
            solve's error norm, which saves steps (Kidger et al. 2021, https://arxiv.org/abs/2009.09457).

    Raises:
        ConfigError: If an option is unknown, out of range, or does not go with the method.
    """

    def __init__(
        self,
        method: str,
        atol: float = 1e-5,
        rtol: float = 1e-5,
        steps: int | None = None,
        error_norm: str = "batch",
        gradient: str = "direct",
        options: Mapping[str, Any] | None = None,
        adjoint_atol: float | None = None,
        adjoint_rtol: float | None = None,
        adjoint_seminorm: bool = True,
    ) -> None:
        options = {name: value for name, value in (options or {}).items() if value is not None}
        check_choice("solver.method", method, METHODS)
        check_choice("solver.gradient", gradient, GRADIENTS)
        check_choice("solver.error_norm", error_norm, tuple(ERROR_NORMS))
        for name, bound in (("atol", atol), ("rtol", rtol)):
            if not bound > 0:
                raise ConfigError(f"Expected solver.{name} above 0, got {bound}. Type solver.{name}=1e-5.")
        if steps is not None and (method not in FIXED_GRID or steps < 1):
            raise ConfigError(
                f"Expected solver.steps of at least 1 and only with a fixed-grid method ({', '.join(FIXED_GRID)}), "
                f"got solver.steps={steps} with solver.method={method}. Type solver=rk4 solver.steps=8."
            )
        if steps is not None and "step_size" in options:
            raise ConfigError(
                f"Expected either solver.steps or solver.options.step_size, got both: {steps} and "
                f"{options['step_size']}. Type solver.steps={steps} alone."
            )
        for option in options:
            check_choice("solver.options", option, _of_family(OPTIONS, method))
            if option not in TEXTS and not isinstance(options[option], int | float):
                raise ConfigError(
                    f"Expected solver.options.{option} to be a number, got {options[option]}. "
                    f"Type solver.options.{option}=null."
                )
        if "solver" in options:
            check_choice(
                "solver.options.solver", options["solver"], ("LSODA", "RK45", "RK23", "DOP853", "Radau", "BDF")
            )
        if method in FIXED_GRID and steps is None and "step_size" not in options:
            raise ConfigError(
                f"Expected a grid for the fixed-grid method {method}, got neither solver.steps nor "
                "solver.options.step_size. Type solver.steps=8."
            )
        if method in SCIPY and gradient == "direct":
            raise ConfigError(
                "Expected solver.gradient=adjoint with solver.method=scipy_solver, which leaves torch's graph, "
                "got solver.gradient=direct. Type solver.gradient=adjoint."
            )
        self.method, self.atol, self.rtol, self.steps = method, atol, rtol, steps
        self.error_norm, self.gradient, self.options = error_norm, gradient, options
        self.adjoint_atol, self.adjoint_rtol = adjoint_atol, adjoint_rtol
        self.adjoint_seminorm = adjoint_seminorm

    def describe(self) -> dict[str, object]:
        """Return method, tolerances and options as plain values."""
        common: dict[str, object] = {"method": self.method, "gradient": self.gradient, **self.options}
        if self.method in FIXED_GRID:
            return common if self.steps is None else {**common, "steps": self.steps}
        return {**common, "atol": self.atol, "rtol": self.rtol, "error_norm": self.error_norm}

    def changed(self, **options: Any) -> "TorchdiffeqSolver":
        """Return the same solver with other options of its constructor."""
        return TorchdiffeqSolver(**{name: getattr(self, name) for name in CONSTRUCTOR} | options)

    def tightened(self) -> "TorchdiffeqSolver | None":
        """Return the solver with a tenth of the tolerances, or with twice the steps."""
        tighter = tighter_options(self.method not in FIXED_GRID, self.atol, self.rtol, self.steps, self.options)
        return None if tighter is None else self.changed(**tighter)

    def solve(
        self,
        rhs: RightHandSide,
        state: State,
        t0: float,
        t1: float,
        arguments: Arguments = (),
        parameters: Sequence[Tensor] = (),
    ) -> tuple[State, SolveStats]:
        """Integrate from t0 to t1; see :meth:`OdeSolver.solve`."""
        if t0 == t1 or not state[0].numel():
            return state, SolveStats()
        observed = _of_family(OBSERVED, self.method)(rhs, arguments, (t0, t1))
        if not all(bool(part.isfinite().all()) for part in state):
            raise SolverError(self._failure(observed, t0, "the state at the start is not finite"))
        # The times are data of the solve, never differentiated: an end time that is trained
        # enters through the right-hand side.
        times = torch.tensor([t0, t1], dtype=torch.float64, device=state[0].device)
        try:
            with without_autocast(state[0].device.type), _judged_warnings(self.method):
                solution = self._integrate(observed, state, times, differentiated(arguments, parameters))
        except (AssertionError, UserWarning, _Stuck) as failure:
            raise SolverError(self._failure(observed, t0, str(failure))) from failure
        except RuntimeError as failure:
            if self.method not in SCIPY or "invalid for input of size" not in str(failure):
                raise
            # scipy stopped early, and torchdiffeq stumbles over the missing end.
            raise SolverError(self._failure(observed, t0, "the step size underflowed")) from failure
        end = tuple(part[-1] for part in solution)
        if len(solution[0]) != 2 or not all(bool(part.isfinite().all()) for part in end):
            raise SolverError(self._failure(observed, t1, "the state at the end is not finite"))
        observed.finished = True
        return end, observed.stats

    def _integrate(
        self, observed: "_Observed", state: State, times: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        options: dict[str, Any] = dict(self.options)
        options["norm"] = ERROR_NORMS[self.error_norm]
        for name in ("step_t", "jump_t"):
            if name in options:
                options[name] = torch.as_tensor(options[name], dtype=times.dtype, device=times.device)
        if self.method == "explicit_adams":
            options.setdefault("max_order", 5)  # torchdiffeq's 12 is unstable for steps of ordinary size
        if self.method in ADAPTIVE:
            # A last step beyond the end would be interpolated back, with an error far above the tolerance.
            options["step_t"] = torch.cat([times, options.get("step_t", times[:0])]).unique()
        if self.steps is not None:
            options["grid_constructor"] = _equal_steps(self.steps)
        settings: dict[str, Any] = {
            "atol": self.atol,
            "rtol": self.rtol,
            "method": self.method,
            "options": options,
        }
        if self.gradient == "direct" or not torch.is_grad_enabled():
            return torchdiffeq.odeint(observed, state, times, **settings)
        backward = {name: value for name, value in options.items() if name != "norm"}
        if self.adjoint_seminorm and self.method in ADAPTIVE:
            backward["norm"] = "seminorm"
        return torchdiffeq.odeint_adjoint(
            observed,
            state,
            times,
            **settings,
            adjoint_atol=self.adjoint_atol,
            adjoint_rtol=self.adjoint_rtol,
            adjoint_options=backward,
            adjoint_params=tuple(parameters),
        )

    def _failure(self, observed: "_Observed", t: float, reason: str) -> str:
        step = None
        if observed.last_step is not None:
            t, step = float(observed.last_step[0]), float(observed.last_step[1])
        return solve_failure(self.method, t, step, observed.stats.nfe_forward, self.atol, self.rtol, reason)


class _Stuck(Exception):
    """A scipy solver that makes no progress, which it would not notice itself."""


class _Observed:
    """A right-hand side that counts its evaluations, before and after the end of the solve."""

    def __init__(self, rhs: RightHandSide, arguments: Arguments, ends: tuple[float, float]) -> None:
        self.rhs, self.arguments = rhs, arguments
        self.first, self.last = sorted(ends)
        self.stats = SolveStats()
        self.finished = False
        self.last_step: tuple[Tensor, Tensor] | None = None

    def __call__(self, t: Tensor, state: State) -> State:
        if self.finished:
            self.stats.nfe_backward += 1
        else:
            self.stats.nfe_forward += 1
        # The choice of the first step may look beyond the end.
        return self.rhs(t.clamp(self.first, self.last), state, *self.arguments)


class _ObservedScipy(_Observed):
    """Ends a solve that LSODA would go on with for ever."""

    previous, repeats = float("nan"), 0

    def __call__(self, t: Tensor, state: State) -> State:
        now = float(t.detach())
        self.repeats = self.repeats + 1 if now == self.previous else 0
        self.previous = now
        if self.repeats > 1000 + 10 * sum(part.numel() for part in state):
            raise _Stuck("the solve stands still")
        derivative = super().__call__(t, state)
        if not all(bool(part.isfinite().all()) for part in derivative):
            raise _Stuck("the derivative is not finite")
        return derivative


# torchdiffeq looks callbacks up by name, and warns of one that the method does not call.
class _ObservedSteps(_Observed):
    """Remembers the last step as well."""

    def callback_step(self, t0: Tensor, state: State, dt: Tensor) -> None:
        self.last_step = (t0, dt)


class _ObservedAdaptiveSteps(_ObservedSteps):
    """Counts accepted and rejected steps as well."""

    def callback_accept_step(self, t0: Tensor, state: State, dt: Tensor) -> None:
        self.stats.accepted_steps += 1

    def callback_reject_step(self, t0: Tensor, state: State, dt: Tensor) -> None:
        self.stats.rejected_steps += 1


OBSERVED = {ADAPTIVE: _ObservedAdaptiveSteps, FIXED_GRID: _ObservedSteps, SCIPY: _ObservedScipy}


@contextmanager
def backward_failures() -> Iterator[None]:
    """Turn the assertions of a failed adjoint solve, which rise out of ``backward()``, into SolverError."""
    try:
        yield
    except AssertionError as failure:
        raise SolverError(
            f"The backward solve of the adjoint failed: {first_line(str(failure))}. "
            "Type solver.gradient=direct, or loosen solver.adjoint_atol and solver.adjoint_rtol."
        ) from failure


def _of_family(table: Mapping[tuple[str, ...], T], method: str) -> T:
    return next(entry for methods, entry in table.items() if method in methods)


def _equal_steps(steps: int) -> Callable[..., Tensor]:
    def grid(func: object, y0: Tensor, t: Tensor) -> Tensor:
        return torch.linspace(float(t[0]), float(t[-1]), steps + 1, dtype=t.dtype, device=t.device)

    return grid


@contextmanager
def _judged_warnings(method: str) -> Iterator[None]:
    """Make an error of an implicit step that does not converge, and nothing of options without effect."""
    if method in ADAPTIVE + RUNGE_KUTTA:
        yield  # nothing warns, and the filters are global state
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Functional iteration did not converge")
        warnings.filterwarnings("ignore", message="The following arguments have no effect")
        yield
