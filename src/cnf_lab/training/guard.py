"""A watch over the training's own solve: does it still compute a likelihood?

Maximum likelihood through a coarse solve learns to exploit the discretisation: the objective
goes on improving beyond what any density can have, while the true likelihood falls.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.data import Batch
from cnf_lab.errors import ConfigError, SolverError
from cnf_lab.flows import ContinuousFlow, Flow, continuous_blocks
from cnf_lab.ode import OdeSolver, RungeKuttaSolver

log = logging.getLogger("cnf_lab")
Solved = Flow | VariationalAutoencoder
ACTIONS = ("tighten", "stop", "warn")
TRIES = 6  # tenths of the tolerance, or doublings of the grid, of one intervention


class LikelihoodGuard(Callback):
    r"""Solves a probe batch again at a tight tolerance, and acts when the likelihoods differ.

    The gap is the mean over rows of log p by the training's solver, divergence estimate and
    precision, minus log p by a tight solve in full precision with the same probes: positive
    where training overstates. It is logged as ``solver/likelihood_gap`` (nats per row). Of an
    autoencoder it is that of the ELBO, with the same draws.

    Beyond the bound the run tightens its solver until the gap is within it: a tenth of the
    tolerances, or twice the steps, at a time, kept in the checkpoint. Where no solver helps, the
    gap comes from low precision, which is only said, or from a field that no solver follows,
    which stops the run.

    Args:
        every_n_steps: Optimiser steps between checks.
        rows: Rows of the training batch that are solved again.
        bound: Largest gap, in nats per row.
        bound_per_dimension: The same in bits per dimension of what is solved; the larger of the two holds.
        action: ``tighten``, ``stop`` or ``warn``.
        atol: Absolute local error bound of the tight solve.
        rtol: Relative local error bound of the tight solve.
        seed: Seed of the probes.

    Raises:
        ConfigError: If an option is out of range.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        rows: int = 256,
        bound: float = 0.05,
        bound_per_dimension: float = 0.0,
        action: str = "tighten",
        atol: float = 1e-6,
        rtol: float = 1e-6,
        seed: int = 0,
    ) -> None:
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("rows", rows),
            ("bound", bound),
        ):
            if not value > 0:
                raise ConfigError(
                    f"Expected callbacks.guard.{name} above 0, got {value}. "
                    "Type callbacks.guard=null to go without the guard."
                )
        if bound_per_dimension < 0:
            raise ConfigError(
                f"Expected callbacks.guard.bound_per_dimension of at least 0, got {bound_per_dimension}. "
                "Type callbacks.guard.bound_per_dimension=0.001."
            )
        if action not in ACTIONS:
            raise ConfigError(
                f"Expected callbacks.guard.action to be one of {', '.join(ACTIONS)}, got {action}. "
                "Type callbacks.guard.action=tighten."
            )
        self.every_n_steps, self.rows, self.action = every_n_steps, rows, action
        self.bound, self.bound_per_dimension = bound, bound_per_dimension
        self.tight = RungeKuttaSolver("dopri5", atol, rtol, error_norm="example", options={"max_num_steps": 5000})
        self.seed, self.tightened = seed, 0
        self._said = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tighten a resumed run's solver as often as it had been."""
        blocks = continuous_blocks(pl_module)
        for _ in range(self.tightened):
            _replace_solvers(blocks, [solver.tightened() or solver for solver in _solvers(blocks)])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the probe batch."""
        flow = _flow(pl_module)
        due = trainer.global_step % self.every_n_steps == 0
        # A step without solves has nothing to check: simulation-free training.
        if flow is None or not due or not (isinstance(outputs, dict) and outputs.get("solves")):
            return
        gap = self._measure(trainer, flow, batch)
        pl_module.log("solver/likelihood_gap", gap, on_step=False, on_epoch=True, batch_size=1)
        if not abs(gap) <= self._bound(flow):
            self._act(trainer, flow, batch, gap)

    def state_dict(self) -> dict[str, Any]:
        return {"tightened": self.tightened}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tightened = state_dict["tightened"]

    def _bound(self, flow: Solved) -> float:
        # The first block of any flow has all dimensions.
        dimensions = math.prod(continuous_blocks(flow)[0].field.event_shape)
        return max(self.bound, self.bound_per_dimension * dimensions * math.log(2))

    def _measure(self, trainer: pl.Trainer, flow: Solved, batch: Batch) -> float:
        x = batch.x[: self.rows]
        context = None if batch.context is None else batch.context[: self.rows]
        with trainer.precision_plugin.forward_context():
            try:
                gap = likelihood_gap(flow, x, context, self.tight, self.seed)
            except SolverError:
                gap = math.inf  # the field is one that the tight solve cannot follow
        mean = trainer.strategy.reduce(torch.tensor(gap, device=x.device), reduce_op="mean")
        return float(mean)

    def _act(self, trainer: pl.Trainer, flow: Solved, batch: Batch, gap: float) -> None:
        blocks = continuous_blocks(flow)
        before = _solvers(blocks)
        what = (
            f"At step {trainer.global_step} training by {_name(before[0])} "
            f"{'overstates' if gap > 0 else 'understates'} log p by {abs(gap):.3g} nats per row "
            f"(bound {self._bound(flow):.3g})"
        )
        if self.action == "tighten":
            for tries in range(1, TRIES + 1):
                tightened = [solver.tightened() for solver in _solvers(blocks)]
                if any(solver is None for solver in tightened):
                    break
                _replace_solvers(blocks, [solver for solver in tightened if solver is not None])
                if abs(self._measure(trainer, flow, batch)) <= self._bound(flow):
                    self.tightened += tries
                    log.warning("%s: it goes on with %s.", what, _name(blocks[0].solver))
                    return
            _replace_solvers(blocks, before)
        low = _low_precision(trainer)
        if self.action == "warn" or (low and math.isfinite(gap)):
            hint = "it comes from low precision: type trainer.precision=32-true" if low else "tighten solver"
            if not self._said:
                log.warning("%s; %s, or raise callbacks.guard.bound.", what, hint)
            self._said = True
            return
        log.error("%s: stopped. Type solver=dopri5 solver.atol=1e-4 solver.rtol=1e-4, or lower optimiser.lr.", what)
        trainer.should_stop = True


@torch.no_grad()
def likelihood_gap(flow: Solved, x: Tensor, context: Tensor | None, tight: OdeSolver, seed: int) -> float:
    """Return the mean of log p as training computes it minus log p of a tight solve, in nats per row.

    Normalisation layers stay as in evaluation, in both. The flow is left as it was.

    Args:
        flow: The density, or the autoencoder.
        x: Rows (batch, \\*event).
        context: Conditioning (batch, features) or None.
        tight: The tight solver.
        seed: Seed of the probes, which both solves share.

    Raises:
        SolverError: If a solve fails.
    """
    with _evaluation_kept(flow):
        values = []
        for training in (True, False):
            for block in continuous_blocks(flow):
                solver = block.solver.eager() if training else tight
                block.set_evaluation(solver, block.divergence, autocast=training)
            generator = torch.Generator(x.device).manual_seed(seed)
            values.append(_bound_of(flow, x, context, generator).double())
    return float((values[0] - values[1]).mean())


def _bound_of(flow: Solved, x: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return log p of each row, or a bound of it."""
    if isinstance(flow, VariationalAutoencoder):
        return flow.elbo(x, 1, generator)
    return flow.log_prob(flow.dequantise(x, generator)[0], context, generator)


@contextmanager
def _evaluation_kept(flow: Solved) -> Iterator[None]:
    kept = [(part, part.evaluation_solver, part.evaluation_divergence) for part in continuous_blocks(flow)]
    training = flow.training
    flow.eval()
    try:
        yield
    finally:
        flow.train(training)
        for part, solver, divergence in kept:
            part.set_evaluation(solver, divergence)


def _flow(pl_module: pl.LightningModule) -> Solved | None:
    flow = getattr(pl_module, "flow", None)
    return flow if isinstance(flow, Flow | VariationalAutoencoder) and continuous_blocks(flow) else None


def _solvers(blocks: list[ContinuousFlow]) -> list[OdeSolver]:
    return [block.solver for block in blocks]


def _replace_solvers(blocks: list[ContinuousFlow], solvers: list[OdeSolver]) -> None:
    for block, solver in zip(blocks, solvers, strict=True):
        block.solver = solver


def _name(solver: OdeSolver) -> str:
    told = solver.describe()
    grid = f"{told['steps']} steps" if "steps" in told else f"atol {told.get('atol')}, rtol {told.get('rtol')}"
    return f"{told.get('method')} ({grid})"


def _low_precision(trainer: pl.Trainer) -> bool:
    return "16" in str(trainer.precision)
