"""Flow matching: against the analytic field between Gaussians, and for every field and chain."""

import math
from itertools import permutations

import hypothesis.strategies as st
import pytest
import scipy.stats
import torch
from hypothesis import given
from torch import nn

from cnf_lab.errors import ConfigError
from cnf_lab.fields import (
    AmortisedLowRank,
    Blend,
    Branches,
    Concat,
    ConcatSquash,
    Embedded,
    EncoderDecoder,
    Hyper,
    Mlp,
    Residual,
    Silu,
    Tanh,
    VectorField,
)
from cnf_lab.flows import (
    ActNorm,
    BlockSequence,
    Chain,
    ContinuousFlow,
    Flow,
    Standardise,
    StandardNormal,
    density_flow,
)
from cnf_lab.objectives import (
    BetaTimes,
    FlowMatching,
    FlowMatchingThenLikelihood,
    Independent,
    KineticEnergy,
    LinearPath,
    LogitNormalTimes,
    OptimalTransport,
    StagePlan,
    TrigonometricPath,
    UniformTimes,
)
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact

TIGHT = RungeKuttaSolver("dopri5", 1e-9, 1e-9)
PATHS = [LinearPath(), TrigonometricPath()]
TIMES = [UniformTimes(), BetaTimes(0.5, 1.0), BetaTimes(1.0, 0.5), BetaTimes(2.0, 3.0), LogitNormalTimes(-0.5, 0.8)]


def name(part):
    return type(part).__name__


each_path = pytest.mark.parametrize("path", PATHS, ids=name)
each_times = pytest.mark.parametrize("times", TIMES, ids=name)


def continuous(field, **options):
    return ContinuousFlow(field, TIGHT, Exact(), **options)


class GaussianField(VectorField):
    """The best field from N(mean, deviation² I) to N(0, I) along a path: E[dx/du | x_u], linear in x."""

    def __init__(self, path, mean, deviation, features=2):
        super().__init__((features,))
        self.path, self.mean, self.deviation = path, mean, deviation
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, t, x, context=None):
        a, b, da, db = self.path.weights(t.reshape(-1, 1))
        variance = (a * self.deviation) ** 2 + b**2
        slope = (a * da * self.deviation**2 + b * db) / variance
        return da * self.mean + slope * (x - a * self.mean) + self.shift


@each_path
@given(u=st.floats(0.0, 1.0))
def test_velocity_is_the_derivative_of_the_path(path, u):
    x, z = torch.randn(2, 4, 3, dtype=torch.float64)
    at = torch.full((4,), u, dtype=torch.float64)
    velocity = torch.func.jvp(lambda v: path(x, z, v)[0], (at,), (torch.ones_like(at),))[1]
    torch.testing.assert_close(path(x, z, at)[1], velocity, rtol=1e-12, atol=1e-12)


@each_path
def test_paths_lead_from_data_to_latent(path):
    x, z = torch.randn(2, 4, 3, dtype=torch.float64)
    for u, end in ((0.0, x), (1.0, z)):
        torch.testing.assert_close(path(x, z, torch.full((4,), u, dtype=torch.float64))[0], end, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        (UniformTimes(), scipy.stats.uniform()),
        (BetaTimes(0.5, 1.0), scipy.stats.beta(0.5, 1.0)),
        (BetaTimes(1.0, 0.5), scipy.stats.beta(1.0, 0.5)),
        (BetaTimes(2.0, 3.0), scipy.stats.beta(2.0, 3.0)),
    ],
    ids=["uniform", "data", "latent", "middle"],
)
def test_times_have_their_distribution(times, wanted):
    p = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    torch.testing.assert_close(times.quantile(p), torch.as_tensor(wanted.ppf(p.numpy())), rtol=1e-9, atol=1e-12)


@each_times
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_stratified_and_repeatable(times, dtype):
    draws = [times.sample(1000, torch.Generator().manual_seed(3), torch.zeros(1, dtype=dtype)) for _ in range(2)]
    assert draws[0].dtype == dtype
    assert torch.equal(*draws)
    assert (draws[0] >= 0).all()
    assert (draws[0] <= 1).all()
    edges = times.quantile(torch.linspace(0.001, 0.999, 999, dtype=torch.float64))
    assert (torch.searchsorted(draws[0].double(), edges) - torch.arange(1, 1000)).abs().max() <= 1


def test_logit_normal_is_a_normal_before_the_logistic_function():
    u = LogitNormalTimes(-0.5, 0.8).quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    wanted = torch.as_tensor(scipy.stats.norm(-0.5, 0.8).ppf([0.1, 0.5, 0.9]))
    torch.testing.assert_close(torch.logit(u), wanted)


