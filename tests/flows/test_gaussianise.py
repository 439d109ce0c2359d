"""Layers that make rows look normal: against scipy, autograd Jacobians and what they promise."""

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given

from cnf_lab.errors import ConfigError, DataError
from cnf_lab.flows import Gaussianise, RadialGaussianise
from cnf_lab.flows.gaussianise import _thinned
from cnf_lab.flows.splines import fit_knots, inverse_spline, log_chi_quantile, spline


def increasing(rng, columns, knots):
    return torch.from_numpy(rng.uniform(0.05, 2.0, (columns, knots)).cumsum(axis=1) - 3)


@given(seed=st.integers(0, 10_000), columns=st.integers(1, 4), knots=st.integers(3, 12))
def test_splines_go_up_and_come_back(seed, columns, knots):
    rng = np.random.default_rng(seed)
    x, y = increasing(rng, columns, knots), increasing(rng, columns, knots)
    slope = torch.from_numpy(rng.uniform(0.05, 5.0, (columns, knots)))
    v = torch.linspace(-30, 30, 401, dtype=torch.float64)[:, None].repeat(1, columns)
    value, log_slope = spline(v, x, y, slope)
    back, log_inverse = inverse_spline(value, x, y, slope)
    assert (value.diff(dim=0) > 0).all()
    torch.testing.assert_close(back, v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_inverse, -log_slope, rtol=1e-7, atol=1e-7)


@given(seed=st.integers(0, 10_000))
def test_slopes_are_derivatives_and_knots_are_met(seed):
    rng = np.random.default_rng(seed)
    x, y = increasing(rng, 2, 6), increasing(rng, 2, 6)
    slope = torch.from_numpy(rng.uniform(0.05, 5.0, (2, 6)))
    v = torch.linspace(-5, 12, 101, dtype=torch.float64)[:, None].repeat(1, 2).requires_grad_()
    value, log_slope = spline(v, x, y, slope)
    (derivative,) = torch.autograd.grad(value.sum(), v)
    torch.testing.assert_close(log_slope.exp(), derivative, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(spline(x.mT, x, y, slope)[0], y.mT, rtol=1e-12, atol=1e-12)


def test_knots_are_quantiles():
    columns = torch.from_numpy(np.random.default_rng(0).gamma(2.0, size=(4000, 2)))
    x, y, _ = fit_knots(columns, torch.special.ndtri, 33)
    wanted = np.quantile(columns.numpy(), scipy.stats.norm.cdf(y[0].numpy()), axis=0).T
    np.testing.assert_allclose(x.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("degrees", [1, 2, 63])
def test_quantiles_of_the_log_norm(degrees):
    p = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    wanted = np.log(scipy.stats.chi(degrees).ppf(p.numpy()))
    np.testing.assert_allclose(log_chi_quantile(p, degrees).numpy(), wanted, rtol=1e-10, atol=1e-12)


def skewed(rows=4000, features=3):
    rng = np.random.default_rng(1)
    scale = rng.lognormal(0.0, 1.0, (rows, 1))
    return torch.from_numpy(scale * rng.standard_t(5, (rows, features)))


@pytest.fixture(params=[Gaussianise, RadialGaussianise, lambda shape: RadialGaussianise(shape, 16, 0.7)])
def layer(request):
    rows = skewed()
    layer = request.param((3,)).double()
    layer.fit(rows.split(1000))
    return layer


def test_log_det_is_that_of_the_jacobian(layer):
    x = 3 * torch.randn(20, 3, dtype=torch.float64)
    value, log_det = layer.to_latent(x)
    for row, one, number in zip(x, value, log_det, strict=True):
        jacobian = torch.func.jacrev(lambda r: layer.to_latent(r[None])[0][0])(row)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, number, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer.to_data(one[None])[0][0], row, rtol=1e-9, atol=1e-9)


def test_far_rows_and_tiny_rows_come_back(layer):
    x = torch.randn(50, 3, dtype=torch.float64) * torch.logspace(-12, 4, 50, dtype=torch.float64)[:, None]
    x[0] = 0.0
    value, log_det = layer.to_latent(x)
    back, log_inverse = layer.to_data(value)
    assert torch.isfinite(log_det).all()
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-14 if isinstance(layer, RadialGaussianise) else 1e-9)
    torch.testing.assert_close(log_inverse, -log_det, rtol=1e-7, atol=1e-7)


