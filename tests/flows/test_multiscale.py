"""The multiscale flow: views, the original's numbers, the autograd Jacobian, flow matching through it."""

import math
import re
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from cnf_lab.errors import ConfigError
from cnf_lab.fields import ConcatConv, ConvField, Softplus
from cnf_lab.fields.squeeze import squeeze, unsqueeze
from cnf_lab.flows import ActNorm, Logit, UniformDequantiser, View, continuous_blocks, factored_out, image_flow
from cnf_lab.flows.multiscale import published_scales, views
from cnf_lab.flows.sequence import BlockSequence
from cnf_lab.objectives import FlowMatching, Independent, Likelihood, LinearPath, UniformTimes
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact

TIGHT = RungeKuttaSolver("dopri5", 1e-11, 1e-11, error_norm="example")
LEVELS = 16


def model(event_shape, scales=None, blocks=1, hidden=(5, 5), alpha=0.05, **options):
    return image_flow(
        event_shape,
        0,
        lambda event_shape, context_features: ConvField(event_shape, list(hidden), ConcatConv, Softplus),
        TIGHT,
        TIGHT,
        Exact(),
        Exact(),
        [partial(Logit, alpha=alpha, levels=LEVELS)],
        partial(UniformDequantiser, levels=LEVELS),
        scales=scales,
        blocks=blocks,
        **options,
    ).double()


def pixels(batch, event_shape):
    return LEVELS * torch.rand(batch, *event_shape, dtype=torch.float64)


# -- squeeze and views ----------------------------------------------------------------------------


def test_squeeze_is_the_originals(reference):
    case = reference("squeeze_and_logit")
    assert torch.equal(squeeze(case["x"]), case["squeezed"])
    assert torch.equal(unsqueeze(case["squeezed"]), case["x"])


@given(channels=st.integers(1, 4), height=st.integers(1, 4), width=st.integers(1, 4), batch=st.integers(0, 3))
def test_squeeze_is_a_permutation(channels, height, width, batch):
    x = torch.arange(4.0 * batch * channels * height * width).reshape(batch, channels, 2 * height, 2 * width)
    y = squeeze(x)
    assert y.shape == (batch, 4 * channels, height, width)
    assert torch.equal(y.flatten().sort().values, x.flatten())
    for c, p, q in ((0, 0, 1), (channels - 1, 1, 0)):
        assert torch.equal(y[:, 4 * c + 2 * p + q], x[:, c, p::2, q::2])
    assert torch.equal(unsqueeze(y), x)


@given(channels=st.integers(1, 3), scale=st.integers(0, 2), squeezed=st.booleans(), times=st.integers(1, 2))
def test_a_view_gives_back_what_it_took_and_touches_nothing_else(channels, scale, squeezed, times):
    side = 8 * times
    view, shape = View(scale, squeezed), (channels, side, side)
    image = torch.arange(2.0 * channels * side * side).reshape(2, *shape)
    part = view.take(image)
    assert part.shape == (2, *view.shape(shape))
    assert torch.equal(view.put(image, part), image)
    marked = view.put(image, torch.full_like(part, -1.0))
    changed = marked != image
    assert torch.equal(image[changed].sort().values, part.flatten().sort().values)
    assert torch.equal(view.take(marked), torch.full_like(part, -1.0))


