"""Further derivatives of fields against autograd, entry by entry."""

import pytest
import torch
from torch import Tensor

from cnf_lab.errors import ConfigError
from cnf_lab.fields import (
    Blend,
    Concat,
    ConcatConv,
    ConcatSquash,
    ConvField,
    EncoderDecoder,
    Hyper,
    Mlp,
    Residual,
    Softplus,
    Swish,
    Tanh,
    VectorField,
)
from cnf_lab.trace import Bottleneck, Exact, Gaussian, Hutchinson, Needs, Rademacher, extended

ALL = Needs.JACOBIAN | Needs.PULLED_VALUE | Needs.ACCELERATION | Needs.SQUARED_NORM
BESIDE = Needs.PULLED_VALUE | Needs.ACCELERATION
T = torch.tensor(0.3, dtype=torch.float64)


class Reversed(Residual):
    """A field without forward mode."""

    forward_mode = False


FIELDS = {
    "closed-form": lambda: Mlp((3,), [6, 5], ConcatSquash, Softplus),
    "one-hidden": lambda: Mlp((3,), [6], Hyper, Tanh, subtract_identity=True),
    "spectral": lambda: Mlp((3,), [6, 5], Concat, Tanh, spectral_norm=True),
    "deep": lambda: Mlp((3,), [6, 5, 6], Blend, Swish),
    "conditional": lambda: Mlp((3,), [6, 5], ConcatSquash, Tanh, context_features=2),
    "residual": lambda: Residual((3,), 6, 2, Softplus),
    "images": lambda: ConvField((1, 2, 3), [3], ConcatConv, Softplus),
}


