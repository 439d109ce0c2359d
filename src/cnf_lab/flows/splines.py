r"""Monotone rational-quadratic splines, inverted in closed form and fitted by quantiles.

References:
    Gregory & Delbourgo (1982), Piecewise rational quadratic interpolation to monotonic data.
    Durkan et al., Neural Spline Flows (2019), https://arxiv.org/abs/1906.04032, equations 4 to 8.
"""

import math
from collections.abc import Callable

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
    log_slope = 2 * s.log() + (d1 * xi.square() + 2 * s * mixed + d0 * (1 - xi).square()).log() - 2 * below.log()
    # xi is clamped: beyond the knots `inside` is the outer value and the slope is the outer one.
    beyond = (v - x0 - width).clamp(min=0) * d1 + (v - x0).clamp(max=0) * d0
    return inside + beyond, log_slope


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
    value = x0 + xi * width + beyond
    return value, -spline(value, x, y, slope)[1]


def fit_knots(
    columns: Float[Tensor, "rows columns"], quantile: Callable[[Tensor], Tensor], knots: int
) -> tuple[Float[Tensor, "columns knots"], Float[Tensor, "columns knots"]]:
    r"""Return the knots of a map that gives columns another distribution: quantiles against quantiles.

    Probabilities are those of equal steps of a standard normal: narrow at the tails, with at
    least ten rows beyond the outer knots. Repeated values would make a jump: knots keep a
    thousandth of the typical distance.

    Args:
        columns: Rows of the training split.
        quantile: Quantile function of the distribution wanted, of probabilities in (0, 1).
        knots: Number of knots.

    Returns:
        Increasing knots, and the values there.
    """
    rows = len(columns)
    tail = torch.tensor(1 - _LEAST_ROWS / max(rows, 4 * _LEAST_ROWS), dtype=torch.float64)
    outer = min(_WIDEST, float(torch.special.ndtri(tail)))
    probabilities = torch.special.ndtr(torch.linspace(-outer, outer, knots, dtype=torch.float64))
    ordered = columns.double().sort(dim=0).values
    # torch.quantile refuses more than 16 million numbers.
    position = probabilities * (rows - 1)
    low = position.floor().long().clamp(max=max(rows - 2, 0))
    x = torch.lerp(ordered[low], ordered[(low + 1).clamp(max=rows - 1)], (position - low)[:, None]).mT.contiguous()
    steps = x.diff(dim=1)
    typical = (steps.sum(dim=1, keepdim=True) / (knots - 1)).clamp(min=torch.finfo(torch.float64).tiny)
    x = torch.cat([x[:, :1], x[:, :1] + steps.clamp(min=1e-3 * typical).cumsum(dim=1)], dim=1)
    return x, quantile(probabilities).expand(len(x), -1).contiguous()


def knot_slopes(x: Float[Tensor, "columns knots"], y: Float[Tensor, "columns knots"]) -> Float[Tensor, "columns knots"]:
    """Return slopes at the knots: geometric means of the neighbours, as in Gregory & Delbourgo.

    Args:
        x: Increasing knots.
        y: Increasing values there.
    """
    width = x.diff(dim=1)
    s = (y.diff(dim=1) / width).log()
    share = width[:, 1:] / (width[:, 1:] + width[:, :-1])
    return torch.cat([s[:, :1], torch.lerp(s[:, 1:], s[:, :-1], share), s[:, -1:]], dim=1).exp()


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
