"""Every method against the matrix exponential: accuracy, order, steps and direction."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torchdiffeq
from hypothesis import given

from cnf_lab.ode import RungeKuttaSolver, SolveStats, TorchdiffeqSolver
from cnf_lab.ode.torchdiffeq import ADAPTIVE, FIXED_GRID, METHODS

MATRIX = torch.tensor([[-0.4, 1.3, 0.2], [-1.1, 0.3, 0.6], [0.5, -0.7, -0.2]], dtype=torch.float64)
FORCE = torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64)
START = torch.tensor([[1.0, -0.5, 2.0], [0.3, 0.8, -1.2]], dtype=torch.float64)
# Global error over tolerance that a method stays below; fehlberg2's estimate is of too low an order.
FACTOR = dict.fromkeys(ADAPTIVE, 10) | {"fehlberg2": 500}
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


BOTH = [RungeKuttaSolver, TorchdiffeqSolver]
RUNGE_KUTTA = [method for method in FIXED_GRID if method in EVALUATIONS]
EITHER = [(RungeKuttaSolver, method) for method in (*ADAPTIVE, *RUNGE_KUTTA)] + [
    (TorchdiffeqSolver, method) for method in (*ADAPTIVE, *FIXED_GRID)
]


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


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.3)], ids=["forward", "backward", "short"])
def test_adaptive_methods_meet_the_tolerance(kind, method, tolerance, t0, t1):
    if method in ("fehlberg2", "adaptive_heun") and tolerance < 1e-6:
        tolerance = 1e-5  # second order: thousands of steps otherwise
    assert error(kind(method, tolerance, tolerance), t0, t1) < FACTOR[method] * tolerance


@pytest.mark.parametrize("scipy_method", ["LSODA", "RK45", "RK23", "DOP853", "Radau", "BDF"])
def test_scipy_methods_meet_the_tolerance(scipy_method):
    options = {"solver": scipy_method}
    solver = TorchdiffeqSolver("scipy_solver", 1e-6, 1e-6, gradient="adjoint", options=options)
    assert error(solver) < 100e-6


@pytest.mark.parametrize(("kind", "method"), [pair for pair in EITHER if pair[1] in FIXED_GRID])
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0)], ids=["forward", "backward"])
def test_fixed_grid_methods_come_near(kind, method, t0, t1):
    bound = {"euler": 5e-2, "midpoint": 5e-4, "heun2": 5e-4}.get(method, 1e-5)
    assert error(kind(method, steps=128), t0, t1) < bound


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
    kind = TorchdiffeqSolver if options else RungeKuttaSolver
    coarse, fine = (error(kind(method, steps=steps, options=options)) for steps in (48, 96))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(("method", "evaluations"), EVALUATIONS.items())
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_steps_are_honoured_exactly(kind, method, evaluations, steps):
    _, stats = solve(kind(method, steps=steps))
    assert stats.nfe_forward == steps * evaluations


@pytest.mark.parametrize(("size", "steps"), [(0.25, 4), (0.3, 4), (0.2, 5), (1.0, 1), (7.0, 1)])
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0)], ids=["forward", "backward"])
def test_step_size_makes_its_own_grid(size, steps, t0, t1):
    solver = RungeKuttaSolver("rk4", options={"step_size": size})
    (x, _), stats = solve(solver, t0, t1)
    assert stats.nfe_forward == 4 * steps
    (expected, _), same = solve(TorchdiffeqSolver("rk4", options={"step_size": size}), t0, t1)
    assert same.nfe_forward == stats.nfe_forward
    torch.testing.assert_close(x, expected, rtol=1e-13, atol=1e-13)


@given(st.floats(1e-3, 20), st.floats(1e-3, 20), st.integers(1, 12))
def test_any_interval_divides_into_equal_steps(t0, t1, steps):
    times = []

    def watched(t, state):
        times.append(float(t))
        return tuple(torch.zeros_like(part) for part in state)

    solve(RungeKuttaSolver("euler", steps=steps), t0, t1, watched)
    if t0 != t1:
        expected = [t0 + (t1 - t0) * k / steps for k in range(steps)]
        assert times == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_dopri5_takes_2_evaluations_and_6_per_step(kind, tolerance):
    _, stats = solve(kind("dopri5", tolerance, tolerance))
    assert stats.accepted_steps > 0
    assert stats.nfe_forward == 2 + 6 * (stats.accepted_steps + stats.rejected_steps)


@pytest.mark.parametrize("kind", BOTH)
def test_rejected_steps_are_counted(kind):
    _, stats = solve(kind("dopri5", 1e-9, 1e-9, options={"first_step": 1.0}))
    assert stats.rejected_steps > 0
    assert stats.nfe_forward == 1 + 6 * (stats.accepted_steps + stats.rejected_steps)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0)], ids=["forward", "backward"])
@pytest.mark.parametrize("speed", [1.0, 1e-3], ids=["fast", "slow"])
def test_field_is_evaluated_only_between_the_ends(kind, method, t0, t1, speed):
    times = []

    def watched(t, state):
        times.append(float(t))
        return tuple(speed * part for part in rhs(t, state))

    solve(kind(method, 1e-4, 1e-4), t0, t1, watched)
    assert min(times) >= 0
    assert max(times) <= 1


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("t1", [1.0, 0.0], ids=["forward", "backward"])
def test_steps_end_where_step_t_says(kind, t1):
    times = []

    def watched(t, state):
        times.append(float(t))
        return rhs(t, state)

    solve(kind("dopri5", 1e-3, 1e-3, options={"step_t": [0.437]}), 1 - t1, t1, watched)
    assert min(abs(t - 0.437) for t in times) < 1e-12


@pytest.mark.parametrize(("kind", "method"), [*EITHER, (TorchdiffeqSolver, "scipy_solver")])
def test_there_and_back_again(kind, method):
    if method in FIXED_GRID:
        solver = kind(method, steps=256)
        bound = {"euler": 5e-2, "midpoint": 1e-4, "heun2": 1e-4}.get(method, 1e-6)
    else:
        gradient = "adjoint" if method == "scipy_solver" else "direct"
        solver = kind(method, 1e-6, 1e-6, gradient=gradient)
        bound = 10e-6 * (50 if method == "fehlberg2" else 1)
    state, _ = solve(solver)
    back, _ = solver.solve(rhs, state, 1.0, 0.0)
    assert (back[0] - START).abs().max() < bound
    assert back[1].abs().max() < 1e-12


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("error_norm", ["batch", "example"])
def test_integrals_do_not_steer_the_steps(kind, error_norm):
    solver = kind("dopri5", 1e-6, 1e-6, error_norm=error_norm)

    def burdened(t, state):
        return *rhs(t, state[:2]), 1e12 * torch.cos(500 * t) * state[0][:, 0]

    zeros = START.new_zeros(2)
    alone, light = solver.solve(rhs, (START, zeros), 0.0, 1.0)
    together, heavy = solver.solve(burdened, (START, zeros, zeros), 0.0, 1.0)
    assert repr(light) == repr(heavy)
    torch.testing.assert_close(together[:2], alone, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", BOTH)
def test_log_det_steers_the_steps(kind):
    solver = kind("dopri5", 1e-6, 1e-6)

    def wild(t, state):
        return rhs(t, state)[0], torch.cos(50 * t).expand(2)

    _, calm = solve(solver)
    (_, log_det), stats = solve(solver, rhs=wild)
    assert stats.nfe_forward > 2 * calm.nfe_forward
    torch.testing.assert_close(log_det, log_det.new_full((2,), math.sin(50) / 50), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", BOTH)
def test_no_time_no_change(kind):
    state = (START, START.new_zeros(2))
    end, stats = kind("dopri5").solve(rhs, state, 0.5, 0.5)
    assert end is state
    assert repr(stats) == repr(SolveStats())


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_dtype_of_the_state_is_kept(kind, method):
    solver = kind(method, steps=4 if method == "rk4" else None)

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


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", *RUNGE_KUTTA])
@pytest.mark.parametrize("error_norm", ["batch", "example"])
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0), (0.2, 3.0)], ids=["forward", "backward", "long"])
def test_both_solvers_agree_to_round_off(method, error_norm, t0, t1):
    for tolerance in (1e-3, 1e-6):
        steps = None if method in ADAPTIVE else 7
        (ours, log_det), stats = solve(
            RungeKuttaSolver(method, tolerance, tolerance, steps, error_norm=error_norm), t0, t1
        )
        (theirs, their_log_det), expected = solve(
            TorchdiffeqSolver(method, tolerance, tolerance, steps, error_norm=error_norm), t0, t1
        )
        torch.testing.assert_close((ours, log_det), (theirs, their_log_det), rtol=1e-10, atol=1e-10)
        assert stats.nfe_forward == expected.nfe_forward
        if method in ADAPTIVE:
            assert repr(stats) == repr(expected)


@pytest.mark.parametrize(
    "options",
    [{"safety": 0.6}, {"ifactor": 2.0}, {"first_step": 1.0, "dfactor": 0.7}, {"max_step": 0.05}, {"min_step": 0.3}],
)
def test_options_of_the_controller_mean_what_they_mean_to_torchdiffeq(options):
    results = [solve(kind("dopri5", 1e-7, 1e-7, options=options)) for kind in BOTH]
    (ours, stats), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert repr(stats) == repr(expected)
    assert repr(stats) != repr(solve(RungeKuttaSolver("dopri5", 1e-7, 1e-7))[1])


@pytest.mark.parametrize("method", ["fehlberg2", "adaptive_heun"])
def test_methods_without_a_last_evaluation_at_the_end_evaluate_there_again(method):
    times = []

    def watched(t, state):
        times.append(float(t))
        return rhs(t, state)

    _, stats = solve(RungeKuttaSolver(method, 1e-4, 1e-4), rhs=watched)
    assert stats.nfe_forward == len(times)
    stages = {"fehlberg2": 2, "adaptive_heun": 1}[method]
    # Two at the start, the stages of every step, and one at every new state but the end.
    assert len(times) == 2 + stages * (stats.accepted_steps + stats.rejected_steps) + stats.accepted_steps - 1


def test_a_tighter_solver_has_a_tenth_of_the_tolerance_or_twice_the_steps():
    for kind in BOTH:
        tight = kind("dopri5", 1e-3, 1e-4, error_norm="example", options={"first_step": 0.1}).tightened()
        assert (tight.atol, tight.rtol, tight.error_norm) == (1e-4, 1e-5, "example")
        assert tight.options == {"first_step": 0.1}
        assert kind("rk4", steps=6).tightened().steps == 12
        assert kind("rk4", options={"step_size": 0.5}).tightened().options == {"step_size": 0.25}
        assert kind("dopri5", 1e-7, 1e-7).tightened() is None
    assert RungeKuttaSolver("rk4", steps=6, compile=True).eager().compile is False
    assert RungeKuttaSolver("rk4", steps=6, compile=True).tightened().compile is True