def by_autograd(field: VectorField, t: Tensor, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The Jacobian (batch, D, D), J^T f and the acceleration, from one gradient per output."""
    t, x = t.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    value = field(t, x, context).flatten(1)
    rows, changes = [], torch.zeros_like(value)
    for i in range(value.shape[1]):
        (row,) = torch.autograd.grad(value[:, i].sum(), x, retain_graph=True)
        rows.append(row.flatten(1))
        for b in range(len(x)):
            (changes[b, i],) = torch.autograd.grad(value[b, i], t, retain_graph=True)
    jacobian = torch.stack(rows, dim=1).detach()
    value = value.detach()
    pulled = (jacobian.mT @ value.unsqueeze(2)).squeeze(2)
    return jacobian, pulled, changes + (jacobian @ value.unsqueeze(2)).squeeze(2)


@pytest.fixture(params=FIELDS)
def case(request, randomise):
    field = FIELDS[request.param]()
    if request.param != "spectral":
        randomise(field)
    context = torch.randn(4, 2, dtype=torch.float64) if request.param == "conditional" else None
    return field.double(), torch.randn(4, *field.event_shape, dtype=torch.float64), context


def linearise(estimator, field, x, context, needs, with_norm=False):
    estimator = extended(estimator, needs)
    probe = estimator.start(field, x, context, torch.Generator().manual_seed(0), with_norm)
    return estimator.linearise(field, T, x, context, probe)


@pytest.mark.parametrize("needs", [ALL, BESIDE], ids=["all", "beside"])
@pytest.mark.parametrize(
    "estimator",
    [Exact(), Exact(memory=1e-12), Exact(closed_form=False), Hutchinson(Rademacher())],
    ids=["exact", "in-passes", "tangents", "hutchinson"],
)
def test_derivatives_are_autograds(case, estimator, needs):
    field, x, context = case
    jacobian, pulled, acceleration = by_autograd(field, T, x, context)
    found = linearise(estimator, field, x, context, needs, True)
    plain = linearise(estimator, field, x, context, Needs(0), True)
    torch.testing.assert_close(found.value, plain.value)
    torch.testing.assert_close(found.div, plain.div)
    torch.testing.assert_close(found.pulled_value.flatten(1), pulled)
    torch.testing.assert_close(found.acceleration.flatten(1), acceleration)
    assert (found.jacobian is None) == (needs == BESIDE)
    if needs == ALL:
        torch.testing.assert_close(found.jacobian, jacobian)
    if needs == ALL and estimator.exact:
        torch.testing.assert_close(found.squared_norm, jacobian.square().sum(dim=(1, 2)))


def test_gradients_of_derivatives_are_those_of_finite_differences(case):
    field, x, context = case
    parameters = [parameter for parameter in field.parameters() if parameter.requires_grad]
    x.requires_grad_()

    def loss(*_):
        found = linearise(Exact(memory=1e-12), field, x, context, ALL)
        return sum(part.sin().sum() for part in (found.jacobian, found.pulled_value, found.acceleration))

    assert torch.autograd.gradcheck(loss, (x, *parameters), fast_mode=True)


def test_a_field_without_forward_mode_gives_its_jacobian_by_rows(randomise):
    field, x = randomise(Reversed((3,), 6, 1, Tanh)), torch.randn(4, 3, dtype=torch.float64)
    jacobian, pulled, _ = by_autograd(field, T, x, None)
    found = linearise(Exact(memory=1e-12), field, x, None, Needs.JACOBIAN | Needs.PULLED_VALUE)
    torch.testing.assert_close(found.jacobian, jacobian)
    torch.testing.assert_close(found.pulled_value, pulled)
    with pytest.raises(ConfigError, match="forward derivatives for regulariser=total_derivative, got .* Reversed"):
        linearise(Exact(), field, x, None, Needs.ACCELERATION)


def test_an_estimate_keeps_its_probes_beside_a_jacobian(randomise):
    field = randomise(EncoderDecoder((4,), [5, 2, 5], Concat, Tanh))
    x = torch.randn(3, 4, dtype=torch.float64)
    for estimator in (Hutchinson(Gaussian(), 3), Bottleneck(Gaussian(), 3)):
        plain, found = (linearise(estimator, field, x, None, needs) for needs in (Needs(0), Needs.JACOBIAN))
        assert found.estimates.equal(plain.estimates)
        assert extended(estimator, Needs.JACOBIAN).count == 3
        assert not extended(estimator, Needs.JACOBIAN).exact


def test_an_exact_divergence_is_read_off_the_jacobian(randomise, monkeypatch):
    """What is known is not computed again."""
    field, x = randomise(Residual((3,), 6, 1, Tanh)), torch.randn(4, 3, dtype=torch.float64)
    monkeypatch.setattr(Exact, "linearise", None)
    found = linearise(Exact(), field, x, None, Needs.JACOBIAN, True)
    torch.testing.assert_close(found.div, found.jacobian.diagonal(dim1=1, dim2=2).sum(dim=1))


def test_an_estimator_that_does_by_itself_stays_as_it_is():
    estimator = Exact()
    assert extended(estimator, Needs(0)) is estimator
    assert extended(estimator, Needs.SQUARED_NORM) is estimator
    assert extended(estimator, Needs.PULLED_VALUE).describe(FIELDS["closed-form"]()) == "exact, closed form"


def test_a_jacobian_out_of_reach_is_refused():
    field = Mlp((200,), [4], Concat, Tanh)
    with pytest.raises(ConfigError, match="at most 128 numbers .* got 200. Type regulariser=jacobian."):
        linearise(Exact(), field, torch.randn(2, 200), None, Needs.JACOBIAN)
    assert linearise(Exact(), field, torch.randn(2, 200), None, Needs.PULLED_VALUE).pulled_value.shape == (2, 200)


def test_precision_is_changed_in_all_parts(case):
    field, x, context = case
    found = linearise(Exact(), field, x, context, ALL).to(torch.float32)
    assert {part.dtype for part in found if part is not None} == {torch.float32}


def test_low_precision_inside_leaves_the_state_s_outside():
    field = Mlp((3,), [6, 5], ConcatSquash, Softplus)
    x = torch.randn(4, 3)
    estimator = extended(Exact(), ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = estimator.linearise(field, T.float(), x, None, estimator.start(field, x, None, None))
    jacobian, pulled, acceleration = by_autograd(field, T.float(), x, None)
    torch.testing.assert_close(found.jacobian.float(), jacobian, rtol=0.05, atol=0.02)
    torch.testing.assert_close(found.pulled_value.float(), pulled, rtol=0.05, atol=0.02)
    torch.testing.assert_close(found.acceleration.float(), acceleration, rtol=0.05, atol=0.02)
