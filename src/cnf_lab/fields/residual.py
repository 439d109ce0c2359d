"""A residual network with a learned embedding of time as a vector field."""

import torch
from torch import Tensor, nn

from cnf_lab.errors import ConfigError
from cnf_lab.fields.activations import Activation
from cnf_lab.fields.base import Time, VectorField
from cnf_lab.fields.embedding import TimeEmbedding


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
        embedding: Size of the embedding of time.
        context_features: Size of the conditioning context; 0 for none.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        width: int,
        blocks: int,
        activation: type[Activation],
        embedding: int = 64,
        context_features: int = 0,
    ) -> None:
        super().__init__(event_shape)
        if min(width, blocks, embedding) < 1:
            raise ConfigError(
                "Expected architecture.width, .blocks and .embedding of at least 1, "
                f"got {width}, {blocks}, {embedding}. Type architecture.width=128 architecture.blocks=4."
            )
        features = event_shape[0]
        self.time = TimeEmbedding(embedding)
        condition = embedding + context_features
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
