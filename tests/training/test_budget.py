"""Error budgets on flows and autoencoders whose numbers are known: they hold the truth, alone and together."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy import stats

from cnf_lab.data.base import ArrayRows
from cnf_lab.fields import Identity, Ignore, Mlp
from cnf_lab.flows import Chain, ContinuousFlow, Flow, NoPreprocess, StandardNormal, UniformDequantiser
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact
from cnf_lab.training.budget import (
    Budget,
    budget,
    less,
    of_draws,
    of_errors,
    of_solver,
    of_some,
    quantile,
)
from cnf_lab.training.checks import Evaluated
from cnf_lab.training.evaluation import autoencoder_findings, findings, flow_findings
from cnf_lab.training.evaluation_table import table, warnings
from cnf_lab.training.likelihoods import jackknife_error, sample_size
from cnf_lab.training.settings import Settings
from cnf_lab.training.shares import EvenRows, Shares, in_order

TRIALS, HELD = 100, 95
MATRIX = torch.tensor([[-1.4, 1.3, 0.2], [-1.1, -0.3, 0.6], [0.5, -0.7, -1.2]], dtype=torch.float64)
OFFSET = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64)
LEVELS = 8
SLOW = pytest.mark.slow


def computed(tolerance=1e-5, precision="float64", divergence="exact", probes=4, draws=1):
    return Settings("dopri8", tolerance, tolerance, precision, divergence, probes, draws)


def gaussian_flow(pixels=False):
    """A flow by dx/dt = A x + b, whose density is a Gaussian's."""
    field = Mlp((3,), [3], Ignore, Identity).double()
    for parameter in field.parameters():
        torch.nn.init.zeros_(parameter)
    field.stack.layers[0].linear.weight.data.copy_(torch.eye(3))
    field.stack.layers[1].linear.weight.data.copy_(MATRIX)
    field.stack.layers[1].linear.bias.data.copy_(OFFSET)
    block = ContinuousFlow(field, RungeKuttaSolver("dopri5", 1e-6, 1e-6), Exact())
    dequantiser = UniformDequantiser((3,), LEVELS) if pixels else None
    transform = Chain([NoPreprocess((3,)), block])
    return Flow(transform, StandardNormal((3,)), dequantiser=dequantiser).double().eval()


def affine():
    """Return E and s of z = E x + s."""
    system = torch.zeros(4, 4, dtype=torch.float64)
    system[:3, :3], system[:3, 3] = MATRIX, OFFSET
    end = torch.linalg.matrix_exp(system)
    return end[:3, :3], end[:3, 3]


def nll(mean, covariance=None):
    """Return E[NLL] of events with a mean (batch, 3) and a covariance, in nats."""
    matrix, shift = affine()
    square = (mean @ matrix.mT + shift).square().sum(dim=-1)
    if covariance is not None:
        square = square + (matrix @ covariance @ matrix.mT).trace()
    return square / 2 + 1.5 * math.log(2 * math.pi) - MATRIX.trace()


def noise():
    return torch.eye(3, dtype=torch.float64) / 12  # of uniform draws on the unit interval


def options(**changed):
    usual = {"check": None, "check_exact": None, "iwae_draws": 0, "iwae_limit": None, "digits": 2}
    return OmegaConf.create({**usual, "converge": False, "mass": False, **changed})


def all_of(x, seed, pass_rows=1000):
    return Evaluated(ArrayRows(np.asarray(x)), len(x), pass_rows, seed, Shares())


def found(model, x, settings, seed=0, **changed):
    return findings(model, all_of(x, seed), options(**changed), settings)


def tried(model, x, settings, seed=0, pass_rows=1000, **changed):
    """The same without the way back."""
    settings.apply(model)
    find = flow_findings if isinstance(model, Flow) else autoencoder_findings
    return find(model, all_of(x, seed, pass_rows), options(**changed), settings)


def data(seed, rows):
    """Rows of the flow's own density."""
    matrix, shift = affine()
    z = np.random.default_rng(seed).normal(size=(rows, 3))
    return (z - shift.numpy()) @ np.linalg.inv(matrix.numpy()).T


