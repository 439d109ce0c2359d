"""The sum of perceptrons: values and divergences add, in closed form where every branch has one."""

from functools import partial

import pytest
import torch

from cnf_lab.errors import ConfigError
from cnf_lab.fields import (
    Blend,
    Branches,
    Concat,
    ConcatCoord,
    ConcatSquash,
    ConcatV2,
    Embedded,
    Hyper,
    Ignore,
    Mlp,
    Silu,
    Softplus,
    Squash,
    Swish,
    Tanh,
)
from cnf_lab.flows import ContinuousFlow
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact, Gaussian, Hutchinson, Rademacher

T = torch.tensor(0.37, dtype=torch.float64)
LAYERS = [Ignore, Concat, ConcatCoord, ConcatV2, Squash, ConcatSquash, Blend, Hyper, Embedded]
HIDDEN = {"one": [5], "two": [5, 4], "three": [5, 4, 6]}
FIELDS = {
    **{
        f"{layer.__name__}-{depth}-hidden": partial(Branches, (3,), hidden, 2, layer, Tanh)
        for layer in (ConcatSquash, Hyper)
        for depth, hidden in HIDDEN.items()
    },
    "one-branch": partial(Branches, (3,), [5, 4], 1, ConcatSquash, Swish),
    "three-branches": partial(Branches, (3,), [5, 4], 3, ConcatSquash, Softplus),
    "one-dimensional": partial(Branches, (1,), [5, 4], 2, ConcatSquash, Tanh),
    **{
        f"context-{depth}-hidden": partial(Branches, (3,), hidden, 2, ConcatSquash, Tanh, context_features=2)
        for depth, hidden in HIDDEN.items()
    },
}
SHALLOW = {name: make for name, make in FIELDS.items() if len(make.args[1]) < 3}


def each(makers):
    return pytest.mark.parametrize("make", makers.values(), ids=makers.keys())


@pytest.fixture
def field(make, randomise):
    return randomise(make())


@pytest.fixture(params=[4, 9], ids=["few-rows", "more-rows-than-units"])
def x(request, field):
    return torch.randn(request.param, *field.event_shape, dtype=torch.float64)


@pytest.fixture
def context(make, x):
    features = make.keywords.get("context_features", 0)
    return torch.randn(len(x), features, dtype=torch.float64) if features else None


def jacobian(field, x, context):
    """Return the Jacobian of every row (batch, D, D) by reverse mode."""
    x = x.detach().requires_grad_()
    value = field(T, x, context)
    rows = [torch.autograd.grad(value[:, i].sum(), x, create_graph=True)[0] for i in range(value.shape[1])]
    return torch.stack(rows, dim=1)


def divergence(field, x, context):
    return jacobian(field, x, context).diagonal(dim1=1, dim2=2).sum(dim=1)


@each(FIELDS)
def test_value_is_the_plain_sum_of_the_perceptrons(field, make, x, context):
    total = torch.zeros_like(x)
    for number in range(make.args[2]):
        mlp = Mlp(make.args[0], make.args[1], *make.args[3:], **make.keywords).double()
        prefix = f"branches.{number}."
        states = field.state_dict().items()
        mlp.load_state_dict({key.removeprefix(prefix): value for key, value in states if key.startswith(prefix)})
        total = total + mlp(T, x, context)
    torch.testing.assert_close(field(T, x, context), total, rtol=1e-13, atol=1e-13)


@each(FIELDS)
def test_time_per_example_is_the_scalar_time_of_each_row(field, x, context):
    times = torch.linspace(0, 1, len(x), dtype=torch.float64)
    contexts = [None] * len(x) if context is None else context.split(1)
    rows = [field(t, row, c) for t, row, c in zip(times, x.split(1), contexts, strict=True)]
    torch.testing.assert_close(field(times, x, context), torch.cat(rows), rtol=1e-13, atol=1e-13)


