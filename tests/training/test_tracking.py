"""What wandb is told, read back record by record from offline runs: no server, no network."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from cnf_lab.dashboard import chapters, summary_name
from cnf_lab.errors import SolverError
from cnf_lab.train import train
from cnf_lab.training.command import config_folder
from cnf_lab.training.tracking import MetricLogger, direction, sweep_name

WANDB = Path(sys.executable).parent / "wandb"
STEP = "trainer/global_step"
SMALL = (
    "callbacks=[default,plots]",
    "callbacks.plots.resolution=10",
    "callbacks.plots.samples=8",
    "callbacks.guard.every_n_steps=1",
    "callbacks.guard.rows=4",
    "logger.mode=offline",
    "dataset.batch_size=8",
    "dataset.evaluation_batch_size=16",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.check_val_every_n_epoch=1",
    "trainer.log_every_n_steps=1",
    "threads=1",
)
WITHOUT_PICTURES = ("callbacks=[default]", *(item for item in SMALL if "plots" not in item))
COARSE = ("solver.atol=1e-2", "solver.rtol=1e-2", "solver.evaluation.atol=1e-2", "solver.evaluation.rtol=1e-2")
DIGITS = ("dataset=digits", "dataset.limit=24", "dataset.test_images=8", "dataset.val_images=8", "schedule=constant")
FAMILIES = {
    "density": ("dataset=pinwheel", "architecture.hidden=[8]", "dataset.evaluation_rows=16", "regulariser=kinetic"),
    "two_stages": (
        "dataset=pinwheel",
        "architecture.hidden=[8]",
        "dataset.evaluation_rows=16",
        "objective=flow_matching_then_likelihood",
        "recipe.flow_matching_steps=2",
        "recipe.likelihood_steps=2",
    ),
    "table": ("dataset=custom", "dataset.path=rows.npy", "architecture.hidden=[8]", "objective=likelihood"),
    "image": (*DIGITS, "objective=likelihood", "recipe.hidden=[4,4]", "recipe.channels=4", "recipe.blocks=1", *COARSE),
    "vae": (
        *DIGITS,
        "model=vae",
        "objective=elbo",
        "posterior=cnf_gated",
        "recipe.hidden=[4]",
        "recipe.rank=1",
        "model.latent=4",
        "model.features=8",
        *COARSE,
    ),
}
#: A few names that a run of each must log; the pictures are those of its family.
MUST = {
    "density": {"train/nll", "train/kinetic", "train/loss", "val/nll", "test/nll", "nfe/forward", "lr-Adam"},
    "two_stages": {"train/flow_matching", "train/stage", "train/nll", "val/nll_standard_error", "test/nll"},
    "table": {"train/nll", "val/nll", "test/nll"},
    "image": {"val/bits_per_dim", "test/bits_per_dim", "val/nfe_block_0", "val/log_det_block_0", "train/bits_per_dim"},
    "vae": {"val/negative_elbo", "val/elbo", "val/kl", "val/reconstruction", "test/negative_elbo", "train/beta"},
}
PICTURES = {
    "density": {"plots/density", "plots/trajectories", "plots/curves", "plots/density_test"},
    "two_stages": set(),
    "table": {"plots/marginals", "plots/pairs", "plots/pairs_test"},
    "image": {"plots/samples", "plots/strip", "plots/reconstructions", "plots/film", "plots/samples_test"},
    "vae": {"plots/samples", "plots/reconstructions", "plots/walks", "plots/samples_test"},
}


@dataclass
class Records:
    """The records of one offline run."""

    all: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.all if record["type"] == kind]

    @property
    def history(self) -> list[dict[str, Any]]:
        return [record["item"] for record in self.of("history")]

    @property
    def keys(self) -> set[str]:
        """Names that were logged; of media the name without its parts."""
        found = {key for row in self.history for key in row}
        return {key.rsplit(".", 1)[0] if key.startswith("plots/") else key for key in found if not key.startswith("_")}

    @property
    def definitions(self) -> dict[str, dict[str, Any]]:
        return {record["name"]: record for record in self.of("metric") if "name" in record}

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for record in self.of("summary"):
            found |= record["update"]
        return found

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for record in [*(run.get("config", {}) for run in self.of("run")), *self.of("config")]:
            found |= record.get("update", {})
        return {key: value for key, value in found.items() if not key.startswith("_wandb")}

    @property
    def run(self) -> dict[str, Any]:
        (run,) = self.of("run")
        return run

    @property
    def exit_code(self) -> int:
        (last,) = self.of("exit")
        return last.get("exit_code", 0)


def read(folder: Path) -> list[Records]:
    """Return the offline runs of a run folder, the oldest first."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        done = subprocess.run([WANDB, "leet", "inspect", "--json", file], capture_output=True, text=True, check=True)
        found.append(Records([json.loads(line) for line in done.stdout.splitlines()]))
    return found