def test_features_become_normal():
    rows = skewed(20_000)
    layer = Gaussianise((3,)).double()
    layer.fit([rows])
    z = layer.to_latent(rows)[0].numpy()
    for column in z.T:
        assert scipy.stats.kstest(column, "norm").statistic < 0.003
    assert scipy.stats.kstest(rows.numpy()[:, 0], "norm").statistic > 0.05


def test_norms_become_those_of_normal_rows_and_directions_stay():
    rows = skewed(20_000)
    layer = RadialGaussianise((3,)).double()
    layer.fit(rows.split(700))
    z = layer.to_latent(rows)[0]
    assert scipy.stats.kstest(z.norm(dim=1).numpy(), scipy.stats.chi(3).cdf).statistic < 0.003
    torch.testing.assert_close(torch.nn.functional.normalize(z), torch.nn.functional.normalize(rows))


def test_a_scale_mixture_gets_its_true_density():
    """x = s n with a log-normal scale s: only the norm's distribution is to be learned."""
    rng, features = np.random.default_rng(2), 5
    rows = torch.from_numpy(rng.lognormal(0, 0.8, (100_000, 1)) * rng.normal(size=(100_000, features)))
    layer = RadialGaussianise((features,)).double()
    layer.fit([rows])
    value, log_det = layer.to_latent(rows)
    found = torch.distributions.Normal(0, 1).log_prob(value).sum(dim=1) + log_det
    log_s = torch.linspace(-5, 5, 801, dtype=torch.float64)
    weight = torch.distributions.Normal(0.0, 0.8).log_prob(log_s) + np.log(10 / 800)
    squared = rows[:2000].square().sum(dim=1, keepdim=True)
    normal = -0.5 * squared * (-2 * log_s).exp() - features * (log_s + 0.5 * np.log(2 * np.pi))
    truth = torch.logsumexp(normal + weight, dim=1)
    torch.testing.assert_close(found[:2000].mean(), truth.mean(), rtol=0, atol=0.01)


def test_strength_keeps_a_share_of_the_variation():
    rows = skewed(20_000)
    spreads = []
    for strength in (0.5, 0.75, 1.0):
        layer = RadialGaussianise((3,), strength=strength).double()
        layer.fit([rows])
        spreads.append(float(layer.to_latent(rows)[0].norm(dim=1).log().std()))
    log_norm = rows.norm(dim=1).log().std()
    assert spreads[0] > spreads[1] > spreads[2]
    assert spreads[0] == pytest.approx(0.5 * float(log_norm) + 0.5 * spreads[2], rel=0.02)


def test_images_and_float32():
    rows = skewed(500, 8).float().reshape(500, 2, 2, 2)
    for kind in (Gaussianise, RadialGaussianise):
        layer = kind((2, 2, 2))
        layer.fit([rows])
        value, log_det = layer.to_latent(rows)
        assert value.shape == rows.shape
        assert value.dtype == log_det.dtype == torch.float32
        again = kind((2, 2, 2))
        again.load_state_dict(layer.state_dict())
        torch.testing.assert_close(again.to_latent(rows)[0], value, rtol=0, atol=0)
        assert again.x.dtype == torch.float64
        torch.testing.assert_close(layer.to_data(value)[0].float(), rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "knots"), [(30, 8), (2700, 17), (90_000, 100), (1_000_000, 256)])
