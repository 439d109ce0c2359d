"""The autoencoder: bounds against a model whose likelihood is known, its networks, likelihoods and posteriors."""

import math
from functools import partial

import pytest
import torch

from cnf_lab.autoencoders import (
    Bernoulli,
    Categorical,
    ConvDecoder,
    ConvEncoder,
    Posterior,
    autoregressive_flow,
    continuous_flow,
    no_flow,
    pixel_likelihood,
    planar_flow,
    sylvester_flow,
    variational_autoencoder,
)
from cnf_lab.errors import ConfigError
from cnf_lab.fields import (
    AmortisedBias,
    AmortisedGates,
    AmortisedLastLayer,
    AmortisedLayers,
    AmortisedLowRank,
    Concat,
    Mlp,
    Softplus,
    Tanh,
)
from cnf_lab.flows import StandardNormal
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact, Gaussian, Hutchinson

TIGHT = RungeKuttaSolver("dopri5", 1e-9, 1e-9, error_norm="example")
FIELDS = {
    "cnf": partial(Mlp, hidden=[6, 5], layer=Concat, activation=Softplus),
    "cnf-bias": partial(AmortisedBias, hidden=[6, 5], layer=Concat, activation=Softplus),
    "cnf-low-rank": partial(AmortisedLowRank, hidden=[6, 5], layer=Concat, activation=Softplus, rank=2),
    "cnf-low-rank-one-hidden": partial(AmortisedLowRank, hidden=[6], layer=Concat, activation=Tanh, rank=2),
    "cnf-last-layer": partial(AmortisedLastLayer, hidden=[6, 5], layer=Concat, activation=Softplus),
    "cnf-hypernetwork": partial(AmortisedLayers, hidden=[6], activation=Softplus),
    "cnf-gated": partial(AmortisedGates, hidden=[6, 5], layer=Concat, activation=Softplus),
}
FINITE = {
    "none": no_flow,
    "planar": partial(planar_flow, flows=2),
    "iaf": partial(autoregressive_flow, flows=2, width=10),
    "orthogonal": partial(sylvester_flow, flows=2, size=2),
    "householder": partial(sylvester_flow, flows=2, orthogonalisation="householder", size=2),
    "triangular": partial(sylvester_flow, flows=2, orthogonalisation="triangular"),
}


def continuous(field, solver=TIGHT, divergence=None, **options):
    divergence = divergence or Exact()
    return partial(
        continuous_flow,
        field=lambda event_shape, context_features: field(event_shape=event_shape, context_features=context_features),
        solver=solver,
        evaluation_solver=TIGHT,
        divergence=divergence,
        evaluation_divergence=Exact(),
        **options,
    )


POSTERIORS = FINITE | {name: continuous(field) for name, field in FIELDS.items()}
each_posterior = pytest.mark.parametrize("posterior", POSTERIORS.values(), ids=POSTERIORS)


@torch.no_grad()
@each_posterior
def test_bounds_are_ordered_and_close_with_more_draws(linear_gaussian, posterior):
    model, x = linear_gaussian(posterior), torch.randn(6, 1, 1, 5, dtype=torch.float64)
    weights = model.terms(x, 3000, torch.Generator().manual_seed(0)).log_weight
    known, elbo = model.truth(x), weights.mean(dim=0)
    bounds = [weights.unflatten(0, (-1, k)).logsumexp(dim=1).mean(dim=0) - math.log(k) for k in (1, 10, 100)]
    torch.testing.assert_close(bounds[0], elbo)
    gaps = [(known - bound).mean() for bound in bounds]
    assert gaps[0] > gaps[1] > gaps[2] > -0.03
    assert gaps[2] < 0.2 * gaps[0]
    # The weights' mean is p(x) itself, whatever the posterior.
    mean, spread = weights.exp().mean(dim=0), weights.exp().std(dim=0) / 3000**0.5
    assert ((mean - known.exp()).abs() < 4.5 * spread + 1e-12).all()


@torch.no_grad()
def test_with_the_true_posterior_the_elbo_is_the_likelihood(linear_gaussian):
    model, x = linear_gaussian(), torch.randn(6, 1, 1, 5, dtype=torch.float64)
    # Orthogonal columns make the true posterior's covariance diagonal, as that of the model's is.
    axes = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64))[0] * torch.tensor([0.5, 2.0])
    model.decoder.weight.copy_(axes)
    noise = model.likelihood.deviation**2

    class TruePosterior(Posterior):
        def gaussian(self, features):
            variance = 1 / (1 + axes.square().sum(dim=0) / noise)
            return (x.flatten(1) - model.decoder.bias) @ axes / noise * variance, variance.expand(6, -1)

    model.posterior = TruePosterior(4, 2, no_flow(2, 4)).double()
    for draws in (1, 3):
        log_weight = torch.cat([model.terms(x).log_weight for _ in range(draws)])
        torch.testing.assert_close(log_weight, model.truth(x).expand(draws, -1), rtol=1e-10, atol=1e-10)


