"""Spectral normalisation: largest singular value 1, and weights that hold still during a solve."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from cnf_lab.fields import Blend, ConcatSquash, Hyper, Mlp, Tanh
from cnf_lab.fields.spectral import SpectralNorm, iterate_spectral_norms
from cnf_lab.flows import ContinuousFlow
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact

T = torch.tensor(0.3)


def normalised_weights(module):
    return [layer.weight for layer in module.modules() if parametrize.is_parametrized(layer)]


def singular_vectors(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers() if name.endswith((".u", ".v"))}


@pytest.fixture
def field():
    return Mlp((3,), [6, 5], ConcatSquash, Tanh, spectral_norm=True)


@pytest.fixture
def flow(field):
    return ContinuousFlow(field, RungeKuttaSolver("dopri5"), Exact())


def test_largest_singular_value_is_one(field):
    field = field.double()
    for layer in field.modules():
        if isinstance(layer, parametrize.ParametrizationList):
            nn.init.normal_(layer.original)
    iterate_spectral_norms(field, 2000)
    norms = torch.stack([torch.linalg.matrix_norm(weight, 2) for weight in normalised_weights(field)])
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-9)


def test_every_weight_of_the_layers_is_normalised(field):
    assert len(normalised_weights(field)) == sum(isinstance(m, nn.Linear) for m in field.modules())


def test_convolutions_are_normalised_as_matrices():
    convolution = nn.Sequential(nn.Conv2d(2, 4, 3)).double()
    SpectralNorm.apply_to(convolution)
    norm = torch.linalg.matrix_norm(convolution[0].weight.flatten(1), 2)
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", [Blend, Hyper])
def test_other_layers_start_finite(layer):
    value = Mlp((3,), [6, 5], layer, Tanh, spectral_norm=True)(T, torch.randn(4, 3))
    assert value.isfinite().all()


def test_norm_does_not_depend_on_the_scale_of_the_weight():
    linear = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    SpectralNorm.apply_to(linear)
    linear(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
    original = linear[0].parametrizations.weight.original
    assert abs((original * original.grad).sum()) < 1e-10


def test_weights_hold_still_during_a_training_solve(flow, monkeypatch):
    seen = []
    forward = flow.field.value_and_divergence

    def watched(*arguments):
        seen.append(torch.cat([weight.detach().flatten() for weight in normalised_weights(flow.field)]))
        return forward(*arguments)

    monkeypatch.setattr(flow.field, "value_and_divergence", watched)
    nn.init.normal_(flow.field.stack.layers[0].linear.parametrizations.weight.original)
    flow.train().pull_back(torch.randn(4, 3))
    assert len(seen) > 2
    assert all(weights.equal(seen[0]) for weights in seen)


def test_a_training_solve_moves_the_singular_vectors_once(flow):
    nn.init.normal_(flow.field.stack.layers[0].linear.parametrizations.weight.original)
    expected = copy.deepcopy(flow.field)
    iterate_spectral_norms(expected)
    before = singular_vectors(flow.field)
    flow.train().pull_back(torch.randn(4, 3))
    after = singular_vectors(flow.field)
    assert any(not after[name].equal(before[name]) for name in before)
    torch.testing.assert_close(after, singular_vectors(expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("training", "direction"),
    [(False, "pull_back"), (False, "push_forward"), (True, "push_forward")],
    ids=["evaluation", "sampling-in-evaluation", "sampling-in-training"],
)
def test_other_solves_do_not_move_them(flow, training, direction):
    nn.init.normal_(flow.field.stack.layers[0].linear.parametrizations.weight.original)
    before = singular_vectors(flow.field)
    getattr(flow.train(training), direction)(torch.randn(4, 3))
    torch.testing.assert_close(singular_vectors(flow.field), before, rtol=0, atol=0)


def test_state_dict_round_trip(field):
    x = torch.randn(4, 3)
    other = Mlp((3,), [6, 5], ConcatSquash, Tanh, spectral_norm=True)
    assert not other(T, x).equal(field(T, x))
    other.load_state_dict(field.state_dict())
    assert other(T, x).equal(field(T, x))
