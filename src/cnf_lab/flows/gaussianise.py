r"""Fixed nonlinear layers that make training rows look normal: column by column, or by their norm.

They are fitted in closed form, before training, and their log-det is part of the density.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cnf_lab.errors import ConfigError, DataError
from cnf_lab.flows.preprocess import DoubleBuffers, Preprocess, check_variation
from cnf_lab.flows.splines import fit_knots, inverse_spline, log_chi_quantile, spline

_FEWEST, _MOST = 8, 256  # knots where their number is not given
_MOST_ROWS, _MOST_NUMBERS = 1_000_000, 200_000_000  # held to fit a layer: 0.8 GB in float32
_SMALLEST = torch.finfo(torch.float64).tiny


class _Splines(DoubleBuffers, Preprocess):
    """A layer that maps numbers by splines in float64, with a row of knots for each column."""

    def __init__(self, event_shape: tuple[int, ...], columns: int, knots: int | None) -> None:
        super().__init__(event_shape)
        if knots is not None and knots < 3:
            raise ConfigError(f"Expected knots of a preprocess layer of at least 3 or null, got {knots}. Type 64.")
        self.knots = knots
        self.x: Tensor
        self.y: Tensor
        self.slope: Tensor
        identity = torch.linspace(-1, 1, knots or _FEWEST, dtype=torch.float64).expand(columns, -1)
        self.register_buffer("x", identity.clone())
        self.register_buffer("y", identity.clone())
        self.register_buffer("slope", torch.ones_like(identity))

    def _fit(
        self,
        columns: Tensor,
        quantile: Callable[[Tensor], Tensor],
        adjust: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        # More knots than this follow the noise of the rows: likelihood of other rows falls again.
        count = self.knots or min(_MOST, max(_FEWEST, round(math.sqrt(len(columns)) / 3)))
        self.x, self.y, self.slope = fit_knots(columns, quantile, count, adjust)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The number of knots came from the rows.
        for name in ("x", "y", "slope"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.x.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Gaussianise(_Splines):
    r"""Every feature to a standard normal: :math:`y_i = s_i(x_i)` with monotone splines.

    :math:`\log|\det| = \sum_i \log s_i'(x_i)`. The knots lie at quantiles of the training rows, at
    equal steps of the normal; straight lines continue the splines, so that values never seen
    stay finite. Worth it where features are skewed or heavy-tailed by themselves.

    Args:
        event_shape: Shape of one event.
        knots: Knots of each spline; None takes a third of the root of the number of rows, 8 to 256.

    Raises:
        ConfigError: If there are fewer than three knots.
    """

    def __init__(self, event_shape: tuple[int, ...], knots: int | None = None) -> None:
        super().__init__(event_shape, torch.Size(event_shape).numel(), knots)

    def fit(self, batches: Iterable[Tensor]) -> None:
        r"""Set the splines from the training rows, from every second, fourth, ... where they are more than a million.

        Args:
            batches: Training rows, each batch (rows, \*event).

        Raises:
            DataError: If a feature is constant.
        """
        columns = _thinned(batch.flatten(1) for batch in batches)
        check_variation(columns.amax(dim=0) - columns.amin(dim=0), "features", "type preprocess=none")
        self._fit(columns, torch.special.ndtri)

    def to_latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normal scores in the flow's dtype."""
        value, log_slope = spline(x.flatten(1).to(self.x), self.x, self.y, self.slope)
        return value.to(self._anchor).reshape(x.shape), log_slope.sum(dim=1).to(self._anchor)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features in float64, whatever the flow's dtype."""
        value, log_slope = inverse_spline(z.flatten(1).to(self.x), self.x, self.y, self.slope)
        return value.reshape(z.shape), log_slope.sum(dim=1).to(self._anchor)


class RadialGaussianise(_Splines):
    r"""The norm of a row to that of a normal vector; its direction stays: :math:`y = x\, e^{s(l) - l}`.

    With :math:`l = \log\lVert x \rVert`, a monotone spline s, and D features

    .. math:: \log|\det| = D\,(s(l) - l) + \log s'(l).

    Data whose scale varies from row to row (patches of photographs with more or less contrast)
    are far from normal however they are whitened; after this layer they have about one scale.
    Rows must be centred and of like spread, so it comes after whitening.

    A strength below 1 maps to the weighted mean of the old and the new log-norm instead, and
    leaves the flow a part of the variation that tells it what kind of row it has.

    Args:
        event_shape: Shape of one event.
        knots: Knots of the spline; None takes a third of the root of the number of rows, 8 to 256.
        strength: Share in (0, 1] of the way to a normal vector's norm.

    Raises:
        ConfigError: If an option is out of range.

    References:
        Lyu & Simoncelli (2009), Nonlinear extraction of independent components of natural
        images using radial Gaussianization.
    """

    def __init__(self, event_shape: tuple[int, ...], knots: int | None = None, strength: float = 1.0) -> None:
        super().__init__(event_shape, 1, knots)
        if not 0 < strength <= 1:
            raise ConfigError(
                f"Expected preprocess.radial.strength above 0 and at most 1, got {strength}. "
                "Type preprocess.radial.strength=1.0."
            )
        self.strength = strength
        self._size = torch.Size(event_shape).numel()

    def fit(self, batches: Iterable[Tensor]) -> None:
        r"""Set the spline from the norms of the training rows.

        Args:
            batches: Training rows, each batch (rows, \*event).

        Raises:
            DataError: If all rows have the same norm.
        """
        norms = _thinned(_log_norm(batch) for batch in batches)
        if (norms == norms[0]).all():
            raise DataError("Expected rows of different norms, got one norm. Leave radial out of preprocess=[...].")
        self._fit(norms, lambda p: log_chi_quantile(p, self._size), self._softened)
        # Below the first knot y is a multiple of x: another power would have no slope at the origin.
        self.slope[:, 0] = 1.0

    def _softened(self, log_norm: Tensor, wanted: Tensor) -> Tensor:
        middle = len(log_norm) // 2
        return torch.lerp(log_norm - log_norm[middle] + wanted[middle], wanted, self.strength)

    def to_latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rescaled rows in the flow's dtype."""
        value, log_det = self._scaled(x, spline)
        return value.to(self._anchor), log_det

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows scaled back in float64, whatever the flow's dtype."""
        return self._scaled(z, inverse_spline)

    def _scaled(
        self, x: Tensor, of_log_norm: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        log_norm = _log_norm(x)
        mapped, log_slope = of_log_norm(log_norm, self.x, self.y, self.slope)
        change = mapped - log_norm  # (batch, 1)
        value = (x.flatten(1).double() * change.exp()).reshape(x.shape)
        return value, (self._size * change + log_slope).squeeze(1).to(self._anchor)


def _thinned(batches: Iterable[Tensor]) -> Tensor:
    """Return the rows of batches in one tensor, evenly spaced ones where they are too many to be held."""
    kept: list[Tensor] = []
    stride, seen = 1, 0
    for batch in batches:
        kept.append(batch[-seen % stride :: stride])
        seen += len(batch)
        most = min(_MOST_ROWS, _MOST_NUMBERS // max(batch[0].numel(), 1)) if len(batch) else _MOST_ROWS
        while sum(map(len, kept)) > most:
            kept, stride = [torch.cat(kept)[::2]], 2 * stride
    return torch.cat(kept)


def _log_norm(x: Tensor) -> Tensor:
    """Return the log of each row's norm (batch, 1) in float64; of a zero row, a very small number."""
    return x.flatten(1).double().norm(dim=1, keepdim=True).clamp(min=_SMALLEST).log()
