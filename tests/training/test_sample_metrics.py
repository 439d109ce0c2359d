"""Samples of a model and training rows in their place, against the metrics of rows that are known."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from cnf_lab.data.base import ArrayRows
from cnf_lab.errors import ConfigError, DataError
from cnf_lab.evaluate import evaluate
from cnf_lab.flows import Centre, Chain, Flow, NoPreprocess, StandardNormal, UniformDequantiser
from cnf_lab.metrics.samples import METRICS, SampleMetrics
from cnf_lab.train import train
from cnf_lab.training.sample_metrics import check_samples, draw, report_samples, sample_findings

FIELDS = {
    *("metric", "distance", "value", "oracle", "oracle_deviation", "oracle_standard_error", "oracle_repeats"),
    *("n_reference", "n_generated", "cloud_size", "squared", "normaliser", "pixels", "seed"),
}


class Shifted(Flow):
    """A standard normal moved by its context, or by nothing; as a stand-in for a conditional density."""

    def __init__(self):
        super().__init__(Chain([NoPreprocess((2,))]), StandardNormal((2,)))

    def sample(self, n, context=None, generator=None, temperature=1.0):
        latent = super().sample(n, None, generator, temperature).double()
        return latent if context is None else latent + context


@pytest.fixture
def options(lab_config):
    def chosen(*overrides):
        config = lab_config("samples=true", *[f"sample_metrics.{one}" for one in overrides], command="evaluate")
        check_samples(config)
        return config.sample_metrics

    return chosen


def normal(n, d=2, seed=0, scale=1.0, shift=0.0):
    return scale * np.random.default_rng([seed, n]).normal(size=(n, d)) + shift


def test_samples_of_the_truth_are_like_training_rows(options):
    model = Shifted().double().eval()
    reference, training = ArrayRows(normal(200)), ArrayRows(normal(900, seed=1))
    rows = sample_findings(model, reference, training, options("normaliser=none", "oracle_repeats=4"), 64)
    assert {row["metric"] for row in rows} == set(METRICS)
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["oracle_standard_error"] == pytest.approx(row["oracle_deviation"] / 2)
        assert abs(row["value"] - row["oracle"]) < 6 * row["oracle_deviation"], row
    wrong = ArrayRows(normal(200, shift=3.0))
    for row in sample_findings(model, wrong, ArrayRows(normal(900, seed=1, shift=3.0)), options(), 64):
        better = -1 if row["metric"] == "coverage" else 1
        assert better * (row["value"] - row["oracle"]) > 2 * row["oracle_deviation"], row


def test_figures_are_those_of_rows_that_are_all_taken(options):
    """With every row of both sides in use only their order is left to chance, which most metrics do not see."""
    x, trained = normal(60, scale=5.0), normal(60, seed=1, scale=3.0)
    model = Shifted().double().eval()
    one = options("oracle_repeats=1", "projections=50", "n_generated=60")
    rows = sample_findings(model, ArrayRows(x), ArrayRows(trained), one, 25)
    scale = x.std(axis=0, ddof=1)
    expected = SampleMetrics(torch.from_numpy(x / scale), projections=50).measure(torch.from_numpy(trained / scale))
    drawn = draw(model, 60, None, 60, 1.0, torch.Generator().manual_seed(0))
    samples = SampleMetrics(torch.from_numpy(x / scale), projections=50).measure(torch.from_numpy(drawn / scale))
    for row, oracle, sampled in zip(rows, expected, samples, strict=True):
        assert row["oracle"] == pytest.approx(oracle["value"], rel=1e-9), row
        assert row["normaliser"] == "standard_deviation"
        assert row["oracle_standard_error"] is None
        assert row["metric"] == sampled["metric"]
        # Batches of another size draw other latents: near, not equal.
        assert row["value"] == pytest.approx(sampled["value"], rel=0.5, abs=0.2)
    again = sample_findings(model, ArrayRows(x), ArrayRows(trained), one, 25)
    assert again == rows
    other = options("oracle_repeats=1", "projections=50", "seed=1")
    assert sample_findings(model, ArrayRows(x), ArrayRows(trained), other, 25) != rows


def test_normalisers_undo_units(options):
    x, trained = normal(80), normal(80, seed=1)
    units = np.array([1.0, 1000.0])
    found = {}
    for normaliser in ("none", "standard_deviation", "range"):
        chosen = options(f"normaliser={normaliser}", "metrics=[chamfer]", "oracle_repeats=1")
        for name, scale in (("own", 1.0), ("other", units)):
            rows = (ArrayRows(x * scale), ArrayRows(trained * scale))
            found[normaliser, name] = sample_findings(Shifted().double(), *rows, chosen, 80)[0]["oracle"]
    assert found["none", "other"] > 1000 * found["none", "own"]
    for normaliser in ("standard_deviation", "range"):
        assert found[normaliser, "other"] == pytest.approx(found[normaliser, "own"])
    assert found["range", "own"] < found["standard_deviation", "own"]


def test_samples_are_drawn_given_the_contexts_of_the_reference(options):
    context = normal(120, seed=5, scale=10.0)
    rows = ArrayRows(normal(120) + context, context)
    chosen = options("normaliser=none", "metrics=[minimum_matching_distance,kolmogorov_smirnov]", "n_generated=120")
    training = ArrayRows(normal(500, seed=7) + normal(500, seed=8, scale=10.0), normal(500, seed=8, scale=10.0))
    figures = sample_findings(Shifted().double(), rows, training, chosen, 50)
    for row in figures[:2]:  # nearer than training rows, whose contexts are others
        assert row["value"] < row["oracle"]
    uneven = options("n_reference=50", "n_generated=120", "metrics=[coverage]")
    assert sample_findings(Shifted().double(), rows, training, uneven, 50)[0]["n_generated"] == 120


def test_pixels_lie_between_nought_and_one(options):
    shape, levels = (1, 2, 2), 8
    flow = Flow(Chain([Centre(shape, levels)]), StandardNormal(shape), dequantiser=UniformDequantiser(shape, levels))
    images = np.random.default_rng(0).integers(0, levels, (40, *shape))
    other = np.random.default_rng(1).integers(0, levels, (40, *shape))
    chosen = options("metrics=[minimum_matching_distance]", "squared=false", "oracle_repeats=1")
    (row,) = sample_findings(flow, ArrayRows(images), ArrayRows(other), chosen, 10)
    x, y = images.reshape(40, 4) / 7, other.reshape(40, 4) / 7
    assert row["oracle"] == pytest.approx(np.linalg.norm(x[:, None] - y[None], axis=2).min(axis=1).mean())
    assert (row["normaliser"], row["pixels"], row["squared"]) == ("none", "[0, 1]", False)


def test_images_of_an_autoencoder(options, linear_gaussian):
    images = np.random.default_rng(0).integers(0, 2, (30, 1, 1, 5))
    rows = sample_findings(linear_gaussian(), ArrayRows(images), ArrayRows(images), options("n_generated=30"), 8)
    oracle = {(row["metric"], row["distance"]): row["oracle"] for row in rows}
    assert oracle["coverage", "l2"] < 1  # of 32 possible images some are there twice
    assert oracle["minimum_matching_distance", "l2"] == 0


BAD = [
    ("samples=maybe", "Expected samples to be true or false, got maybe. Type samples=true."),
    ("split=train", "Expected a split that was not trained on .* got train. Type split=test."),
    ("sample_metrics.n_reference=1", "Expected sample_metrics.n_reference to be a whole number of at least 2, got 1."),
    ("sample_metrics.cloud_size=0", "Type sample_metrics.cloud_size=100."),
    ("sample_metrics.memory=0", "Expected sample_metrics.memory to be a number above 0, got 0."),
    ("sample_metrics.metrics=[fid]", "sample_metrics.metrics to be one of chamfer, .* got fid. Type .*metrics=all."),
    ("sample_metrics.metrics=fid", "got fid. Type sample_metrics.metrics=all."),
    ("sample_metrics.squared=2", "sample_metrics.squared to be one of null, true, false, got 2."),
    ("sample_metrics.normaliser=pixel", "to be one of null, none, standard_deviation, range, got pixel."),
    ("sample_metrics.bandwidths=[1,-1]", r"bandwidths to be numbers above 0, got \[1, -1\]"),
    ("sample_metrics.bandwidths=[]", r"Type sample_metrics.bandwidths=\[0.5,1,2\]."),
]


@pytest.mark.parametrize(("override", "message"), BAD, ids=[case[0] for case in BAD])
def test_bad_options_end_in_one_line(override, message, lab_config):
    with pytest.raises(ConfigError, match=message) as caught:
        check_samples(lab_config("samples=true", override, command="evaluate"))
    assert "\n" not in str(caught.value)


def test_more_than_there_is(options):
    few, many = ArrayRows(normal(20)), ArrayRows(normal(50, seed=1))
    for chosen, message in (
        (options("n_reference=30"), "n_reference of at most 20, the rows of the split, got 30. Type .*n_reference=20."),
        (options("n_generated=60"), "at most 50, the training rows of the oracle, got 60. Type .*n_generated=50."),
        (options("cloud_size=30"), "cloud_size to leave a cloud of the 20 rows, got 30. Type .*cloud_size=1."),
    ):
        with pytest.raises(ConfigError, match=message):
            sample_findings(Shifted().double(), few, many, chosen, 10)


def test_samples_that_are_not_finite(options, monkeypatch):
    monkeypatch.setattr(Shifted, "sample", lambda self, n, *_: torch.full((n, 2), math.nan))
    with pytest.raises(DataError, match="Expected finite samples, got 20 of 20"):
        sample_findings(Shifted().double(), ArrayRows(normal(20)), ArrayRows(normal(50)), options(), 10)


def test_evaluate_writes_and_prints_them(tmp_path, lab_config, caplog):
    quick = ("dataset=pinwheel", "architecture.hidden=[8]", "trainer.max_epochs=1", "callbacks=[default]", "threads=1")
    small = ("dataset.steps_per_epoch=2", "dataset.evaluation_rows=60")
    run = tmp_path / "run"
    train(lab_config(*quick, *small))
    caplog.set_level(logging.INFO, "cnf_lab")
    choices = (
        "samples=true",
        "sample_metrics.cloud_size=10",
        "sample_metrics.projections=20",
        "atol=1e-4",
        "rtol=1e-4",
    )
    evaluate(lab_config(f"run={run}", f"output={tmp_path}", *choices, command="evaluate"))
    written = json.loads((tmp_path / "evaluation.json").read_text())["test"]
    assert {row["metric"] for row in written["samples"]} == set(METRICS)
    assert all(row.keys() >= FIELDS for row in written["samples"])
    assert {row["cloud_size"] for row in written["samples"] if row["distance"] == "emd"} == {10}
    assert "nll" in written
    lines = [line for line in caplog.messages if line.startswith("nearest neighbour accuracy")]
    assert [line.split()[3] for line in lines] == ["chamfer", "emd", "l2"]
    evaluate(lab_config(f"run={run}", f"output={tmp_path}", "atol=1e-4", "rtol=1e-4", command="evaluate"))
    assert "samples" not in json.loads((tmp_path / "evaluation.json").read_text())["test"]


def test_the_table_tells_sinkhorns_plans(options, caplog):
    pytest.importorskip("ot")
    caplog.set_level(logging.INFO, "cnf_lab")
    chosen = options("metrics=[earth_mover]", "sinkhorn_above=10", "sinkhorn_regularisation=0.1")
    rows = sample_findings(Shifted().double(), ArrayRows(normal(20)), ArrayRows(normal(50)), chosen, 10)
    assert rows[0]["solved"] == "sinkhorn 0.1"
    report_samples(rows)
    assert any("emd, Sinkhorn" in line and "20 in clouds of 20" in line for line in caplog.messages)
    assert OmegaConf.to_container(chosen)["sinkhorn_above"] == 10
