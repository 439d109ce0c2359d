"""Training in stages: what the hand-over changes, what it leaves, and going on in either stage."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from cnf_lab.data.toy import Pinwheel, ToyDataModule
from cnf_lab.errors import ConfigError
from cnf_lab.fields import Concat, Mlp, Tanh
from cnf_lab.flows import ContinuousFlow, Flow, StandardNormal
from cnf_lab.models import DensityModule
from cnf_lab.objectives import FlowMatchingThenLikelihood, Independent, LinearPath, StagePlan, UniformTimes
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact
from cnf_lab.training.callbacks import MovableCheckpoint, StageAveraging, StageStopping
from cnf_lab.training.schedules import cosine


class Watch(Callback):
    """Keeps what is seen at the first batch of each epoch, and after it."""

    def __init__(self):
        self.epochs, self.after, self.validated, self.rows = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            optimiser = trainer.optimizers[0]
            weights = torch.nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone()
            self.epochs.append((pl_module.stage.name, optimiser.param_groups[0]["lr"], len(optimiser.state), weights))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(torch.nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone())

    def on_validation_end(self, trainer, pl_module):
        self.validated.append((trainer.current_epoch, pl_module.stage.name))


def module(first, second, kind=DensityModule, **parts):
    torch.manual_seed(0)
    field = Mlp((2,), [8], Concat, Tanh)
    flow = Flow(ContinuousFlow(field, RungeKuttaSolver("rk4", steps=2), Exact()), StandardNormal((2,)))
    objective = FlowMatchingThenLikelihood(LinearPath(), UniformTimes(), Independent(), first, second)
    defaults = {"optimiser": lambda params, lr=1e-2: torch.optim.Adam(params, lr=lr), "schedule": None}
    return kind(flow=flow, objective=objective, seed=0, rebuild={"event_shape": [2]}, **{**defaults, **parts})


def data():
    return ToyDataModule("pinwheel", Pinwheel(), batch_size=16, evaluation_batch_size=50, evaluation_rows=50,
                         steps_per_epoch=4, seed=0)  # fmt: skip


def fit(net, *callbacks, resume=None, epochs=-1, **options):
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[*callbacks, watch], logger=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, inference_mode=False, use_distributed_sampler=False,
        enable_checkpointing=any(isinstance(callback, MovableCheckpoint) for callback in callbacks), **options,
    )  # fmt: skip
    trainer.fit(net, data(), ckpt_path=resume, weights_only=True)
    return trainer, watch


def last_checkpoint(folder):
    return MovableCheckpoint(dirpath=folder, filename="last", monitor=None, save_on_train_epoch_end=True)


def test_the_hand_over_leaves_the_weights_and_renews_the_rest():
    net = module(StagePlan(steps=10, lr=0.02), StagePlan(steps=8, lr=0.003))
    trainer, watch = fit(net)
    names, rates, states, weights = zip(*watch.epochs, strict=True)
    assert names == ("flow_matching",) * 3 + ("likelihood",) * 2  # 10 steps are three epochs of four
    assert rates == (0.02,) * 3 + (0.003,) * 2
    assert states[0] == states[3] == 0
    assert states[2] > 0
    assert torch.equal(weights[3], watch.after[11])
    assert trainer.global_step == 20


def test_schedules_start_anew_with_the_epochs_of_a_stage():
    net = module(StagePlan(steps=8), StagePlan(steps=16, lr=1e-3), schedule=cosine)
    _, watch = fit(net)
    rates = [rate for _, rate, _, _ in watch.epochs]
    assert rates == pytest.approx([1e-2, 5e-3, 1e-3, 1e-3 * (2 + 2**0.5) / 4, 5e-4, 1e-3 * (2 - 2**0.5) / 4])


def test_each_stage_validates_in_its_own_rhythm_and_at_its_end():
    net = module(StagePlan(steps=20, validate_every_n_epochs=3), StagePlan(steps=12))
    _, watch = fit(net, check_val_every_n_epoch=2)
    assert watch.validated == [
        (2, "flow_matching"),
        (4, "flow_matching"),
        (5, "likelihood"),
        (7, "likelihood"),
    ]


def test_a_stage_may_use_fewer_rows_of_a_batch():
    seen = []
    net = module(StagePlan(steps=4), StagePlan(steps=4, rows=5))
    for stage in net.stages:
        call = type(stage.objective).__call__
        stage.objective.check = lambda flow: None

        def record(flow, x, context, generator, call=call, objective=stage.objective):
            seen.append(len(x))
            return call(objective, flow, x, context, generator)

        record.begin_epoch = stage.objective.begin_epoch
        object.__setattr__(stage, "objective", record)
    fit(net)
    assert seen == [16] * 4 + [5] * 4


@pytest.mark.parametrize("stopped", [1, 2, 3, 4], ids=["first stage", "hand-over", "second stage", "later"])
def test_a_resumed_run_is_the_uninterrupted_one(stopped, tmp_path: Path):
    plans = StagePlan(steps=8, lr=0.02), StagePlan(steps=12, lr=0.003)
    parts = {"schedule": cosine}

    def callbacks(folder):
        return last_checkpoint(tmp_path / folder), StageAveraging(decay=0.8)

    whole, _ = fit(module(*plans, **parts), *callbacks("whole"))
    fit(module(*plans, **parts), *callbacks("part"), epochs=stopped)
    resumed, watch = fit(module(*plans, **parts), *callbacks("part"), resume=tmp_path / "part" / "last.ckpt")
    assert resumed.global_step == whole.global_step == 20
    assert len(watch.epochs) == 5 - stopped
    for mine, theirs in zip(resumed.lightning_module.parameters(), whole.lightning_module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_finished_run_does_not_go_on(tmp_path: Path):
    plans = StagePlan(steps=4), StagePlan(steps=4)
    fit(module(*plans), last_checkpoint(tmp_path))
    trainer, watch = fit(module(*plans), last_checkpoint(tmp_path), resume=tmp_path / "last.ckpt")
    assert trainer.global_step == 8
    assert not watch.epochs
    longer, _ = fit(module(plans[0], StagePlan(steps=8)), last_checkpoint(tmp_path), resume=tmp_path / "last.ckpt")
    assert longer.global_step == 12


def test_averages_start_anew_from_the_averaged_weights():
    net, average = module(StagePlan(steps=8), StagePlan(steps=4)), StageAveraging(decay=0.3)
    kept = {}

    class Spy(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            model = average._average_model.module
            kept[trainer.current_epoch] = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    _, watch = fit(net, average, Spy())
    weights = [entry[3] for entry in watch.epochs]
    assert torch.equal(weights[2], kept[1])
    assert not torch.equal(weights[2], watch.after[7])
    decayed = watch.after[8]
    for n, live in enumerate(watch.after[9:12], start=1):
        share = min(0.3, (1 + n) / (10 + n))
        decayed = share * decayed + (1 - share) * live
    torch.testing.assert_close(kept[2], decayed, rtol=1e-5, atol=1e-6)


def told(value):
    """A module whose validation gives a value of the epoch's number."""

    class Told(DensityModule):
        def on_validation_epoch_end(self):
            self.log("val/nll", value(self.current_epoch))

    return Told


