"""Compiled steps give eager's numbers, in one graph. Run apart: runtime type checks stop the compiler."""

import subprocess
import sys
import textwrap

import pytest

SCRIPT = textwrap.dedent(
    """
    import sys, warnings
    import torch
    from torch._dynamo.utils import counters
    from cnf_lab.fields import Concat, ConcatConv, ConcatSquash, Softplus, Tanh
    from cnf_lab.fields import ConvField, EncoderDecoder, Mlp, Residual, UNet
    from cnf_lab.flows import Chain, ContinuousFlow, Flow, StandardNormal
    from cnf_lab.objectives import JacobianNorm, KineticEnergy, Likelihood
    from cnf_lab.ode import RungeKuttaSolver
    from cnf_lab.trace import Bottleneck, Exact, Gaussian, HutchPlusPlus, Hutchinson, Rademacher

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    FIELDS = {
        "mlp": lambda: Mlp((5,), [7, 6], ConcatSquash, Tanh),
        "three": lambda: Mlp((5,), [7, 6, 7], ConcatSquash, Tanh),
        "residual": lambda: Residual((5,), 7, 1, Tanh),
        "bottleneck": lambda: EncoderDecoder((5,), [7, 3, 7], Concat, Tanh),
        "images": lambda: ConvField((1, 4, 5), [3], ConcatConv, Softplus),
        "unet": lambda: UNet((1, 4, 5), 4, [1, 2], 1, Softplus, 8),
    }
    TRACES = {
        "exact": Exact(),
        "hutchinson": Hutchinson(Rademacher(), 2),
        "hutchplusplus": HutchPlusPlus(Gaussian(), 2),
        "bottleneck": Bottleneck(Gaussian()),
    }
    field, trace, method, gradient, blocks = sys.argv[1:]
    grid = {"steps": 3} if method == "rk4" else {"options": {"first_step": 0.5}, "atol": 1e-4, "rtol": 1e-4}

    def train(compile):
        torch.manual_seed(0)
        solver = RungeKuttaSolver(method, gradient=gradient, compile=compile, **grid)
        parts = [ContinuousFlow(FIELDS[field](), solver, TRACES[trace]) for _ in range(int(blocks))]
        shape = parts[0].field.event_shape
        flow = Flow(Chain(parts), StandardNormal(shape)).double().train()
        objective = Likelihood({"kinetic": KineticEnergy(0.1), "jacobian": JacobianNorm(0.1)})
        for step in range(3):
            flow.zero_grad()
            x = torch.randn(6, *shape, dtype=torch.float64)
            result = objective(flow, x, None, torch.Generator().manual_seed(step))
            result.loss.backward()
        costs = [(s.nfe_forward, s.nfe_backward) for s in result.solves]
        return result.loss.detach(), [p.grad for p in flow.parameters() if p.grad is not None], costs

    loss, gradients, costs = train(False)
    compiled_loss, compiled_gradients, compiled_costs = train(True)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(compiled_gradients, gradients, rtol=1e-10, atol=1e-12)
    assert compiled_costs == costs, (compiled_costs, costs)
    assert not counters["graph_break"], counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    print("graphs", graphs)
    # One for a state that wants no gradient, the data, and one for a state that does; with and without autograd.
    assert 0 < graphs <= 4, graphs
    """
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "mlp exact rk4 direct 1",
        "mlp exact dopri5 checkpoint 10",
        "mlp hutchplusplus rk4 direct 1",
        "three hutchinson rk4 checkpoint 1",
        "residual exact rk4 direct 1",
        "bottleneck bottleneck rk4 direct 1",
        "images exact rk4 direct 1",
        "images hutchinson dopri5 direct 1",
        "unet hutchinson rk4 checkpoint 1",
    ],
)
def test_compiled_equals_eager(case):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *case.split()], capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
