"""Convolutional fields: the original's layers, products with the Jacobian, and exact divergences."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from cnf_lab.errors import ConfigError
from cnf_lab.fields import (
    BlendConv,
    ConcatConv,
    ConcatCoordConv,
    ConcatSquashConv,
    ConcatV2Conv,
    ConvField,
    HyperConv,
    IgnoreConv,
    Softplus,
    SquashConv,
    Swish,
    Tanh,
)
from cnf_lab.fields.spectral import iterate_spectral_norms
from cnf_lab.flows import ContinuousFlow
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact, Gaussian, Hutchinson, Rademacher

T = torch.tensor(0.37, dtype=torch.float64)
TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
LAYERS = [
    IgnoreConv,
    ConcatConv,
    ConcatCoordConv,
    ConcatV2Conv,
    SquashConv,
    ConcatSquashConv,
    BlendConv,
    HyperConv,
]
STRIDES = {"keeps-the-size": 1, "halves": 2, "doubles": -2}
each_layer = pytest.mark.parametrize("kind", LAYERS)
each_stride = pytest.mark.parametrize("stride", STRIDES.values(), ids=STRIDES.keys())
each_time = pytest.mark.parametrize("t", [T, TIMES], ids=["scalar", "per-example"])

FIELDS = {
    **{kind.__name__: partial(ConvField, (2, 5, 3), [3, 2], kind, Tanh) for kind in LAYERS},
    **{
        f"{kind.__name__}-up-and-down": partial(ConvField, (2, 4, 6), [3, 2, 3], kind, Tanh, [2, 1, 1, -2])
        for kind in LAYERS
    },
    "three-hidden": partial(ConvField, (1, 7, 7), [3, 2, 3], ConcatConv, Softplus),
    "one-hidden": partial(ConvField, (2, 6, 5), [4], ConcatConv, Swish),
    "one-row-of-pixels": partial(ConvField, (2, 1, 6), [3], ConcatCoordConv, Tanh),
    "one-pixel": partial(ConvField, (3, 1, 1), [4], ConcatConv, Tanh),
    "far-down": partial(ConvField, (1, 8, 4), [2, 3, 2], ConcatConv, Tanh, [2, 2, -2, -2]),
    "first-up": partial(ConvField, (1, 3, 4), [2, 2], ConcatSquashConv, Tanh, [-2, 1, 2]),
    "context": partial(ConvField, (2, 5, 3), [3, 2], ConcatConv, Tanh, context_features=2),
    "context-gated": partial(ConvField, (2, 4, 2), [3, 2], ConcatSquashConv, Tanh, [2, 1, -2], context_features=2),
    "context-own-kernels": partial(ConvField, (1, 3, 4), [3, 2], BlendConv, Tanh, context_features=2),
    "spectral-norm": partial(ConvField, (2, 4, 4), [3, 2], ConcatConv, Tanh, [2, 1, -2], spectral_norm=True),
}
each_field = pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS.keys())


@pytest.fixture
def x():
    return torch.randn(3, 3, 6, 4, dtype=torch.float64)


@pytest.fixture
def layer(kind, stride, randomise):
    return randomise(kind(3, 4, stride))


def field_and_inputs(make, randomise):
    field = randomise(make())
    iterate_spectral_norms(field, 100)
    features = make.keywords.get("context_features", 0)
    context = torch.randn(3, features, dtype=torch.float64) if features else None
    return field, torch.randn(3, *field.event_shape, dtype=torch.float64), context


def jacobian(field, t, x, context):
    """Return the Jacobian of every row (batch, D, D) by reverse mode."""
    x = x.detach().requires_grad_()
    value = field(t, x, context).flatten(1)
    rows = [torch.autograd.grad(value[:, i].sum(), x, create_graph=True)[0].flatten(1) for i in range(value.shape[1])]
    return torch.stack(rows, dim=1)


def divergence(field, t, x, context):
    return jacobian(field, t, x, context).diagonal(dim1=1, dim2=2).sum(dim=1)


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (IgnoreConv, "ignore"),
        (ConcatConv, "concat"),
        (ConcatCoordConv, "concatcoord"),
        (ConcatSquashConv, "concatsquash"),
        (BlendConv, "blend"),
    ],
)
def test_agrees_with_the_original(kind, name, reference, load_original):
    case = reference(f"conv_{name}")
    layer = load_original(kind(3, 4), case)
    torch.testing.assert_close(layer(case["t"], case["x"]), case["y"], rtol=0, atol=1e-10)


def in_words(layer, t, x):
    """Return what the equation of a layer says, with every channel convolved on every row."""

    def convolve(x, weight, bias):
        if layer.stride == -2:
            return F.conv_transpose2d(x, weight.transpose(0, 1), bias, stride=2, padding=1)
        return F.conv2d(x, weight, bias, stride=layer.stride, padding=1)

    def of(coefficients, x):
        return convolve(x, coefficients.weight, coefficients.bias)

    def of_time(linear):
        return linear(t.reshape(1, 1)).reshape(-1, 1, 1)

    time, height, width = x.new_full((len(x), 1, *x.shape[2:]), float(t)), *x.shape[2:]
    match layer:
        case IgnoreConv():
            return of(layer.linear, x)
        case ConcatConv():
            return of(layer.linear, torch.cat([time, x], dim=1))
        case ConcatCoordConv():
            rows = torch.arange(float(height), dtype=x.dtype)[:, None].expand_as(time)
            columns = torch.arange(float(width), dtype=x.dtype).expand_as(time)
            return of(layer.linear, torch.cat([x, time, rows, columns], dim=1))
        case ConcatV2Conv():
            return of(layer.linear, x) + of_time(layer.time_shift)
        case SquashConv():
            return of(layer.linear, x) * of_time(layer.time_gate).sigmoid()
        case ConcatSquashConv():
            return of(layer.linear, x) * of_time(layer.time_gate).sigmoid() + of_time(layer.time_shift)
        case BlendConv():
            return (1 - t) * of(layer.start, x) + t * of(layer.end, x)
        case HyperConv():
            entries = layer.network.weight[:, 0] * t + layer.network.bias
            return convolve(x, entries[:-4].reshape(4, 3, layer.kernel, layer.kernel), entries[-4:])


@each_layer
@each_stride
def test_layer_is_its_equation(layer, x):
    torch.testing.assert_close(layer(T, x), in_words(layer, T, x), rtol=0, atol=1e-13)


@each_layer
@each_stride
def test_stride_changes_the_size(layer, x):
    heights = {1: 6, 2: 3, -2: 12}
    assert layer(T, x).shape == (3, 4, heights[layer.stride], heights[layer.stride] * 4 // 6)


@each_layer
@each_stride
def test_time_per_example_is_the_scalar_time_of_each_row(layer, x):
    by_row = torch.cat([layer(t, row) for t, row in zip(TIMES, x.split(1), strict=True)])
    torch.testing.assert_close(layer(TIMES, x), by_row, rtol=0, atol=1e-13)


@each_layer
@each_stride
@each_time
@pytest.mark.parametrize("rows", [3, 1], ids=["own-tangents", "shared-tangents"])
def test_linear_part_maps_tangents(layer, x, t, rows):
    tangents = torch.randn(2, rows, *x.shape[1:], dtype=torch.float64)
    products = layer.at(t, x.shape[2:]).linear(tangents)
    for tangent, product in zip(tangents, products, strict=True):
        _, expected = torch.func.jvp(lambda y: layer(t, y), (x,), (tangent.expand_as(x),))
        torch.testing.assert_close(product.expand_as(expected), expected, rtol=0, atol=1e-13)


@each_layer
@each_time
def test_rows_share_what_they_can(kind, t, randomise, x):
    convolution = randomise(kind(3, 4)).at(t, x.shape[2:])
    if t.dim() == 0:
        assert convolution.weight.dim() == 4
        assert convolution.gate is None
        assert convolution.shift.dim() == 3
    assert convolution.linear(x.new_ones(2, 1, 3, 6, 4)).shape[1] == (
        3 if t.dim() and kind in (SquashConv, ConcatSquashConv, BlendConv, HyperConv) else 1
    )


@each_layer
@pytest.mark.parametrize("stride", [1, -2], ids=["keeps-the-size", "doubles"])
def test_gradient_with_respect_to_time_input_and_weights(kind, stride, randomise):
    layer = randomise(kind(2, 1, stride))
    t, x = T.clone().requires_grad_(), torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, x, *_: layer(t, x), (t, x, *layer.parameters()))


@each_layer
@each_stride
@each_time
def test_modulated_map_is_gated_and_shifted(layer, x, t):
    convolution = layer.at(t, x.shape[2:])
    gate, shift = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = gate[:, :, None, None] * convolution(x) + shift[:, :, None, None]
    torch.testing.assert_close(convolution.modulated(gate, shift)(x), expected, rtol=0, atol=1e-13)


def test_hyper_starts_near_zero(x):
    y = HyperConv(3, 4).double()(T, x)
    assert 0 < y.abs().max() < 0.5


def test_only_blend_is_confined_to_unit_time():
    assert [kind for kind in LAYERS if ConvField((1, 4, 4), [2], kind, Tanh).unit_time] == [BlendConv]


# ---------------------------------------------------------------- fields


@each_field
def test_rows_do_not_see_each_other(make, randomise):
    field, x, context = field_and_inputs(make, randomise)
    value = field(T, x, context)
    assert value.shape == x.shape
    for row in range(len(x)):
        one = slice(row, row + 1)
        alone = field(T, x[one], None if context is None else context[one])
        torch.testing.assert_close(value[one], alone, rtol=1e-13, atol=1e-13)


@each_field
def test_time_per_example_in_a_field(make, randomise):
    field, x, context = field_and_inputs(make, randomise)
    contexts = [None] * 3 if context is None else context.split(1)
    rows = [field(t, row, c) for t, row, c in zip(TIMES, x.split(1), contexts, strict=True)]
    torch.testing.assert_close(field(TIMES, x, context), torch.cat(rows), rtol=1e-13, atol=1e-13)


@each_field
@each_time
@pytest.mark.parametrize("rows", [3, 1], ids=["own-tangents", "shared-tangents"])
def test_value_and_jvp_is_forward_mode(make, t, rows, randomise):
    field, x, context = field_and_inputs(make, randomise)
    tangents = torch.randn(2, rows, *field.event_shape, dtype=torch.float64)
    value, products = field.value_and_jvp(t, x, tangents, context)
    torch.testing.assert_close(value, field(t, x, context), rtol=1e-13, atol=1e-13)
    for tangent, product in zip(tangents, products, strict=True):
        _, expected = torch.func.jvp(lambda y: field(t, y, context), (x,), (tangent.expand_as(x),))
        torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)


@each_field
@pytest.mark.parametrize("chunk", [None, 1, 4, 11])
def test_exact_divergence_is_the_trace_of_the_jacobian(make, chunk, randomise):
    field, x, context = field_and_inputs(make, randomise)
    value, div = Exact(chunk=chunk).value_and_divergence(field, T, x, context, None)
    torch.testing.assert_close(value, field(T, x, context), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(div, divergence(field, T, x, context), rtol=1e-11, atol=1e-11)


@each_field
def test_exact_divergence_with_a_time_per_example(make, randomise):
    field, x, context = field_and_inputs(make, randomise)
    _, div = Exact().value_and_divergence(field, TIMES, x, context, None)
    torch.testing.assert_close(div, divergence(field, TIMES, x, context), rtol=1e-11, atol=1e-11)


@each_field
def test_gradients_of_the_divergence_agree_with_those_of_the_jacobian(make, randomise):
    field, x, context = field_and_inputs(make, randomise)
    weights = torch.randn(3, dtype=torch.float64)

    def gradients(div):
        return torch.autograd.grad(div @ weights, list(field.parameters()), materialize_grads=True, allow_unused=True)

    expected = gradients(divergence(field, T, x, context))
    for chunk in (None, 7):
        _, div = Exact(chunk=chunk).value_and_divergence(field, T, x, context, None)
        torch.testing.assert_close(gradients(div), expected, rtol=1e-10, atol=1e-10)


@each_field
def test_parts_of_the_divergence_add_up(make, randomise):
    field, x, context = field_and_inputs(make, randomise)
    ends = [0, 1, field.divergence_tangents // 2, field.divergence_tangents]
    parts = [
        field.value_and_partial_divergence(T, x, start, stop, context)[1]
        for start, stop in zip(ends[:-1], ends[1:], strict=True)
    ]
    torch.testing.assert_close(sum(parts), divergence(field, T, x, context), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("event_shape", "hidden", "tangents"),
    [
        pytest.param((1, 12, 9), [2], 9, id="two-layers-reach-two-pixels"),
        pytest.param((2, 8, 11), [2, 2], 2 * 16, id="two-channels"),
        pytest.param((1, 2, 11), [2, 2], 2 * 4, id="image-smaller-than-the-reach"),
    ],
)
def test_pixels_out_of_reach_share_a_tangent(event_shape, hidden, tangents, randomise, monkeypatch):
    field, x, context = field_and_inputs(partial(ConvField, event_shape, hidden, ConcatConv, Tanh), randomise)
    expected, seen, products = divergence(field, T, x, context), [], field.value_and_jvp
    monkeypatch.setattr(field, "value_and_jvp", lambda t, x, v, c: seen.append(len(v)) or products(t, x, v, c))
    _, div = Exact().value_and_divergence(field, T, x, context, None)
    assert seen == [tangents] == [field.divergence_tangents]
    torch.testing.assert_close(div, expected, rtol=1e-11, atol=1e-11)


@given(
    channels=st.integers(1, 2),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    hidden=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    halvings=st.integers(0, 2),
    up_first=st.booleans(),
    layer=st.sampled_from(LAYERS),
    chunk=st.sampled_from([1, 3, 7, None]),
    seed=st.integers(0, 99),
)
def test_divergence_of_any_shape(randomise, channels, size, hidden, halvings, up_first, layer, chunk, seed):
    torch.manual_seed(seed)
    halvings = min(halvings, (len(hidden) + 1) // 2)
    scale = 1 if up_first else 2**halvings
    changes = [-2, 2] if up_first else [2, -2]
    kept = [1] * (len(hidden) + 1 - 2 * halvings)
    strides = [changes[0]] * halvings + kept + [changes[1]] * halvings
    event_shape = (channels, *(min(length * scale, 8) for length in size))
    field = randomise(ConvField(event_shape, hidden, layer, Softplus, strides))
    x = torch.randn(2, *event_shape, dtype=torch.float64)
    value, div = Exact(chunk=chunk).value_and_divergence(field, T, x, None, None)
    torch.testing.assert_close(value, field(T, x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(div, divergence(field, T, x, None), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("distribution", [Rademacher(), Gaussian()], ids=["rademacher", "gaussian"])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_probes_average_to_the_exact_divergence(distribution, mode, randomise):
    field, x, _ = field_and_inputs(FIELDS["ConcatConv"], randomise)
    estimator, rows = Hutchinson(distribution, mode=mode), x[:1].repeat(4000, 1, 1, 1)
    with torch.no_grad():
        probe = estimator.start(field, rows, None, None)
        _, estimates = estimator.value_and_divergence(field, T, rows, None, probe)
    standard_error = estimates.std() / len(rows) ** 0.5
    assert abs(estimates.mean() - divergence(field, T, x[:1], None)) <= 4 * standard_error


def test_probe_of_its_own_for_every_row(randomise):
    field, x, context = field_and_inputs(FIELDS["context-gated"], randomise)
    estimator = Hutchinson(Gaussian(), probes=2)
    probe = estimator.start(field, x, context, None)
    _, div = estimator.value_and_divergence(field, T, x, context, probe)
    vectors = probe.flatten(2)
    expected = torch.einsum("kbi,bij,kbj->b", vectors, jacobian(field, T, x, context), vectors) / 2
    torch.testing.assert_close(div, expected, rtol=1e-11, atol=1e-11)


@each_field
def test_float32_stays_float32_and_agrees(make, randomise):
    field, x, context = field_and_inputs(make, randomise)
    expected = field(T, x, context)
    field, context = field.float(), None if context is None else context.float()
    value, div = Exact().value_and_divergence(field, T.float(), x.float(), context, None)
    assert value.dtype == div.dtype == torch.float32
    torch.testing.assert_close(value, expected.float(), rtol=1e-4, atol=1e-4)


def test_context_of_zeros_changes_nothing(randomise):
    conditional, x, context = field_and_inputs(FIELDS["context"], randomise)
    plain = ConvField((2, 5, 3), [3, 2], ConcatConv, Tanh).double()
    plain.load_state_dict(conditional.state_dict(), strict=False)
    torch.testing.assert_close(conditional(T, x, context.new_zeros(3, 2)), plain(T, x), rtol=1e-14, atol=1e-14)


def test_context_reaches_every_hidden_layer(randomise):
    field, x, context = field_and_inputs(FIELDS["context"], randomise)
    field(T, x, context).sum().backward()
    assert all(modulation.weight.grad.abs().min() > 0 for modulation in field.stack.modulations)


def test_largest_singular_value_of_every_kernel_is_one(randomise):
    field = ConvField((2, 4, 4), [3, 5], ConcatConv, Tanh, [2, 1, -2], spectral_norm=True).double()
    for module in field.modules():
        if isinstance(module, parametrize.ParametrizationList):
            nn.init.normal_(module.original)
    iterate_spectral_norms(field, 3000)
    kernels = [layer.linear.weight for layer in field.stack.layers]
    assert [kernel.shape for kernel in kernels] == [(3, 3, 4, 4), (5, 4, 3, 3), (2, 6, 4, 4)]
    norms = torch.stack([torch.linalg.matrix_norm(kernel.flatten(1), 2) for kernel in kernels])
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-9)


def test_flow_of_images_has_the_log_det_of_its_jacobian(randomise):
    field = randomise(ConvField((1, 4, 4), [3, 2], ConcatConv, Tanh, [2, 1, -2]), 0.2)
    flow = ContinuousFlow(field, RungeKuttaSolver("dopri5", atol=1e-8, rtol=1e-8), Exact()).eval()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    mapped = flow.pull_back(x)
    torch.testing.assert_close(flow.push_forward(mapped.value).value, x, rtol=0, atol=1e-6)
    for row, log_det in zip(x, mapped.log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda y: flow.pull_back(y[None]).value[0], row)
        expected = torch.linalg.slogdet(jacobian.reshape(16, 16)).logabsdet
        torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        pytest.param([(1, 28), (4, 14), (2, 14), (8, 7), (4, 7)], 800_636, id="mnist"),
        pytest.param([(3, 32), (12, 16), (6, 16), (24, 8), (12, 8), (48, 4), (24, 4)], 1_358_868, id="cifar10"),
    ],
)
def test_published_image_models_have_as_many_parameters(sizes, published):
    fields = [ConvField((c, n, n), [64, 64, 64], ConcatConv, Softplus) for c, n in sizes for _ in range(2)]
    assert sum(parameter.numel() for field in fields for parameter in field.parameters()) == published


@pytest.mark.parametrize(
    ("event_shape", "hidden", "strides", "message"),
    [
        pytest.param((1, 4, 4), [], None, r"hidden .*, got \[\]\. Type architecture\.hidden=", id="no-hidden"),
        pytest.param((1, 4, 4), [8, 0], None, r"hidden .*, got \[8, 0\]\. Type architecture\.hidden=", id="width-0"),
        pytest.param((1, 4, 4), [8], [1], r"each of 2 layers, got \[1\]\. Type .*=\[1,1\]\.", id="few-strides"),
        pytest.param((1, 4, 4), [8], [1, 1, 1], r"each of 2 layers, got \[1, 1, 1\]\. Type", id="many-strides"),
        pytest.param((1, 4, 4), [8], [3, -3], r"1, 2 or -2.* got \[3, -3\]\. Type", id="stride-3"),
        pytest.param((1, 6, 7), [8], [2, -2], r"even, got \[2, -2\].* of 6x7 6x7\. Type", id="odd"),
        pytest.param((1, 6, 6), [8] * 3, [2, 2, -2, -2], r"even, .* images of 6x6 3x3\. Type", id="odd-later"),
        pytest.param((1, 4, 6), [8], [2, 1], r"return to images of 4x6, got \[2, 1\].* 2x3\. Type", id="ends-smaller"),
        pytest.param((1, 4, 6), [8], [1, -2], r"return to images of 4x6, .* at 8x12\. Type", id="ends-larger"),
        pytest.param((4,), [8], None, r"events with 3 axes .*ConvField, got .*\(4,\)\.", id="rows"),
    ],
)
def test_wrong_options_are_named(event_shape, hidden, strides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ConvField(event_shape, hidden, ConcatConv, Tanh, strides)
    assert "\n" not in str(caught.value)
