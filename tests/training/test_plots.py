"""The figures show what they say they show."""

import math

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from cnf_lab.errors import SolverError
from cnf_lab.fields import ConcatSquash, Mlp, Tanh
from cnf_lab.flows import ContinuousFlow, Flow, Mapped, StandardNormal, Transform
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact
from cnf_lab.training import panels, plots
from cnf_lab.training.curves import curves

WINDOW = (-4.0, 4.0, -4.0, 4.0)


class Shift(Transform):
    """x = z + (context, 0, 0, ...): a density that is known."""

    def pull_back(self, x, context=None, generator=None, integrands=()):
        return Mapped(x - self._shift(x, context), x.new_zeros(len(x)))

    def push_forward(self, z, context=None, generator=None, with_log_det=True):
        return Mapped(z + self._shift(z, context), z.new_zeros(len(z)))

    def _shift(self, x, context):
        return torch.nn.functional.pad(context, (0, x.shape[1] - context.shape[1])) if context is not None else 0


class Failing(Shift):
    def push_forward(self, z, context=None, generator=None, with_log_det=True):
        raise SolverError("The solve failed.")


def shift(columns, context_features=0):
    return Flow(Shift(), StandardNormal((columns,)), context_features).double()


def continuous(columns=2):
    torch.manual_seed(0)
    solver = RungeKuttaSolver("dopri5", 1e-3, 1e-3)
    field = Mlp((columns,), (8,), ConcatSquash, Tanh)
    return Flow(ContinuousFlow(field, solver, Exact()), StandardNormal((columns,))).double()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def scattered(axes):
    return [np.asarray(part.get_offsets()) for part in axes.collections if isinstance(part, PathCollection)]


def stairs(axes):
    return {part.get_label(): part.get_data() for part in axes.patches if isinstance(part, StepPatch)}


def image(axes):
    return np.asarray(axes.images[0].get_array().filled(0))


def labelled(figure):
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]


def test_evaluation_mode_ends_as_it_began():
    flow = continuous()
    frozen = flow.transform.field.stack.layers[0].eval()
    with plots.evaluating(flow):
        assert not any(module.training for module in flow.modules())
        assert not torch.is_grad_enabled()
    assert flow.training
    assert flow.transform.field.training
    assert not frozen.training
    with pytest.raises(SolverError), plots.evaluating(flow):
        raise SolverError("failed")
    assert flow.training


def test_log_density_is_that_of_the_flow_whatever_the_chunks(monkeypatch):
    rows, context = normal(23, 2), torch.tensor([[1.5]])
    monkeypatch.setattr(plots, "CHUNK", 10)
    expected = -0.5 * ((rows - [1.5, 0]) ** 2).sum(1) - math.log(2 * math.pi)
    assert plots.log_density(shift(2, 1), rows, context) == pytest.approx(expected, abs=1e-12)


def test_samples_share_the_rows_of_the_context(monkeypatch):
    monkeypatch.setattr(plots, "CHUNK", 7)
    context = torch.tensor([[-1000.0], [0.0], [1000.0]])
    drawn = plots.draw_samples(shift(2, 1), 30, context)
    assert drawn.shape == (30, 2)
    assert np.round(drawn[:, 0] / 1000).tolist() == [-1] * 10 + [0] * 10 + [1] * 10


def test_samples_take_the_dtype_and_the_numbers_of_the_generator():
    flow = shift(2).float()
    one = plots.draw_samples(flow, 5, generator=torch.Generator().manual_seed(3))
    other = plots.draw_samples(flow, 5, generator=torch.Generator().manual_seed(3))
    assert np.array_equal(one, other)
    assert np.array_equal(plots.draw_samples(flow, 5), plots.draw_samples(flow, 5))
    assert not np.array_equal(one, plots.draw_samples(flow, 5))


def test_density_of_two_columns_is_upright_and_has_all_its_mass():
    rows = normal(100, 2)
    context = torch.tensor([[2.0]])
    figure = plots.density_2d(shift(2, 1), rows, (-5.0, 8.0, -6.0, 6.0), context=context, resolution=60, samples=50)
    data, samples, density = labelled(figure)
    assert np.array_equal(scattered(data)[0], rows)
    assert len(scattered(samples)[0]) == 50
    row, column = np.unravel_index(image(density).argmax(), (60, 60))
    left, right, bottom, top = density.images[0].get_extent()
    assert left + (right - left) * (column + 0.5) / 60 == pytest.approx(2, abs=13 / 60)
    assert bottom + (top - bottom) * (row + 0.5) / 60 == pytest.approx(0, abs=12 / 60)
    assert density.images[0].origin == "lower"
    assert density.get_title() == "flow given 2, mass 1.000"
    assert image(density).max() == pytest.approx(1 / (2 * math.pi), rel=0.05)


