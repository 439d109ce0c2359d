"""Fields of images against the autograd Jacobian: U-Net, parallel scales, encoder-decoder, flattened rows."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from cnf_lab.errors import ConfigError
from cnf_lab.fields import (
    ConcatConv,
    ConvEncoderDecoder,
    ConvField,
    Embedded,
    EmbeddedConv,
    Flattened,
    ParallelMultiscale,
    Silu,
    Softplus,
    Tanh,
    UNet,
    VectorField,
)
from cnf_lab.trace import Bottleneck, Exact, Gaussian, Hutchinson, Rademacher

T = torch.tensor(0.37, dtype=torch.float64)
FIELDS = {
    "unet": partial(UNet, (1, 4, 4), 4, [1, 2], 1, Silu),
    "unet-odd-sides": partial(UNet, (3, 5, 3), 4, [1, 2, 2], 2, Softplus, 8),
    "unet-one-level": partial(UNet, (2, 4, 6), 3, [1], 1, Tanh),
    "parallel": partial(ParallelMultiscale, (1, 4, 4), [3, 2], ConcatConv, Softplus, 2),
    "parallel-padded": partial(ParallelMultiscale, (2, 5, 3), [3], EmbeddedConv, Tanh, 3),
    "encoder-decoder": partial(ConvEncoderDecoder, (2, 4, 4), [3, 2, 3], ConcatConv, Tanh, [1, 2, 1, -2]),
    "encoder-decoder-plain": partial(ConvEncoderDecoder, (1, 5, 3), [3, 1], EmbeddedConv, Softplus),
    "embedded-convolutions": partial(ConvField, (2, 4, 4), [3, 2], EmbeddedConv, Silu),
    "flattened": partial(Flattened, (2, 3, 2), [7, 5], 2, Embedded, Silu),
}


@pytest.fixture(params=FIELDS, name="name")
def each_name(request):
    return request.param


@pytest.fixture(params=[0, 3], ids=["", "context"])
def features(request):
    return request.param


@pytest.fixture
def field(name, features, randomise):
    return randomise(FIELDS[name](context_features=features), 0.3)


@pytest.fixture
def x(field):
    return torch.randn(3, *field.event_shape, dtype=torch.float64)


@pytest.fixture
def context(features):
    return torch.randn(3, features, dtype=torch.float64) if features else None


def jacobians(field, t, x, context):
    size = x[0].numel()
    rows = [
        torch.autograd.functional.jacobian(
            lambda row, k=k: field(
                t if t.dim() == 0 else t[k : k + 1], row[None], None if context is None else context[k : k + 1]
            ).flatten(),
            x[k],
        )
        for k in range(len(x))
    ]
    return torch.stack(rows).reshape(len(x), size, size)


def test_exact_divergence_is_the_trace_of_the_jacobian(field, x, context):
    expected = jacobians(field, T, x, context).diagonal(dim1=1, dim2=2).sum(1)
    value, div = Exact(chunk=5).value_and_divergence(field, T, x, context, None)
    torch.testing.assert_close(value, field(T, x, context))
    torch.testing.assert_close(div, expected)


@pytest.mark.parametrize("times", [T, torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)], ids=["scalar", "per-row"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_products_with_the_jacobian(field, x, context, times, shared):
    tangents = torch.randn(2, 1 if shared else 3, *x.shape[1:], dtype=torch.float64)
    value, products = field.value_and_jvp(times, x, tangents, context)
    torch.testing.assert_close(value, field(times, x, context), rtol=1e-10, atol=1e-10)
    jacobian = jacobians(field, times, x, context)
    expected = torch.einsum("boi,kbi->kbo", jacobian, tangents.expand(2, *x.shape).flatten(2))
    torch.testing.assert_close(products.flatten(2), expected, rtol=1e-9, atol=1e-10)
    _, generic = VectorField.value_and_jvp(field, times, x, tangents, context)
    torch.testing.assert_close(products, generic, rtol=1e-9, atol=1e-10)


def test_gradients_flow_through_the_products(field, x, context):
    def estimate(products):
        return products(T, x, tangents, context)[1].square().sum()

    tangents = torch.randn(1, *x.shape, dtype=torch.float64)
    parameters = list(field.parameters())
    ours = torch.autograd.grad(estimate(field.value_and_jvp), parameters, materialize_grads=True, allow_unused=True)
    generic = partial(VectorField.value_and_jvp, field)
    theirs = torch.autograd.grad(estimate(generic), parameters, materialize_grads=True, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_rows_do_not_see_each_other(field, x, context):
    alone = field(T, x[1:2], None if context is None else context[1:2])
    torch.testing.assert_close(field(T, x, context)[1:2], alone)


def test_low_precision_keeps_shapes(field, x, context):
    x, context = x.float(), None if context is None else context.float()
    with torch.autocast("cpu", torch.bfloat16):
        value, products = field.float().value_and_jvp(T.float(), x, torch.randn(2, *x.shape), context)
    assert value.shape == x.shape
    assert products.shape == (2, *x.shape)


@pytest.mark.parametrize(
    "make",
    [
        partial(UNet, (1, 8, 8), 8, [1, 2], 1, Silu),
        partial(ConvField, (1, 8, 8), [4], EmbeddedConv, Silu, zero_start=True),
        partial(ConvField, (1, 8, 8), [4], ConcatConv, Silu, zero_start=True),
    ],
)
def test_zero_start(make):
    field, x = make(), torch.randn(2, 1, 8, 8)
    assert not field(T.float(), x).any()


@given(height=st.integers(1, 9), width=st.integers(1, 9), levels=st.integers(1, 3), channels=st.sampled_from([1, 3]))
def test_a_u_net_takes_any_size(height, width, levels, channels):
    field = UNet((channels, height, width), 2, [1, 2, 3][:levels], 1, Silu, 4)
    x = torch.randn(2, channels, height, width)
    assert field(torch.tensor([0.1, 0.9]), x).shape == x.shape


@given(height=st.integers(1, 9), width=st.integers(1, 9), scales=st.integers(1, 4))
def test_parallel_scales_take_any_size(height, width, scales):
    field = ParallelMultiscale((1, height, width), [2], ConcatConv, Softplus, scales)
    x = torch.randn(2, 1, height, width)
    assert field(torch.tensor(0.3), x).shape == x.shape


def test_probes_in_the_bottleneck_estimate_the_divergence(randomise):
    field = randomise(FIELDS["encoder-decoder"](), 0.5)
    assert field.bottleneck_shape == (2, 2, 2)
    x = torch.randn(1, *field.event_shape, dtype=torch.float64)
    _, expected = Exact().value_and_divergence(field, T, x, None, None)
    estimator, generator = Bottleneck(Gaussian(), 4000), torch.Generator().manual_seed(0)
    found = estimator.linearise(field, T, x, None, estimator.start(field, x, None, generator))
    error = found.estimates.std() / 4000**0.5
    assert abs(found.div - expected) < 4 * error
    assert (
        found.estimates.var()
        < 4
        * Hutchinson(Rademacher(), 4000)
        .linearise(field, T, x, None, Hutchinson(Rademacher(), 4000).start(field, x, None, generator))
        .estimates.var()
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: UNet((3, 8, 8), 0, [1], 1, Silu), "of at least 1"),
        (lambda: UNet((3, 8, 8), 8, [], 1, Silu), "at least one positive factor"),
        (lambda: UNet((3,), 8, [1], 1, Silu), "events with 3 axes"),
        (lambda: ParallelMultiscale((1, 8, 8), [4], ConcatConv, Tanh, 0), "Expected architecture.scales"),
        (lambda: ParallelMultiscale((1, 8, 8), [], ConcatConv, Tanh), "Expected architecture.hidden"),
        (lambda: ConvEncoderDecoder((1, 7, 7), [3, 3], ConcatConv, Tanh, [2, 1, -2]), "only where height and width"),
        (lambda: Flattened((6,), [4], 1, Embedded, Silu), "events with 3 axes"),
    ],
)
def test_options_out_of_range(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
