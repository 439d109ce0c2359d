"""One continuous flow: modes, options, end time, context, integrals, precision."""

from functools import partial

import pytest
import torch
from torch import nn

from cnf_lab.errors import ConfigError, SolverError
from cnf_lab.fields import (
    Blend,
    Concat,
    ConcatSquash,
    Hyper,
    Identity,
    Ignore,
    Mlp,
    Residual,
    Softplus,
    Swish,
    Tanh,
    VectorField,
)
from cnf_lab.fields.spectral import SpectralNorm
from cnf_lab.flows import Chain, ContinuousFlow, Flow, Integrand, MovingBatchNorm, StandardNormal
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact, Gaussian, Hutchinson, HutchPlusPlus, Rademacher

TIGHT = RungeKuttaSolver("dopri5", 1e-9, 1e-9)


@pytest.fixture
def field(randomise):
    return randomise(Mlp((3,), [6, 5], ConcatSquash, Softplus))


@pytest.fixture
def x():
    return torch.randn(4, 3, dtype=torch.float64)


def scaling(rate):
    """Return the field dx/dt = rate x."""
    field = Mlp((1,), [1], Ignore, Identity).double()
    for parameter, value in zip(field.parameters(), (1.0, 0.0, rate, 0.0), strict=True):
        nn.init.constant_(parameter, value)
    return field


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("direction", ["pull_back", "push_forward"])
@pytest.mark.parametrize(
    ("solver", "evaluations"),
    [
        pytest.param(RungeKuttaSolver("rk4", steps=8), 32, id="steps"),
        pytest.param(RungeKuttaSolver("rk4", options={"step_size": 0.125}), 32, id="step_size"),
        pytest.param(
            RungeKuttaSolver("dopri5", 1e3, 1e3, options={"first_step": 0.25, "ifactor": 1.0}),
            25,
            id="dopri5",
        ),
    ],
)
def test_options_of_the_solver_are_honoured_in_both_modes(field, x, training, direction, solver, evaluations):
    flow = ContinuousFlow(field, solver, Exact()).train(training)
    (stats,) = getattr(flow, direction)(x).solves
    assert stats.nfe_forward == evaluations


def test_both_modes_give_the_same_numbers_by_default(field, x):
    flow = ContinuousFlow(field, RungeKuttaSolver("rk4", steps=5), Exact())
    trained, evaluated = flow.train().pull_back(x), flow.eval().pull_back(x)
    assert trained.value.equal(evaluated.value)
    assert trained.log_det.equal(evaluated.log_det)


@pytest.mark.parametrize("set_later", [False, True], ids=["constructed", "set-later"])
def test_evaluation_mode_has_its_own_solver_and_divergence(field, x, set_later):
    training = (RungeKuttaSolver("euler", steps=4), Hutchinson(Rademacher()))
    evaluation = (RungeKuttaSolver("rk4", steps=6), Exact())
    block = ContinuousFlow(field, *training, *(() if set_later else evaluation))
    flow = Flow(Chain([MovingBatchNorm((3,)), Chain([block])]), StandardNormal((3,))).double()
    if set_later:
        flow.set_evaluation(*evaluation)
    noisy = [flow.train().pull_back(x) for _ in range(2)]
    assert [mapped.solves[0].nfe_forward for mapped in noisy] == [4, 4]
    assert not noisy[0].log_det.equal(noisy[1].log_det)
    exact = [flow.eval().pull_back(x) for _ in range(2)]
    assert [mapped.solves[0].nfe_forward for mapped in exact] == [24, 24]
    assert exact[0].log_det.equal(exact[1].log_det)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_trained_end_time_has_the_gradient_of_finite_differences(field, x, gradient):
    solver = RungeKuttaSolver("dopri5", 1e-10, 1e-10, gradient=gradient)
    flow = ContinuousFlow(field, solver, Exact(), end_time=0.8, train_end_time=True).double()

    def loss():
        mapped = flow.pull_back(x)
        return mapped.value.square().sum() - mapped.log_det.sum()

    loss().backward()
    step = 1e-4
    with torch.no_grad():
        flow.log_end_time += step
        after = loss()
        flow.log_end_time -= 2 * step
        before = loss()
    assert float(flow.log_end_time.grad) == pytest.approx(float((after - before) / (2 * step)), rel=1e-6)


def test_fixed_end_time_is_no_parameter(field):
    flow = ContinuousFlow(field, TIGHT, Exact(), end_time=0.8)
    assert not any("end_time" in name for name in flow.state_dict())
    assert len(list(flow.parameters())) == len(list(field.parameters()))
    assert "end_time=0.8" in repr(flow)
    assert "end_time=0.8" in repr(ContinuousFlow(field, TIGHT, Exact(), end_time=0.8, train_end_time=True))


