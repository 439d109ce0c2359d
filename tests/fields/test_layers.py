"""Time-conditioned linear layers: the original's numbers, and one description for value and tangents."""

import pytest
import torch

from cnf_lab.fields import Blend, Concat, ConcatCoord, ConcatSquash, ConcatV2, Embedded, Hyper, Ignore, Squash
from cnf_lab.fields.layers import AffineMap

LAYERS = [Ignore, Concat, ConcatCoord, ConcatV2, Squash, ConcatSquash, Blend, Hyper, Embedded]
each_layer = pytest.mark.parametrize("kind", LAYERS)
T = torch.tensor(0.37, dtype=torch.float64)
TIMES = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)


@pytest.fixture
def x():
    return torch.randn(5, 3, dtype=torch.float64)


@pytest.fixture
def layer(kind, randomise):
    return randomise(kind(3, 4))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Ignore, "ignore"),
        (Concat, "concat"),
        (ConcatCoord, "concat"),
        (Squash, "squash"),
        (ConcatSquash, "concatsquash"),
        (Blend, "blend"),
        (Hyper, "hyper"),
    ],
)
def test_agrees_with_the_original(kind, name, reference, load_original):
    case = reference(f"linear_{name}")
    layer = load_original(kind(3, 4), case)
    torch.testing.assert_close(layer(case["t"], case["x"]), case["y"], rtol=0, atol=1e-10)


def test_concat_v2_is_concat_with_the_time_column_apart(randomise, x):
    apart, together = randomise(ConcatV2(3, 4)), Concat(3, 4).double()
    together.linear.weight.data = torch.cat([apart.time_shift.weight, apart.linear.weight], dim=1)
    together.linear.bias = apart.linear.bias
    torch.testing.assert_close(apart(T, x), together(T, x), rtol=0, atol=1e-14)


@each_layer
def test_time_per_example_is_the_scalar_time_of_each_row(layer, x):
    by_row = torch.cat([layer(t, row) for t, row in zip(TIMES, x.split(1), strict=True)])
    torch.testing.assert_close(layer(TIMES, x), by_row, rtol=1e-14, atol=1e-14)


@each_layer
@pytest.mark.parametrize("t", [T, TIMES], ids=["scalar", "per example"])
@pytest.mark.parametrize("rows", [5, 1], ids=["own tangents", "shared tangents"])
def test_linear_part_maps_tangents(layer, x, t, rows):
    tangents = torch.randn(2, rows, 3, dtype=torch.float64)
    products = layer.at(t).linear(tangents)
    for tangent, product in zip(tangents, products, strict=True):
        _, expected = torch.func.jvp(lambda y: layer(t, y), (x,), (tangent.expand_as(x),))
        torch.testing.assert_close(product.expand_as(expected), expected, rtol=0, atol=1e-14)


@each_layer
def test_gradient_with_respect_to_time_input_and_weights(layer, x):
    t, x = T.clone().requires_grad_(), x.requires_grad_()
    assert torch.autograd.gradcheck(lambda t, x, *_: layer(t, x), (t, x, *layer.parameters()))


@each_layer
@pytest.mark.parametrize("t", [T, TIMES], ids=["scalar", "per example"])
def test_modulated_map_is_gated_and_shifted(layer, x, t):
    affine = layer.at(t)
    gate, shift = torch.randn(2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(affine.modulated(gate, shift)(x), gate * affine(x) + shift, rtol=0, atol=1e-13)


def test_affine_map_without_a_gate_has_gate_one(x):
    weight, shift = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    gated = AffineMap(weight, torch.ones(4, dtype=torch.float64), shift)
    torch.testing.assert_close(AffineMap(weight, None, shift)(x), gated(x), rtol=0, atol=1e-14)


def test_blend_is_its_first_map_at_0_and_its_second_at_1(randomise, x):
    layer = randomise(Blend(3, 4))
    zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(layer(zero, x), layer.start(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(layer(one, x), layer.end(x), rtol=0, atol=1e-14)


def test_hyper_starts_near_zero(x):
    y = Hyper(3, 4).double()(T, x)
    assert 0 < y.abs().max() < 0.2


def test_only_blend_is_confined_to_unit_time():
    assert [kind for kind in LAYERS if kind.unit_time] == [Blend]