@each_posterior
def test_log_q_is_the_density_of_the_latent(linear_gaussian, posterior):
    model, x = linear_gaussian(posterior), torch.randn(3, 1, 1, 5, dtype=torch.float64)
    found = model.terms(x, 1, torch.Generator().manual_seed(1))
    features = model.encoder(x)
    mean, variance = model.posterior.gaussian(features)
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(1)).double()
    z0 = mean + variance.sqrt() * noise
    start = torch.distributions.Normal(mean, variance.sqrt()).log_prob(z0).sum(dim=1)
    for row in range(3):
        own = features[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda v, own=own: model.posterior.transform.pull_back(v[None], own).value[0], z0[row]
        )
        torch.testing.assert_close(found.log_det[0, row], torch.linalg.slogdet(jacobian)[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.log_start[0], start)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(found.latent[0]).sum(dim=1)
    torch.testing.assert_close(found.kl[0], start - found.log_det[0] - prior)
    torch.testing.assert_close(found.log_weight, found.log_likelihood - found.kl)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_gradients_agree_with_finite_differences_in_every_mode(linear_gaussian, field, gradient):
    solver = RungeKuttaSolver("dopri5", 1e-10, 1e-10, gradient=gradient)
    model, x = linear_gaussian(continuous(field, solver)), torch.randn(3, 1, 1, 5, dtype=torch.float64)
    model.train()

    def loss():
        found = model.terms(x, 2, torch.Generator().manual_seed(2))
        assert all(solve.nfe_forward > 0 for solve in found.solves)
        return -found.log_weight.mean()

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
            ends.append(loss())
    assert float(expected) == pytest.approx(float((ends[0] - ends[1]) / 2e-5), rel=2e-5, abs=1e-7)


def test_probes_in_training_and_exact_divergence_in_evaluation(linear_gaussian):
    divergence = Hutchinson(Gaussian(), 1)
    solver = RungeKuttaSolver("dopri5", 1e-6, 1e-6, gradient="adjoint")
    model = linear_gaussian(continuous(FIELDS["cnf-low-rank"], solver, divergence, blocks=2))
    x = torch.randn(4, 1, 1, 5, dtype=torch.float64)
    exact = model.terms(x, 1, torch.Generator().manual_seed(0))
    assert exact.log_det_error is None
    model.train()
    found = model.terms(x, 1, torch.Generator().manual_seed(0))
    assert not torch.allclose(found.log_det, exact.log_det, atol=1e-4)
    torch.testing.assert_close(found.log_start, exact.log_start)
    (-found.log_weight.mean()).backward()
    assert len(found.solves) == 2
    assert all(solve.nfe_backward > 0 for solve in found.solves)


def test_amortised_values_that_start_at_zero_are_the_same_for_all():
    flow = continuous(FIELDS["cnf-gated"], zero_amortiser=True)(dimension=2, context_features=4).double()
    z = torch.randn(1, 2, dtype=torch.float64).expand(3, -1)
    mapped = flow.pull_back(z, torch.randn(3, 4, dtype=torch.float64))
    torch.testing.assert_close(mapped.value[1:], mapped.value[:2])


@pytest.mark.parametrize(("event_shape", "levels", "millions"), [((1, 28, 28), 2, 3.07), ((1, 28, 20), 256, 2.76)])
def test_published_sizes(event_shape, levels, millions):
    model = variational_autoencoder(event_shape, 0, no_flow, levels)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("rank", "hidden", "blocks", "millions"), [(64, [1024, 1024], 2, 145.5), (20, [512, 512], 5, 62.0)]
)
def test_published_size_of_the_low_rank_posterior(rank, hidden, blocks, millions):
    with torch.device("meta"):
        field = partial(AmortisedLowRank, hidden=hidden, layer=Concat, activation=Softplus, rank=rank)
        model = variational_autoencoder((1, 28, 28), 0, continuous(field, blocks=blocks), 2)
        gated = partial(AmortisedGates, hidden=hidden, layer=Concat, activation=Softplus)
        ours = variational_autoencoder((1, 28, 28), 0, continuous(gated, blocks=blocks), 2)
    sizes = [sum(parameter.numel() for parameter in one.parameters()) / 1e6 for one in (model, ours)]
    assert sizes[0] == pytest.approx(millions, abs=0.1)
    assert sizes[1] < sizes[0] / 6


