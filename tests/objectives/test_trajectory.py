"""STEER's end times and TPR's distances against their definitions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cnf_lab.errors import ConfigError
from cnf_lab.fields import Blend, ConcatSquash, Mlp, Tanh, VectorField
from cnf_lab.flows import Chain, ContinuousFlow, Flow, NoPreprocess, StandardNormal
from cnf_lab.flows.riders import halts
from cnf_lab.objectives import KineticEnergy, Likelihood, RandomEndTime, TrajectoryPolynomial
from cnf_lab.ode import OdeSolver, RungeKuttaSolver, TorchdiffeqSolver
from cnf_lab.trace import Exact, Hutchinson, Rademacher

TIGHT = RungeKuttaSolver("dopri5", 1e-10, 1e-10)


class Decay(VectorField):
    """dx/dt = -x, whose paths are x e^{-t}."""

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return -x


class Wind(VectorField):
    """A constant velocity."""

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.tensor([3.0, -1.0], dtype=x.dtype).expand_as(x) + 0 * x


class Watched(OdeSolver):
    """Remembers between which times it solved."""

    def __init__(self, solver: OdeSolver = TIGHT) -> None:
        self.solver, self.intervals = solver, []

    def solve(self, rhs, state, t0, t1, arguments=(), parameters=()):
        self.intervals.append((t0, t1))
        return self.solver.solve(rhs, state, t0, t1, arguments, parameters)

    def describe(self):
        return self.solver.describe()


@pytest.fixture
def x():
    return torch.randn(4, 2, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def density(field, solver=TIGHT, blocks=1, trace=None, **options):
    parts = [ContinuousFlow(field, solver, trace or Exact(), **options) for _ in range(blocks)]
    return Flow(Chain([NoPreprocess(field.event_shape), *parts]), StandardNormal(field.event_shape)).double().train()


def test_end_times_of_training_are_uniform_around_t(x):
    solver, generator = Watched(RungeKuttaSolver("rk4", steps=1)), seeded()
    flow, objective = density(Decay((2,)), solver, blocks=2, end_time=1.5), Likelihood({"steer": RandomEndTime(0.5)})
    for _ in range(50):
        objective(flow, x, None, generator)
    starts, ends = zip(*solver.intervals, strict=True)
    assert set(starts) == {0.0}
    assert len(set(ends)) == 100, "every block of every step draws its own"
    shares = (np.sort(ends) - 1.0) / 1.0
    assert shares[0] >= 0
    assert shares[-1] <= 1
    # Kolmogorov and Smirnov: beyond it with a probability of a thousandth.
    assert np.abs(shares - (np.arange(100) + 0.5) / 100).max() < 1.95 / math.sqrt(100)


def test_a_steered_solve_is_that_to_its_end_time(x):
    solver = Watched()
    flow = density(Decay((2,)), solver)
    result = Likelihood({"steer": RandomEndTime(0.9), "kinetic": KineticEnergy(0.5)})(flow, x, None, seeded())
    ((_, end),) = solver.intervals
    expected = -(flow.base.log_prob(x * math.exp(-end)) - 2 * end)
    torch.testing.assert_close(result.terms["nll"], expected)
    assert set(result.terms) == {"nll", "kinetic"}, "it has no term of its own"
    torch.testing.assert_close(result.loss, expected.mean() + 0.5 * result.terms["kinetic"].mean())


def test_the_generator_decides_the_end_time(x):
    solver = Watched()
    objective = Likelihood({"steer": RandomEndTime(0.5)})
    for seed in (1, 1, 2):
        objective(density(Decay((2,)), solver), x, None, seeded(seed))
    first, again, other = (end for _, end in solver.intervals)
    assert first == again != other


def test_evaluation_ends_at_t(x):
    solver = Watched()
    flow, objective = density(Decay((2,)), solver, end_time=0.8).eval(), Likelihood({"steer": RandomEndTime(0.5)})
    result = objective(flow, x, None, seeded())
    assert solver.intervals == [(0.0, 0.8)]
    torch.testing.assert_close(result.terms["nll"], -flow.log_prob(x))


def test_a_trained_end_time_is_steered_around_its_value_and_learns(x):
    times = []

    class Clock(Decay):
        def forward(self, t, x, context=None):
            times.append(t.item())
            return super().forward(t, x, context)

    flow = density(Clock((2,)), RungeKuttaSolver("rk4", steps=2), end_time=2.0, train_end_time=True)
    (block,) = (part for part in flow.modules() if isinstance(part, ContinuousFlow))
    ends = []
    for seed in range(20):
        times.clear()
        Likelihood({"steer": RandomEndTime(0.5)})(flow, x, None, seeded(seed)).loss.backward()
        ends.append(max(times))
    assert 1.5 <= min(ends) < 1.7
    assert 2.3 < max(ends) <= 2.5
    assert block.log_end_time.grad != 0


def test_end_times_that_do_not_fit_are_refused(x):
    with pytest.raises(ConfigError, match="steer.width above 0, got 0"):
        RandomEndTime(0.0)
    with pytest.raises(ConfigError, match=r"below the end time, 0.5, got 0.5. Type regulariser.steer.width=0.25"):
        Likelihood({"steer": RandomEndTime(0.5)})(density(Decay((2,)), end_time=0.5), x, None, None)
    blend = density(Mlp((2,), [4], Blend, Tanh))
    with pytest.raises(ConfigError, match="architecture/layer=blend, whose time runs from 0 to 1, got RandomEndTime"):
        Likelihood({"steer": RandomEndTime(0.5)})(blend, x, None, None)
    Likelihood({"steer": RandomEndTime(0.5)})(blend.eval(), x, None, None)


def by_hand(x, moments, degree, end=1.0):
    """The distance of x e^{-t} to numpy's polynomial, and what it adds up to."""
    times = np.array([0.0, *sorted(moments), 1.0]) * end
    total = []
    for row in x.numpy():
        points = row * np.exp(-times)[:, None]
        fit = np.stack([np.polyval(np.polyfit(times, column, degree), times) for column in points.T], axis=1)
        total.append(np.square(points - fit).sum() / len(times))
    return torch.tensor(np.array(total))


