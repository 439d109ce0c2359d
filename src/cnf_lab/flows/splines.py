r"""Monotone rational-quadratic splines, inverted in closed form and fitted by quantiles.

References:
    Gregory & Delbourgo (1982), Piecewise rational quadratic interpolation to monotonic data.
    Durkan et al., Neural Spline Flows (2019), https://arxiv.org/abs/1906.04032, equations 4 to 8.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cnf_lab.shapes import Float

_LEAST_ROWS = 10  # beyond each outer knot: fewer would make the tails' slopes noise
_WIDEST = 3.3  # standard deviations of the outer knots, however many rows there are


def spline(
    v: Float[Tensor, "batch columns"],
    x: Float[Tensor, "columns knots"],
    y: Float[Tensor, "columns knots"],
    slope: Float[Tensor, "columns knots"],
) -> tuple[Float[Tensor, "batch columns"], Float[Tensor, "batch columns"]]:
    r"""Evaluate a spline in every column; straight lines continue it beyond the outer knots.

    With :math:`s = \Delta y / \Delta x` and :math:`\xi = (v - x_k) / \Delta x` in bin k,

    .. math:: y = y_k + \Delta y \frac{s \xi^2 + d_k \xi (1 - \xi)}{s + (d_{k+1} + d_k - 2 s) \xi (1 - \xi)}.

    Args:
        v: Where to evaluate.
        x: Increasing knots.
        y: Increasing values at the knots.
        slope: Positive slopes d at the knots.

    Returns:
        The values and the log of the slopes there.
    """
    x0, width, y0, height, d0, d1 = _bins(v, x, x, y, slope)
    s, xi = height / width, ((v - x0) / width).clamp(0, 1)
    mixed = xi * (1 - xi)
    below = s + (d0 + d1 - 2 * s) * mixed
    inside = y0 + height * (s * xi.square() + d0 * mixed) / below
    # xi is clamped: beyond the knots `inside` is the outer value and the slope is the outer one.
    beyond = (v - x0 - width).clamp(min=0) * d1 + (v - x0).clamp(max=0) * d0
    return inside + beyond, _log_slope(xi, s, d0, d1)


def inverse_spline(
    v: Float[Tensor, "batch columns"],
    x: Float[Tensor, "columns knots"],
    y: Float[Tensor, "columns knots"],
    slope: Float[Tensor, "columns knots"],
) -> tuple[Float[Tensor, "batch columns"], Float[Tensor, "batch columns"]]:
    """Evaluate the inverse of :func:`spline`.

    Args:
        v: Where to evaluate.
        x: Increasing knots.
        y: Increasing values at the knots.
        slope: Positive slopes at the knots.

    Returns:
        The values and the log of the inverse's slopes there.
    """
    x0, width, y0, height, d0, d1 = _bins(v, y, x, y, slope)
    s = height / width
    rise = (v - y0).clamp(min=v.new_zeros(()), max=height)
    # A quadratic in xi; the root is written so that nothing cancels where a is small.
    bend = d0 + d1 - 2 * s
    a, b, c = height * (s - d0) + rise * bend, height * d0 - rise * bend, -s * rise
    xi = 2 * c / (-b - (b.square() - 4 * a * c).clamp(min=0).sqrt())
    beyond = (v - y0 - height).clamp(min=0) / d1 + (v - y0).clamp(max=0) / d0
    return x0 + xi * width + beyond, -_log_slope(xi, s, d0, d1)


def _log_slope(xi: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    mixed = xi * (1 - xi)
    below = s + (d0 + d1 - 2 * s) * mixed
    return 2 * s.log() + (d1 * xi.square() + 2 * s * mixed + d0 * (1 - xi).square()).log() - 2 * below.log()


class Knots(NamedTuple):
    """The knots of splines, a row of them for each column.

    Attributes:
        x: Increasing knots (columns, knots).
        y: Increasing values there.
        slope: Positive slopes there.
    """

    x: Tensor
    y: Tensor
    slope: Tensor


def fit_knots(
    columns: Float[Tensor, "rows columns"],
    quantile: Callable[[Tensor], Tensor],
    knots: int,
    adjust: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Knots:
    r"""Fit maps that give columns another distribution: quantiles of the rows to its quantiles.

    Probabilities are those of equal steps of a standard normal: narrow at the tails, with at
    least ten rows beyond the outer knots. What repeated values would make of it, a jump, is
    avoided: knots that fall together are one, in the middle of their probabilities, and beyond
    the outer ones no line is steeper than the way to the extreme rows.

    Args:
        columns: Rows of the training split, no column constant.
        quantile: Quantile function of the distribution wanted, of probabilities in (0, 1).
        knots: Number of knots.
        adjust: Changes the values at the knots (knots,), given both; None leaves them.
    """
    # Column by column: in float64, and with the places that a sort returns, all of an image set's would not fit.
    fits = [_fit_column(column.double().sort().values, quantile, knots, adjust) for column in columns.unbind(dim=1)]
    return Knots(*(torch.stack(parts) for parts in zip(*fits, strict=True)))


def _fit_column(
    ordered: Tensor,
    quantile: Callable[[Tensor], Tensor],
    knots: int,
    adjust: Callable[[Tensor, Tensor], Tensor] | None,
) -> Knots:
    rows = len(ordered)
    tail = torch.tensor(1 - _LEAST_ROWS / max(rows, 4 * _LEAST_ROWS), dtype=torch.float64)
    outer = min(_WIDEST, float(torch.special.ndtri(tail)))
    p = torch.special.ndtr(torch.linspace(-outer, outer, knots, dtype=torch.float64))
    # torch.quantile refuses more than 16 million numbers.
    position = p * (rows - 1)
    low = position.floor().long().clamp(max=rows - 2)
    x = torch.lerp(ordered[low], ordered[low + 1], position - low)
    x, p = _merged(x, p, max(1e-3 * (x[-1] - x[0]) / (knots - 1), 1e-9 * (ordered[-1] - ordered[0])))
    if len(x) == 1:  # nearly all rows are equal: a straight line by mean and spread
        p = torch.special.ndtr(torch.tensor([-1.0, 1.0], dtype=torch.float64))
        x = ordered.mean() + ordered.std() * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    # With the extreme rows at both ends, to see how steep the tails are.
    p = torch.cat([p.new_tensor([0.5 / rows]), p, p.new_tensor([1 - 0.5 / rows])])
    around = torch.cat([ordered[:1], x, ordered[-1:]])
    y = quantile(p) if adjust is None else adjust(around, quantile(p))
    inner = y[1:-1]
    slope, usual = _slopes(x, inner), (inner[-1] - inner[0]) / (x[-1] - x[0])
    for end in (0, -1):
        away, rise = (around[end] - x[end]).abs(), (y[end] - inner[end]).abs()
        further = away > 1e-3 * (x[-1] - x[0]) / len(x)
        slope[end] = torch.minimum(slope[end], rise / away if further else usual)
    return _padded(Knots(x, inner, slope), knots)


def _merged(x: Tensor, p: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means of knots and probabilities over each group of knots that are no further apart than that."""
    group, start = [], 0
    for k in range(len(x)):
        if x[k] - x[start] > least:
            start = k
        group.append(start)
    _, number, counts = torch.unique_consecutive(torch.tensor(group), return_inverse=True, return_counts=True)
    zeros = x.new_zeros(len(counts))
    return zeros.index_add(0, number, x) / counts, zeros.index_add(0, number, p) / counts


