from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import ks_2samp

from cnf_lab.data.drawn import Distribution
from cnf_lab.data.toy import (
    Checkerboard,
    Circles,
    Cosine,
    EightGaussians,
    Line,
    Moons,
    Pinwheel,
    Rings,
    SwissRoll,
    ToyDataModule,
    TwoSpirals,
)
from cnf_lab.errors import ConfigError

SMOOTH = [SwissRoll(), Circles(), Rings(), Moons(), EightGaussians(), Pinwheel(), TwoSpirals()]
JITTERED = [Line(jitter=0.2), Cosine(jitter=0.2)]
ALL = [*SMOOTH, Checkerboard(), Line(), Cosine(), *JITTERED]
CONFIGS = Path(__file__).parents[2] / "conf" / "dataset"


def name(distribution: Distribution) -> str:
    jitter = getattr(distribution, "jitter", 0)
    return type(distribution).__name__ + (f"-{jitter}" if jitter else "")


each = pytest.mark.parametrize("distribution", ALL, ids=name)
with_density = pytest.mark.parametrize("distribution", [*SMOOTH, *JITTERED], ids=name)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def on_grid(distribution: Distribution, spacing: float) -> tuple[float, float]:
    """Mass and entropy by the trapezoid rule, which converges geometrically for these densities."""
    axis = np.arange(-6, 6, spacing)
    log_density = distribution.log_density(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2))
    density = np.exp(log_density)
    return density.sum() * spacing**2, -(density * np.where(density > 0, log_density, 0)).sum() * spacing**2


# -- rows ------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("rows", [1, 2, 7, 1003])
def test_as_many_rows_as_asked_for(distribution, rows):
    x = distribution.draw(rows, rng(0))
    assert x.shape == (rows, 2)
    assert x.dtype == np.float64
    assert np.isfinite(x).all()


@each
def test_rows_depend_on_the_generator_alone(distribution):
    x = distribution.draw(100, rng(1))
    np.testing.assert_array_equal(x, distribution.draw(100, rng(1)))
    assert not np.array_equal(x, distribution.draw(100, rng(2)))


@each
def test_rows_fill_the_window(distribution):
    x = distribution.draw(5000, rng(3))
    assert 2 < np.abs(x).max() < 5.2
    assert (np.abs(x) < 4).all(axis=1).mean() > 0.98


@pytest.mark.parametrize(
    ("distribution", "generator", "scale", "shift"),
    [
        (SwissRoll(), lambda d: d.make_swiss_roll(4000, noise=1.0, random_state=0)[0][:, [0, 2]], 1 / 5, 0),
        (Circles(), lambda d: d.make_circles(4000, factor=0.5, noise=0.08, random_state=0)[0], 3, 0),
        (Moons(), lambda d: d.make_moons(4000, noise=0.1, random_state=0)[0], 2, (-1, -0.2)),
    ],
    ids=["swissroll", "circles", "moons"],
)
def test_rows_follow_those_of_scikit_learn(distribution, generator, scale, shift):
    datasets = pytest.importorskip("sklearn.datasets")
    theirs, ours = generator(datasets) * scale + shift, distribution.draw(4000, rng(4))
    for direction in [(1, 0), (0, 1), (1, 1), (1, -1), (2, 1)]:
        assert ks_2samp(theirs @ direction, ours @ direction).pvalue > 1e-3
    assert ks_2samp(np.hypot(*theirs.T), np.hypot(*ours.T)).pvalue > 1e-3


def test_rings_have_their_radii_and_their_share_of_rows():
    radius = np.hypot(*Rings().draw(4003, rng(5)).T)
    counts = [(np.abs(radius - r) < 0.375).sum() for r in (3, 2.25, 1.5, 0.75)]
    np.testing.assert_allclose(counts, [1000, 1000, 1000, 1003], atol=3)
    assert abs(radius[np.abs(radius - 3) < 0.375].std() - 0.08) < 0.005


def test_the_eight_gaussians_stand_where_the_original_puts_them():
    x = EightGaussians().draw(8000, rng(6))
    angle = np.round(np.arctan2(x[:, 1], x[:, 0]) / (np.pi / 4)) % 8
    for number in range(8):
        mine = x[angle == number]
        assert abs(len(mine) - 1000) < 120
        centre = 4 / 1.414 * np.array([np.cos(number * np.pi / 4), np.sin(number * np.pi / 4)])
        np.testing.assert_allclose(mine.mean(axis=0), centre, atol=0.05)


def test_pinwheel_arms_share_the_rows():
    x = Pinwheel().draw(5002, rng(7)) / 2
    length = np.hypot(*x.T)
    # The first feature nearly is the length; undoing its turn leaves the arm's own angle.
    arm = np.round(-5 * (np.arctan2(x[:, 1], x[:, 0]) + 0.25 * np.exp(length)) / (2 * np.pi)) % 5
    np.testing.assert_allclose(np.bincount(arm.astype(int)), 1000, atol=25)


def test_spirals_come_in_pairs_without_noise(monkeypatch):
    monkeypatch.setattr(TwoSpirals, "std", 0.0)
    x = TwoSpirals().draw(400, rng(8))
    assert {tuple(row) for row in x.round(12)} == {tuple(row) for row in (-x).round(12)}


def test_checkerboard_rows_lie_on_its_squares():
    squares = Checkerboard()
    x = squares.draw(20000, rng(9)).astype(np.float32)
    np.testing.assert_allclose(squares.log_density(x), -np.log(32))
    uniform = rng(10).uniform(-4, 4, (20000, 2))
    assert abs(np.isfinite(squares.log_density(uniform)).mean() - 0.5) < 0.02
    assert not np.isfinite(squares.log_density(np.array([[5.0, 5.0], [-7.0, 1.0]]))).any()


