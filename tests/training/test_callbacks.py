"""The callbacks in real, tiny fits."""

import logging
import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import EMAWeightAveraging

from cnf_lab.data import FlowDataModule, Splits
from cnf_lab.data.base import ArrayRows
from cnf_lab.errors import ConfigError
from cnf_lab.fields import ConcatSquash, Mlp, Tanh
from cnf_lab.flows import ContinuousFlow, Flow, StandardNormal
from cnf_lab.ode import RungeKuttaSolver, SolveStats
from cnf_lab.trace import Exact, Gaussian, Hutchinson
from cnf_lab.training import callbacks, plots
from cnf_lab.training.callbacks import EpochLine, Plots, SolverMonitor, epoch_line
from cnf_lab.training.curves import read_series
from cnf_lab.training.tracking import CsvLogger

ROWS = 48


class Data(FlowDataModule):
    def __init__(self, columns):
        super().__init__("tiny", batch_size=16, evaluation_batch_size=10)
        self.columns = columns

    def load(self):
        rows = np.random.default_rng(0).standard_normal((ROWS, self.columns)).astype(np.float32)
        return Splits(ArrayRows(rows), ArrayRows(rows[:25] + 3), ArrayRows(rows[:20] - 3))

    @property
    def event_shape(self):
        return (self.columns,)


class Module(pl.LightningModule):
    """A flow whose training draws from the global random stream."""

    monitor = "val/nll"

    def __init__(self, columns=2, gradient="direct", evaluation_solver=None):
        super().__init__()
        torch.manual_seed(1)
        field = Mlp((columns,), (8,), ConcatSquash, Tanh)
        solver = RungeKuttaSolver("dopri5", 1e-3, 1e-3, gradient=gradient)
        transform = ContinuousFlow(field, solver, Hutchinson(Gaussian()), evaluation_solver, Exact())
        self.flow = Flow(transform, StandardNormal((columns,)))
        self.solves = []

    def training_step(self, batch, step):
        mapped = self.flow.pull_back(batch.x)
        loss = -(self.flow.base.log_prob(mapped.value) + mapped.log_det).mean()
        self.log("train/nll", loss.detach(), on_step=False, on_epoch=True, batch_size=len(batch.x))
        self.solves += mapped.solves
        return {"loss": loss, "solves": mapped.solves}

    def validation_step(self, batch, step):
        self.log("val/nll", 5.0 - self.current_epoch, batch_size=len(batch.x))

    def test_step(self, batch, step):
        self.log("test/nll", 1.0, batch_size=len(batch.x))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


@pytest.fixture
def sent(monkeypatch):
    """Names and steps of the figures that loggers were given."""
    found = []
    monkeypatch.setattr(callbacks, "log_figure", lambda loggers, name, figure, step: found.append((name, step)))
    return found


@pytest.fixture
def blank(monkeypatch):
    """One empty figure instead of real ones, where only the time of drawing matters."""
    monkeypatch.setattr(plots, "figures", lambda *given: iter([("density", Figure(figsize=(0.1, 0.1)))]))


def trainer(folder, *used, epochs=2, **options):
    fixed = {
        "logger": CsvLogger(str(folder)),
        "accelerator": "cpu",
        "inference_mode": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(default_root_dir=folder, callbacks=list(used), max_epochs=epochs, **{**fixed, **options})


def small_plots(folder, **options):
    return Plots(str(folder), **{"every_n_epochs": 1, "samples": 40, "resolution": 12, **options})


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "cnf_lab"]


def fitted(folder, *used, module=None, **options):
    module = module or Module()
    fit = trainer(folder, *used, **options)
    fit.fit(module, Data(module.flow.event_shape[0]))
    return module, fit


# -- SolverMonitor --------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_evaluations_are_the_means_over_training_steps(gradient, tmp_path):
    module, fit = fitted(tmp_path, SolverMonitor(), module=Module(gradient=gradient), epochs=1)
    total, steps = SolveStats.total(module.solves), ROWS // 16
    logged = fit.callback_metrics
    assert len(module.solves) == steps
    assert logged["nfe/forward"] == pytest.approx(total.nfe_forward / steps)
    assert logged["nfe/backward"] == pytest.approx(total.nfe_backward / steps)
    assert (total.nfe_backward > 0) == (gradient == "adjoint")
    assert logged["solver/rejected_steps"] == pytest.approx(total.rejected_steps / steps)
    assert 0 < logged["time/step_seconds"] < 10
    assert 50 < logged["memory/peak_mebibytes"] < 100_000


