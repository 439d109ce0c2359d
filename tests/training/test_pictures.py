"""Pictures of image flows: what stands where in them."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

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