def pixels(seed, rows):
    return np.random.default_rng(seed).integers(0, LEVELS, (rows, 3)).astype(np.float64)


@dataclass
class Trials:
    """How often an interval held the truth."""

    held: int = 0
    widths: float = 0.0
    errors: float = 0.0

    def add(self, value, truth, width):
        self.held += abs(value - float(truth)) <= width
        self.widths += width / TRIALS
        self.errors += abs(value - float(truth)) / TRIALS

    def check(self, most_waste=20.0):
        assert self.held >= HELD
        # A budget that holds everything because it is huge is of no use.
        assert self.widths <= most_waste * self.errors


def test_rows_alone():
    trials, flow = Trials(), gaussian_flow()
    matrix, _ = affine()
    entropy = 1.5 * math.log(2 * math.pi * math.e) - torch.linalg.slogdet(matrix).logabsdet
    for seed in range(TRIALS):
        own = tried(flow, data(seed, 60), computed(), check=2).main
        trials.add(own.value, entropy, own.half_width)
    trials.check()


@pytest.mark.parametrize("probes", [1, 3])
@SLOW
def test_probes_alone(probes):
    """Of one probe only exact divergences of a few rows tell anything."""
    trials, flow = Trials(), gaussian_flow()
    x = data(0, 50)
    settings = computed(divergence="hutchinson", probes=probes)
    truth = nll(torch.from_numpy(x)).mean()
    for seed in range(TRIALS):
        own = tried(flow, x, settings, seed, check=10).main
        assert own.sources["solver"] < 1e-2 * own.sources["probes"]
        trials.add(own.value, truth, own.computation)
    trials.check()


@pytest.mark.parametrize(
    ("tolerance", "batch"),
    [
        pytest.param(3e-1, 20, marks=SLOW),
        (3e-1, 200),
        pytest.param(1e-2, 20, marks=SLOW),
        pytest.param(1e-4, 200, marks=SLOW),
    ],
)
def test_solver_alone(tolerance, batch):
    trials, flow = Trials(), gaussian_flow()
    for seed in range(TRIALS):
        x = data(seed, 200)
        settings = Settings("dopri5", tolerance, tolerance, "float64", "exact", 4, 1)
        own = tried(flow, x, settings, pass_rows=batch).main
        trials.add(own.value, nll(torch.from_numpy(x)).mean(), own.sources["solver"])
    trials.check(most_waste=50.0)


@SLOW
def test_float32_is_an_error_of_the_solver():
    trials, flow = Trials(), gaussian_flow()
    for seed in range(TRIALS):
        x = data(seed, 100)
        own = tried(flow, x, computed(1e-6, "float32"), pass_rows=25).main
        trials.add(own.value, nll(torch.from_numpy(x)).mean(), own.sources["solver"])
    trials.check(most_waste=50.0)


@pytest.mark.parametrize("draws", [1, pytest.param(3, marks=SLOW)])
def test_dequantisation_alone(draws):
    trials, flow = Trials(), gaussian_flow(pixels=True)
    x = pixels(0, 40)
    truth = nll(torch.from_numpy(x) + 0.5, noise()).mean() / (3 * math.log(2))
    single = Trials()
    for seed in range(TRIALS):
        budgets = tried(flow, x, computed(draws=draws), seed, check=20).budgets
        own = budgets["bits_per_dim"]
        first = budgets["bits_per_dim_uniform_1"] if draws > 1 else own
        trials.add(own.value, truth, own.computation)
        single.add(first.value, truth, first.computation)
    trials.check()
    single.check()


@SLOW
def test_importance_weights_of_dequantisation():
    """Against the mean of many such bounds."""
    flow, x, draws = gaussian_flow(pixels=True), pixels(0, 30), 8
    generator = torch.Generator().manual_seed(5)
    u = torch.rand(4000, draws, 30, 3, generator=generator, dtype=torch.float64)
    log_prob = -nll(torch.from_numpy(x) + u)
    bound = -(log_prob.logsumexp(dim=1) - math.log(draws)).mean() / (3 * math.log(2))
    trials = Trials()
    for seed in range(TRIALS):
        settings = computed(draws=draws)
        own = tried(flow, x, settings, seed, check=2).budgets["bits_per_dim_importance_weighted"]
        trials.add(own.value, bound, own.computation)
    trials.check()


