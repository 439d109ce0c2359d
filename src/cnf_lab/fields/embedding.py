r"""Features of time for fields that learn what to do with it."""

import math

import torch
from torch import Tensor, nn

from cnf_lab.fields.base import Time, time_column
from cnf_lab.shapes import Float


class FourierTime(nn.Module):
    r"""Time features :math:`[\cos(\pi k t), \sin(\pi k t)]`, k = 1..K.

    Args:
        frequencies: Number K of frequencies.
    """

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.rates: Tensor
        self.register_buffer("rates", math.pi * torch.arange(1, frequencies + 1), persistent=False)

    def forward(self, t: Time) -> Float[Tensor, "rows features"]:
        """Return the features, (1, 2K) for a scalar time, (batch, 2K) otherwise."""
        angle = time_column(t) * self.rates.to(t.dtype)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """A learned embedding of time: t and its Fourier features through two layers.

    Args:
        width: Size of the embedding.
        frequencies: Number of Fourier frequencies.
    """

    def __init__(self, width: int, frequencies: int = 8) -> None:
        super().__init__()
        self.fourier = FourierTime(frequencies)
        self.network = nn.Sequential(
            nn.Linear(1 + 2 * frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, t: Time) -> Float[Tensor, "rows width"]:
        """Return the embedding, (1, width) for a scalar time, (batch, width) otherwise."""
        return self.network(torch.cat([time_column(t), self.fourier(t)], dim=-1))
