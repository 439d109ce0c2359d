"""A wandb workspace and a report page made by code: ``python -m cnf_lab.dashboard online=true entity=my-team``.

Every panel shows what runs log, by the names that they log it under. What is drawn is plain data,
:func:`chapters`; only what turns it into wandb's panels needs the package ``wandb-workspaces``.
"""

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from cnf_lab.errors import ConfigError
from cnf_lab.models import DensityModule, FlowModule, ImageModule, VaeModule
from cnf_lab.training.command import config_folder, run_command
from cnf_lab.training.run import write_json
from cnf_lab.training.tracking import STEP, direction

log = logging.getLogger("cnf_lab")
FAMILIES: dict[str, type[FlowModule[Any]]] = {"density": DensityModule, "image": ImageModule, "vae": VaeModule}
#: What the figures of a family are called, without ``plots/``; of tested weights ``_test`` is appended.
PICTURES = {
    "density": ("density", "trajectories", "marginals", "pairs"),
    "image": ("samples", "reconstructions", "strip", "interpolations", "temperatures"),
    "vae": ("samples", "reconstructions", "walks"),
}
WIDTH = 24  # columns of a report's grid


@dataclass(frozen=True)
class Panel:
    """One panel, in the names that runs log.

    Args:
        kind: ``curves``, ``bars``, ``pictures``, ``scatter`` (x against the first metric, each by its
            summary), ``parallel`` (configuration and summaries) or ``comparison`` of whole runs.
        title: What stands above it.
        metrics: Names of metrics or pictures.
        x: Name of the metric on the horizontal axis.
        pattern: Regular expression for names that depend on the configuration, in place of metrics.
        options: Keys of the configuration, dotted, of ``parallel``.
    """

    kind: str
    title: str
    metrics: tuple[str, ...] = ()
    x: str = STEP
    pattern: str | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chapter:
    """A section of the workspace and of the page.

    Args:
        name: Its heading.
        text: What the page says above the panels.
        panels: The panels, in order.
    """

    name: str
    text: str
    panels: tuple[Panel, ...]


def chapters(families: Sequence[str]) -> list[Chapter]:
    """Return what is shown for some model families.

    Args:
        families: Names out of ``FAMILIES``.
    """
    return [
        *(_likelihood(family) for family in families),
        _training(families),
        _solver(families),
        _cost(),
        *(_pictures(family) for family in families),
        _comparison(families),
    ]


def summary_name(metric: str) -> str:
    """Return the name under which wandb's summary has the value of a metric that stands for the run.

    The best of a likelihood, but on test rows the last: a resumed run tests again, and the better of
    two tests would be chosen by the test. The last of what solves cost too, for at the start any field
    is easy to solve.

    Args:
        metric: Name of a number that runs log.
    """
    last = metric.startswith(("test/", "nfe/", "solver/", "time/", "memory/"))
    return f"{metric}.{'last' if last else direction(metric)}"


def watched(family: str) -> str:
    """Return the quantity that model selection watches in a family, such as ``nll``."""
    return FAMILIES[family].monitor.partition("/")[2]


def _likelihood(family: str) -> Chapter:
    bound, unit = watched(family), FAMILIES[family].unit
    panels = [
        Panel("curves", f"{bound} in training and validation, {unit}", (f"train/{bound}", f"val/{bound}")),
        Panel("bars", f"test {bound}, {unit}", (f"test/{bound}",)),
        Panel("curves", f"{bound} of training against seconds", (f"train/{bound}",), x="time/elapsed_seconds"),
        Panel("curves", "standard error over rows", (f"val/{bound}_standard_error", f"test/{bound}_standard_error")),
    ]
    if family == "image":
        panels.append(Panel("curves", "nll, nats per image", ("train/nll", "val/nll")))
    if family == "vae":
        panels += [
            Panel("curves", "parts of the negative ELBO, nats", ("val/reconstruction", "val/kl")),
            Panel("curves", "ELBO, nats", ("val/elbo",)),
            Panel("curves", "log-det of the posterior's flow", ("val/log_det",)),
            Panel("curves", "weight of the KL", ("train/beta",)),
        ]
    text = (
        f"{bound} ({unit}; less is better), of validation and test by a converged solve. The table has the best "
        "validation of each run, and the test of that checkpoint."
    )
    return Chapter(f"Likelihood: {family}", text, tuple(panels))


def _training(families: Sequence[str]) -> Chapter:
    panels = [
        Panel("curves", "loss of a step", ("train/loss",)),
        Panel("curves", "learning rate", pattern="^lr-.*"),  # named after the optimiser
    ]
    if set(families) != {"vae"}:
        panels.append(Panel("curves", "flow matching, where it is the objective", ("train/flow_matching",)))
        panels.append(Panel("curves", "stage of the objective, from 0", ("train/stage",)))
    return Chapter("Training", "What is minimised, which is not always what is reported.", tuple(panels))


