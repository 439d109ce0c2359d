"""Fields with amortised parts: the original's numbers, divergences, and gradients back to the amortiser."""

from functools import partial
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from cnf_lab.errors import ConfigError
from cnf_lab.fields import (
    AmortisedBias,
    AmortisedGates,
    AmortisedLastLayer,
    AmortisedLayers,
    AmortisedLowRank,
    Blend,
    Concat,
    ConcatCoord,
    ConcatSquash,
    ConcatV2,
    Hyper,
    Ignore,
    Mlp,
    Softplus,
    Squash,
    Tanh,
    VectorField,
)
from cnf_lab.fields.layers import AffineMap
from cnf_lab.fields.mlp import closed_form_divergence
from cnf_lab.flows import ContinuousFlow
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact, Gaussian, Hutchinson, Rademacher

T = torch.tensor(0.37, dtype=torch.float64)
LAYERS = [Ignore, Concat, ConcatCoord, ConcatV2, Squash, ConcatSquash, Blend, Hyper]
HIDDEN = {"one": [5], "two": [5, 4], "three": [5, 4, 6]}

LOW_RANK = {
    f"low-rank-{layer.__name__}-{depth}-hidden": partial(AmortisedLowRank, (3,), hidden, layer, Tanh, 2)
    for layer in LAYERS
    for depth, hidden in HIDDEN.items()
} | {"low-rank-1": partial(AmortisedLowRank, (3,), [5], ConcatSquash, Softplus, 1)}
BIAS = {
    f"bias-{layer.__name__}-{depth}-hidden": partial(AmortisedBias, (3,), hidden, layer, Tanh)
    for layer in LAYERS
    for depth, hidden in HIDDEN.items()
}
OTHERS = {
    f"{kind.__name__}-{layer.__name__}-{depth}-hidden": partial(kind, (3,), hidden, layer, Tanh)
    for kind in (AmortisedGates, AmortisedLastLayer)
    for layer in LAYERS
    for depth, hidden in HIDDEN.items()
} | {f"layers-{depth}-hidden": partial(AmortisedLayers, (3,), hidden, Tanh) for depth, hidden in HIDDEN.items()}
FIELDS = LOW_RANK | BIAS | OTHERS
#: Those of two layers, for what does not depend on the kind of layer.
FEW = {name: make for name, make in FIELDS.items() if make.args[2] in (ConcatSquash, Hyper, Tanh)}
DEEPEST = {AmortisedBias: 2, AmortisedGates: 2}
CLOSED = {name: make for name, make in FIELDS.items() if len(make.args[1]) <= DEEPEST.get(make.func, 1)}


def each(makers):
    return pytest.mark.parametrize("make", makers.values(), ids=makers.keys())


@pytest.fixture
def field(make, randomise):
    return randomise(make())


@pytest.fixture
def x():
    return torch.randn(4, 3, dtype=torch.float64)


@pytest.fixture
def context(field):
    return amortised(field, 4)


def amortised(field, rows):
    return 0.5 * torch.randn(rows, field.amortised_features, dtype=torch.float64)


def jacobian(field, x, context):
    """Return the Jacobian of every row (batch, D, D) by reverse mode."""
    x = x.detach().requires_grad_()
    value = field(T, x, context)
    rows = [torch.autograd.grad(value[:, i].sum(), x, create_graph=True)[0] for i in range(value.shape[1])]
    return torch.stack(rows, dim=1)


def divergence(field, x, context):
    return jacobian(field, x, context).diagonal(dim1=1, dim2=2).sum(dim=1)


def gated_by_the_formula(field, t, row, values):
    """Return the field with gates at one row (D,), its amortised values read off one by one."""
    layers, values = field.stack.layers, list(values)
    for number, layer in enumerate(layers, start=1):
        out = layer.out_features
        last = number == len(layers)
        gate = torch.stack(values[:out]) if not last else torch.zeros(out).double()
        values = values[0 if last else out :]
        shift, values = torch.stack(values[:out]), values[out:]
        row = (1 + gate) * layer(t, row[None])[0] + shift
        row = row if last else torch.tanh(row)
    assert not values
    return row


