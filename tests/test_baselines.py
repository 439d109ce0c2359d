"""The baselines go through the commands of the continuous flows: train, evaluate, sample, load, sweep."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig

import cnf_lab
from cnf_lab.errors import ConfigError
from cnf_lab.evaluate import evaluate
from cnf_lab.flows import FiniteTransform
from cnf_lab.sample import sample
from cnf_lab.train import train

pytest.importorskip("zuko")

ComposeConfig = Callable[..., DictConfig]
MODELS = ("realnvp", "maf", "nsf")
SMALL = (
    "objective=likelihood",
    "model.transforms=2",
    "model.hidden=[8]",
    "trainer.max_epochs=2",
    "dataset.batch_size=32",
)
PLOTS = ("callbacks=[default,plots]", "callbacks.plots.resolution=10", "callbacks.plots.samples=20")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two columns far from 0, and a third to condition on."""
    rng = np.random.default_rng(0)
    context = rng.normal(size=120)
    frame = pd.DataFrame({"a": 100 + 5 * context + rng.normal(size=120), "b": rng.normal(size=120), "c": context})
    frame.to_csv(tmp_path / "table.csv", index=False)
    return tmp_path / "table.csv"


@pytest.mark.parametrize("model", MODELS)
def test_from_training_to_samples(
    model: str, table: Path, tmp_path: Path, lab_config: ComposeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    data = ("dataset=custom", f"dataset.path={table}", "dataset.context=[c]")
    train(lab_config(*data, f"model={model}", *SMALL, *PLOTS, run=run))
    metrics = json.loads((run / "metrics.json").read_text())
    assert "nfe/forward" not in metrics
    for key in ("solver", "trace", "training"):
        assert metrics["context"][key] is None, key
    assert metrics["context"]["versions"]["zuko"]
    assert {path.stem for path in (run / "plots").glob("*_test.png")} == {"density_test"}

    caplog.set_level("INFO", "cnf_lab")
    nll = evaluate(lab_config(f"run={run}", command="evaluate"))
    assert "and solver" in caplog.text
    assert "bounded by" not in caplog.text, "nothing is solved"
    report = json.loads((run / "evaluation.json").read_text())["test"]
    assert nll == pytest.approx(metrics["test/nll"], abs=1e-4)
    assert (report["context"]["solver"], report["context"]["trace"], report["context"]["nfe"]) == (None, None, 0)

    sample(lab_config(f"run={run}", "n=30", "context=[0.5]", f"output={tmp_path / 's.csv'}", command="sample"))
    samples = pd.read_csv(tmp_path / "s.csv")
    assert list(samples.columns) == ["a", "b"]
    assert len(samples) == 30

    flow = cnf_lab.load(run)
    assert isinstance(flow.transform.transforms[-1], FiniteTransform)
    assert {parameter.dtype for parameter in flow.parameters()} == {torch.float32}
    x, context = torch.tensor(samples.values), torch.full((30, 1), 0.5, dtype=torch.float64)
    evaluate(lab_config(f"run={run}", f"data={table}", command="evaluate"))
    log_prob = torch.from_numpy(np.load(run / "evaluation" / "rows_table_log_prob.npy"))
    rows = torch.from_numpy(pd.read_csv(table).to_numpy())
    torch.testing.assert_close(flow.double().log_prob(rows[:, :2], rows[:, 2:]), log_prob, rtol=1e-9, atol=1e-9)
    z = flow.pull_back(x, context).value
    torch.testing.assert_close(flow.push_forward(z, context).value, x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("model", MODELS)
def test_training_fits_a_density_that_is_known(model: str, tmp_path: Path, lab_config: ComposeConfig) -> None:
    """Two correlated normal columns, whose entropy even a coupling of affine maps attains."""
    mixing = np.array([[3.0, 0.0], [2.0, 0.5]])
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(3000, 2)) @ mixing.T)
    entropy = 1 + math.log(2 * math.pi) + math.log(np.linalg.det(mixing))
    data = ("dataset=custom", f"dataset.path={tmp_path / 'rows.npy'}", "dataset.batch_size=128")
    sizes = ("model.transforms=4", "model.hidden=[32]", "trainer.max_epochs=8", "callbacks=[default]")
    train(lab_config(*data, f"model={model}", "objective=likelihood", *sizes))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    spread = 4 * metrics["test/nll_standard_error"]
    assert entropy - spread < metrics["test/nll"] < entropy + spread + 0.1


@pytest.mark.parametrize("model", MODELS)
def test_a_run_goes_on_as_if_it_had_not_stopped(
    model: str, table: Path, tmp_path: Path, lab_config: ComposeConfig
) -> None:
    short = ("dataset=custom", f"dataset.path={table}", f"model={model}", *SMALL, "callbacks=[default]", "test=false")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(lab_config(*short, run=whole))
    train(lab_config(*short, "trainer.max_epochs=1", run=parts))
    train(lab_config(*short, f"resume={parts}", run=parts))
    expected, found = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, parts)
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("normalisation=actnorm", "Type normalisation=none"),
        ("regulariser=kinetic", "got KineticEnergy. Type regulariser=none"),
        ("model.bins=1", "Type model.bins=8"),
        ("+model.blocks=2", "Expected model to have options event_shape,.*got blocks"),
    ],
)
def test_what_has_no_place_in_a_baseline_is_refused(
    option: str, message: str, table: Path, lab_config: ComposeConfig
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(lab_config("dataset=custom", f"dataset.path={table}", "model=nsf", "objective=likelihood", option))


def test_without_zuko_every_command_says_what_to_install(
    table: Path, tmp_path: Path, lab_config: ComposeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ("dataset=custom", f"dataset.path={table}", "model=maf", *SMALL, "callbacks=[default]", "test=false")
    train(lab_config(*short))
    monkeypatch.setitem(sys.modules, "zuko", None)
    missing = r'Expected the package zuko for model=maf, got none\. Type pip install "cnf-lab\[peers\]"\.'
    with pytest.raises(ConfigError, match=missing):
        train(lab_config(*short, run=tmp_path / "other"))
    with pytest.raises(ConfigError, match=missing):
        evaluate(lab_config(f"run={tmp_path / 'run'}", command="evaluate"))
    with pytest.raises(ConfigError, match=missing):
        cnf_lab.load(tmp_path / "run")


@pytest.mark.slow
def test_a_sweep_over_models_ends_in_one_table(table: Path, tmp_path: Path) -> None:
    arguments = [
        "-m",
        "dataset=custom",
        f"dataset.path={table}",
        "model=density,nsf,maf",
        "logger=csv",
        "objective=likelihood",
    ]
    small = ["architecture.hidden=[8]", "trainer.max_epochs=1", "callbacks=[default]", "threads=1"]
    command = [sys.executable, "-m", "cnf_lab.train", *arguments, *small, f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=environment)
    summary = pd.read_csv(tmp_path / "sweep" / "summary.csv")
    assert summary["overrides"].tolist() == ["model=density", "model=nsf", "model=maf"]
    assert (summary["status"] == "done").all()
    assert np.isfinite(summary["test/nll"]).all()
    assert summary["nfe/forward"].notna().tolist() == [True, False, False]