def run(folder: Path, *overrides: str) -> float:
    """Train in this process, as the command does, with wandb offline."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", [f"paths.run={folder}", "logger=wandb", *overrides])
    folder.mkdir(exist_ok=True)
    return train(config)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Records]]:
    """Return the run folder and the records of a short run, made when it is first asked for."""

    @cache
    def made(name: str) -> tuple[Path, Records]:
        folder = tmp_path_factory.mktemp(name) / "the_run"
        rows = folder.parent / "rows.npy"
        np.save(rows, np.random.default_rng(0).normal(size=(60, 3)))
        chosen = [item.replace("rows.npy", str(rows)) for item in FAMILIES[name]]
        run(folder, *chosen, *(SMALL if PICTURES[name] else WITHOUT_PICTURES))
        (records,) = read(folder)
        return folder, records

    return made


@pytest.fixture
def family(request: pytest.FixtureRequest, logged: Callable[[str], tuple[Path, Records]]) -> tuple[str, Path, Records]:
    return request.param, *logged(request.param)


EACH = pytest.mark.parametrize("family", FAMILIES, indirect=True)


@EACH
def test_everything_that_is_logged_is_defined_with_its_summary(family: tuple[str, Path, Records]) -> None:
    name, _, records = family
    keys, definitions = records.keys, records.definitions
    assert MUST[name] <= keys
    assert PICTURES[name] <= keys
    assert keys == definitions.keys()
    for key in keys:
        best = direction(key)
        expected = {"none"} if key.startswith("plots/") else {best, "last"}
        assert set(definitions[key]["summary"]) == expected, key
        assert key == STEP or definitions[key]["step_metric"] == STEP, key


@EACH
def test_definitions_come_before_values(family: tuple[str, Path, Records]) -> None:
    _, _, records = family
    defined: set[str] = set()
    for record in records.all:
        if record["type"] == "metric":
            defined.add(record["metric"].get("name", ""))
        if record["type"] == "history":
            assert Records([record]).keys <= defined


@EACH
def test_summary_is_the_best_of_the_history(family: tuple[str, Path, Records]) -> None:
    _, _, records = family
    for key in records.keys:
        values = [row[key] for row in records.history if key in row]
        best = {"min": min, "max": max}.get(direction(key))
        if values and best is not None:
            assert records.summary[key] == {direction(key): best(values), "last": values[-1]}, key


@EACH
def test_configuration_and_names(family: tuple[str, Path, Records]) -> None:
    _, folder, records = family
    resolved = yaml.safe_load((folder / "config_resolved.yaml").read_text())
    assert records.config == json.loads(json.dumps(resolved))
    about = records.run
    assert about["run_id"] == (folder / "wandb_id.txt").read_text()
    assert about["job_type"] == "train"
    assert about["project"] == "cnf_lab"
    assert about["display_name"] == "the_run"
    assert about["tags"] == [resolved["model"]["name"], resolved["dataset"]["name"]]
    assert "run_group" not in about
    assert records.exit_code == 0


@EACH
def test_pictures_are_there(family: tuple[str, Path, Records]) -> None:
    name, folder, records = family
    files = {file["path"] for record in records.of("files") for file in record["files"]}
    for key in PICTURES[name]:
        found = [path for path in files if path.startswith(("media/images/", "media/videos/")) and f"{key}_" in path]
        assert found, key
        for path in found:
            (kept,) = folder.glob(f"wandb/offline-run-*/files/{path}")
            assert kept.stat().st_size > 100


def test_a_resumed_run_goes_on_with_the_same_wandb_run(tmp_path: Path) -> None:
    """The second part is a run file of its own with the same id; its summary knows the first part's best."""
    folder = tmp_path / "run"
    few = [*FAMILIES["density"], *WITHOUT_PICTURES, "optimiser.lr=0.0"]
    run(folder, *few, "test=false")
    table = (folder / "metrics.csv").read_text().splitlines()
    best = {"val/nll": -7.0}  # better than anything that comes: it must survive
    column = table[0].split(",").index("val/nll")
    rows = [row.split(",") for row in table]
    next(row for row in rows[1:] if row[column])[column] = str(best["val/nll"])
    torn = "1.5,2.7e"  # as a killed run may leave it
    (folder / "metrics.csv").write_text("\n".join(",".join(row) for row in rows) + f"\n{torn}\n")

    run(folder, *few, "trainer.max_epochs=4", f"resume='{folder}'")
    first, second = read(folder)
    assert first.run["run_id"] == second.run["run_id"] == (folder / "wandb_id.txt").read_text()
    assert second.run["resume"] is True
    assert max(row[STEP] for row in first.history) < min(row[STEP] for row in second.history if "val/nll" in row)
    assert {row["epoch"] for row in second.history if "val/nll" in row} == {2, 3}
    assert second.summary["val/nll"]["min"] == best["val/nll"]
    assert second.summary["val/nll"]["last"] == [row["val/nll"] for row in second.history if "val/nll" in row][-1]
    tested = [row["test/nll"] for row in second.history if "test/nll" in row]
    assert second.summary["test/nll"] == {"min": tested[0], "last": tested[0]}
    assert second.config["trainer"]["max_epochs"] == 4
    assert second.keys == second.definitions.keys()