@pytest.mark.parametrize(("distribution", "height"), [(Line(), lambda x: x), (Cosine(), lambda x: 2.5 * np.sin(x))])
def test_graphs_without_jitter_lie_on_their_curve(distribution, height):
    x = distribution.draw(1000, rng(11))
    np.testing.assert_allclose(x[:, 1], height(x[:, 0]))
    assert distribution.log_density is None
    assert "no density" in distribution.note
    assert abs(np.abs(x[:, 0]).max() - 2.5) < 0.01


# -- densities --------------------------------------------------------------------------------------


@with_density
def test_densities_have_mass_one_and_the_recorded_entropy(distribution):
    mass, entropy = on_grid(distribution, 0.08)
    assert abs(mass - 1) < 1e-6
    if distribution.entropy is not None:
        assert abs(entropy - distribution.entropy) < 1e-4


@with_density
def test_rows_come_from_the_density(distribution):
    nll = -distribution.log_density(distribution.draw(20000, rng(12)))
    _, entropy = on_grid(distribution, 0.08)
    assert abs(nll.mean() - entropy) < 4 * nll.std() / np.sqrt(len(nll))


@with_density
def test_densities_are_those_of_a_histogram(distribution):
    edges = np.linspace(-4, 4, 17)
    counts, _, _ = np.histogram2d(*distribution.draw(100_000, rng(13)).T, bins=(edges, edges))
    fine = np.linspace(-4, 4, 16 * 10 + 1)[:-1] + 0.025
    density = np.exp(distribution.log_density(np.stack(np.meshgrid(fine, fine, indexing="ij"), -1).reshape(-1, 2)))
    expected = density.reshape(16, 10, 16, 10).sum(axis=(1, 3)) * 0.05**2 * 100_000
    sigma = np.sqrt(expected + 1)
    assert np.abs((counts - expected) / sigma).max() < 5


def test_eight_overlapping_gaussians_have_less_entropy_than_eight_apart():
    apart = np.log(8) + np.log(2 * np.pi * np.e * (0.5 / 1.414) ** 2)
    assert abs(apart - 2.838) < 1e-3
    assert 0.005 < apart - EightGaussians.entropy < 0.007


@pytest.mark.parametrize("distribution", [*SMOOTH, Checkerboard(), *JITTERED], ids=name)
def test_densities_far_away_are_small_numbers_not_faults(distribution):
    far = distribution.log_density(np.array([[1e3, -1e3], [30.0, 30.0], [0.0, 0.0]]))
    assert not np.isnan(far).any()
    assert (far[:2] < -100).all()
    assert distribution.log_density(np.zeros((0, 2))).shape == (0,)


# -- the data module ----------------------------------------------------------------------------------


def toy(distribution: Distribution | None = None, **options) -> ToyDataModule:
    small = {"batch_size": 16, "evaluation_rows": 50, "steps_per_epoch": 3, "seed": 4}
    return ToyDataModule("toy", distribution or Moons(), **(small | options))


def test_training_rows_are_fresh_and_a_function_of_seed_and_step():
    def batches(data: ToyDataModule, epochs: int) -> list[torch.Tensor]:
        loader = data.train_dataloader()
        seen = []
        for number in range(epochs):
            loader.sampler.set_epoch(number)
            seen += [batch.x for batch in loader]
        return seen

    first, again, other = batches(toy(), 2), batches(toy(), 2), batches(toy(seed=5), 2)
    assert len(first) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({float(x[0, 0]) for x in first + other}) == 12
    resumed = toy().train_dataloader()
    resumed.sampler.set_epoch(1)
    assert torch.equal(next(iter(resumed)).x, first[3])


def test_evaluation_rows_are_fixed_and_apart():
    data = toy()
    assert [len(batch.x) for batch in data.val_dataloader()] == [50]
    val, test = data.head("val", 50).x, data.head("test", 50).x
    assert torch.equal(val, toy().head("val", 50).x)
    assert not torch.equal(val, test)
    assert val.dtype == torch.float32


def test_module_knows_its_truth():
    data = toy()
    assert data.event_shape == (2,)
    assert data.endless
    assert data.plot_window == (-4, 4, -4, 4)
    assert data.entropy == Moons.entropy
    x = data.head("test", 50).x
    np.testing.assert_array_equal(data.truth(x.numpy()), Moons().log_density(x.double().numpy()))


def test_a_curve_says_that_it_has_no_density():
    data = toy(Line())
    data.setup()
    data.setup()
    assert len(data.notes) == 1
    assert data.truth is None
    assert data.entropy is None


def test_options_are_checked():
    with pytest.raises(ConfigError, match="dataset.evaluation_rows of at least 1, got 0. Type"):
        toy(evaluation_rows=0)
    with pytest.raises(ConfigError, match="dataset.distribution.jitter of at least 0, got -1"):
        Line(jitter=-1.0)


@pytest.mark.parametrize(
    "config",
    [
        "swissroll",
        "circles",
        "rings",
        "moons",
        "8gaussians",
        "pinwheel",
        "2spirals",
        "checkerboard",
        "line",
        "cosine",
    ],
)
def test_config_files_build_their_set(config):
    from hydra.utils import instantiate

    node = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["dataset"]
    data = instantiate(node | {"seed": 0}, _convert_="all")
    assert data.name == config
    assert data.head("test", 10).x.shape == (10, 2)
