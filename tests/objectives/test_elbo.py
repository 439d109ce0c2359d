"""The ELBO as an objective: its parts, the warm-up of the KL, free bits, and the importance-weighted bound."""

import math
from functools import partial

import pytest
import torch

from cnf_lab.autoencoders import continuous_flow, no_flow, planar_flow, variational_autoencoder
from cnf_lab.errors import ConfigError
from cnf_lab.fields import AmortisedGates, Concat, Softplus
from cnf_lab.flows import Chain, Flow, NoPreprocess, StandardNormal
from cnf_lab.objectives import Elbo, FlowMatching, KineticEnergy, Likelihood
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact

SOLVER = RungeKuttaSolver("dopri5", 1e-6, 1e-6)


def gated(event_shape, context_features):
    return AmortisedGates(event_shape, [8, 8], Concat, Softplus, context_features)


CONTINUOUS = partial(
    continuous_flow,
    field=gated,
    solver=SOLVER,
    evaluation_solver=SOLVER,
    divergence=Exact(),
    evaluation_divergence=Exact(),
)


def autoencoder(posterior=planar_flow):
    return variational_autoencoder((1, 8, 8), 0, posterior, 2, 4, 16).double()


@pytest.fixture
def x():
    return torch.randint(0, 2, (6, 1, 8, 8)).double()


def seeded():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("posterior", [no_flow, planar_flow, CONTINUOUS], ids=["none", "planar", "continuous"])
def test_parts_add_up(posterior, x):
    model = autoencoder(posterior)
    found, terms = Elbo()(model, x, None, seeded()), model.terms(x, 1, seeded())
    torch.testing.assert_close(found.loss, -terms.log_weight.mean())
    torch.testing.assert_close(found.terms["negative_elbo"], found.terms["reconstruction"] + found.terms["kl"])
    assert set(found.terms) == {"negative_elbo", "reconstruction", "kl", "log_det"}
    assert len(found.solves) == (posterior is CONTINUOUS)


def test_the_weight_of_the_kl_rises_over_the_warm_up(x):
    model, objective = autoencoder(), Elbo(kl_warmup=4, beta=0.8)
    found = []
    for epoch in range(6):
        objective.begin_epoch(epoch)
        result = objective(model, x, None, seeded())
        reconstruction, kl = (result.terms[name].mean().item() for name in ("reconstruction", "kl"))
        found.append((result.loss.item() - reconstruction) / kl)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert Elbo(kl_warmup=100).beta == pytest.approx(0.01)  # the published warm-up starts at one of a hundred


def test_a_kl_below_the_free_bits_has_no_gradient(x):
    model = autoencoder(no_flow)
    kl = Elbo()(model, x, None, seeded()).terms["kl"].mean().item()
    for floor, free in ((0.5 * abs(kl), kl < 0), (abs(kl) + 1.0, True)):
        found = Elbo(free_bits=floor)(model, x, None, seeded())
        reconstruction = found.terms["reconstruction"].mean()
        gradients = torch.autograd.grad(found.loss, list(model.posterior.parameters()), retain_graph=True)
        expected = torch.autograd.grad(reconstruction, list(model.posterior.parameters()))
        same = all(torch.allclose(g, e) for g, e in zip(gradients, expected, strict=True))
        assert same == free
        if free:
            assert found.loss.item() == pytest.approx(reconstruction.item() + floor)


def test_several_draws_give_the_importance_weighted_bound(x):
    model = autoencoder()
    found, terms = Elbo(draws=7)(model, x, None, seeded()), model.terms(x, 7, seeded())
    expected = -(terms.log_weight.logsumexp(dim=0) - math.log(7)).mean()
    torch.testing.assert_close(found.loss, expected)
    assert found.loss < found.terms["negative_elbo"].mean()


def test_regularisers_ride_along_a_continuous_posterior(x):
    model = autoencoder(CONTINUOUS)
    found = Elbo(regularisers={"kinetic": KineticEnergy(0.5)}, draws=2)(model, x, None, seeded())
    without = Elbo(draws=2)(model, x, None, seeded())
    torch.testing.assert_close(found.loss, without.loss + 0.5 * found.terms["kinetic"].mean(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="no regulariser on a posterior"):
        Elbo(regularisers={"kinetic": KineticEnergy(0.5)})(autoencoder(), x, None, seeded())


def test_objectives_and_models_that_do_not_go_together(x):
    density = Flow(Chain([NoPreprocess((2,))]), StandardNormal((2,)))
    with pytest.raises(ConfigError, match=r"got Elbo for a Flow\. Type objective=likelihood"):
        Elbo().check(density)
    with pytest.raises(ConfigError, match=r"got Likelihood for a VariationalAutoencoder\. Type objective=elbo"):
        Likelihood().check(autoencoder())
    with pytest.raises(ConfigError, match=r"got FlowMatching for a VariationalAutoencoder\. Type objective=elbo"):
        FlowMatching.check(object.__new__(FlowMatching), autoencoder())
    Elbo().check(autoencoder())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kl_warmup": -1}, "kl_warmup of at least 0"),
        ({"beta": -0.1}, "beta of at least 0"),
        ({"free_bits": -1.0}, "free_bits of at least 0"),
        ({"draws": 0}, "draws of at least 1"),
        ({"draws": 2, "free_bits": 1.0}, "and 1 with free bits"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(ConfigError, match=said):
        Elbo(**options)
