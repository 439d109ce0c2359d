"""Failed solves say what happened and what to change; wrong options are refused."""

import re

import pytest
import torch

from cnf_lab.errors import ConfigError, SolverError
from cnf_lab.ode import RungeKuttaSolver, TorchdiffeqSolver, backward_failures
from cnf_lab.ode.torchdiffeq import ADAPTIVE

BOTH = [RungeKuttaSolver, TorchdiffeqSolver]
START = torch.tensor([[5.0, -3.0], [0.1, 20.0]], dtype=torch.float64)
FAILURE = re.compile(
    r"The solve with \w+ failed at t = (?P<t>\S+) \(step size (?P<step>[^,]+), "
    r"(?P<evaluations>\d+) evaluations, atol (?P<atol>\S+), rtol (?P<rtol>\S+)\): "
    r"(?P<reason>.+?)\. (?P<advice>.+)\.",
)


def rhs(derivative, limit=20_000):
    """Return a right-hand side without log-det that a solver may not evaluate forever."""
    evaluations = 0

    def bounded(t, state):
        nonlocal evaluations
        evaluations += 1
        if evaluations > limit:
            pytest.fail(f"still running after {limit} evaluations, at t = {float(t):.17g}")
        return derivative(t, state[0]), torch.zeros_like(state[1])

    return bounded


def failure(solver, derivative, start=START, t0=0.0, t1=1.0):
    """Return the parts of the message of a solve that must fail."""
    with pytest.raises(SolverError) as caught:
        solver.solve(rhs(derivative), (start, start.new_zeros(len(start))), t0, t1)
    assert "\n" not in str(caught.value)
    match = FAILURE.fullmatch(str(caught.value))
    assert match, str(caught.value)
    return match.groupdict()


def explode(t, x):
    return x**3  # the largest entry becomes infinite at t = 1 / 800


def decay(t, x):
    return -x


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0)], ids=["forward", "backward"])
def test_exploding_adaptive_solve(kind, method, t0, t1):
    parts = failure(kind(method, 1e-4, 1e-3), lambda t, x: (t1 - t0) * x**3, t0=t0, t1=t1)
    assert abs(float(parts["t"]) - t0) < 1 / 500
    assert float(parts["step"]) < 1e-3
    assert int(parts["evaluations"]) > 2
    assert (parts["atol"], parts["rtol"]) == ("0.0001", "0.001")
    assert parts["reason"].startswith("underflow in dt")
    assert "optimiser.lr" in parts["advice"]


@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, method) for kind in BOTH for method in ("euler", "rk4")]
    + [(TorchdiffeqSolver, "explicit_adams"), (TorchdiffeqSolver, "implicit_adams")],
)
def test_exploding_fixed_grid_solve(kind, method):
    parts = failure(kind(method, steps=16), explode)
    assert 0 <= float(parts["t"]) < 1
    assert float(parts["step"]) == 1 / 16
    assert int(parts["evaluations"]) > 0
    assert "optimiser.lr" in parts["advice"]


@pytest.mark.parametrize("scipy_method", ["LSODA", "RK45", "RK23", "Radau", "BDF"])
def test_exploding_scipy_solve(scipy_method):
    options = {"solver": scipy_method}
    parts = failure(TorchdiffeqSolver("scipy_solver", gradient="adjoint", options=options), explode)
    assert int(parts["evaluations"]) > 0
    assert "optimiser.lr" in parts["advice"]


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(RungeKuttaSolver("dopri5"), id="dopri5"),
        pytest.param(RungeKuttaSolver("rk4", steps=8), id="rk4"),
        pytest.param(RungeKuttaSolver("dopri5", gradient="checkpoint"), id="checkpoint"),
        pytest.param(TorchdiffeqSolver("dopri5"), id="dopri5-torchdiffeq"),
        pytest.param(TorchdiffeqSolver("rk4", steps=8), id="rk4-torchdiffeq"),
        pytest.param(TorchdiffeqSolver("scipy_solver", gradient="adjoint"), id="scipy"),
    ],
)
def test_field_that_turns_into_nan(solver):
    parts = failure(solver, lambda t, x: torch.where(t > 0.5, torch.nan, 1.0) * x)
    assert "optimiser.lr" in parts["advice"]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_start_that_is_not_finite(kind, value):
    start = START.clone()
    start[1, 0] = value
    parts = failure(kind("dopri5"), decay, start)
    assert parts["evaluations"] == "0"
    assert parts["reason"] == "the state at the start is not finite"
    assert parts["advice"].startswith("Look for NaN or infinities in the data")


@pytest.mark.parametrize("kind", BOTH)
def test_too_many_steps(kind):
    parts = failure(kind("dopri5", 1e-9, 1e-9, options={"max_num_steps": 3}), decay)
    assert 0 < float(parts["t"]) < 1
    assert parts["reason"].startswith("max_num_steps exceeded")
    assert parts["advice"].startswith("Raise solver.options.max_num_steps")


