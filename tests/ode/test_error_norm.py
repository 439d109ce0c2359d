"""Error control by example and by batch."""

import pytest
import torch

from cnf_lab.ode import TorchdiffeqSolver
from cnf_lab.ode.base import batch_error_norm, example_error_norm

TOLERANCE = 1e-6


def rotate(t, state):
    """Turn every row at a speed of its own, its squared radius; the log-det follows the first entry."""
    x, log_det = state
    turned = torch.stack([-x[:, 1], x[:, 0]], dim=1)
    return turned * x.square().sum(dim=1, keepdim=True), turned[:, 0] * x.square().sum(dim=1)


def exact(x):
    angle = x.square().sum(dim=1)
    cos, sin = angle.cos(), angle.sin()
    end = torch.stack([x[:, 0] * cos - x[:, 1] * sin, x[:, 0] * sin + x[:, 1] * cos], dim=1)
    return torch.cat([end, (end[:, :1] - x[:, :1])], dim=1)


def solve(x, error_norm):
    solver = TorchdiffeqSolver("dopri5", TOLERANCE, TOLERANCE, error_norm=error_norm)
    (end, log_det), _ = solver.solve(rotate, (x, x.new_zeros(len(x))), 0.0, 1.0)
    return torch.cat([end, log_det[:, None]], dim=1)


@pytest.fixture
def slow():
    return 0.2 * torch.randn(999, 2, dtype=torch.float64)


@pytest.fixture
def fast():
    return torch.tensor([[2.0, 0.0]], dtype=torch.float64)


def test_by_batch_the_worst_row_exceeds_the_tolerance(slow, fast):
    error = (solve(torch.cat([slow, fast]), "batch") - exact(torch.cat([slow, fast]))).abs().amax(dim=1)
    assert error[-1] > 100 * TOLERANCE
    assert error[:-1].max() < TOLERANCE


def test_by_example_every_row_meets_the_tolerance(slow, fast):
    error = (solve(torch.cat([slow, fast]), "example") - exact(torch.cat([slow, fast]))).abs().amax(dim=1)
    assert error.max() < 10 * TOLERANCE


@pytest.mark.parametrize("mates", [1, 10, 999])
def test_by_example_a_row_does_not_depend_on_its_mates(slow, fast, mates):
    together = solve(torch.cat([slow[:mates], fast]), "example")
    alone = torch.cat([solve(slow[:1], "example"), solve(fast, "example")])
    assert (together[[0, -1]] - alone).abs().max() < 10 * TOLERANCE


@pytest.mark.parametrize("event", [(3,), (2, 3, 4)], ids=["rows", "images"])
def test_norms_are_root_mean_squares(event):
    x, log_det, integral = torch.randn(5, *event), torch.randn(5), torch.full((5,), 1e9)
    rows = x.flatten(1).square().mean(dim=1).sqrt()
    error = (x, log_det, integral)
    torch.testing.assert_close(example_error_norm(error), torch.maximum(rows, log_det.abs()).max())
    by_batch = torch.maximum(x.square().mean().sqrt(), log_det.square().mean().sqrt())
    torch.testing.assert_close(batch_error_norm(error), by_batch)
    torch.testing.assert_close(example_error_norm((x,)), rows.max())
