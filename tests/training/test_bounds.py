"""Bounds by an autoencoder: draws, passes, errors, active units, and the check of the solve."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from cnf_lab.autoencoders import continuous_flow, variational_autoencoder
from cnf_lab.data.base import ArrayRows
from cnf_lab.fields import AmortisedGates, AmortisedLowRank, Concat, Softplus
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact, Hutchinson, Rademacher
from cnf_lab.training.bounds import Elbos, elbo_numbers, elbos, importance_numbers, importance_weighted
from cnf_lab.training.checks import Evaluated, change, negative
from cnf_lab.training.settings import Settings
from cnf_lab.training.shares import Shares

TIGHT = RungeKuttaSolver("dopri5", 1e-8, 1e-8, error_norm="example")
FIELDS = {
    "cnf-gated": partial(AmortisedGates, hidden=[6, 5], layer=Concat, activation=Softplus),
    "cnf-low-rank": partial(AmortisedLowRank, hidden=[6, 5], layer=Concat, activation=Softplus, rank=2),
}


def continuous(name, **options):
    parts = {"solver": TIGHT, "evaluation_solver": TIGHT, "divergence": Exact(), "evaluation_divergence": Exact()}
    return partial(continuous_flow, field=FIELDS[name], **parts, **options)


@pytest.fixture
def rows():
    return ArrayRows(np.random.default_rng(0).normal(size=(17, 1, 1, 5)))


def test_draws_and_batches(linear_gaussian, rows):
    model = linear_gaussian(continuous("cnf-gated"))
    one, three = elbos(model, rows, 17, None, 1, 0), elbos(model, rows, 17, None, 3, 0)
    assert three.log_weight.shape == three.reconstruction.shape == (3, 17)
    torch.testing.assert_close(one.log_weight[0], three.log_weight[0])
    assert not torch.equal(three.log_weight[1], three.log_weight[0])
    assert elbos(model, rows, 5, 8, 2, 0).log_weight.shape == (2, 8)
    assert not torch.equal(elbos(model, rows, 17, None, 1, 1).log_weight, one.log_weight)
    assert sum(one.nfe) > 0


def test_numbers_and_their_errors(linear_gaussian, rows):
    model = linear_gaussian()
    found = elbos(model, rows, 17, None, 50, 0)
    numbers = elbo_numbers(found, model)
    per_image = -found.log_weight.mean(dim=0)
    assert numbers["negative_elbo"] == pytest.approx(float(per_image.mean()))
    assert numbers["elbo"] == -numbers["negative_elbo"]
    assert numbers["negative_elbo_standard_error"] == pytest.approx(float(per_image.std()) / math.sqrt(17))
    assert numbers["reconstruction"] + numbers["kl"] == pytest.approx(numbers["negative_elbo"])
    # Another 50 draws lie within the error that the draws are said to leave.
    again = elbo_numbers(elbos(model, rows, 17, None, 50, 1), model)["negative_elbo"]
    error = math.sqrt(2) * numbers["negative_elbo_draws_standard_error"]
    assert abs(again - numbers["negative_elbo"]) < 4 * error
    assert "bits_per_dim" not in numbers
    assert "negative_elbo_trace_standard_error" not in numbers


def test_probes_leave_an_error_that_covers_the_truth(linear_gaussian, rows):
    model = linear_gaussian(continuous("cnf-low-rank"))
    exact = elbo_numbers(elbos(model, rows, 17, None, 1, 0), model)["negative_elbo"]
    model.set_evaluation(TIGHT, Hutchinson(Rademacher(), 16))
    estimated = elbo_numbers(elbos(model, rows, 17, None, 1, 0), model)
    assert abs(estimated["negative_elbo"] - exact) < 4 * estimated["negative_elbo_trace_standard_error"]
    assert estimated["negative_elbo_trace_standard_error"] > 0


def test_importance_weighted_in_passes_of_any_size(linear_gaussian, rows):
    model = linear_gaussian(continuous("cnf-gated"))
    known = model.truth(rows.__getitems__(range(17)).x)
    for pass_rows in (90, 400, 10_000):
        found = importance_weighted(model, rows, 400, pass_rows, None, 0)
        assert found.bound.shape == found.sample_size.shape == (17,)
        assert ((found.sample_size >= 1) & (found.sample_size <= 400 + 1e-6)).all()
        assert (found.bound - known).abs().mean() < 0.1
    numbers = importance_numbers(found, model)
    assert numbers["negative_iwae_bound"] == pytest.approx(float(-found.bound.mean()))
    elbo = elbo_numbers(elbos(model, rows, 17, None, 20, 0), model)["negative_elbo"]
    assert numbers["negative_iwae_bound"] < elbo


def test_sample_size_is_that_of_the_weights(linear_gaussian, rows):
    model = linear_gaussian()
    found = importance_weighted(model, rows, 30, 10_000, 1, 0)
    # The same draws again.
    from cnf_lab.training.likelihoods import mixed

    generator = torch.Generator().manual_seed(mixed(0, 1, 0, 0))
    weights = model.terms(rows.__getitems__([0]).x, 30, generator).log_weight[:, 0].detach().exp()
    assert float(found.sample_size) == pytest.approx(float(weights.sum() ** 2 / weights.square().sum()))
    assert float(found.bound) == pytest.approx(float(weights.mean().log()))


def test_active_units_are_those_that_see_the_image(linear_gaussian, rows):
    model = linear_gaussian(latent=4)
    with torch.no_grad():
        model.posterior.mean.weight[2:].zero_()
    assert elbo_numbers(elbos(model, rows, 17, None, 200, 0), model)["active_units"] == 2
    assert "active_units" not in elbo_numbers(elbos(model, rows, 17, None, 1, 0), model)


def test_active_units_are_not_the_noise_of_few_draws(linear_gaussian):
    torch.manual_seed(0)
    latents = torch.randn(4, 200, 64, dtype=torch.float64)  # that see no image
    log_weight = torch.zeros(4, 200, dtype=torch.float64)
    found = Elbos(log_weight, log_weight, latents.mean(dim=0), latents.var(dim=0), None, ())
    assert (latents.mean(dim=0).var(dim=0) - latents.var(dim=0).mean(dim=0) / 4 > 0.01).sum() > 5
    assert elbo_numbers(found, linear_gaussian(latent=64))["active_units"] == 0


def test_pixels_of_several_values_are_told_in_bits_too():
    model = variational_autoencoder((1, 4, 4), 0, continuous("cnf-gated"), 3, 2, 8).eval()
    rows = ArrayRows(np.random.default_rng(0).integers(0, 3, (9, 1, 4, 4)))
    numbers = elbo_numbers(elbos(model, rows, 9, None, 2, 0), model)
    numbers |= importance_numbers(importance_weighted(model, rows, 5, 100, None, 0), model)
    nats = 16 * math.log(2)
    assert numbers["bits_per_dim"] == pytest.approx(numbers["negative_elbo"] / nats)
    assert numbers["bits_per_dim_draws_standard_error"] == pytest.approx(
        numbers["negative_elbo_draws_standard_error"] / nats
    )
    assert numbers["bits_per_dim_iwae"] == pytest.approx(numbers["negative_iwae_bound"] / nats)


@pytest.mark.parametrize(("tolerance", "visible"), [(0.3, True), (1e-6, False)])
def test_the_check_sees_a_loose_solve(linear_gaussian, rows, tolerance, visible):
    model = linear_gaussian(continuous("cnf-gated", blocks=2)).float()
    for parameter in model.posterior.transform.parameters():
        nn.init.normal_(parameter, std=0.5)
    settings = Settings("dopri5", tolerance, tolerance, "float32", "exact", 4, 1)
    settings.apply(model)
    what = Evaluated(ArrayRows(rows.array.astype(np.float32)), 10, 10, 0, Shares())
    changed = change(model, settings, settings.tight(), lambda: negative(model, what)[0])
    assert (float(changed.abs().max()) > 1e-3) == visible