@pytest.mark.parametrize("trained", [False, True], ids=["fixed-T", "trained-T"])
def test_field_sees_times_from_0_to_the_end_time(x, trained):
    times = []

    class Clock(Residual):
        def forward(self, t, x, context=None):
            times.append(t.item())
            return super().forward(t, x, context)

    field = Clock((3,), 4, 1, Tanh, 1).double()
    flow = ContinuousFlow(
        field,
        RungeKuttaSolver("rk4", steps=3),
        Hutchinson(Rademacher()),
        end_time=2.5,
        train_end_time=trained,
    )
    flow.push_forward(x, with_log_det=False)
    assert (min(times), max(times)) == pytest.approx((0, 2.5), abs=1e-6)


class Along(Integrand):
    def __init__(self, function):
        self.function = function

    def __call__(self, t, x, found):
        return self.function(t, found)


@pytest.mark.parametrize("trained", [False, True], ids=["fixed-T", "trained-T"])
@pytest.mark.parametrize("end_time", [1.0, 0.5])
def test_integrals_along_the_way(trained, end_time):
    # For dx/dt = r x: the integrals of (dx/dt)^2, div and t over [0, T].
    rate = 0.7
    block = partial(ContinuousFlow, solver=TIGHT, divergence=Exact(), end_time=end_time, train_end_time=trained)
    chain = Chain([MovingBatchNorm((1,)), block(scaling(rate)), block(scaling(rate))]).double().eval()
    integrands = (
        Along(lambda t, found: found.value.square().sum(dim=1)),
        Along(lambda t, found: found.div),
        Along(lambda t, found: t.expand(len(found.value))),
    )
    start = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    x = chain.transforms[0].push_forward(start).value
    mapped = chain.pull_back(x, integrands=integrands)
    growth = torch.exp(torch.tensor(4 * rate * end_time, dtype=torch.float64))
    kinetic = rate * (growth - 1) / 2 * start[:, 0].square()
    expected = (kinetic, torch.full((2,), 2 * rate * end_time), torch.full((2,), float(end_time**2)))
    for integral, value in zip(mapped.integrals, expected, strict=True):
        torch.testing.assert_close(integral, value.double(), rtol=1e-6, atol=1e-6)
    without = chain.pull_back(x)
    assert without.integrals == ()
    torch.testing.assert_close(mapped.log_det, without.log_det, rtol=1e-10, atol=1e-10)
    assert len(mapped.solves) == 2


def test_sampling_does_not_evaluate_the_divergence(field, x, monkeypatch):
    flow = ContinuousFlow(field, TIGHT, Hutchinson(Rademacher()))
    monkeypatch.setattr(Hutchinson, "linearise", None)
    monkeypatch.setattr(Hutchinson, "start", None)
    assert flow.push_forward(x, with_log_det=False).log_det.equal(x.new_zeros(4))


@pytest.mark.parametrize("direction", ["pull_back", "push_forward"])
def test_generator_alone_decides_the_estimate(field, x, direction):
    flow = ContinuousFlow(field, TIGHT, Hutchinson(Gaussian()))
    first, again, other = (
        getattr(flow, direction)(x, generator=torch.Generator().manual_seed(seed)).log_det for seed in (1, 1, 2)
    )
    assert first.equal(again)
    assert not first.equal(other)


class Whirl(VectorField):
    """Turns rows the faster the farther out they are."""

    def forward(self, t, x, context=None):
        turned = torch.stack([-x[:, 1], x[:, 0]], dim=1)
        return turned * x.square().sum(dim=1, keepdim=True) + torch.cos(x)


