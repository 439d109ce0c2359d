r"""Multilayer perceptrons as vector fields, with closed-form divergences where they are shallow.

References:
    Grathwohl et al., FFJORD (2019), https://arxiv.org/abs/1810.01367, section 3.1 and its code.
    Onken et al., OT-Flow (2021), https://arxiv.org/abs/2006.00104, for exact traces by hand.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from cnf_lab.errors import ConfigError
from cnf_lab.fields.activations import Activation
from cnf_lab.fields.base import BottleneckField, Time, VectorField
from cnf_lab.fields.layers import AffineMap, TimeLinear
from cnf_lab.fields.spectral import SpectralNorm
from cnf_lab.shapes import Float


class Stack(nn.Module):
    r"""Time-conditioned layers with activations between them, and gates and shifts from a context.

    The context enters every layer that an activation follows, as
    :math:`(1 + G_l c) \circ (\cdot) + S_l c`: diagonal, so that closed forms stay valid.

    Args:
        sizes: Sizes of input, hidden layers and output.
        layer: Kind of time-conditioned layer.
        activation: Nonlinearity; each place gets a copy of its own.
        activate_last: Whether an activation follows the last layer too.
        context_features: Size of the conditioning context; 0 for none.
        spectral_norm: Whether every weight matrix is divided by its largest singular value.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        layer: type[TimeLinear],
        activation: type[Activation],
        activate_last: bool = False,
        context_features: int = 0,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        activated = list(sizes[1:]) if activate_last else list(sizes[1:-1])
        layers = nn.ModuleList(layer(n_in, n_out) for n_in, n_out in pairwise(sizes))
        activations = nn.ModuleList(activation() for _ in activated)
        modulations = nn.ModuleList(
            nn.Linear(context_features, 2 * size, bias=False) for size in activated if context_features
        )
        self.layers = cast(Sequence[TimeLinear], layers)
        self.activations = cast(Sequence[Activation], activations)
        self.modulations = cast(Sequence[nn.Linear], modulations)
        if spectral_norm:
            SpectralNorm.apply_to(layers)

    def maps(self, t: Time, context: Tensor | None) -> list[AffineMap]:
        """Return the layers' affine maps at a time, context folded in."""
        maps = [layer.at(t) for layer in self.layers]
        for index, modulation in enumerate(self.modulations):
            gate, shift = modulation(context).chunk(2, dim=-1)
            maps[index] = maps[index].modulated(1 + gate, shift)
        return maps

    def forward(self, t: Time, x: Float[Tensor, "batch in"], context: Tensor | None) -> Float[Tensor, "batch out"]:
        """Apply layers and activations."""
        for index, affine in enumerate(self.maps(t, context)):
            x = affine(x)
            if index < len(self.activations):
                x = self.activations[index](x)
        return x

    def value_and_jvp(
        self,
        t: Time,
        x: Float[Tensor, "batch in"],
        tangents: Float[Tensor, "k rows in"],
        context: Tensor | None,
    ) -> tuple[Float[Tensor, "batch out"], Float[Tensor, "k rows_out out"]]:
        """Apply the stack to x and its derivative to the tangents, layer by layer."""
        for index, affine in enumerate(self.maps(t, context)):
            x, tangents = affine(x), affine.linear(tangents)
            if index < len(self.activations):
                x, slope = self.activations[index].value_and_slope(x)
                tangents = tangents * slope
        return x, tangents


