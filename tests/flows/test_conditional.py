"""Finite posterior maps: log-dets against the autograd Jacobian, their formulas, and what they refuse."""

import pytest
import torch

from cnf_lab.errors import ConfigError
from cnf_lab.flows import Chain
from cnf_lab.flows.conditional import InverseAutoregressive, Planar, Sylvester, orthonormal_columns

D, FEATURES = 4, 6
MAPS = {
    "planar": lambda: Planar(D, FEATURES),
    "orthogonal": lambda: Sylvester(D, FEATURES, "orthogonal", 2),
    "orthogonal-square": lambda: Sylvester(D, FEATURES, "orthogonal", D),
    "householder": lambda: Sylvester(D, FEATURES, "householder", 3),
    "triangular": lambda: Sylvester(D, FEATURES, "triangular"),
    "triangular-reversed": lambda: Sylvester(D, FEATURES, "triangular", reverse=True),
    "iaf-1": lambda: InverseAutoregressive(D, FEATURES, 1, 8),
    "iaf-3": lambda: InverseAutoregressive(D, FEATURES, 3, 11),
    "chain": lambda: Chain([Planar(D, FEATURES), Sylvester(D, FEATURES, "householder", 2)]),
}


@pytest.fixture(params=MAPS.values(), ids=MAPS)
def transform(request, randomise):
    return randomise(request.param(), 0.7)


@pytest.fixture
def context():
    return torch.randn(5, FEATURES, dtype=torch.float64)


def test_log_det_is_that_of_the_jacobian(transform, context):
    z = torch.randn(5, D, dtype=torch.float64)
    mapped = transform.pull_back(z, context)
    for row in range(5):
        own = context[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda v, own=own: transform.pull_back(v[None], own).value[0], z[row]
        )
        torch.testing.assert_close(mapped.log_det[row], torch.linalg.slogdet(jacobian)[1], rtol=1e-9, atol=1e-10)
        assert torch.linalg.slogdet(jacobian)[0] != 0


def test_rows_do_not_look_at_one_another(transform, context):
    z = torch.randn(5, D, dtype=torch.float64)
    together = transform.pull_back(z, context)
    alone = [transform.pull_back(row, own) for row, own in zip(z.split(1), context.split(1), strict=True)]
    torch.testing.assert_close(together.value, torch.cat([one.value for one in alone]), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(together.log_det, torch.cat([one.log_det for one in alone]), rtol=1e-10, atol=1e-10)


def test_gradients_reach_every_parameter(transform, context):
    mapped = transform.pull_back(torch.randn(5, D, dtype=torch.float64), context)
    (mapped.value.square().sum() - mapped.log_det.sum()).backward()
    for name, parameter in transform.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_autocast_is_left(transform, context):
    transform, z = transform.float(), torch.randn(5, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = transform.pull_back(z, context.bfloat16())
    full = transform.pull_back(z, context.bfloat16().float())
    assert low.value.dtype == low.log_det.dtype == torch.float32
    torch.testing.assert_close(low.value, full.value)


def test_planar_follows_the_formula(randomise, context):
    planar = randomise(Planar(D, FEATURES))
    z = torch.randn(5, D, dtype=torch.float64)
    mapped = planar.pull_back(z, context)
    for row, own in enumerate(planar.amortiser(context)):
        u, w, b = own[:D], own[D : 2 * D], own[2 * D]
        u = u + (torch.log1p(torch.exp(w @ u)) - 1 - w @ u) * w / (w @ w)
        assert w @ u > -1  # what makes it invertible
        torch.testing.assert_close(mapped.value[row], z[row] + u * torch.tanh(w @ z[row] + b))


def test_one_planar_map_is_applied_once(randomise, context):
    """The original's toy map is applied twice, and reports the log-det of the second alone."""
    planar = randomise(Planar(D, FEATURES))
    z = torch.randn(5, D, dtype=torch.float64)
    once = planar.pull_back(z, context)
    twice = Chain([planar, planar]).pull_back(z, context)
    again = planar.pull_back(once.value, context)
    torch.testing.assert_close(twice.value, again.value)
    torch.testing.assert_close(twice.log_det, once.log_det + again.log_det)


@pytest.mark.parametrize(("dimension", "columns"), [(6, 2), (6, 6), (64, 8), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_become_orthonormal(dimension, columns, dtype):
    a = torch.randn(10, dimension, columns, dtype=torch.float64)
    u, _, v = torch.linalg.svd(a, full_matrices=False)
    a = (u @ torch.diag_embed(torch.linspace(0.5, 2, columns, dtype=torch.float64)) @ v).to(dtype)
    q = orthonormal_columns(a)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(q.mT @ q, torch.eye(columns, dtype=dtype).expand(10, -1, -1), rtol=0, atol=tolerance)
    # The nearest such matrix, the polar factor.
    torch.testing.assert_close(q, (u @ v).to(dtype), rtol=0, atol=100 * tolerance)


def test_autoregressive_means_triangular(randomise, context):
    iaf = randomise(InverseAutoregressive(D, FEATURES, 1, 12), 0.7)
    z = torch.randn(D, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: iaf.pull_back(v[None], context[:1]).value[0], z)
    assert not jacobian.triu(1).any()
    assert (jacobian.diagonal() > 0).all()
    assert jacobian.tril(-1).count_nonzero() == D * (D - 1) / 2  # every entry sees all before it


def test_there_is_no_way_back_and_no_regulariser(transform, context):
    from cnf_lab.objectives import KineticEnergy

    z = torch.randn(5, D, dtype=torch.float64)
    with pytest.raises(ConfigError, match="Expected a map with an inverse, got"):
        transform.push_forward(z, context)
    with pytest.raises(ConfigError, match=r"no regulariser on a posterior .* got KineticEnergy"):
        transform.pull_back(z, context, None, [KineticEnergy(0.1)])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Sylvester(4, 2, "qr"), "one of orthogonal, householder, triangular, got qr"),
        (lambda: Sylvester(4, 2, "orthogonal", 5), r"posterior\.size of 1 to 4"),
        (lambda: InverseAutoregressive(4, 2, 0, 8), r"posterior\.flows of at least 1"),
        (lambda: InverseAutoregressive(4, 2, 1, 3), r"posterior\.width of at least 4"),
    ],
)
def test_options_out_of_range(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
