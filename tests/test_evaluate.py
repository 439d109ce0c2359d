"""cnf_lab.evaluate from the outside: its file, its table, its options, several processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from cnf_lab.errors import ConfigError
from cnf_lab.evaluate import evaluate
from cnf_lab.train import train
from cnf_lab.training.command import config_folder

SMALL = (
    "dataset=moons",
    "architecture.hidden=[8]",
    "dataset.evaluation_rows=60",
    "objective=likelihood",
    "preprocess=standardise",
    "callbacks=[default]",
    "logger=none",
    "trainer=cpu",
    "debug=fast",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", [*SMALL, f"paths.run={folder}"])
    train(config)
    return folder


@pytest.fixture
def command(lab_config: Callable[..., DictConfig], run: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    usual = (f"run={run}", f"output={tmp_path}", "mass=false")
    return lambda *overrides: lab_config(*usual, *overrides, command="evaluate")


def read(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def test_one_file_holds_all_evaluations_of_a_run(command, tmp_path, caplog):
    caplog.set_level("INFO", "cnf_lab")
    value = evaluate(command())
    evaluate(command("split=val", "limit=10"))
    np.save(tmp_path / "own.npy", np.zeros((5, 2)))
    evaluate(command(f"data={tmp_path / 'own.npy'}"))
    found = read(tmp_path)
    assert list(found) == ["test", "val", "rows_own"]
    budget = found["test"]["budget"]["nll"]
    assert budget["value"] == value == found["test"]["nll"]
    assert budget["half_width"] == budget["sources"]["rows"] + budget["sources"]["solver"]
    assert budget["computation"] == budget["sources"]["solver"]
    assert budget["confidence"] == 0.99
    assert found["val"]["context"]["rows"] == found["val"]["context"]["checked"] == 10
    assert found["test"]["invertibility_error"] < 1e-4
    assert found["test"]["nfe"] > 0
    for name in ("test", "val", "rows_own"):
        assert len(np.load(tmp_path / "evaluation" / f"{name}_log_prob.npy")) == found[name]["context"]["rows"]
    assert "NLL, nats" in caplog.text
    assert "± holds the truth with probability 0.99" in caplog.text
    assert "Expected errors within the last digit printed, 0.01 nats, got nll" in caplog.text

    (tmp_path / "evaluation.json").write_text("{damaged")
    evaluate(command("limit=10"))
    assert list(read(tmp_path)) == ["test"]


def test_mass_of_a_density_in_two_dimensions(command, tmp_path):
    evaluate(command("mass=true", "limit=20", "atol=1e-4", "rtol=1e-4"))
    found = read(tmp_path)["test"]
    assert found["mass"] == pytest.approx(1, abs=1e-3)
    assert found["mass_outside"] < 0.01


def test_probes_are_judged_by_exact_divergences(command, tmp_path):
    evaluate(command("divergence=hutchinson", "probes=2"))
    found = read(tmp_path)["test"]
    assert found["context"]["checked_exactly"] == 60  # two tangents are few
    assert abs(found["nll_exact_gap"]) < 5 * found["nll_exact_gap_standard_error"]
    assert found["budget"]["nll"]["sources"]["probes"] > 0
    evaluate(command("divergence=hutchinson", "probes=1", "check_exact=0"))
    found = read(tmp_path)["test"]
    assert found["budget"]["nll"]["sources"]["probes"] is None
    assert "nll_exact_gap" not in found


def test_converge_says_what_it_does(command, tmp_path, caplog):
    caplog.set_level("INFO", "cnf_lab")
    evaluate(command("divergence=hutchinson", "probes=1", "atol=1", "rtol=1", "digits=3", "converge=true"))
    found = read(tmp_path)["test"]
    assert found["budget"]["nll"]["computation"] <= 1e-3
    assert found["context"]["trace"] == "exact"
    assert "converge: atol" in caplog.text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("converge=3", "Expected converge to be true or false, got 3"),
        ("mass=yes_please", "Expected mass to be true or false, got yes_please"),
        ("check=1", "Expected check to be 0 or at least 2, for one row tells no spread, got 1"),
        ("digits=-1", "Expected digits to be a whole number of at least 0, got -1"),
        ("atol=1e-300", "Expected atol of at least 1e-12, the finest that float64 can hold, got 1e-300"),
        ("processes=0", "Expected processes to be a whole number of at least 1, got 0"),
    ],
)
def test_mistakes(option, message, command):
    with pytest.raises(ConfigError, match=message):
        evaluate(command(option))
    with pytest.raises(ConfigError, match="Expected rows to check for converge=true, got check=0"):
        evaluate(command("converge=true", "check=0"))


@pytest.mark.slow
@pytest.mark.ddp
def test_several_processes_find_the_same_numbers(run, tmp_path):
    """Bit for bit: batches, draws and their order are those of one process. A failure of one is told once."""

    def typed(output: Path, *options: str) -> subprocess.CompletedProcess:
        arguments = [f"run={run}", f"output={output}", "batch_size=7", "divergence=hutchinson", *options]
        return subprocess.run(
            [sys.executable, "-m", "cnf_lab.evaluate", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    for processes in (1, 3):
        result = typed(tmp_path / str(processes), f"processes={processes}", "limit=50", "check=20")
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("NLL, nats") == 1
    alone, shared = (read(tmp_path / str(processes))["test"] for processes in (1, 3))
    assert {**shared, "context": None} == {**alone, "context": None}
    assert shared["context"]["nfe"] == alone["context"]["nfe"]
    rows = [np.load(tmp_path / str(processes) / "evaluation" / "test_log_prob.npy") for processes in (1, 3)]
    assert np.array_equal(*rows)

    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("linear.weight"))
    checkpoint["state_dict"][name] *= torch.nan
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    failed = typed(tmp_path / "failed", "processes=2", f"run={tmp_path / 'broken.ckpt'}")
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert failed.stderr.count("error: ") == 1
    assert not (tmp_path / "failed" / "evaluation.json").exists()
