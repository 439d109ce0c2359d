r"""Error budgets: how far a reported mean may be from what it stands for, source by source.

A mean of n rows has these errors; each is told as the half-width of an interval that holds the truth with
probability :data:`CONFIDENCE`.

* ``rows``: the rows are a finite sample of the data. By Student's t from the spread of the rows, which holds the
  noise of their probes and draws as well.
* ``probes``: the divergence is estimated. From the spread of each row's probes.
* ``draws``: of dequantisation noise, or of a posterior. From the spread of each row's draws, less what their probes
  explain, or of two draws of the rows that are checked.
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

from scipy.stats import norm
from scipy.stats import t as student
from torch import Tensor

from cnf_lab.training.likelihoods import error_of_mean, mean_with_error

#: Probability with which an interval holds the truth. Not 0.95: of 100 trials at least 95 shall hold it.
CONFIDENCE = 0.99
#: Of the size of the changes, what the tighter solve itself may be wrong by, and what other batches, which take steps
#: of their own, may differ by.
MARGIN = 0.25
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
    r"""Return the half-width of a mean of rows whose standard errors are known.

    Rows differ in their noise: together they have :math:`\nu (\sum_i s_i^2)^2 / \sum_i s_i^4` degrees of freedom
    (Satterthwaite), fewer than in equal rows.

    Args:
        errors: Standard error of each row (rows,).
        freedom: Degrees of freedom ν of each of them; with none the half-width is not known.
    """
    squares = errors.square()
    if freedom < 1 or not bool(squares.sum() > 0):
        return None if freedom < 1 else 0.0
    together = freedom * float(squares.sum() ** 2 / squares.square().sum())
    return quantile(together) * error_of_mean(errors)


def of_some(changes: Tensor, rows: int) -> float | None:
    """Return the half-width of a mean of rows, each with an error of mean zero, from such errors of a few of them.

    The mean square of a few may be too small by chance: the upper end of its own interval counts.

    Args:
        changes: The errors of a few rows (checked,).
        rows: Number of rows of the mean.
    """
    checked = len(changes)
    if checked < 2:
        return None
    squares = changes.square()
    upper = float(squares.mean()) + quantile(checked - 1) * float(squares.std()) / math.sqrt(checked)
    return quantile(math.inf) * math.sqrt(upper / rows)


def of_draws(values: Tensor, pairs: Tensor | None) -> float | None:
    """Return what the draws leave open of a mean of rows and of their draws, with the probes of each.

    Args:
        values: Values of each draw and row (draws, rows).
        pairs: Two draws of some rows (2, checked), for a mean of single draws; None where nothing is checked.
    """
    draws, rows = values.shape
    if draws > 1:
        return of_errors(values.std(dim=0) / math.sqrt(draws), draws - 1)
    return None if pairs is None else of_some((pairs[0] - pairs[1]) / math.sqrt(2), rows)


def less(draws: float | None, probes: float | None) -> float | None:
    """Return what draws leave open beyond their probes, which are drawn anew with each.

    Args:
        draws: Half-width of both.
        probes: Half-width of the probes.
    """
    return None if draws is None or probes is None else math.sqrt(max(0.0, draws**2 - probes**2))


def of_solver(changes: Tensor, rows: int) -> float | None:
    r"""Return a bound of the solver's error of a mean.

    .. math:: |\bar d| + \tfrac14 \overline{|d|} + t_{m-1}\, s_d \sqrt{1/m - 1/n}

    for the changes d of m of n rows: they stand for the others, whose mean may differ by chance and by the steps of
    their batch, and the tighter solve is not without an error either.

    Args:
        changes: What a much tighter solve changes of each row (checked,).
        rows: Number of rows of the mean.
    """
    checked = len(changes)
    if checked < min(2, rows):
        return None
    left = max(0.0, 1 / checked - 1 / rows)
    spread = quantile(checked - 1) * float(changes.std()) * math.sqrt(left) if left else 0.0
    return abs(float(changes.mean())) + MARGIN * float(changes.abs().mean()) + spread


def quantile(freedom: int | float) -> float:
    """Return the two-sided quantile of Student's t at :data:`CONFIDENCE`, of the normal with infinite freedom."""
    return float((student(freedom) if freedom < math.inf else norm()).ppf(0.5 + CONFIDENCE / 2))


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def largest_source(found: Budget) -> str:
    """Return the source that most of a budget comes from; rows count without the probes and draws in them."""
    known = {name: width for name, width in found.sources.items() if width is not None}
    if "rows" in known:
        noise = known.get("probes", 0.0) ** 2 + known.get("draws", 0.0) ** 2
        known["rows"] = math.sqrt(max(0.0, known["rows"] ** 2 - noise))
    return max(known, key=lambda name: known[name])
