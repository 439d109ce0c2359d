"""From pixels to the real line: dequantisation, logit, centring, and bits per dimension."""

import math
from functools import partial

import pytest
import torch
from scipy import integrate

from cnf_lab.errors import ConfigError
from cnf_lab.flows import (
    Centre,
    Chain,
    Flow,
    Gaussianise,
    Logit,
    NoPreprocess,
    StandardNormal,
    UniformDequantiser,
    VariationalDequantiser,
)
from cnf_lab.metrics import bits_per_dim

SHAPE = (2, 3, 3)
LEVELS = 256
LAYERS = {
    "logit": partial(Logit, SHAPE, 0.05, LEVELS),
    "tiny-alpha": partial(Logit, SHAPE, 1e-6, LEVELS),
    "centre": partial(Centre, SHAPE, LEVELS),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def dequantised(batch=4):
    return LEVELS * torch.rand(batch, *SHAPE, dtype=torch.float64)


def pixels(batch=4, levels=LEVELS):
    return torch.randint(0, levels, (batch, *SHAPE)).double()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -- fixed layers ---------------------------------------------------------------------------------


def test_the_originals_logit_is_reproduced(reference):
    case = reference("squeeze_and_logit")
    layer = Logit((1, 2, 2), float(case["alpha"]), LEVELS).double()
    z, log_det = layer.to_latent(case["u"] * LEVELS)
    torch.testing.assert_close(z, case["logit"])
    torch.testing.assert_close(log_det + 4 * math.log(LEVELS), case["log_det"][:, 0])


@each_layer
def test_log_det_is_that_of_the_jacobian_both_ways(make):
    layer, y = make().double(), dequantised()
    z, log_det = layer.to_latent(y)
    back, inverse = layer.to_data(z)
    torch.testing.assert_close(back, y, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(inverse, -log_det, rtol=1e-9, atol=1e-7)
    slopes = torch.autograd.functional.jvp(lambda v: layer.to_latent(v)[0], y, torch.ones_like(y))[1]
    torch.testing.assert_close(log_det, slopes.log().flatten(1).sum(1))


def test_a_small_alpha_keeps_its_digits_in_float32():
    exact = Logit((1, 1, 1), 1e-6, LEVELS).double()
    y = torch.tensor([0.0, 1e-4, 255.9999, 256.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    for single, double in zip(Logit((1, 1, 1), 1e-6, LEVELS).to_latent(y), exact.to_latent(y), strict=True):
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=0)


def test_latents_beyond_the_pixels_stay_finite():
    layer = Logit((1, 1, 1), 0.01, LEVELS)
    y, log_det = layer.to_data(torch.tensor([-1e3, -30.0, 30.0, 1e3]).reshape(-1, 1, 1, 1))
    assert y.isfinite().all()
    assert log_det.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ConfigError, match="between 0 and 0.5"):
        Logit(SHAPE, alpha, LEVELS)


# -- dequantisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [UniformDequantiser, VariationalDequantiser])
def test_dequantised_pixels_stay_in_their_cells(kind, randomise):
    dequantiser, x = randomise(kind(SHAPE, LEVELS).double(), 0.05), pixels(50)
    y, _ = dequantiser(x, seeded())
    assert torch.equal(y.floor(), x)
    assert torch.equal(dequantiser(x, seeded())[0], y)
    assert not torch.equal(dequantiser(x, seeded(1))[0], y)


def test_uniform_noise_is_uniform():
    y, log_q = UniformDequantiser(SHAPE, LEVELS).double()(pixels(4000), seeded())
    noise = y % 1
    assert not log_q.any()
    count = noise.numel()
    assert abs(noise.mean() - 0.5) < 4 / math.sqrt(12 * count)
    assert abs(noise.square().mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / count)


def test_variational_noise_starts_uniform():
    x = pixels()
    y, log_q = VariationalDequantiser(SHAPE, LEVELS).double()(x, seeded())
    torch.testing.assert_close(log_q, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(y, UniformDequantiser(SHAPE, LEVELS).double()(x, seeded())[0])


def test_log_q_is_the_density_of_the_noise(randomise):
    """Against a histogram's exact integral: the density of one pixel's noise, inverted by hand, has mass 1."""
    dequantiser = randomise(VariationalDequantiser((1, 1, 1), LEVELS, width=4))
    x = torch.tensor([[[[17.0]]]], dtype=torch.float64)
    shift, log_scale = dequantiser.network(2 * x / (LEVELS - 1) - 1).flatten().tolist()

    def density(u):
        logistic = (math.log(u / (1 - u)) - shift) / math.exp(log_scale)
        share = 1 / (1 + math.exp(-logistic))
        return share * (1 - share) / math.exp(log_scale) / (u * (1 - u))

    assert integrate.quad(density, 1e-12, 1 - 1e-12, limit=200)[0] == pytest.approx(1, abs=1e-6)
    y, log_q = (part.detach() for part in dequantiser(x.expand(20, 1, 1, 1), seeded()))
    expected = [math.log(density(float(u))) for u in (y % 1).flatten()]
    torch.testing.assert_close(log_q, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_both_bounds_are_below_the_probability_and_the_better_noise_is_closer():
    """A linear density on one pixel, whose probabilities are integrals known in closed form."""
    levels = 4

    def log_density(y):  # on [0, 4): steep within a cell
        return torch.log(y / 8)

    x = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    truth = torch.log((2 * x.flatten() + 1) / 16)
    uniform = UniformDequantiser((1, 1, 1), levels).double()
    variational = VariationalDequantiser((1, 1, 1), levels).double()
    optimiser, generator = torch.optim.Adam(variational.parameters(), 1e-2), seeded()

    def bound(dequantiser, draws):
        y, log_q = dequantiser(x.repeat(draws, 1, 1, 1), generator)
        return (log_density(y).flatten() - log_q).reshape(draws, -1).mean(0)

    for _ in range(300):
        optimiser.zero_grad()
        (-bound(variational, 64).mean()).backward()
        optimiser.step()
    with torch.no_grad():
        loose, close = bound(uniform, 20000), bound(variational, 20000)
    assert (loose < truth).all()
    assert (close < truth + 0.01).all()
    assert (close - truth).abs().sum() < 0.3 * (loose - truth).abs().sum()


def test_levels_that_make_no_pixel():
    with pytest.raises(ConfigError, match=r"recipe\.levels of at least 2, got 1"):
        UniformDequantiser(SHAPE, 1)


# -- bits per dimension ---------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [256, 17])
def test_a_uniform_model_scores_the_logarithm_of_the_levels(levels):
    """Margins to uniform, then to normal: a flow that is uniform on [0, L)^D scores log2 L exactly, 8 for bytes."""

    class Uniform(NoPreprocess):
        def to_latent(self, x):
            z = torch.special.ndtri(x / levels)
            log_normal = -0.5 * (z.square() + math.log(2 * math.pi))
            return z, (-math.log(levels) - log_normal).flatten(1).sum(1)

    flow = Flow(Chain([Uniform(SHAPE)]), StandardNormal(SHAPE), dequantiser=UniformDequantiser(SHAPE, levels)).double()
    y, log_q = flow.dequantise(pixels(8, levels), seeded())
    nll = log_q - flow.log_prob(y)
    expected = torch.full((8,), math.log2(levels), dtype=torch.float64)
    torch.testing.assert_close(bits_per_dim(nll, 18), expected, rtol=1e-12, atol=0)


def test_gaussianised_margins_score_the_entropy_of_the_margins():
    """Independent pixels: the mean bits/dim tends to the pixels' own entropy."""
    torch.manual_seed(1)
    probabilities = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    x = torch.multinomial(probabilities, 20000, replacement=True).double().reshape(-1, 1, 1, 1)
    flow = Flow(
        Chain([Gaussianise((1, 1, 1))]), StandardNormal((1, 1, 1)), dequantiser=UniformDequantiser((1, 1, 1), 4)
    ).double()
    y, _ = flow.dequantise(x, seeded())
    flow.transform.transforms[0].fit([y])
    entropy = float(-(probabilities * probabilities.log2()).sum())
    assert bits_per_dim(-flow.log_prob(y).mean(), 1).item() == pytest.approx(entropy, abs=0.02)


def test_rows_without_a_dequantiser_stay_as_they_are():
    flow, x = Flow(Chain([NoPreprocess((3,))]), StandardNormal((3,))), torch.randn(2, 3)
    y, log_q = flow.dequantise(x)
    assert y is x
    assert not log_q.any()
