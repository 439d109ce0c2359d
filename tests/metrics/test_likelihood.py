"""Means over a data set are exact sums and counts, however the rows are divided."""

import numpy as np
import pytest
import torch

from cnf_lab.metrics import ErrorOfMean, MeanWithError


@pytest.mark.parametrize("cuts", [[7], [1, 6], [3, 3, 1]])
def test_mean_and_error_do_not_depend_on_batches(cuts: list[int]) -> None:
    values = torch.randn(7, dtype=torch.float64) + 100
    metric = MeanWithError()
    for part in values.split(cuts):
        metric.update(part)
    mean, error = metric.compute()
    assert float(mean) == pytest.approx(values.numpy().mean(), rel=1e-14)
    assert float(error) == pytest.approx(values.numpy().std(ddof=1) / np.sqrt(7), rel=1e-9)


def test_shares_of_two_processes_add_up() -> None:
    """What a process holds are sums: reducing them by addition gives the whole set's mean."""
    values = torch.randn(11)
    whole, shares = MeanWithError(), (MeanWithError(), MeanWithError())
    whole.update(values)
    for rank, share in enumerate(shares):
        share.update(values[rank::2])
    joined = MeanWithError()
    for name in ("count", "total", "squares"):
        assert joined._reductions[name].__name__ == "dim_zero_sum"
        setattr(joined, name, sum(getattr(share, name) for share in shares))
    joined._update_count = 1
    torch.testing.assert_close(joined.compute(), whole.compute())


def test_single_value_has_no_finite_error() -> None:
    metric = MeanWithError()
    metric.update(torch.tensor([2.0]))
    mean, error = metric.compute()
    assert float(mean) == 2
    assert not np.isfinite(float(error))


def test_error_of_a_mean_of_estimates_is_what_repeated_means_show() -> None:
    """Rows whose errors differ, estimated a thousand times: the spread of the mean is the error reported."""
    errors = torch.linspace(0.1, 3.0, 40, dtype=torch.float64)
    means = (errors * torch.randn(4000, 40, dtype=torch.float64)).mean(dim=1)
    metric = ErrorOfMean()
    for part in errors.split(7):
        metric.update(part)
    assert float(metric.compute()) == pytest.approx(float(means.std()), rel=0.05)