@torch.no_grad()
def test_log_density_does_not_depend_on_the_other_rows():
    def log_prob(rows, tolerance, error_norm):
        solver = RungeKuttaSolver("dopri5", tolerance, tolerance, error_norm=error_norm)
        return Flow(ContinuousFlow(Whirl((2,)), solver, Exact()), StandardNormal((2,))).eval().log_prob(rows)

    near, far = (
        0.3 * torch.randn(300, 2, dtype=torch.float64),
        torch.tensor([[2.0, 0.0]], dtype=torch.float64),
    )
    rows = torch.cat([near, far])
    by_example, by_batch = (log_prob(rows, 1e-5, norm)[[0, -1]] for norm in ("example", "batch"))
    alone = torch.cat([log_prob(row, 1e-5, "example") for row in (near[:1], far)])
    torch.testing.assert_close(by_example, alone, rtol=0, atol=10e-5)
    truth = log_prob(far, 1e-8, "example")
    assert (by_example[1:] - truth).abs() < 50e-5
    assert (by_batch[1:] - truth).abs() > 500e-5


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize(
    "trace",
    [Exact(), Exact(closed_form=False), Hutchinson(Rademacher())],
    ids=["closed", "forward", "hutchinson"],
)
def test_gradients_reach_data_context_and_amortiser(randomise, x, gradient, trace):
    solver = RungeKuttaSolver("dopri5", 1e-9, 1e-9, gradient=gradient)
    field = randomise(Mlp((3,), [6, 5], ConcatSquash, Tanh, context_features=2))
    flow = ContinuousFlow(field, solver, trace, amortiser=randomise(nn.Linear(4, 2)))
    context = torch.randn(4, 4, dtype=torch.float64)
    inputs = (x, context, *flow.parameters())

    def loss(x, context):
        mapped = flow.pull_back(x, context, torch.Generator().manual_seed(0))
        return mapped.value.square().sum() - mapped.log_det.sum()

    for tensor in inputs:
        tensor.requires_grad_()
    gradients = torch.autograd.grad(loss(x, context), inputs)
    directions = [torch.randn_like(tensor) for tensor in inputs]
    expected = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    ends = []
    for step in (1e-4, -2e-4):
        with torch.no_grad():
            for tensor, direction in zip(inputs, directions, strict=True):
                tensor += step * direction
            ends.append(loss(x, context))
    assert float(expected) == pytest.approx(float((ends[0] - ends[1]) / 2e-4), rel=1e-5)


def test_adjoint_without_anything_to_train(x):
    flow = ContinuousFlow(scaling(0.5), RungeKuttaSolver("dopri5", 1e-8, 1e-8, gradient="adjoint"), Exact())
    for parameter in flow.parameters():
        parameter.requires_grad_(False)
    start = x[:, :1].clone().requires_grad_()
    flow.pull_back(start).value.sum().backward()
    torch.testing.assert_close(start.grad, torch.full_like(start, 0.5).exp(), rtol=1e-6, atol=1e-6)


def test_a_failed_solve_is_a_solver_error(x):
    flow = ContinuousFlow(scaling(1e6), RungeKuttaSolver("dopri5", options={"max_num_steps": 50}), Exact())
    with pytest.raises(SolverError, match=r"failed at t = .*max_num_steps exceeded"):
        flow.pull_back(x[:, :1])


def test_trajectory_of_a_linear_field():
    flow = ContinuousFlow(scaling(0.9), TIGHT, Exact(), end_time=0.3).eval()
    z = torch.tensor([[1.5]], dtype=torch.float64)
    states = torch.stack(flow.trajectory(z, points=3)).flatten()
    times = 0.3 * torch.arange(1, 4, dtype=torch.float64) / 3
    torch.testing.assert_close(states, 1.5 * torch.exp(-0.9 * times), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end_time": 0.0}, r"Expected model\.end_time above 0, got 0\.0\. Type model\.end_time=1\.0\."),
        ({"end_time": -1.0}, r"Expected model\.end_time above 0, got -1\.0\."),
        ({"end_time": float("nan")}, r"Expected model\.end_time above 0, got nan\."),
    ],
    ids=["zero", "negative", "nan"],
)
def test_end_time_out_of_range_is_refused(field, options, message):
    with pytest.raises(ConfigError, match=message):
        ContinuousFlow(field, TIGHT, Exact(), **options)


@pytest.mark.parametrize("options", [{"end_time": 2.0}, {"train_end_time": True}], ids=["longer", "trained"])
def test_blend_is_confined_to_unit_time(options):
    with pytest.raises(
        ConfigError, match=r"Expected model\.end_time=1\.0 and .*layer=blend.* Type model\.end_time=1\.0\."
    ):
        ContinuousFlow(Mlp((3,), [4], Blend, Tanh), TIGHT, Exact(), **options)


@pytest.mark.parametrize(
    "make",
    [
        *(
            pytest.param(partial(Mlp, (3,), [32, 32], layer, Tanh), id=layer.__name__)
            for layer in (Concat, ConcatSquash, Blend, Hyper)
        ),
        pytest.param(partial(Mlp, (3,), [32, 32, 32], ConcatSquash, Softplus), id="three-hidden"),
        pytest.param(partial(Mlp, (3,), [32, 32], ConcatSquash, Swish, context_features=2), id="context"),
        pytest.param(partial(Mlp, (3,), [32, 32], ConcatSquash, Tanh, spectral_norm=True), id="spectral-norm"),
        pytest.param(partial(Residual, (3,), 32, 1, Swish), id="residual"),
    ],
)
@pytest.mark.parametrize("trace", [Exact(), Hutchinson(Rademacher())], ids=["exact", "hutchinson"])
@torch.no_grad()
def test_low_precision_is_left_to_the_field(make, trace):
    solver = RungeKuttaSolver("dopri5", 1e-3, 1e-3)
    field = make()
    for parameter in field.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.03)  # the last layer of a residual field
    features = make.keywords.get("context_features", 0)
    flow = Flow(ContinuousFlow(field, solver, trace), StandardNormal((3,)), features).train()
    x, context = torch.randn(50, 3), torch.randn(50, features) if features else None

    def run():
        mapped = flow.pull_back(x, context, torch.Generator().manual_seed(0))
        return mapped, flow.base.log_prob(mapped.value) + mapped.log_det

    full, expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, log_prob = run()
        sample = flow.sample(5, context=None if context is None else context[:5])
    assert low.value.dtype == low.log_det.dtype == log_prob.dtype == sample.dtype == torch.float32
    assert low.solves[0].nfe_forward <= 2 * full.solves[0].nfe_forward
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=0.05)
    assert not log_prob.equal(expected)