class Mlp(VectorField):
    r"""A multilayer perceptron of x with time-conditioned layers.

    With one or two hidden layers the divergence has a closed form. For
    :math:`f = g_3 W_3 a(g_2 W_2 a(g_1 W_1 x + s_1) + s_2) + s_3`,

    .. math:: \mathrm{div} f = d_2^\top \big(W_2 \circ (W_1 G_3 W_3)^\top\big) d_1,
              \qquad d_i = g_i \circ a'(u_i),

    one extra product with a matrix of the size of :math:`W_2`, which depends on time only.

    Args:
        event_shape: Shape of one event, (D,).
        hidden: Widths of the hidden layers.
        layer: Kind of time-conditioned layer.
        activation: Nonlinearity between the layers.
        context_features: Size of the conditioning context; 0 for none.
        subtract_identity: Whether the field is f(t, x) - x, whose divergence is smaller by exactly D.
        spectral_norm: Whether every weight matrix is divided by its largest singular value.

    Raises:
        ConfigError: If there is no hidden layer or the data are not rows.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        layer: type[TimeLinear],
        activation: type[Activation],
        context_features: int = 0,
        subtract_identity: bool = False,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__(event_shape)
        _check_hidden(hidden)
        features = event_shape[0]
        self.unit_time = layer.unit_time
        self.subtract_identity = subtract_identity
        self.stack = Stack(
            [features, *hidden, features],
            layer,
            activation,
            context_features=context_features,
            spectral_norm=spectral_norm,
        )

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (batch, D)."""
        value = self.stack(t, x, context)
        return value - x if self.subtract_identity else value

    @property
    def has_closed_form(self) -> bool:
        """True with one or two hidden layers."""
        return len(self.stack.layers) <= 3

    def value_and_divergence(self, t: Time, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return dx/dt and its exact divergence; t is a scalar."""
        if not self.has_closed_form:
            return super().value_and_divergence(t, x, context)
        *hidden, last = self.stack.maps(t, context)
        slopes, h = [], x
        for affine, activation in zip(hidden, self.stack.activations, strict=True):
            h, slope = activation.value_and_slope(affine(h))
            slopes.append(slope if affine.gate is None else slope * affine.gate)
        value, weight_out = last(h), last.weight
        if last.gate is not None:
            weight_out = last.gate.reshape(-1, 1) * weight_out
        if len(hidden) == 1:
            div = slopes[0] @ (hidden[0].weight * weight_out.mT).sum(dim=1)
        else:
            product = hidden[1].weight * (hidden[0].weight @ weight_out).mT
            div = ((slopes[1] @ product) * slopes[0]).sum(dim=-1)
        if self.subtract_identity:
            return value - x, div - x.shape[1]
        return value, div

    def value_and_jvp(
        self, t: Time, x: Tensor, tangents: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and Jacobian-vector products without an autograd transform."""
        value, products = self.stack.value_and_jvp(t, x, tangents, context)
        if self.subtract_identity:
            return value - x, products - tangents
        return value, products


class EncoderDecoder(BottleneckField):
    r"""A multilayer perceptron through a bottleneck, for the bottleneck trace estimator.

    Of n hidden layers the first ⌊n/2⌋ + 1 encode, with an activation after each, and the rest
    decode, with none after the last.

    Args:
        event_shape: Shape of one event, (D,).
        hidden: Widths of the hidden layers; the bottleneck is number ⌊n/2⌋ + 1.
        layer: Kind of time-conditioned layer.
        activation: Nonlinearity.
        context_features: Size of the conditioning context; 0 for none.
        spectral_norm: Whether every weight matrix is divided by its largest singular value.

    References:
        Grathwohl et al. (2019), section 3.2.1 and its code.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        layer: type[TimeLinear],
        activation: type[Activation],
        context_features: int = 0,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__(event_shape)
        _check_hidden(hidden)
        self.unit_time = layer.unit_time
        sizes = [event_shape[0], *hidden, event_shape[0]]
        cut = len(hidden) // 2 + 1
        self.encoder = Stack(sizes[: cut + 1], layer, activation, True, context_features, spectral_norm)
        self.decoder = Stack(sizes[cut:], layer, activation, False, context_features, spectral_norm)
        self._bottleneck = sizes[cut]

    @property
    def bottleneck_shape(self) -> tuple[int, ...]:
        """Shape of one encoded event."""
        return (self._bottleneck,)

    def encode(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the bottleneck (batch, H)."""
        return self.encoder(t, x, context)

    def decode(self, t: Time, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (batch, D)."""
        return self.decoder(t, h, context)


def _check_hidden(hidden: Sequence[int]) -> None:
    if not hidden or min(hidden) < 1:
        raise ConfigError(
            f"Expected architecture.hidden with at least one positive width, got {list(hidden)}. "
            "Type architecture.hidden=[64,64]."
        )
