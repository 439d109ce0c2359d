"""Pictures of image flows: what stands where in them."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image, ImageSequence

from cnf_lab.errors import SolverError
from cnf_lab.fields import ConcatConv, ConvField, Tanh
from cnf_lab.flows import Centre, Chain, ContinuousFlow, Flow, StandardNormal, UniformDequantiser, View, Viewed
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact
from cnf_lab.training import pictures

SHAPE, LEVELS = (1, 4, 4), 256


def flow(shape=SHAPE, scales=1):
    solver = RungeKuttaSolver("dopri5", 1e-9, 1e-9)

    def block(view):
        field = ConvField(view.shape(shape), [3], ConcatConv, Tanh)
        return Viewed(ContinuousFlow(field, solver, Exact()), view)

    views = [View(), View(0, True), View(1)][: 2 * scales - 1]
    layers = [Centre(shape, LEVELS), *map(block, views)]
    return Flow(Chain(layers), StandardNormal(shape), dequantiser=UniformDequantiser(shape, LEVELS)).double()


def drawn(figure, axes, count, columns, shape=SHAPE):
    """The images in a panel of a figure, read from its rendered pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    box = axes.get_window_extent()
    top, left = round(pixels.shape[0] - box.y1), round(box.x0)
    factor = round(box.width) // (columns * (shape[2] + 1) - 1)
    places = [divmod(number, columns) for number in range(count)]
    corners = [(top + row * (shape[1] + 1) * factor, left + column * (shape[2] + 1) * factor) for row, column in places]
    images = [pixels[y : y + shape[1] * factor, x : x + shape[2] * factor] for y, x in corners]
    small = [image[::factor, ::factor] for image in images]
    for image, pixel in zip(images, small, strict=True):
        assert np.array_equal(image, pixel.repeat(factor, axis=0).repeat(factor, axis=1))
    return np.stack(small)


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def rows():
    return torch.randint(0, LEVELS, (10, *SHAPE)).float()


def test_pixels_are_the_cells_that_values_lie_in():
    values = torch.tensor([-3.0, 0.0, 0.99, 16.5, 17.0, 300.0, torch.nan]).reshape(-1, 1, 1, 1)
    assert pictures.to_pixels(values, 17).flatten().tolist() == [0, 0, 0, 16, 16, 16, 0]
    assert pictures.to_pixels(values, 17).dtype == np.uint8
    assert pictures.to_pixels(values, 1000).dtype == np.uint16


def test_bytes_to_look_at_span_black_to_white():
    shown = pictures.shown(torch.tensor([0.0, 16.0]).reshape(2, 1, 1, 1), 17)
    assert shown.shape == (2, 1, 1, 3)
    assert shown.flatten().tolist() == [0, 0, 0, 255, 255, 255]
    colour = torch.arange(3.0).reshape(1, 3, 1, 1)
    assert pictures.shown(colour, 256).flatten().tolist() == [0, 1, 2]


def test_tiles_stand_in_rows_on_white():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), dtype=np.uint8)
    grid = pictures.tile(images, 3)
    assert grid.shape == (5, 11, 3)
    assert (grid[:2, 4:7] == 1).all()
    assert (grid[3:, 4:7] == 4).all()
    assert (grid[2] == 255).all()
    assert (grid[3:, 8:] == 255).all()
    assert pictures.enlarged(grid, 30).shape == (15, 33, 3)


