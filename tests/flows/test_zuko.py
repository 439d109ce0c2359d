"""zuko's continuous flow, carrying the same weights, gives the same density."""

import pytest
import torch
from torch import nn

from cnf_lab.fields import Concat, ConcatSquash, Mlp, Softplus, Tanh, VectorField
from cnf_lab.flows import ContinuousFlow, Flow, StandardNormal
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact

zuko = pytest.importorskip("zuko")

TIGHT = {"atol": 1e-9, "rtol": 1e-9}


class ZukoField(VectorField):
    """The network of a zuko flow as one of our fields, weights shared."""

    def __init__(self, transform, features):
        super().__init__((features,))
        self.transform = transform

    def forward(self, t, x, context=None):
        return self.transform.f(t, x, context)


def flow_of(field, context_features=0, **options):
    transform = ContinuousFlow(field, RungeKuttaSolver("dopri5", **TIGHT), Exact(), **options)
    return Flow(transform, StandardNormal(field.event_shape), context_features).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("context_features", [0, 2], ids=["plain", "conditional"])
def test_cnf_with_shared_weights(context_features):
    options = {"freqs": 2, "hidden_features": (8, 8), "activation": nn.Tanh}
    theirs = zuko.flows.CNF(3, context_features, **options, **TIGHT).double().eval()
    ours = flow_of(ZukoField(theirs.transform, 3), context_features)
    x = torch.randn(8, 3, dtype=torch.float64)
    context = torch.randn(8, context_features, dtype=torch.float64) if context_features else None
    torch.testing.assert_close(ours.log_prob(x, context), theirs(context).log_prob(x), rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("layer", "activation"), [(ConcatSquash, Softplus), (Concat, Tanh)])
@pytest.mark.parametrize("end_time", [0.5, 1.5])
def test_our_field_in_zukos_transform(randomise, layer, activation, end_time):
    field = randomise(Mlp((3,), [6, 6], layer, activation))
    ours = flow_of(field, end_time=end_time)
    theirs = zuko.transforms.FreeFormJacobianTransform(
        field, 0.0, torch.tensor(end_time, dtype=torch.float64), field.parameters(), **TIGHT, exact=True
    )
    x = torch.randn(8, 3, dtype=torch.float64)
    z, log_det = theirs.call_and_ladj(x)
    mapped = ours.pull_back(x)
    torch.testing.assert_close(mapped.value, z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mapped.log_det, log_det, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.push_forward(z).value, theirs.inv(z), rtol=1e-6, atol=1e-6)
