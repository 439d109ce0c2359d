r"""Convolutional vector fields of images, from time-conditioned convolutions.

References:
    Grathwohl et al., FFJORD (2019), https://arxiv.org/abs/1810.01367, section 4.2 and its code.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from cnf_lab.errors import ConfigError
from cnf_lab.fields.activations import Activation
from cnf_lab.fields.base import BottleneckField, Time, VectorField
from cnf_lab.fields.conv_layers import ConvMap, TimeConv
from cnf_lab.fields.spectral import SpectralNorm
from cnf_lab.shapes import Float


class ConvStack(nn.Module):
    r"""Time-conditioned convolutions with activations between them, and gates and shifts from a context.

    The context enters every layer that an activation follows, as
    :math:`(1 + G_l c) \circ (\cdot) + S_l c` with an entry per channel.

    Args:
        channels: Channels of input, hidden layers and output.
        strides: Stride of each layer.
        convolution: Kind of time-conditioned convolution.
        activation: Nonlinearity; each place gets a copy of its own.
        activate_last: Whether an activation follows the last layer too.
        context_features: Size of the conditioning context; 0 for none.
        spectral_norm: Whether every kernel, as a matrix of output channels against the rest, is
            divided by its largest singular value.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        convolution: type[TimeConv],
        activation: type[Activation],
        activate_last: bool = False,
        context_features: int = 0,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        hidden = channels[1:] if activate_last else channels[1:-1]
        layers = nn.ModuleList(
            convolution(n_in, n_out, s) for (n_in, n_out), s in zip(pairwise(channels), strides, strict=True)
        )
        activations = nn.ModuleList(activation() for _ in hidden)
        modulations = nn.ModuleList(nn.Linear(context_features, 2 * n, bias=False) for n in hidden if context_features)
        self.layers = cast(Sequence[TimeConv], layers)
        self.activations = cast(Sequence[Activation], activations)
        self.modulations = cast(Sequence[nn.Linear], modulations)
        if spectral_norm:
            SpectralNorm.apply_to(layers)

    def maps(self, t: Time, size: tuple[int, ...], context: Tensor | None) -> list[ConvMap]:
        """Return the layers' maps at a time for images of a size (height, width), context folded in."""
        maps = []
        for layer in self.layers:
            maps.append(layer.at(t, size))
            size = _size_after(layer.stride, size)
        for index, modulation in enumerate(self.modulations):
            gate, shift = modulation(context).chunk(2, dim=-1)
            maps[index] = maps[index].modulated(1 + gate, shift)
        return maps

    def forward(self, t: Time, x: Float[Tensor, "batch in height width"], context: Tensor | None) -> Tensor:
        """Apply layers and activations."""
        for index, convolution in enumerate(self.maps(t, x.shape[2:], context)):
            x = convolution(x)
            if index < len(self.activations):
                x = self.activations[index](x)
        return x

    def value_and_jvp(
        self,
        t: Time,
        x: Float[Tensor, "batch in height width"],
        tangents: Float[Tensor, "k rows in height width"],
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Apply the layers to x and their derivative to all tangents, layer by layer."""
        for index, convolution in enumerate(self.maps(t, x.shape[2:], context)):
            x, tangents = convolution(x), convolution.linear(tangents)  # apart: see Stack.value_and_jvp
            if index < len(self.activations):
                x, slope = self.activations[index].value_and_slope(x)
                tangents = tangents * slope
        return x, tangents


class LocalField(VectorField):
    r"""A field of convolutions of images, whose pixels touch only those within their reach.

    Args:
        event_shape: Shape of one event, (channels, height, width).
        hidden: Channels of the hidden layers.
        strides: Stride of each layer, one more than hidden layers; None for 1 throughout.

    Raises:
        ConfigError: If there is no hidden layer, the strides do not fit, or the data are not images.
    """

    event_dims = 3

    def __init__(self, event_shape: tuple[int, ...], hidden: Sequence[int], strides: Sequence[int] | None) -> None:
        super().__init__(event_shape)
        check_hidden(hidden)
        self.strides = [1] * (len(hidden) + 1) if strides is None else list(strides)
        check_strides(self.strides, len(hidden) + 1, self.event_shape[1:])
        self._apart = 1 + max(_reach(self.strides, length) for length in self.event_shape[1:])

    @property
    def divergence_tangents(self) -> int:
        """At most (L + 1)² per channel with L layers of stride 1, whatever the size of the image."""
        down, across = self._periods
        return self.event_shape[0] * down * across

    def value_and_partial_divergence(
        self, t: Time, x: Tensor, start: int, stop: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and what some tangents give of the divergence.

        Pixels farther apart than the layers reach do not touch each other: they share a tangent.

        References:
            Curtis, Powell & Reid, On the estimation of sparse Jacobian matrices (1974).
        """
        (_, height, width), (down, across) = self.event_shape, self._periods
        pixel = torch.arange(x.shape[1:].numel(), device=x.device)
        channel, row, column = pixel // (height * width), pixel // width % height, pixel % width
        number = (channel * down + row % down) * across + column % across
        patterns = (number == torch.arange(start, stop, device=x.device).unsqueeze(1)).to(x.dtype)  # (k, D)
        value, products = self.value_and_jvp(t, x, patterns.reshape(-1, 1, *x.shape[1:]), context)
        return value, (products.flatten(2).to(x.dtype) * patterns.unsqueeze(1)).sum(dim=(0, 2))

    @property
    def _periods(self) -> tuple[int, int]:
        return min(self._apart, self.event_shape[1]), min(self._apart, self.event_shape[2])


class ConvField(LocalField):
    r"""A convolutional network of images with time-conditioned layers.

    Args:
        event_shape: Shape of one event, (channels, height, width).
        hidden: Channels of the hidden layers.
        convolution: Kind of time-conditioned convolution.
        activation: Nonlinearity between the layers.
        strides: Stride of each layer, one more than hidden layers: 1 keeps the size of the image,
            2 halves it, -2 doubles it. None for 1 throughout.
        context_features: Size of the conditioning context; 0 for none.
        spectral_norm: Whether every kernel is divided by its largest singular value.
        zero_start: Whether the last layer starts at zero, and the flow as the identity.

    Raises:
        ConfigError: If there is no hidden layer, the strides do not fit, the data are not images, or
            options exclude each other.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        convolution: type[TimeConv],
        activation: type[Activation],
        strides: Sequence[int] | None = None,
        context_features: int = 0,
        spectral_norm: bool = False,
        zero_start: bool = False,
    ) -> None:
        super().__init__(event_shape, hidden, strides)
        if zero_start and spectral_norm:
            raise ConfigError(
                "Expected a last layer that starts at zero or kernels of norm 1, got zero_start=true and "
                "spectral_norm=true. Type architecture.zero_start=false."
            )
        channels = [event_shape[0], *hidden, event_shape[0]]
        self.unit_time = convolution.unit_time
        common = (context_features, spectral_norm)
        self.stack = ConvStack(channels, self.strides, convolution, activation, False, *common)
        if zero_start:
            self.stack.layers[-1].zero()

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (batch, channels, height, width)."""
        return self.stack(t, x, context)

    def value_and_jvp(
        self, t: Time, x: Tensor, tangents: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and Jacobian-vector products without an autograd transform."""
        return self.stack.value_and_jvp(t, x, tangents, context)


class ConvEncoderDecoder(LocalField, BottleneckField):
    r"""A convolutional network through a bottleneck, for the bottleneck trace estimator.

    Of n hidden layers the first ⌊n/2⌋ + 1 encode, with an activation after each, and the rest
    decode, with none after the last. In the published setting of MNIST the strides halve the image
    twice on the way in and double it twice on the way out.

    Args:
        event_shape: Shape of one event, (channels, height, width).
        hidden: Channels of the hidden layers; the bottleneck is number ⌊n/2⌋ + 1.
        convolution: Kind of time-conditioned convolution.
        activation: Nonlinearity.
        strides: Stride of each layer, as in :class:`ConvField`.
        context_features: Size of the conditioning context; 0 for none.
        spectral_norm: Whether every kernel is divided by its largest singular value.

    Raises:
        ConfigError: If there is no hidden layer, the strides do not fit, or the data are not images.

    References:
        Grathwohl et al. (2019), section 3.2.1 and its code.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        convolution: type[TimeConv],
        activation: type[Activation],
        strides: Sequence[int] | None = None,
        context_features: int = 0,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__(event_shape, hidden, strides)
        self.unit_time = convolution.unit_time
        channels, cut = [event_shape[0], *hidden, event_shape[0]], len(hidden) // 2 + 1
        common = (context_features, spectral_norm)
        self.encoder = ConvStack(channels[: cut + 1], self.strides[:cut], convolution, activation, True, *common)
        self.decoder = ConvStack(channels[cut:], self.strides[cut:], convolution, activation, False, *common)
        size = self.event_shape[1:]
        for stride in self.strides[:cut]:
            size = _size_after(stride, size)
        self._bottleneck = (channels[cut], *size)

    @property
    def bottleneck_shape(self) -> tuple[int, ...]:
        """Shape of one encoded event, (channels, height, width)."""
        return self._bottleneck

    def encode(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the bottleneck (batch, channels, height, width)."""
        return self.encoder(t, x, context)

    def decode(self, t: Time, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt with the shape of an event."""
        return self.decoder(t, h, context)

    def value_and_jvp(
        self, t: Time, x: Tensor, tangents: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and Jacobian-vector products without an autograd transform."""
        return self.decoder.value_and_jvp(t, *self.encoder.value_and_jvp(t, x, tangents, context), context)


def check_hidden(hidden: Sequence[int]) -> None:
    """Refuse hidden layers of which there are none, or whose channels are not positive."""
    if not hidden or min(hidden) < 1:
        raise ConfigError(
            "Expected architecture.hidden with at least one positive number of channels, "
            f"got {list(hidden)}. Type architecture.hidden=[64,64,64]."
        )


def _size_after(stride: int, size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the size (height, width) of a layer's output for one of its input."""
    return tuple(length // 2 if stride == 2 else length * abs(stride) for length in size)


def check_strides(strides: Sequence[int], layers: int, image: tuple[int, ...]) -> None:
    """Refuse strides that do not fit the layers or the size (height, width) of the image."""
    ones = f"Type architecture.strides=[{','.join(['1'] * layers)}]."
    if len(strides) != layers or not set(strides) <= {1, 2, -2}:
        raise ConfigError(
            f"Expected architecture.strides of 1, 2 or -2, one for each of {layers} layers, got {strides}. {ones}"
        )
    size = image
    for stride in strides:
        if stride == 2 and any(length % 2 for length in size):
            raise ConfigError(
                f"Expected architecture.strides with 2 only where height and width are even, got {strides}, "
                f"which makes images of {image[0]}x{image[1]} {size[0]}x{size[1]}. {ones}"
            )
        size = _size_after(stride, size)
    if size != image:
        raise ConfigError(
            f"Expected architecture.strides that return to images of {image[0]}x{image[1]}, "
            f"got {strides}, which end at {size[0]}x{size[1]}. {ones}"
        )


def _reach(strides: Sequence[int], length: int) -> int:
    """Return how many pixels a pixel of the output is from one of the input that it depends on, at most."""
    farthest = 0
    for pixel in range(length):
        low = high = pixel  # of the pixels of a layer's input that it depends on
        for stride in reversed(strides):
            if stride == 1:
                low, high = low - 1, high + 1
            elif stride == 2:
                low, high = 2 * low - 1, 2 * high + 2
            else:
                low, high = (low - 1) // 2, (high + 1) // 2
        farthest = max(farthest, pixel - low, high - pixel)
    return farthest
