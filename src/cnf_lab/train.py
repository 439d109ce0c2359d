"""Train a flow: ``python -m cnf_lab.train dataset=miniboone solver=dopri5``."""

import logging
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from pytorch_lightning.callbacks import ModelCheckpoint

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.data import FlowDataModule
from cnf_lab.errors import ConfigError, RunExistsError
from cnf_lab.flows import Flow, continuous_blocks
from cnf_lab.models import FlowModule
from cnf_lab.training import tracking
from cnf_lab.training.again import earlier_value, finite, go_on, is_again
from cnf_lab.training.build import (
    build,
    build_data,
    build_flow,
    build_module,
    build_solvers,
    build_trainer,
    fit_preprocess,
    plain,
)
from cnf_lab.training.command import check_number, run_command
from cnf_lab.training.relaunch import one_job
from cnf_lab.training.run import (
    check_same_rows,
    environment,
    has_checkpoint,
    load_checkpoint,
    load_state,
    save_config,
    write_json,
)
from cnf_lab.training.sweep import REFUSED

log = logging.getLogger("cnf_lab")
TERMINATED = 143  # what a shell reports for SIGTERM


def train(config: DictConfig) -> float:
    """Compose, build, fit, test, and write the run folder.

    Args:
        config: The composed configuration.

    Returns:
        The best validation value of what the model watches, for sweepers; infinity if it is not finite.
    """
    folder = Path(config.paths.run)
    check_number(config, "seed", int, 0, "0")
    check_number(config, "threads", int, 1, "2", optional=True)
    if config.seed >= 2**32:
        raise ConfigError(f"Expected seed below {2**32}, got {config.seed}. Type seed=0.")
    if config.threads:
        torch.set_num_threads(config.threads)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    absolute_paths(config)
    again = is_again(config)
    if again:
        earlier = earlier_value(config, folder)
        if earlier is not None:
            log.info("%s has metrics.json of this configuration: not run again", folder)
            return earlier
        go_on(config, folder)

    # 1. Data first: the flow needs their shape. 2. The flow. 3. Its module. 4. The trainer.
    data = build_data(config)
    flow = build_flow(config, data.event_shape, data.context_features)
    module = build_module(config, flow, data)
    last = str(folder / "checkpoints" / "last.ckpt") if config.resume else None
    if last is None:
        if not again:
            refuse_another_run(folder)
        fit_preprocess(flow, data)
    else:
        check_resumable(module, data, last)
    save_config(config, folder)
    (folder / "FAILED").unlink(missing_ok=True)  # of an earlier try
    failed = True
    try:
        trainer = build_trainer(config)
        tracking.log_config(trainer.loggers, plain(config))
        if trainer.is_global_zero:
            announce(config, data, module, folder)
        started = time.monotonic()
        trainer.fit(module, data, ckpt_path=last, weights_only=True)
        seconds, steps = time.monotonic() - started, float(trainer.global_step)
        metrics = {**numbers(trainer), "time/fit_seconds": seconds, "train/steps": steps}
        lost = diverged(trainer, module.monitor)
        if config.test:
            load_best(module, trainer)
            trainer.test(module, data, verbose=False)
            metrics |= numbers(trainer)
        failed = lost
    finally:
        tracking.finish(failed)
    if trainer.is_global_zero:
        report(config, data, module, metrics, folder)
    return finite(metrics.get(module.monitor))


def job(config: DictConfig) -> float:
    """Run one job, alone or of a multirun; a failure leaves its reason in the run folder."""
    with one_job("cnf_lab.train"):
        try:
            return train(config)
        except SystemExit as stop:
            log.warning("Stopped. To go on from the last epoch's end: resume=%s", config.paths.run)
            # Lightning leaves in this way on a signal, after SIGTERM with the code of a success.
            raise SystemExit(TERMINATED if stop.code is None else stop.code) from None
        except Exception as error:
            # A run that is kept from being overwritten has not failed: SweepSummary takes the file away.
            kept = isinstance(error, RunExistsError)
            if not kept or HydraConfig.get().mode == RunMode.MULTIRUN:
                with suppress(OSError):
                    mark = Path(config.paths.run) / (REFUSED if kept else "FAILED")
                    mark.write_text(f"{type(error).__name__}: {error}\n")
            raise


def main() -> None:
    """Run the command."""
    run_command(job, "train")


def absolute_paths(config: DictConfig) -> None:
    """Make the paths of the data absolute, so that a run can be evaluated from any folder."""
    for key in ("root", "path", "val_path", "test_path"):
        if config.dataset.get(key) is not None:
            config.dataset[key] = str(Path(str(config.dataset[key])).expanduser().absolute())


def refuse_another_run(folder: Path) -> None:
    """Keep a new run from overwriting an old one."""
    if has_checkpoint(folder):
        raise RunExistsError(
            f"Expected a run folder without a run in it, got {folder}. "
            f"Type resume={folder} to go on with it, or another hydra.run.dir=...."
        )