@given(seed=st.integers(0, 1000), rows=st.integers(1, 6))
def test_optimal_transport_is_the_best_of_all_pairings(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    x, z = torch.randn(2, rows, 3, generator=generator, dtype=torch.float64)

    def cost(order):
        return float((x - z[list(order)]).square().sum())

    paired = OptimalTransport(8)(x, z)
    assert float((x - paired).square().sum()) == pytest.approx(min(map(cost, permutations(range(rows)))))


def test_optimal_transport_pairs_within_groups():
    x, z = torch.randn(2, 10, 1, 2, 2)
    paired = OptimalTransport(4)(x, z)
    for group, old in zip(paired.split(4), z.split(4), strict=True):
        assert sorted(group.flatten().tolist()) == sorted(old.flatten().tolist())


@each_path
@each_times
def test_the_analytic_field_is_the_minimum(path, times):
    """Loss of field + c = loss of field + c² for the conditional mean, whatever the times."""
    flow = Flow(continuous(GaussianField(path, 1.5, 0.4)), StandardNormal((2,))).double()
    field = flow.transform.field
    x = 1.5 + 0.4 * torch.randn(200_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    objective = FlowMatching(path, times, Independent())
    losses = {}
    for shift in (0.0, 0.3, -0.3):
        field.shift.data.fill_(shift)
        losses[shift] = objective(flow, x, None, torch.Generator().manual_seed(2)).loss.item()
    assert losses[0.3] - losses[0.0] == pytest.approx(0.09, abs=0.01)
    assert losses[-0.3] - losses[0.0] == pytest.approx(0.09, abs=0.01)


@each_path
def test_the_flow_of_the_analytic_field_has_the_gaussian_density(path):
    flow = Flow(continuous(GaussianField(path, 1.5, 0.4)), StandardNormal((2,))).double().eval()
    x = torch.randn(10, 2, dtype=torch.float64)
    wanted = torch.distributions.Normal(1.5, 0.4).log_prob(x).sum(dim=1)
    torch.testing.assert_close(flow.log_prob(x), wanted.double(), rtol=1e-6, atol=1e-6)


def test_training_recovers_the_analytic_field_and_density():
    torch.manual_seed(0)
    path, generator = LinearPath(), torch.Generator().manual_seed(0)
    flow = Flow(continuous(Mlp((1,), [32, 32], Embedded, Silu)), StandardNormal((1,))).double()
    objective = FlowMatching(path, UniformTimes(), Independent())
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 500)
    for _ in range(500):
        x = 1.0 + 0.5 * torch.randn(1000, 1, dtype=torch.float64, generator=generator)
        optimiser.zero_grad()
        objective(flow, x, None, generator).loss.backward()
        optimiser.step()
        schedule.step()
    truth = GaussianField(path, 1.0, 0.5, features=1)
    for u in (0.1, 0.5, 0.9):
        at = torch.tensor(u, dtype=torch.float64)
        spread = math.hypot((1 - u) * 0.5, u)
        x = (1 - u) * 1.0 + spread * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]
        torch.testing.assert_close(flow.transform.field(at, x), truth(at, x), rtol=0, atol=0.1)
    x = torch.tensor([[0.5], [1.0], [1.5]], dtype=torch.float64)
    wanted = torch.distributions.Normal(1.0, 0.5).log_prob(x)[:, 0].double()
    torch.testing.assert_close(flow.eval().log_prob(x), wanted, rtol=0, atol=0.05)


FIELDS = {
    **{
        layer.__name__: lambda layer=layer: Mlp((3,), [5, 4], layer, Tanh) for layer in (Concat, Blend, Hyper, Embedded)
    },
    "Branches": lambda: Branches((3,), [5, 4], 2, ConcatSquash, Silu),
    "Residual": lambda: Residual((3,), 8, 2, Silu),
    "EncoderDecoder": lambda: EncoderDecoder((3,), [5, 2, 5], Concat, Tanh),
    "Mlp, context": lambda: Mlp((3,), [5, 4], Embedded, Silu, context_features=2),
    "Branches, context": lambda: Branches((3,), [5, 4], 2, Embedded, Silu, context_features=2),
    "Residual, context": lambda: Residual((3,), 8, 2, Silu, context_features=2),
}


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("count", [1, 3])
def test_every_field_and_chain_gets_gradients(kind, count, randomise):
    blocks = [continuous(randomise(FIELDS[kind]())) for _ in range(count)]
    context = torch.randn(64, 2, dtype=torch.float64) if "context" in kind else None
    flow = Flow(Chain([Standardise((3,)), *blocks]), StandardNormal((3,)), 0 if context is None else 2).double()
    result = FlowMatching(LinearPath(), UniformTimes(), Independent())(flow, torch.randn(64, 3).double(), context, None)
    result.loss.backward()
    assert result.terms["flow_matching"].shape == (64,)
    assert not result.solves
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