def test_patience_ends_a_stage_before_the_last_and_then_the_run():
    net = module(StagePlan(steps=400), StagePlan(), kind=told(float))
    trainer, watch = fit(net, StageStopping(monitor="val/nll", patience=2))
    assert [entry[0] for entry in watch.epochs] == ["flow_matching"] * 3 + ["likelihood"] * 2
    assert trainer.should_stop


def test_what_ran_out_of_patience_goes_on_from_its_best(tmp_path: Path):
    net = module(StagePlan(steps=400), StagePlan(steps=4), kind=told(lambda epoch: abs(epoch - 1.0)))
    best = MovableCheckpoint(dirpath=tmp_path, filename="best", monitor="val/nll")
    _, watch = fit(net, best, StageStopping(monitor="val/nll", patience=2))
    assert [entry[0] for entry in watch.epochs] == ["flow_matching"] * 4 + ["likelihood"]
    assert torch.equal(watch.epochs[4][3], watch.after[7])  # as after epoch 1
    assert not torch.equal(watch.epochs[4][3], watch.after[15])


def test_steps_are_those_of_the_optimiser():
    trainer, watch = fit(module(StagePlan(steps=4), StagePlan(steps=2)), accumulate_grad_batches=2)
    assert trainer.global_step == 6
    assert [entry[0] for entry in watch.epochs] == ["flow_matching"] * 2 + ["likelihood"]


def test_a_stage_that_will_not_begin_is_said(caplog):
    fit(module(StagePlan(steps=40), StagePlan()), epochs=1)
    assert "likelihood take 10: it will not begin. Type trainer.max_epochs=-1" in caplog.text
    caplog.clear()
    fit(module(StagePlan(steps=4), StagePlan()), epochs=2)
    assert "it will not begin" not in caplog.text


def test_what_the_second_stage_refuses_is_said_at_the_start():
    def schedule(optimizer, epochs=-1):
        return cosine(optimizer, epochs)

    with pytest.raises(ConfigError, match=r"trainer\.max_epochs"):
        fit(module(StagePlan(steps=8), StagePlan(), schedule=schedule))
    _, watch = fit(module(StagePlan(steps=8), StagePlan(lr=1.0), schedule=schedule), epochs=4)
    assert [rate for _, rate, _, _ in watch.epochs[2:]] == pytest.approx([1.0, 0.5])


def test_a_value_that_is_not_finite_stops_the_run_in_any_stage():
    net = module(StagePlan(steps=400), StagePlan(), kind=told(lambda epoch: float("nan")))
    _, watch = fit(net, StageStopping(monitor="val/nll"))
    assert [entry[0] for entry in watch.epochs] == ["flow_matching"]
