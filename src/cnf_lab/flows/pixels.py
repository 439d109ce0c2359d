r"""Fixed layers between dequantised pixels in [0, L) and the real line."""

import math
from collections.abc import Iterable

from torch import Tensor
from torch.nn import functional as F

from cnf_lab.errors import ConfigError
from cnf_lab.flows.preprocess import Preprocess


class Logit(Preprocess):
    r"""The logit of a pixel's share of the levels, kept from 0 and 1 by α.

    .. math:: z = \log\frac{s}{1 - s}, \qquad s = \alpha + (1 - 2\alpha)\frac{y}{L}.

    It is computed in float64: with a small α the shares next to 1 lose their digits in float32.

    Args:
        event_shape: Shape of one event.
        alpha: α, in (0, 0.5).
        levels: Number L of values of a pixel.

    Raises:
        ConfigError: If α is out of range.

    References:
        Dinh et al., Density estimation using Real NVP (2017), section 4.1, https://arxiv.org/abs/1605.08803.
    """

    def __init__(self, event_shape: tuple[int, ...], alpha: float, levels: int) -> None:
        super().__init__(event_shape)
        if not 0 < alpha < 0.5:
            raise ConfigError(
                f"Expected preprocess.logit.alpha between 0 and 0.5, got {alpha}. Type preprocess.logit.alpha=1e-6, "
                "or preprocess=centre to go without a logit."
            )
        self.alpha, self.levels = alpha, levels

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Do nothing."""

    def to_latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits."""
        z = (self.alpha + (1 - 2 * self.alpha) * x.double() / self.levels).logit()
        return z.to(self._anchor), self._log_det(z)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return pixels in float64; logits beyond those of 0 and L leave the interval a little."""
        y = (z.double().sigmoid() - self.alpha) / (1 - 2 * self.alpha) * self.levels
        return y, -self._log_det(z.double())

    def _log_det(self, z: Tensor) -> Tensor:
        # d logit / ds = 1 / (s (1 - s)), with log s = log σ(z) and log (1 - s) = log σ(-z).
        constant = math.log((1 - 2 * self.alpha) / self.levels)
        return (constant - F.logsigmoid(z) - F.logsigmoid(-z)).flatten(1).sum(dim=1).to(self._anchor)


class Centre(Preprocess):
    r"""A pixel's share of the levels, centred: :math:`z = y / L - \tfrac12`.

    Args:
        event_shape: Shape of one event.
        levels: Number L of values of a pixel.
    """

    def __init__(self, event_shape: tuple[int, ...], levels: int) -> None:
        super().__init__(event_shape)
        self.levels = levels

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Do nothing."""

    def to_latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the centred shares."""
        return x.to(self._anchor) / self.levels - 0.5, self._log_det(-1.0).expand(len(x))

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return pixels."""
        return (z + 0.5) * self.levels, self._log_det(1.0).expand(len(z))

    def _log_det(self, sign: float) -> Tensor:
        return self._anchor + sign * math.prod(self.event_shape) * math.log(self.levels)
