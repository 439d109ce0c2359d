r"""Error budgets: how far a reported mean may be from what it stands for, source by source.

A mean of n rows has these errors; each is told as the half-width of an interval that holds the truth with
probability :data:`CONFIDENCE`.

* ``rows``: the rows are a finite sample of the data. By Student's t from the spread of the rows, which holds the
  noise of their probes and draws as well.
* ``probes``: the divergence is estimated. From the spread of each row's probes.
* ``draws``: of dequantisation noise, or of a posterior. From the spread of each row's draws, or of two draws of the
  rows that are checked.
* ``solver``: the solve has a tolerance, and arithmetic rounds. Not by chance, so that it does not average out: a
  bound, out of the changes that a solve at a hundredth of the tolerance in float64 makes to the rows that are checked.

What the number owes to its computation alone, for these very rows, is

.. math:: \sqrt{\text{probes}^2 + \text{draws}^2} + \text{solver},

and its error as an estimate for the data's distribution is rows + solver.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student
from torch import Tensor

from cnf_lab.training.likelihoods import error_of_mean, mean_with_error

#: Probability with which an interval holds the truth. Not 0.95: of 100 trials at least 95 shall hold it.
CONFIDENCE = 0.99
#: A solve at a hundredth of the tolerance is itself wrong, by at most a tenth of the change that it makes.
RESOLVED = 1 / (1 - 0.1)
SOURCES = ("rows", "probes", "draws", "solver")


@dataclass(frozen=True)
class Budget:
    """A number with its errors.

    Attributes:
        value: The number.
        unit: Its unit.
        sources: Half-width by source; None where a source exists but is not known.
    """

    value: float
    unit: str
    sources: dict[str, float | None]

    @property
    def half_width(self) -> float | None:
        """Half-width of the interval for the data's distribution; None where a part of it is not known."""
        return _sum(self.sources.get("rows"), self.sources.get("solver", 0.0))

    @property
    def computation(self) -> float | None:
        """Half-width of the interval for these rows; None where a part of it is not known."""
        probes, draws = self.sources.get("probes", 0.0), self.sources.get("draws", 0.0)
        random = None if probes is None or draws is None else math.hypot(probes, draws)
        return _sum(random, self.sources.get("solver", 0.0))

    def scaled(self, factor: float, unit: str) -> "Budget":
        """Return the same in another unit.

        Args:
            factor: One of this unit in the other.
            unit: The other.
        """
        sources = {name: None if width is None else factor * width for name, width in self.sources.items()}
        return Budget(factor * self.value, unit, sources)

    def described(self) -> dict[str, Any]:
        """Return plain values for a file."""
        return {
            "value": self.value,
            "unit": self.unit,
            "half_width": self.half_width,
            "computation": self.computation,
            "confidence": CONFIDENCE,
            "sources": self.sources,
        }


def budget(values: Tensor, unit: str, others: Mapping[str, float | None]) -> Budget:
    """Return the budget of a mean of rows.

    Args:
        values: The rows' values (rows,).
        unit: Their unit.
        others: Half-widths of the other sources.
    """
    mean, error = mean_with_error(values)
    rows = quantile(len(values) - 1) * error if len(values) > 1 else None
    return Budget(mean, unit, {"rows": rows, **others})


def of_errors(errors: Tensor, freedom: int) -> float | None:
    """Return the half-width of a mean of rows whose standard errors are known.

    Args:
        errors: Standard error of each row (rows,).
        freedom: Degrees of freedom of each of them; with none the half-width is not known.
    """
    return quantile(freedom * len(errors)) * error_of_mean(errors) if freedom > 0 else None


def of_some(changes: Tensor, rows: int) -> float | None:
    """Return the half-width of a mean of rows, each with an error of mean zero, from such errors of a few of them.

    Args:
        changes: The errors of a few rows (checked,).
        rows: Number of rows of the mean.
    """
    if not len(changes):
        return None
    return quantile(len(changes)) * float(changes.square().mean().sqrt()) / math.sqrt(rows)


def of_draws(values: Tensor, pairs: Tensor | None) -> float | None:
    """Return what the draws leave open of a mean of rows and of their draws.

    Args:
        values: Values of each draw and row (draws, rows).
        pairs: Two draws of some rows (2, checked), for a mean of single draws; None where nothing is checked.
    """
    draws, rows = values.shape
    if draws > 1:
        return of_errors(values.std(dim=0) / math.sqrt(draws), draws - 1)
    return None if pairs is None else of_some((pairs[0] - pairs[1]) / math.sqrt(2), rows)


def of_solver(changes: Tensor, rows: int) -> float | None:
    r"""Return a bound of the solver's error of a mean.

    .. math:: \tfrac{1}{1 - 0.1}\left(|\bar d| + t_{m-1}\, s_d \sqrt{1/m - 1/n}\right)

    for the changes d of m of n rows: they stand for the others, whose mean may differ by chance.

    Args:
        changes: What a much tighter solve changes of each row (checked,).
        rows: Number of rows of the mean.
    """
    checked = len(changes)
    if checked < min(2, rows):
        return None
    left = max(0.0, 1 / checked - 1 / rows)
    spread = quantile(checked - 1) * float(changes.std()) * math.sqrt(left) if left else 0.0
    return RESOLVED * (abs(float(changes.mean())) + spread)


def of_weights(sample_size: Tensor, draws: int) -> float | None:
    r"""Return what K draws leave open of a mean of importance-weighted bounds.

    By the delta method the variance of :math:`\log \frac1K \sum_k w_k` is :math:`(K / S - 1) / (K - 1)` for an
    effective sample size :math:`S = (\sum_k w_k)^2 / \sum_k w_k^2`. Where S is a few draws only, it is a rough guess.

    Args:
        sample_size: S of each row (rows,).
        draws: K.
    """
    if draws < 2:
        return None
    return of_errors(((draws / sample_size - 1) / (draws - 1)).clamp(min=0).sqrt(), draws - 1)


def quantile(freedom: int | float) -> float:
    """Return the two-sided quantile of Student's t at :data:`CONFIDENCE`."""
    return float(student.ppf(0.5 + CONFIDENCE / 2, freedom))


def sample_size(log_weight: Tensor) -> Tensor:
    r"""Return effective numbers of draws, :math:`(\sum_k w_k)^2 / \sum_k w_k^2`.

    Args:
        log_weight: Logarithms of weights (draws, rows).
    """
    return (2 * log_weight.logsumexp(dim=0) - (2 * log_weight).logsumexp(dim=0)).exp()


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def largest_source(found: Budget) -> str:
    """Return the source that most of a budget comes from."""
    known = {name: width for name, width in found.sources.items() if width is not None}
    return max(known, key=lambda name: known[name])
