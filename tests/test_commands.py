"""The commands from the outside: help, errors in one line, evaluation, sampling, sweeps, wandb."""

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
from cnf_lab.errors import ConfigError, DataError
from cnf_lab.evaluate import evaluate
from cnf_lab.sample import sample
from cnf_lab.train import train
from cnf_lab.training.build import build
from cnf_lab.training.command import explain, run_command

ComposeConfig = Callable[..., DictConfig]
QUICK = ("architecture.hidden=[8]", "trainer.max_epochs=2", "callbacks=[default]", "threads=1")
MISTAKES = [
    ("solver=rk9", "Expected solver to be one of adaptive_heun, bosh3,", "got rk9. Type solver=rk4."),
    ("solvr=rk4", "Expected an option that exists, such as solver,", "Type solver=rk4."),
    ("solver.rtoll=1", "Expected an option that exists, such as solver.rtol,", "Type solver.rtol=1."),
    ("dataset=minibone", "Expected dataset to be one of", "got minibone. Type dataset=miniboone."),
    ("experiment=ffjord/powr", "Expected experiment to be one of", "Type experiment=ffjord/power."),
    ("architecture/layer=concatsqash", "Expected architecture/layer to be one of blend,", "=concatsquash."),
    ("solver.method=rk9", "Expected solver.method to be one of dopri5,", "got rk9. Type solver.method=rk4."),
    ("solver.rtol=abc", "Expected solver.rtol to be float, got abc.", ""),
    ("+solver.foo=1", "Expected solver to have options method,", "got foo."),
    ("trace=bottleneck", "for trace=bottleneck, got architecture Mlp.", "Type architecture=encoder_decoder"),
    ("architecture.hidden=[]", "Expected architecture.hidden with at least one positive width", "=[64,64]."),
    ("logger.mode=of", "Expected logger.mode to be one of offline, online, disabled", "Type logger.mode=offline."),
    ("dataset=custom", "Expected dataset.path to be a file of rows, got null.", "Type dataset.path=rows.csv"),
    ("dataset=custom dataset.path=no.npy", "no.npy", "which is no file"),
    ("dataset=power dataset.root=none dataset.download=false", "md5:9b9c9b0375315ad270eba4ce80c093ab", "zenodo"),
    ("resume=nowhere", "Expected resume to be a run folder", "Type resume=outputs/"),
    ("seed=-1", "Expected seed to be a whole number of at least 0, got -1.", "Type seed=0."),
    ("trainer.max_epochs=abc", "Expected trainer.max_epochs to be int, got abc.", ""),
    ("dataset.steps_per_epoch=0", "Expected dataset.steps_per_epoch of at least 1, got 0.", "=200."),
    ("paths.run=/proc/x", "/proc/x", "No such file"),
]


def run_in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, task: Callable, name: str, *arguments: str
) -> str:
    """Run a command as its main() does; return what it printed as an error, having seen exit code 2."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command(task, name)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "expected", "advice"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_mistakes_end_in_one_line(
    arguments: str,
    expected: str,
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    fixed = [f"hydra.run.dir={tmp_path / 'run'}"]
    message = run_in_process(monkeypatch, capsys, train, "train", *arguments.split(), *fixed)
    lines = [line for line in message.splitlines() if line]
    assert len(lines) == 1, message
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert advice in lines[0]
    assert getattr(sys.modules.get("wandb"), "run", None) is None, "a live wandb run would swallow the next job"


def test_options_are_judged_by_the_chosen_data_set() -> None:
    """A key that only some data sets have is not blamed for somebody else's mistake."""
    line = explain(ValueError("?"), ["dataset=power", "dataset.allow_partial=true", "solver.rtoll=1"], "train")
    assert "got solver.rtoll" in line


