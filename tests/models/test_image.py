"""The module of images: bits/dim, its errors, and what it says of every block."""

import math

import numpy as np
import pytest
import torch

from cnf_lab.errors import ConfigError

SMALL = (
    "dataset=digits",
    "recipe.hidden=[8]",
    "dataset.steps_per_epoch=2",
    "dataset.batch_size=16",
    "dataset.limit=64",
    "dataset.val_limit=24",
    "dataset.test_limit=24",
    "callbacks=[default]",
    "threads=1",
    "trainer.max_epochs=1",
)
MULTISCALE = ("architecture=conv", "recipe.scales=2", "objective=likelihood", "schedule=constant", "preprocess=logit")
COARSE = ("solver=rk4", "solver.steps=2", "solver.evaluation.atol=1e-3", "solver.evaluation.rtol=1e-3")


@pytest.fixture
def metrics(lab_config, tmp_path):
    import json

    from cnf_lab.train import train

    def run(*overrides):
        train(lab_config(*SMALL, *overrides))
        return json.loads((tmp_path / "run" / "metrics.json").read_text())

    return run


def test_bits_per_dim_are_nats_in_another_unit_and_blocks_are_told(metrics):
    found = metrics(*MULTISCALE, *COARSE, "model.module.draws=3")
    nats = 64 * math.log(2)
    for name in ("", "_standard_error", "_dequantisation_standard_error", "_trace_standard_error"):
        assert found[f"test/bits_per_dim{name}"] == pytest.approx(found[f"test/nll{name}"] / nats, rel=1e-5)
        assert found[f"val/bits_per_dim{name}"] > 0
    assert found["train/bits_per_dim"] == pytest.approx(found["train/nll"] / nats, rel=1e-5)
    blocks = [found[f"test/nfe_block_{k}"] for k in range(3)]
    assert sum(blocks) == pytest.approx(found["test/nfe"])
    assert all(f"test/log_det_block_{k}" in found for k in range(3))
    assert "test/nfe_block_3" not in found
    assert any("limit" in note for note in found["context"]["data"]["notes"])
    assert found["context"]["unit"] == "bits/dim"


@pytest.mark.parametrize("dequantisation", ["uniform", "variational"])
@pytest.mark.parametrize("objective", ["likelihood", "flow_matching", "flow_matching_then_likelihood"])
def test_every_objective_with_either_noise(metrics, objective, dequantisation):
    chosen = (f"objective={objective}", f"model/dequantisation={dequantisation}", "callbacks=[default,ema]")
    steps = ("recipe.flow_matching_steps=2", "recipe.likelihood_steps=2", "trainer.max_epochs=-1")
    found = metrics(*MULTISCALE, *COARSE, *chosen, *(steps if "then" in objective else ()))
    assert 1 < found["test/bits_per_dim"] < 40


def test_pixels_for_a_density_and_rows_for_images(lab_config, tmp_path):
    from cnf_lab.train import train

    with pytest.raises(ConfigError, match=r"Expected continuous values for model=density, got digits.*model=image"):
        train(lab_config("dataset=digits", "model=density", "preprocess=none", "logger=none"))
    with pytest.raises(ConfigError, match="Expected images for model=image, got data of event shape"):
        train(lab_config("model=image", "dataset=moons", "logger=none"))
    with pytest.raises(ConfigError, match=r"Expected recipe\.levels=17, the values of a pixel of digits, got 256"):
        train(lab_config(*SMALL, "recipe.levels=256"))
    with pytest.raises(ConfigError, match=r"Expected model\.scales of 1 to 4 for images of 8x8.*got 5"):
        train(lab_config(*SMALL, *MULTISCALE, "recipe.scales=5"))
    with pytest.raises(ConfigError, match=r"Expected model\.module\.draws of at least 1"):
        train(lab_config(*SMALL, "model.module.draws=0"))


def test_commands_take_a_run_of_images(lab_config, metrics, tmp_path, caplog):
    import json

    import cnf_lab
    from cnf_lab.evaluate import evaluate
    from cnf_lab.sample import sample

    trained = metrics("recipe.hidden=[16,16]")
    run = f"run={tmp_path / 'run'}"
    with caplog.at_level("INFO", logger="cnf_lab"):
        mean = evaluate(lab_config(run, "draws=2", f"output={tmp_path}", "check=4", command="evaluate"))
    found = json.loads((tmp_path / "evaluation.json").read_text())["test"]
    assert mean == found["bits_per_dim"] == pytest.approx(trained["test/bits_per_dim"], abs=0.05)
    assert found["bits_per_dim_importance_weighted"] < found["bits_per_dim"]
    assert abs(found["bits_per_dim_solver_gap"]) < 1e-3
    assert found["context"]["trace"] == "exact"
    assert np.load(tmp_path / "evaluation" / "test_log_prob.npy").shape == (2, 24)
    for words in ("test: 24 images, exact divergence", "one draw of uniform noise", "importance-weighted with 2 draws"):
        assert words in caplog.text
    by_probes = (run, "divergence=hutchinson", "probes=3", "draws=2", "check=0", "limit=5", f"output={tmp_path}")
    with caplog.at_level("INFO", logger="cnf_lab"):
        evaluate(lab_config(*by_probes, command="evaluate"))
    found = json.loads((tmp_path / "evaluation.json").read_text())["test"]
    assert found["bits_per_dim_trace_standard_error"] > 0
    assert "bits_per_dim_importance_weighted" not in found, "the noise of probes would pass for a better bound"
    assert "No importance-weighted bound" in caplog.text

    sample(lab_config(run, "n=5", "temperature=0.8", f"output={tmp_path / 's.npy'}", command="sample"))
    pixels = np.load(tmp_path / "s.npy")
    assert pixels.shape == (5, 1, 8, 8)
    assert pixels.dtype == np.uint8
    assert pixels.max() <= 16
    assert (tmp_path / "s.png").is_file()
    own = (run, f"data={tmp_path / 's.npy'}", "check=0", f"output={tmp_path}")
    assert np.isfinite(evaluate(lab_config(*own, command="evaluate")))
    with pytest.raises(ConfigError, match=r"Expected output to end in \.npy, got"):
        sample(lab_config(run, f"output={tmp_path / 's.csv'}", command="sample"))
    with pytest.raises(ConfigError, match="Expected divergence to be auto, exact or hutchinson"):
        evaluate(lab_config(run, "divergence=auto2", command="evaluate"))

    flow = cnf_lab.load(tmp_path / "run")
    assert flow.sample(3, temperature=0.7).shape == (3, 1, 8, 8)
    y, log_q = flow.dequantise(torch.zeros(2, 1, 8, 8))
    assert torch.isfinite(flow.log_prob(y) - log_q).all()