def test_all_together():
    """Pixels drawn anew, one or two draws, probes, and a loose solve in float32."""
    flow = gaussian_flow(pixels=True)
    spread = torch.eye(3, dtype=torch.float64) * (LEVELS**2 - 1) / 12
    middle = torch.full((3,), LEVELS / 2, dtype=torch.float64)
    truth = nll(middle, spread + noise()) / (3 * math.log(2))
    trials, computed = Trials(), Trials()
    for seed in range(TRIALS):
        x = pixels(seed, 60)
        settings = Settings("dopri5", 1e-2, 1e-2, "float32", "hutchinson", 2, 1 + seed % 2)
        own = tried(flow, x, settings, seed, check=15, check_exact=5).main
        assert set(own.sources) == {"rows", "probes", "draws", "solver"}
        trials.add(own.value, truth, own.half_width)
        computed.add(own.value, nll(torch.from_numpy(x) + 0.5, noise()).mean() / (3 * math.log(2)), own.computation)
    trials.check()
    computed.check()


def elbo(model, x):
    """Return the ELBO of a linear Gaussian autoencoder in closed form."""
    with torch.no_grad():
        mean, variance = model.posterior.gaussian(model.encoder(model.likelihood.scaled(x)))
        weight, deviation = model.decoder.weight, model.likelihood.deviation
        error = x.flatten(1) - mean @ weight.mT - model.decoder.bias
        square = error.square().sum(dim=1) + (weight.square() @ variance.mT).sum(dim=0)
        reconstruction = -square / (2 * deviation**2) - 5 * math.log(deviation * math.sqrt(2 * math.pi))
        kl = 0.5 * (variance + mean.square() - 1 - variance.log()).sum(dim=1)
    return reconstruction - kl


@pytest.mark.parametrize("draws", [1, 2, 6])
def test_draws_of_a_posterior(linear_gaussian, draws):
    model = linear_gaussian()
    x = np.random.default_rng(0).normal(size=(40, 1, 1, 5))
    truth = -elbo(model, torch.from_numpy(x)).mean()
    trials = Trials()
    for seed in range(TRIALS):
        settings = computed(draws=draws)
        own = tried(model, x, settings, seed, check=20).main
        assert "solver" not in own.sources  # nothing is solved, and nothing rounded
        trials.add(own.value, truth, own.computation)
    trials.check()


def test_elbo_with_its_rows(linear_gaussian):
    model = linear_gaussian()
    many = torch.from_numpy(np.random.default_rng(999).normal(size=(200_000, 1, 1, 5)))
    truth, trials = -elbo(model, many).mean(), Trials()
    for seed in range(TRIALS):
        x = np.random.default_rng(seed).normal(size=(50, 1, 1, 5))
        own = tried(model, x, computed(), seed, check=20).main
        trials.add(own.value, truth, own.half_width)
    trials.check()


def test_importance_weighted_bound(linear_gaussian):
    """Against the mean of many bounds of as many draws; ELBO, bound and truth stand in order."""
    model, draws = linear_gaussian(), 20
    x = np.random.default_rng(0).normal(size=(30, 1, 1, 5))
    torch.manual_seed(1)
    with torch.no_grad():
        log_weight = torch.cat([model.terms(torch.from_numpy(x), 2000).log_weight for _ in range(20)])
    bound = -(log_weight.reshape(2000, draws, 30).logsumexp(dim=1) - math.log(draws)).mean()
    trials = Trials()
    for seed in range(TRIALS):
        settings = computed(draws=2)
        budgets = found(model, x, settings, seed, iwae_draws=draws, check=10).budgets
        own = budgets["negative_iwae_bound"]
        trials.add(own.value, bound, own.computation)
    trials.check()
    assert -model.truth(torch.from_numpy(x)).mean() < bound < budgets["negative_elbo"].value


# ------------------------------------------------------------------ parts