def _solver(families: Sequence[str]) -> Chapter:
    against = [
        Panel(
            "scatter", f"best {watched(family)} and evaluations: {family}", (f"val/{watched(family)}",), "nfe/forward"
        )
        for family in families
    ]
    text = (
        "Evaluations of the vector field in a training step, forward and in a continuous adjoint, and in validation. "
        "The gap is training's log-likelihood minus that of a tight solve: above zero training overstates."
    )
    return Chapter(
        "Evaluations and solver",
        text,
        (
            Panel("curves", "evaluations of a step, forward", ("nfe/forward",)),
            Panel("curves", "evaluations of a step, backward", ("nfe/backward",)),
            Panel("curves", "evaluations in validation", ("val/nfe",)),
            Panel("curves", "likelihood gap, nats per row", ("solver/likelihood_gap",)),
            Panel("curves", "rejected steps", ("solver/rejected_steps",)),
            *against,
        ),
    )


def _cost() -> Chapter:
    return Chapter(
        "Time and memory",
        "Wall clock of a training step and of the run, and the peak of memory.",
        (
            Panel("curves", "seconds of a step", ("time/step_seconds",)),
            Panel("curves", "seconds since training began", ("time/elapsed_seconds",)),
            Panel("curves", "peak memory, MiB", ("memory/peak_mebibytes",)),
        ),
    )


def _pictures(family: str) -> Chapter:
    names = PICTURES[family]
    panels = [
        Panel("pictures", "during training", tuple(f"plots/{name}" for name in names)),
        Panel("pictures", "of the tested weights", tuple(f"plots/{name}_test" for name in names)),
        Panel("pictures", "learning curves", ("plots/curves",)),
    ]
    if family == "image":
        panels.append(Panel("pictures", "from noise to picture", ("plots/film",)))
    return Chapter(f"Pictures: {family}", "Figures with validation, and of the best checkpoint.", tuple(panels))


def _comparison(families: Sequence[str]) -> Chapter:
    options = ("dataset.name", "solver.method", "solver.rtol", "optimiser.lr", "seed")
    parallel = [
        Panel(
            "parallel",
            f"what goes with a good {watched(family)}: {family}",
            ("nfe/forward", "time/step_seconds", f"val/{watched(family)}"),
            options=options,
        )
        for family in families
    ]
    return Chapter(
        "Comparison of runs",
        "Configurations and results side by side, only where they differ.",
        (Panel("comparison", "runs"), *parallel),
    )


def model_names(families: Sequence[str]) -> list[str]:
    """Return the names of the models of some families, which are tags of their runs.

    Args:
        families: Names out of ``FAMILIES``.
    """
    names = []
    for path in sorted((config_folder() / "model").glob("*.yaml")):
        node = yaml.safe_load(path.read_text())
        node = node.get("model", node)
        module = node["module"]["_target_"].rpartition(".")[2]
        names += [str(node["name"]) for family in families if FAMILIES[family].__name__ == module]
    return names


def dashboard(config: DictConfig) -> None:
    """Make the workspace and the page, and save them or write them as JSON.

    Args:
        config: The composed configuration of ``dashboard.yaml``.

    Raises:
        ConfigError: If an option is wrong, ``wandb-workspaces`` is not installed, or nobody is logged in.
    """
    families = _families(config.family)
    if not isinstance(config.online, bool):
        raise ConfigError(f"Expected online to be true or false, got {config.online}. Type online=true.")
    workspaces, reports = _packages()
    entity = _entity(config.entity) if config.online else str(config.entity or "")
    place = (entity, str(config.project), str(config.title))
    shown = chapters(families)
    # Every run of the project, where all families are asked for.
    runs = "" if len(families) == len(FAMILIES) else f"Tags() in {model_names(families)}"
    workspace = _workspace(workspaces, reports, shown, families, place, runs)
    report = _report(reports, shown, families, place, runs)
    if config.online:
        for part in (report, workspace):  # in this order, for only a report makes a project that does not exist
            try:
                part.save()
            except Exception as failure:  # the errors of a network and of wandb's own server have many classes
                raise ConfigError(
                    f"Expected wandb to save to {entity}/{config.project}, got {type(failure).__name__}: {failure}. "
                    "Type online=false, or another entity= or project=."
                ) from failure
            log.info("saved: %s", part.url)
        return
    folder = Path(str(config.output))
    for name, part in (("workspace", workspace), ("report", report)):
        text = part._to_model().model_dump_json(by_alias=True, exclude_none=True)
        write_json(folder / f"{name}.json", json.loads(text))
        log.info("%s: %s", name, folder / f"{name}.json")


def _families(given: Any) -> list[str]:
    names = [str(name) for name in given] if OmegaConf.is_list(given) else [str(given)]
    if names == ["all"]:
        return list(FAMILIES)
    wrong = [name for name in names if name not in FAMILIES]
    if wrong or not names:
        raise ConfigError(
            f"Expected family to be all or some of {', '.join(FAMILIES)}, got {wrong[0] if wrong else 'none'}. "
            "Type family=all."
        )
    return list(dict.fromkeys(names))


