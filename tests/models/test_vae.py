"""The module of autoencoders: runs of every posterior, resumption, and the commands that take such a run."""

import json
import math

import numpy as np
import pytest

import cnf_lab
from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.errors import ConfigError

SMALL = (
    "dataset=digits",
    "model=vae",
    "objective=elbo",
    "model.latent=4",
    "model.features=16",
    "posterior=cnf_gated",
    "recipe.hidden=[8,8]",
    "dataset.steps_per_epoch=2",
    "dataset.batch_size=16",
    "dataset.limit=64",
    "dataset.val_limit=24",
    "dataset.test_limit=24",
    "schedule=constant",
    "callbacks=[default]",
    "threads=1",
    "trainer.max_epochs=1",
)


@pytest.fixture
def metrics(lab_config, tmp_path):
    from cnf_lab.train import train

    def run(*overrides):
        train(lab_config(*SMALL, *overrides))
        return json.loads((tmp_path / "run" / "metrics.json").read_text())

    return run


def test_parts_of_the_elbo_are_told(metrics):
    found = metrics("model.module.draws=3", "objective.kl_warmup=4")
    for stage in ("val", "test"):
        assert found[f"{stage}/elbo"] == pytest.approx(-found[f"{stage}/negative_elbo"])
        assert found[f"{stage}/reconstruction"] + found[f"{stage}/kl"] == pytest.approx(
            found[f"{stage}/negative_elbo"], rel=1e-5
        )
        assert found[f"{stage}/bits_per_dim"] == pytest.approx(found[f"{stage}/negative_elbo"] / 64 / math.log(2))
        assert found[f"{stage}/negative_elbo_standard_error"] > 0
    assert found["train/beta"] == pytest.approx(0.25)
    assert found["train/negative_elbo"] > found["train/loss"]  # whose KL weighs a quarter
    assert found["test/nfe"] > 0
    assert found["context"]["unit"] == "nats"
    assert found["context"]["solver"]["method"] == "dopri5"


def test_a_finite_posterior_solves_nothing(metrics):
    found = metrics("posterior=sylvester_triangular", "objective.draws=3")
    assert "test/nfe" not in found
    assert found["context"]["solver"] is None
    assert math.isfinite(found["test/log_det"])


def test_estimates_of_the_divergence_leave_an_error(lab_config, tmp_path):
    from cnf_lab.train import train

    config = lab_config(*SMALL, "posterior=cnf_low_rank", "recipe.rank=2")
    probes = {"_target_": "cnf_lab.trace.Hutchinson", "distribution": {"_target_": "cnf_lab.trace.Rademacher"}}
    config.model.evaluation_trace = {**probes, "probes": 4}
    train(config)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["test/negative_elbo_trace_standard_error"] > 0


def test_a_resumed_run_has_the_same_numbers(lab_config, tmp_path):
    from cnf_lab.train import train

    both = (
        "trainer.max_epochs=3",
        "objective.kl_warmup=3",
        "callbacks=[default,ema]",
        "trainer.check_val_every_n_epoch=1",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(lab_config(*SMALL, *both, run=whole))
    train(lab_config(*SMALL, *both, "trainer.max_epochs=1", run=parts))
    train(lab_config(*SMALL, *both, f"resume={parts}", run=parts))
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, parts)]
    timed = ("time/", "memory/", "context")
    numbers = [{key: value for key, value in one.items() if not key.startswith(timed)} for one in found]
    assert numbers[0] == numbers[1]


def test_commands_take_a_run(lab_config, metrics, tmp_path, caplog):
    from cnf_lab.evaluate import evaluate
    from cnf_lab.sample import sample

    metrics("callbacks=[default,plots]", "callbacks.plots.samples=9")
    run = tmp_path / "run"
    for name in ("samples", "reconstructions", "walks"):
        assert (run / "plots" / f"{name}_test.png").is_file()
    model = cnf_lab.load(run)
    assert isinstance(model, VariationalAutoencoder)
    assert model.sample(3).shape == (3, 1, 8, 8)

    caplog.set_level("INFO", "cnf_lab")
    chosen = (f"run={run}", "draws=10", "iwae_draws=200", "batch_size=500", "check=4", "limit=10")
    value = evaluate(lab_config(*chosen, command="evaluate"))
    found = json.loads((run / "evaluation.json").read_text())["test"]
    assert found["negative_elbo"] == value
    assert found["negative_iwae_bound"] < value
    assert abs(found["negative_elbo_solver_gap"]) < 1e-3
    assert {"active_units", "effective_sample_size_median", "bits_per_dim_iwae"} <= set(found)
    assert np.load(run / "evaluation" / "test_elbo.npy").shape == (10, 10)
    assert found["negative_elbo_of_iwae_images"] == pytest.approx(value)  # all ten of them
    assert "importance-weighted bound, 200 draws" in caplog.text
    by_probes = (f"run={run}", "divergence=hutchinson", "iwae_draws=5", "limit=3", "check=0")
    with pytest.raises(ConfigError, match="Expected divergence=exact for the importance-weighted bound"):
        evaluate(lab_config(*by_probes, command="evaluate"))

    np.save(tmp_path / "own.npy", np.random.default_rng(0).integers(0, 17, (5, 1, 8, 8)))
    evaluate(lab_config(f"run={run}", f"data={tmp_path / 'own.npy'}", "check=0", command="evaluate"))
    sample(lab_config(f"run={run}", "n=7", command="sample"))
    drawn = np.load(run / "samples" / "samples_seed_0.npy")
    assert drawn.shape == (7, 1, 8, 8)
    assert drawn.dtype == np.uint8
    assert drawn.max() < 17


def test_what_does_not_go_together_is_said(lab_config):
    from cnf_lab.train import train

    with pytest.raises(ConfigError, match=r"Expected a posterior with model=vae, got none"):
        train(lab_config(*[item for item in SMALL if not item.startswith("posterior")], "~posterior"))
    with pytest.raises(ConfigError, match=r"got Likelihood for a VariationalAutoencoder\. Type objective=elbo"):
        train(lab_config(*SMALL, "objective=likelihood"))
    with pytest.raises(ConfigError, match=r"Expected recipe\.levels=17, the values of a pixel of digits, got 2"):
        train(lab_config(*SMALL, "recipe.levels=2"))
    with pytest.raises(ConfigError, match=r"Expected pixels for model=vae|Expected images for model=vae"):
        train(lab_config("dataset=moons", "model=vae", "logger=none"))
    with pytest.raises(ConfigError, match=r"Expected model\.module\.draws of at least 1"):
        train(lab_config(*SMALL, "model.module.draws=0"))


def test_the_model_brings_its_objective_and_posterior(lab_config):
    config = lab_config("dataset=mnist", "model=vae")
    assert config.objective._target_ == "cnf_lab.objectives.Elbo"
    assert config.posterior.field._target_ == "cnf_lab.fields.AmortisedGates"
    config = lab_config("dataset=omniglot", "posterior=planar")
    assert config.model.name == "vae"
    assert config.posterior._target_ == "cnf_lab.autoencoders.planar_flow"
    assert "posterior" not in lab_config("dataset=moons")
