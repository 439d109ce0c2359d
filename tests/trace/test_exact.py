"""The exact divergence, in one pass of tangents or in chunks, for rows and images."""

import pytest
import torch
from torch import nn

from cnf_lab.errors import ConfigError
from cnf_lab.fields import ConcatSquash, Ignore, Mlp, Residual, Softplus, Tanh, VectorField
from cnf_lab.trace import Exact
from cnf_lab.trace.exact import numbers_per_row

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


def test_memory_budget_sets_the_tangents_of_a_pass(randomise):
    field = randomise(Mlp((5,), [6, 4, 3], ConcatSquash, Tanh))
    rows = torch.randn(7, 5, dtype=torch.float64)
    budget = numbers_per_row(field, rows, None) * 7 * 8 / 2**30
    for tangents, expected in ((0.5, 1), (1, 1), (3.5, 3), (100, 5)):
        assert Exact(memory=tangents * budget).start(field, rows, None, None)[0] == expected
    assert Exact(memory=1e-9, chunk=4).start(field, rows, None, None)[0] == 4


def test_numbers_per_row_are_those_of_the_layers(randomise):
    """Products and activations of 6, 4 and 3 units and the output of 5, whatever the number of rows."""
    field = randomise(Mlp((5,), [6, 4, 3], Ignore, Tanh))
    for rows in (1, 3, 50):
        assert numbers_per_row(field, torch.randn(rows, 5, dtype=torch.float64), None) >= 6 + 4 + 3 + 5
    assert numbers_per_row(field, torch.randn(3, 5, dtype=torch.float64), None) <= 6 * (6 + 4 + 3 + 5)


@pytest.mark.parametrize("chunk", [None, 2])
def test_gradients_do_not_depend_on_the_passes(field, x, chunk):
    def gradients(estimator):
        _, div = estimator.value_and_divergence(field, T, x, None, None)
        weights = torch.arange(1, 4, dtype=torch.float64)
        return torch.autograd.grad(div @ weights, list(field.parameters()), allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(gradients(Exact(chunk=chunk, closed_form=False)), gradients(Exact(chunk=1)))


@pytest.mark.parametrize("rows", [2, 40])
def test_three_hidden_layers_meet_in_the_middle(randomise, rows):
    """With more rows than units the divergence comes from two products, with fewer from tangents."""
    field = randomise(Mlp((4,), [6, 5, 7], ConcatSquash, Softplus, context_features=2, subtract_identity=True))
    x, context = torch.randn(rows, 4, dtype=torch.float64), torch.randn(rows, 2, dtype=torch.float64)
    expected = torch.func.vmap(
        lambda one, c: torch.func.jacrev(lambda y: field(T, y[None], c[None])[0])(one).diagonal().sum()
    )(x, context)
    for chunk in (None, 1, 3):
        value, div = Exact(chunk=chunk).value_and_divergence(field, T, x, context, None)
        torch.testing.assert_close(div, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(value, field(T, x, context), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("closed_form", [True, False])
def test_norm_of_the_jacobian_is_estimated_beside_the_divergence(randomise, closed_form):
    field = randomise(Mlp((5,), [6, 4], ConcatSquash, Tanh))
    x = torch.randn(1, 5, dtype=torch.float64).expand(20_000, 5)
    estimator = Exact(closed_form=closed_form)
    probe = estimator.start(field, x, None, torch.Generator().manual_seed(0), with_norm=True)
    found = estimator.linearise(field, T, x, None, probe)
    jacobian = torch.autograd.functional.jacobian(lambda y: field(T, y[None])[0], x[0])
    error = found.squared_norm.std() / len(x) ** 0.5
    assert abs(found.squared_norm.mean() - jacobian.square().sum()) < 4 * error
    torch.testing.assert_close(found.div, jacobian.trace().expand(len(x)), rtol=1e-11, atol=1e-11)
    assert estimator.linearise(field, T, x, None, None).squared_norm is None


def test_memory_below_0_is_refused():
    with pytest.raises(ConfigError, match=r"Expected trace\.memory above 0 GiB, got 0\.0\. Type trace\.memory=1\.0\."):
        Exact(memory=0.0)
