"""Sweeps: launchers, a job that is killed, jobs that are not run twice, searches, and what Slurm would be given."""

import importlib.util
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from cnf_lab import train as command
from cnf_lab.errors import RunExistsError
from cnf_lab.report import report
from cnf_lab.reporting.collect import collect
from cnf_lab.train import train
from cnf_lab.training.command import config_folder
from cnf_lab.training.sweep import SweepSummary

ComposeConfig = Callable[..., DictConfig]
needs_plugins = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs cnf-lab[sweep]")
TINY = (
    "dataset=moons",
    "dataset.evaluation_rows=50",
    "dataset.batch_size=16",
    "architecture.hidden=[8]",
    "callbacks=[default]",
    "logger=csv",
    "debug=fast",
    "threads=1",
)


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable[..., str]:
    """Run a multirun in this process in the test's folder; give back what it printed as an error."""
    # Hydra's would outlive a test's streams, of this module and of others.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def run(*arguments: str) -> str:
        fixed = ["-m", *TINY, f"hydra.sweep.dir={tmp_path / 'sweep'}"]
        monkeypatch.setattr(sys, "argv", ["train", *fixed, *arguments])
        GlobalHydra.instance().clear()
        code = 0
        try:
            command.main()
        except SystemExit as stop:
            code = stop.code
        error = capsys.readouterr().err if code else ""
        assert code == (2 if error or SweepSummary.missing else 0)
        return error

    return run


def jobs(folder: Path) -> dict[str, Path]:
    """Job folders by what varies."""
    return {path.name.partition("_")[2]: path for path in (folder / "sweep").iterdir() if path.name[0].isdigit()}


def table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "sweep" / "summary.csv").set_index("overrides")


def written(folder: Path) -> dict[str, int]:
    """Say when a job that is done was written."""
    files = {name: job / "metrics.json" for name, job in jobs(folder).items()}
    return {name: file.stat().st_mtime_ns for name, file in files.items() if file.is_file()}


def test_what_is_done_is_not_run_twice(sweep: Callable[..., str], tmp_path: Path) -> None:
    """A failed job and a half-done one run again, the latter from its checkpoint; the others stay as they are."""
    arguments = ("seed=0,1,2,3",)
    assert not sweep(*arguments)
    before, folders = written(tmp_path), jobs(tmp_path)
    value = json.loads((folders["seed-1"] / "metrics.json").read_text())["val/nll"]
    shutil.rmtree(folders["seed-1"] / "checkpoints")  # cut off before the first epoch's end
    (folders["seed-1"] / "metrics.json").unlink()
    (folders["seed-2"] / "metrics.json").unlink()  # cut off after the last epoch
    (folders["seed-3"] / "FAILED").write_text("RuntimeError: of an earlier try\n")
    lines = (folders["seed-2"] / "metrics.csv").read_text().splitlines()
    assert not sweep(*arguments, "skip_done=true")
    after = written(tmp_path)
    assert after["seed-0"] == before["seed-0"]
    assert all(after[name] > before[name] for name in ("seed-1", "seed-2", "seed-3"))
    assert not list((tmp_path / "sweep").glob("*/FAILED"))
    assert set(table(tmp_path)["status"]) == {"done"}
    again = json.loads((folders["seed-1"] / "metrics.json").read_text())["val/nll"]
    assert again == value, "the same numbers as the first time"
    assert (folders["seed-2"] / "metrics.csv").read_text().splitlines()[: len(lines) - 1] == lines[:-1]


def test_value_of_a_run_that_is_done(lab_config: ComposeConfig, tmp_path: Path) -> None:
    """A sweeper gets the same number; and only a run of the same configuration counts."""
    value = train(lab_config(*TINY))
    metrics = tmp_path / "run" / "metrics.json"
    stamp = metrics.stat().st_mtime_ns
    assert train(lab_config(*TINY, "skip_done=true", "logger=none", "threads=2")) == value
    assert metrics.stat().st_mtime_ns == stamp
    with pytest.raises(RunExistsError, match=r"Expected a run with optimiser\.lr=0\.5 in .*, got one with .*lr=0\.005"):
        train(lab_config(*TINY, "skip_done=true", "optimiser.lr=0.5"))
    metrics.rename(tmp_path / "metrics.json")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "metrics.json").rename(tmp_path / "moved" / "metrics.json")
    assert train(lab_config(*TINY, "skip_done=true", run=tmp_path / "moved")) == value
    (tmp_path / "moved" / "metrics.json").write_text(json.dumps({"val/nll": None}))
    assert train(lab_config(*TINY, "skip_done=true", run=tmp_path / "moved")) == math.inf