@pytest.mark.parametrize("model", ["density", "realnvp"])
def test_failed_and_diverged_runs_are_marked(model: str, tmp_path: Path) -> None:
    """A continuous flow that explodes ends in an error, a discrete one in NaN without any."""
    if model == "realnvp":
        pytest.importorskip("zuko")
    few = ("dataset=pinwheel", "dataset.evaluation_rows=16", "optimiser.lr=1e30")
    options = (f"model={model}", *few, *(item for item in WITHOUT_PICTURES if "guard" not in item))
    if model == "density":
        with pytest.raises(SolverError, match="has exploded"):
            run(tmp_path / "run", *options)
    else:
        assert not math.isfinite(run(tmp_path / "run", *options))
    (records,) = read(tmp_path / "run")
    assert records.exit_code == 1


def test_one_nan_does_not_spoil_the_best(tmp_path: Path) -> None:
    import wandb

    options = {"project": "p", "save_dir": str(tmp_path), "mode": "offline", "settings": wandb.Settings(silent=True)}
    logger = MetricLogger(**options)
    for step, value in enumerate([2.0, 1.0, math.nan]):
        logger.log_metrics({"val/nll": value, "val/elbo": -value, "beta": 0.1}, step)
    logger.finalize("success")
    wandb.finish()
    (records,) = read(tmp_path)
    assert records.summary["val/nll"] == {"min": 1.0, "last": None}
    assert records.summary["val/elbo"] == {"max": -1.0, "last": None}
    assert records.summary["beta"] == {"last": 0.1}


