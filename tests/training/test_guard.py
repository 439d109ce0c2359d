"""The guard: a coarse solve that maximum likelihood exploits is seen, and tightened or stopped."""

import logging
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from cnf_lab.data import FlowDataModule, Splits
from cnf_lab.data.base import ArrayRows
from cnf_lab.errors import ConfigError
from cnf_lab.fields import ConcatSquash, Mlp, Tanh
from cnf_lab.flows import Chain, ContinuousFlow, Flow, MovingBatchNorm, StandardNormal, continuous_blocks
from cnf_lab.models import DensityModule
from cnf_lab.objectives import Likelihood
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact, Gaussian, Hutchinson
from cnf_lab.training.guard import LikelihoodGuard, likelihood_gap

D = 4
ENTROPY = D / 2 * math.log(2 * math.pi * math.e)  # of the data, a standard normal
COARSE = RungeKuttaSolver("rk4", steps=6)
TIGHT = RungeKuttaSolver("dopri5", 1e-6, 1e-6, error_norm="example")


class Normal(FlowDataModule):
    """Standard normal rows, whose entropy no density can beat."""

    def __init__(self) -> None:
        super().__init__("normal", batch_size=256, evaluation_batch_size=256, steps_per_epoch=5)

    def load(self):
        rows = np.random.default_rng(0).standard_normal((20_000, D)).astype(np.float32)
        return Splits(ArrayRows(rows), ArrayRows(rows[:256]), ArrayRows(rows[:256]))

    @property
    def event_shape(self):
        return (D,)


def fast_field():
    """A field that turns the rows quickly, as a pretrained one may: the normal density keeps its shape."""
    torch.manual_seed(0)
    turn = torch.zeros(D, D)
    for axis in range(0, D, 2):
        turn[axis, axis + 1], turn[axis + 1, axis] = 9.0, -9.0
    field = Mlp((D,), [48, 48], ConcatSquash, Tanh)
    optimiser, generator = torch.optim.Adam(field.parameters(), lr=1e-2), torch.Generator().manual_seed(1)
    for _ in range(200):
        x, t = 1.5 * torch.randn(256, D, generator=generator), torch.rand(256, generator=generator)
        loss = (field(t, x) - x @ turn).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return field


def fit(field, guard, steps=200, solver=COARSE, precision="32-true", checkpoint=None, divergence=None, **options):
    flow = Flow(ContinuousFlow(field, solver, divergence or Exact(), TIGHT, Exact()), StandardNormal((D,)))
    module = DensityModule(
        flow=flow,
        objective=Likelihood(),
        optimiser=lambda params: torch.optim.Adam(params, lr=5e-3),
        schedule=None,
        seed=0,
        rebuild={"event_shape": [D]},
    )
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[] if guard is None else [guard],
        limit_val_batches=0,
        precision=precision,
        **options,
    )
    trainer.fit(module, Normal(), ckpt_path=checkpoint)
    return flow, trainer


def likelihoods(flow):
    """Return the NLL as training computes it and as a converged solve does."""
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((512, D)).astype(np.float32))
    with torch.no_grad():
        return [float(-flow.train(mode).log_prob(x).mean()) for mode in (True, False)]


@pytest.fixture(scope="module")
def field_state():
    return fast_field().state_dict()


@pytest.fixture
def field(field_state):
    field = Mlp((D,), [48, 48], ConcatSquash, Tanh)
    field.load_state_dict(field_state)
    return field


def test_maximum_likelihood_on_a_coarse_grid_runs_away(field):
    """Within 200 steps the objective is far below the entropy of the data, and the truth far above."""
    flow, _ = fit(field, None)
    objective, truth = likelihoods(flow)
    assert objective < ENTROPY - 5
    assert truth > ENTROPY + 1


def test_guard_tightens_until_training_computes_a_likelihood(field, caplog):
    guard = LikelihoodGuard(every_n_steps=10)
    with caplog.at_level(logging.WARNING, "cnf_lab"):
        flow, trainer = fit(field, guard, 60)
    objective, truth = likelihoods(flow)
    assert objective > ENTROPY - 0.2
    assert truth < ENTROPY + 0.3
    assert guard.tightened > 0
    assert continuous_blocks(flow)[0].solver.steps == 6 * 2**guard.tightened
    assert "overstates log p by" in caplog.text
    assert "it goes on with rk4" in caplog.text
    assert abs(float(trainer.callback_metrics["solver/likelihood_gap"])) < 1


