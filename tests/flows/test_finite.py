"""The baselines keep what every transform keeps, and are zuko's own densities."""

import sys

import pytest
import torch

from cnf_lab.errors import ConfigError
from cnf_lab.flows import (
    FiniteTransform,
    Flow,
    Integrand,
    MovingBatchNorm,
    NoPreprocess,
    Standardise,
    StandardNormal,
    maf_flow,
    nsf_flow,
    realnvp_flow,
)

zuko = pytest.importorskip("zuko")

KINDS = {"realnvp": realnvp_flow, "maf": maf_flow, "nsf": nsf_flow}
THEIRS = {"realnvp": zuko.flows.RealNVP, "maf": zuko.flows.MAF, "nsf": zuko.flows.NSF}
SIZES = {"transforms": 3, "hidden": [9, 8], "context_width": 6}


class Time(Integrand):
    """The length of the way."""

    def __call__(self, t, x, found):
        return x.new_ones(len(x))


def build(kind, shape=(3,), context_features=0, preprocess=(NoPreprocess,), **options):
    return KINDS[kind](shape, context_features, list(preprocess), **SIZES | options)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=[0, 2], ids=["plain", "conditional"])
def context(request):
    return torch.randn(6, request.param, dtype=torch.float64) if request.param else None


@pytest.fixture(params=[(3,), (1,), (2, 1, 2)], ids=str)
def flow(request, kind, context, randomise):
    return randomise(build(kind, request.param, 0 if context is None else 2)).eval()


@pytest.fixture
def x(flow):
    return 2 * torch.randn(6, *flow.event_shape, dtype=torch.float64)


def test_log_det_is_that_of_the_jacobian(flow, x, context):
    def latent(row, condition):
        return flow.pull_back(row[None], condition).value[0].flatten()

    conditions = [None] * len(x) if context is None else context.split(1)
    jacobians = [
        torch.autograd.functional.jacobian(lambda row, c=c: latent(row, c), row).flatten(1)
        for row, c in zip(x, conditions, strict=True)
    ]
    expected = torch.linalg.slogdet(torch.stack(jacobians)).logabsdet
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(flow.pull_back(x, context).log_det, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_push_forward_is_the_inverse_and_log_dets_cancel(flow, x, context):
    there = flow.pull_back(x, context)
    back = flow.push_forward(there.value, context)
    sample = flow.push_forward(there.value, context, with_log_det=False)
    assert (there.value - x).abs().max() > 1e-2
    torch.testing.assert_close(back.value, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(sample.value, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=1e-8, atol=1e-8)
    assert sample.log_det.eq(0).all()
    assert there.solves == back.solves == ()


@torch.no_grad()
def test_log_prob_is_that_of_zuko(kind, context, randomise):
    features = 0 if context is None else 2
    theirs = randomise(THEIRS[kind](3, features, transforms=2, hidden_features=(8,))).eval()
    ours = Flow(FiniteTransform(theirs.transform), StandardNormal((3,)), features)
    x = 2 * torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(x, context), theirs(context).log_prob(x), rtol=1e-12, atol=1e-12)


def test_every_parameter_gets_a_gradient(flow, x, context):
    flow.train().log_prob(x, context).mean().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    total = sum(float(parameter.grad.abs().sum()) for parameter in flow.parameters())
    assert total > 0


@torch.no_grad()
def test_a_context_changes_the_density(kind, randomise):
    flow = randomise(build(kind, context_features=2)).eval()
    x, context = torch.randn(2, 4, 3, dtype=torch.float64)
    log_prob = flow.log_prob(x, context[:, :2])
    assert (flow.log_prob(x, context[:, :2] + 1) - log_prob).abs().min() > 1e-6
    one = flow.log_prob(x[:1], context[:1, :2])
    torch.testing.assert_close(one, log_prob[:1], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_sizes_are_those_of_the_options(kind):
    flow = build(kind, (4,), 3, (Standardise, NoPreprocess), transforms=5, hidden=[7, 11, 13])
    first, second, finite = flow.transform.transforms
    assert (type(first), type(second)) == (Standardise, NoPreprocess)
    assert len(finite.transform.transforms) == 5
    for part in finite.transform.transforms:
        widths = [layer.out_features for layer in part.hyper if hasattr(layer, "out_features")]
        assert widths[:-1] == [7, 11, 13]
    assert flow.context_encoder(torch.randn(4, 3)).shape == (4, 6)
    assert flow.sample(5, torch.randn(1, 3)).shape == (5, 4)


def test_bins_of_a_spline():
    last = [build("nsf", bins=bins).transform.transforms[-1].transform.transforms[0].hyper[-1] for bins in (4, 16)]
    assert [layer.out_features for layer in last] == [3 * (3 * bins - 1) for bins in (4, 16)]


@torch.no_grad()
def test_data_and_latent_end_of_the_trajectory(flow, x, context):
    states = flow.trajectory(x, context, points=7)
    assert len(states) == 3  # latent, the one map, and no preprocess
    torch.testing.assert_close(states[-1], flow.push_forward(x, context).value)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_low_precision_is_for_training_only(kind, training):
    flow = build(kind, context_features=2).train(training)
    x, context = torch.randn(8, 3), torch.randn(8, 2)
    encoded = flow.context_encoder(context)
    full = flow.transform.pull_back(x, encoded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = flow.transform.pull_back(x, encoded)
        back = flow.transform.push_forward(low.value, encoded.bfloat16())
    assert {tensor.dtype for tensor in (low.value, low.log_det, back.value, back.log_det)} == {torch.float32}
    assert low.value.equal(full.value) != training
    torch.testing.assert_close(low.value, full.value, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transforms": 0}, r"model\.transforms of at least 1, got 0\. Type model\.transforms=5\."),
        (
            {"hidden": []},
            r"model\.hidden with at least one positive width, got \[\]\. Type model\.hidden=\[128,128\]\.",
        ),
        ({"hidden": [8, 0]}, r"model\.hidden with at least one positive width, got \[8, 0\]\."),
        ({"normalisation": MovingBatchNorm}, r"no normalisation .* Type normalisation=none\."),
    ],
)
def test_options_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        build(kind, **options)


def test_one_bin_is_refused():
    with pytest.raises(ConfigError, match=r"model\.bins of at least 2, got 1\. Type model\.bins=8\."):
        build("nsf", bins=1)


def test_nothing_can_be_integrated_along_the_way(kind):
    with pytest.raises(ConfigError, match=r"no regulariser .* got Time\. Type regulariser=none\."):
        build(kind).pull_back(torch.randn(4, 3), integrands=[Time()])


def test_a_missing_package_is_one_line(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ConfigError) as error:
        build(kind)
    assert str(error.value) == (
        f'Expected the package zuko for model={kind}, got none. Type pip install "cnf-lab[peers]".'
    )