def test_the_number_of_knots_comes_from_the_rows_and_from_the_checkpoint(rows, knots):
    layer = RadialGaussianise((2,))
    layer.fit([torch.randn(rows, 2)])
    again = RadialGaussianise((2,))
    again.load_state_dict(layer.state_dict())
    assert again.x.shape == layer.x.shape == (1, knots)
    x = torch.randn(5, 2)
    assert torch.equal(again.to_latent(x)[0], layer.to_latent(x)[0])


REPEATS = {
    "few integers": lambda rng: rng.integers(0, 3, 30),
    "binary": lambda rng: rng.integers(0, 2, 2000),
    "rare ones": lambda rng: np.arange(10_000) >= 9_995,
    "zero-inflated": lambda rng: np.where(rng.random(5000) < 0.6, 0.0, rng.lognormal(size=5000)),
    "saturated": lambda rng: np.minimum(rng.random(5000), 0.9),
    "saturated but for five": lambda rng: np.append(np.minimum(rng.random(5000), 0.9), np.linspace(0.91, 1, 5)),
    "one outlier": lambda rng: np.append(rng.normal(size=5000), 1e6),
}


@pytest.mark.parametrize("kind", REPEATS)
def test_repeated_values_and_outliers_give_no_jump(kind):
    column = torch.as_tensor(REPEATS[kind](np.random.default_rng(0)), dtype=torch.float64)[:, None]
    rows = torch.cat([column, torch.randn(len(column), 1, dtype=torch.float64)], dim=1)
    layer = Gaussianise((2,)).double()
    layer.fit([rows])
    span = column.max() - column.min()
    unseen = torch.linspace(0, 1.5, 101, dtype=torch.float64) * span + column.min()
    for x in (rows, torch.stack([unseen, torch.zeros_like(unseen)], dim=1)):
        value, log_det = layer.to_latent(x)
        assert torch.isfinite(log_det).all()
        assert value.abs().max() < 15
        torch.testing.assert_close(layer.to_data(value)[0], x, rtol=1e-9, atol=1e-9 * float(span))
    assert 0.05 < layer.to_latent(rows)[0][:, 0].std() < 2.0


def test_norms_that_hardly_differ():
    rows = torch.nn.functional.normalize(torch.randn(5000, 3, dtype=torch.float64))
    rows[:5] *= 2
    layer = RadialGaussianise((3,)).double()
    layer.fit([rows])
    value, log_det = layer.to_latent(rows)
    assert torch.isfinite(log_det).all()
    torch.testing.assert_close(layer.to_data(value)[0], rows, rtol=1e-9, atol=1e-9)


def test_wide_rows_are_thinned_to_what_fits(monkeypatch):
    monkeypatch.setattr("cnf_lab.flows.gaussianise._MOST_NUMBERS", 400)
    kept = _thinned(torch.arange(3000.0).reshape(100, 30).split(7))
    assert 400 // 60 <= len(kept) <= 400 // 30
    assert kept[:, 0].diff().unique().numel() == 1


@pytest.mark.parametrize("sizes", [[7], [3, 4, 5, 1], [1] * 23])
def test_many_rows_are_thinned_evenly(sizes, monkeypatch):
    monkeypatch.setattr("cnf_lab.flows.gaussianise._MOST_ROWS", 5)
    numbers = torch.arange(sum(sizes), dtype=torch.float64)[:, None]
    kept = _thinned(numbers.split(sizes)).flatten()
    assert 2 <= len(kept) <= 5
    assert len(kept.diff().unique()) == 1
    assert kept[0] == 0


def test_refusals():
    rows = torch.randn(50, 3, dtype=torch.float64)
    rows[:, 1] = 4.0
    with pytest.raises(DataError, match="constant features number \\[1\\]"):
        Gaussianise((3,)).fit([rows])
    with pytest.raises(DataError, match="one norm"):
        RadialGaussianise((3,)).fit([torch.nn.functional.normalize(torch.randn(9, 3))[:1].repeat(9, 1)])
    with pytest.raises(ConfigError, match="strength"):
        RadialGaussianise((3,), strength=0.0)
    with pytest.raises(ConfigError, match="knots"):
        Gaussianise((3,), knots=2)
