"""The choice of an estimator by the field, and what it says."""

import pytest
import torch

from cnf_lab.fields import Branches, Concat, ConcatConv, ConcatSquash, ConvField, EncoderDecoder, Mlp, Residual, Tanh
from cnf_lab.flows import ContinuousFlow
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Auto, Bottleneck, Exact, Hutchinson, Rademacher


@pytest.mark.parametrize(
    ("field", "kind", "reason"),
    [
        (lambda: Mlp((43,), [6], Concat, Tanh), Exact, "closed form"),
        (lambda: Mlp((43,), [6, 6], ConcatSquash, Tanh), Exact, "closed form"),
        (lambda: Branches((43,), [6, 6], 2, ConcatSquash, Tanh), Exact, "closed form"),
        (lambda: Mlp((6,), [6, 6, 6], ConcatSquash, Tanh), Exact, "6 tangents are few"),
        (lambda: Residual((8,), 6, 1, Tanh), Exact, "8 tangents are few"),
        (lambda: Residual((9,), 6, 1, Tanh), Hutchinson, "would take 9 tangents"),
        (lambda: Mlp((63,), [6, 6, 6], ConcatSquash, Tanh), Hutchinson, "would take 63 tangents"),
        (lambda: EncoderDecoder((12,), [8, 3, 8], Concat, Tanh), Bottleneck, "narrow bottleneck"),
        (lambda: EncoderDecoder((12,), [8, 4, 8], Concat, Tanh), Hutchinson, "would take 12 tangents"),
        (lambda: ConvField((1, 9, 9), [2], ConcatConv, Tanh), Hutchinson, "would take 9 tangents"),
    ],
)
def test_choice_and_reason(field, kind, reason):
    field, auto = field(), Auto(Rademacher())
    assert type(auto.chosen_for(field)) is kind
    assert reason in auto.describe(field)
    assert auto.describe(field).startswith(auto.chosen_for(field).describe(field))


def test_options_reach_the_chosen_estimator():
    auto = Auto(Rademacher(), probes=3, tangents=2, memory=0.25)
    assert auto.chosen_for(Residual((3,), 6, 1, Tanh)).probes == 3
    assert auto.chosen_for(Residual((2,), 6, 1, Tanh)).memory == 0.25


def test_a_flow_takes_the_choice():
    flow = ContinuousFlow(Mlp((2,), [6], Concat, Tanh), RungeKuttaSolver("dopri5"), Auto(Rademacher()))
    assert isinstance(flow.divergence, Exact)
    assert isinstance(flow.evaluation_divergence, Exact)


def test_used_by_itself_it_estimates_what_its_choice_does():
    field, x = Mlp((2,), [6], Concat, Tanh).double(), torch.randn(4, 2, dtype=torch.float64)
    auto, t = Auto(Rademacher()), torch.tensor(0.3, dtype=torch.float64)
    mine = auto.value_and_divergence(field, t, x, None, auto.start(field, x, None, None))
    torch.testing.assert_close(mine, Exact().value_and_divergence(field, t, x, None, None))