def check_resumable(module: FlowModule, data: FlowDataModule, last: str) -> None:
    """Make sure that a checkpoint fits before anything of the run is overwritten."""
    checkpoint = load_checkpoint(last)
    load_state(module, checkpoint["state_dict"], Path(last))
    check_same_rows(data.describe()["rows"], checkpoint["hyper_parameters"]["data"]["rows"], str(data.name))


def numbers(trainer: pl.Trainer) -> dict[str, float]:
    """Return the metrics that the last stage left, the watched one at its best."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for callback in watching(trainer):
        best, last = callback.best_model_score, metrics.get(str(callback.monitor))
        if best is not None and float(best) != last:
            # Whatever else was validated belongs to the last value, which is not the best.
            metrics = {name: value for name, value in metrics.items() if not name.startswith("val/")}
            metrics[str(callback.monitor)] = float(best)
    return metrics


def diverged(trainer: pl.Trainer, monitor: str) -> bool:
    """Whether the last validation found no finite value of what the model watches."""
    last = trainer.callback_metrics.get(monitor)
    return last is not None and not math.isfinite(float(last))


def watching(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    """Return the checkpoint callbacks that keep the best of something."""
    callbacks = trainer.checkpoint_callbacks
    return [callback for callback in callbacks if isinstance(callback, ModelCheckpoint) and callback.monitor]


def load_best(module: FlowModule, trainer: pl.Trainer) -> None:
    """Give a module the weights of the best checkpoint; without one it keeps its last.

    Not by ``trainer.test(ckpt_path=...)``: where weights are averaged, Lightning would load
    the live ones, while validation and the checkpoint's choice went by the averaged ones.
    """
    best = next((callback.best_model_path for callback in watching(trainer) if callback.best_model_path), None)
    if best is not None:
        module.load_state_dict(load_checkpoint(best)["state_dict"])


def report(
    config: DictConfig, data: FlowDataModule, module: FlowModule, metrics: dict[str, float], folder: Path
) -> None:
    """Write metrics.json and say where the run ended."""
    context = {
        "unit": module.unit,
        "data": data.describe(),
        **solves(config, module),
        "seed": config.seed,
        **environment(),
    }
    write_json(folder / "metrics.json", {**metrics, "context": context})
    quantity = module.monitor.partition("/")[2]
    for name in (f"val/{quantity}", f"test/{quantity}"):
        if name in metrics:
            error = metrics.get(f"{name}_standard_error")
            error_text = "" if error is None else f" ± {error:.4f}"
            truth = "" if data.entropy is None else f"; the true density has {data.entropy:.4f}"
            log.info("%s %.4f%s %s%s", name, metrics[name], error_text, module.unit, truth)
    for note in data.notes:
        log.warning("%s", note)
    log.info("run folder %s", folder)


def solves(config: DictConfig, module: FlowModule) -> dict[str, Any]:
    """Return what likelihoods were solved with, and training's steps; None where nothing was solved."""
    blocks = continuous_blocks(module)
    if not blocks:
        return {"solver": None, "trace": None, "training": None}
    # As it was at the end: the guard may have tightened it.
    training = {"solver": blocks[0].solver.describe(), "trace": plain(config.trace)}
    return {
        "solver": build_solvers(config.solver)[1].describe(),
        "trace": plain(config.model.evaluation_trace),
        "training": training if module.solves else None,
    }


def announce(config: DictConfig, data: FlowDataModule, module: FlowModule, folder: Path) -> None:
    """Say what is about to run."""
    rows = ", ".join(f"{count:,} {split}" for split, count in data.describe()["rows"].items())
    parameters = sum(parameter.numel() for parameter in module.flow.parameters())
    log.info("%s: events %s, rows %s", data.name, tuple(data.event_shape), rows)
    log.info("model %s with %s parameters; run folder %s", config.model.name, f"{parameters:,}", folder)
    blocks = continuous_blocks(module)
    if isinstance(module.flow, VariationalAutoencoder):
        log.info("the posterior has a field of its own: architecture, preprocess and normalisation are not used")
    if not blocks:
        log.info("no vector field: architecture, solver and trace are not used")
    elif module.solves:  # the fields of all blocks are of one kind
        log.info("divergence in training: %s", build(config.trace, "trace").describe(blocks[0].field))
    else:
        log.info("training does not solve: trace and the tolerance of solver are those of evaluation only")
        if isinstance(module.flow, Flow) and module.flow.dequantiser and list(module.flow.dequantiser.parameters()):
            log.warning("the learned dequantisation stays as it starts, uniform: only a likelihood trains it")
    for note in data.notes:
        log.warning("%s", note)


if __name__ == "__main__":
    main()
