"""The dashboard and the sweep of wandb: made, written, saved and run without a server."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from cnf_lab.dashboard import FAMILIES, chapters, dashboard, model_names, summary_name
from cnf_lab.errors import ConfigError
from cnf_lab.training.command import config_folder
from cnf_lab.training.tracking import direction

ComposeConfig = Callable[..., DictConfig]
SWEEP = config_folder() / "wandb_sweep.yaml"


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping in a tree."""
    if isinstance(tree, dict):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from nodes(part)


@pytest.fixture
def written(request: pytest.FixtureRequest, tmp_path: Path, lab_config: ComposeConfig) -> tuple[list[str], Any, Any]:
    """The families, and the workspace and the page that were written for them."""
    pytest.importorskip("wandb_workspaces")
    families = list(FAMILIES) if request.param == "all" else request.param.split(",")
    family = f"family=[{request.param}]" if "," in request.param else f"family={request.param}"
    dashboard(lab_config(family, f"output={tmp_path}", "entity=team", "project=flows", command="dashboard"))
    return families, *(json.loads((tmp_path / f"{name}.json").read_text()) for name in ("workspace", "report"))


EACH = pytest.mark.parametrize("written", ["all", "density", "image", "vae", "density,vae"], indirect=True)


@EACH
def test_what_is_written_shows_every_chapter_and_panel(written: tuple[list[str], Any, Any]) -> None:
    families, workspace, report = written
    shown = chapters(families)
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [chapter.name for chapter in shown]
    headings = [block["children"][0]["text"] for block in report["spec"]["blocks"] if block.get("type") == "heading"]
    assert headings == [chapter.name for chapter in shown]
    for family in families:
        assert {f"Likelihood: {family}", f"Pictures: {family}"} <= set(headings)
    for tree in (workspace, report):
        panels = [node for node in nodes(tree) if "viewType" in node]
        assert len(panels) == sum(len(chapter.panels) for chapter in shown)
        names = {name for node in panels for name in node["config"].get("metrics", [])}
        names |= {name for node in panels for name in node["config"].get("mediaKeys", [])}
        plain = (panel for chapter in shown for panel in chapter.panels if panel.kind not in ("scatter", "parallel"))
        assert names == {name for panel in plain for name in panel.metrics}
    assert (workspace["entity"], workspace["project"]) == ("team", "flows")
    assert report["project"] == {"name": "flows", "entityName": "team"}


@EACH
def test_runs_are_those_of_the_families(written: tuple[list[str], Any, Any]) -> None:
    families, workspace, report = written
    wanted = [] if len(families) == len(FAMILIES) else [model_names(families)]
    for tree in (workspace, report):
        run_sets = [run_set for node in nodes(tree) for run_set in node.get("runSets", [])]
        assert run_sets
        for run_set in run_sets:
            filters = run_set["filters"]["filters"]
            assert [item["value"] for item in filters] == wanted
            assert all(item["key"] == {"section": "run", "name": "tags"} for item in filters)


@EACH
def test_keys_of_the_configuration_exist(written: tuple[list[str], Any, Any], lab_config: ComposeConfig) -> None:
    _, workspace, report = written
    text = json.dumps([workspace, report])
    options = {match.replace(".value", "") for match in re.findall(r'"config:([\w.]+)"', text)}
    assert {"dataset.name", "model.name", "optimiser.lr"} <= options
    config = lab_config()
    assert all(OmegaConf.select(config, option) is not None for option in options), options
    summaries = set(re.findall(r'"summary:([^"]+)"', text))
    assert summaries
    assert all(summary_name(name.rpartition(".")[0]) == name for name in summaries)


def test_panels_of_a_page_do_not_overlap(lab_config: ComposeConfig, tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    dashboard(lab_config(f"output={tmp_path}", command="dashboard"))
    report = json.loads((tmp_path / "report.json").read_text())
    for block in report["spec"]["blocks"]:
        if block["type"] == "panel-grid":
            taken: set[tuple[int, int]] = set()
            for panel in block["metadata"]["panelBankSectionConfig"]["panels"]:
                x, y, w, h = (panel["layout"][side] for side in "xywh")
                cells = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
                assert x + w <= 24
                assert not cells & taken
                taken |= cells


def test_models_of_the_families_are_all_models() -> None:
    assert model_names(["vae"]) == ["vae"]
    assert model_names(["image"]) == ["image"]
    assert model_names(["density"]) == ["density", "maf", "nsf", "realnvp"]
    assert len(model_names(list(FAMILIES))) == len(list((config_folder() / "model").glob("*.yaml")))


def test_online_saves_both(lab_config: ComposeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces")
    import wandb

    dashboard(lab_config(f"output={tmp_path}", command="dashboard"))  # imports without pydantic's warnings
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    saved = []
    for kind in (workspaces.Workspace, reports.Report):
        monkeypatch.setattr(kind, "save", lambda self: saved.append((type(self).__name__, self.entity, self.project)))
        monkeypatch.setattr(kind, "url", property(lambda self: "https://wandb.example"))
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity="me"))
    dashboard(lab_config("online=true", "project=p", command="dashboard"))
    dashboard(lab_config("online=true", "project=p", "entity=team", command="dashboard"))
    both = ("Report", "Workspace")
    assert saved == [(kind, entity, "p") for entity in ("me", "team") for kind in both]

    def refused(self: Any) -> None:
        raise ValueError("permission denied")

    monkeypatch.setattr(workspaces.Workspace, "save", refused)
    with pytest.raises(ConfigError, match=r"Expected wandb to save to team/cnf_lab, got ValueError: permission denied"):
        dashboard(lab_config("online=true", "entity=team", command="dashboard"))
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity=None))
    with pytest.raises(ConfigError, match=r"Expected an entity for online=true, got none. Type entity="):
        dashboard(lab_config("online=true", command="dashboard"))


