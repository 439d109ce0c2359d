"""Integrated penalties against brute force along a path of another solver, their gradients and their steps."""

import pytest
import torch
import torchdiffeq
from torch import Tensor

from cnf_lab.errors import ConfigError
from cnf_lab.fields import ConcatSquash, Hyper, Mlp, Residual, Softplus, Swish, Tanh, VectorField
from cnf_lab.flows import Chain, ContinuousFlow, Flow, StandardNormal
from cnf_lab.objectives import (
    DirectionalDerivative,
    JacobianDiagonal,
    JacobianFrobenius,
    JacobianNorm,
    JacobianOffDiagonal,
    KineticEnergy,
    L1Speed,
    L2Speed,
    Likelihood,
    LossTerms,
    Regulariser,
    TotalDerivative,
)
from cnf_lab.ode import RungeKuttaSolver, TorchdiffeqSolver
from cnf_lab.trace import Exact, Hutchinson, Linearised, Needs, Rademacher

FIELDS = {
    "closed-form": lambda: Mlp((3,), [6, 5], ConcatSquash, Softplus),
    "one-hidden": lambda: Mlp((3,), [6], Hyper, Tanh),
    "residual": lambda: Residual((3,), 6, 1, Swish, 1),
    "conditional": lambda: Mlp((3,), [6, 5], ConcatSquash, Tanh, context_features=2),
}
SLOW = {"deep": lambda: Mlp((3,), [6, 5, 6], ConcatSquash, Tanh)}  # in time: few steps of an adjoint
END = 1.3


class Smooth(Regulariser):
    """Squares of what norms are taken of: norms have kinks, which take many steps of a backward solve."""

    needs = Needs.PULLED_VALUE | Needs.ACCELERATION

    def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
        return (found.acceleration.square() + found.pulled_value.square()).mean(dim=1)


def penalties(weight: float = 0.1) -> dict:
    return {
        "l1": L1Speed(weight),
        "l2": L2Speed(weight),
        "directional": DirectionalDerivative(weight),
        "total_derivative": TotalDerivative(weight),
        "frobenius": JacobianFrobenius(weight),
        "diagonal": JacobianDiagonal(weight),
        "off_diagonal": JacobianOffDiagonal(weight),
        "off_diagonal_square": JacobianOffDiagonal(weight, root=False),
        "kinetic": KineticEnergy(weight),
        "jacobian": JacobianNorm(weight),
    }


