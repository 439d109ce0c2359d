"""Gradients: direct equals adjoint, and the choice of the steps carries none."""

import pytest
import torch
from torch import nn

from cnf_lab.ode import TorchdiffeqSolver

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


def test_direct_gradient_is_that_of_finite_differences(system, x):
    solver = TorchdiffeqSolver("dopri5", TIGHT, TIGHT)

    def end(x, *_):
        return solver.solve(system, (x, x.new_zeros(4)), 0.0, 1.0)[0]

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
