"""Likelihoods with their errors, against flows whose likelihood is known."""

import math

import numpy as np
import pytest
import torch

from cnf_lab.data.base import ArrayRows
from cnf_lab.fields import ConcatConv, ConvField, Tanh
from cnf_lab.flows import (
    Centre,
    Chain,
    ContinuousFlow,
    Flow,
    NoPreprocess,
    StandardNormal,
    UniformDequantiser,
    VariationalDequantiser,
)
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact
from cnf_lab.training.checks import Evaluated, change, negative
from cnf_lab.training.likelihoods import Likelihoods, image_numbers, log_likelihoods, nll_numbers, uniformly
from cnf_lab.training.settings import Settings
from cnf_lab.training.shares import Shares

SHAPE, LEVELS = (1, 4, 4), 8


def flow(divergence, solver=None, dequantiser=UniformDequantiser):
    field = ConvField(SHAPE, [3], ConcatConv, Tanh)
    block = ContinuousFlow(field, solver or RungeKuttaSolver("dopri5", 1e-6, 1e-6, error_norm="example"), divergence)
    return Flow(Chain([Centre(SHAPE, LEVELS), block]), StandardNormal(SHAPE), dequantiser=dequantiser(SHAPE, LEVELS))


@pytest.fixture
def rows():
    return ArrayRows(np.random.default_rng(0).integers(0, LEVELS, (23, *SHAPE)))


@torch.no_grad()
def test_draws_and_batches(rows, randomise):
    image_flow = randomise(flow(Exact()), 0.5).eval()
    one = log_likelihoods(image_flow, rows, 23, draws=1)
    three = log_likelihoods(image_flow, rows, 23, draws=3)
    assert three.log_prob.shape == (3, 23)
    assert torch.equal(one.log_prob[0], three.log_prob[0])
    assert not torch.equal(three.log_prob[1], three.log_prob[0])
    assert three.trace_error is None
    assert log_likelihoods(image_flow, rows, 10, limit=5, draws=2).log_prob.shape == (2, 5)
    assert not torch.equal(log_likelihoods(image_flow, rows, 23, seed=1).log_prob, one.log_prob)


def test_rows_without_noise_are_their_log_densities():
    density = Flow(Chain([NoPreprocess((2,))]), StandardNormal((2,))).double().eval()
    x = np.random.default_rng(0).normal(size=(50, 2))
    numbers = nll_numbers(log_likelihoods(density, ArrayRows(x), 7))
    expected = 0.5 * (x**2).sum(1) + math.log(2 * math.pi)
    assert numbers["nll"] == pytest.approx(expected.mean())
    assert numbers["nll_standard_error"] == pytest.approx(expected.std(ddof=1) / math.sqrt(50))
    assert set(numbers) == {"nll", "nll_standard_error"}


def test_bounds_are_in_order():
    """Jensen: mean of log weights <= importance-weighted <= logarithm of the mean weight, here known."""
    generator = torch.Generator().manual_seed(0)
    spread, draws = 0.7, 4000
    log_weights = spread * torch.randn(draws, 5, generator=generator, dtype=torch.float64)
    found = Likelihoods(log_weights, None, ())
    truth = spread**2 / 2  # of log E exp
    assert found.importance_weighted().mean().item() == pytest.approx(truth, abs=0.03)
    few = Likelihoods(log_weights[:5], None, ())
    numbers = image_numbers(few, few, dimensions=2)
    assert numbers["nll_importance_weighted"] < numbers["nll"]
    assert numbers["bits_per_dim"] == pytest.approx(numbers["nll"] / (2 * math.log(2)))
    assert numbers["bits_per_dim_uniform_1"] == pytest.approx(-log_weights[0].mean().item() / (2 * math.log(2)))
    expected = log_weights[:5].std(dim=0).square().sum().sqrt().item() / math.sqrt(5) / 5
    assert numbers["nll_dequantisation_standard_error"] == pytest.approx(expected)


def test_a_check_sees_a_coarse_solve_and_leaves_the_flow_as_it_was(rows, randomise):
    image_flow = randomise(flow(Exact()), 1.0).float().eval()
    what = Evaluated(rows, 6, 23, 0, Shares())

    def largest(tolerance):
        settings = Settings("dopri5", tolerance, tolerance, "float32", "exact", 4, 1)
        settings.apply(image_flow)
        before = negative(image_flow, what)
        changed = change(image_flow, settings, settings.tight(), lambda: negative(image_flow, what)[0])
        torch.testing.assert_close(negative(image_flow, what), before, rtol=0, atol=0)
        return float(changed.abs().max())

    assert largest(1e-6) < 1e-3 < 1e-2 < largest(1.0)


def test_uniform_noise_beside_learned_noise(rows, randomise):
    image_flow = randomise(flow(Exact(), dequantiser=VariationalDequantiser), 0.1).eval()
    own = log_likelihoods(image_flow, rows, 23)
    image_flow.dequantiser = uniformly(image_flow)
    uniform = log_likelihoods(image_flow, rows, 23)
    assert not torch.allclose(own.log_prob, uniform.log_prob)
    assert image_numbers(own, uniform, 16)["nll_uniform_1"] == pytest.approx(-uniform.log_prob.mean().item())
