"""Stochastic estimates: unbiased, of the variance that theory gives, and frozen over a solve."""

import pytest
import torch

from cnf_lab.errors import ConfigError
from cnf_lab.fields import Concat, ConcatSquash, EncoderDecoder, Mlp, Tanh, VectorField
from cnf_lab.flows import ContinuousFlow
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Bottleneck, Exact, Gaussian, Hutchinson, HutchPlusPlus, Rademacher

T = torch.tensor(0.4, dtype=torch.float64)
DRAWS = 20_000
each_distribution = pytest.mark.parametrize("distribution", [Rademacher(), Gaussian()], ids=["rademacher", "gaussian"])


class Elementwise(VectorField):
    """tanh of every entry: a diagonal Jacobian, for events of any shape."""

    event_dims = 3

    def forward(self, t, x, context=None):
        return torch.tanh(x) * (1 + t)


class Recorded(Hutchinson):
    """Keeps what a solve asks for."""

    def __init__(self, distribution):
        super().__init__(distribution)
        self.started, self.probes_seen = 0, []

    def start(self, field, x, context, generator, with_norm=False):
        self.started += 1
        return super().start(field, x, context, generator, with_norm)

    def linearise(self, field, t, x, context, probe):
        self.probes_seen.append(probe)
        return super().linearise(field, t, x, context, probe)


@pytest.fixture
def field(randomise):
    return randomise(Mlp((4,), [8, 8], ConcatSquash, Tanh))


@pytest.fixture
def bottleneck_field(randomise):
    return randomise(EncoderDecoder((4,), [8, 2, 8], Concat, Tanh))


@pytest.fixture
def x():
    return torch.randn(3, 4, dtype=torch.float64)


def draw(estimator, field, x, draws=DRAWS):
    """Return many independent estimates (draws,) of the divergence at one row."""
    rows = x[:1].repeat(draws, 1)
    with torch.no_grad():
        return estimator.value_and_divergence(field, T, rows, None, estimator.start(field, rows, None, None))[1]


def exact(field, x):
    return Exact().value_and_divergence(field, T, x, None, None)[1]


def jacobian(field, x):
    return torch.autograd.functional.jacobian(lambda y: field(T, y[None])[0], x[0])


def assert_mean(sample, expected):
    standard_error = sample.std() / len(sample) ** 0.5
    assert abs(sample.mean() - expected) <= 4 * standard_error


def assert_variance(sample, expected):
    squares = (sample - sample.mean()).square()
    assert_mean(squares, expected)


def test_agrees_with_the_original_for_a_given_probe(reference, load_original):
    case = reference("hutchinson_given_probe")
    field = Mlp((3,), [8, 8], Concat, Tanh)
    load_original(field.stack, case, "w/diffeq/")
    estimator = Hutchinson(Gaussian())
    value, div = estimator.value_and_divergence(field, case["t"], case["x"], None, case["probe"][None])
    torch.testing.assert_close(value, case["dxdt"], rtol=0, atol=1e-10)
    torch.testing.assert_close(div, case["divergence_estimate"][:, 0], rtol=0, atol=1e-10)


@each_distribution
@pytest.mark.parametrize("kind", [Hutchinson, Bottleneck])
def test_is_unbiased(kind, distribution, bottleneck_field, x):
    assert_mean(draw(kind(distribution), bottleneck_field, x), exact(bottleneck_field, x)[0])