def owned_by_the_formula(field, hidden, number, t, row, values):
    """Return the field whose last layers are each row's own at one row (D,)."""
    shared, values = list(field.stack.layers), list(values)
    sizes = [3, *hidden, 3]
    for index, (n_in, n_out) in enumerate(pairwise(sizes)):
        if index < len(sizes) - 1 - number:
            row = shared[index](t, row[None])[0]
        else:
            bias, values = torch.stack(values[:n_out]), values[n_out:]
            weight, values = torch.stack(values[: n_out * (n_in + 1)]), values[n_out * (n_in + 1) :]
            row = weight.reshape(n_out, n_in + 1) @ torch.cat([t[None], row]) + bias
        row = torch.tanh(row) if index < len(sizes) - 2 else row
    assert not values
    return row


def by_the_formula(field, rank, t, row, values):
    """Return the field at one row (D,), its amortised values read off one by one."""
    layers, values = field.stack.layers, list(values)
    for number, layer in enumerate(layers, start=1):
        n_in, n_out = layer.in_features, layer.out_features
        parts = []
        for shape in ((n_in, rank), (rank, n_out), (n_out,)):
            size = torch.Size(shape).numel()
            parts.append(torch.stack(values[:size]).reshape(shape) if size else torch.zeros(shape).double())
            values = values[size:]
        u, v, bias = parts
        row = layer(t, row[None])[0] + (row @ u) @ v + bias
        row = row if number == len(layers) else torch.tanh(row)
    assert not values
    return row


@pytest.mark.parametrize("estimator", [Exact(), Exact(closed_form=False, chunk=3)], ids=["one-pass", "chunks"])
def test_agrees_with_the_original(estimator, reference, load_original):
    case = reference("field_amortised_low_rank")
    field = AmortisedLowRank((4,), [7, 6], Concat, Softplus, int(case["rank"]), case["amortised"].shape[1])
    load_original(field.stack, case)
    value, div = estimator.value_and_divergence(field, case["t"], case["x"], case["amortised"], None)
    torch.testing.assert_close(value, case["dxdt"], rtol=0, atol=1e-10)
    torch.testing.assert_close(div, case["divergence"], rtol=0, atol=1e-10)