def _packages() -> tuple[ModuleType, ModuleType]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its validators are those of pydantic 1
            import wandb_workspaces.reports.v2 as reports
            import wandb_workspaces.workspaces as workspaces
    except ImportError as failure:
        raise ConfigError(
            f'Expected wandb-workspaces to be installed, got: {failure}. Type pip install "cnf-lab[dashboard]".'
        ) from failure
    return workspaces, reports


def _entity(given: Any) -> str:
    """Return the entity to save to, where somebody is logged in."""
    import wandb

    try:
        found = given or wandb.Api().default_entity
    except Exception as failure:  # without a key, with a wrong one, or without a network
        raise ConfigError(
            f"Expected a login at wandb for online=true, got: {failure} Type wandb login, or online=false."
        ) from failure
    if not found:
        raise ConfigError("Expected an entity for online=true, got none. Type entity=<team or user>.")
    return str(found)


def _columns(families: Sequence[str]) -> list[str]:
    """Return the columns of the table of runs: what was trained, and how well."""
    bounds = [f"{split}/{watched(family)}" for family in families for split in ("val", "test")]
    results = [*dict.fromkeys(bounds), "nfe/forward", "time/step_seconds"]
    options = ["config:dataset.value.name", "config:model.value.name", "config:solver.value.method"]
    return ["run:displayName", "run:state", *options, *(f"summary:{summary_name(name)}" for name in results)]


def _workspace(
    workspaces: ModuleType,
    reports: ModuleType,
    shown: Sequence[Chapter],
    families: Sequence[str],
    place: tuple[str, str, str],
    runs: str,
) -> Any:
    entity, project, title = place
    sections = [
        workspaces.Section(
            name=chapter.name,
            panels=[_drawn(reports, panel) for panel in chapter.panels],
            is_open=True,
            panel_settings=workspaces.SectionPanelSettings(x_axis=STEP),
        )
        for chapter in shown
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=title,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
        runset_settings=workspaces.RunsetSettings(filters=runs, pinned_columns=_columns(families)),
    )


def _report(
    reports: ModuleType,
    shown: Sequence[Chapter],
    families: Sequence[str],
    place: tuple[str, str, str],
    runs: str,
) -> Any:
    entity, project, title = place
    blocks: list[Any] = [reports.TableOfContents()]
    for chapter in shown:
        # Of the page's own project: one that is named would be looked up at wandb.
        runset = reports.Runset(name="Runs", filters=runs, pinned_columns=_columns(families))
        panels = [
            _drawn(reports, panel, reports.Layout(*corner))
            for panel, corner in zip(chapter.panels, _placed(chapter.panels), strict=True)
        ]
        grid = reports.PanelGrid(runsets=[runset], panels=panels)
        blocks += [reports.H2(chapter.name), reports.P(chapter.text), grid]
    description = f"Runs of {', '.join(families)} in {project}, made by python -m cnf_lab.dashboard."
    return reports.Report(
        entity=entity, project=project, title=title, description=description, blocks=blocks, width="fluid"
    )


def _placed(panels: Sequence[Panel]) -> list[tuple[int, int, int, int]]:
    """Return x, y, width and height of panels in a report: three of a row, pictures and comparisons alone."""
    places, x, y = [], 0, 0
    for panel in panels:
        wide = panel.kind in ("pictures", "comparison", "parallel")
        w, h = (WIDTH, 12) if wide else (WIDTH // 3, 8)
        if x + w > WIDTH:
            x, y = 0, y + 8
        places.append((x, y, w, h))
        x, y = (0, y + h) if wide else (x + w, y)
    return places


def _drawn(reports: ModuleType, panel: Panel, layout: Any = None) -> Any:
    """Return wandb's panel for one of ours."""
    where = {} if layout is None else {"layout": layout}
    names = list(panel.metrics)
    if panel.kind == "curves":
        return reports.LinePlot(title=panel.title, x=panel.x, y=names, metric_regex=panel.pattern, **where)
    if panel.kind == "bars":
        return reports.BarPlot(title=panel.title, metrics=names, **where)
    if panel.kind == "pictures":
        return reports.MediaBrowser(title=panel.title, media_keys=names, num_columns=min(3, len(names)), **where)
    if panel.kind == "comparison":
        return reports.RunComparer(diff_only="split", **where)
    summaries = [reports.SummaryMetric(summary_name(name)) for name in names]
    if panel.kind == "scatter":
        x = reports.SummaryMetric(summary_name(panel.x))
        return reports.ScatterPlot(title=panel.title, x=x, y=summaries[0], **where)
    configured = [reports.Config(option) for option in panel.options]
    columns = [reports.ParallelCoordinatesPlotColumn(metric=metric) for metric in (*configured, *summaries)]
    return reports.ParallelCoordinatesPlot(title=panel.title, columns=columns, **where)


def main() -> None:
    """Run the command."""
    run_command(dashboard, "dashboard")


if __name__ == "__main__":
    main()