def test_online_without_a_login(lab_config: ComposeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"Expected a login at wandb for online=true, .*Type wandb login, or"):
        dashboard(lab_config("online=true", command="dashboard"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("family=flow", r"Expected family to be all or some of density, image, vae, got flow. Type family=all."),
        ("family=[density,x]", r"got x. Type family=all."),
        ("family=[]", r"got none. Type family=all."),
        ("online=maybe", r"Expected online to be true or false, got maybe. Type online=true."),
    ],
)
def test_mistakes(option: str, message: str, lab_config: ComposeConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        dashboard(lab_config(option, command="dashboard"))


def test_without_the_extra(lab_config: ComposeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ConfigError, match=r'wandb-workspaces to be installed.*Type pip install "cnf-lab\[dashboard\]"'):
        dashboard(lab_config(command="dashboard"))


# ---------------------------------------------------------------- the sweep


def choices(parameter: dict[str, Any]) -> list[Any]:
    """Values that the server may choose for a parameter: all that are listed, or both ends."""
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def typed(sweep: dict[str, Any], which: int) -> list[str]:
    """Return the command that wandb's agent runs for one choice, by its own functions."""
    from wandb.sdk.launch.sweeps import utils

    args = {name: {"value": choices(node)[which % len(choices(node))]} for name, node in sweep["parameters"].items()}
    known = utils.create_sweep_command_args({"args": args})
    known |= {"interpreter": [sys.executable], "program": [sweep["program"]], "env": ["/usr/bin/env"]}
    command: list[str] = []
    for part in utils.create_sweep_command(sweep["command"]):
        name = re.fullmatch(r"\$\{(\w+)\}", str(part))
        command += known[name.group(1)] if name else [str(part)]
    return command


@pytest.fixture
def sweep() -> dict[str, Any]:
    return yaml.safe_load(SWEEP.read_text())


def test_the_sweep_goes_by_a_metric_in_its_direction(sweep: dict[str, Any], lab_config: ComposeConfig) -> None:
    metric, goal = sweep["metric"]["name"], sweep["metric"]["goal"]
    assert goal == {"min": "minimize", "max": "maximize"}[direction(metric)]
    config = lab_config("logger=wandb", *typed(sweep, 0)[4:])
    assert metric == config.model.monitor
    assert metric in {name for chapter in chapters(["density"]) for panel in chapter.panels for name in panel.metrics}
    assert sweep["method"] == "bayes"


@pytest.mark.parametrize("which", range(3))
def test_every_choice_of_the_sweep_composes(which: int, sweep: dict[str, Any], lab_config: ComposeConfig) -> None:
    command = typed(sweep, which)
    assert command[:4] == ["/usr/bin/env", sys.executable, "-m", "cnf_lab.train"]
    overrides = command[4:]
    config = lab_config("logger=wandb", *overrides)
    assert config.logger.mode == "online"  # an agent's run exists at the server already
    for override in OverridesParser.create().parse_overrides(overrides):
        found = OmegaConf.select(config, override.key_or_group)
        if OmegaConf.is_dict(found):
            found = found.name  # dataset=...
        assert found == override.value(), override.input_line
    for name in sweep["parameters"]:
        assert "." in name, "a group's name would take the place of its node in wandb's configuration"
        assert OmegaConf.select(lab_config(), name) is not None


@pytest.mark.slow
def test_the_command_of_the_sweep_runs(sweep: dict[str, Any], tmp_path: Path) -> None:
    """As the agent starts it, but offline and short; the run takes the id that the agent chose."""
    short = ["debug=fast", "logger.mode=offline", "callbacks=[default]", "threads=1", "dataset.evaluation_rows=20"]
    short.append(f"hydra.run.dir={tmp_path / 'run'}")
    agent = {"WANDB_SWEEP_ID": "s123", "WANDB_RUN_ID": "fromagent", "OMP_NUM_THREADS": "1"}
    command = [part for part in typed(sweep, 1) if not part.startswith("logger.mode")]
    done = subprocess.run([*command, *short], cwd=tmp_path, capture_output=True, text=True, env=os.environ | agent)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert sweep["metric"]["name"] in metrics
    assert (tmp_path / "run" / "wandb_id.txt").read_text() == "fromagent"
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*-*")
    assert kept.name.endswith("fromagent")