def _slopes(x: Tensor, y: Tensor) -> Tensor:
    """Return slopes at the knots: geometric means of the neighbours, as in Gregory & Delbourgo."""
    width = x.diff()
    s = (y.diff() / width).log()
    share = width[1:] / (width[1:] + width[:-1])
    return torch.cat([s[:1], torch.lerp(s[1:], s[:-1], share), s[-1:]]).exp()


def _padded(few: Knots, knots: int) -> Knots:
    """Return the same map with more knots, which lie on its upper straight line."""
    x, y, slope = few
    more = torch.arange(1, knots - len(x) + 1, dtype=torch.float64) * (x[-1] - x[-2])
    return Knots(
        torch.cat([x, x[-1] + more]),
        torch.cat([y, y[-1] + slope[-1] * more]),
        torch.cat([slope, slope[-1].expand(len(more))]),
    )


def log_chi_quantile(probabilities: Tensor, degrees: int) -> Tensor:
    """Return quantiles of the log of the norm of a standard normal vector.

    Args:
        probabilities: In (0, 1).
        degrees: Size of the vector.
    """
    from scipy.special import gammaincinv

    squared = torch.as_tensor(gammaincinv(degrees / 2, probabilities.double().cpu().numpy()))
    return 0.5 * (squared.log() + math.log(2))


def _bins(v: Tensor, edges: Tensor, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
    """Return x, width, y, height and both slopes of the bin of each entry, the outer bins beyond the knots."""
    index = torch.searchsorted(edges[:, 1:-1].contiguous(), v.mT.contiguous())  # (columns, batch)

    def pick(of: Tensor) -> Tensor:
        return of.gather(1, index).mT

    return (
        pick(x[:, :-1]),
        pick(x.diff(dim=1)),
        pick(y[:, :-1]),
        pick(y.diff(dim=1)),
        pick(slope[:, :-1]),
        pick(slope[:, 1:]),
    )