def test_half_widths_by_hand():
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    own = budget(values, "nats", {"solver": 0.5, "probes": 3.0, "draws": 4.0})
    rows = stats.t.ppf(0.995, 2) * values.std().item() / math.sqrt(3)
    assert own.value == pytest.approx(7 / 3)
    assert own.half_width == pytest.approx(rows + 0.5)
    assert own.computation == pytest.approx(5.5)
    halved = own.scaled(0.5, "bits/dim")
    assert halved.half_width == pytest.approx(own.half_width / 2)
    assert halved.unit == "bits/dim"
    assert quantile(math.inf) == pytest.approx(stats.norm.ppf(0.995))
    together = 3 * 21**2 / (1 + 16 + 256)
    assert of_errors(values, 3) == pytest.approx(stats.t.ppf(0.995, together) * math.sqrt(21) / 3)
    squares = values.square()
    upper = squares.mean() + stats.t.ppf(0.995, 2) * squares.std() / math.sqrt(3)
    assert of_some(values, 100) == pytest.approx(stats.norm.ppf(0.995) * math.sqrt(upper / 100))
    two = torch.stack([values, values + 2])
    assert of_draws(two, None) == of_errors(torch.full((3,), 1.0, dtype=torch.float64), 1)
    assert less(5.0, 3.0) == 4.0
    assert less(3.0, 5.0) == 0.0
    changes = torch.tensor([0.1, -0.3], dtype=torch.float64)
    assert of_solver(changes, 2) == pytest.approx(0.1 + 0.25 * 0.2)
    spread = stats.t.ppf(0.995, 1) * changes.std().item() * math.sqrt(1 / 2 - 1 / 8)
    assert of_solver(changes, 8) == pytest.approx(0.1 + 0.25 * 0.2 + spread)


def test_what_is_not_known_is_said():
    unknown = Budget(1.0, "nats", {"rows": 0.1, "solver": None})
    assert unknown.half_width is None
    assert unknown.computation is None
    assert budget(torch.ones(1), "nats", {}).half_width is None
    assert of_errors(torch.ones(3), 0) is None
    assert of_errors(torch.zeros(3), 1) == 0
    assert of_draws(torch.ones(1, 3), None) is None
    assert of_some(torch.ones(1), 5) is None
    assert less(None, 0.0) is None
    assert of_solver(torch.ones(1), 2) is None
    own = found(gaussian_flow(), data(0, 20), computed(), check=0)
    assert own.main.sources["solver"] is None
    assert "The error of nll from solver is not known. Type check=20." in warnings(own, 0)
    one = found(gaussian_flow(), data(0, 1), computed())
    assert one.main.half_width is None
    assert "The error of nll from rows is not known. Evaluate more rows." in warnings(one, 0)


@pytest.mark.parametrize("spread", [0.3, 3.0, 10.0])
def test_the_jackknife_sees_weights_that_outweigh_the_others(spread):
    """Against the deviation of many such means; the delta method cannot exceed one nat."""
    torch.manual_seed(0)
    log_weight = spread * torch.randn(10, 4000, dtype=torch.float64)
    truth = float((log_weight.logsumexp(dim=0)).std())
    assert 0.8 * truth < float(jackknife_error(log_weight).square().mean().sqrt()) < 1.4 * truth
    assert float(jackknife_error(torch.zeros(7, 2)).max()) < 1e-6
    assert bool(jackknife_error(torch.zeros(1, 2)).isnan().all())
    expected = log_weight.exp().sum(dim=0).square() / log_weight.exp().square().sum(dim=0)
    torch.testing.assert_close(sample_size(log_weight), expected)


def test_rows_that_are_sorted_by_how_hard_they_are():
    """The rows that are checked lie all over the set, and a batch holds rows of all of it."""
    trials, flow = Trials(), gaussian_flow()
    for seed in range(20):
        x = data(seed, 400)
        x = x[np.argsort(np.linalg.norm(x, axis=1))]
        settings = Settings("dopri5", 1e-2, 1e-2, "float64", "exact", 4, 1)
        own = tried(flow, x, settings, pass_rows=50).main
        trials.add(own.value, nll(torch.from_numpy(x)).mean(), own.sources["solver"])
    assert trials.held == 20