@pytest.mark.parametrize("event_shape", [(1, 28, 28), (1, 28, 20), (3, 32, 32), (1, 8, 8), (2, 7, 9), (1, 1, 5)])
@pytest.mark.parametrize("levels", [2, 5])
def test_networks_of_any_size(event_shape, levels):
    likelihood = pixel_likelihood(levels)
    features = ConvEncoder(event_shape, 12)(torch.rand(3, *event_shape))
    outputs = ConvDecoder(event_shape, 6, likelihood.outputs)(torch.randn(3, 6))
    assert features.shape == (3, 12)
    assert outputs.shape == (3, likelihood.outputs, *event_shape)
    drawn, mean = likelihood.sample(outputs), likelihood.mean(outputs)
    assert drawn.shape == mean.shape == (3, *event_shape)
    assert ((drawn >= 0) & (drawn < levels) & (drawn == drawn.round())).all()
    assert likelihood.log_prob(outputs, drawn).shape == (3,)


def test_likelihoods_are_those_of_torch():
    x = torch.randint(0, 2, (4, 1, 3, 3)).double()
    outputs = torch.randn(4, 1, 1, 3, 3, dtype=torch.float64)
    expected = torch.distributions.Bernoulli(logits=outputs.squeeze(1)).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(Bernoulli().log_prob(outputs, x), expected)
    x = torch.randint(0, 5, (4, 2, 3, 3)).double()
    outputs = torch.randn(4, 5, 2, 3, 3, dtype=torch.float64)
    categorical = torch.distributions.Categorical(logits=outputs.movedim(1, -1))
    torch.testing.assert_close(Categorical(5).log_prob(outputs, x), categorical.log_prob(x).flatten(1).sum(1))
    torch.testing.assert_close(Categorical(5).mean(outputs), (categorical.probs * torch.arange(5.0)).sum(-1).double())
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([Categorical(5).sample(outputs, generator) for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(dim=0), Categorical(5).mean(outputs), rtol=0, atol=0.12)


def test_low_precision_is_for_training_and_networks_only():
    model = variational_autoencoder((1, 8, 8), 0, continuous(FIELDS["cnf-gated"]), 2, 4, 16)
    x = torch.randint(0, 2, (4, 1, 8, 8)).float()
    results = {}
    for training in (True, False):
        model.train(training)
        for low in (True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                found = model.terms(x, 1, torch.Generator().manual_seed(0))
            assert {part.dtype for part in (found.log_likelihood, found.log_det, found.kl)} == {torch.float32}
            results[training, low] = found.log_weight
    assert torch.equal(results[False, True], results[False, False])
    assert not torch.equal(results[True, True], results[True, False])
    torch.testing.assert_close(results[True, True], results[True, False], rtol=0.02, atol=0.5)


def test_samples_and_latents():
    model = variational_autoencoder((1, 8, 8), 0, planar_flow, 5, 4, 16).eval()
    drawn = model.sample(7, torch.Generator().manual_seed(0))
    assert drawn.shape == (7, 1, 8, 8)
    assert torch.equal(drawn, model.sample(7, torch.Generator().manual_seed(0)))
    assert model.latents(drawn, 3).shape == (3, 7, 4)
    assert model.decode(torch.randn(2, 4)).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"Expected images with shape \(batch, 1, 8, 8\), got \(2, 1, 8, 7\)"):
        model.elbo(drawn[:2, :, :, :7])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: variational_autoencoder((4,), 0, no_flow), "Expected images for model=vae, got data of event shape"),
        (lambda: variational_autoencoder((1, 8, 8), 2, no_flow), "without a context for model=vae"),
        (lambda: variational_autoencoder((1, 8, 8), 0, no_flow, latent=0), r"model\.latent of at least 1"),
        (lambda: variational_autoencoder((1, 8, 8), 0, no_flow, features=0), r"model\.features of at least 1"),
        (lambda: variational_autoencoder((1, 8, 8), 0, no_flow, levels=1), r"recipe\.levels of at least 2"),
        (lambda: planar_flow(4, 2, 0), r"posterior\.flows of at least 1"),
        (lambda: continuous(FIELDS["cnf"], blocks=0)(dimension=2, context_features=2), r"posterior\.blocks"),
    ],
)
def test_options_out_of_range(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_the_prior_is_the_standard_normal(linear_gaussian):
    assert isinstance(linear_gaussian().prior, StandardNormal)
