"""A sum of multilayer perceptrons as a vector field."""

import functools
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cnf_lab.errors import ConfigError
from cnf_lab.fields.activations import Activation
from cnf_lab.fields.base import Time, VectorField
from cnf_lab.fields.layers import TimeLinear
from cnf_lab.fields.mlp import Mlp


class Branches(VectorField):
    r"""The plain sum of perceptrons side by side, whose divergences add.

    .. math:: f(t, x) = \sum_k f_k(t, x), \qquad \mathrm{div} f = \sum_k \mathrm{div} f_k

    Each branch is an :class:`~cnf_lab.fields.Mlp`, so that with one or two hidden layers the
    divergence has a closed form however many branches there are. At the start the variance of
    the field is that of one branch times their number.

    Args:
        event_shape: Shape of one event, (D,).
        hidden: Widths of the hidden layers of each branch.
        branches: Number of branches.
        layer: Kind of time-conditioned layer.
        activation: Nonlinearity between the layers.
        context_features: Size of the conditioning context; 0 for none.
        zero_start: Whether the last layers start at zero, and the flow as the identity.

    Raises:
        ConfigError: If there is no branch or no hidden layer, or the data are not rows.
    """

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
        if branches < 1:
            raise ConfigError(
                f"Expected architecture.branches of at least 1, got {branches}. Type architecture.branches=2."
            )
        self.unit_time = layer.unit_time
        made = nn.ModuleList(
            Mlp(event_shape, hidden, layer, activation, context_features, zero_start=zero_start)
            for _ in range(branches)
        )
        self.branches = cast(Sequence[Mlp], made)

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (batch, D)."""
        return _sum([branch(t, x, context) for branch in self.branches])

    @property
    def has_closed_form(self) -> bool:
        """True with one or two hidden layers."""
        return all(branch.has_closed_form for branch in self.branches)

    def value_and_divergence(
        self, t: Time, x: Tensor, context: Tensor | None = None, tangents: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return dx/dt, its exact divergence, and Jacobian-vector products; t is a scalar."""
        if not self.has_closed_form:
            return super().value_and_divergence(t, x, context, tangents)
        parts = [branch.value_and_divergence(t, x, context, tangents) for branch in self.branches]
        values, divs, products = zip(*parts, strict=True)
        return _sum(values), _sum(divs), None if tangents is None else _sum(products)

    def value_and_partial_divergence(
        self, t: Time, x: Tensor, start: int, stop: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and the divergence over some coordinates."""
        parts = [branch.value_and_partial_divergence(t, x, start, stop, context) for branch in self.branches]
        values, divs = zip(*parts, strict=True)
        return _sum(values), _sum(divs)

    def value_and_jvp(
        self, t: Time, x: Tensor, tangents: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and Jacobian-vector products without an autograd transform."""
        parts = [branch.value_and_jvp(t, x, tangents, context) for branch in self.branches]
        values, products = zip(*parts, strict=True)
        return _sum(values), _sum(products)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)