def test_batches_are_put_in_order():
    rows = ArrayRows(np.arange(23.0)[:, None])
    for batch_size in (1, 4, 23, 50):
        seen = Shares().by_batch(rows, batch_size, 20, lambda number, batch: batch.x[:, 0])
        assert max(map(len, seen)) <= batch_size
        assert in_order(seen).tolist() == list(range(20))
        doubled = in_order([torch.stack([part, 2 * part]) for part in seen], dim=1)
        assert doubled[1].tolist() == list(range(0, 40, 2))
    some = EvenRows(rows, 20, 5)
    assert some.numbers == [0, 5, 10, 14, 19]
    assert some.__getitems__(range(1, 3)).x[:, 0].tolist() == [5, 10]


def test_a_check_that_fails_loses_nothing():
    """Inverting a strong contraction explodes; the likelihood stays."""
    flow = gaussian_flow()
    flow.transform.transforms[1].field.stack.layers[1].linear.weight.data.copy_(-1000 * torch.eye(3))
    own = found(flow, data(0, 20), computed(1e-3))
    assert math.isfinite(own.main.value)
    assert "invertibility_error" not in own.numbers
    (told,) = [line for line in warnings(own, 0) if line.startswith("Not checked")]
    assert told.startswith("Not checked, the way back: The solve with")


def test_rows_that_are_not_finite_are_named():
    own = found(gaussian_flow(), data(0, 20), computed())
    own.per_row[0, 3] = -math.inf
    own.main.sources["rows"] = math.inf
    told = warnings(own, 2, converge=True)
    assert told[0].startswith("Expected finite numbers of all rows, got others of 1: numbers 3, from 0.")
    assert "unknown" in table(own, 2, {})[1]


def test_the_table_and_its_warnings():
    own = found(gaussian_flow(), data(0, 400), Settings("dopri5", 0.3, 0.3, "float64", "exact", 4, 1), check=100)
    lines = table(own, 2, {})
    assert lines[0].split() == ["mean", "s.e.", "±", "rows", "solver"]
    assert lines[1].startswith("NLL, nats")
    (warned,) = warnings(own, 2)
    assert warned.startswith("Expected errors within the last digit printed, 0.01 nats, got nll ")
    assert "most of it from rows" in warned
    assert not warnings(own, 0)
    coarse = found(gaussian_flow(), data(0, 4000), Settings("dopri5", 3.0, 3.0, "float64", "exact", 4, 1), check=4000)
    coarse.main.sources["rows"] = 0.0
    (warned,) = warnings(coarse, 5)
    assert "most of it from solver. Type converge=true, or atol=3e-02 rtol=3e-02." in warned


def test_converge_brings_the_computation_below_the_last_digit(caplog):
    caplog.set_level("INFO", "cnf_lab")
    flow, x = gaussian_flow(pixels=True), pixels(0, 30)
    rough = Settings("dopri5", 1e-1, 1e-1, "float32", "hutchinson", 2, 2)
    before = found(flow, x, rough, check=20)
    assert before.main.computation > 0.01
    after = found(flow, x, rough, check=20, converge=True)
    assert after.main.computation <= 0.01
    assert after.settings.draws > 2
    assert after.settings.exact  # three tangents are fewer than probes would be
    assert "converge: atol" in caplog.text
    truth = nll(torch.from_numpy(x) + 0.5, noise()).mean() / (3 * math.log(2))
    assert abs(after.main.value - float(truth)) < 0.01
    # The settings of a check hold for the check alone.
    assert next(flow.parameters()).dtype == (torch.float64 if after.settings.precision == "float64" else torch.float32)


def test_the_way_back_and_the_mass():
    own = found(gaussian_flow(), data(0, 300), computed(1e-8), mass=True)
    assert own.numbers["mass"] == pytest.approx(1, abs=2e-3)
    assert own.numbers["mass_outside"] < 0.01
    assert own.numbers["invertibility_error"] < 1e-6
    assert own.numbers["nfe"] == own.numbers["nfe_most"] > 6
    loose = found(gaussian_flow(), data(0, 300), Settings("dopri5", 0.1, 0.1, "float64", "exact", 4, 1))
    assert loose.numbers["invertibility_error"] > 1e-4