def derivatives(field: VectorField, t: Tensor, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The value, the Jacobian and the derivative by time of each row, from autograd."""

    def row(s: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
        return field(s, y.unsqueeze(0), None if c is None else c.unsqueeze(0))[0]

    values, jacobians, changes = [], [], []
    for b in range(len(x)):
        own = None if context is None else context[b]
        by_time, by_state = torch.autograd.functional.jacobian(lambda s, y, own=own: row(s, y, own), (t, x[b]))
        values.append(row(t, x[b], own))
        jacobians.append(by_state)
        changes.append(by_time)
    return torch.stack(values).detach(), torch.stack(jacobians), torch.stack(changes)


def integrands(value: Tensor, jacobian: Tensor, change: Tensor) -> dict[str, Tensor]:
    """The original's definitions, each row apart; numel is what its norm is divided by the root of."""
    size = value.shape[1]
    diagonal = torch.stack([torch.diag(entry) for entry in jacobian])
    rest = jacobian.square().sum(dim=(1, 2)) - diagonal.square().sum(dim=1)
    pulled = torch.stack([entry.T @ f for entry, f in zip(jacobian, value, strict=True)])
    pushed = torch.stack([entry @ f for entry, f in zip(jacobian, value, strict=True)])
    return {
        "l1": value.abs().mean(dim=1),
        "l2": value.norm(dim=1) / size**0.5,
        "directional": pulled.norm(dim=1) / size**0.5,
        "total_derivative": (change + pushed).norm(dim=1) / size**0.5,
        "frobenius": jacobian.flatten(1).norm(dim=1) / size,
        "diagonal": diagonal.norm(dim=1) / size**0.5,
        "off_diagonal": (rest / (size * (size - 1))).sqrt(),
        "off_diagonal_square": rest / (size * (size - 1)),
        "kinetic": value.square().mean(dim=1),
        "jacobian": jacobian.square().sum(dim=(1, 2)) / size,
    }


@torch.no_grad()
def brute_force(field: VectorField, x: Tensor, context: Tensor | None) -> dict[str, Tensor]:
    """Simpson's rule along a tight solve by torchdiffeq."""
    times = torch.linspace(0, END, 65, dtype=torch.float64)
    states = torchdiffeq.odeint(lambda t, y: field(t, y, context), x, times, rtol=1e-11, atol=1e-11)
    weights = torch.full_like(times, 2 / 3)
    weights[1::2] = 4 / 3
    weights[[0, -1]] = 1 / 3
    totals: dict[str, Tensor] = {}
    for weight, t, state in zip(weights * (times[1] - times[0]), times, states, strict=True):
        with torch.enable_grad():
            found = integrands(*derivatives(field, t, state, context))
        totals = {name: totals.get(name, 0) + weight * part for name, part in found.items()}
    return totals


@pytest.fixture(params=FIELDS)
def case(request, randomise):
    field = randomise((FIELDS | SLOW)[request.param](), 0.3)
    context = torch.randn(3, 2, dtype=torch.float64) if request.param == "conditional" else None
    return field, torch.randn(3, 3, dtype=torch.float64), context


def evaluated(field, x, context, solver, chosen, trace=None, blocks=1) -> LossTerms:
    parts = [ContinuousFlow(field, solver, trace or Exact(), end_time=END) for _ in range(blocks)]
    flow = Flow(Chain(parts), StandardNormal((3,)), 0 if context is None else 2).train()
    return Likelihood(chosen)(flow, x, context, torch.Generator().manual_seed(0))


def gradients(field, result):
    field.zero_grad()
    result.loss.backward()
    return [parameter.grad.clone() for parameter in field.parameters()]


def test_every_penalty_is_its_definition_along_the_path(case):
    expected, solver = brute_force(*case), RungeKuttaSolver("rk4", steps=40)
    exact, estimated = (
        evaluated(*case, solver, penalties(), trace).terms for trace in (Exact(), Hutchinson(Rademacher()))
    )
    for name, value in expected.items():
        # A component of the velocity that changes its sign makes a kink, for both rules.
        bounds = {"rtol": 1e-3, "atol": 1e-3} if name == "l1" else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(exact[name], value, **bounds, msg=lambda text, name=name: f"{name}: {text}")
        if name != "jacobian":  # an estimate beside other estimates
            torch.testing.assert_close(estimated[name], exact[name])


@pytest.mark.parametrize("case", ["conditional"], indirect=True)
@pytest.mark.parametrize("name", [name for name in penalties() if name != "jacobian"])
def test_a_penalty_alone_is_the_one_among_all(name, case):
    solver = RungeKuttaSolver("rk4", steps=4)
    together, alone = (evaluated(*case, solver, chosen) for chosen in (penalties(), {name: penalties()[name]}))
    torch.testing.assert_close(alone.terms[name], together.terms[name])
    torch.testing.assert_close(alone.loss, alone.terms["nll"].mean() + 0.1 * alone.terms[name].mean())


def test_integrals_add_over_blocks(case):
    field, x, context = case
    solver, chosen = RungeKuttaSolver("rk4", steps=8), {"l2": L2Speed(1.0), "frobenius": JacobianFrobenius(1.0)}
    flow = ContinuousFlow(field, solver, Exact(), end_time=END)
    middle = flow.pull_back(x, context).value
    first, second = (evaluated(field, start, context, solver, chosen).terms for start in (x, middle))
    both = evaluated(field, x, context, solver, chosen, blocks=2).terms
    for name in chosen:
        torch.testing.assert_close(both[name], first[name] + second[name])


@pytest.mark.parametrize("case", ["closed-form", "residual"], indirect=True)
@pytest.mark.parametrize(
    "solver",
    [
        RungeKuttaSolver("dopri5", 1e-3, 1e-3),
        RungeKuttaSolver("bosh3", 1e-3, 1e-3, error_norm="example"),
        TorchdiffeqSolver("dopri5", 1e-3, 1e-3),
        TorchdiffeqSolver("dopri8", 1e-3, 1e-3, gradient="adjoint"),
    ],
    ids=["dopri5", "bosh3", "torchdiffeq", "adjoint"],
)
@pytest.mark.parametrize("trace", [Exact(), Hutchinson(Rademacher())], ids=["exact", "hutchinson"])
def test_penalties_do_not_steer_the_steps(case, solver, trace):
    plain = evaluated(*case, solver, {}, trace)
    burdened = evaluated(*case, solver, penalties(1e6), trace)
    assert burdened.solves[0].nfe_forward == plain.solves[0].nfe_forward
    assert burdened.solves[0].accepted_steps == plain.solves[0].accepted_steps
    torch.testing.assert_close(burdened.terms["nll"], plain.terms["nll"])


@pytest.mark.parametrize("trace", [Exact(memory=1e-12), Hutchinson(Rademacher(), mode="reverse")], ids=["exact", "vjp"])
def test_checkpointed_gradient_is_the_direct_one(case, trace):
    direct, checkpoint = (
        gradients(case[0], evaluated(*case, RungeKuttaSolver("rk4", steps=3, gradient=mode), penalties(), trace))
        for mode in ("direct", "checkpoint")
    )
    torch.testing.assert_close(checkpoint, direct, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ["closed-form", "conditional", "deep"], indirect=True)
@pytest.mark.parametrize("with_jacobian", [False, True], ids=["beside", "jacobian"])
def test_gradient_of_the_adjoint_is_the_direct_one(case, with_jacobian):
    chosen = {"smooth": Smooth(1.0), "kinetic": KineticEnergy(1.0), "jacobian": JacobianNorm(1.0)}
    if with_jacobian:
        chosen["square"] = JacobianOffDiagonal(1.0, root=False)
    direct = gradients(case[0], evaluated(*case, RungeKuttaSolver("rk4", steps=20), chosen))
    solver = RungeKuttaSolver("dopri5", 1e-5, 1e-5, gradient="adjoint", adjoint_seminorm=False)
    adjoint = gradients(case[0], evaluated(*case, solver, chosen))
    torch.testing.assert_close(adjoint, direct, rtol=1e-3, atol=1e-4)


def test_gradient_is_that_of_finite_differences(case):
    field, solver = case[0], RungeKuttaSolver("rk4", steps=4, gradient="checkpoint")
    parameters = list(field.parameters())
    directions = [torch.randn_like(parameter) for parameter in parameters]
    found = gradients(field, evaluated(*case, solver, penalties(1.0)))
    slope = sum((gradient * direction).sum() for gradient, direction in zip(found, directions, strict=True))
    losses = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
            losses.append(evaluated(*case, solver, penalties(1.0)).loss)
    assert float(slope) == pytest.approx(float((losses[0] - losses[1]) / 2e-5), rel=1e-5)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
def test_a_field_that_starts_at_zero_costs_nothing_and_learns(gradient):
    field = Residual((3,), 6, 1, Tanh).double()
    x, solver = torch.randn(5, 3, dtype=torch.float64), RungeKuttaSolver("dopri5", gradient=gradient)
    result = evaluated(field, x, None, solver, penalties())
    for name in penalties():
        assert not result.terms[name].any()
    found = gradients(field, result)
    assert any(gradient.any() for gradient in found)
    # Every penalty is at its minimum.
    torch.testing.assert_close(found, gradients(field, evaluated(field, x, None, solver, {})))


def test_one_coordinate_has_nothing_beside_the_diagonal(randomise):
    flow = Flow(
        ContinuousFlow(randomise(Mlp((1,), [4], ConcatSquash, Tanh)), RungeKuttaSolver("rk4", steps=2), Exact()),
        StandardNormal((1,)),
    )
    chosen = {"root": JacobianOffDiagonal(1.0), "square": JacobianOffDiagonal(1.0, root=False)}
    result = Likelihood(chosen)(flow, torch.randn(3, 1, dtype=torch.float64), None, None)
    result.loss.backward()
    assert not result.terms["root"].any()
    assert not result.terms["square"].any()
    assert all(parameter.grad.isfinite().all() for parameter in flow.parameters())


def test_the_whole_jacobian_of_a_large_event_is_refused():
    flow = Flow(
        ContinuousFlow(Mlp((200,), [4], ConcatSquash, Tanh), RungeKuttaSolver("rk4", steps=2), Exact()),
        StandardNormal((200,)),
    )
    with pytest.raises(ConfigError, match="events of at most 128 numbers .* got 200"):
        Likelihood({"jacobian_diagonal": JacobianDiagonal(1.0)})(flow, torch.randn(3, 200), None, None)