@each_distribution
def test_is_the_mean_of_its_products(distribution, field, x):
    estimator = Hutchinson(distribution, probes=3)
    probe = estimator.start(field, x, None, None)
    value, div = estimator.value_and_divergence(field, T, x, None, probe)
    expected = [v @ jacobian(field, x[row : row + 1]) @ v for row in range(3) for v in probe[:, row]]
    torch.testing.assert_close(value, field(T, x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(div, torch.stack(expected).reshape(3, 3).mean(dim=1), rtol=1e-11, atol=1e-11)


def test_gaussian_variance_is_twice_the_squared_norm_of_the_symmetric_part(field, x):
    j = jacobian(field, x)
    symmetric = (j + j.mT) / 2
    assert_variance(draw(Hutchinson(Gaussian()), field, x), 2 * symmetric.square().sum())


def test_rademacher_variance_lacks_the_diagonal(field, x):
    j = jacobian(field, x)
    symmetric = (j + j.mT) / 2
    expected = 2 * (symmetric.square().sum() - symmetric.diagonal().square().sum())
    assert_variance(draw(Hutchinson(Rademacher()), field, x), expected)


@each_distribution
@pytest.mark.parametrize("kind", [Hutchinson, Bottleneck])
def test_k_probes_divide_the_variance_by_k(kind, distribution, bottleneck_field, x):
    one, eight = (float(draw(kind(distribution, probes=k), bottleneck_field, x).var()) for k in (1, 8))
    # A variance is known to sqrt((kurtosis - 1) / draws), at most 3 %.
    assert 8 * eight == pytest.approx(one, rel=0.1)


def test_rademacher_is_exact_for_diagonal_jacobians():
    field, x = Elementwise((2, 3, 4)), torch.randn(3, 2, 3, 4, dtype=torch.float64)
    estimator = Hutchinson(Rademacher())
    probe = estimator.start(field, x, None, None)
    _, div = estimator.value_and_divergence(field, T, x, None, probe)
    torch.testing.assert_close(div, exact(field, x), rtol=1e-13, atol=1e-13)


@each_distribution
def test_probe_has_the_rows_dtype_and_standard_moments(distribution, field):
    probe = Hutchinson(distribution, probes=2).start(field, torch.zeros(DRAWS, 4), None, None)
    assert probe.shape == (2, DRAWS, 4)
    assert probe.dtype == torch.float32
    assert_mean(probe.flatten(), 0)
    assert_mean(probe.flatten().square(), 1)
    assert_mean(probe[..., 0].flatten() * probe[..., 1].flatten(), 0)


def test_rademacher_probes_are_signs(field):
    assert Hutchinson(Rademacher()).start(field, torch.zeros(50, 4), None, None).unique().tolist() == [-1, 1]


@each_distribution
def test_generator_alone_decides_the_probe(distribution, field, x):
    estimator = Hutchinson(distribution)
    state = torch.get_rng_state()
    first, again, other = (estimator.start(field, x, None, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.get_rng_state().equal(state)
    assert first.equal(again)
    assert not first.equal(other)


@each_distribution
def test_gradient_is_that_of_the_products_by_double_reverse_mode(distribution, field, x):
    estimator = Hutchinson(distribution)
    probe = estimator.start(field, x, None, None)
    _, div = estimator.value_and_divergence(field, T, x, None, probe)
    y = x.requires_grad_()
    (pulled,) = torch.autograd.grad(field(T, y), y, probe[0], create_graph=True)
    expected = (pulled * probe[0]).sum()
    parameters = list(field.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(div.sum(), parameters, materialize_grads=True),
        torch.autograd.grad(expected, parameters, materialize_grads=True),
        rtol=1e-10,
        atol=1e-10,
    )


@each_distribution
def test_probe_is_drawn_once_and_frozen_over_a_solve(distribution, field, x):
    recorded, solver = Recorded(distribution), RungeKuttaSolver("dopri5", 1e-8, 1e-8)
    (estimated,) = ContinuousFlow(field, solver, recorded).pull_back(x).solves
    (exactly,) = ContinuousFlow(field, solver, Exact()).pull_back(x).solves
    assert recorded.started == 1
    assert len(recorded.probes_seen) == estimated.nfe_forward
    assert all(probe is recorded.probes_seen[0] for probe in recorded.probes_seen)
    # Noise of a fresh draw per evaluation would cost hundreds.
    assert estimated.nfe_forward <= 1.5 * exactly.nfe_forward


def test_every_solve_draws_a_new_probe(field, x):
    flow = ContinuousFlow(field, RungeKuttaSolver("dopri5"), Hutchinson(Gaussian()))
    first, second = flow.pull_back(x), flow.pull_back(x)
    assert not first.log_det.equal(second.log_det)
    torch.testing.assert_close(first.value, second.value, rtol=1e-4, atol=1e-4)


def test_bottleneck_estimate_is_taken_in_the_smaller_space(bottleneck_field, x):
    estimator = Bottleneck(Gaussian(), probes=2)
    probe = estimator.start(bottleneck_field, x, None, None)
    value, div = estimator.value_and_divergence(bottleneck_field, T, x, None, probe)
    (vectors, outer) = probe
    assert vectors.shape == (2, 3, 2)
    assert outer is None
    torch.testing.assert_close(value, bottleneck_field(T, x), rtol=1e-13, atol=1e-13)
    for row in range(3):
        one = x[row : row + 1]
        encoded = bottleneck_field.encode(T, one)[0]
        inner = torch.autograd.functional.jacobian(lambda y: bottleneck_field.encode(T, y[None])[0], one[0])
        outer = torch.autograd.functional.jacobian(lambda h: bottleneck_field.decode(T, h[None])[0], encoded)
        expected = torch.stack([v @ inner @ outer @ v for v in vectors[:, row]]).mean()
        torch.testing.assert_close(div[row], expected, rtol=1e-11, atol=1e-11)


def test_one_number_wide_bottleneck_with_signs_is_exact(randomise, x):
    field = randomise(EncoderDecoder((4,), [8, 1, 8], Concat, Tanh))
    estimator = Bottleneck(Rademacher())
    _, div = estimator.value_and_divergence(field, T, x, None, estimator.start(field, x, None, None))
    torch.testing.assert_close(div, exact(field, x), rtol=1e-11, atol=1e-11)


def test_narrow_bottleneck_has_less_variance(bottleneck_field, x):
    wide, narrow = (draw(kind(Gaussian()), bottleneck_field, x).var() for kind in (Hutchinson, Bottleneck))
    assert narrow < wide


def test_bottleneck_refuses_a_field_without_one(field):
    message = r"Expected a field with a bottleneck .*, got architecture Mlp\. Type .*=encoder_decoder"
    with pytest.raises(ConfigError, match=message):
        ContinuousFlow(field, RungeKuttaSolver("dopri5"), Bottleneck(Rademacher()))
    with pytest.raises(ConfigError, match=message):
        ContinuousFlow(field, RungeKuttaSolver("dopri5"), Exact(), None, Bottleneck(Rademacher()))


@pytest.mark.parametrize("kind", [Hutchinson, Bottleneck])
def test_no_probes_are_refused(kind):
    with pytest.raises(ConfigError, match=r"Expected trace\.probes of at least 1, got 0\. Type trace\.probes=1\."):
        kind(Rademacher(), probes=0)


class Reverse(VectorField):
    """A field with an operation that has no forward derivative."""

    forward_mode = False

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return 3 * x**2 * gradient

    def __init__(self):
        super().__init__((4,))
        self.linear = torch.nn.Linear(4, 4).double()

    def forward(self, t, x, context=None):
        return self.Cube.apply(self.linear(x)) * t


def test_reverse_mode_estimates_the_same(field, x):
    probe = Hutchinson(Gaussian(), 3).start(field, x, None, None)
    forward, reverse = (
        Hutchinson(Gaussian(), 3, mode).linearise(field, T, x, None, probe) for mode in ("forward", "reverse")
    )
    for mine, other in zip(forward[:3], reverse[:3], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("graph", [True, False], ids=["training", "evaluation"])
def test_a_field_without_forward_derivatives_takes_reverse_mode(x, graph):
    field = Reverse()
    estimator = Hutchinson(Rademacher(), 2)
    probe = estimator.start(field, x, None, None)
    with torch.set_grad_enabled(graph):
        found = estimator.linearise(field, T, x, None, probe)
        _, div = Exact(chunk=3).value_and_divergence(field, T, x, None, None)
    for row in range(3):
        j = jacobian(field, x[row : row + 1])
        torch.testing.assert_close(div[row], j.trace(), rtol=1e-11, atol=1e-11)
        expected = torch.stack([v @ j @ v for v in probe[:, row]])
        torch.testing.assert_close(found.estimates[:, row], expected, rtol=1e-11, atol=1e-11)
    assert found.div.requires_grad is div.requires_grad is found.value.requires_grad is graph
    if graph:
        gradients = torch.autograd.grad(found.div.sum(), list(field.parameters()))
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_wrong_mode_is_refused():
    with pytest.raises(ConfigError, match=r"Expected trace\.mode forward, reverse or null, got back\."):
        Hutchinson(Gaussian(), 1, "back")


@each_distribution
@pytest.mark.parametrize(("sketch", "probes"), [(1, 1), (2, 3), (3, 1)])
def test_hutch_plus_plus_is_unbiased(field, x, distribution, sketch, probes):
    assert_mean(draw(HutchPlusPlus(distribution, sketch, probes), field, x), exact(field, x)[0])


@each_distribution
def test_hutch_plus_plus_is_exact_on_a_full_sketch(field, x, distribution):
    sample = draw(HutchPlusPlus(Gaussian(), 4, 1), field, x, 50)
    torch.testing.assert_close(sample, exact(field, x[:1]).expand(50), rtol=1e-9, atol=1e-9)


def test_hutch_plus_plus_wins_where_few_directions_carry_the_jacobian(x):
    field = Mlp((4,), [1], Concat, Tanh).double()  # a Jacobian of rank 1
    torch.testing.assert_close(
        draw(HutchPlusPlus(Rademacher(), 1, 1), field, x, 50), exact(field, x[:1]).expand(50), rtol=1e-9, atol=1e-9
    )
    assert draw(Hutchinson(Rademacher(), 3), field, x).std() > 1e-3


def test_gradient_of_hutch_plus_plus_is_unbiased(field, x):
    rows = x[:1].repeat(DRAWS, 1)
    estimator, weight = HutchPlusPlus(Rademacher(), 2, 1), field.stack.layers[0].linear.bias
    _, div = estimator.value_and_divergence(field, T, rows, None, estimator.start(field, rows, None, None))
    (expected,) = torch.autograd.grad(exact(field, x[:1]).sum(), weight)
    batches = torch.stack([torch.autograd.grad(part.mean(), weight, retain_graph=True)[0] for part in div.chunk(20)])
    error = batches.std(dim=0) / 20**0.5
    assert (abs(batches.mean(dim=0) - expected) <= 4.5 * error).all()


@pytest.mark.parametrize(
    "estimator", [Hutchinson(Gaussian(), 2), HutchPlusPlus(Rademacher(), 2, 2)], ids=["hutchinson", "hutch++"]
)
def test_norm_of_the_jacobian_comes_from_the_same_products(field, x, estimator):
    rows = x[:1].repeat(DRAWS, 1)
    with torch.no_grad():
        found = estimator.linearise(field, T, rows, None, estimator.start(field, rows, None, None))
    assert_mean(found.squared_norm, jacobian(field, x[:1]).square().sum())
    assert found.estimates.shape == (2, DRAWS)
    torch.testing.assert_close(found.estimates.mean(dim=0), found.div, rtol=1e-12, atol=1e-12)


def test_norm_beside_a_bottleneck_takes_a_probe_of_its_own(bottleneck_field, x):
    estimator, rows = Bottleneck(Gaussian()), x[:1].repeat(DRAWS, 1)
    with torch.no_grad():
        probe = estimator.start(bottleneck_field, rows, None, None, with_norm=True)
        found = estimator.linearise(bottleneck_field, T, rows, None, probe)
    assert_mean(found.squared_norm, jacobian(bottleneck_field, x[:1]).square().sum())


def test_sketch_larger_than_the_event_is_refused(field):
    with pytest.raises(ConfigError, match=r"trace\.sketch of at most 4, .* got 5\. Type trace\.sketch=4"):
        HutchPlusPlus(Gaussian(), 5).chosen_for(field)
