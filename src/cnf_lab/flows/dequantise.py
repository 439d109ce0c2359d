r"""From pixels to a density: what is added to whole numbers so that they have one.

A pixel of value :math:`v \in \{0, \dots, L - 1\}` stands for the interval [v, v + 1). With a density
p of images y = x + u the probability of an image is bounded by

.. math:: \log P(x) = \log \int_{[0, 1)^D} p(x + u)\,du
          \ge E_{q(u \mid x)}\left[\log p(x + u) - \log q(u \mid x)\right],

so that the flow's data space is [0, L)^D and its log-density needs no further constant.

References:
    Theis, van den Oord & Bethge, A note on the evaluation of generative models (2016),
    https://arxiv.org/abs/1511.01844.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnf_lab.errors import ConfigError
from cnf_lab.shapes import Float


class Dequantiser(nn.Module, ABC):
    """A way to draw what is added to pixels.

    Args:
        event_shape: Shape of one image, (channels, height, width).
        levels: Number L of values of a pixel.

    Raises:
        ConfigError: If there are fewer than two levels.
    """

    def __init__(self, event_shape: tuple[int, ...], levels: int) -> None:
        super().__init__()
        if levels < 2:
            raise ConfigError(f"Expected recipe.levels of at least 2, got {levels}. Type recipe.levels=256.")
        self.event_shape, self.levels = tuple(event_shape), levels
        # The dtype that the flow works in, whatever the pixels'; follows flow.double().
        self._anchor: Tensor
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)

    @abstractmethod
    def forward(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, " batch"]]:
        r"""Return x + u and log q(u | x) in nats.

        Args:
            x: Pixels, whole numbers in 0..L-1 (batch, \*event).
            generator: Source of u.
        """

    def _uniform(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        # Drawn in float32 whatever the flow's dtype, so that a check in float64 meets the same noise.
        return torch.rand(x.shape, generator=generator, device=self._anchor.device).to(self._anchor)


class UniformDequantiser(Dequantiser):
    """u uniform on [0, 1): the plainest bound, and the one to compare numbers by."""

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return x + u and zeros."""
        y = x.to(self._anchor) + self._uniform(x, generator)
        return y, y.new_zeros(len(y))


class VariationalDequantiser(Dequantiser):
    r"""u from a learned density of each pixel given the image, trained with the flow by its bound.

    .. math:: u = \sigma\big(m(x) + e^{s(x)} \ell\big), \qquad \ell \sim \mathrm{Logistic}(0, 1),

    with m and s from a convolutional network of x. The network's last layer starts at zero, and
    u as uniform exactly: for m = 0, s = 0 it is the logistic's distribution function of ℓ. Pixels
    are independent given x; flows over u (Flow++) are more flexible and cost a solve.

    Args:
        event_shape: Shape of one image, (channels, height, width).
        levels: Number L of values of a pixel.
        width: Channels of the network's two hidden layers.

    References:
        Ho et al., Flow++ (2019), section 3.1, https://arxiv.org/abs/1902.00275.
    """

    def __init__(self, event_shape: tuple[int, ...], levels: int, width: int = 32) -> None:
        super().__init__(event_shape, levels)
        channels = event_shape[0]
        last = nn.Conv2d(width, 2 * channels, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.network = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), last
        )

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return x + u and log q(u | x)."""
        x = x.to(self._anchor)
        shift, log_scale = self.network(2 * x / (self.levels - 1) - 1).to(x).chunk(2, dim=1)
        # Neither end: the logistic's quantiles there are infinite.
        epsilon = torch.finfo(x.dtype).eps
        noise = self._uniform(x, generator).clamp(epsilon, 1 - epsilon).logit()
        v = shift + log_scale.exp() * noise
        # log q(u | x) = log p(ℓ) - s - log σ'(v), with log σ'(v) = log σ(v) + log σ(-v) = log p(v).
        log_q = _log_logistic(noise) - log_scale - _log_logistic(v)
        return x + v.sigmoid(), log_q.flatten(1).sum(dim=1)


def _log_logistic(v: Tensor) -> Tensor:
    return F.logsigmoid(v) + F.logsigmoid(-v)
