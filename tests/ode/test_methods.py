"""Every method against the matrix exponential: accuracy, order, steps and direction."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torchdiffeq
from hypothesis import given

from cnf_lab.ode import SolveStats, TorchdiffeqSolver
from cnf_lab.ode.torchdiffeq import ADAPTIVE, FIXED_GRID, METHODS

MATRIX = torch.tensor([[-0.4, 1.3, 0.2], [-1.1, 0.3, 0.6], [0.5, -0.7, -0.2]], dtype=torch.float64)
FORCE = torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64)
START = torch.tensor([[1.0, -0.5, 2.0], [0.3, 0.8, -1.2]], dtype=torch.float64)
# Global error over tolerance that a method stays below; fehlberg2's estimate is of too low an order.
FACTOR = dict.fromkeys(ADAPTIVE, 10) | {"fehlberg2": 500}
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


def rhs(t, state):
    """dx/dt = A x + cos(3 t) b and a log-det at the rate trace A."""
    x, log_det = state
    return x @ MATRIX.mT + torch.cos(3 * t) * FORCE, torch.full_like(log_det, MATRIX.trace())


def exact(t0, t1):
    """Return x(t1) and the log-det from the exponential of the system with cos and sin as states."""
    system = torch.zeros(5, 5, dtype=torch.float64)
    system[:3, :3], system[:3, 3] = MATRIX, FORCE
    system[3, 4], system[4, 3] = -3, 3
    angle = torch.tensor([math.cos(3 * t0), math.sin(3 * t0)], dtype=torch.float64)
    start = torch.cat([START, angle.expand(2, 2)], dim=1)
    end = start @ torch.linalg.matrix_exp((t1 - t0) * system).mT
    return end[:, :3], torch.full((2,), float((t1 - t0) * MATRIX.trace()), dtype=torch.float64)


def solve(solver, t0=0.0, t1=1.0, rhs=rhs):
    return solver.solve(rhs, (START, START.new_zeros(2)), t0, t1)


def error(solver, t0=0.0, t1=1.0):
    (x, log_det), _ = solve(solver, t0, t1)
    expected_x, expected_log_det = exact(t0, t1)
    assert log_det.sub(expected_log_det).abs().max() < 1e-12  # every method integrates a constant exactly
    return float((x - expected_x).abs().max())


def test_methods_are_those_of_torchdiffeq():
    assert set(METHODS) == set(torchdiffeq.odeint.__globals__["SOLVERS"])


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.3)], ids=["forward", "backward", "short"])
def test_adaptive_methods_meet_the_tolerance(method, tolerance, t0, t1):
    if method in ("fehlberg2", "adaptive_heun") and tolerance < 1e-6:
        tolerance = 1e-5  # second order: thousands of steps otherwise
    assert error(TorchdiffeqSolver(method, tolerance, tolerance), t0, t1) < FACTOR[method] * tolerance


@pytest.mark.parametrize("scipy_method", ["LSODA", "RK45", "RK23", "DOP853", "Radau", "BDF"])
def test_scipy_methods_meet_the_tolerance(scipy_method):
    options = {"solver": scipy_method}
    solver = TorchdiffeqSolver("scipy_solver", 1e-6, 1e-6, gradient="adjoint", options=options)
    assert error(solver) < 100e-6


@pytest.mark.parametrize("method", FIXED_GRID)
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0)], ids=["forward", "backward"])
def test_fixed_grid_methods_come_near(method, t0, t1):
    bound = {"euler": 5e-2, "midpoint": 5e-4, "heun2": 5e-4}.get(method, 1e-5)
    assert error(TorchdiffeqSolver(method, steps=128), t0, t1) < bound


@pytest.mark.parametrize(
    ("method", "options", "order"),
    [
        ("euler", {}, 1),
        ("midpoint", {}, 2),
        ("heun2", {}, 2),
        ("heun3", {}, 3),
        ("rk4", {}, 4),
        ("explicit_adams", {"max_order": 4}, 3),
        ("implicit_adams", {"max_order": 4}, 4),
        ("fixed_adams", {"max_order": 4}, 4),
    ],
    ids=lambda value: str(value) if isinstance(value, str | int) else "",
)
def test_order_of_convergence(method, options, order):
    coarse, fine = (error(TorchdiffeqSolver(method, steps=steps, options=options)) for steps in (48, 96))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize(("method", "evaluations"), EVALUATIONS.items())
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_steps_are_honoured_exactly(method, evaluations, steps):
    _, stats = solve(TorchdiffeqSolver(method, steps=steps))
    assert stats.nfe_forward == steps * evaluations


def test_step_size_makes_its_own_grid():
    _, stats = solve(TorchdiffeqSolver("rk4", options={"step_size": 0.25}))
    assert stats.nfe_forward == 4 * 4


@given(st.floats(1e-3, 20), st.floats(1e-3, 20), st.integers(1, 12))
def test_any_interval_divides_into_equal_steps(t0, t1, steps):
    times = []

    def watched(t, state):
        times.append(float(t))
        return tuple(torch.zeros_like(part) for part in state)

    solve(TorchdiffeqSolver("euler", steps=steps), t0, t1, watched)
    if t0 != t1:
        expected = [t0 + (t1 - t0) * k / steps for k in range(steps)]
        assert times == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_dopri5_takes_2_evaluations_and_6_per_step(tolerance):
    _, stats = solve(TorchdiffeqSolver("dopri5", tolerance, tolerance))
    assert stats.accepted_steps > 0
    assert stats.nfe_forward == 2 + 6 * (stats.accepted_steps + stats.rejected_steps)


def test_rejected_steps_are_counted():
    _, stats = solve(TorchdiffeqSolver("dopri5", 1e-9, 1e-9, options={"first_step": 1.0}))
    assert stats.rejected_steps > 0
    assert stats.nfe_forward == 1 + 6 * (stats.accepted_steps + stats.rejected_steps)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0)], ids=["forward", "backward"])
@pytest.mark.parametrize("speed", [1.0, 1e-3], ids=["fast", "slow"])
def test_field_is_evaluated_only_between_the_ends(method, t0, t1, speed):
    times = []

    def watched(t, state):
        times.append(float(t))
        return tuple(speed * part for part in rhs(t, state))

    solve(TorchdiffeqSolver(method, 1e-4, 1e-4), t0, t1, watched)
    assert min(times) >= 0
    assert max(times) <= 1


@pytest.mark.parametrize("t1", [1.0, 0.0], ids=["forward", "backward"])
def test_steps_end_where_step_t_says(t1):
    times = []

    def watched(t, state):
        times.append(float(t))
        return rhs(t, state)

    solve(TorchdiffeqSolver("dopri5", 1e-3, 1e-3, options={"step_t": [0.437]}), 1 - t1, t1, watched)
    assert min(abs(t - 0.437) for t in times) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_there_and_back_again(method):
    if method in FIXED_GRID:
        solver = TorchdiffeqSolver(method, steps=256)
        bound = {"euler": 5e-2, "midpoint": 1e-4, "heun2": 1e-4}.get(method, 1e-6)
    else:
        gradient = "adjoint" if method == "scipy_solver" else "direct"
        solver = TorchdiffeqSolver(method, 1e-6, 1e-6, gradient=gradient)
        bound = 10e-6 * (50 if method == "fehlberg2" else 1)
    state, _ = solve(solver)
    back, _ = solver.solve(rhs, state, 1.0, 0.0)
    assert (back[0] - START).abs().max() < bound
    assert back[1].abs().max() < 1e-12


@pytest.mark.parametrize("error_norm", ["batch", "example"])
def test_integrals_do_not_steer_the_steps(error_norm):
    solver = TorchdiffeqSolver("dopri5", 1e-6, 1e-6, error_norm=error_norm)

    def burdened(t, state):
        return *rhs(t, state[:2]), 1e12 * torch.cos(500 * t) * state[0][:, 0]

    zeros = START.new_zeros(2)
    alone, light = solver.solve(rhs, (START, zeros), 0.0, 1.0)
    together, heavy = solver.solve(burdened, (START, zeros, zeros), 0.0, 1.0)
    assert repr(light) == repr(heavy)
    torch.testing.assert_close(together[:2], alone, rtol=1e-14, atol=1e-14)


def test_log_det_steers_the_steps():
    solver = TorchdiffeqSolver("dopri5", 1e-6, 1e-6)

    def wild(t, state):
        return rhs(t, state)[0], torch.cos(50 * t).expand(2)

    _, calm = solve(solver)
    (_, log_det), stats = solve(solver, rhs=wild)
    assert stats.nfe_forward > 2 * calm.nfe_forward
    torch.testing.assert_close(log_det, log_det.new_full((2,), math.sin(50) / 50), rtol=0, atol=1e-5)


def test_no_time_no_change():
    state = (START, START.new_zeros(2))
    end, stats = TorchdiffeqSolver("dopri5").solve(rhs, state, 0.5, 0.5)
    assert end is state
    assert repr(stats) == repr(SolveStats())


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_dtype_of_the_state_is_kept(method):
    solver = TorchdiffeqSolver(method, steps=4 if method == "rk4" else None)

    def single(t, state):
        assert t.dtype == state[0].dtype == torch.float32
        return -state[0], torch.zeros_like(state[1])

    (x, log_det), _ = solver.solve(single, (START.float(), torch.zeros(2)), 0.0, 1.0)
    assert x.dtype == log_det.dtype == torch.float32


def test_stats_add_up():
    solves = [solve(TorchdiffeqSolver("dopri5"))[1], solve(TorchdiffeqSolver("dopri8"))[1]]
    total = SolveStats.total(solves)
    assert total.nfe_forward == sum(solve.nfe_forward for solve in solves) > 0
    assert total.accepted_steps == sum(solve.accepted_steps for solve in solves) > 0
    assert repr(SolveStats.total([])) == repr(SolveStats())


def test_solvers_describe_themselves():
    adaptive = TorchdiffeqSolver("dopri5", 1e-4, 1e-3, error_norm="example", options={"max_num_steps": 99})
    fixed = TorchdiffeqSolver("rk4", steps=8, gradient="adjoint")
    assert adaptive.describe() == {
        "method": "dopri5",
        "gradient": "direct",
        "max_num_steps": 99,
        "atol": 1e-4,
        "rtol": 1e-3,
        "error_norm": "example",
    }
    assert fixed.describe() == {"method": "rk4", "gradient": "adjoint", "steps": 8}