@pytest.mark.parametrize(
    ("shown", "runs"),
    {"density": ("density", "two_stages", "table"), "image": ("image", "two_stages"), "vae": ("vae",)}.items(),
)
def test_panels_of_the_dashboard_show_what_runs_log(
    shown: str, runs: tuple[str, ...], logged: Callable[[str], tuple[Path, Records]]
) -> None:
    kept = {name: logged(name)[1] for name in runs}
    keys = set().union(*(records.keys for records in kept.values()))
    summaries = {
        f"{name}.{part}"
        for records in kept.values()
        for name, parts in records.summary.items()
        if isinstance(parts, dict)
        for part in parts
    }
    for panel in (panel for chapter in chapters([shown]) for panel in chapter.panels):
        assert {*panel.metrics, panel.x} <= keys, panel.title
        if panel.pattern:
            assert any(re.search(panel.pattern, key) for key in keys), panel.title
        if panel.kind in ("scatter", "parallel"):
            assert {summary_name(name) for name in (*panel.metrics, panel.x)} <= {*summaries, summary_name(STEP)}, (
                panel.title
            )
        if panel.kind == "curves" and panel.x != STEP:  # drawn only where one call of log had both
            rows = [row for records in kept.values() for row in records.history]
            assert all(any(name in row and panel.x in row for row in rows) for name in panel.metrics), panel.title


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("val/nll test/nll train/nll val/bits_per_dim test/bits_per_dim val/negative_elbo train/loss", "min"),
        ("train/flow_matching val/nll_standard_error val/nll_trace_standard_error", "min"),
        ("test/bits_per_dim_dequantisation_standard_error val/negative_elbo_standard_error", "min"),
        ("nfe/forward nfe/backward val/nfe val/nfe_block_0 test/nfe_block_12 solver/rejected_steps", "min"),
        ("solver/likelihood_gap time/step_seconds memory/peak_mebibytes", "min"),
        ("val/elbo test/elbo elbo", "max"),
        ("lr-Adam lr-Adam/pg1 epoch train/stage train/beta time/elapsed_seconds trainer/global_step", "last"),
        ("val/kl val/reconstruction val/log_det val/log_det_block_1 train/kinetic train/jacobian own/thing", "last"),
    ],
)
def test_direction(names: str, expected: str) -> None:
    assert {name: direction(name) for name in names.split()} == dict.fromkeys(names.split(), expected)


def test_the_group_of_a_job_is_its_sweeps_folder_also_when_resumed(tmp_path: Path) -> None:
    job = tmp_path / "the_sweep" / "0_seed-1"
    assert sweep_name(job) is None
    (job / ".hydra").mkdir(parents=True)
    saved = {"hydra": {"mode": "RUN", "runtime": {"output_dir": str(job)}}}
    OmegaConf.save(saved, job / ".hydra" / "hydra.yaml")
    assert sweep_name(job) is None
    OmegaConf.update(config := OmegaConf.create(saved), "hydra.mode", "MULTIRUN")
    OmegaConf.save(config, job / ".hydra" / "hydra.yaml")
    assert sweep_name(job) == "the_sweep"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_jobs_of_a_multirun_are_a_group(launcher: str, tmp_path: Path) -> None:
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(60, 2)))
    arguments = ["dataset=custom", "dataset.path=rows.npy", "architecture.hidden=[4]", "objective=likelihood"]
    arguments += [*WITHOUT_PICTURES, "seed=1,2"]
    sweep = f"hydra.sweep.dir={tmp_path / 'the sweep'}"
    command = [sys.executable, "-m", "cnf_lab.train", "-m", *arguments, sweep, f"hydra/launcher={launcher}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = sorted((tmp_path / "the sweep").glob("*_seed-*"))
    assert len(jobs) == 2
    for job in jobs:
        (records,) = read(job)
        assert records.run["run_group"] == "the sweep"
        assert sweep_name(job) == "the sweep"  # which is what a resumed job asks
        assert records.run["display_name"] == job.name
        assert records.exit_code == 0