def test_errors_of_a_part_name_the_option() -> None:
    with pytest.raises(ConfigError, match=r"options of optimiser that make a Adam, got ValueError: Invalid learning"):
        build({"_target_": "torch.optim.Adam", "lr": -1.0}, "optimiser", params=[torch.nn.Parameter(torch.zeros(1))])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on named columns, conditional on one of them, made by the command itself."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    context = rng.normal(size=120)
    table = pd.DataFrame({"a": 100 + 5 * context + rng.normal(size=120), "b": rng.normal(size=120), "c": context})
    table.to_csv(folder / "table.csv", index=False)
    arguments = ["dataset=custom", f"dataset.path={folder / 'table.csv'}", "dataset.context=[c]", *QUICK]
    arguments += ["objective=likelihood", "preprocess=standardise"]  # smooth, so that a grid integrates it
    command = [sys.executable, "-m", "cnf_lab.train", *arguments, f"hydra.run.dir={folder / 'run'}"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


def test_run_folder_is_complete_and_wandb_offline(trained: Path) -> None:
    run = trained / "run"
    for name in (".hydra/config.yaml", "config_resolved.yaml", "metrics.csv", "metrics.json", "train.log"):
        assert (run / name).is_file(), name
    (record,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    assert (run / "wandb_id.txt").read_text() in record.name
    inspect = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(record)]
    records = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    for expected in (
        '"name":"val/nll"',
        '"summary":{"last":true,"min":true}',
        '"test/nll"',
        '"nfe/forward"',
        '"architecture"',
        '"project":"cnf_lab"',
    ):
        assert expected in records, expected
    log = (run / "train.log").read_text()
    assert "epoch 1 " in log
    assert "test/nll" in log


def test_evaluate_rebuilds_from_the_checkpoint_alone(trained: Path, lab_config: ComposeConfig, tmp_path: Path) -> None:
    checkpoint = trained / "run" / "checkpoints" / "best.ckpt"
    nll = evaluate(lab_config(f"run={checkpoint}", f"output={tmp_path}", command="evaluate"))
    report = json.loads((tmp_path / "evaluation.json").read_text())["test"]
    assert report["nll"] == nll
    assert report["context"]["solver"]["atol"] == 1e-7
    assert report["context"]["precision"] == "float64"
    quick = json.loads((trained / "run" / "metrics.json").read_text())["test/nll"]
    assert nll == pytest.approx(quick, abs=1e-3)


def test_evaluate_own_rows_by_name(trained: Path, lab_config: ComposeConfig, tmp_path: Path) -> None:
    """Columns are found by name, in any order; the density integrates to 1 in the file's own units."""
    grid_a, grid_b = np.linspace(50, 150, 200), np.linspace(-8, 8, 80)
    a, b = np.meshgrid(grid_a, grid_b, indexing="ij")
    rows = pd.DataFrame({"c": 0.5, "b": b.ravel(), "a": a.ravel()})
    rows.to_csv(tmp_path / "grid.csv", index=False)
    overrides = (
        f"run={trained / 'run'}",
        f"data={tmp_path / 'grid.csv'}",
        f"output={tmp_path}",
        "batch_size=16000",
        "check=0",
    )
    evaluate(lab_config(*overrides, command="evaluate"))
    log_prob = np.load(tmp_path / "evaluation" / "rows_grid_log_prob.npy")
    mass = np.exp(log_prob).sum() * (grid_a[1] - grid_a[0]) * (grid_b[1] - grid_b[0])
    assert mass == pytest.approx(1, abs=2e-3)


def test_sample_with_a_context(trained: Path, lab_config: ComposeConfig, tmp_path: Path) -> None:
    run = f"run={trained / 'run'}"
    sample(lab_config(run, "n=40", "context=[0.5]", f"output={tmp_path / 's.csv'}", command="sample"))
    table = pd.read_csv(tmp_path / "s.csv")
    assert list(table.columns) == ["a", "b"]
    assert len(table) == 40
    assert (tmp_path / "s.png").stat().st_size > 1000
    np.save(tmp_path / "contexts.npy", np.linspace(-1, 1, 30)[:, None])
    contexts = f"context={tmp_path / 'contexts.npy'}"
    sample(lab_config(run, "n=30", contexts, f"output={tmp_path / 's.npy'}", "plot=false", command="sample"))
    assert np.load(tmp_path / "s.npy").shape == (30, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["n=3"], "Expected a context"),
        (["context=[1,2]"], "Expected a context of 1 columns"),
        (["context=[1]", "output=x.txt"], "end in .npy or .csv"),
        (["context=[1]", "n=0"], "Expected n to be a whole number of at least 1, got 0"),
        (["context=[1]", "n=abc"], "Expected n to be a whole number of at least 1, got abc"),
        (["context=[1]", "rtol=0"], "Expected rtol to be a number above 0, got 0"),
        (["context=[1]", "device=tpu"], "Expected device to be auto, cpu"),
    ],
)
def test_sample_mistakes(overrides: list[str], message: str, trained: Path, lab_config: ComposeConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(lab_config(f"run={trained / 'run'}", *overrides, command="sample"))


def test_evaluate_mistakes(trained: Path, lab_config: ComposeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Expected a run folder or a checkpoint file, got none"):
        evaluate(lab_config(command="evaluate"))
    with pytest.raises(ConfigError, match="Expected method to be one of dopri5,.*got rk4"):
        evaluate(lab_config(f"run={trained / 'run'}", "method=rk4", command="evaluate"))
    for option in ("batch_size=0", "limit=0", "atol=abc", "chunk=0"):
        with pytest.raises(ConfigError, match=f"Expected {option.split('=')[0]} to be a"):
            evaluate(lab_config(f"run={trained / 'run'}", option, command="evaluate"))
    with pytest.raises(ConfigError, match="no such folder"):
        evaluate(lab_config(f"run={tmp_path / 'none'}", command="evaluate"))
    (tmp_path / "damaged.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match="Expected a checkpoint written by cnf_lab"):
        evaluate(lab_config(f"run={tmp_path / 'damaged.ckpt'}", command="evaluate"))
    with pytest.raises(ConfigError, match="Expected split to be one of train, val, test, got all"):
        evaluate(lab_config(f"run={trained / 'run'}", "split=all", command="evaluate"))
    np.save(tmp_path / "wide.npy", np.zeros((4, 7)))
    with pytest.raises(DataError, match="columns"):
        evaluate(lab_config(f"run={trained / 'run'}", f"data={tmp_path / 'wide.npy'}", command="evaluate"))


def test_load_is_the_density_that_was_trained(trained: Path) -> None:
    flow = cnf_lab.load(trained / "run")
    assert not flow.training
    x, c = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0]])
    mapped = flow.pull_back(x, c)
    assert float(flow.log_prob(x, c)) == pytest.approx(float(flow.base.log_prob(mapped.value) + mapped.log_det))
    with pytest.raises(ValueError, match="Expected a context with shape"):
        flow.log_prob(x)


@pytest.mark.slow
def test_sweep_gives_folders_and_a_table(tmp_path: Path) -> None:
    """One job of four fails: the others run, the table names it, and the exit code tells."""
    arguments = ["-m", "dataset=pinwheel", "solver=dopri5,rk4", "trace=exact,bottleneck", "logger=csv", *QUICK]
    small = ["dataset.steps_per_epoch=3", "dataset.evaluation_rows=50", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    command = [sys.executable, "-m", "cnf_lab.train", *arguments, *small]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 2
    assert "4 jobs in" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    table = pd.read_csv(tmp_path / "sweep" / "summary.csv")
    assert len(table) == 4
    done = table[table["status"] == "done"]
    assert len(done) == 2
    assert all(math.isfinite(value) for value in done["test/nll"])
    assert table[table["status"] != "done"]["status"].str.contains("trace=bottleneck").all()