def test_failed_backward_solve():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    tight = {"adjoint_atol": 1e-14, "adjoint_rtol": 1e-14}
    solver = TorchdiffeqSolver("dopri5", gradient="adjoint", options={"max_num_steps": 40}, **tight)
    (x, _), _ = solver.solve(
        rhs(lambda t, x: torch.sin(weight * x)), (START, START.new_zeros(2)), 0.0, 1.0, parameters=(weight,)
    )
    message = r"The backward solve of the adjoint failed: max_num_steps exceeded .*\. Type solver\.gradient=direct"
    with pytest.raises(SolverError, match=message), backward_failures():
        x.sum().backward()


def test_errors_of_the_field_keep_their_own_traceback():
    def broken(t, x):
        raise KeyError("a defect of the field")

    with pytest.raises(KeyError):
        TorchdiffeqSolver("dopri5").solve(rhs(broken), (START, START.new_zeros(2)), 0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "dopri"},
            r"Expected solver\.method to be one of .*, got dopri\. Type solver\.method=dopri[58]\.",
        ),
        ({"method": "bdf"}, r"Expected solver\.method to be one of .*, got bdf\."),
        ({"method": "dopri5", "gradient": "adjiont"}, r"got adjiont\. Type solver\.gradient=adjoint\."),
        (
            {"method": "dopri5", "error_norm": "row"},
            r"solver\.error_norm to be one of batch, example, got row\.",
        ),
        ({"method": "dopri5", "atol": 0.0}, r"Expected solver\.atol above 0, got 0\.0\. Type solver\.atol="),
        ({"method": "dopri5", "rtol": -1e-3}, r"Expected solver\.rtol above 0, got -0\.001\."),
        ({"method": "dopri5", "rtol": float("nan")}, r"Expected solver\.rtol above 0, got nan\."),
        (
            {"method": "dopri5", "steps": 8},
            r"got solver\.steps=8 with solver\.method=dopri5\. Type solver=rk4",
        ),
        ({"method": "scipy_solver", "gradient": "adjoint", "steps": 8}, r"got solver\.steps=8 with"),
        ({"method": "rk4", "steps": 0}, r"Expected solver\.steps of at least 1 .*, got solver\.steps=0"),
        ({"method": "rk4"}, r"Expected a grid for the fixed-grid method rk4, .* Type solver\.steps=8\."),
        (
            {"method": "rk4", "steps": 8, "options": {"max_num_steps": 9}},
            r"solver\.options .* got max_num_steps\.",
        ),
        ({"method": "rk4", "steps": 8, "options": {"step_size": 0.1}}, r"solver\.steps .*step_size"),
        ({"method": "euler", "steps": 8, "options": {"max_order": 4}}, r"solver\.options .* got max_order\."),
        (
            {"method": "dopri5", "options": {"max_steps": 9}},
            r"got max_steps\. Type solver\.options\.max_step",
        ),
        (
            {"method": "scipy_solver", "gradient": "adjoint", "options": {"solver": "LSODE"}},
            r"got LSODE\. Type .*LSODA",
        ),
        ({"method": "scipy_solver"}, r"solver\.gradient=adjoint with solver\.method=scipy_solver"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused(arguments, message):
    kinds = [TorchdiffeqSolver] if arguments["method"] == "scipy_solver" else BOTH
    for kind in kinds:
        with pytest.raises(ConfigError, match=message) as caught:
            kind(**arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient": "chekpoint"}, r"got chekpoint\. Type solver\.gradient=checkpoint\."),
        ({"method": "implicit_adams", "steps": 8}, r"Expected solver\.method to be one of .*, got implicit_adams\."),
        ({"compile": "fast"}, r"Expected solver\.compile to be one of default, .*, got fast\."),
        ({"compile": True, "gradient": "adjoint"}, r"with solver\.compile, .* Type solver\.gradient=checkpoint\."),
        ({"options": {"jump_t": [0.5]}}, r"solver\.options .* got jump_t\."),
    ],
)
def test_wrong_options_of_our_own_solver_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        RungeKuttaSolver(**{"method": "dopri5", **arguments})


def test_a_step_into_infinity_is_tried_again_smaller():
    """The root has no value below 0, where a first step of 1 would look."""
    start = torch.full((1, 1), 0.25, dtype=torch.float64)

    def root(t, state):
        return -state[0].sqrt(), torch.zeros_like(state[1])

    solver = RungeKuttaSolver("dopri5", 1e-6, 1e-6, options={"first_step": 1.0})
    (x, _), stats = solver.solve(root, (start, start.new_zeros(1)), 0.0, 0.9)
    assert stats.rejected_steps > 0
    torch.testing.assert_close(x, (start.sqrt() - 0.45).square(), rtol=1e-4, atol=1e-6)
