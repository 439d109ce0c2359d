"""What every chain of transforms keeps: exact log-dets, inverses, gradients, and a density of mass one."""

import copy

import pytest
import torch
from torch import nn

from cnf_lab.fields import ConcatSquash, EncoderDecoder, Mlp, Residual, Softplus, Tanh, VectorField
from cnf_lab.flows import (
    ActNorm,
    Chain,
    ContinuousFlow,
    Flow,
    Mapped,
    MovingBatchNorm,
    NoPreprocess,
    Standardise,
    StandardNormal,
    Transform,
    Whiten,
)
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact

TOLERANCE = 1e-5
SOLVER = RungeKuttaSolver("dopri5", TOLERANCE, TOLERANCE, error_norm="example")


class Convolution(VectorField):
    """A small field of images."""

    event_dims = 3

    def __init__(self, event_shape):
        super().__init__(event_shape)
        self.first = nn.Conv2d(event_shape[0], 3, 3, padding=1)
        self.second = nn.Conv2d(3, event_shape[0], 3, padding=1)

    def forward(self, t, x, context=None):
        return self.second(torch.tanh(self.first(x) * (1 + t)))


def block(field, **options):
    return ContinuousFlow(field, SOLVER, Exact(), **options)


def mlp(shape, activation=Tanh):
    return Mlp(shape, [6, 5], ConcatSquash, activation)


def blocks(shape, norm, count):
    parts = [norm(shape)]
    for _ in range(count):
        parts += [block(mlp(shape)), norm(shape)]
    return parts


def images(shape):
    return [Whiten(shape), ActNorm(shape), block(Convolution(shape)), MovingBatchNorm(shape)]


CHAINS = {
    "one-block": lambda shape: [NoPreprocess(shape), block(mlp(shape))],
    "three-blocks": lambda shape: [block(mlp(shape)) for _ in range(3)],
    "trained-end-time": lambda shape: [block(mlp(shape), end_time=0.7, train_end_time=True)],
    # Narrow: with weights as large as these a wider one stretches errors beyond ten tolerances.
    "residual": lambda shape: [block(Residual(shape, 3, 1, Tanh, 1))],
    "encoder-decoder": lambda shape: [block(EncoderDecoder(shape, [5, 2], ConcatSquash, Tanh))],
    "batch-norm": lambda shape: blocks(shape, MovingBatchNorm, 2),
    "act-norm": lambda shape: blocks(shape, ActNorm, 1),
    "standardise": lambda shape: [Standardise(shape), block(mlp(shape))],
    "whiten": lambda shape: [Whiten(shape), block(mlp(shape))],
    "everything": lambda shape: [
        Whiten(shape),
        *blocks(shape, MovingBatchNorm, 1),
        ActNorm(shape),
        Chain([block(mlp(shape, activation=Softplus), end_time=0.5)]),
    ],
}
CASES = [pytest.param((make, (3,)), id=name) for name, make in CHAINS.items()]
CASES += [pytest.param((CHAINS["one-block"], (d,)), id=f"{d}-dimensions") for d in (1, 4)]
CASES += [pytest.param((images, (2, 1, 2)), id="images")]


def rows(n, shape):
    size = torch.Size(shape).numel()
    mixed = torch.randn(n, size, dtype=torch.float64) @ (torch.eye(size) + 0.3 * torch.ones(size, size)).double()
    return (1 + 2 * mixed).reshape(n, *shape)


def prepare(chain, shape):
    """Fit the preprocessing, initialise the normalisation, and go to evaluation mode."""
    for part in chain.modules():
        if isinstance(part, Standardise | Whiten):
            part.fit([rows(50, shape)])
    with torch.no_grad():
        chain.train().pull_back(rows(50, shape))
    return chain.eval()


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def shape(case):
    return case[1]


@pytest.fixture(scope="module")
def make(case):
    return lambda: Chain(case[0](case[1]))


@pytest.fixture(scope="module")
def chain(make, shape, randomise):
    """Return a chain in evaluation mode whose every part has something to say."""
    torch.manual_seed(0)
    chain = prepare(randomise(make(), 0.4), shape)
    for part in chain.modules():
        if isinstance(part, ActNorm | MovingBatchNorm):
            for parameter in part.parameters():
                nn.init.normal_(parameter, std=0.3)
    return chain


@pytest.fixture(scope="module")
def flow(chain, shape):
    return Flow(chain, StandardNormal(shape)).double().eval()


@pytest.fixture
def x(shape):
    return rows(4, shape)