def test_evaluation_keeps_full_precision():
    """At an evaluation's tolerance a low-precision field would chase its own round-off."""
    flow = Flow(ContinuousFlow(Mlp((3,), [8], Concat, Tanh), RungeKuttaSolver("dopri5"), Exact()), StandardNormal((3,)))
    x = torch.randn(5, 3)
    expected = flow.eval().log_prob(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flow.log_prob(x).equal(expected)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_low_precision_trains(gradient):
    solver = RungeKuttaSolver("dopri5", 1e-3, 1e-3, gradient=gradient)
    flow = Flow(ContinuousFlow(Mlp((3,), [32, 32], ConcatSquash, Tanh), solver, Exact()), StandardNormal((3,)))
    x = torch.randn(50, 3)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = -flow.log_prob(x).mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(flow.parameters()))]))
    assert gradients[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_low_precision_leaves_the_singular_vectors_alone():
    field = Mlp((3,), [8, 8], ConcatSquash, Tanh, spectral_norm=True)
    flow = ContinuousFlow(field, RungeKuttaSolver("dopri5", 1e-3, 1e-3), Exact()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flow.pull_back(torch.randn(5, 3))
    assert all(buffer.dtype == torch.float32 for buffer in flow.buffers())


@pytest.mark.parametrize("estimator", [Hutchinson(Gaussian(), 32), HutchPlusPlus(Gaussian(), 1, 32)])
def test_spread_of_the_estimates_gives_the_error_of_the_log_det(field, estimator):
    """The true log-det lies within 3 standard errors for almost every row, and the errors are not idle."""
    x = torch.randn(400, 3, dtype=torch.float64)
    block = ContinuousFlow(field, TIGHT, estimator).eval()
    truth = ContinuousFlow(field, TIGHT, Exact()).eval().pull_back(x)
    mapped = block.pull_back(x, generator=torch.Generator().manual_seed(0))
    score = (mapped.log_det - truth.log_det) / mapped.log_det_error
    assert truth.log_det_error is None
    assert (score.abs() < 3).double().mean() > 0.95
    assert (score.abs() < 1).double().mean() < 0.85
    single = block.train().pull_back(x, generator=torch.Generator().manual_seed(0))
    assert single.log_det_error is None, "training integrates no spread"
    torch.testing.assert_close(single.log_det, mapped.log_det, rtol=1e-9, atol=1e-9)


def test_errors_of_blocks_add_in_quadrature_and_one_probe_has_none(field):
    x = torch.randn(5, 3, dtype=torch.float64)
    many, one = (ContinuousFlow(field, TIGHT, Hutchinson(Gaussian(), probes)) for probes in (4, 1))
    exact = ContinuousFlow(field, TIGHT, Exact())
    chain = Chain([exact, many, many]).eval()
    generator = torch.Generator().manual_seed(0)
    first = many.pull_back(exact.pull_back(x).value, generator=generator)
    second = many.pull_back(first.value, generator=generator)
    total = chain.pull_back(x, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(total.log_det_error, torch.hypot(first.log_det_error, second.log_det_error))
    assert Chain([many, one]).eval().pull_back(x).log_det_error.isnan().all()


def test_spectrally_normalised_weights_are_computed_once_per_solve(monkeypatch):
    field = Mlp((3,), [8, 8], ConcatSquash, Tanh, spectral_norm=True)
    calls, forward = [], SpectralNorm.forward
    monkeypatch.setattr(SpectralNorm, "forward", lambda self, weight: calls.append(0) or forward(self, weight))
    ContinuousFlow(field, RungeKuttaSolver("rk4", steps=4), Exact()).pull_back(torch.randn(5, 3))
    normalised = sum(isinstance(part, SpectralNorm) for part in field.modules())
    assert len(calls) == normalised > 0
