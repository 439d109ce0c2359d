"""Normalisation layers: what the first batch sets, what later ones move, and exact log-dets."""

import pytest
import torch
from torch import nn

from cnf_lab.flows import ActNorm, MovingBatchNorm
from cnf_lab.flows.normalisation import batch_moments

EVENTS = {"rows": (3,), "images": (3, 2, 4)}
each_event = pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS.keys())
each_kind = pytest.mark.parametrize("kind", [MovingBatchNorm, ActNorm])


def batch(event, n=40, shift=5.0, scale=3.0):
    channels = torch.arange(1.0, 1 + event[0], dtype=torch.float64).reshape(-1, *(1,) * (len(event) - 1))
    return shift * channels + scale / channels * torch.randn(n, *event, dtype=torch.float64)


def by_feature(x):
    """Return all numbers of each feature or channel, (features, n)."""
    return x.transpose(0, 1).flatten(1)


@each_event
@each_kind
def test_first_training_batch_leaves_with_mean_0_and_variance_1(kind, event):
    y = by_feature(kind(event).double().train().pull_back(batch(event)).value)
    torch.testing.assert_close(y.mean(dim=1), y.new_zeros(3), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.var(dim=1, correction=0), y.new_ones(3), rtol=0, atol=1e-3)


@each_event
def test_batch_norm_moves_running_statistics_by_the_decay(event):
    norm = MovingBatchNorm(event, decay=0.2).double().train()
    first, second = batch(event), batch(event, shift=-2.0, scale=0.5)
    norm.pull_back(first)
    norm.pull_back(second)
    for running, moment in ((norm.mean, 0), (norm.variance, 1)):
        expected = 0.8 * batch_moments(first)[moment] + 0.2 * batch_moments(second)[moment]
        torch.testing.assert_close(running, expected, rtol=1e-6, atol=1e-6)


@each_event
def test_batch_norm_normalises_by_running_statistics(event):
    norm = MovingBatchNorm(event).double().train()
    norm.pull_back(batch(event))
    norm.pull_back(batch(event))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = batch(event)
    mapped = norm.eval().pull_back(x)
    standard = (by_feature(x) - norm.mean[:, None]) / torch.sqrt(norm.variance + norm.epsilon)[:, None]
    expected = standard * norm.weight.exp()[:, None] + norm.bias[:, None]
    torch.testing.assert_close(by_feature(mapped.value), expected, rtol=1e-12, atol=1e-12)


def test_batch_norm_statistics_carry_no_gradient():
    norm = MovingBatchNorm((3,)).double().train()
    x = batch((3,)).requires_grad_()
    mapped = norm.pull_back(x)
    (mapped.value.sum() + mapped.log_det.sum()).backward()
    assert not norm.mean.requires_grad
    torch.testing.assert_close(x.grad, (norm.variance + norm.epsilon).rsqrt().expand_as(x), rtol=1e-12, atol=1e-12)


def test_batch_norm_can_learn_twice_before_a_backward_pass():
    norm = MovingBatchNorm((3,)).double().train()
    first, second = norm.pull_back(batch((3,))), norm.pull_back(batch((3,)))
    (first.value.square().sum() + second.value.square().sum() + first.log_det.sum()).backward()
    assert norm.weight.grad.isfinite().all()


@each_event
def test_act_norm_is_initialised_once(event):
    norm = ActNorm(event).double().train()
    norm.pull_back(batch(event))
    expected = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.pull_back(batch(event, shift=-4.0))
    torch.testing.assert_close(dict(norm.state_dict()), expected, rtol=0, atol=0)


def test_act_norm_is_learned():
    norm = ActNorm((3,)).double().train()
    mapped = norm.pull_back(batch((3,)))
    (mapped.value.square().sum() - mapped.log_det.sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in norm.parameters())


@each_kind
def test_restored_layer_is_not_initialised_again(kind):
    norm, other = kind((3,)).double().train(), kind((3,)).double().train()
    norm.pull_back(batch((3,)))
    other.load_state_dict(norm.state_dict())
    x = batch((3,), shift=-4.0)
    assert other.pull_back(x).value.equal(norm.pull_back(x).value)
    assert other.pull_back(x).value.mean().abs() > 0.1


@each_event
@each_kind
def test_inverse_and_log_det(kind, event):
    norm = kind(event).double().train()
    norm.pull_back(batch(event))
    for parameter in norm.parameters():
        nn.init.normal_(parameter, std=0.5)
    norm.eval()
    x = batch(event, n=3)
    there = norm.pull_back(x)
    back = norm.push_forward(there.value)
    torch.testing.assert_close(back.value, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=0, atol=0)
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda y: norm.pull_back(y[None]).value[0], x[row])
        size = x[row].numel()
        expected = torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet
        torch.testing.assert_close(there.log_det[row], expected, rtol=1e-12, atol=1e-12)


@each_kind
def test_evaluation_and_sampling_learn_nothing(kind):
    norm = kind((3,)).double()
    expected = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.eval().pull_back(batch((3,)))
    norm.train().push_forward(batch((3,)))
    torch.testing.assert_close(dict(norm.state_dict()), expected, rtol=0, atol=0)
    assert norm.eval().pull_back(batch((3,))).value.abs().max() > 5


@each_event
def test_moments_are_those_of_the_population(event):
    x = batch(event)
    mean, variance = batch_moments(x)
    torch.testing.assert_close(mean, by_feature(x).mean(dim=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, by_feature(x).var(dim=1, correction=0), rtol=1e-10, atol=1e-12)


@each_kind
def test_a_constant_feature_stays_finite(kind):
    x = batch((3,))
    x[:, 1] = 7.1
    mapped = kind((3,)).double().train().pull_back(x)
    assert mapped.value.isfinite().all()
    assert mapped.log_det.isfinite().all()


@each_kind
def test_far_from_zero_a_small_spread_is_seen(kind):
    x = 1e8 + torch.randn(200, 3, dtype=torch.float64)
    norm = kind((3,)).double().train()
    y = norm.pull_back(x).value
    torch.testing.assert_close(y.var(dim=0, correction=0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-3)
