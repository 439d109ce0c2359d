"""Perceptrons on images as rows of pixels."""

import math
from collections.abc import Sequence

from torch import Tensor

from cnf_lab.fields.activations import Activation
from cnf_lab.fields.base import Time, VectorField
from cnf_lab.fields.branches import Branches
from cnf_lab.fields.layers import TimeLinear


class Flattened(VectorField):
    """The sum of perceptrons on images as rows of pixels; with one or two hidden layers its divergence is closed.

    Args:
        event_shape: Shape of one event, (channels, height, width).
        hidden: Widths of the hidden layers of each branch.
        branches: Number of branches.
        layer: Kind of time-conditioned layer.
        activation: Nonlinearity between the layers.
        context_features: Size of the conditioning context; 0 for none.
        zero_start: Whether the last layers start at zero, and the flow as the identity.

    Raises:
        ConfigError: If there is no branch or no hidden layer, or the data are not images.
    """

    event_dims = 3

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        branches: int,
        layer: type[TimeLinear],
        activation: type[Activation],
        context_features: int = 0,
        zero_start: bool = False,
    ) -> None:
        super().__init__(event_shape)
        row = (math.prod(event_shape),)
        self.field = Branches(row, hidden, branches, layer, activation, context_features, zero_start)
        self.unit_time = self.field.unit_time

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (batch, channels, height, width)."""
        return self.field(t, x.flatten(1), context).reshape(x.shape)

    @property
    def has_closed_form(self) -> bool:
        """As the field of rows."""
        return self.field.has_closed_form

    def value_and_divergence(
        self, t: Time, x: Tensor, context: Tensor | None = None, tangents: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return dx/dt, its exact divergence, and Jacobian-vector products; t is a scalar."""
        rows = None if tangents is None else tangents.flatten(2)
        value, div, products = self.field.value_and_divergence(t, x.flatten(1), context, rows)
        return value.reshape(x.shape), div, None if products is None else products.unflatten(2, x.shape[1:])

    def value_and_partial_divergence(
        self, t: Time, x: Tensor, start: int, stop: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and the divergence over some pixels."""
        value, div = self.field.value_and_partial_divergence(t, x.flatten(1), start, stop, context)
        return value.reshape(x.shape), div

    def value_and_jvp(
        self, t: Time, x: Tensor, tangents: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and Jacobian-vector products as the field of rows does."""
        value, products = self.field.value_and_jvp(t, x.flatten(1), tangents.flatten(2), context)
        return value.reshape(x.shape), products.unflatten(2, x.shape[1:])
