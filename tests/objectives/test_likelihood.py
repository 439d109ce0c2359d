"""The likelihood objective and its penalties against their definitions."""

import math

import pytest
import torch
from torch import Tensor

from cnf_lab.fields import Concat, Mlp, Tanh, VectorField
from cnf_lab.flows import Chain, ContinuousFlow, Flow, NoPreprocess, StandardNormal
from cnf_lab.objectives import KineticEnergy, Likelihood, Regulariser
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact, Linearised

TIGHT = RungeKuttaSolver("dopri5", atol=1e-10, rtol=1e-10)


class Decay(VectorField):
    """dx/dt = -x, whose trajectories and kinetic energy are known."""

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return -x


def density(field: VectorField, blocks: int = 1) -> Flow:
    transforms = [ContinuousFlow(field, TIGHT, Exact()) for _ in range(blocks)]
    return Flow(Chain([NoPreprocess(field.event_shape), *transforms]), StandardNormal(field.event_shape)).double()


def test_loss_is_the_mean_negative_log_density() -> None:
    flow, x = density(Mlp((2,), [5], Concat, Tanh)), torch.randn(6, 2, dtype=torch.float64)
    result = Likelihood()(flow, x, None, None)
    torch.testing.assert_close(result.terms["nll"], -flow.log_prob(x))
    torch.testing.assert_close(result.loss, -flow.log_prob(x).mean())


@pytest.mark.parametrize("blocks", [1, 2])
def test_kinetic_energy_of_a_known_path(blocks: int) -> None:
    r"""For x_t = x e^{-t} the energy over [0, T] is |x|^2 (1 - e^{-2T}) / (2 D); blocks go on where one ended."""
    x = torch.randn(5, 3, dtype=torch.float64)
    result = Likelihood({"kinetic": KineticEnergy(0.3)})(density(Decay((3,)), blocks), x, None, None)
    expected = x.square().sum(1) * (1 - math.exp(-2 * blocks)) / 2 / 3
    torch.testing.assert_close(result.terms["kinetic"], expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(result.loss, result.terms["nll"].mean() + 0.3 * expected.mean(), atol=1e-8, rtol=1e-8)


def test_a_penalty_does_not_steer_the_steps() -> None:
    class Huge(Regulariser):
        def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
            return 1e9 * torch.sin(1e3 * t) * x[:, 0]

    flow, x = density(Mlp((2,), [5], Concat, Tanh)), torch.randn(6, 2, dtype=torch.float64)
    plain = Likelihood()(flow, x, None, None)
    burdened = Likelihood({"huge": Huge(1.0)})(flow, x, None, None)
    assert plain.solves[0].nfe_forward == burdened.solves[0].nfe_forward
    torch.testing.assert_close(plain.terms["nll"], burdened.terms["nll"])
