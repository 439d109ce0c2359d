"""The seam of all vector fields, and forward-mode differentiation of any of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cnf_lab.errors import ConfigError
from cnf_lab.shapes import Float

Time = Float[Tensor, ""] | Float[Tensor, " batch"]


class VectorField(nn.Module, ABC):
    r"""A vector field :math:`f(t, x, c) = dx/dt`.

    t = 0 is data, t = T is latent. The time is a scalar during a solve and may have one entry
    per example elsewhere. A field never looks at other rows of the batch.

    Args:
        event_shape: Shape of one event.
    """

    #: Number of axes of the events that this field takes: 1 for rows, 3 for images.
    event_dims: int = 1
    #: Whether the field is defined only for times in [0, 1].
    unit_time: bool = False

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(event_shape) != self.event_dims:
            raise ConfigError(
                f"Expected events with {self.event_dims} axes for architecture {type(self).__name__}, "
                f"got data of event shape {tuple(event_shape)}. Choose another architecture=... or dataset=...."
            )
        self.event_shape = tuple(event_shape)

    @abstractmethod
    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt with the shape of x, (batch, \\*event)."""

    @property
    def has_closed_form(self) -> bool:
        """Whether :meth:`value_and_divergence` is available."""
        return False

    def value_and_divergence(self, t: Time, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return dx/dt and its exact divergence (batch,) from a closed form."""
        raise NotImplementedError(f"{type(self).__name__} has no closed form of its divergence")

    def value_and_jvp(
        self, t: Time, x: Tensor, tangents: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Return dx/dt and the Jacobian-vector products :math:`J v_k`.

        Args:
            t: Time.
            x: State (batch, \*event).
            tangents: Vectors (k, batch or 1, \*event); 1 shares a vector among the rows.
            context: Conditioning (batch, features) or None.

        Returns:
            The value (batch, \*event) and the products (k, batch, \*event).
        """
        return value_and_jvp(lambda y: self(t, y, context), x, tangents)


class BottleneckField(VectorField):
    r"""A field :math:`f = g \circ h` through a bottleneck :math:`h(t, x) \in \mathbb{R}^H`.

    The bottleneck estimator draws its probe in the smaller space.
    """

    @property
    @abstractmethod
    def bottleneck_shape(self) -> tuple[int, ...]:
        """Shape of one encoded event."""

    @abstractmethod
    def encode(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return h(t, x) with shape (batch, \\*bottleneck_shape)."""

    @abstractmethod
    def decode(self, t: Time, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Return g(t, h) with shape (batch, \\*event)."""

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt = g(t, h(t, x))."""
        return self.decode(t, self.encode(t, x, context), context)


def value_and_jvp(function: Callable[[Tensor], Tensor], x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    r"""Evaluate a function and push k tangents through it in one batched forward-mode pass.

    Args:
        function: Map of (batch, \*in) to (batch, \*out).
        x: Where to evaluate, (batch, \*in).
        tangents: Vectors (k, batch or 1, \*in).

    Returns:
        The value (batch, \*out) and the products (k, batch, \*out).
    """
    # jvp refuses rows that share memory.
    x, tangents = x.contiguous(), tangents.expand(len(tangents), *x.shape)

    def push(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(function, (x,), (tangent,))  # type: ignore[return-value]

    # The value does not depend on the tangent, so vmap leaves it unbatched and computes it once.
    return torch.func.vmap(push, out_dims=(None, 0))(tangents)  # type: ignore[arg-type]


def time_column(t: Time) -> Float[Tensor, "rows 1"]:
    """Return a scalar time as (1, 1) and a time per example as (batch, 1)."""
    return t.reshape(-1, 1)
