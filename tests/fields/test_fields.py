"""The contract of vector fields: values, products with the Jacobian, and divergences."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from cnf_lab.errors import ConfigError
from cnf_lab.fields import (
    Blend,
    Concat,
    ConcatCoord,
    ConcatSquash,
    ConcatV2,
    Elu,
    Embedded,
    EncoderDecoder,
    Hyper,
    Ignore,
    Mlp,
    Residual,
    Silu,
    Softplus,
    Square,
    Squash,
    Swish,
    Tanh,
)
from cnf_lab.fields.spectral import iterate_spectral_norms
from cnf_lab.trace import Exact

T = torch.tensor(0.37, dtype=torch.float64)
LAYERS = [Ignore, Concat, ConcatCoord, ConcatV2, Squash, ConcatSquash, Blend, Hyper, Embedded]
HIDDEN = {"one": [5], "two": [5, 4], "three": [5, 4, 6]}

SHALLOW = {  # with a closed form of the divergence
    **{
        f"{layer.__name__}-{depth}-hidden": partial(Mlp, (3,), HIDDEN[depth], layer, Tanh)
        for layer in LAYERS
        for depth in ("one", "two")
    },
    **{
        activation.__name__: partial(Mlp, (3,), [5, 4], ConcatSquash, activation)
        for activation in (Softplus, Silu, Elu, Swish, Square)
    },
    "one-dimensional": partial(Mlp, (1,), [5, 4], ConcatSquash, Tanh),
    "minus-x-one-hidden": partial(Mlp, (3,), [5], ConcatSquash, Tanh, subtract_identity=True),
    "minus-x-two-hidden": partial(Mlp, (3,), [5, 4], Concat, Tanh, subtract_identity=True),
    "context-one-hidden": partial(Mlp, (3,), [5], ConcatSquash, Softplus, context_features=2),
    "context-two-hidden": partial(Mlp, (3,), [5, 4], ConcatSquash, Softplus, context_features=2),
    "context-ungated": partial(Mlp, (3,), [5, 4], Concat, Softplus, context_features=2),
    "spectral-norm": partial(Mlp, (3,), [5, 4], ConcatSquash, Tanh, spectral_norm=True),
}
DEEP = {
    **{f"{layer.__name__}-three-hidden": partial(Mlp, (3,), [5, 4, 6], layer, Tanh) for layer in LAYERS},
    "minus-x-three-hidden": partial(Mlp, (3,), [5, 4, 6], Concat, Tanh, subtract_identity=True),
    "context-three-hidden": partial(Mlp, (3,), [5, 4, 6], ConcatSquash, Tanh, context_features=2),
    **{f"EncoderDecoder-{layer.__name__}": partial(EncoderDecoder, (3,), [5, 2, 4], layer, Tanh) for layer in LAYERS},
    "EncoderDecoder-context": partial(EncoderDecoder, (3,), [5, 2], Concat, Tanh, context_features=2),
    "EncoderDecoder-spectral-norm": partial(EncoderDecoder, (3,), [5, 2], Concat, Tanh, spectral_norm=True),
    "Residual": partial(Residual, (3,), 6, 2, Swish, 3),
    "Residual-context": partial(Residual, (3,), 6, 2, Tanh, 3, context_features=2),
}
FIELDS = SHALLOW | DEEP


def each(makers):
    return pytest.mark.parametrize("make", makers.values(), ids=makers.keys())


@pytest.fixture
def field(make, randomise):
    field = randomise(make())
    iterate_spectral_norms(field, 100)
    return field


@pytest.fixture
def x(field):
    return torch.randn(4, *field.event_shape, dtype=torch.float64)


@pytest.fixture
def context(make):
    features = make.keywords.get("context_features", 0)
    return torch.randn(4, features, dtype=torch.float64) if features else None


def jacobian(field, x, context):
    """Return the Jacobian of every row (batch, D, D) by reverse mode."""
    x = x.detach().requires_grad_()
    value = field(T, x, context)
    rows = [torch.autograd.grad(value[:, i].sum(), x, create_graph=True)[0] for i in range(value.shape[1])]
    return torch.stack(rows, dim=1)


def divergence(field, x, context):
    return jacobian(field, x, context).diagonal(dim1=1, dim2=2).sum(dim=1)


@each(FIELDS)
def test_rows_do_not_see_each_other(field, x, context):
    value = field(T, x, context)
    assert value.shape == x.shape
    for row in range(len(x)):
        one = slice(row, row + 1)
        alone = field(T, x[one], None if context is None else context[one])
        torch.testing.assert_close(value[one], alone, rtol=1e-13, atol=1e-13)


@each(FIELDS)
def test_time_per_example_is_the_scalar_time_of_each_row(field, x, context):
    times = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    contexts = [None] * 4 if context is None else context.split(1)
    rows = [field(t, row, c) for t, row, c in zip(times, x.split(1), contexts, strict=True)]
    torch.testing.assert_close(field(times, x, context), torch.cat(rows), rtol=1e-13, atol=1e-13)


@each(FIELDS)
@pytest.mark.parametrize("rows", [4, 1], ids=["own-tangents", "shared-tangents"])
def test_value_and_jvp(field, x, context, rows):
    tangents = torch.randn(3, rows, *field.event_shape, dtype=torch.float64)
    value, products = field.value_and_jvp(T, x, tangents, context)
    expected = torch.einsum("bij,kbj->kbi", jacobian(field, x, context), tangents.expand(3, *x.shape))
    torch.testing.assert_close(value, field(T, x, context), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(products, expected, rtol=1e-11, atol=1e-11)


@each({key: FIELDS[key] for key in FIELDS if not key.startswith(("EncoderDecoder", "Residual"))})
def test_value_and_jvp_by_hand_is_forward_mode(field, x, context):
    tangent = torch.randn_like(x)
    value, (product,) = field.value_and_jvp(T, x, tangent[None], context)
    expected = torch.func.jvp(lambda y: field(T, y, context), (x,), (tangent,))
    torch.testing.assert_close((value, product), expected, rtol=1e-12, atol=1e-12)


@each(FIELDS)
def test_exact_divergence_is_the_trace_of_the_jacobian(field, x, context):
    value, div = Exact().value_and_divergence(field, T, x, context, None)
    torch.testing.assert_close(value, field(T, x, context), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(div, divergence(field, x, context), rtol=1e-11, atol=1e-11)


@each(FIELDS)
def test_gradients_of_the_divergence_agree_between_three_ways(field, x, context):
    weights = torch.randn(4, dtype=torch.float64)

    def gradients(div):
        return torch.autograd.grad(div @ weights, list(field.parameters()), materialize_grads=True, allow_unused=True)

    expected = gradients(divergence(field, x, context))
    for estimator in (Exact(), Exact(closed_form=False)):
        _, div = estimator.value_and_divergence(field, T, x, context, None)
        torch.testing.assert_close(gradients(div), expected, rtol=1e-10, atol=1e-10)


@given(
    features=st.integers(1, 5),
    hidden=st.lists(st.integers(1, 6), min_size=1, max_size=2),
    layer=st.sampled_from(LAYERS),
    seed=st.integers(0, 99),
)
def test_closed_form_of_any_size(randomise, features, hidden, layer, seed):
    torch.manual_seed(seed)
    field = randomise(Mlp((features,), hidden, layer, Softplus))
    x = torch.randn(3, features, dtype=torch.float64)
    _, div, _ = field.value_and_divergence(T, x)
    torch.testing.assert_close(div, divergence(field, x, None), rtol=1e-11, atol=1e-11)


@each(SHALLOW)
def test_shallow_fields_have_a_closed_form(field):
    assert field.has_closed_form


@each(DEEP)
def test_deep_fields_have_none(field, x, context):
    assert not field.has_closed_form
    with pytest.raises(NotImplementedError, match="no closed form"):
        field.value_and_divergence(T, x, context)


@each(FIELDS)
def test_float32_stays_float32_and_agrees(field, x, context):
    expected = field(T, x, context)
    field, t, x = field.float(), T.float(), x.float()
    context = None if context is None else context.float()
    value, div = Exact().value_and_divergence(field, t, x, context, None)
    assert value.dtype == div.dtype == torch.float32
    torch.testing.assert_close(value, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "hidden", "layer", "activation"),
    [
        pytest.param("concat_tanh", [6, 5, 6], Concat, Tanh, id="concat-tanh"),
        pytest.param("concatsquash_softplus", [8, 7], ConcatSquash, Softplus, id="concatsquash-softplus"),
        pytest.param("blend_tanh", [9], Blend, Tanh, id="blend-tanh"),
    ],
)
@pytest.mark.parametrize("closed_form", [True, False], ids=["closed-form", "forward-mode"])
def test_agrees_with_the_original(name, hidden, layer, activation, closed_form, reference, load_original):
    case = reference(f"field_{name}")
    field = Mlp((3,), hidden, layer, activation)
    load_original(field.stack, case)
    estimator = Exact(closed_form=closed_form)
    value, div = estimator.value_and_divergence(field, case["t"], case["x"], None, None)
    units = torch.eye(3, dtype=torch.float64)[:, None]
    _, columns = field.value_and_jvp(case["t"], case["x"], units)
    torch.testing.assert_close(value, case["dxdt"], rtol=0, atol=1e-10)
    torch.testing.assert_close(div, case["divergence"], rtol=0, atol=1e-10)
    torch.testing.assert_close(columns.permute(1, 2, 0), case["jacobian"], rtol=0, atol=1e-10)


def test_subtract_identity_lowers_the_divergence_by_d(randomise):
    plain = randomise(Mlp((3,), [5, 4], Concat, Tanh))
    shifted = Mlp((3,), [5, 4], Concat, Tanh, subtract_identity=True).double()
    shifted.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, dtype=torch.float64)
    value, div, _ = plain.value_and_divergence(T, x)
    torch.testing.assert_close(shifted.value_and_divergence(T, x)[:2], (value - x, div - 3), rtol=1e-14, atol=1e-14)


def test_context_of_zeros_changes_nothing(randomise):
    conditional = randomise(Mlp((3,), [5, 4], ConcatSquash, Tanh, context_features=2))
    plain = Mlp((3,), [5, 4], ConcatSquash, Tanh).double()
    plain.load_state_dict(conditional.state_dict(), strict=False)
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(conditional(T, x, x.new_zeros(4, 2)), plain(T, x), rtol=1e-14, atol=1e-14)


def test_context_reaches_every_hidden_layer(randomise):
    field = randomise(Mlp((3,), [5, 4], ConcatSquash, Tanh, context_features=2))
    x, context = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    field(T, x, context).sum().backward()
    assert all(modulation.weight.grad.abs().min() > 0 for modulation in field.stack.modulations)


@pytest.mark.parametrize(("hidden", "bottleneck"), [([5], 5), ([5, 4], 4), ([5, 2, 4], 2), ([6, 5, 2, 4], 2)])
def test_encoder_decoder_is_an_mlp_cut_at_the_bottleneck(hidden, bottleneck, randomise):
    field = randomise(EncoderDecoder((3,), hidden, Concat, Tanh))
    mlp = Mlp((3,), hidden, Concat, Tanh).double()
    mlp.stack.layers = torch.nn.ModuleList([*field.encoder.layers, *field.decoder.layers])
    x = torch.randn(4, 3, dtype=torch.float64)
    encoded = field.encode(T, x)
    assert encoded.shape[1:] == field.bottleneck_shape == (bottleneck,)
    torch.testing.assert_close(field.decode(T, encoded), mlp(T, x), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(field(T, x), mlp(T, x), rtol=1e-14, atol=1e-14)


def test_residual_field_starts_at_zero():
    x = torch.randn(4, 3)
    assert not Residual((3,), 6, 2, Tanh)(torch.tensor(0.5), x).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Mlp, (3,), [], Concat, Tanh), r"Expected architecture\.hidden .*, got \[\]\. Type"),
        (partial(Mlp, (3,), [8, 0], Concat, Tanh), r"Expected architecture\.hidden .*, got \[8, 0\]\. Type"),
        (
            partial(EncoderDecoder, (3,), [], Concat, Tanh),
            r"Expected architecture\.hidden .*, got \[\]\. Type",
        ),
        (partial(Residual, (3,), 0, 2, Tanh), r"Expected architecture\.width.*, got 0, 2, 64\. Type"),
        (
            partial(Mlp, (3, 8, 8), [8], Concat, Tanh),
            r"Expected events with 1 axes .*Mlp, got .*\(3, 8, 8\)\.",
        ),
        (
            partial(EncoderDecoder, (), [8], Concat, Tanh),
            r"Expected events with 1 axes .*EncoderDecoder, got",
        ),
        (partial(Residual, (3, 8, 8), 8, 1, Tanh), r"Expected events with 1 axes .*Residual, got"),
    ],
    ids=["no-hidden", "width-0", "no-encoder", "no-width", "images", "scalars", "images-in-residual"],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