def test_amortised_fields_are_trained_with_their_amortiser():
    field = AmortisedLowRank((2,), [4], Concat, Tanh, 1)
    flow = Flow(continuous(field, amortiser=nn.Linear(3, field.amortised_features)), StandardNormal((2,)), 3).double()
    context = torch.randn(8, 3, dtype=torch.float64)
    FlowMatching(LinearPath(), UniformTimes(), Independent())(
        flow, torch.randn(8, 2).double(), context, None
    ).loss.backward()
    assert flow.transform.amortiser.weight.grad.any()


class Slice(VectorField):
    """One block's share of a velocity w(u, x) over [0, 1]."""

    def __init__(self, number, count, end_time):
        super().__init__((2,))
        self.number, self.count, self.end_time = number, count, end_time
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))

    @staticmethod
    def whole(u, x):
        return torch.sin(3 * u).reshape(-1, 1) * x.flip(1) - u.reshape(-1, 1) * x**2

    def forward(self, t, x, context=None):
        return self.whole((self.number + t / self.end_time) / self.count, x) / (self.count * self.end_time)


@pytest.mark.parametrize("trained", [False, True])
def test_blocks_share_one_path(trained):
    ends = (0.5, 2.0, 1.3)
    blocks = [
        ContinuousFlow(Slice(k, 3, end), TIGHT, Exact(), end_time=end, train_end_time=trained)
        for k, end in enumerate(ends)
    ]
    flow = Flow(Chain(blocks), StandardNormal((2,))).double().eval()
    sequence = BlockSequence(flow)
    x, u = torch.rand(50, 2, dtype=torch.float64), torch.linspace(0, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(sequence.velocity(u, x, None), Slice.whole(u, x), rtol=1e-6, atol=1e-6)
    alone = Flow(continuous(Slice(0, 1, 1.0)), StandardNormal((2,))).double().eval()
    torch.testing.assert_close(flow.log_prob(x), alone.log_prob(x), rtol=1e-6, atol=1e-6)


def test_what_flow_matching_cannot_train_is_refused():
    objective = FlowMatching(LinearPath(), UniformTimes(), Independent())
    block = continuous(Mlp((2,), [4], Concat, Tanh))
    with pytest.raises(ConfigError, match=r"no other layer.*got ActNorm\. Type normalisation=none"):
        objective.check(Flow(Chain([ActNorm((2,)), block, ActNorm((2,))]), StandardNormal((2,))))
    with pytest.raises(ConfigError, match=r"continuous blocks.*got Standardise\. Type objective=likelihood"):
        objective.check(Flow(Chain([Standardise((2,))]), StandardNormal((2,))))
    with pytest.raises(ConfigError, match="no penalty"):
        FlowMatching(LinearPath(), UniformTimes(), Independent(), {"kinetic": KineticEnergy(0.1)})
    conditional = Flow(continuous(Mlp((2,), [4], Concat, Tanh, context_features=1)), StandardNormal((2,)), 1)
    objective.check(conditional)
    with pytest.raises(ConfigError, match="independent for a conditional density"):
        FlowMatching(LinearPath(), UniformTimes(), OptimalTransport()).check(conditional)
    with pytest.raises(ConfigError, match=r"objective\.flow_matching\.steps"):
        FlowMatchingThenLikelihood(LinearPath(), UniformTimes(), Independent(), StagePlan(), StagePlan())
    for wrong in ({"steps": 0}, {"lr": -1.0}, {"rows": 0}):
        with pytest.raises(ConfigError, match=f"Expected {next(iter(wrong))} of a stage above 0"):
            StagePlan(**wrong)
    for make, option in (
        (lambda: BetaTimes(0.0, 1.0), "alpha"),
        (lambda: LogitNormalTimes(0.0, 0.0), "deviation"),
        (lambda: OptimalTransport(1), "group"),
    ):
        with pytest.raises(ConfigError, match=option):
            make()


def test_penalties_go_to_the_second_stage():
    kinetic = KineticEnergy(0.1)
    objective = FlowMatchingThenLikelihood(
        LinearPath(), UniformTimes(), Independent(), StagePlan(steps=5), StagePlan(), {"kinetic": kinetic}
    )
    first, second = objective.stages
    assert (first.name, second.name) == ("flow_matching", "likelihood")
    assert second.objective.regularisers == {"kinetic": kinetic}


def test_a_preprocessed_conditional_density_of_several_blocks():
    torch.manual_seed(0)
    flow = density_flow(
        (2,),
        1,
        lambda event_shape, context_features: Mlp(event_shape, [16], Concat, Tanh, context_features),
        TIGHT,
        TIGHT,
        Exact(),
        Exact(),
        [Standardise],
        blocks=2,
    )
    x, context = 5 + torch.randn(128, 2), torch.randn(128, 1)
    flow.transform.transforms[0].fit([x])
    flow.context_encoder[0].fit([context])
    loss = FlowMatching(LinearPath(), UniformTimes(), Independent())(flow, x, context, None).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())
    assert 1 < loss.item() < 4  # of order E|z - x|² / D = 2 for standardised rows
