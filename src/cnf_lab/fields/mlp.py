r"""Multilayer perceptrons as vector fields, with closed-form divergences where they are shallow.

References:
    Grathwohl et al., FFJORD (2019), https://arxiv.org/abs/1810.01367, section 3.1 and its code.
    Onken et al., OT-Flow (2021), https://arxiv.org/abs/2006.00104, for exact traces by hand.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
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

    #: Whether all rows have the same weights at a scalar time.
    shared: bool = True

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
        self.depth = len(layers)
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

    def value_and_slopes(
        self, maps: Sequence[AffineMap], x: Float[Tensor, "batch in"]
    ) -> tuple[Float[Tensor, "batch out"], list[Tensor]]:
        """Apply the maps with activations between them; return the slopes of the activations too."""
        slopes = []
        for affine, activation in zip(maps, self.activations, strict=False):
            x, slope = activation.value_and_slope(affine(x))
            slopes.append(slope)
        return (maps[-1](x) if len(maps) > len(slopes) else x), slopes

    def jvp(
        self, maps: Sequence[AffineMap], slopes: Sequence[Tensor], tangents: Float[Tensor, "k rows in"]
    ) -> Float[Tensor, "k rows_out out"]:
        """Apply the derivative at known slopes to tangents."""
        for index, affine in enumerate(maps):
            tangents = affine.linear(tangents)
            if index < len(slopes):
                tangents = tangents * slopes[index]
        return tangents

    def value_and_jvp(
        self, maps: Sequence[AffineMap], x: Float[Tensor, "batch in"], tangents: Float[Tensor, "k rows in"]
    ) -> tuple[Float[Tensor, "batch out"], Float[Tensor, "k rows_out out"]]:
        """Apply the maps to x and their derivative to all tangents, layer by layer."""
        for index, affine in enumerate(maps):
            # Stacked with x the tangents would share its product, at the price of copies both ways:
            # a third more time for a training step of POWER's field on a CPU.
            x, tangents = affine(x), affine.linear(tangents)
            if index < len(self.activations):
                x, slope = self.activations[index].value_and_slope(x)
                tangents = tangents * slope
        return x, tangents


def closed_form_divergence(maps: Sequence[AffineMap], slopes: Sequence[Tensor]) -> Float[Tensor, " batch"]:
    r"""Return the exact divergence of affine maps with one or two activations between them.

    For :math:`f = W_3 a(g_2 W_2 a(g_1 W_1 x + s_1) + s_2) + s_3` with gates that may differ
    between rows, and weights that all rows share,

    .. math:: \mathrm{div} f = d_2^\top \big(W_2 \circ (W_1 W_3)^\top\big) d_1,
              \qquad d_i = g_i \circ a'(u_i).

    With one activation rows may have weights of their own, or low-rank parts of them.

    Args:
        maps: The two or three affine maps, the last without a gate.
        slopes: Slopes of the activations.
    """
    gated, first, last = _gated(maps, slopes), maps[0], maps[-1]
    if len(slopes) == 1:
        diagonal = (first.weight * last.weight.mT).sum(dim=-1)  # of W1 W2, (H,), or (batch, H)
        div = (gated[0] * diagonal).sum(dim=-1) if diagonal.dim() == 2 else gated[0] @ diagonal
        if own := _low_rank_diagonals(first, last):
            div = div + (slopes[0] * sum(own)).sum(dim=-1)
        return div
    matrix = maps[1].weight * (last.weight.mT @ first.weight.mT)
    # The last sum in float32 at least: under autocast a sum of H terms would lose digits.
    dtype = torch.promote_types(torch.float32, gated[0].dtype)
    return torch.linalg.vecdot((gated[1] @ matrix).to(dtype), gated[0].to(dtype))


def _gated(maps: Sequence[AffineMap], slopes: Sequence[Tensor]) -> list[Tensor]:
    """Return the slopes with the gates of their layers."""
    pairs = zip(maps, slopes, strict=False)
    return [slope if affine.gate is None else slope * affine.gate for affine, slope in pairs]


def _low_rank_diagonals(first: AffineMap, last: AffineMap) -> list[Float[Tensor, "batch units"]]:
    """Return the terms that low-rank parts add to diag((g W1 + V1' U1') (W2 + V2' U2')), none without any."""
    parts = []
    if first.low_rank is not None:
        u1, v1 = first.low_rank
        parts.append((v1 * (u1.mT @ last.weight)).sum(dim=1))
    if last.low_rank is not None:
        u2, v2 = last.low_rank
        own = ((first.weight @ v2.mT) * u2).sum(dim=2)
        parts.append(own if first.gate is None else first.gate * own)
    if first.low_rank is not None and last.low_rank is not None:
        parts.append((v1 * ((u1.mT @ v2.mT) @ u2.mT)).sum(dim=1))
    return parts


class StackField(VectorField):
    r"""A field that is one stack of layers: what follows from the layers' affine maps.

    With one or two hidden layers the divergence has a closed form, :func:`closed_form_divergence`:
    one extra product with a matrix of the size of :math:`W_2`, which depends on time only. Where
    rows have weights of their own it has one with a single hidden layer.
    """

    stack: Stack
    #: Whether the field is the stack less x, whose divergence is smaller by exactly D.
    subtract_identity: bool = False

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (batch, D)."""
        value = self.stack(t, x, context)
        return value - x if self.subtract_identity else value

    @property
    def has_closed_form(self) -> bool:
        """True with one or two hidden layers; with one where rows have weights of their own."""
        return self.stack.depth <= (3 if self.stack.shared else 2)

    def value_and_divergence(
        self, t: Time, x: Tensor, context: Tensor | None = None, tangents: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return dx/dt, its exact divergence, and Jacobian-vector products; t is a scalar."""
        if not self.has_closed_form:
            return super().value_and_divergence(t, x, context, tangents)
        maps = self.stack.maps(t, context)
        value, slopes = self.stack.value_and_slopes(maps, x)
        div = closed_form_divergence(maps, slopes)
        products = None if tangents is None else self.stack.jvp(maps, slopes, tangents)
        if self.subtract_identity:
            products = None if products is None or tangents is None else products - tangents
            return value - x, div - x.shape[1], products
        return value, div, products

    def value_and_partial_divergence(
        self, t: Time, x: Tensor, start: int, stop: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Return dx/dt and the divergence over some coordinates.

        Three hidden layers meet in the middle: with :math:`R_k = d_1 (W_1 e_k \circ W_2^\top)` from
        the left and :math:`L_k = d_3 (W_4^\top e_k \circ W_3)` from the right,

        .. math:: \mathrm{div} f = \sum_h d_{2,h} \sum_k R_{k,h} L_{k,h},

        two products of the batch with matrices that depend on time only, and no mask of the
        batch for each coordinate and layer.
        """
        layers = self.stack.layers
        # The matrices have a row per unit: they pay when there are more rows than units.
        if not self.stack.shared or self.stack.depth != 4 or len(x) < max(layer.in_features for layer in layers):
            return super().value_and_partial_divergence(t, x, start, stop, context)
        maps = self.stack.maps(t, context)
        value, slopes = self.stack.value_and_slopes(maps, x)
        d1, d2, d3 = _gated(maps, slopes)
        first, second, third, last = (affine.weight for affine in maps)
        left = (first[:, start:stop, None] * second.mT[:, None, :]).flatten(1)  # (H1, k H2)
        right = (last[start:stop].mT[:, :, None] * third[:, None, :]).flatten(1)  # (H3, k H2)
        both = ((d1 @ left) * (d3 @ right)).unflatten(1, (stop - start, -1)).sum(dim=1)
        div = (both.to(x.dtype) * d2).sum(dim=-1)
        return (value - x, div - (stop - start)) if self.subtract_identity else (value, div)

    def value_and_jvp(
        self, t: Time, x: Tensor, tangents: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and Jacobian-vector products without an autograd transform."""
        value, products = self.stack.value_and_jvp(self.stack.maps(t, context), x, tangents)
        return (value - x, products - tangents) if self.subtract_identity else (value, products)


class Mlp(StackField):
    """A multilayer perceptron of x with time-conditioned layers.

    Args:
        event_shape: Shape of one event, (D,).
        hidden: Widths of the hidden layers.
        layer: Kind of time-conditioned layer.
        activation: Nonlinearity between the layers.
        context_features: Size of the conditioning context; 0 for none.
        subtract_identity: Whether the field is f(t, x) - x, whose divergence is smaller by exactly D.
        spectral_norm: Whether every weight matrix is divided by its largest singular value.
        zero_start: Whether the last layer starts at zero, and the flow as the identity.

    Raises:
        ConfigError: If there is no hidden layer, the data are not rows, or options exclude each other.
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
        zero_start: bool = False,
    ) -> None:
        super().__init__(event_shape)
        check_hidden(hidden)
        if zero_start and spectral_norm:
            raise ConfigError(
                "Expected a last layer that starts at zero or weights of norm 1, got zero_start=true and "
                "spectral_norm=true. Type architecture.zero_start=false."
            )
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
        if zero_start:
            self.stack.layers[-1].zero()


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
        check_hidden(hidden)
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


def check_hidden(hidden: Sequence[int]) -> None:
    """Refuse widths of which there are none or which are not positive."""
    if not hidden or min(hidden) < 1:
        raise ConfigError(
            f"Expected architecture.hidden with at least one positive width, got {list(hidden)}. "
            "Type architecture.hidden=[64,64]."
        )