@each({name: make for name, make in FIELDS.items() if name != "low-rank-1"})
def test_rows_follow_the_formula_with_their_own_values(field, make, x, context):
    hidden = make.args[1]
    formula = {
        AmortisedLowRank: partial(by_the_formula, field, 2),
        AmortisedBias: partial(by_the_formula, field, 0),
        AmortisedGates: partial(gated_by_the_formula, field),
        AmortisedLastLayer: partial(owned_by_the_formula, field, hidden, 1),
        AmortisedLayers: partial(owned_by_the_formula, field, hidden, len(hidden) + 1),
    }[make.func]
    expected = [formula(T, row, own) for row, own in zip(x, context, strict=True)]
    torch.testing.assert_close(field(T, x, context), torch.stack(expected), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", [AmortisedLastLayer, AmortisedLayers])
def test_no_activation_follows_the_last_layer(kind):
    """In the original's hypernetwork one does, and softplus makes every component of the field positive."""
    layers = (Concat,) if kind is AmortisedLastLayer else ()
    field = kind((3,), [5], *layers, Softplus).double()
    x = torch.randn(200, 3, dtype=torch.float64)
    value = field(T, x, amortised(field, 200))
    assert value.min() < -0.5
    shift = torch.zeros(field.amortised_features, dtype=torch.float64)
    with_bias = amortised(field, 200)
    # The bias of the last layer moves the field by as much.
    start = field.amortised_features - 3 - 3 * 6
    shift[start : start + 3] = -7.0
    torch.testing.assert_close(field(T, x, with_bias + shift), field(T, x, with_bias) - 7.0, rtol=1e-12, atol=1e-12)


def test_gates_start_as_the_identity_flow():
    field = AmortisedGates((3,), [8, 8], ConcatSquash, Softplus, zero_start=True)
    assert field.amortised_features == 2 * 16 + 3
    x = torch.randn(4, 3)
    assert not field(T.float(), x, torch.zeros(4, field.amortised_features)).any()


@each(FEW)
def test_time_per_example_is_the_scalar_time_of_each_row(field, x, context):
    times = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    rows = [field(t, row, own) for t, row, own in zip(times, x.split(1), context.split(1), strict=True)]
    torch.testing.assert_close(field(times, x, context), torch.cat(rows), rtol=1e-13, atol=1e-13)


@each(FEW)
@pytest.mark.parametrize("rows", [4, 1], ids=["own-tangents", "shared-tangents"])
def test_value_and_jvp(field, x, context, rows):
    tangents = torch.randn(3, rows, 3, dtype=torch.float64)
    value, products = field.value_and_jvp(T, x, tangents, context)
    expected = torch.einsum("bij,kbj->kbi", jacobian(field, x, context), tangents.expand(3, 4, 3))
    torch.testing.assert_close(value, field(T, x, context), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(products, expected, rtol=1e-11, atol=1e-11)


@each(FIELDS)
def test_exact_divergence_is_the_trace_of_the_jacobian(field, x, context):
    value, div = Exact().value_and_divergence(field, T, x, context, None)
    torch.testing.assert_close(value, field(T, x, context), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(div, divergence(field, x, context), rtol=1e-11, atol=1e-11)


@each(FEW)
@pytest.mark.parametrize("rows", [4, 9], ids=["few-rows", "more-rows-than-units"])
@pytest.mark.parametrize("options", [{}, {"closed_form": False, "chunk": 2}], ids=["default", "chunks"])
def test_exact_divergence_for_any_rows_and_chunks(field, rows, options):
    x, context = torch.randn(rows, 3, dtype=torch.float64), amortised(field, rows)
    value, div = Exact(**options).value_and_divergence(field, T, x, context, None)
    torch.testing.assert_close(value, field(T, x, context), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(div, divergence(field, x, context), rtol=1e-11, atol=1e-11)


@each(FIELDS)
def test_gradients_of_the_divergence_agree_between_three_ways(field, x, context):
    weights = torch.randn(4, dtype=torch.float64)
    inputs = [context.requires_grad_(), *field.parameters()]

    def gradients(div):
        return torch.autograd.grad(div @ weights, inputs, materialize_grads=True, allow_unused=True)

    expected = gradients(divergence(field, x, context))
    assert expected[0].any()
    for estimator in (Exact(), Exact(closed_form=False)):
        _, div = estimator.value_and_divergence(field, T, x, context, None)
        torch.testing.assert_close(gradients(div), expected, rtol=1e-10, atol=1e-10)


@each(CLOSED)
def test_closed_form_gives_products_too(field, x, context):
    tangents = torch.randn(2, 4, 3, dtype=torch.float64)
    value, div, products = field.value_and_divergence(T, x, context, tangents)
    torch.testing.assert_close((value, products), field.value_and_jvp(T, x, tangents, context), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(div, field.value_and_divergence(T, x, context)[1], rtol=0, atol=0)


@each(FEW)
def test_only_shallow_fields_have_a_closed_form(field, make, x, context):
    assert field.has_closed_form == (make in CLOSED.values())
    if not field.has_closed_form:
        with pytest.raises(NotImplementedError, match="no closed form"):
            field.value_and_divergence(T, x, context)


@given(
    features=st.integers(1, 5),
    hidden=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    layer=st.sampled_from(LAYERS),
    rank=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_any_size_and_rank(randomise, features, hidden, layer, rank, seed):
    torch.manual_seed(seed)
    field = randomise(AmortisedLowRank((features,), hidden, layer, Softplus, rank))
    x, context = torch.randn(3, features, dtype=torch.float64), amortised(field, 3)
    sizes = [features, *hidden, features]
    pairs = list(pairwise(sizes))
    assert context.shape[1] == rank * sum(i + o for i, o in pairs) + sum(o for _, o in pairs)
    _, div = Exact().value_and_divergence(field, T, x, context, None)
    torch.testing.assert_close(div, divergence(field, x, context), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "make", [LOW_RANK["low-rank-ConcatSquash-two-hidden"], BIAS["bias-ConcatSquash-two-hidden"]], ids=["rank", "bias"]
)
@pytest.mark.parametrize("distribution", [Rademacher(), Gaussian()], ids=["rademacher", "gaussian"])
def test_mean_of_hutchinson_is_the_divergence(field, x, context, distribution):
    rows, own = x[:1].expand(20_000, -1), context[:1].expand(20_000, -1)
    estimator = Hutchinson(distribution)
    with torch.no_grad():
        probe = estimator.start(field, rows, own, None)
        estimates = estimator.value_and_divergence(field, T, rows, own, probe)[1]
    standard_error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - divergence(field, x[:1], context[:1])) <= 4 * standard_error


@each({name: make for name, make in FEW.items() if make.func in (AmortisedLowRank, AmortisedBias, AmortisedGates)})
def test_without_amortised_parts_it_is_an_mlp(field, make, x):
    mlp = Mlp((3,), *make.args[1:4]).double()
    mlp.load_state_dict(field.state_dict())
    context = x.new_zeros(4, field.amortised_features)
    torch.testing.assert_close(field(T, x, context), mlp(T, x), rtol=1e-14, atol=1e-14)


@each(FEW)
def test_float32_stays_float32_and_agrees(field, x, context):
    expected = Exact().value_and_divergence(field, T, x, context, None)
    found = Exact().value_and_divergence(field.float(), T.float(), x.float(), context.float(), None)
    for part, truth in zip(found, expected, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, truth.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", [(), (0,), (1,), (0, 1)], ids=["none", "first", "last", "both"])
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
def test_closed_form_with_low_rank_parts_of_some_layers(own, gated):
    def low_rank(n_in, n_out):
        return torch.randn(4, n_in, 2, dtype=torch.float64), torch.randn(4, 2, n_out, dtype=torch.float64)

    maps = [
        AffineMap(
            torch.randn(n_out, n_in, dtype=torch.float64),
            torch.rand(4, n_out, dtype=torch.float64) if gated and index == 0 else None,
            torch.randn(n_out, dtype=torch.float64),
            low_rank(n_in, n_out) if index in own else None,
        )
        for index, (n_in, n_out) in enumerate([(3, 5), (5, 3)])
    ]
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    hidden = torch.tanh(maps[0](x))
    value = maps[1](hidden)
    expected = sum(torch.autograd.grad(value[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(3))
    div = closed_form_divergence(maps, [1 - hidden.square()])
    torch.testing.assert_close(div, expected, rtol=1e-12, atol=1e-12)


class Counted(VectorField):
    """Counts the evaluations of another field."""

    def __init__(self, field):
        super().__init__(field.event_shape)
        self.field, self.calls = field, 0

    has_closed_form = property(lambda self: self.field.has_closed_form)

    def _count(self, name, *arguments):
        self.calls += 1
        return getattr(self.field, name)(*arguments)

    def forward(self, *arguments):
        return self._count("forward", *arguments)

    def value_and_divergence(self, *arguments):
        return self._count("value_and_divergence", *arguments)

    def value_and_partial_divergence(self, *arguments):
        return self._count("value_and_partial_divergence", *arguments)

    def value_and_jvp(self, *arguments):
        return self._count("value_and_jvp", *arguments)


IN_FLOWS = {
    "closed-form": partial(AmortisedLowRank, (3,), [5], ConcatSquash, Tanh, 2),
    "tangents": partial(AmortisedLowRank, (3,), [5, 4], ConcatSquash, Tanh, 2),
    "bias": partial(AmortisedBias, (3,), [5, 4], ConcatSquash, Tanh),
    "gates": partial(AmortisedGates, (3,), [5, 4], ConcatSquash, Tanh),
    "last-layer": partial(AmortisedLastLayer, (3,), [5, 4], ConcatSquash, Tanh),
    "layers": partial(AmortisedLayers, (3,), [5], Tanh),
}
# The chunk is given, because finding it would evaluate the field outside of the solve.
each_trace = pytest.mark.parametrize("trace", [Exact(chunk=3), Hutchinson(Rademacher())], ids=["exact", "hutchinson"])


@pytest.fixture
def amortiser(field, randomise):
    return randomise(nn.Linear(3, field.amortised_features), 0.3)


@each(IN_FLOWS)
@each_trace
def test_gradients_of_the_amortiser_agree_between_all_ways_to_differentiate(field, amortiser, x, trace):
    encoded = torch.randn(4, 3, dtype=torch.float64)
    parameters = [*amortiser.parameters(), *field.parameters()]

    def loss(gradient):
        solver = RungeKuttaSolver("dopri5", 1e-9, 1e-9, gradient=gradient)
        flow = ContinuousFlow(field, solver, trace, amortiser=amortiser)
        mapped = flow.pull_back(x, encoded, torch.Generator().manual_seed(7))
        return mapped.value.square().sum() - mapped.log_det.sum()

    direct, checkpoint, adjoint = (
        torch.autograd.grad(loss(gradient), parameters) for gradient in ("direct", "checkpoint", "adjoint")
    )
    torch.testing.assert_close(checkpoint, direct, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(adjoint, direct, rtol=1e-6, atol=1e-6)

    directions = [torch.randn_like(parameter) for parameter in parameters]
    expected = sum((slope * direction).sum() for slope, direction in zip(direct, directions, strict=True))
    ends = []
    for step in (1e-4, -2e-4):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
            ends.append(loss("direct"))
    assert float(expected) == pytest.approx(float((ends[0] - ends[1]) / 2e-4), rel=1e-5)


@each(IN_FLOWS)
@each_trace
@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
def test_nfe_is_the_number_of_evaluations(field, amortiser, x, trace, gradient):
    counted = Counted(field)
    solver = RungeKuttaSolver("dopri5", 1e-6, 1e-6, gradient=gradient)
    flow = ContinuousFlow(counted, solver, trace, amortiser=amortiser)
    mapped = flow.pull_back(x, torch.randn(4, 3, dtype=torch.float64))
    (stats,) = mapped.solves
    forward = counted.calls
    assert stats.nfe_forward == forward > 0
    assert stats.nfe_backward == 0
    (mapped.value.square().sum() - mapped.log_det.sum()).backward()
    assert stats.nfe_forward == forward
    assert stats.nfe_backward == counted.calls - forward
    assert (stats.nfe_backward > 0) == (gradient != "direct")


@each(IN_FLOWS)
def test_flow_and_its_inverse_have_opposite_log_dets(field, amortiser, x):
    flow = ContinuousFlow(field, RungeKuttaSolver("dopri5", 1e-9, 1e-9), Exact(), amortiser=amortiser)
    encoded = torch.randn(4, 3, dtype=torch.float64)
    pulled = flow.pull_back(x, encoded)
    pushed = flow.push_forward(pulled.value, encoded)
    torch.testing.assert_close(pushed.value, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(pushed.log_det, -pulled.log_det, rtol=1e-7, atol=1e-7)
    jacobians = [
        torch.autograd.functional.jacobian(lambda y, c=c: flow.pull_back(y[None], c[None]).value[0], row)
        for row, c in zip(x, encoded, strict=True)
    ]
    torch.testing.assert_close(pulled.log_det, torch.stack(jacobians).slogdet().logabsdet, rtol=1e-6, atol=1e-6)


@each(IN_FLOWS)
@pytest.mark.parametrize("options", [{}, {"closed_form": False}], ids=["default", "tangents"])
@torch.no_grad()
def test_low_precision_changes_little(make, options):
    field, estimator = make(), Exact(**options)
    x, context = torch.randn(50, 3), 0.5 * torch.randn(50, make().amortised_features)
    full = estimator.value_and_divergence(field, T.float(), x, context, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = estimator.value_and_divergence(field, T.float(), x, context, None)
    for part, truth in zip(low, full, strict=True):
        # bfloat16 has 8 bits, a relative error of 0.4 % per operation.
        torch.testing.assert_close(part.float(), truth, rtol=0, atol=0.03 * float(truth.abs().max()))
        assert not part.equal(truth)


WRONG_SIZE = r"Expected a context of 17 amortised values per row .*, got {}\. .*amortiser with that many outputs"


@pytest.mark.parametrize("features", [16, 18])
def test_size_of_the_context_is_checked_beforehand(features):
    AmortisedBias((3,), [8, 6], Concat, Tanh, context_features=17)
    with pytest.raises(ConfigError, match=WRONG_SIZE.format(features)):
        AmortisedBias((3,), [8, 6], Concat, Tanh, context_features=features)


@pytest.mark.parametrize("features", [None, 1, 18])
def test_size_of_the_context_is_checked_when_it_comes(features):
    field = AmortisedBias((3,), [8, 6], Concat, Tanh)
    context = None if features is None else torch.zeros(4, features)
    with pytest.raises(ConfigError, match=WRONG_SIZE.format(features or 0)):
        field(torch.tensor(0.5), torch.zeros(4, 3), context)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(AmortisedLowRank, (3,), [8], Concat, Tanh, 0), r"Expected architecture\.rank of at least 1, got 0\."),
        (partial(AmortisedLowRank, (3,), [], Concat, Tanh, 1), r"Expected architecture\.hidden .*, got \[\]\."),
        (partial(AmortisedBias, (3,), [8, 0], Concat, Tanh), r"Expected architecture\.hidden .*, got \[8, 0\]\."),
        (partial(AmortisedBias, (3, 8, 8), [8], Concat, Tanh), r"Expected events with 1 axes .*AmortisedBias, got"),
    ],
    ids=["rank-0", "no-hidden", "width-0", "images"],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_only_blend_is_confined_to_unit_time():
    for kind in (AmortisedBias, partial(AmortisedLowRank, rank=1)):
        assert [layer for layer in LAYERS if kind((3,), [4], layer, Tanh).unit_time] == [Blend]