def test_factoring_out_loses_nothing():
    image = torch.arange(2.0 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    parts = factored_out(image, 3)
    assert [tuple(part.shape[1:]) for part in parts] == [(6, 8, 8), (12, 4, 4), (12, 4, 4)]
    joined = torch.cat([part.flatten(1) for part in parts], dim=1)
    assert torch.equal(joined.flatten().sort().values, image.flatten())


@pytest.mark.parametrize(("side", "scales"), [(28, 3), (32, 4), (64, 5), (8, 2), (4, 1), (3, 1)])
def test_published_numbers_of_scales(side, scales):
    assert published_scales((1, side, side)) == scales


def test_published_numbers_of_blocks():
    assert len(views(3, 2)) == 10
    assert len(views(4, 2)) == 14


# -- the whole flow -------------------------------------------------------------------------------


def test_the_originals_multiscale_flow_is_reproduced(reference):
    case = reference("multiscale_1x8x8")
    flow = model((1, 8, 8)).eval()
    places = {"0.chain.1": "1", "0.chain.3": "2.transform", "1.chain.0": "3.transform"}
    state = dict(flow.state_dict())
    for key, value in case.items():
        match = re.fullmatch(r"w/transforms/(.*)/odefunc/diffeq/layers/(\d)/_layer/(weight|bias)", key)
        if match:
            place = places[match[1].replace("/", ".")]
            name = f"transform.transforms.{place}.field.stack.layers.{match[2]}.linear.{match[3]}"
            assert state[name].shape == value.shape
            state[name] = value
    flow.load_state_dict(state)
    mapped = flow.pull_back(case["x"] * LEVELS)  # the original's pixels are in [0, 1)
    latent = torch.cat([part.flatten(1) for part in factored_out(mapped.value, 2)], dim=1)
    torch.testing.assert_close(latent, case["z"], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(mapped.log_det + 64 * math.log(LEVELS), case["log_det"], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "count"), [((1, 28, 28), 800_636), ((3, 32, 32), 1_358_868)], ids=["mnist", "cifar10"]
)
def test_published_parameter_counts(shape, count):
    flow = model(shape, blocks=2, hidden=(64, 64, 64))
    assert sum(parameter.numel() for parameter in flow.parameters()) == count


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 4)])
@pytest.mark.parametrize("scales", [1, 2])
def test_log_det_is_that_of_the_jacobian_and_the_sum_over_blocks(shape, scales, randomise):
    flow = randomise(model(shape, scales, hidden=(3,)), 0.3).eval()
    x = pixels(2, shape)
    mapped = flow.pull_back(x)
    for row, log_det in zip(x, mapped.log_det, strict=True):
        jacobian = torch.func.jacrev(lambda y: flow.pull_back(y[None]).value.flatten())(row)
        expected = torch.linalg.slogdet(jacobian.reshape(x[0].numel(), -1)).logabsdet
        torch.testing.assert_close(log_det, expected, rtol=1e-8, atol=1e-8)
    fixed = flow.transform.transforms[0].pull_back(x).log_det
    assert len(mapped.block_log_dets) == len(mapped.solves) == 2 * scales - 1
    torch.testing.assert_close(fixed + sum(mapped.block_log_dets), mapped.log_det, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalisation", [None, ActNorm], ids=["plain", "actnorm"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 4), (1, 12, 12)])
def test_push_forward_is_the_inverse(shape, normalisation, randomise):
    flow = randomise(model(shape, 2, hidden=(4,), normalisation=normalisation), 0.3).eval()
    x = pixels(3, shape)
    there = flow.pull_back(x)
    back = flow.push_forward(there.value)
    torch.testing.assert_close(back.value, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=1e-8, atol=1e-7)


def test_what_leaves_at_a_scale_does_not_change_any_more(randomise):
    flow = randomise(model((1, 8, 8), 2, hidden=(3,)), 0.3).eval()
    after_first_scale = pixels(2, (1, 8, 8))
    for transform in flow.transform.transforms[:3]:
        after_first_scale = transform.pull_back(after_first_scale).value
    end = flow.transform.transforms[3].pull_back(after_first_scale).value
    assert torch.equal(factored_out(end, 2)[0], factored_out(after_first_scale, 2)[0])
    assert not torch.equal(factored_out(end, 2)[1], factored_out(after_first_scale, 2)[1])


def test_trajectories_keep_the_shape_and_end_in_the_sample(randomise):
    flow = randomise(model((1, 8, 8), 2, hidden=(3,)), 0.3).eval()
    z = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    states = flow.trajectory(z, points=3)
    assert states.shape == (1 + 3 * 3 + 1, 2, 1, 8, 8)
    torch.testing.assert_close(states[-1], flow.push_forward(z).value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("shape", "scales", "said"),
    [
        ((1, 30, 30), None, "Expected model.scales of 1 to 2 for images of 30x30"),
        ((1, 8, 8), 0, "got 0. Type model.scales=4"),
        ((8,), None, "got data of event shape (8,). Type model=density"),
    ],
)
def test_sizes_that_cannot_be_squeezed(shape, scales, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        model(shape, scales)


def test_any_size_makes_one_scale():
    assert len(continuous_blocks(model((1, 7, 5), 1, blocks=2))) == 2


# -- flow matching --------------------------------------------------------------------------------


def test_parts_arrive_with_the_last_block_of_their_scale():
    flow = model((1, 8, 8), 2, blocks=1)
    sequence = BlockSequence(flow)
    assert len(sequence.blocks) == 3  # two at the first scale, one at the second
    x, z = torch.randn(2, 5, 1, 8, 8, dtype=torch.float64)
    u = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    state, velocity = sequence.along(LinearPath(), x, z, u)
    torch.testing.assert_close(state[0], x[0])
    torch.testing.assert_close(state[-1], z[-1])
    (first, stay), (fast, slow) = factored_out(state, 2), factored_out(velocity, 2)
    (x0, x1), (z0, z1) = factored_out(x, 2), factored_out(z, 2)
    own = (u * 1.5).clamp(max=1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(first, (1 - own) * x0 + own * z0)
    late = ((u - 2 / 3) * 3).clamp(min=0).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(stay, (1 - late) * x1 + late * z1)
    torch.testing.assert_close(fast[:3], 1.5 * (z0 - x0)[:3])
    torch.testing.assert_close(slow[3:], 3 * (z1 - x1)[3:])
    assert not fast[3:].any()
    assert not slow[:3].any()


def test_velocity_is_the_derivative_of_the_state():
    sequence = BlockSequence(model((1, 8, 8), 2, blocks=2))
    x, z = torch.randn(2, 40, 1, 8, 8, dtype=torch.float64)
    u = torch.linspace(0.013, 0.987, 40, dtype=torch.float64)
    ahead, behind = (sequence.along(LinearPath(), x, z, u + h)[0] for h in (1e-6, -1e-6))
    torch.testing.assert_close(sequence.along(LinearPath(), x, z, u)[1], (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-6)


def test_blocks_move_only_what_they_see(randomise):
    flow = randomise(model((1, 8, 8), 2, hidden=(3,)), 0.3)
    sequence = BlockSequence(flow)
    value = sequence.velocity(torch.tensor([0.1, 0.9], dtype=torch.float64), torch.randn(2, 1, 8, 8).double(), None)
    first, second = factored_out(value, 2)
    assert first[0].any()
    assert second[0].any()
    assert not first[1].any()
    assert second[1].any()


@pytest.mark.parametrize("objective", [FlowMatching(LinearPath(), UniformTimes(), Independent()), Likelihood()])
def test_objectives_reach_every_block(objective, randomise):
    flow = randomise(model((1, 8, 8), 2, hidden=(3,)), 0.3).train()
    x = torch.randint(0, LEVELS, (12, 1, 8, 8)).double()
    result = objective(flow, x, None, torch.Generator().manual_seed(0))
    result.loss.backward()
    assert all(p.grad is not None and p.grad.any() for block in continuous_blocks(flow) for p in block.parameters())