def test_log_det_is_that_of_the_jacobian_of_the_whole_map(chain, x):
    mapped = chain.pull_back(x.requires_grad_())
    assert isinstance(mapped, Mapped)
    assert (mapped.value.shape, mapped.log_det.shape, mapped.integrals) == (x.shape, (4,), ())
    entries = mapped.value.flatten(1).sum(dim=0)
    gradients = [torch.autograd.grad(entry, x, retain_graph=True)[0].flatten(1) for entry in entries]
    expected = torch.linalg.slogdet(torch.stack(gradients, dim=1))
    assert (expected.sign > 0).all()
    torch.testing.assert_close(mapped.log_det, expected.logabsdet, rtol=0, atol=100 * TOLERANCE)


@torch.no_grad()
def test_log_det_is_the_sum_of_the_parts(chain, x):
    total, value = x.new_zeros(4), x
    for part in chain.transforms:
        mapped = part.pull_back(value)
        total, value = total + mapped.log_det, mapped.value
    whole = chain.pull_back(x)
    torch.testing.assert_close(whole.log_det, total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.value, value, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_push_forward_is_the_inverse_and_log_dets_cancel(chain, x):
    there = chain.pull_back(x)
    back = chain.push_forward(there.value)
    sample = chain.push_forward(there.value, with_log_det=False)
    # Ten times the tolerance of every solve, in units of the largest entry.
    bound = 10 * TOLERANCE * len(there.solves) * float(x.abs().max())
    torch.testing.assert_close(back.value, x, rtol=0, atol=bound)
    torch.testing.assert_close(sample.value, x, rtol=0, atol=bound)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=0, atol=bound)


def test_every_parameter_gets_a_gradient(flow, x):
    flow.log_prob(x).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in flow.parameters())


@torch.no_grad()
def test_rows_do_not_see_each_other(flow, x):
    torch.testing.assert_close(flow.log_prob(x)[:1], flow.log_prob(x[:1]), rtol=0, atol=100 * TOLERANCE)


@torch.no_grad()
def test_state_dict_and_copies_carry_everything_and_evaluation_changes_nothing(flow, make, shape, x):
    other = Flow(make(), StandardNormal(shape)).double().eval()
    other.load_state_dict(flow.state_dict())
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    expected = flow.log_prob(x)
    assert copy.deepcopy(other).log_prob(x).equal(expected)
    assert all(value.equal(before[name]) for name, value in flow.state_dict().items())


def test_trajectory_ends_where_push_forward_does(flow, x):
    states = flow.trajectory(x, points=2)
    parts = [part for part in flow.modules() if isinstance(part, Transform) and not isinstance(part, Chain)]
    assert len(states) == 1 + sum(2 if isinstance(part, ContinuousFlow) else 1 for part in parts)
    assert states[0].equal(x)
    assert not states.requires_grad
    torch.testing.assert_close(states[-1], flow.push_forward(x).value, rtol=0, atol=1000 * TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("end_time", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", ["one-block", "standardise", "batch-norm"])
def test_density_of_one_dimension_has_mass_one(name, end_time, randomise):
    chain = randomise(Chain(CHAINS[name]((1,))), 1.2)
    for part in chain.modules():
        if isinstance(part, ContinuousFlow):
            part.end_time = end_time
    flow = Flow(prepare(chain, (1,)), StandardNormal((1,))).double().eval()
    ends = flow.push_forward(torch.tensor([[-7.0], [7.0]], dtype=torch.float64)).value.flatten()
    x = torch.linspace(float(ends[0]), float(ends[1]), 2001, dtype=torch.float64)
    mass = torch.trapezoid(flow.log_prob(x[:, None]).exp(), x)
    assert abs(mass - 1) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["one-block", "everything"])
def test_density_of_two_dimensions_has_mass_one(name, randomise):
    chain = prepare(randomise(Chain(CHAINS[name]((2,))), 0.6), (2,))
    flow = Flow(chain, StandardNormal((2,))).double().eval()
    angle = torch.linspace(0, 2 * torch.pi, 65, dtype=torch.float64)
    rim = flow.push_forward(6 * torch.stack([angle.cos(), angle.sin()], dim=1)).value
    axes = [
        torch.linspace(float(low), float(high), 161, dtype=torch.float64)
        for low, high in zip(*rim.aminmax(dim=0), strict=True)
    ]
    grid = torch.cartesian_prod(*axes)
    density = flow.log_prob(grid).exp().reshape(161, 161)
    mass = torch.trapezoid(torch.trapezoid(density, axes[1]), axes[0])
    assert abs(mass - 1) < TOLERANCE
