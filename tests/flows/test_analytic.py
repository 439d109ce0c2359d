"""Flows whose densities are known: linear fields, Gaussians, the original's own numbers."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from cnf_lab.fields import Blend, ConcatSquash, Identity, Ignore, Mlp, Softplus, Squash
from cnf_lab.flows import Chain, ContinuousFlow, Flow, StandardNormal
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact

MATRIX = torch.tensor([[-0.4, 1.3, 0.2], [-1.1, 0.7, 0.6], [0.5, -0.7, -0.2]], dtype=torch.float64)
OFFSET = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64)
SOLVERS = {
    "dopri5": RungeKuttaSolver("dopri5", 1e-9, 1e-9, error_norm="example"),
    "dopri8": RungeKuttaSolver("dopri8", 1e-9, 1e-9),
    "rk4": RungeKuttaSolver("rk4", steps=80),
}


def linear_layers(layer, matrix, offset=None):
    """Return a field whose first layer is the identity at all times, to be scaled by the second."""
    size = len(matrix)
    field = Mlp((size,), [size], layer, Identity).double()
    for parameter in field.parameters():
        torch.nn.init.zeros_(parameter)
    if layer is not Blend:
        field.stack.layers[0].linear.weight.data.copy_(torch.eye(size))
        field.stack.layers[1].linear.weight.data.copy_(matrix)
        if offset is not None:
            field.stack.layers[1].linear.bias.data.copy_(offset)
    return field


def flow_of(field, solver, **options):
    flow = Flow(ContinuousFlow(field, solver, Exact(), **options), StandardNormal(field.event_shape))
    return flow.double().eval()


def exponential(end_time):
    """Return E and s of the solution z = E x + s of dx/dt = A x + b."""
    system = torch.zeros(4, 4, dtype=torch.float64)
    system[:3, :3], system[:3, 3] = MATRIX, OFFSET
    end = torch.linalg.matrix_exp(end_time * system)
    return end[:3, :3], end[:3, 3]


@pytest.fixture
def x():
    return torch.randn(20, 3, dtype=torch.float64)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("end_time", [0.5, 2.0])
@pytest.mark.parametrize("trained", [False, True], ids=["fixed-T", "trained-T"])
def test_linear_field_is_the_matrix_exponential(x, solver, end_time, trained):
    flow = flow_of(linear_layers(Ignore, MATRIX, OFFSET), solver, end_time=end_time, train_end_time=trained)
    matrix, shift = exponential(end_time)
    mapped = flow.pull_back(x)
    torch.testing.assert_close(mapped.value, x @ matrix.mT + shift, rtol=1e-7, atol=1e-7)
    log_det = torch.full((20,), float(end_time * MATRIX.trace()), dtype=torch.float64)
    torch.testing.assert_close(mapped.log_det, log_det, rtol=1e-7, atol=1e-7)
    truth = MultivariateNormal(torch.linalg.solve(matrix, -shift), precision_matrix=matrix.mT @ matrix)
    torch.testing.assert_close(flow.log_prob(x), truth.log_prob(x), rtol=1e-6, atol=1e-6)


def test_gradient_of_the_log_density_of_a_linear_field(x):
    flow = flow_of(linear_layers(Ignore, MATRIX, OFFSET), SOLVERS["dopri5"])
    matrix, shift = exponential(1.0)
    (score,) = torch.autograd.grad(flow.log_prob(x.requires_grad_()).sum(), x)
    torch.testing.assert_close(score, -(x.detach() @ matrix.mT + shift) @ matrix, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("end_time", [0.7, 1.5])
def test_gaussian_to_gaussian_by_time_dependent_scales(x, end_time):
    # dx/dt = w sigma(a t + c) x scales x by exp(w (softplus(a T + c) - softplus(c)) / a).
    weight, rate, start = (
        torch.tensor(v, dtype=torch.float64) for v in ([0.9, -1.2, 0.4], [2.0, -1.5, 0.8], [-1, 0.5, 2])
    )
    field = linear_layers(Squash, 2 * torch.diag(weight))
    gate = field.stack.layers[0].time_gate
    gate.weight.data.copy_(rate[:, None])
    gate.bias.data.copy_(start)
    softplus = torch.nn.functional.softplus
    scale = torch.exp(weight * (softplus(rate * end_time + start) - softplus(start)) / rate)
    flow = flow_of(field, SOLVERS["dopri5"], end_time=end_time)
    torch.testing.assert_close(flow.pull_back(x).value, x * scale, rtol=1e-7, atol=1e-7)
    truth = Normal(torch.zeros_like(scale), 1 / scale).log_prob(x).sum(dim=1)
    torch.testing.assert_close(flow.log_prob(x), truth, rtol=1e-6, atol=1e-6)


def test_gaussian_to_gaussian_by_blended_scales(x):
    # The rates go from w0 to w1 in a straight line: their mean acts.
    first, last = torch.tensor([[0.9, -1.2, 0.4], [-0.3, 0.6, 1.1]], dtype=torch.float64)
    field = linear_layers(Blend, MATRIX)
    one, two = field.stack.layers
    for linear, weight in (
        (one.start, torch.eye(3)),
        (one.end, torch.eye(3)),
        (two.start, first.diag()),
        (two.end, last.diag()),
    ):
        linear.weight.data.copy_(weight)
    flow = flow_of(field, SOLVERS["dopri5"])
    scale = torch.exp((first + last) / 2)
    truth = Normal(torch.zeros_like(scale), 1 / scale).log_prob(x).sum(dim=1)
    torch.testing.assert_close(flow.log_prob(x), truth, rtol=1e-6, atol=1e-6)


def test_two_blocks_agree_with_the_original(reference, load_original):
    case = reference("flow_two_blocks")
    blocks = []
    for index in range(2):
        field = Mlp((3,), [8, 8], ConcatSquash, Softplus)
        load_original(field.stack, case, f"w/chain/{index}/odefunc/diffeq/")
        end_time = float(case[f"w/chain/{index}/sqrt_end_time"].square())
        blocks.append(ContinuousFlow(field, RungeKuttaSolver("dopri5", 1e-11, 1e-11), Exact(), end_time=end_time))
    flow = Flow(Chain(blocks), StandardNormal((3,))).double().eval()
    mapped = flow.pull_back(case["x"])
    torch.testing.assert_close(mapped.value, case["z"], rtol=0, atol=1e-8)
    torch.testing.assert_close(mapped.log_det, case["log_det"][:, 0], rtol=0, atol=1e-8)
    torch.testing.assert_close(flow.log_prob(case["x"]), case["log_prob"][:, 0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("end_time", [0.6, 1.7])
def test_trained_end_time_has_the_gradient_of_a_linear_field(x, gradient, end_time):
    solver = RungeKuttaSolver("dopri5", 1e-10, 1e-10, gradient=gradient)
    flow = flow_of(linear_layers(Ignore, MATRIX), solver, end_time=end_time, train_end_time=True)
    flow.log_prob(x).sum().backward()
    z = x @ torch.linalg.matrix_exp(end_time * MATRIX).mT
    # d/dT of -|z|^2 / 2 + T tr A, and T = exp(theta).
    by_time = (-(z * (z @ MATRIX.mT)).sum(dim=1) + MATRIX.trace()).sum()
    torch.testing.assert_close(flow.transform.log_end_time.grad, end_time * by_time, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("end_time", [0.3, 0.7, 1.0, 1.9])
def test_trained_end_time_starts_where_it_is_told(end_time):
    field = linear_layers(Ignore, MATRIX)
    x = torch.ones(1, 3, dtype=torch.float64)
    fixed, trained = (
        flow_of(field, SOLVERS["dopri5"], end_time=end_time, train_end_time=trained).pull_back(x).log_det
        for trained in (False, True)
    )
    torch.testing.assert_close(trained, fixed, rtol=1e-7, atol=0)  # the parameter is born in float32


def test_standard_normal_is_that_of_torch():
    base, z = StandardNormal((2, 3)).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    truth = Normal(torch.zeros(2, 3).double(), 1.0).log_prob(z).sum(dim=(1, 2))
    torch.testing.assert_close(base.log_prob(z), truth, rtol=1e-14, atol=1e-14)
    sample = base.sample(4000)
    assert sample.dtype == torch.float64
    assert abs(sample.mean()) < 4 / math.sqrt(sample.numel())
    assert abs(sample.var() - 1) < 4 * math.sqrt(2 / sample.numel())
