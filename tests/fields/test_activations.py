"""Activations give the slope that automatic differentiation gives."""

import pytest
import torch

from cnf_lab.fields import Elu, Identity, Relu, Silu, Softplus, Square, Swish, Tanh

ACTIVATIONS = [Tanh, Softplus, Silu, Elu, Relu, Swish, Square, Identity]
each_activation = pytest.mark.parametrize("kind", ACTIVATIONS)


@pytest.fixture
def u():
    # An even number of points: none on the kink of relu.
    return torch.linspace(-4, 4, 18, dtype=torch.float64).requires_grad_()


@each_activation
def test_forward_is_the_value(kind, u):
    activation = kind().double()
    value, _ = activation.value_and_slope(u)
    torch.testing.assert_close(activation(u), value, rtol=1e-15, atol=1e-15)


@each_activation
def test_slope_is_the_derivative(kind, u):
    value, slope = kind().double().value_and_slope(u)
    (expected,) = torch.autograd.grad(value.sum(), u)
    torch.testing.assert_close(slope, expected, rtol=1e-14, atol=1e-14)


@each_activation
def test_value_and_slope_have_right_gradients(kind, u):
    activation = kind().double()
    inputs = (u, *activation.parameters())
    assert torch.autograd.gradcheck(lambda u, *_: activation.value_and_slope(u), inputs)


@each_activation
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_far_from_zero_everything_is_finite(kind, size):
    u = torch.tensor([-size, size], requires_grad=True)
    value, slope = kind().value_and_slope(u)
    (gradient,) = torch.autograd.grad(value.sum() + slope.sum(), u)
    assert all(part.isfinite().all() for part in (value, slope, gradient))


def test_swish_learns_a_beta_of_its_own(u):
    first, second = Swish().double(), Swish().double()
    first(u).sum().backward()
    assert first.raw_beta.grad is not None
    assert second.raw_beta.grad is None


@pytest.mark.parametrize("kind", [Tanh, Softplus, Silu])
def test_slopes_by_hand_have_all_derivatives(kind):
    """Reverse mode once and twice, forward mode, and batches of it, against what autograd makes of the formula."""
    activation, u = kind(), torch.randn(7, dtype=torch.float64, requires_grad=True)

    def plain(u):
        value, gate = activation(u), torch.sigmoid(u)
        slopes = {Tanh: 1 - value * value, Softplus: gate, Silu: gate * (1 + u * (1 - gate))}
        return value, slopes[kind]

    assert torch.autograd.gradcheck(activation.value_and_slope, (u,))
    assert torch.autograd.gradgradcheck(activation.value_and_slope, (u,))
    tangents = torch.randn(3, 7, dtype=torch.float64)
    for mine, expected in zip(
        *(
            torch.func.vmap(lambda v, f=f: torch.func.jvp(f, (u.detach(),), (v,)), out_dims=((None, None), (0, 0)))(
                tangents
            )
            for f in (activation.value_and_slope, plain)
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.jacrev(lambda one: torch.stack(activation.value_and_slope(one))))(u.detach()),
        torch.func.vmap(torch.func.jacrev(lambda one: torch.stack(plain(one))))(u.detach()),
        rtol=1e-12,
        atol=1e-12,
    )