def test_a_job_requeued_by_slurm_goes_on(
    lab_config: ComposeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = train(lab_config(*TINY))
    with pytest.raises(RunExistsError):
        train(lab_config(*TINY))
    (tmp_path / "run" / "metrics.json").unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(lab_config(*TINY)) == value


def test_another_configuration_is_refused(sweep: Callable[..., str], tmp_path: Path) -> None:
    """In one line, and without touching the run; a job that is not there runs."""
    assert not sweep("seed=0,1")
    kept = {path: path.read_text() for path in (tmp_path / "sweep").glob("*/.hydra/*.yaml")}
    shutil.rmtree(jobs(tmp_path)["seed-1"])
    error = sweep("seed=0,1", "skip_done=true", "optimiser.lr=0.5")
    assert error.startswith("error: 1 job is not done: 0_seed-0: RunExistsError: Expected a run with optimiser.lr=0.5")
    assert len(error.splitlines()) == 1
    first = jobs(tmp_path)["seed-0"]
    assert all(text == path.read_text() for path, text in kept.items() if first in path.parents)
    assert not list((tmp_path / "sweep").glob("*/FAILED"))
    assert not list((tmp_path / "sweep").glob("*/REFUSED"))
    runs, _ = collect([tmp_path / "sweep"])
    assert [run.status for run in runs] == ["done", "done"]


def test_failed_and_killed_jobs_are_listed(sweep: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "sweep" / "7_seed-7" / ".hydra").mkdir(parents=True)  # of a sweep that was killed as a whole
    (tmp_path / "sweep" / "7_seed-7" / ".hydra" / "overrides.yaml").write_text("[seed=7]\n")
    (tmp_path / "sweep" / "7_seed-7" / "metrics.json").write_text('{"val/nll": 1')
    error = sweep("trace=exact,bottleneck")
    assert error.startswith("error: 2 jobs are not done; the first one: 1_trace-bottleneck: ConfigError: Expected")
    rows = pd.read_csv(tmp_path / "sweep" / "summary.csv")["status"]
    assert list(rows)[0] == "done"
    assert "trace=bottleneck" in rows[1]
    assert rows[2] == "killed: neither metrics.json nor FAILED"


@pytest.mark.parametrize("model", ["density", "realnvp"])
def test_a_diverged_job_is_infinitely_bad(
    model: str, lab_config: ComposeConfig, tmp_path: Path, sweep: Callable[..., str]
) -> None:
    """Whether a solve fails or a likelihood is no number; the next job runs."""
    if model == "realnvp":
        pytest.importorskip("zuko")
        assert train(lab_config(*TINY, f"model={model}", "optimiser.lr=1e30")) == math.inf
    error = sweep(f"model={model}", "optimiser.lr=1e30,1e-3")
    reason = {"density": "SolverError: The solve with", "realnvp": "diverged: no finite likelihood"}[model]
    assert error.startswith(f"error: 1 job is not done: 0_optimiser.lr-1e-30: {reason}")
    assert list(table(tmp_path)["status"])[1] == "done"


@needs_plugins
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of Optuna 2 on SQLAlchemy 2
def test_search(sweep: Callable[..., str], tmp_path: Path) -> None:
    """Trials that fail or diverge are infinitely bad, the search goes on, and it goes on again with more trials."""
    space = ("hydra/sweeper=search", "optimiser.lr=interval(1e-4,1e-2)", "trace=exact,bottleneck")
    error = sweep(*space, "hydra.sweeper.n_trials=4")
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    rows = pd.read_csv(tmp_path / "sweep" / "summary.csv")
    assert len(rows) == 4
    done = rows[rows["status"] == "done"]
    assert 0 < len(done) < 4, "seeded so that both come"
    assert f"{4 - len(done)} job" in error
    assert best.best_params.trace == "exact"
    assert best.best_value == pytest.approx(done["val/nll"].min(), abs=1e-4)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/metrics.json")}
    sweep(*space, "hydra.sweeper.n_trials=6", "skip_done=true")
    assert len(pd.read_csv(tmp_path / "sweep" / "summary.csv")) == 6
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


@pytest.mark.parametrize(
    ("choice", "plugin"),
    [("hydra/launcher=parallel", "cnf_lab_launchers"), ("hydra/sweeper=search", "hydra_optuna_sweeper")],
)
def test_extra_that_is_not_installed(
    choice: str, plugin: str, sweep: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Plugins.instance().class_name_to_class
    left = {name: kind for name, kind in known.items() if plugin not in name}
    monkeypatch.setattr(Plugins.instance(), "class_name_to_class", left)
    error = sweep(choice, "seed=0,1")
    assert error.startswith("error: Expected Hydra's plugins for sweeps to be installed, got none for hydra_plugins.")
    assert error.strip().endswith('Type pip install "cnf-lab[sweep]".')
    assert len(error.splitlines()) == 1


def test_unknown_launcher_is_answered_with_those_there_are(sweep: Callable[..., str]) -> None:
    error = sweep("hydra/launcher=slrum")
    assert "Expected hydra/launcher to be one of parallel, slurm, slurm_4gpu, submitit; got slrum." in error
    assert "Type hydra/launcher=slurm." in error


LAUNCHERS = sorted(path.stem for path in (config_folder() / "hydra" / "launcher").glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=True)


@needs_plugins
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_compose_and_can_be_made(launcher: str) -> None:
    node = composed(f"hydra/launcher={launcher}", "hydra.sweep.dir=x", "hydra.job.name=train").hydra.launcher
    plugin = Plugins.instance()._instantiate(node)
    options = {key for key in node if not key.startswith("_")}
    assert options == set(getattr(plugin, "params", {})) | (vars(plugin).keys() & {"n_jobs", "gpus"})


@needs_plugins
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_sweepers_compose_and_can_be_made() -> None:
    for sweeper in (config_folder() / "hydra" / "sweeper").glob("*.yaml"):
        node = composed(f"hydra/sweeper={sweeper.stem}").hydra.sweeper
        assert Plugins.instance()._instantiate(node).sweeper.n_trials == node.n_trials


@pytest.fixture
def app(tmp_path: Path) -> Callable[..., str]:
    """Run a multirun of an application that only sleeps, with the lab's launchers; give back what it printed."""
    (tmp_path / "app.py").write_text(
        "import os, time, hydra\n"
        "@hydra.main(config_path='conf', config_name='app', version_base='1.3')\n"
        "def main(config):\n"
        f"    log = open({str(tmp_path / 'log')!r}, 'a')\n"
        "    gpu = os.environ['CUDA_VISIBLE_DEVICES']\n"
        "    print('begin', gpu, file=log, flush=True)\n"
        "    time.sleep(0.2)\n"
        "    print('end', gpu, file=log, flush=True)\n"
        "main()\n"
    )
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "app.yaml").write_text("defaults: [{trainer: auto}]\n")
    for group in ("hydra", "trainer"):
        shutil.copytree(config_folder() / group, tmp_path / "conf" / group)

    def run(*arguments: str) -> str:
        command = [sys.executable, "app.py", "-m", f"hydra.sweep.dir={tmp_path / 'sweep'}", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    return run


@needs_plugins
def test_each_job_has_a_gpu_of_its_own(app: Callable[..., str], tmp_path: Path) -> None:
    """No two jobs at a time share one, and there are no more jobs at a time than GPUs."""
    app("hydra/launcher=parallel", "hydra.launcher.gpus=[3,5]", "hydra.launcher.n_jobs=4", "+number=0,1,2,3")
    busy: set[str] = set()
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    for what, gpu in lines:
        assert (gpu in busy) == (what == "end")
        busy ^= {gpu}
    assert {gpu for _, gpu in lines} == {"3", "5"}
    assert len(lines) == 8


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm that refuses what it is given and keeps it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/batch.sh\necho "invalid partition" >&2\nexit 1\n')
    (tools / "srun").write_text("#!/bin/sh\nexit 1\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tmp_path / "batch.sh"


@needs_plugins
@pytest.mark.parametrize(
    ("launcher", "gpus", "trainer"),
    [("slurm", 1, ("trainer=gpu",)), ("slurm_4gpu", 4, ("trainer=ddp", "trainer.devices=4"))],
)
def test_what_slurm_is_given(
    launcher: str, gpus: int, trainer: tuple[str, ...], slurm: Path, app: Callable[..., str], tmp_path: Path
) -> None:
    """A process per GPU, a time limit, and the signal before it; what Slurm refuses stands in the job's folder."""
    options = ("hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=90")
    app(f"hydra/launcher={launcher}", *trainer, *options)
    failed = (tmp_path / "sweep" / "0" / "FAILED").read_text()
    assert failed.startswith("Lost: ")
    assert "invalid partition" in failed
    batch = slurm.read_text().splitlines()
    for line in (
        f"#SBATCH --gpus-per-node={gpus}",
        f"#SBATCH --ntasks-per-node={gpus}",
        "#SBATCH --nodes=1",
        "#SBATCH --time=90",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --partition=gpu",
        "#SBATCH --cpus-per-task=8",
        f"#SBATCH --mem={32 * gpus}GB",
        "#SBATCH --job-name=app",
    ):
        assert line in batch
    assert any(line.startswith("srun --unbuffered") and "submitit.core._submit" in line for line in batch)


@needs_plugins
def test_processes_of_slurm_and_of_the_trainer_agree(slurm: Path, sweep: Callable[..., str]) -> None:
    error = sweep("hydra/launcher=slurm_4gpu", "trainer=gpu", "seed=0,1")
    assert error.startswith("error: Expected trainer.devices=4 and trainer.num_nodes=1, the processes and nodes of")
    assert "got 1 and 1. Type trainer=ddp trainer.devices=4 trainer.num_nodes=1" in error
    assert len(error.splitlines()) == 1
    assert not slurm.exists()


@needs_plugins
def test_without_slurm(sweep: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = sweep("hydra/launcher=slurm", "seed=0,1")
    assert error.startswith("error: Expected Slurm's srun and sbatch on this machine, got none.")
    assert len(error.splitlines()) == 1


def launch(*arguments: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "cnf_lab.train", "-m", *TINY, f"hydra.sweep.dir={cwd / 'sweep'}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def process_of(job: Path) -> int:
    """Return the process that trains in a folder, when it has made a checkpoint: the one that writes its log."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (job / "checkpoints" / "last.ckpt").is_file():
            for descriptors in Path("/proc").glob("[0-9]*/fd"):
                try:
                    links = [os.readlink(descriptor) for descriptor in descriptors.iterdir()]
                except OSError:
                    continue  # gone, or another user's
                if str(job / "train.log") in links:
                    return int(descriptors.parent.name)
        time.sleep(0.05)
    raise AssertionError(f"nothing trains in {job}")


@needs_plugins
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the process in /proc")
@pytest.mark.parametrize("launcher", ["parallel", "submitit"])
def test_a_killed_job_leaves_the_others_and_the_page(launcher: str, tmp_path: Path) -> None:
    """And the same command with skip_done=true runs that job alone, from its last checkpoint."""
    options = (f"hydra/launcher={launcher}", "hydra.launcher.n_jobs=2", "trainer.max_epochs=200,2,3,4")
    process = launch(*options, cwd=tmp_path)
    victim = tmp_path / "sweep" / "0_trainer.max_epochs-200"
    os.kill(process_of(victim), signal.SIGKILL)
    output, error = process.communicate(timeout=240)
    assert process.returncode == 2, output + error
    assert error.strip().startswith("error: 1 job is not done: 0_trainer.max_epochs-200: Killed: the job's process")
    assert len(error.strip().splitlines()) == 1
    assert "Not done:\n  0_trainer.max_epochs-200: Killed:" in output
    statuses = list(table(tmp_path)["status"])
    assert statuses[0].startswith("Killed:")
    assert statuses[1:] == ["done"] * 3
    assert table(tmp_path)["test/nll"].notna().sum() == 3
    page = report([str(tmp_path / "sweep")]).read_text()
    assert "Killed:" in page
    assert [run.status for run in collect([tmp_path / "sweep"])[0]] == ["failed", "done", "done", "done"]

    before = written(tmp_path)
    epoch = torch.load(victim / "checkpoints" / "last.ckpt", weights_only=True)["epoch"]
    output, error = launch(*options, "skip_done=true", cwd=tmp_path).communicate(timeout=240)
    assert not error.strip()
    after = written(tmp_path)
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"trainer.max_epochs-200"}
    assert list(table(tmp_path)["status"]) == ["done"] * 4
    first, again = (victim / "train.log").read_text().split("moons: events")[1:]
    assert "epoch 199 " not in first
    assert f"epoch {epoch} " not in again
    assert f"epoch {epoch + 1} " in again
    assert "epoch 199 " in again


@pytest.fixture
def running_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What submitit and Lightning need of Slurm, on this machine: sbatch, srun, sacct, and scontrol to requeue."""
    tools = tmp_path / "tools"
    tools.mkdir()
    state = tmp_path / "state"
    state.mkdir()
    (tools / "sbatch").write_text(f"""#!/bin/bash
export SLURM_JOB_ID=$((10000 + RANDOM)) SLURM_JOB_NAME=train SLURM_JOB_NUM_NODES=1 SLURM_NNODES=1
export SLURM_JOB_NODELIST=localhost SLURM_NODELIST=127.0.0.1 SLURM_RESTART_COUNT=0
export SLURM_NTASKS=$(sed -n 's/^#SBATCH --ntasks-per-node=//p' "$1")
export SLURM_NTASKS_PER_NODE=$SLURM_NTASKS
job={state}/$SLURM_JOB_ID
cp "$1" $job.sh
(
    bash $job.sh
    while [ -f $job.requeue ]; do rm $job.requeue; SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1)); bash $job.sh; done
    touch $job.done
) >$job.log 2>&1 &
echo "Submitted batch job $SLURM_JOB_ID"
""")
    (tools / "srun").write_text("""#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] && shift || shift 2; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" &
done
wait
""")
    (tools / "sacct").write_text(f"""#!/bin/bash
echo "JobID|State|NodeList"
for job in "$@"; do
    [ -f {state}/$job.sh ] && echo "$job|$([ -f {state}/$job.done ] && echo COMPLETED || echo RUNNING)|localhost"
done
""")
    (tools / "scontrol").write_text(f"#!/bin/bash\ntouch {state}/$2.requeue\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return state


@needs_plugins
@pytest.mark.slow
@pytest.mark.ddp
def test_processes_that_slurm_starts_train_one_model(running_slurm: Path, tmp_path: Path) -> None:
    options = ("hydra/launcher=slurm", "hydra.launcher.tasks_per_node=2", "hydra.launcher.gpus_per_node=2")
    process = launch(*options, "trainer=ddp_cpu", "seed=0,1", cwd=tmp_path)
    output, error = process.communicate(timeout=240)
    logs = "".join(path.read_text() for path in running_slurm.glob("*.log"))
    assert process.returncode == 0, output + error + logs
    assert list(table(tmp_path)["status"]) == ["done", "done"]
    assert len(jobs(tmp_path)) == 2
    for folder in jobs(tmp_path).values():
        log = (folder / "train.log").read_text()
        assert log.count("epoch 1 ") == 1, "the second process trains in the same run, and is silent"
    assert logs.count("MEMBER: 2/2") + logs.count("MEMBER: 1/2") == 4


@needs_plugins
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the process in /proc")
def test_a_preempted_job_is_requeued_and_goes_on(running_slurm: Path, tmp_path: Path) -> None:
    process = launch("hydra/launcher=slurm", "trainer=cpu", "trainer.max_epochs=150", "seed=0,1", cwd=tmp_path)
    job = tmp_path / "sweep" / "0_seed-0"
    os.kill(process_of(job), signal.SIGUSR2)
    output, error = process.communicate(timeout=300)
    logs = "".join(path.read_text() for path in running_slurm.glob("*.log"))
    assert process.returncode == 0, output + error + logs
    assert "Requeued job" in logs
    first, again = (job / "train.log").read_text().split("moons: events")[1:]
    assert "epoch 149 " not in first
    assert "epoch 0 " not in again
    assert "epoch 149 " in again
    assert list(table(tmp_path)["status"]) == ["done", "done"]