def test_each_epoch_starts_anew_and_reaches_the_table(tmp_path):
    module, _ = fitted(tmp_path, SolverMonitor())
    series = read_series(tmp_path / "metrics.csv")
    steps, evaluations = series["nfe/forward"]
    assert steps.tolist() == [3, 6]
    halves = (module.solves[:3], module.solves[3:])
    assert evaluations == pytest.approx([SolveStats.total(half).nfe_forward / 3 for half in halves])


def test_several_solves_of_a_step_add_up(tmp_path):
    class Twice(Module):
        def training_step(self, batch, step):
            solves = []
            for count in (3, 4):
                solves.append(SolveStats())
                solves[-1].nfe_forward = count
            return {**super().training_step(batch, step), "solves": solves}

    _, fit = fitted(tmp_path, SolverMonitor(), module=Twice(), epochs=1)
    assert fit.callback_metrics["nfe/forward"] == 7


def test_steps_without_solves_leave_the_counts_out(tmp_path):
    class Free(Module):
        def training_step(self, batch, step):
            return super().training_step(batch, step)["loss"]

    _, fit = fitted(tmp_path, SolverMonitor(), module=Free(), epochs=1)
    assert "nfe/forward" not in fit.callback_metrics
    assert "time/step_seconds" in fit.callback_metrics


# -- Plots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "names"), [(1, ["density"]), (2, ["density", "trajectories"]), (5, ["marginals", "pairs"])]
)
def test_figures_suit_the_data(columns, names, tmp_path, sent):
    module, fit = fitted(tmp_path, SolverMonitor(), small_plots(tmp_path), module=Module(columns))
    fit.test(module, Data(columns), verbose=False)
    tags = ["epoch_0000", "epoch_0001", "last", "test"]
    expected = {f"{name}_{tag}.png" for name in names for tag in tags} | {"curves_last.png"}
    files = {file.name: file for file in (tmp_path / "plots").iterdir()}
    assert set(files) == expected
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files.values())
    for name in names:
        assert files[f"{name}_last.png"].read_bytes() == files[f"{name}_epoch_0001.png"].read_bytes()
    assert sent == [
        *[(f"plots/{name}", 3) for name in names],
        *[(f"plots/{name}", 6) for name in names],
        ("plots/curves", 6),
        *[(f"plots/{name}_test", 6) for name in names],
    ]


def test_figures_show_the_rows_of_their_split(tmp_path, sent, monkeypatch):
    shown = []

    def spy(flow, rows, *others):
        shown.append((rows.mean().round(), len(rows), flow.training))
        yield from ()

    monkeypatch.setattr(plots, "figures", spy)
    module, fit = fitted(tmp_path, small_plots(tmp_path, samples=22), epochs=1)
    fit.test(module, Data(2), verbose=False)
    assert [(mean, count) for mean, count, _ in shown] == [(3, 22), (-3, 20)]


def test_figures_come_every_n_epochs_and_at_the_end(tmp_path, sent, blank):
    fitted(tmp_path, small_plots(tmp_path, every_n_epochs=2), epochs=3)
    files = sorted(file.name for file in (tmp_path / "plots").glob("d*"))
    assert files == ["density_epoch_0001.png", "density_last.png"]
    assert [step for name, step in sent if name == "plots/density"] == [6, 9]


def test_zero_epochs_draw_at_the_end_only(tmp_path, sent, blank):
    fitted(tmp_path, small_plots(tmp_path, every_n_epochs=0), epochs=1)
    assert [name for name, _ in sent] == ["plots/density", "plots/curves"]


