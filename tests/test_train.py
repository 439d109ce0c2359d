"""Training runs: resumption, processes, precision, checkpoints, and what the run folder holds."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import cnf_lab
from cnf_lab.errors import ConfigError, DataError
from cnf_lab.evaluate import evaluate
from cnf_lab.train import train
from cnf_lab.training.build import build_data

ComposeConfig = Callable[..., DictConfig]
#: A small run whose every random source is at work: shuffled rows, probes, averaging, a schedule.
SMALL = (
    "dataset=custom",
    "dataset.batch_size=16",
    "dataset.steps_per_epoch=null",
    "objective=likelihood",
    "preprocess=standardise",
    "architecture=mlp",
    "architecture.hidden=[8]",
    "trace=hutchinson_rademacher",
    "normalisation=actnorm",
    "schedule=plateau",
    "callbacks=[default,ema]",
    "logger=csv",
    "solver.atol=1e-3",
    "solver.rtol=1e-3",
)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.npy"
    np.save(path, np.random.default_rng(0).normal(size=(111, 3)) * [1, 2, 3] + 5)
    return path


def state(run: Path, name: str = "last.ckpt") -> dict:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, rows: Path, lab_config: ComposeConfig) -> None:
    small = (*SMALL, f"dataset.path={rows}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(lab_config(*small, "trainer.max_epochs=4", run=whole))
    train(lab_config(*small, "trainer.max_epochs=2", run=parts))
    train(lab_config(*small, "trainer.max_epochs=4", f"resume={parts}", run=parts))
    expected, resumed = state(whole), state(parts)
    assert expected["epoch"] == resumed["epoch"] == 3
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "current_model_state"):
        assert equal(expected[key], resumed[key]), key
    numbers = [json.loads((run / "metrics.json").read_text())["test/nll"] for run in (whole, parts)]
    assert numbers[0] == numbers[1]


def test_checkpoints_hold_plain_values_and_last_is_not_best(
    tmp_path: Path, rows: Path, lab_config: ComposeConfig
) -> None:
    # Nothing is learned, so that the first epoch stays the best.
    run = tmp_path / "run"
    idle = ("callbacks=[default]", "optimiser.lr=0.0", "trainer.max_epochs=5", "test=false")
    train(lab_config(*SMALL, f"dataset.path={rows}", *idle))
    best, last = state(run, "best.ckpt"), state(run, "last.ckpt")
    assert last["epoch"] == 4
    assert best["epoch"] == 0
    assert OmegaConf.create(last["hyper_parameters"]["config"]).dataset.name == "custom"


def test_run_folder_and_load(tmp_path: Path, rows: Path, lab_config: ComposeConfig) -> None:
    run = tmp_path / "run"
    train(lab_config(*SMALL, f"dataset.path={rows}", "trainer.max_epochs=2"))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["context"]["unit"] == "nats"
    assert metrics["context"]["solver"]["error_norm"] == "example"
    assert {
        "val/nll",
        "test/nll",
        "test/nll_standard_error",
        "nfe/forward",
        "time/step_seconds",
    } <= metrics.keys()
    flow = cnf_lab.load(run)
    # The test went by the averaged weights of the best checkpoint, those that load() gives.
    data = build_data(OmegaConf.load(run / "config_resolved.yaml")).head("test", 100)
    assert float(-flow.log_prob(data.x).mean()) == pytest.approx(metrics["test/nll"], abs=1e-4)
    x = torch.from_numpy(np.load(rows)[:10])
    z = flow.pull_back(x).value
    torch.testing.assert_close(flow.push_forward(z).value.double(), x, atol=1e-3, rtol=1e-4)
    assert flow.log_prob(x).shape == (10,)
    assert flow.sample(7).shape == (7, 3)


def test_bf16_keeps_state_and_log_det_in_float32(tmp_path: Path, rows: Path, lab_config: ComposeConfig) -> None:
    config = lab_config(*SMALL, f"dataset.path={rows}", "trainer.max_epochs=1", "trainer.precision=bf16-mixed")
    assert np.isfinite(train(config))
    assert all(value.dtype != torch.bfloat16 for value in state(tmp_path / "run")["state_dict"].values())


def test_weight_decay_acts(tmp_path: Path, rows: Path, lab_config: ComposeConfig) -> None:
    norms = []
    for decay in (0.0, 5.0):
        run = tmp_path / str(decay)
        options = (f"optimiser.weight_decay={decay}", "optimiser=adamw", "trainer.max_epochs=2", "test=false")
        train(lab_config(*SMALL, f"dataset.path={rows}", *options, run=run))
        weights = state(run)["current_model_state"]
        norms.append(sum(float(value.norm()) for key, value in weights.items() if key.endswith("linear.weight")))
    assert norms[1] < 0.95 * norms[0]


def test_a_run_that_was_moved_keeps_its_best(tmp_path: Path, rows: Path, lab_config: ComposeConfig) -> None:
    """The best epoch stays the best when the folder is renamed before the run goes on."""
    idle = (*SMALL, f"dataset.path={rows}", "callbacks=[default]", "optimiser.lr=0.0", "test=false")
    train(lab_config(*idle, "trainer.max_epochs=2", run=tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    train(lab_config(*idle, "trainer.max_epochs=4", f"resume={tmp_path / 'new'}", run=tmp_path / "new"))
    assert state(tmp_path / "new", "best.ckpt")["epoch"] == 0
    assert state(tmp_path / "new")["epoch"] == 3


def test_resumption_and_evaluation_want_the_rows_of_the_training(
    tmp_path: Path, rows: Path, lab_config: ComposeConfig
) -> None:
    run, short = tmp_path / "run", (*SMALL, f"dataset.path={rows}", "test=false")
    train(lab_config(*short, "trainer.max_epochs=1"))
    kept = (run / "config_resolved.yaml").read_text()
    np.save(rows, np.load(rows)[:-5])
    with pytest.raises(DataError, match="Expected custom to have the rows of the training"):
        train(lab_config(*short, "trainer.max_epochs=2", f"resume={run}"))
    with pytest.raises(DataError, match="rows of the training"):
        evaluate(lab_config(f"run={run}", command="evaluate"))
    assert (run / "config_resolved.yaml").read_text() == kept


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path: Path, rows: Path, lab_config: ComposeConfig) -> None:
    short = (*SMALL, f"dataset.path={rows}", "trainer.max_epochs=1", "test=false")
    train(lab_config(*short))
    with pytest.raises(ConfigError, match="Expected a run folder without a run in it"):
        train(lab_config(*short))


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")
def test_plateau_counts_validations(tmp_path: Path, rows: Path, lab_config: ComposeConfig) -> None:
    """Epochs without validation bring no news: a rate that waits for two bad ones stays."""
    few = ("trainer.check_val_every_n_epoch=3", "schedule.patience=0", "callbacks=[default]", "trainer.max_epochs=6")
    train(lab_config(*SMALL, f"dataset.path={rows}", *few, "test=false"))
    (schedule,) = state(tmp_path / "run")["lr_schedulers"]
    assert schedule["last_epoch"] == 2


def launch(*arguments: str, cwd: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cnf_lab.train", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_equal_one(tmp_path: Path, rows: Path) -> None:
    """Gradients of two processes are those of the whole batch; test NLL is exact on 11 rows."""
    # A fixed grid: an adaptive one would choose its steps by each process's own rows.
    # No ActNorm: its first gradient is zero but for round-off, and Adam makes a whole step of that.
    same = ("solver=rk4", "trace=exact", "normalisation=none", "callbacks=[default]")
    steps = ("trainer.max_epochs=2", "dataset.steps_per_epoch=4")
    common = (*SMALL, f"dataset.path={rows}", *same, *steps)
    one, two = tmp_path / "one", tmp_path / "two"
    finish(launch(*common, "trainer=cpu", "dataset.batch_size=20", f"hydra.run.dir={one}", cwd=tmp_path))
    finish(launch(*common, "trainer=ddp_cpu", "dataset.batch_size=10", f"hydra.run.dir={two}", cwd=tmp_path))
    for key, value in state(one)["state_dict"].items():
        torch.testing.assert_close(state(two)["state_dict"][key], value, atol=2e-5, rtol=2e-4, msg=key)
    numbers = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    assert numbers[0]["test/nll"] == pytest.approx(numbers[1]["test/nll"], abs=1e-4)
    assert numbers[1]["context"]["data"]["rows"] == {"train": 89, "val": 11, "test": 11}


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_hand_over_together(tmp_path: Path, rows: Path) -> None:
    options = ("objective=flow_matching_then_likelihood", "trainer.max_epochs=-1", "dataset.steps_per_epoch=4")
    plans = ("recipe.flow_matching_steps=8", "recipe.likelihood_steps=4", "normalisation=none", "model.blocks=2")
    run = f"hydra.run.dir={tmp_path / 'run'}"
    output = finish(launch(*SMALL, f"dataset.path={rows}", "trainer=ddp_cpu", *options, *plans, run, cwd=tmp_path))
    assert output.count("flow_matching hands over to likelihood") == 1
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert report["train/steps"] == 12
    assert report["train/stage"] == 1
    assert np.isfinite(report["test/nll"])


@pytest.mark.slow
@pytest.mark.ddp
def test_multirun_with_two_processes_each(tmp_path: Path, rows: Path) -> None:
    """Both ranks of a job train the job's own configuration, and each job has one folder."""
    common = (
        *SMALL,
        f"dataset.path={rows}",
        "trainer=ddp_cpu",
        "trainer.max_epochs=1",
        "callbacks=[default]",
    )
    output = finish(launch("-m", *common, "solver=dopri5,rk4", f"hydra.sweep.dir={tmp_path / 'sweep'}", cwd=tmp_path))
    jobs = sorted(path.parent for path in (tmp_path / "sweep").glob("*/metrics.json"))
    assert len(jobs) == 2, output
    methods = {OmegaConf.load(job / "config_resolved.yaml").solver.method for job in jobs}
    assert methods == {"dopri5", "rk4"}
    assert not (tmp_path / "outputs").exists()
    assert "2 jobs in" in output