def test_a_saved_grid_can_be_seen(tmp_path, rows):
    pictures.save_grid(tmp_path / "grid.png", rows, LEVELS)
    image = np.asarray(Image.open(tmp_path / "grid.png"))
    assert image.shape[1] >= pictures.WIDTH
    factor = image.shape[1] // (4 * 5 - 1)
    assert image[factor // 2, factor // 2, 0] == int(rows[0, 0, 0, 0])


@pytest.mark.parametrize("scales", [1, 2])
def test_the_way_goes_from_noise_to_the_sample(scales, randomise):
    image_flow = randomise(flow(scales=scales), 0.3)
    z = torch.randn(3, *SHAPE, dtype=torch.float64)
    states = pictures.way(image_flow, z, 5)
    assert len(states) == 5
    torch.testing.assert_close(states[0], (z + 0.5) * LEVELS)
    torch.testing.assert_close(states[-1], image_flow.eval().push_forward(z).value, rtol=1e-6, atol=1e-6)


def test_the_times_of_the_way_are_evenly_spaced(randomise):
    image_flow = randomise(flow(), 0.3).eval()
    centre, block = image_flow.transform.transforms
    z = torch.randn(3, *SHAPE, dtype=torch.float64)
    expected = [centre.push_forward(state).value for state in (z, *block.trajectory(z, points=8))]
    torch.testing.assert_close(torch.stack(pictures.way(image_flow, z, 9)), torch.stack(expected), rtol=0, atol=1e-9)


def test_images_come_back_from_their_latents(rows, randomise):
    image_flow = randomise(flow(), 0.3)
    back = pictures.decode(image_flow, pictures.encode(image_flow, rows))
    assert (pictures.to_pixels(back, LEVELS) == rows.numpy()).all()


def test_interpolations_end_in_the_latents():
    first, second = torch.randn(2, 4, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(pictures.spherical(first, second, 0.0), first)
    torch.testing.assert_close(pictures.spherical(first, second, 1.0), second)
    unit = first / first.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    other = second / second.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    middle = pictures.spherical(unit, other, 0.5).flatten(1)
    torch.testing.assert_close(middle.norm(dim=1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 4), (3, 30, 33)])
def test_data_and_samples_stand_pixel_by_pixel_in_their_grids(shape, randomise):
    image_flow = randomise(flow(shape), 0.3)
    rows = torch.randint(0, LEVELS, (7, *shape), generator=seeded()).float()
    figure = pictures.sample_grid(image_flow, rows, LEVELS, seeded(), 9)
    assert [axes.get_title() for axes in figure.axes] == ["data", "samples"]
    data, samples = figure.axes
    assert np.array_equal(drawn(figure, data, 7, 3, shape), pictures.shown(rows, LEVELS))
    expected = image_flow.eval().sample(9, generator=seeded())
    assert np.array_equal(drawn(figure, samples, 9, 3, shape), pictures.shown(expected, LEVELS))


def test_reconstructions_stand_below_their_images_without_an_error(rows, randomise):
    figure = pictures.reconstructions(randomise(flow(), 0.3), rows, LEVELS)
    images = drawn(figure, figure.axes[0], 16, 8)
    assert np.array_equal(images[:8], pictures.shown(rows[:8], LEVELS))
    assert np.array_equal(images[8:], images[:8])
    assert float(figure.axes[0].get_title().split("largest error ")[1].split()[0]) < 1e-5


def test_the_strip_ends_in_the_samples(randomise):
    image_flow = randomise(flow(), 0.3)
    figure = pictures.strip(image_flow, LEVELS, seeded(), n=4, points=5)
    images = drawn(figure, figure.axes[0], 20, 5)
    z = image_flow.base.sample(4, seeded())
    assert np.array_equal(images[0::5], pictures.shown((z + 0.5) * LEVELS, LEVELS))
    # The solve in parts and the whole one may fall on either side of a level.
    difference = images[4::5].astype(int) - pictures.shown(pictures.decode(image_flow, z), LEVELS)
    assert np.abs(difference).max() <= 1


def test_interpolations_end_in_the_images_themselves(rows, randomise):
    figure = pictures.interpolations(randomise(flow(), 0.3), rows, LEVELS, n=5, steps=7)
    images = drawn(figure, figure.axes[0], 35, 7)
    assert np.array_equal(images[0::7], pictures.shown(rows[0::2], LEVELS))
    assert np.array_equal(images[6::7], pictures.shown(rows[1::2], LEVELS))
    assert not np.array_equal(images[3::7], images[0::7])


def test_temperatures_scale_the_same_latents(randomise):
    image_flow = randomise(flow(), 0.3)
    figure = pictures.temperatures(image_flow, LEVELS, seeded(), n=3, values=(0.0, 0.5, 1.0))
    cold, mild, warm = drawn(figure, figure.axes[0], 9, 3).reshape(3, 3, 4, 4, 3)
    assert np.array_equal(cold, cold[:1].repeat(3, axis=0))
    z = image_flow.base.sample(3, seeded())
    for images, temperature in ((mild, 0.5), (warm, 1.0)):
        # Other batch mates mean other solver steps, which may move a value across a level.
        expected = pictures.shown(pictures.decode(image_flow, temperature * z), LEVELS)
        assert np.abs(images.astype(int) - expected).max() <= 1


def test_a_failed_solve_costs_its_own_figure_only(rows, monkeypatch):
    def fail(*given):
        raise SolverError("The solve failed.")

    monkeypatch.setattr(pictures, "reconstructions", fail)
    figures = pictures.figures(flow(), rows, LEVELS, 4, seeded())
    assert [next(figures)[0] for _ in range(4)] == ["samples", "strip", "interpolations", "temperatures"]
    with pytest.raises(SolverError, match="The solve failed"):
        next(figures)


def test_one_image_has_no_interpolations(rows):
    names = [name for name, _ in pictures.figures(flow(), rows[:1], LEVELS, 1, seeded())]
    assert names == ["samples", "reconstructions", "strip", "temperatures"]


def test_figures_of_any_number_of_rows_leave_the_flow_and_the_global_numbers_alone(randomise):
    image_flow = randomise(flow(), 0.3).train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for count in (2, 3, 10):
        rows = torch.randint(0, LEVELS, (count, *SHAPE), generator=seeded()).float()
        names = {name: figure for name, figure in pictures.figures(image_flow, rows, LEVELS, 9, seeded())}
        assert set(names) == {"samples", "reconstructions", "strip", "interpolations", "temperatures"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in image_flow.modules())
    title = names["reconstructions"].axes[0].get_title()
    assert float(title.split("largest error ")[1].split()[0]) < 1e-4


def test_the_same_seed_draws_the_same_samples(randomise):
    image_flow = randomise(flow(), 0.3)
    first, second = (pictures.draw(image_flow, 5, seeded()) for _ in range(2))
    assert torch.equal(first, second)
    cold = pictures.draw(image_flow, 5, seeded(), temperature=0.0)
    assert torch.equal(cold, cold[:1].expand_as(cold))


def test_a_film_can_be_read(tmp_path, randomise):
    frames = pictures.film(randomise(flow(), 0.3), LEVELS, seeded(), n=4, points=6)
    pictures.write_gif(tmp_path / "film.gif", frames)
    with Image.open(tmp_path / "film.gif") as film:
        read = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
        assert film.info["loop"] == 0
    assert len(read) == 6
    assert read[0].shape == frames[0].shape
    assert np.abs(read[-1].astype(int) - frames[-1]).max() < 16  # a GIF has 256 colours
