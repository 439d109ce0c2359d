r"""Explicit Runge-Kutta solves of our own, for what torchdiffeq's loop cannot do.

The numbers are torchdiffeq's: the same tableaus, first step, error test and controller, so that
both agree to round-off. What differs:

1. The state stays a tuple, no dense output is fitted, and times live on the host: an evaluation
   costs little beyond the field's own time.
2. A step is one function that ``torch.compile`` takes without a graph break.
3. Gradients may replay the accepted steps one by one (``gradient="checkpoint"``).
4. fehlberg2 and adaptive_heun evaluate the field anew at an accepted state; torchdiffeq hands
   the slope of their last, different, stage on.
5. A step that leaves the finite numbers is rejected and tried again at a fifth of its size.

References:
    Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I (1993), section II.4.
    Zhuang et al., Adaptive checkpoint adjoint (2020), https://arxiv.org/abs/2006.02493.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cnf_lab.errors import ConfigError, SolverError
from cnf_lab.ode.base import (
    Arguments,
    OdeSolver,
    RightHandSide,
    SolveStats,
    State,
    differentiated,
    tighter_options,
    without_autocast,
)
from cnf_lab.ode.failures import check_choice, solve_failure
from cnf_lab.ode.tableaus import EMBEDDED, TABLEAUS, Tableau
from cnf_lab.ode.torchdiffeq import CONSTRUCTOR, ERROR_NORMS, TorchdiffeqSolver

GRADIENTS = ("direct", "checkpoint", "adjoint")
ADAPTIVE_OPTIONS = ("min_step", "max_step", "first_step", "safety", "ifactor", "dfactor", "max_num_steps", "step_t")
FIXED_OPTIONS = ("step_size",)


class RungeKuttaSolver(OdeSolver):
    r"""An explicit Runge-Kutta method, on a fixed grid or with error control.

    =============== ============================ ===================== ==============================
    ``gradient``    gradient of                  memory                evaluations of the backward pass
    =============== ============================ ===================== ==============================
    ``direct``      the discrete solve, exact    every evaluation      none
    ``checkpoint``  the discrete solve, exact    a state per step, and those of the accepted steps
                                                 one step's evaluations
    ``adjoint``     the continuous problem, to   constant              another solve
                    the backward tolerance
    =============== ============================ ===================== ==============================

    Step sizes are constants of the gradient. The adjoint is torchdiffeq's, its forward solve too.

    Args:
        method: One of ``TABLEAUS``.
        atol: Absolute local error bound of a method with error control.
        rtol: Relative local error bound.
        steps: Number of equal steps between t0 and t1 of a fixed-grid method; None leaves the
            grid to ``options["step_size"]``.
        error_norm: ``example`` bounds the error of every row, ``batch`` the mean over the batch.
        gradient: ``direct``, ``checkpoint`` or ``adjoint``.
        compile: Whether ``torch.compile`` makes one graph of a step, with CUDA graphs on a GPU;
            a text is the mode of ``torch.compile``, such as ``default``.
        options: Further options: ``first_step``, ``min_step``, ``max_step``, ``safety``,
            ``ifactor``, ``dfactor``, ``max_num_steps``, ``step_t``; ``step_size`` on a fixed grid.
        adjoint_atol: Absolute bound of the adjoint's backward solve; None takes ``atol``.
        adjoint_rtol: Relative bound of the adjoint's backward solve; None takes ``rtol``.
        adjoint_seminorm: Whether the parameters' gradients are left out of the adjoint's error
            norm, which saves steps (Kidger et al. 2021, https://arxiv.org/abs/2009.09457).

    Raises:
        ConfigError: If an option is unknown, out of range, or does not go with the others.
    """

    def __init__(
        self,
        method: str,
        atol: float = 1e-5,
        rtol: float = 1e-5,
        steps: int | None = None,
        error_norm: str = "batch",
        gradient: str = "direct",
        compile: bool | str = False,
        options: Mapping[str, Any] | None = None,
        adjoint_atol: float | None = None,
        adjoint_rtol: float | None = None,
        adjoint_seminorm: bool = True,
    ) -> None:
        options = {name: value for name, value in (options or {}).items() if value is not None}
        check_choice("solver.method", method, tuple(TABLEAUS))
        check_choice("solver.gradient", gradient, GRADIENTS)
        for option in options:
            check_choice("solver.options", option, ADAPTIVE_OPTIONS if method in EMBEDDED else FIXED_OPTIONS)
        # It checks what both have in common.
        self._torchdiffeq = TorchdiffeqSolver(
            method,
            atol,
            rtol,
            steps,
            error_norm,
            "adjoint" if gradient == "adjoint" else "direct",
            options,
            adjoint_atol,
            adjoint_rtol,
            adjoint_seminorm,
        )
        if isinstance(compile, str):
            check_choice("solver.compile", compile, tuple(torch._inductor.list_mode_options()))
        if compile and gradient == "adjoint":
            raise ConfigError(
                "Expected solver.gradient=direct or checkpoint with solver.compile, whose loop is not torchdiffeq's, "
                "got adjoint. Type solver.gradient=checkpoint."
            )
        self.method, self.atol, self.rtol, self.steps = method, atol, rtol, steps
        self.error_norm, self.gradient, self.compile, self.options = error_norm, gradient, compile, options
        self.adjoint_atol, self.adjoint_rtol, self.adjoint_seminorm = adjoint_atol, adjoint_rtol, adjoint_seminorm

    @property
    def adaptive(self) -> bool:
        """Whether the steps follow an error estimate."""
        return self.method in EMBEDDED

    def describe(self) -> dict[str, object]:
        """Return method, tolerances and options as plain values."""
        compiled = {"compile": self.compile} if self.compile else {}
        return {**self._torchdiffeq.describe(), "gradient": self.gradient, **compiled}

    def changed(self, **options: Any) -> "RungeKuttaSolver":
        """Return the same solver with other options of its constructor."""
        return RungeKuttaSolver(**{name: getattr(self, name) for name in (*CONSTRUCTOR, "compile")} | options)

    def eager(self) -> "RungeKuttaSolver":
        """Return the same solver without compilation."""
        return self.changed(compile=False) if self.compile else self

    def tightened(self) -> "RungeKuttaSolver | None":
        """Return the solver with a tenth of the tolerances, or with twice the steps."""
        tighter = tighter_options(self.adaptive, self.atol, self.rtol, self.steps, self.options)
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
        wanted = differentiated(arguments, parameters) if torch.is_grad_enabled() else ()
        needs_gradient = torch.is_grad_enabled() and (bool(wanted) or any(part.requires_grad for part in state))
        if needs_gradient and self.gradient == "adjoint":
            return self._torchdiffeq.solve(rhs, state, t0, t1, arguments, parameters)
        solve = _Solve(self, rhs, arguments, t0, t1, state[0])
        with without_autocast(state[0].device.type):
            solve.check(state, "start")
            if needs_gradient and self.gradient == "checkpoint":
                end = _Replay.apply(solve, len(state), *state, *wanted)
            else:
                end = solve.run(state)
            solve.check(end, "end")
        return end, solve.stats


class _Step(NamedTuple):
    """One step of a solve: the times of its evaluations, its size, and the state at its start."""

    times: Tensor
    size: Tensor
    state: State


class _Solve:
    """One solve: its loop, what it costs, and how its failures read."""

    def __init__(
        self, solver: RungeKuttaSolver, rhs: RightHandSide, arguments: Arguments, t0: float, t1: float, like: Tensor
    ) -> None:
        self.solver, self.rhs, self.arguments, self.t0, self.t1 = solver, rhs, arguments, t0, t1
        self.tableau: Tableau = TABLEAUS[solver.method]
        self.norm = ERROR_NORMS[solver.error_norm]
        self.dtype, self.device = like.dtype, like.device
        self.take_step = _step_function(solver.compile, like.device.type)
        self.stats = SolveStats()
        self.steps: list[_Step] | None = None  # the accepted ones, when they are recorded
        self._time, self._size = t0, math.nan

    def run(self, state: State) -> State:
        """Integrate from t0 to t1."""
        return self._run_adaptive(state) if self.solver.adaptive else self._run_fixed(state)

    @torch.no_grad()
    def check(self, state: State, where: str) -> None:
        """Raise SolverError where a state is not finite."""
        if not bool(torch.stack([part.isfinite().all() for part in state]).all()):
            raise self._failure(f"the state at the {where} is not finite")

    def replay(self, step: _Step, state: State) -> State:
        """Take a recorded step again, counted as work of the backward pass."""
        used = len(self.tableau.nodes) - self.tableau.reuses_last
        self.stats.nfe_backward += used
        end, *_ = self.take_step(self.rhs, self.tableau, state, None, step.times, step.size, self.arguments)
        return end

    def _run_fixed(self, state: State) -> State:
        grid = self._grid()
        starts, sizes = grid[:-1, None], grid.diff()
        times = (starts + sizes[:, None] * torch.tensor(self.tableau.nodes, dtype=torch.float64)).to(self.dtype)
        times, sizes = times.to(self.device), sizes.to(self.device)
        for row, size, t, h in zip(times.unbind(), sizes.unbind(), grid.tolist(), grid.diff().tolist(), strict=False):
            self._time, self._size = t, h
            self._record(row, size, state)
            state, *_ = self.take_step(self.rhs, self.tableau, state, None, row, size, self.arguments)
            self.stats.nfe_forward += len(self.tableau.nodes)
            self.stats.accepted_steps += 1
        return state

    def _grid(self) -> Tensor:
        t0, t1, size = self.t0, self.t1, self.solver.options.get("step_size")
        if self.solver.steps is not None:
            return torch.linspace(t0, t1, self.solver.steps + 1, dtype=torch.float64)
        assert size is not None  # the constructor asks for one of them
        steps = max(1, math.ceil(abs(t1 - t0) / size - 1e-9))
        grid = t0 + math.copysign(size, t1 - t0) * torch.arange(steps + 1, dtype=torch.float64)
        grid[-1] = t1
        return grid

    def _run_adaptive(self, state: State) -> State:
        controller = _Controller(self.solver, self.tableau.order)
        direction = math.copysign(1.0, self.t1 - self.t0)
        slope = self._evaluate(self.t0, state)
        size = self.solver.options.get("first_step") or self._first_step(state, slope, direction)
        stops = self._stops(direction)
        stop = next(stops)
        while self._time != self.t1:
            size = controller.clamped(size)
            self._size = size
            taken = self.stats.accepted_steps + self.stats.rejected_steps
            if taken >= controller.max_num_steps:
                raise self._failure(f"max_num_steps exceeded ({taken}>={controller.max_num_steps})")
            if self._time + direction * size == self._time:
                raise self._failure(f"underflow in dt {size:.3g}")
            t = self._time + direction * size
            if direction * (t - stop) >= 0:
                t, size = stop, abs(stop - self._time)
            candidate, last, error = self._try(state, slope, t)
            ratio = float(error)
            if controller.accepts(size, ratio):
                self.stats.accepted_steps += 1
                state, self._time = candidate, t
                if last is not None:
                    slope = last
                elif t != self.t1:
                    slope = self._evaluate(t, state)
                stop = next(stops) if t == stop and t != self.t1 else stop
            else:
                self.stats.rejected_steps += 1
                if self.steps is not None:
                    self.steps.pop()
            size = controller.next_size(size, ratio)
        return state

    def _try(self, state: State, slope: State, t: float) -> tuple[State, State | None, Any]:
        size = t - self._time
        nodes = [self._time + node * size if node != 1 else t for node in self.tableau.nodes]
        times = torch.tensor(nodes, dtype=self.dtype, device=self.device)
        h = torch.tensor(size, dtype=torch.float64, device=self.device)
        self._record(times, h, state)
        self.stats.nfe_forward += len(nodes) - 1
        bounds = (self.solver.atol, self.solver.rtol, self.norm)
        return self.take_step(self.rhs, self.tableau, state, slope, times, h, self.arguments, *bounds)

    def _record(self, times: Tensor, size: Tensor, state: State) -> None:
        if self.steps is not None:
            self.steps.append(_Step(times, size, tuple(part.detach() for part in state)))

    def _stops(self, direction: float) -> Iterator[float]:
        given = torch.as_tensor(self.solver.options.get("step_t", ()), dtype=torch.float64).flatten().tolist()
        inside = {t for t in given if direction * self.t0 < direction * t < direction * self.t1}
        return iter(sorted({*inside, self.t1}, key=lambda t: direction * t))

    def _evaluate(self, t: float, state: State) -> State:
        self.stats.nfe_forward += 1
        return self.rhs(torch.tensor(t, dtype=self.dtype, device=self.device), state, *self.arguments)

    @torch.no_grad()
    def _first_step(self, state: State, slope: State, direction: float) -> float:
        """Return the first step size by the book: Hairer et al., section II.4."""
        scale = [self.solver.atol + part.abs() * self.solver.rtol for part in state]

        def measure(parts: Sequence[Tensor]) -> float:
            return float(self.norm(tuple(part / s for part, s in zip(parts, scale, strict=True))))

        d0, d1 = measure(state), measure(slope)
        h0 = 1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1
        t = self.t0 + direction * min(h0, abs(self.t1 - self.t0))
        ahead = tuple(part + direction * h0 * k for part, k in zip(state, slope, strict=True))
        change = [new - old for new, old in zip(self._evaluate(t, ahead), slope, strict=True)]
        d2 = measure(change) / h0
        largest = max(d1, d2)
        h1 = max(1e-6, h0 * 1e-3) if largest <= 1e-15 else (0.01 / largest) ** (1 / self.tableau.order)
        first = min(100 * h0, h1)
        return first if math.isfinite(first) else 1e-6

    def _failure(self, reason: str) -> SolverError:
        solver, step = self.solver, None if math.isnan(self._size) else self._size
        text = solve_failure(solver.method, self._time, step, self.stats.nfe_forward, solver.atol, solver.rtol, reason)
        return SolverError(text)


class _Controller:
    """The choice of step sizes: torchdiffeq's integral controller with its defaults."""

    def __init__(self, solver: RungeKuttaSolver, order: int) -> None:
        get = solver.options.get
        self.safety, self.grow, self.shrink = get("safety", 0.9), get("ifactor", 10.0), get("dfactor", 0.2)
        self.min_step, self.max_step = get("min_step", 0.0), get("max_step", math.inf)
        self.max_num_steps = get("max_num_steps", 2**31 - 1)
        self.order = order

    def clamped(self, size: float) -> float:
        return min(max(size, self.min_step), self.max_step)

    def accepts(self, size: float, ratio: float) -> bool:
        return size <= self.max_step and (ratio <= 1 or (size <= self.min_step and math.isfinite(ratio)))

    def next_size(self, size: float, ratio: float) -> float:
        if ratio == 0:
            return size * self.grow
        if not math.isfinite(ratio):
            return size * self.shrink
        shrink = 1.0 if ratio < 1 else self.shrink
        return size * min(self.grow, max(self.safety * ratio ** (-1 / self.order), shrink))


class _Replay(torch.autograd.Function):
    """A solve that keeps the state of every accepted step and takes the steps again to go back."""

    @staticmethod
    def forward(ctx: Any, solve: _Solve, parts: int, *tensors: Tensor) -> State:
        solve.steps = []
        ctx.solve, ctx.wanted = solve, tensors[parts:]
        return solve.run(tensors[:parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        solve, wanted = ctx.solve, ctx.wanted
        totals: list[Tensor | None] = [None] * len(wanted)
        with torch.enable_grad(), without_autocast(solve.device.type):
            for step in reversed(solve.steps):
                start = tuple(part.detach().requires_grad_() for part in step.state)
                end = solve.replay(step, start)
                found = torch.autograd.grad(end, (*start, *wanted), gradients, allow_unused=True)
                gradients = found[: len(start)]
                totals = [_sum(total, new) for total, new in zip(totals, found[len(start) :], strict=True)]
        return None, None, *gradients, *totals


def _sum(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    if total is None or new is None:
        return new if total is None else total
    return total + new


def _take_step(
    rhs: RightHandSide,
    tableau: Tableau,
    state: State,
    slope: State | None,
    times: Tensor,
    size: Tensor,
    arguments: Arguments,
    atol: float = 0.0,
    rtol: float = 0.0,
    norm: Callable[[State], Tensor] | None = None,
) -> tuple[State, State | None, Any]:
    """Take one step; with a norm, estimate its error as well.

    Args:
        rhs: Right-hand side.
        tableau: The method.
        state: State at the start.
        slope: Derivative at the start where it is known.
        times: Times of the evaluations.
        size: Signed size of the step.
        arguments: Arguments of the right-hand side.
        atol: Absolute local error bound.
        rtol: Relative local error bound.
        norm: Norm of the error; None for a step that is taken in any case.

    Returns:
        The state at the end; the derivative there, where the last evaluation gives it; and the
        error over its bound.
    """
    slopes = [rhs(times[0], state, *arguments) if slope is None else slope]
    needed = len(tableau.nodes) - (tableau.reuses_last and norm is None)
    for index in range(1, needed):
        stage = _advanced(state, slopes, tableau.matrix[index], size)
        slopes.append(rhs(times[index], stage, *arguments))
    # The last stage of a method that reuses it stands at the end of the step.
    end = stage if tableau.reuses_last and norm is not None else _advanced(state, slopes, tableau.weights, size)
    if norm is None:
        return end, None, None
    with torch.no_grad():
        error = _weighted(slopes, tableau.errors)
        relative = tuple(
            size * e / (atol + rtol * torch.maximum(old.abs(), new.abs()))
            for e, old, new in zip(error, state, end, strict=True)
        )
        ratio = norm(relative)
    return end, slopes[-1] if tableau.reuses_last else None, ratio


def _advanced(state: State, slopes: Sequence[State], weights: Sequence[float], size: Tensor) -> State:
    return tuple(part + size * change for part, change in zip(state, _weighted(slopes, weights), strict=True))


def _weighted(slopes: Sequence[State], weights: Sequence[float]) -> State:
    """Return the weighted sum of the slopes, part by part, terms with weight 0 left out."""
    terms = [(slope, weight) for slope, weight in zip(slopes, weights, strict=False) if weight != 0]
    totals = []
    for index in range(len(slopes[0])):
        total = terms[0][0][index] * terms[0][1]
        for slope, weight in terms[1:]:
            total = torch.add(total, slope[index], alpha=weight)
        totals.append(total)
    return tuple(totals)


def _step_function(compile: bool | str, device_type: str) -> Callable[..., tuple[State, State | None, Any]]:
    if not compile:
        return _take_step
    if compile is True:
        # CUDA graphs spare a GPU the launches of many small kernels.
        compile = "reduce-overhead" if device_type == "cuda" else "default"
    return _compiled(compile)


@functools.cache
def _compiled(mode: str) -> Callable[..., tuple[State, State | None, Any]]:
    # Kept here and not in a solver: compiled functions can be neither copied nor saved. All solves of
    # a process share it, so that a sweep or several fields need more than the usual 8 graphs.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 64)
    return torch.compile(_take_step, mode=mode, fullgraph=True, dynamic=False)
