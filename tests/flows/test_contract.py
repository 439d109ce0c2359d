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
    Whiten,
)
from cnf_lab.ode import TorchdiffeqSolver
from cnf_lab.trace import Exact

TOLERANCE = 1e-6
SOLVER = TorchdiffeqSolver("dopri5", TOLERANCE, TOLERANCE, error_norm="example")


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


def mlp(shape, layer=ConcatSquash, activation=Tanh, hidden=(6, 5)):
    return Mlp(shape, hidden, layer, activation)


def blocks(shape, norm, count):
    parts = [norm(shape)]
    for _ in range(count):
        parts += [block(mlp(shape)), norm(shape)]
    return parts


CHAINS = {
    "one-block": lambda shape: [block(mlp(shape))],
    "three-blocks": lambda shape: [block(mlp(shape)) for _ in range(3)],
    "no-preprocess": lambda shape: [NoPreprocess(shape), block(mlp(shape))],
    "trained-end-time": lambda shape: [block(mlp(shape), end_time=0.7, train_end_time=True)],
    "residual": lambda shape: [block(Residual(shape, 6, 1, Tanh, 2))],
    "encoder-decoder": lambda shape: [block(EncoderDecoder(shape, [5, 2], ConcatSquash, Tanh))],
    "batch-norm": lambda shape: blocks(shape, MovingBatchNorm, 2),
    "act-norm": lambda shape: blocks(shape, ActNorm, 2),
    "standardise": lambda shape: [Standardise(shape), block(mlp(shape))],
    "whiten": lambda shape: [Whiten(shape), block(mlp(shape))],
    "everything": lambda shape: [
        Whiten(shape),
        *blocks(shape, MovingBatchNorm, 1),
        ActNorm(shape),
        Chain([block(mlp(shape, activation=Softplus), end_time=0.5)]),
    ],
}
IMAGE_CHAINS = {
    "image-block": lambda shape: [block(Convolution(shape))],
    "image-batch-norm": lambda shape: [MovingBatchNorm(shape), block(Convolution(shape)), MovingBatchNorm(shape)],
    "image-act-norm": lambda shape: [ActNorm(shape), block(Convolution(shape)), ActNorm(shape)],
    "image-whiten": lambda shape: [Whiten(shape), block(Convolution(shape))],
}
CASES = [
    pytest.param(make, (d,), id=f"{name}-{d}")
    for name, make in CHAINS.items()
    for d in ((3,) if name != "one-block" else (1, 2, 3, 4))
]
CASES += [pytest.param(make, (2, 1, 2), id=name) for name, make in IMAGE_CHAINS.items()]
every_chain = pytest.mark.parametrize(("make", "shape"), CASES)


def rows(n, shape):
    size = torch.Size(shape).numel()
    mixed = torch.randn(n, size, dtype=torch.float64) @ (torch.eye(size) + 0.3 * torch.ones(size, size)).double()
    return (1 + 2 * mixed).reshape(n, *shape)


@pytest.fixture
def chain(make, shape, randomise):
    """Return a chain in evaluation mode whose every part has something to say."""
    chain = randomise(Chain(make(shape)), 0.4)
    for part in chain.modules():
        if isinstance(part, Standardise | Whiten):
            part.fit([rows(50, shape)])
    with torch.no_grad():
        chain.train().pull_back(rows(50, shape))
    for name, parameter in chain.named_parameters():
        if name.endswith(("weight", "bias", "shift", "log_scale")) and parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.3)
    return chain.eval()


@pytest.fixture
def flow(chain, shape):
    return Flow(chain, StandardNormal(shape)).double().eval()


@pytest.fixture
def x(shape):
    return rows(4, shape)


@every_chain
def test_shapes_and_finite_numbers(chain, x):
    for mapped in (chain.pull_back(x), chain.push_forward(x)):
        assert isinstance(mapped, Mapped)
        assert mapped.value.shape == x.shape
        assert mapped.log_det.shape == (4,)
        assert mapped.value.dtype == mapped.log_det.dtype == torch.float64
        assert mapped.value.isfinite().all()
        assert mapped.log_det.isfinite().all()
        assert mapped.integrals == ()


@every_chain
def test_log_det_is_that_of_the_jacobian_of_the_whole_map(chain, x):
    jacobian = torch.autograd.functional.jacobian(lambda y: chain.pull_back(y).value.sum(dim=0), x)
    size = x[0].numel()
    expected = torch.linalg.slogdet(jacobian.reshape(size, 4, size).transpose(0, 1))
    assert (expected.sign > 0).all()
    torch.testing.assert_close(chain.pull_back(x).log_det, expected.logabsdet, rtol=1e-6, atol=1e-6)