@pytest.mark.slow
def test_a_signal_stops_and_resume_goes_on(tmp_path: Path, rows: Path) -> None:
    common = (*SMALL, f"dataset.path={rows}", "callbacks=[default]")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(launch(*common, "trainer.max_epochs=60", f"hydra.run.dir={whole}", cwd=tmp_path))
    process = launch(*common, "trainer.max_epochs=60", f"hydra.run.dir={parts}", cwd=tmp_path)
    checkpoint = parts / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"resume={parts}" in output
    finish(launch(f"resume={parts}", cwd=tmp_path))
    assert equal(state(whole)["state_dict"], state(parts)["state_dict"])
    header, *lines = (parts / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("val/nll")
    assert sum(bool(line.split(",")[column]) for line in lines) >= 60


@pytest.mark.parametrize(("probes", "known"), [(1, False), (4, True)])
def test_error_of_probes_is_reported_beside_an_estimated_likelihood(
    lab_config: Callable[..., DictConfig], probes: int, known: bool
) -> None:
    config = lab_config("debug=fast", "architecture.hidden=[8]", "callbacks=[default]")
    config.model.evaluation_trace = lab_config("trace=hutchinson_gaussian", f"trace.probes={probes}").trace
    train(config)
    metrics = json.loads((Path(config.paths.run) / "metrics.json").read_text())
    error = metrics["test/nll_trace_standard_error"]
    assert (error is not None and 0 < error < 1) if known else error is None
