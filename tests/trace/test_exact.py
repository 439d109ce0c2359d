"""The exact divergence, in one pass of tangents or in chunks, for rows and images."""

import pytest
import torch
from torch import nn

from cnf_lab.errors import ConfigError
from cnf_lab.fields import ConcatSquash, Mlp, Residual, Tanh, VectorField
from cnf_lab.trace import Exact

T = torch.tensor(0.4, dtype=torch.float64)


class Convolution(VectorField):
    """A small field of images."""

    event_dims = 3

    def __init__(self) -> None:
        super().__init__((2, 3, 4))
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, t, x, context=None):
        return self.second(torch.tanh(self.first(x) * (1 + t)))


def trace_of_jacobian(field, x):
    def row(event):
        return field(T, event[None])[0]

    jacobians = torch.stack([torch.autograd.functional.jacobian(row, event) for event in x])
    size = x[0].numel()
    return jacobians.reshape(len(x), size, size).diagonal(dim1=1, dim2=2).sum(dim=1)


@pytest.fixture(params=["mlp", "residual", "images"])
def field(request, randomise):
    makers = {
        "mlp": lambda: Mlp((5,), [6, 4], ConcatSquash, Tanh),
        "residual": lambda: Residual((5,), 6, 1, Tanh, 2),
        "images": Convolution,
    }
    return randomise(makers[request.param]())


@pytest.fixture
def x(field):
    return torch.randn(3, *field.event_shape, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 5, 24, 100])
def test_is_the_trace_of_the_jacobian_in_any_chunks(field, x, chunk):
    value, div = Exact(chunk=chunk, closed_form=False).value_and_divergence(field, T, x, None, None)
    torch.testing.assert_close(value, field(T, x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(div, trace_of_jacobian(field, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("chunk", "passes"), [(None, [5]), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_chunk_bounds_the_tangents_of_a_pass(randomise, monkeypatch, chunk, passes):
    field = randomise(Mlp((5,), [6, 4], ConcatSquash, Tanh))
    products, seen = field.value_and_jvp, []

    def watched(t, x, tangents, context):
        seen.append(len(tangents))
        return products(t, x, tangents, context)

    monkeypatch.setattr(field, "value_and_jvp", watched)
    Exact(chunk=chunk, closed_form=False).value_and_divergence(field, T, torch.randn(3, 5).double(), None, None)
    assert seen == passes


def test_closed_form_needs_no_tangents(randomise, monkeypatch):
    field = randomise(Mlp((5,), [6, 4], ConcatSquash, Tanh))
    monkeypatch.setattr(field, "value_and_jvp", None)
    Exact().value_and_divergence(field, T, torch.randn(3, 5, dtype=torch.float64), None, None)


def test_nothing_is_random(field, x):
    assert Exact.exact
    assert all(not isinstance(part, torch.Tensor) for part in Exact().start(field, x, None, None))


def test_chunk_of_0_is_refused():
    with pytest.raises(ConfigError, match=r"Expected trace\.chunk of at least 1 or null, got 0\. Type"):
        Exact(chunk=0)
