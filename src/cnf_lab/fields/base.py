"""The seam of all vector fields, and forward-mode differentiation of any of them."""

import math
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
    #: Whether all its operations have forward derivatives; without, products come from reverse mode.
    forward_mode: bool = True

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

    def value_and_divergence(
        self, t: Time, x: Tensor, context: Tensor | None = None, tangents: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        r"""Return dx/dt, its exact divergence from a closed form, and Jacobian-vector products.

        Args:
            t: Time, a scalar.
            x: State (batch, \*event).
            context: Conditioning (batch, features) or None.
            tangents: Vectors (k, batch, \*event) to multiply the Jacobian by; None for none.

        Returns:
            The value (batch, \*event), the divergence (batch,), and the products
            (k, batch, \*event) or None.
        """
        raise NotImplementedError(f"{type(self).__name__} has no closed form of its divergence")

    @property
    def divergence_tangents(self) -> int:
        """Number of tangents of an exact divergence without a closed form: one per coordinate.

        Fewer where a tangent serves several coordinates that do not touch each other.
        """
        return math.prod(self.event_shape)

    def value_and_partial_divergence(
        self, t: Time, x: Tensor, start: int, stop: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Return dx/dt and what some of the :attr:`divergence_tangents` give of the divergence.

        Args:
            t: Time.
            x: State (batch, \*event).
            start: The first tangent.
            stop: The tangent after the last.
            context: Conditioning (batch, features) or None.

        Returns:
            The value (batch, \*event) and the part of the divergence (batch,).
        """
        value, found = self.value_and_unit_products(t, x, start, stop, context)
        # Entry (k, b) of the diagonal is d f_{start + k} / d x_{start + k} of row b.
        diagonal = found.flatten(2)[:, :, start:stop].diagonal(dim1=0, dim2=2)
        return value, diagonal.to(x.dtype).sum(dim=-1)

    def value_and_unit_products(
        self, t: Time, x: Tensor, start: int, stop: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Return dx/dt and products of the Jacobian with some unit vectors.

        Args:
            t: Time.
            x: State (batch, \*event).
            start: The first coordinate.
            stop: The coordinate after the last.
            context: Conditioning (batch, features) or None.

        Returns:
            The value (batch, \*event) and the products (k, batch, \*event): columns of the
            Jacobian in forward mode, rows where the field has reverse mode only.
        """
        units = torch.eye(stop - start, x.shape[1:].numel(), dtype=x.dtype, device=x.device).roll(start, 1)
        products = self.value_and_jvp if self.forward_mode else self.value_and_vjp
        return products(t, x, units.reshape(-1, 1, *x.shape[1:]), context)

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

    def value_and_vjp(
        self, t: Time, x: Tensor, cotangents: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Return dx/dt and the vector-Jacobian products :math:`v_k^\top J` by reverse mode.

        Args:
            t: Time.
            x: State (batch, \*event).
            cotangents: Vectors (k, batch or 1, \*event); 1 shares a vector among the rows.
            context: Conditioning (batch, features) or None.

        Returns:
            The value (batch, \*event) and the products (k, batch, \*event).
        """
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            value = self(t, x, context)
            products = []
            for cotangent in cotangents.to(value.dtype).expand(len(cotangents), *value.shape):
                # A constant field's graph has no x in it.
                (product,) = torch.autograd.grad(
                    value, x, cotangent, create_graph=differentiable, retain_graph=True, materialize_grads=True
                )
                products.append(product)
        stacked = torch.stack(products)
        return (value, stacked) if differentiable else (value.detach(), stacked)


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
    x, tangents = x.contiguous(), tangents.to(x.dtype).expand(len(tangents), *x.shape)

    def push(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(function, (x,), (tangent,))  # type: ignore[return-value]

    # The value does not depend on the tangent, so vmap leaves it unbatched and computes it once.
    return torch.func.vmap(push, out_dims=(None, 0))(tangents)  # type: ignore[arg-type]


def time_column(t: Time) -> Float[Tensor, "rows 1"]:
    """Return a scalar time as (1, 1) and a time per example as (batch, 1)."""
    return t.reshape(-1, 1)