def test_density_stands_beside_the_truth_on_one_scale():
    def truth(rows):
        return -0.5 * (rows**2).sum(1) / 0.25 - math.log(2 * math.pi * 0.25)

    figure = plots.density_2d(shift(2), normal(50, 2), WINDOW, truth, resolution=41, names=["speed", "mass"])
    data, _, density, true = labelled(figure)
    assert true.get_title() == "true density, mass 1.000"
    assert density.images[0].get_clim() == true.images[0].get_clim() == (0, pytest.approx(4 / (2 * math.pi)))
    assert (data.get_xlabel(), data.get_ylabel()) == ("speed", "mass")


def test_a_conditional_density_is_drawn_from_low_to_high():
    context = torch.tensor([[5.0], [-5.0], [0.0], [1.0], [-1.0], [4.0]])
    figure = plots.density_2d(shift(2, 1), normal(50, 2), (-9.0, 9.0, -9.0, 9.0), context=context, resolution=20)
    titles = [axes.get_title() for axes in labelled(figure)[2:]]
    assert [title.split(",")[0] for title in titles] == ["flow given -1", "flow given 1", "flow given 5"]


def test_titles_and_margins_tell_what_lies_outside():
    rows = np.array([[0.0, 0.0]] * 3 + [[9.0, 0.0]])
    figure = plots.density_2d(shift(2), rows, WINDOW, resolution=10)
    assert labelled(figure)[0].get_title() == "data, 25% outside"
    axes = plots.marginals(10 * normal(1000, 1), normal(1000, 1, seed=1)).axes[0]
    assert axes.texts[0].get_text().endswith("% outside")
    assert stairs(axes)["samples"].values.sum() * np.diff(stairs(axes)["samples"].edges)[0] < 0.5


def test_density_of_one_column():
    rows = normal(200, 1)
    figure = plots.density_1d(shift(1), rows, lambda x: -0.5 * x[:, 0] ** 2 - 0.5 * math.log(2 * math.pi), name="speed")
    (axes,) = figure.axes
    line, truth = axes.lines
    low, high = (math.erf(edge / math.sqrt(2)) / 2 for edge in axes.get_xlim())
    assert float(line.get_label().removeprefix("flow, mass ")) == pytest.approx(high - low, abs=6e-4)
    assert line.get_ydata() == pytest.approx(truth.get_ydata(), abs=1e-12)
    assert axes.get_xlabel() == "speed"
    heights, edges, _ = stairs(axes)["data"]
    assert (heights * np.diff(edges)).sum() == pytest.approx(1, abs=0.011)


def test_density_of_one_column_under_conditions():
    figure = plots.density_1d(shift(1, 1), normal(50, 1), context=torch.tensor([[-1.0], [1.0]]))
    peaks = [line.get_xdata()[line.get_ydata().argmax()] for line in figure.axes[0].lines]
    assert peaks == pytest.approx([-1, 1], abs=0.02)


def test_trajectories_go_from_latent_to_samples():
    flow = continuous()
    figure = plots.trajectories_2d(flow, 300, WINDOW, points=5)
    large, *small = figure.axes
    (segments,) = [part.get_segments() for part in large.collections if isinstance(part, LineCollection)]
    assert len(segments) == plots.LINES
    latent = flow.base.sample(300, torch.Generator().manual_seed(0))
    samples = plots.trajectory(flow, 300, 5)[-1]
    assert np.array_equal(np.array([segment[0] for segment in segments]), latent[: plots.LINES])
    assert scattered(small[0])[0] == pytest.approx(latent.numpy())
    assert scattered(small[-1])[0] == pytest.approx(samples)
    assert [axes.get_title() for axes in small][::5] == ["latent", "data"]
    assert small[1].get_title() == "20% of the way"
    assert len({axes.get_xlim() for axes in figure.axes}) == 1


def test_trajectories_between_different_scales_get_windows_of_their_own():
    states = np.stack([normal(100, 2), 1000 + normal(100, 2)])
    far = (990.0, 1010.0, 990.0, 1010.0)
    windows = plots._windows(states, far)
    assert windows[0][1] < 10
    assert windows[1] == far


def test_marginals_share_bins_and_choose_columns_evenly():
    samples, rows = normal(500, 9), normal(400, 9, seed=1)
    figure = plots.marginals(samples, rows, [f"c{i}" for i in range(9)], max_columns=5)
    shown = labelled(figure)
    assert [axes.get_xlabel() for axes in shown] == ["c0", "c2", "c4", "c6", "c8"]
    data, drawn = stairs(shown[1])["data"], stairs(shown[1])["samples"]
    assert np.array_equal(data.edges, drawn.edges)
    expected = np.histogram(samples[:, 2], drawn.edges)[0] / 500 / np.diff(drawn.edges)
    assert drawn.values == pytest.approx(expected)


