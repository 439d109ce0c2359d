"""The density: shapes it takes, samples, trajectories and conditioning."""

import math
import re

import pytest
import torch
from torch import nn

from cnf_lab.errors import ConfigError
from cnf_lab.fields import ConcatSquash, Mlp, Tanh
from cnf_lab.flows import (
    ActNorm,
    Chain,
    ContextScaler,
    ContinuousFlow,
    Flow,
    MovingBatchNorm,
    NoPreprocess,
    Standardise,
    StandardNormal,
    Whiten,
    density_flow,
)
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact, Hutchinson, Rademacher

SOLVER = RungeKuttaSolver("dopri5", 1e-6, 1e-6, error_norm="example")


def field(event_shape, context_features=0):
    return Mlp(event_shape, [6, 5], ConcatSquash, Tanh, context_features)


@pytest.fixture
def flow(randomise):
    return Flow(ContinuousFlow(randomise(field((3,))), SOLVER, Exact()), StandardNormal((3,))).double().eval()


@pytest.fixture
def conditional(randomise):
    encoder = nn.Sequential(ContextScaler(2), nn.Linear(2, 4))
    encoder[0].fit([5 + 3 * torch.randn(100, 2, dtype=torch.float64)])
    transform = ContinuousFlow(randomise(field((3,), 4)), SOLVER, Exact())
    return Flow(transform, StandardNormal((3,)), 2, encoder).double().eval()


@pytest.fixture
def x():
    return torch.randn(6, 3, dtype=torch.float64)


@pytest.fixture
def context():
    return 5 + 3 * torch.randn(6, 2, dtype=torch.float64)


def test_log_density_is_that_of_the_latent_plus_the_log_det(flow, x):
    mapped = flow.pull_back(x)
    torch.testing.assert_close(flow.log_prob(x), flow.base.log_prob(mapped.value) + mapped.log_det)
    assert flow.event_shape == (3,)


@torch.no_grad()
def test_density_of_a_sample_from_both_ends(flow):
    z = torch.randn(6, 3, dtype=torch.float64)
    mapped = flow.push_forward(z)
    torch.testing.assert_close(flow.log_prob(mapped.value), flow.base.log_prob(z) - mapped.log_det, rtol=0, atol=1e-4)


