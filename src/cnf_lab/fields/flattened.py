"""A field of rows for images."""

from collections.abc import Callable

from torch import Tensor

from cnf_lab.fields.base import Time, VectorField


class Flattened(VectorField):
    """A field of rows on images as rows of pixels: what has a closed form keeps it.

    Args:
        event_shape: Shape of one event, (channels, height, width).
        field: Makes the field of rows from ``event_shape`` and ``context_features``.
        context_features: Size of the conditioning context; 0 for none.
    """

    event_dims = 3

    def __init__(
        self, event_shape: tuple[int, ...], field: Callable[..., VectorField], context_features: int = 0
    ) -> None:
        super().__init__(event_shape)
        size = event_shape[0] * event_shape[1] * event_shape[2]
        self.field = field(event_shape=(size,), context_features=context_features)
        self.unit_time, self.forward_mode = self.field.unit_time, self.field.forward_mode

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