@each(FIELDS)
@pytest.mark.parametrize("shared", [False, True], ids=["own-tangents", "shared-tangents"])
def test_value_and_jvp(field, x, context, shared):
    tangents = torch.randn(2, 1 if shared else len(x), *field.event_shape, dtype=torch.float64)
    value, products = field.value_and_jvp(T, x, tangents, context)
    expected = torch.einsum("bij,kbj->kbi", jacobian(field, x, context), tangents.expand(2, *x.shape))
    torch.testing.assert_close(value, field(T, x, context), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(products, expected, rtol=1e-11, atol=1e-11)


@each(FIELDS)
@pytest.mark.parametrize("options", [{}, {"closed_form": False, "chunk": 2}], ids=["default", "chunks"])
def test_exact_divergence_is_the_trace_of_the_jacobian(field, x, context, options):
    value, div = Exact(**options).value_and_divergence(field, T, x, context, None)
    torch.testing.assert_close(value, field(T, x, context), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(div, divergence(field, x, context), rtol=1e-11, atol=1e-11)


@each(SHALLOW)
def test_closed_form_gives_products_too(field, x, context):
    assert field.has_closed_form
    tangents = torch.randn(2, *x.shape, dtype=torch.float64)
    value, div, products = field.value_and_divergence(T, x, context, tangents)
    torch.testing.assert_close((value, products), field.value_and_jvp(T, x, tangents, context), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(div, divergence(field, x, context), rtol=1e-11, atol=1e-11)
    assert field.value_and_divergence(T, x, context)[2] is None


@each({name: make for name, make in FIELDS.items() if name not in SHALLOW})
def test_deep_branches_have_no_closed_form(field, x, context):
    assert not field.has_closed_form
    with pytest.raises(NotImplementedError, match="Branches has no closed form"):
        field.value_and_divergence(T, x, context)


@each(FIELDS)
def test_gradients_of_the_divergence_agree_between_three_ways(field, x, context):
    weights = torch.randn(len(x), dtype=torch.float64)

    def gradients(div):
        return torch.autograd.grad(div @ weights, list(field.parameters()), materialize_grads=True, allow_unused=True)

    expected = gradients(divergence(field, x, context))
    for estimator in (Exact(), Exact(closed_form=False)):
        _, div = estimator.value_and_divergence(field, T, x, context, None)
        torch.testing.assert_close(gradients(div), expected, rtol=1e-10, atol=1e-10)


@each({name: FIELDS[name] for name in ("three-branches", "ConcatSquash-three-hidden")})
@pytest.mark.parametrize("distribution", [Rademacher(), Gaussian()], ids=["rademacher", "gaussian"])
def test_mean_of_hutchinson_is_the_divergence(field, x, distribution):
    rows = x[:1].expand(20_000, -1)
    estimator = Hutchinson(distribution)
    with torch.no_grad():
        probe = estimator.start(field, rows, None, None)
        estimates = estimator.value_and_divergence(field, T, rows, None, probe)[1]
    standard_error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - divergence(field, x[:1], None)) <= 4 * standard_error


@each({name: FIELDS[name] for name in ("three-branches", "ConcatSquash-three-hidden", "context-two-hidden")})
def test_log_det_of_a_flow_is_that_of_its_jacobian(field, x, context):
    flow = ContinuousFlow(field, RungeKuttaSolver("dopri5", 1e-9, 1e-9), Exact(), end_time=0.5)
    rows = x[:3]
    contexts = [None] * 3 if context is None else context[:3].split(1)
    found = torch.cat([flow.pull_back(row, c).log_det for row, c in zip(rows.split(1), contexts, strict=True)])
    jacobians = [
        torch.autograd.functional.jacobian(lambda y, c=c: flow.pull_back(y[None], c).value[0], row)
        for row, c in zip(rows, contexts, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(jacobians).slogdet().logabsdet, rtol=1e-6, atol=1e-6)


@each(FIELDS)
def test_float32_stays_float32_and_agrees(field, x, context):
    expected = Exact().value_and_divergence(field, T, x, context, None)
    context = None if context is None else context.float()
    found = Exact().value_and_divergence(field.float(), T.float(), x.float(), context, None)
    for part, truth in zip(found, expected, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, truth.float(), rtol=1e-4, atol=1e-4)


def test_branches_start_different():
    first, second = Branches((3,), [5], 2, Concat, Tanh).branches
    assert not first.stack.layers[0].linear.weight.equal(second.stack.layers[0].linear.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(Branches, (3,), [8], 0, Concat, Tanh),
            r"Expected architecture\.branches of at least 1, got 0\. Type architecture\.branches=2\.",
        ),
        (partial(Branches, (3,), [], 2, Concat, Tanh), r"Expected architecture\.hidden .*, got \[\]\."),
        (partial(Branches, (3, 8, 8), [8], 2, Concat, Tanh), r"Expected events with 1 axes .*Branches, got"),
    ],
    ids=["no-branch", "no-hidden", "images"],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_only_blend_is_confined_to_unit_time():
    assert [layer for layer in LAYERS if Branches((3,), [4], 2, layer, Tanh).unit_time] == [Blend]


def test_zero_start_is_the_identity_flow_and_learns():
    for layer in LAYERS:
        field = Branches((3,), [5, 4], 2, layer, Silu, zero_start=True).double()
        x, t = torch.randn(7, 3, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
        value, div, _ = field.value_and_divergence(t, x)
        assert not value.any()
        assert not div.any()
        optimiser = torch.optim.Adam(field.parameters(), lr=0.1)
        for _ in range(2):
            optimiser.zero_grad()
            (field(t, x) - x).square().sum().backward()
            optimiser.step()
        assert all(parameter.grad is not None for parameter in field.parameters())
        assert field(t, x).any()


def test_a_zero_start_excludes_spectral_norms():
    with pytest.raises(ConfigError, match=r"architecture\.zero_start=false"):
        Mlp((3,), [5], Concat, Tanh, spectral_norm=True, zero_start=True)