def test_a_constant_column_can_be_drawn():
    samples = np.concatenate([normal(50, 2), np.ones((50, 1))], axis=1)
    for figure in (plots.marginals(samples, samples), plots.pairs(samples, samples)):
        figure.draw_without_rendering()


def test_pairs_mirror_samples_above_data():
    rows = normal(300, 3) @ np.array([[1, 0.9, 0], [0, 0.3, 0], [0, 0, 1]])
    figure = plots.pairs(rows, rows)
    places = np.array(figure.axes).reshape(3, 3)
    assert np.array_equal(image(places[1, 0]), image(places[0, 1]).T)
    assert image(places[1, 0]).sum() == pytest.approx(300, abs=12)
    assert (places[2, 0].get_xlabel(), places[2, 0].get_ylabel()) == ("$x_{1}$", "$x_{3}$")
    assert places[1, 0].images[0].cmap.name == panels.DATA_COUNTS
    assert places[0, 1].images[0].cmap.name == panels.FLOW_COUNTS


def test_pairs_without_data_leave_the_upper_triangle_out():
    places = np.array(plots.pairs(normal(50, 7)).axes).reshape(5, 5)
    assert [[axes.get_visible() for axes in row] for row in places] == np.tri(5, dtype=bool).tolist()
    assert places[1, 0].images[0].cmap.name == panels.FLOW_COUNTS


@pytest.mark.parametrize(("columns", "with_rows", "count"), [(1, True, 1), (2, False, 1), (2, True, 2), (3, True, 9)])
def test_sample_plot_suits_the_columns(columns, with_rows, count):
    figure = plots.sample_plot(normal(40, columns), normal(30, columns) if with_rows else None)
    assert len(figure.axes) == count
    if columns == 2:
        assert [len(scattered(axes)[0]) for axes in figure.axes] == [30, 40][-count:]


@pytest.mark.parametrize(
    ("columns", "names"),
    [(1, ["density"]), (2, ["density", "trajectories"]), (3, ["marginals", "pairs"])],
)
@pytest.mark.parametrize("conditional", [False, True])
def test_figures_suit_the_data_and_leave_the_random_stream_alone(columns, names, conditional, tmp_path):
    flow = shift(columns, int(conditional))
    context = torch.linspace(-1, 1, 40)[:, None] if conditional else None
    before = torch.get_rng_state()
    found = dict(plots.figures(flow, normal(40, columns), context, resolution=10, samples=60))
    assert torch.equal(torch.get_rng_state(), before)
    assert list(found) == names
    for name, figure in found.items():
        assert isinstance(figure, Figure)
        figure.savefig(tmp_path / name, format="png")
        assert (tmp_path / name).stat().st_size > 5000


def test_events_that_are_not_columns_have_no_figures():
    assert list(plots.figures(shift(1), normal(5, 1, 4, 4))) == []


def test_a_failed_solve_is_raised():
    with pytest.raises(SolverError):
        plots.draw_samples(Flow(Failing(), StandardNormal((2,))), 3)


def test_curves_read_steps_seconds_and_evaluations(tmp_path):
    table = tmp_path / "metrics.csv"
    table.write_text(
        "epoch,step,train/nll,val/nll,nfe/forward,nfe/backward,time/step_seconds\n"
        "0,9,,3.0,,,\n"
        "0,9,4.0,,20,0,0.5\n"
        "1,19,,2.5,,,\n"
        "1,19,2.75,,26,2,0.1\n"
        "2,20,,,,,\n"
    )
    by_step, by_time, cost = curves(table).axes
    train, val = by_step.lines
    assert train.get_xydata().tolist() == [[10, 4.0], [20, 2.75]]
    assert val.get_xydata().tolist() == [[10, 3.0], [20, 2.5]]
    assert by_time.lines[1].get_xdata() == pytest.approx([5, 6])
    assert [line.get_ydata().tolist() for line in cost.lines] == [[20, 26], [0, 2]]
    assert by_step.get_ylabel() == "NLL (nats)"


def test_curves_of_a_run_without_solves(tmp_path):
    table = tmp_path / "metrics.csv"
    table.write_text("epoch,step,val/bits_per_dim\n0,9,3.0\n")
    figure = curves(table, "bits_per_dim", "bits")
    figure.draw_without_rendering()
    assert figure.axes[0].lines[1].get_xydata().tolist() == [[10, 3.0]]