def test_samples_are_reproducible_with_a_generator(flow):
    state = torch.get_rng_state()
    first, again, other = (flow.sample(5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.get_rng_state().equal(state)
    assert first.equal(again)
    assert not first.equal(other)
    assert first.shape == (5, 3)
    assert first.dtype == torch.float64
    assert not first.requires_grad


def test_samples_follow_the_density():
    data = torch.randn(2000, 2, dtype=torch.float64) @ torch.tensor([[2.0, 0.5], [0.0, 0.3]]).double() + 4
    layer = Whiten((2,))
    layer.fit([data])
    sample = Flow(layer, StandardNormal((2,))).double().eval().sample(2000)
    error = 4 * data.std(dim=0) * math.sqrt(2 / 2000)
    assert ((sample.mean(dim=0) - data.mean(dim=0)).abs() < error).all()
    torch.testing.assert_close(sample.T.cov(), data.T.cov(), rtol=0.2, atol=0.05)


def test_conditional_density_depends_on_its_own_context_alone(conditional, x, context):
    together = conditional.log_prob(x, context)
    alone = torch.cat([conditional.log_prob(x[row : row + 1], context[row : row + 1]) for row in range(6)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert (together - conditional.log_prob(x, context.flip(0))).abs().min() > 1e-3


def test_conditional_density_inverts(conditional, x, context):
    z = conditional.pull_back(x, context).value
    torch.testing.assert_close(conditional.push_forward(z, context).value, x, rtol=0, atol=1e-4)


def test_one_row_of_context_is_shared_by_all_samples(conditional, context):
    shared = conditional.sample(6, context[:1], torch.Generator().manual_seed(3))
    by_row = conditional.sample(6, context[:1].repeat(6, 1), torch.Generator().manual_seed(3))
    assert shared.equal(by_row)
    assert conditional.sample(6, context).shape == (6, 3)


def test_context_may_come_in_another_precision(conditional, x, context):
    torch.testing.assert_close(
        conditional.log_prob(x, context.float()), conditional.log_prob(x, context), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("shape", [(6, 4), (6,), (6, 3, 1), (3,)])
@pytest.mark.parametrize("method", ["pull_back", "push_forward", "log_prob", "trajectory"])
def test_rows_of_another_shape_are_refused(flow, shape, method):
    message = f"Expected rows with shape (batch, 3), got {shape}. Reshape the input."
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(flow, method)(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        (
            "conditional",
            None,
            r"Expected a context with shape \(6, 2\), got None\. Give one row of context per row\.",
        ),
        ("conditional", (5, 2), r"Expected a context with shape \(6, 2\), got \(5, 2\)\."),
        ("conditional", (6, 3), r"Expected a context with shape \(6, 2\), got \(6, 3\)\."),
        ("flow", (6, 2), r"Expected a context with shape None, got \(6, 2\)\. Leave the context out"),
    ],
    ids=["missing", "too-few-rows", "too-many-columns", "not-conditional"],
)
def test_context_that_does_not_fit_is_refused(request, x, kind, rows, message):
    context = None if rows is None else torch.zeros(rows, dtype=torch.float64)
    # The check itself: the shape annotations, which only tests look at, would speak first.
    with pytest.raises(ValueError, match=message):
        request.getfixturevalue(kind).encode(x, context)


@pytest.mark.parametrize("method", ["pull_back", "push_forward", "log_prob", "trajectory"])
def test_every_method_checks_the_context(conditional, x, method):
    with pytest.raises(ValueError, match=r"Expected a context with shape \(6, 2\), got None"):
        getattr(conditional, method)(x)
    with pytest.raises(ValueError, match=r"Expected a context with shape \(6, 2\), got None"):
        conditional.sample(6)


@pytest.mark.parametrize("points", [1, 2, 5])
def test_trajectory_of_a_chain(randomise, points):
    blocks = [ContinuousFlow(randomise(field((3,))), SOLVER, Exact()) for _ in range(2)]
    chain = Chain([NoPreprocess((3,)), blocks[0], ActNorm((3,)), blocks[1]])
    flow = Flow(chain, StandardNormal((3,))).double().eval()
    z = torch.randn(4, 3, dtype=torch.float64)
    states = flow.trajectory(z, points=points)
    assert states.shape == (1 + 2 * points + 2, 4, 3)
    torch.testing.assert_close(states[0], z, rtol=0, atol=0)
    torch.testing.assert_close(states[points], blocks[1].push_forward(z).value, rtol=0, atol=1e-4)
    torch.testing.assert_close(states[-1], flow.push_forward(z).value, rtol=0, atol=1e-4)


def test_trajectory_follows_the_context(conditional, context):
    z = torch.randn(6, 3, dtype=torch.float64)
    states = conditional.trajectory(z, context, points=3)
    torch.testing.assert_close(states[-1], conditional.push_forward(z, context).value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n", [0, 1])
def test_small_batches(flow, n):
    x = torch.randn(n, 3, dtype=torch.float64)
    assert flow.log_prob(x).shape == (n,)
    assert flow.sample(n).shape == (n, 3)


def build(**options):
    settings = {
        "event_shape": (3,),
        "context_features": 0,
        "field": field,
        "solver": RungeKuttaSolver("euler", steps=2),
        "evaluation_solver": RungeKuttaSolver("euler", steps=5),
        "divergence": Hutchinson(Rademacher()),
        "evaluation_divergence": Exact(),
        "preprocess": [Standardise],
    }
    return density_flow(**settings | options)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("normalisation", [None, MovingBatchNorm, ActNorm])
def test_density_flow_is_a_chain_from_the_data_on(blocks, normalisation):
    flow = build(blocks=blocks, normalisation=normalisation, end_time=0.5, train_end_time=True)
    kinds = [type(part) for part in flow.transform.transforms]
    between = [] if normalisation is None else [normalisation]
    assert kinds == [Standardise, *(between + [ContinuousFlow]) * blocks, *between]
    assert [len(flow.train(mode).pull_back(torch.randn(4, 3)).solves) for mode in (True, False)] == [
        blocks,
        blocks,
    ]
    assert flow.train().pull_back(torch.randn(4, 3)).solves[0].nfe_forward == 2
    assert flow.eval().pull_back(torch.randn(4, 3)).solves[0].nfe_forward == 5
    assert sum(name.endswith("log_end_time") for name, _ in flow.named_parameters()) == blocks


def test_density_flow_encodes_a_context():
    flow = build(context_features=2, context_width=7).eval()
    assert flow.context_encoder(torch.randn(4, 2)).shape == (4, 7)
    assert flow.log_prob(torch.randn(4, 3), torch.randn(4, 2)).shape == (4,)
    assert flow.sample(5, torch.randn(1, 2)).shape == (5, 3)


def test_density_flow_without_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"Expected model\.blocks of at least 1, got 0\. Type model\.blocks=1\."):
        build(blocks=0)