def test_training_does_not_notice_figures(tmp_path, sent):
    with_figures, _ = fitted(tmp_path / "with", small_plots(tmp_path / "with"), module=Module(1))
    without, _ = fitted(tmp_path / "without", module=Module(1))
    assert sent
    for one, other in zip(with_figures.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_failing_solve_costs_figures_only(tmp_path, sent, caplog):
    hopeless = RungeKuttaSolver("dopri5", 1e-9, 1e-9, options={"max_num_steps": 1})
    with caplog.at_level(logging.WARNING, logger="cnf_lab"):
        _, fit = fitted(tmp_path, small_plots(tmp_path), module=Module(evaluation_solver=hopeless), epochs=1)
    assert fit.state.finished
    (line,) = lines(caplog)
    assert line.startswith("Figures of epoch 0 left out: The solve with dopri5 failed")
    assert "\n" not in line
    assert [name for name, _ in sent] == ["plots/curves"]


@pytest.mark.parametrize("plots_first", [True, False])
def test_figures_show_the_averaged_weights(plots_first, tmp_path, sent, monkeypatch):
    seen = {"validation": [], "figures": []}

    class Watched(Module):
        def validation_step(self, batch, step):
            seen["validation"].append(weights(self.flow))
            super().validation_step(batch, step)

    def weights(flow):
        return torch.nn.utils.parameters_to_vector(flow.parameters()).sum().item()

    def spy(flow, *others):
        seen["figures"].append(weights(flow))
        yield from ()

    monkeypatch.setattr(plots, "figures", spy)
    used = [small_plots(tmp_path), EMAWeightAveraging(decay=0.5, use_buffers=False)]
    module, _ = fitted(
        tmp_path, *(used if plots_first else used[::-1]), module=Watched(), epochs=1, num_sanity_val_steps=0
    )
    assert seen["figures"] == [seen["validation"][-1]]
    assert seen["figures"] == [weights(module.flow)]


@pytest.mark.parametrize("option", [{"every_n_epochs": -1}, {"samples": 0}, {"resolution": 0}])
def test_numbers_out_of_range_are_refused(option, tmp_path):
    (name,) = option
    with pytest.raises(ConfigError, match=rf"^Expected callbacks\.plots\.{name} of at least"):
        Plots(str(tmp_path), **option)


# -- EpochLine ------------------------------------------------------------------------------------


def test_a_line_per_epoch_has_every_number_in_any_order(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="cnf_lab"):
        fitted(tmp_path, EpochLine(), SolverMonitor(), epochs=2)
    first, second = lines(caplog)
    rest = r"nfe \d+\+0  [\d.]+ s/step"
    assert re.fullmatch(rf"epoch 0  step 3  train/nll \d\.\d{{4}}  val/nll 5.0000  {rest}  best 5.0000", first)
    assert re.fullmatch(rf"epoch 1  step 6  train/nll \d\.\d{{4}}  val/nll 4.0000  {rest}  best 4.0000", second)


def test_epochs_without_validation_and_progress_bars_need_no_line(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="cnf_lab"):
        fitted(tmp_path, EpochLine(), epochs=3, check_val_every_n_epoch=2)
        fitted(tmp_path, EpochLine(), enable_progress_bar=True)
    assert [line.split("  ")[0] for line in lines(caplog)] == ["epoch 1"]


def test_the_best_value_survives_a_resumed_run(tmp_path, caplog):
    class Worse(Module):
        def validation_step(self, batch, step):
            self.log("val/nll", float(self.current_epoch), batch_size=len(batch.x))

    def used():
        return EpochLine(), pl.callbacks.ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)

    fitted(tmp_path, *used(), module=Worse(), epochs=1, enable_checkpointing=True)
    with caplog.at_level(logging.INFO, logger="cnf_lab"):
        resumed = trainer(tmp_path, *used(), epochs=2, enable_checkpointing=True)
        resumed.fit(Worse(), Data(2), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert lines(caplog)[-1].endswith("val/nll 1.0000  best 0.0000")


def test_what_was_not_logged_is_left_out():
    assert epoch_line(3, 40, {}, "val/nll", float("inf")) == "epoch 3  step 40"
    line = epoch_line(3, 40, {"val/elbo": -2.0, "train/elbo": 1.5}, "val/elbo", -2.5)
    assert line == "epoch 3  step 40  train/elbo 1.5000  val/elbo -2.0000  best -2.5000"
