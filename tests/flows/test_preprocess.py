"""Fixed layers next to the data: moments, digits, log-dets and refusals."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from cnf_lab.errors import DataError
from cnf_lab.fields import Concat, Mlp, Tanh
from cnf_lab.flows import (
    Chain,
    ContextScaler,
    ContinuousFlow,
    Flow,
    NoPreprocess,
    Standardise,
    StandardNormal,
    Whiten,
)
from cnf_lab.flows.preprocess import moments
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact

FITTED = [Standardise, Whiten]
each_fitted = pytest.mark.parametrize("kind", FITTED)
CONSTANTS = [0.0, 1.0, 0.1, 1 / 3, -7.3e-5, 12345.678, 1e9 + 0.1]


@pytest.fixture
def rows():
    mixing = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, -1.0], [0.3, 0.0, 0.1]], dtype=torch.float64)
    return torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64) + torch.randn(500, 3, dtype=torch.float64) @ mixing


def fit(kind, rows, batches=7):
    layer = kind(tuple(rows.shape[1:])).double()
    layer.fit(rows.chunk(batches))
    return layer.eval()


@pytest.mark.parametrize("batches", [1, 2, 7, 500])
def test_moments_do_not_depend_on_the_batches(rows, batches):
    mean, covariance = moments(rows.chunk(batches))
    torch.testing.assert_close(mean, rows.mean(dim=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, rows.T.cov(correction=0), rtol=1e-12, atol=1e-12)


def test_standardise_gives_every_feature_mean_0_and_variance_1(rows):
    z = fit(Standardise, rows).pull_back(rows).value
    torch.testing.assert_close(z.mean(dim=0), z.new_zeros(3), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.var(dim=0, correction=0), z.new_ones(3), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.T.corrcoef(), rows.T.corrcoef(), rtol=1e-10, atol=1e-10)


@given(offset=st.floats(-1e6, 1e6), spread=st.floats(1e-3, 1e3), batches=st.integers(1, 9))
def test_any_offset_and_spread(offset, spread, batches):
    rows = offset + spread * torch.linspace(-1, 1, 100, dtype=torch.float64)[:, None].expand(-1, 2).clone()
    rows[:, 1] = rows[:, 1].roll(25)
    for kind in FITTED:
        layer = fit(kind, rows, batches)
        mapped = layer.pull_back(rows)
        identity = torch.eye(2, dtype=torch.float64)
        if kind is Whiten:
            torch.testing.assert_close(mapped.value.T.cov(correction=0), identity, rtol=0, atol=1e-6)
        torch.testing.assert_close(mapped.value.var(dim=0, correction=0), identity.sum(dim=0), rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.push_forward(mapped.value).value, rows, rtol=1e-12, atol=1e-9 * spread)


def test_whiten_gives_the_identity_as_covariance(rows):
    layer = fit(Whiten, rows)
    z = layer.pull_back(rows).value
    torch.testing.assert_close(z.mean(dim=0), z.new_zeros(3), rtol=0, atol=1e-11)
    torch.testing.assert_close(z.T.cov(correction=0), torch.eye(3, dtype=z.dtype), rtol=0, atol=1e-11)


@each_fitted
@pytest.mark.parametrize("event", [(3,), (3, 2, 2)], ids=["rows", "images"])
def test_inverse_and_log_det(kind, event):
    data = torch.randn(200, *event, dtype=torch.float64).cumsum(dim=1) + 2
    layer, x = fit(kind, data), data[:4]
    there = layer.pull_back(x)
    back = layer.push_forward(there.value)
    torch.testing.assert_close(back.value, x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=0, atol=0)
    jacobian = torch.autograd.functional.jacobian(lambda y: layer.pull_back(y[None]).value[0], x[0])
    size = x[0].numel()
    expected = torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet
    torch.testing.assert_close(there.log_det, expected.expand(4), rtol=1e-11, atol=1e-11)


@each_fitted
@pytest.mark.parametrize("batches", [1, 4])
def test_a_small_spread_around_a_huge_mean_keeps_its_digits(kind, batches):
    spread = 1e-2 * torch.randn(1000, 2, dtype=torch.float64)
    rows = 1e9 + spread
    centred = rows - 1e9  # without error
    layer = fit(kind, rows, batches)
    z = layer.pull_back(rows).value
    # The mean has the digits of a float64 near 1e9: 1e-7, or 1e-5 deviations.
    torch.testing.assert_close(z.mean(dim=0), z.new_zeros(2), rtol=0, atol=2e-5)
    torch.testing.assert_close(z.T.cov(correction=0).diagonal(), z.new_ones(2), rtol=0, atol=1e-9)
    expected = (
        -0.5
        * torch.linalg.slogdet(
            centred.T.cov(correction=0) if kind is Whiten else centred.var(dim=0, correction=0).diag()
        ).logabsdet
    )
    torch.testing.assert_close(layer.pull_back(rows).log_det, expected.expand(1000), rtol=1e-9, atol=0)
    torch.testing.assert_close(layer.push_forward(z).value, rows, rtol=1e-15, atol=0)


@each_fitted
def test_float32_flow_computes_in_float64(kind):
    rows = 1e9 + 1e-2 * torch.randn(1000, 2, dtype=torch.float64)
    layer = kind((2,))
    layer.fit([rows])
    mapped = layer.pull_back(rows)
    assert mapped.value.dtype == mapped.log_det.dtype == torch.float32
    assert layer.mean.dtype == torch.float64
    torch.testing.assert_close(mapped.value, fit(kind, rows, 1).pull_back(rows).value.float(), rtol=1e-5, atol=1e-5)


@each_fitted
@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("batches", [1, 7])
def test_a_constant_column_is_named(kind, constant, dtype, batches):
    rows = torch.randn(997, 3, dtype=dtype)
    rows[:, 1] = constant
    with pytest.raises(DataError, match=r"Expected features that vary .*, got constant features number \[1\]\. Drop"):
        kind((3,)).fit(rows.chunk(batches))


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (3.0, 1e-3), (1e3, 1.0)])
def test_columns_that_determine_one_another_are_refused(offset, scale):
    rows = offset + scale * torch.randn(500, 3, dtype=torch.float64)
    rows[:, 2] = rows[:, 0] - 2 * rows[:, 1]
    with pytest.raises(DataError, match=r"Expected features that do not determine one another.*preprocess=standardise"):
        Whiten((3,)).fit([rows])
    Standardise((3,)).fit([rows])


def test_columns_of_very_different_size_are_not_refused():
    rows = torch.randn(500, 3, dtype=torch.float64) * torch.tensor([1e-5, 1.0, 1e5], dtype=torch.float64)
    z = fit(Whiten, rows, 1).pull_back(rows).value
    torch.testing.assert_close(z.T.cov(correction=0), torch.eye(3, dtype=z.dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_no_preprocess_hands_on_in_the_flows_dtype(rows, dtype):
    layer = NoPreprocess((3,)).to(dtype)
    layer.fit([rows])
    for mapped in (layer.pull_back(rows), layer.push_forward(rows.to(dtype))):
        assert mapped.value.equal(rows.to(dtype))
        assert mapped.log_det.equal(torch.zeros(500, dtype=dtype))


@pytest.mark.parametrize("kind", [Standardise, Whiten, NoPreprocess])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=["float32", "float64"])
@torch.no_grad()
def test_the_flow_has_the_dtype_of_its_weights_whatever_the_datas(rows, kind, precision):
    layer = kind((3,))
    layer.fit([rows])
    block = ContinuousFlow(Mlp((3,), [4], Concat, Tanh), RungeKuttaSolver("dopri5", 1e-6, 1e-6), Exact())
    flow = Flow(Chain([layer, block]), StandardNormal((3,))).to(precision).eval()
    reference = None
    for data in (rows[:5], rows[:5].float()):
        log_prob = flow.log_prob(data)
        assert log_prob.dtype == precision
        reference = log_prob if reference is None else reference
        torch.testing.assert_close(log_prob, reference, rtol=1e-4, atol=1e-4)
    # Fixed layers hand on float64 rows: a large mean would eat the digits of a small spread.
    assert flow.sample(4).dtype == (precision if kind is NoPreprocess else torch.float64)


def test_samples_and_round_trips_keep_the_digits_of_a_small_spread():
    rows = 1.7e9 + torch.randn(500, 1, dtype=torch.float64)
    layer = Standardise((1,))
    layer.fit([rows])
    layer.float()
    z = layer.pull_back(rows).value
    assert z.dtype == torch.float32
    torch.testing.assert_close(layer.push_forward(z).value, rows, rtol=0, atol=1e-5)


@each_fitted
def test_coefficients_are_saved(rows, kind):
    layer, other = fit(kind, rows), kind((3,)).double()
    other.load_state_dict(layer.state_dict())
    assert other.pull_back(rows).value.equal(layer.pull_back(rows).value)
    assert other.pull_back(rows).log_det.equal(layer.pull_back(rows).log_det)


def test_log_det_makes_the_density_one_of_the_data(rows):
    flow = Flow(fit(Whiten, rows), StandardNormal((3,))).double().eval()
    mean, covariance = moments([rows])
    truth = torch.distributions.MultivariateNormal(mean, covariance)
    torch.testing.assert_close(flow.log_prob(rows), truth.log_prob(rows), rtol=1e-10, atol=1e-10)


def test_context_scaler_standardises(rows):
    scaler = ContextScaler(3)
    scaler.fit(rows.chunk(4))
    scaled = scaler(rows)
    assert scaled.dtype == torch.float32
    assert scaler.double()(rows).dtype == torch.float64
    torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(scaled.std(dim=0, correction=0), torch.ones(3), rtol=0, atol=1e-6)
    other = ContextScaler(3)
    other.load_state_dict(scaler.state_dict())
    assert nn.Sequential(other)(rows).equal(scaled)


def test_context_scaler_keeps_the_digits_of_a_timestamp():
    seconds = 1.7e9 + torch.arange(100, dtype=torch.float64)[:, None]
    scaler = ContextScaler(1)
    scaler.fit([seconds])
    step = scaler(seconds).diff(dim=0)
    torch.testing.assert_close(step, torch.full_like(step, 1 / math.sqrt((100**2 - 1) / 12)), rtol=1e-4, atol=0)


def test_context_scaler_names_a_constant_column(rows):
    rows[:, 2] = 0.1
    with pytest.raises(DataError, match=r"constant .*\[2\]"):
        ContextScaler(3).fit([rows])


@pytest.mark.parametrize("layer", [Standardise, Whiten, NoPreprocess])
def test_a_layer_comes_back_from_another_precision(layer):
    """Fitted numbers stay float64; what the layer returns follows the flow, there and back."""
    made = layer((3,))
    made.fit([torch.randn(50, 3)])
    x = torch.randn(4, 3)
    before = made.to_latent(x)[0]
    assert made.double().to_latent(x)[0].dtype == torch.float64
    after = made.float().to_latent(x)[0]
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before, rtol=0, atol=0)