@pytest.mark.parametrize(("times", "degree"), [(1, 1), (4, 1), (5, 2)])
def test_distance_of_a_known_path(x, times, degree):
    moments = torch.rand(times, generator=seeded(), dtype=torch.float64).tolist()
    objective = Likelihood({"tpr": TrajectoryPolynomial(10.0, times, degree)})
    result = objective(density(Decay((2,)), end_time=1.4), x, None, seeded())
    expected = by_hand(x, moments, degree, 1.4)
    assert expected.min() > 1e-6
    torch.testing.assert_close(result.terms["tpr"], expected, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(result.loss, result.terms["nll"].mean() + 10 * expected.mean())


def test_distances_add_over_blocks(x):
    moments = torch.rand(2, generator=seeded(), dtype=torch.float64).tolist()
    result = Likelihood({"tpr": TrajectoryPolynomial(1.0)})(density(Decay((2,)), blocks=2), x, None, seeded())
    expected = by_hand(x, moments[:1], 1) + by_hand(x * math.exp(-1), moments[1:], 1)
    torch.testing.assert_close(result.terms["tpr"], expected, rtol=1e-7, atol=1e-10)


def test_straight_paths_cost_nothing(x):
    result = Likelihood({"tpr": TrajectoryPolynomial(1.0, 3)})(density(Wind((2,))), x, None, seeded())
    assert result.terms["tpr"].abs().max() < 1e-20


@pytest.mark.parametrize("trace", [Exact(), Hutchinson(Rademacher())], ids=["exact", "hutchinson"])
@pytest.mark.parametrize(
    "solver",
    [
        RungeKuttaSolver("rk4", steps=7),
        RungeKuttaSolver("euler", options={"step_size": 0.15}),
        TorchdiffeqSolver("midpoint", steps=5),
        TorchdiffeqSolver("rk4", options={"step_size": 0.3}),
    ],
    ids=["steps", "step-size", "torchdiffeq-steps", "torchdiffeq-step-size"],
)
def test_points_of_a_grid_cost_no_evaluation(randomise, x, solver, trace):
    flow = density(randomise(Mlp((2,), [5], ConcatSquash, Tanh)), solver, trace=trace, end_time=1.3)
    plain, halted = (
        Likelihood(chosen)(flow, x, None, seeded()) for chosen in ({}, {"tpr": TrajectoryPolynomial(1.0, 6)})
    )
    assert len(halted.solves) > 1
    assert sum(stats.nfe_forward for stats in halted.solves) == plain.solves[0].nfe_forward
    torch.testing.assert_close(halted.terms["nll"], plain.terms["nll"])
    assert (halted.terms["tpr"] > 0).all()


@pytest.fixture
def everything():
    return Likelihood({"steer": RandomEndTime(0.5), "tpr": TrajectoryPolynomial(5.0, 3), "kinetic": KineticEnergy(0.5)})


def gradients(field, solver, objective, x):
    return torch.autograd.grad(objective(density(field, solver), x, None, seeded()).loss, list(field.parameters()))


def test_gradient_is_that_of_finite_differences(randomise, everything, x):
    field = randomise(Mlp((2,), [5, 4, 5], ConcatSquash, Tanh))
    solvers = [RungeKuttaSolver("rk4", steps=6, gradient=mode) for mode in ("direct", "checkpoint")]
    direct, checkpoint = (gradients(field, solver, everything, x) for solver in solvers)
    torch.testing.assert_close(checkpoint, direct, rtol=1e-10, atol=1e-12)
    directions = [torch.randn_like(parameter) for parameter in field.parameters()]
    slope = sum((gradient * direction).sum() for gradient, direction in zip(direct, directions, strict=True))
    losses = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, direction in zip(field.parameters(), directions, strict=True):
                parameter += step * direction
            losses.append(everything(density(field, solvers[0]), x, None, seeded()).loss)
    assert float(slope) == pytest.approx(float((losses[0] - losses[1]) / 2e-5), rel=1e-6)


def test_every_part_of_a_halted_solve_has_its_adjoint(randomise, everything, x):
    field = randomise(Mlp((2,), [5, 4, 5], ConcatSquash, Tanh))
    options = {"atol": 1e-6, "rtol": 1e-6, "adjoint_seminorm": False}
    solvers = [RungeKuttaSolver("dopri5", gradient=mode, **options) for mode in ("direct", "adjoint")]
    del everything.regularisers["kinetic"]  # the error of an integral does not choose the steps
    direct, adjoint = (gradients(field, solver, everything, x) for solver in solvers)
    torch.testing.assert_close(adjoint, direct, rtol=1e-4, atol=1e-5)


def test_a_penalty_of_points_trains(x):
    """Its descent makes paths of the same field straighter."""
    torch.manual_seed(0)
    flow = density(Mlp((2,), [16], ConcatSquash, Tanh), RungeKuttaSolver("rk4", steps=4))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter *= 3
    objective, optimiser = TrajectoryPolynomial(1.0, 2), torch.optim.Adam(flow.parameters(), 1e-2)
    values = []
    for _ in range(30):
        (measured,) = flow.pull_back(x, None, seeded(), [objective]).integrals
        optimiser.zero_grad()
        measured.mean().backward()
        optimiser.step()
        values.append(measured.mean().item())
    assert 0 < values[-1] < 0.3 * values[0]


@pytest.mark.parametrize(("times", "degree"), [(0, 1), (1, 2), (2, 0)])
def test_polynomials_that_fit_any_points_are_refused(times, degree):
    with pytest.raises(ConfigError, match=f"got {degree} and {times}. Type regulariser.tpr.degree=1"):
        TrajectoryPolynomial(1.0, times, degree)


@pytest.mark.parametrize(("moment", "point"), [(0.02, 0.4), (0.4, 0.4), (0.7, 0.8), (0.99, 0.8)])
def test_halts_are_inner_points_of_a_grid_whose_last_step_is_shorter(moment, point):
    grid = RungeKuttaSolver("rk4", options={"step_size": 0.4})
    assert halts(grid, 1.1, [moment]) == pytest.approx([0.0, point, 1.1])


def test_a_grid_of_one_step_has_no_halts():
    assert halts(RungeKuttaSolver("rk4", options={"step_size": 2.0}), 1.0, [0.5]) == [0.0, 1.0]