@every_chain
@torch.no_grad()
def test_log_det_is_the_sum_of_the_parts(chain, x):
    total, value = x.new_zeros(4), x
    for part in chain.transforms:
        mapped = part.pull_back(value)
        total, value = total + mapped.log_det, mapped.value
    whole = chain.pull_back(x)
    torch.testing.assert_close(whole.log_det, total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.value, value, rtol=1e-12, atol=1e-12)


@every_chain
@torch.no_grad()
def test_push_forward_is_the_inverse_and_log_dets_cancel(chain, x):
    there = chain.pull_back(x)
    back = chain.push_forward(there.value)
    # Ten times the tolerance, times the size of the numbers, for each solve.
    bound = 10 * TOLERANCE * max(1, len(there.solves)) * float(x.abs().max())
    torch.testing.assert_close(back.value, x, rtol=0, atol=bound)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=0, atol=bound)
    again = chain.pull_back(chain.push_forward(x).value).value
    torch.testing.assert_close(again, x, rtol=0, atol=bound)


@every_chain
@torch.no_grad()
def test_samples_do_without_a_log_det(chain, x):
    plain, full = chain.push_forward(x, with_log_det=False), chain.push_forward(x)
    torch.testing.assert_close(plain.value, full.value, rtol=0, atol=100 * TOLERANCE)


@every_chain
def test_every_parameter_gets_a_gradient(flow, x):
    flow.log_prob(x).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in flow.parameters())


@every_chain
@torch.no_grad()
def test_rows_do_not_see_each_other(flow, x):
    together = flow.log_prob(x)
    alone = torch.cat([flow.log_prob(row) for row in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=100 * TOLERANCE)


@every_chain
@torch.no_grad()
def test_state_dict_and_copies_carry_everything(flow, make, shape, x):
    expected = flow.log_prob(x)
    other = Flow(Chain(make(shape)), StandardNormal(shape)).double().eval()
    other.load_state_dict(flow.state_dict())
    assert other.log_prob(x).equal(expected)
    assert copy.deepcopy(flow).log_prob(x).equal(expected)


@every_chain
@torch.no_grad()
def test_evaluation_changes_nothing(flow, x):
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    flow.log_prob(x)
    flow.sample(3)
    assert all(value.equal(before[name]) for name, value in flow.state_dict().items())


@every_chain
def test_trajectory_ends_where_push_forward_does(flow, x):
    points = 3
    states = flow.trajectory(x, points=points)
    parts = [part for part in flow.modules() if hasattr(part, "pull_back") and not isinstance(part, Chain | Flow)]
    assert len(states) == 1 + sum(points if isinstance(part, ContinuousFlow) else 1 for part in parts)
    assert states[0].equal(x)
    assert not states.requires_grad
    torch.testing.assert_close(states[-1], flow.push_forward(x).value, rtol=0, atol=1000 * TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("end_time", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", ["one-block", "standardise", "batch-norm", "residual"])
def test_density_of_one_dimension_has_mass_one(name, end_time, randomise):
    chain = randomise(Chain(CHAINS[name]((1,))), 1.2)
    for part in chain.modules():
        if isinstance(part, Standardise):
            part.fit([rows(50, (1,))])
        if isinstance(part, ContinuousFlow):
            part.end_time = end_time
    chain.train().pull_back(rows(50, (1,)))
    flow = Flow(chain, StandardNormal((1,))).double().eval()
    ends = flow.push_forward(torch.tensor([[-7.0], [7.0]], dtype=torch.float64)).value.flatten()
    x = torch.linspace(float(ends[0]), float(ends[1]), 4001, dtype=torch.float64)
    mass = torch.trapezoid(flow.log_prob(x[:, None]).exp(), x)
    assert abs(mass - 1) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["one-block", "everything"])
def test_density_of_two_dimensions_has_mass_one(name, randomise):
    solver = TorchdiffeqSolver("dopri5", 1e-6, 1e-6, error_norm="example")
    chain = randomise(Chain(CHAINS[name]((2,))), 0.6)
    for part in chain.modules():
        if isinstance(part, Whiten):
            part.fit([rows(50, (2,))])
    chain.train().pull_back(rows(50, (2,)))
    flow = Flow(chain, StandardNormal((2,))).double().eval()
    flow.set_evaluation(solver, Exact())
    angle = torch.linspace(0, 2 * torch.pi, 65, dtype=torch.float64)
    rim = flow.push_forward(6 * torch.stack([angle.cos(), angle.sin()], dim=1)).value
    axes = [
        torch.linspace(float(low), float(high), 161, dtype=torch.float64)
        for low, high in zip(*rim.aminmax(dim=0), strict=True)
    ]
    grid = torch.cartesian_prod(*axes)
    density = flow.log_prob(grid).exp().reshape(161, 161)
    mass = torch.trapezoid(torch.trapezoid(density, axes[1]), axes[0])
    assert abs(mass - 1) < 1e-5
