"""Base distributions, at the latent end."""

import math

import torch
from torch import Tensor, nn

from cnf_lab.shapes import Float


class StandardNormal(nn.Module):
    """The standard normal density, with nothing to learn.

    Args:
        event_shape: Shape of one event.
    """

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        # Tells samples their device and dtype.
        self._anchor: Tensor
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)

    def log_prob(self, z: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        """Return log N(z; 0, I) in nats."""
        dimension = math.prod(self.event_shape)
        return -0.5 * (z.flatten(1).square().sum(dim=1) + dimension * math.log(2 * math.pi))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n *event"]:
        """Draw n latent rows."""
        anchor = self._anchor
        return torch.randn((n, *self.event_shape), generator=generator, dtype=anchor.dtype, device=anchor.device)
