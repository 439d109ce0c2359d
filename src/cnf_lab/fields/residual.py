"""A residual network with Fourier time features as a vector field."""

import math

import torch
from torch import Tensor, nn

from cnf_lab.errors import ConfigError
from cnf_lab.fields.activations import Activation
from cnf_lab.fields.base import Time, VectorField, time_column
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


class ResidualBlock(nn.Module):
    """h + W2 a((1 + gate) (W1 a(h)) + shift), gate and shift from time and context."""

    def __init__(self, width: int, condition: int, activation: type[Activation]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        self.modulation = nn.Linear(condition, 2 * width)
        self.first, self.second = activation(), activation()

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """Add the block's change to h."""
        gate, shift = self.modulation(condition).chunk(2, dim=-1)
        return h + self.outer(self.second((1 + gate) * self.inner(self.first(h)) + shift))


class Residual(VectorField):
    r"""Residual blocks between a linear input and a linear output layer.

    Deeper than :class:`~cnf_lab.fields.Mlp` and without a closed-form divergence. The output
    layer starts at zero, so that the flow starts as the identity.

    Args:
        event_shape: Shape of one event, (D,).
        width: Width of the residual stream.
        blocks: Number of residual blocks.
        activation: Nonlinearity.
        frequencies: Number of Fourier frequencies of time.
        context_features: Size of the conditioning context; 0 for none.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        width: int,
        blocks: int,
        activation: type[Activation],
        frequencies: int = 8,
        context_features: int = 0,
    ) -> None:
        super().__init__(event_shape)
        if min(width, blocks, frequencies) < 1:
            raise ConfigError(
                "Expected architecture.width, .blocks and .frequencies of at least 1, "
                f"got {width}, {blocks}, {frequencies}. Type architecture.width=128 architecture.blocks=3."
            )
        features = event_shape[0]
        self.time = FourierTime(frequencies)
        condition = 2 * frequencies + context_features
        self.input, self.output = nn.Linear(features, width), nn.Linear(width, features)
        self.blocks = nn.ModuleList(ResidualBlock(width, condition, activation) for _ in range(blocks))
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (batch, D)."""
        condition = self.time(t)
        if context is not None:
            condition = torch.cat([condition.expand(len(context), -1), context], dim=-1)
        h = self.input(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.output(h)