def test_guard_stops_the_run(field, caplog):
    with caplog.at_level(logging.WARNING, "cnf_lab"):
        _, trainer = fit(field, LikelihoodGuard(every_n_steps=10, action="stop"))
    assert trainer.global_step == 10
    assert "stopped. Type solver=dopri5" in caplog.text


def test_the_larger_of_both_bounds_holds(field, caplog):
    guard = LikelihoodGuard(every_n_steps=10, bound=1e-9, bound_per_dimension=1e6)
    with caplog.at_level(logging.WARNING, "cnf_lab"):
        fit(field, guard, 20)
    assert guard.tightened == 0
    assert not caplog.records


def test_guard_warns_once(field, caplog):
    with caplog.at_level(logging.WARNING, "cnf_lab"):
        _, trainer = fit(field, LikelihoodGuard(every_n_steps=5, action="warn"), 20)
    assert trainer.global_step == 20
    assert caplog.text.count("overstates log p") == 1


def test_guard_leaves_a_converged_run_alone(field):
    def numbers(guard):
        torch.manual_seed(0)
        fresh = Mlp((D,), [8, 8], ConcatSquash, Tanh)
        flow, trainer = fit(fresh, guard, 8, RungeKuttaSolver("dopri5", 1e-5, 1e-5), divergence=Hutchinson(Gaussian()))
        return flow.state_dict(), trainer

    guard = LikelihoodGuard(every_n_steps=2)
    watched, trainer = numbers(guard)
    alone, _ = numbers(None)
    assert guard.tightened == 0
    assert abs(float(trainer.callback_metrics["solver/likelihood_gap"])) < 1e-3
    for key, value in alone.items():
        assert value.equal(watched[key]), key


def test_low_precision_is_told_apart(caplog):
    torch.manual_seed(0)
    guard = LikelihoodGuard(every_n_steps=4, bound=1e-7)
    with caplog.at_level(logging.WARNING, "cnf_lab"):
        flow, trainer = fit(
            Mlp((D,), [8, 8], ConcatSquash, Tanh), guard, 8, RungeKuttaSolver("rk4", steps=4), precision="bf16-mixed"
        )
    assert trainer.global_step == 8
    assert "it comes from low precision: type trainer.precision=32-true" in caplog.text
    assert continuous_blocks(flow)[0].solver.steps == 4


def test_what_was_tightened_stays_so_after_a_resumption(field, tmp_path):
    flow, trainer = fit(field, LikelihoodGuard(every_n_steps=5), 5)
    steps = continuous_blocks(flow)[0].solver.steps
    assert steps > 6
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again, _ = fit(Mlp((D,), [48, 48], ConcatSquash, Tanh), LikelihoodGuard(), 10, checkpoint=tmp_path / "last.ckpt")
    assert continuous_blocks(again)[0].solver.steps == steps


def test_gap_is_that_of_the_solver_alone(field):
    """Both solves share their probes, and the flow is left as it was."""
    block = ContinuousFlow(field, TIGHT, Hutchinson(Gaussian()), COARSE, Exact())
    flow = Flow(Chain([MovingBatchNorm((D,)), block]), StandardNormal((D,))).train()
    x, state = torch.randn(64, D), {key: value.clone() for key, value in flow.state_dict().items()}
    assert abs(likelihood_gap(flow, x, None, TIGHT, 0)) < 1e-5
    block.solver = COARSE
    assert likelihood_gap(flow, x, None, TIGHT, 0) > 0.1
    assert flow.training
    assert block.training
    assert block.evaluation_solver is COARSE
    assert isinstance(block.evaluation_divergence, Exact)
    assert all(value.equal(state[key]) for key, value in flow.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, r"Expected callbacks\.guard\.every_n_steps above 0, got 0\. Type callbacks\.guard=null"),
        ({"bound": 0.0}, r"Expected callbacks\.guard\.bound above 0"),
        ({"bound_per_dimension": -1.0}, r"Expected callbacks\.guard\.bound_per_dimension of at least 0"),
        ({"action": "ignore"}, r"one of tighten, stop, warn, got ignore\. Type callbacks\.guard\.action=tighten\."),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LikelihoodGuard(**options)
