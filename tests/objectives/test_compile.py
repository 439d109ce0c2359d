"""Compiled steps give eager's numbers with every penalty. Run apart: runtime type checks stop the compiler."""

import subprocess
import sys
import textwrap

import pytest

SCRIPT = textwrap.dedent(
    """
    import sys, warnings
    import torch
    from torch._dynamo.utils import counters
    from cnf_lab import objectives
    from cnf_lab.fields import ConcatSquash, Mlp, Residual, Tanh
    from cnf_lab.flows import ContinuousFlow, Flow, StandardNormal
    from cnf_lab.ode import RungeKuttaSolver
    from cnf_lab.trace import Exact, Hutchinson, Rademacher

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    FIELDS = {"mlp": lambda: Mlp((4,), [7, 6], ConcatSquash, Tanh), "residual": lambda: Residual((4,), 7, 1, Tanh)}
    TRACES = {"exact": Exact(), "hutchinson": Hutchinson(Rademacher())}
    field, trace, gradient, *names = sys.argv[1:]
    regularisers = {name: getattr(objectives, name)(0.1) for name in names}

    def train(compile):
        torch.manual_seed(0)
        solver = RungeKuttaSolver("rk4", steps=3, gradient=gradient, compile=compile)
        flow = Flow(ContinuousFlow(FIELDS[field](), solver, TRACES[trace]), StandardNormal((4,))).double().train()
        for step in range(3):
            flow.zero_grad()
            x, generator = torch.randn(6, 4, dtype=torch.float64), torch.Generator().manual_seed(step)
            result = objectives.Likelihood(regularisers)(flow, x, None, generator)
            result.loss.backward()
        costs = [(stats.nfe_forward, stats.nfe_backward) for stats in result.solves]
        return result.terms, [p.grad for p in flow.parameters() if p.grad is not None], costs

    terms, gradients, costs = train(False)
    compiled_terms, compiled_gradients, compiled_costs = train(True)
    torch.testing.assert_close(compiled_terms, terms, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(compiled_gradients, gradients, rtol=1e-10, atol=1e-12)
    assert compiled_costs == costs, (compiled_costs, costs)
    assert not counters["graph_break"], counters["graph_break"]
    # A state that wants no gradient, and one that does; with and without autograd.
    assert 0 < counters["stats"]["unique_graphs"] <= 4, counters["stats"]
    """
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "mlp exact direct L1Speed L2Speed DirectionalDerivative TotalDerivative",
        "residual exact checkpoint JacobianFrobenius JacobianDiagonal DirectionalDerivative JacobianNorm",
        "mlp hutchinson direct JacobianOffDiagonal TotalDerivative RandomEndTime TrajectoryPolynomial",
    ],
)
def test_compiled_penalties_equal_eager(case):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *case.split()], capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
