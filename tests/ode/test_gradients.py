"""Gradients: all modes agree, count their evaluations, and the choice of the steps carries none."""

import pytest
import torch
from torch import nn

from cnf_lab.ode import RungeKuttaSolver, TorchdiffeqSolver
from cnf_lab.ode.runge_kutta import GRADIENTS
from cnf_lab.ode.tableaus import FIXED, TABLEAUS

TIGHT = 1e-10


class System(nn.Module):
    """dx/dt = tanh(W x + c) cos t with a log-det that depends on everything."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3).double()
        self.context = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        self.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, t, state):
        hidden = torch.tanh(self.linear(state[0]) + self.context)
        return hidden * torch.cos(t), hidden.square().sum(dim=1) * t

    def gradients(self, solver, x):
        parameters = (*self.parameters(), self.context)
        (z, log_det), stats = solver.solve(self, (x, x.new_zeros(len(x))), 0.0, 1.0, parameters=parameters)
        loss = (z.square().sum(dim=1) - log_det).mean()
        return torch.autograd.grad(loss, (x, *parameters), allow_unused=True, materialize_grads=True), stats


@pytest.fixture
def system():
    return System()


@pytest.fixture
def x():
    return torch.randn(4, 3, dtype=torch.float64, requires_grad=True)


def assert_same(gradients, expected, tolerance):
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=tolerance, atol=tolerance)


@pytest.fixture
def expected(system, x):
    return system.gradients(TorchdiffeqSolver("dopri5", TIGHT, TIGHT), x)[0]


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_gradient_is_that_of_finite_differences(system, x, gradient):
    solver = RungeKuttaSolver("dopri5", TIGHT, TIGHT, gradient=gradient)
    wanted = (system.linear.weight, system.context)

    def end(x, *_):
        return solver.solve(system, (x, x.new_zeros(4)), 0.0, 1.0, parameters=wanted)[0]

    assert torch.autograd.gradcheck(end, (x, system.linear.weight, system.context), fast_mode=True)


@pytest.mark.parametrize("seminorm", [True, False], ids=["seminorm", "full-norm"])
@pytest.mark.parametrize("error_norm", ["batch", "example"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_adjoint_gradient_is_the_direct_one(system, x, expected, method, error_norm, seminorm):
    solver = TorchdiffeqSolver(
        method, TIGHT, TIGHT, error_norm=error_norm, gradient="adjoint", adjoint_seminorm=seminorm
    )
    gradients, stats = system.gradients(solver, x)
    assert_same(gradients, expected, 1e-6)
    assert stats.nfe_backward > 0


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(TorchdiffeqSolver("rk4", steps=64, gradient="adjoint"), id="rk4"),
        pytest.param(TorchdiffeqSolver("rk4", gradient="adjoint", options={"step_size": 0.02}), id="rk4-step-size"),
        pytest.param(TorchdiffeqSolver("implicit_adams", steps=64, gradient="adjoint"), id="implicit_adams"),
        pytest.param(TorchdiffeqSolver("scipy_solver", 1e-9, 1e-9, gradient="adjoint"), id="scipy"),
    ],
)
def test_adjoint_of_the_other_kinds_of_methods(system, x, expected, solver):
    gradients, stats = system.gradients(solver, x)
    assert_same(gradients, expected, 1e-6)
    assert stats.nfe_backward > 0


def test_seminorm_saves_evaluations(system, x):
    costs = []
    for seminorm in (True, False):
        solver = TorchdiffeqSolver("dopri5", 1e-9, 1e-9, gradient="adjoint", adjoint_seminorm=seminorm)
        costs.append(system.gradients(solver, x)[1].nfe_backward)
    assert costs[0] < costs[1]


def test_adjoint_tolerances_are_those_of_the_backward_solve(system, x):
    costs = []
    for bound in (None, 1e-3):
        solver = TorchdiffeqSolver("dopri5", 1e-9, 1e-9, gradient="adjoint", adjoint_atol=bound, adjoint_rtol=bound)
        costs.append(system.gradients(solver, x)[1])
    tight, loose = costs
    assert loose.nfe_forward == tight.nfe_forward
    assert loose.nfe_backward < tight.nfe_backward / 2


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_direct_gradient_evaluates_nothing_again(system, x, method):
    solver = TorchdiffeqSolver(method, steps=8 if method == "rk4" else None)
    _, stats = system.gradients(solver, x)
    assert stats.nfe_backward == 0


def test_adjoint_without_a_gradient_is_a_plain_solve(system, x):
    solver = TorchdiffeqSolver("dopri5", gradient="adjoint")
    with torch.no_grad():
        (z, _), stats = solver.solve(system, (x, x.new_zeros(4)), 0.0, 1.0, parameters=tuple(system.parameters()))
    assert not z.requires_grad
    assert stats.nfe_backward == 0


@pytest.mark.parametrize("error_norm", ["batch", "example"])
def test_choice_of_the_steps_carries_no_gradient(system, x, error_norm):
    """A replay of the same steps, with nothing left to choose, has the same gradient."""
    times = []

    def watched(t, state):
        times.append(float(t))
        return system(t, state)

    solver = TorchdiffeqSolver("dopri5", 1e-5, 1e-5, error_norm=error_norm)
    parameters = tuple(system.parameters())
    _, stats = solver.solve(watched, (x, x.new_zeros(4)), 0.0, 1.0, parameters=parameters)
    assert stats.rejected_steps == 0
    # The last stage of every step stands one rounding before its end.
    ends = torch.tensor([round(t, 14) for t in times[7::6]], dtype=torch.float64)
    replay = TorchdiffeqSolver("dopri5", 1e6, 1e6, options={"first_step": 1.0, "ifactor": 1e6, "step_t": ends})
    gradients, replayed = system.gradients(replay, x)
    assert replayed.accepted_steps == stats.accepted_steps
    assert_same(gradients, system.gradients(solver, x)[0], 1e-12)


class Counted:
    """A right-hand side with arguments that counts its calls."""

    def __init__(self, system):
        self.system, self.calls = system, 0

    def __call__(self, t, state, context, factor):
        self.calls += 1
        hidden = torch.tanh(self.system.linear(state[0]) + context)
        return factor * hidden * torch.cos(t), hidden.square().sum(dim=1) * t


def gradients_of_all(solver, system, x, deep=False):
    """Gradients by the state, an argument and the parameters, with evaluations counted outside the solver."""
    counted, encoder = Counted(system), torch.linspace(0.5, 1.5, 3, dtype=torch.float64, requires_grad=True)
    context = system.context * encoder if deep else system.context  # not a leaf, as of an encoder
    parameters = tuple(system.linear.parameters())
    state = (x, x.new_zeros(4), x.new_zeros(4))

    def rhs(t, state, context, factor):
        velocity, rate = counted(t, state[:2], context, factor)
        return velocity, rate, velocity.square().sum(dim=1)

    (z, log_det, energy), stats = solver.solve(rhs, state, 0.0, 1.0, (context, 1.5), parameters)
    assert counted.calls == stats.nfe_forward
    loss = (z.square().sum(dim=1) - log_det + 0.1 * energy).mean()
    wanted = (x, system.context, *parameters, *((encoder,) if deep else ()))
    found = torch.autograd.grad(loss, wanted)
    assert counted.calls == stats.nfe_forward + stats.nfe_backward
    return found, stats


@pytest.mark.parametrize("method", TABLEAUS)
@pytest.mark.parametrize("deep", [False, True], ids=["leaf", "encoded"])
def test_checkpoint_gradient_is_the_direct_one_to_round_off(system, x, method, deep):
    options = {"steps": 5} if method in FIXED else {"atol": 1e-4, "rtol": 1e-4}
    expected, direct = gradients_of_all(RungeKuttaSolver(method, **options), system, x, deep)
    found, stats = gradients_of_all(RungeKuttaSolver(method, gradient="checkpoint", **options), system, x, deep)
    assert_same(found, expected, 1e-12)
    assert direct.nfe_backward == 0
    # Only accepted steps are taken again, without the evaluation that only the error estimate needs.
    tableau = TABLEAUS[method]
    assert stats.nfe_backward == stats.accepted_steps * (len(tableau.nodes) - tableau.reuses_last)
    assert (stats.nfe_forward, stats.rejected_steps) == (direct.nfe_forward, direct.rejected_steps)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_every_mode_gives_the_gradient_of_a_converged_solve(system, x, gradient):
    expected, _ = gradients_of_all(TorchdiffeqSolver("dopri5", TIGHT, TIGHT), system, x, True)
    found, _ = gradients_of_all(RungeKuttaSolver("dopri5", TIGHT, TIGHT, gradient=gradient), system, x, True)
    assert_same(found, expected, 1e-7)


def test_rejected_steps_leave_no_trace_in_the_gradient(system, x):
    options = {"options": {"first_step": 1.0}}
    expected, direct = gradients_of_all(RungeKuttaSolver("dopri5", 1e-7, 1e-7, **options), system, x)
    solver = RungeKuttaSolver("dopri5", 1e-7, 1e-7, gradient="checkpoint", **options)
    found, stats = gradients_of_all(solver, system, x)
    assert direct.rejected_steps == stats.rejected_steps > 0
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_checkpointing_keeps_one_state_per_step(system, method):
    """Between forward and backward pass no evaluation's intermediate results are alive."""
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    saved = []
    solver = RungeKuttaSolver(method, steps=8 if method in FIXED else None, gradient="checkpoint")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        (z, log_det), stats = solver.solve(system, (x, x.new_zeros(4)), 0.0, 1.0, parameters=tuple(system.parameters()))
    assert saved == []
    assert stats.accepted_steps > 1
    assert len(z.grad_fn.solve.steps) == stats.accepted_steps


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_solve_without_gradients_is_plain(system, x, gradient):
    solver = RungeKuttaSolver("dopri5", gradient=gradient)
    with torch.no_grad():
        (z, _), stats = solver.solve(system, (x, x.new_zeros(4)), 0.0, 1.0, parameters=tuple(system.parameters()))
    assert not z.requires_grad
    assert stats.nfe_backward == 0
