r"""Convolutional vector fields of images, from time-conditioned convolutions.

A layer has the form :math:`y = g(t) \circ (K(t) * x) + s(t)`: a kernel, a gate per channel and a
shift per channel or pixel (:meth:`TimeConv.at`). Channels of time or coordinates are the same for
every row, so that they are convolved once, on one image, and enter the shift.

Different from the original:

1. The bias of its convolution with a kernel from time overlaps the first entries of the kernel.
2. Its squash and concat_v2 convolutions fail; here they are what its linear layers are.
3. Kernels of transposed convolutions are kept as (out, in, 4, 4), so that gates and spectral
   normalisation treat all convolutions alike.

References:
    Grathwohl et al., FFJORD (2019), https://arxiv.org/abs/1810.01367, section 4.2 and its code.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnf_lab.errors import ConfigError
from cnf_lab.fields.activations import Activation
from cnf_lab.fields.base import Time, VectorField, time_column
from cnf_lab.fields.spectral import SpectralNorm
from cnf_lab.shapes import Float


class ConvMap(NamedTuple):
    r"""The map :math:`x \mapsto g \circ (K * x) + s` of images.

    Attributes:
        weight: K (out, in, kernel, kernel), or (batch, out, in, kernel, kernel) where it differs
            between rows. A gate that all rows share is folded in.
        gate: g (batch, out, 1, 1) where it differs between rows; None stands for 1.
        shift: s (out, height, width) of the output, with a leading batch axis where it differs
            between rows; height and width are 1 where all pixels share it.
        stride: 1, 2 or -2, as in :class:`TimeConv`.
    """

    weight: Tensor
    gate: Tensor | None
    shift: Tensor
    stride: int = 1

    def __call__(self, x: Float[Tensor, "batch in height width"]) -> Float[Tensor, "batch out height_out width_out"]:
        if self.weight.dim() == 4 and self.gate is None and self.shift.dim() == 3 and self.shift[0].numel() == 1:
            return convolve(x, self.weight, self.stride, self.shift.flatten())
        return self.linear(x) + self.shift

    def linear(
        self, v: Float[Tensor, "*k rows in height width"]
    ) -> Float[Tensor, "*k rows_out out height_out width_out"]:
        """Apply the linear part, to tangents as well, which have one axis more."""
        if self.weight.dim() == 5:
            # A group of channels for each row, which has a kernel of its own.
            rows = len(self.weight)
            channels = v.expand(*v.shape[:-4], rows, *v.shape[-3:]).flatten(-4, -3)  # (*k, rows in, height, width)
            y = convolve(channels, self.weight.flatten(0, 1), self.stride, groups=rows).unflatten(-3, (rows, -1))
        else:
            y = convolve(v.flatten(0, -4), self.weight, self.stride).unflatten(0, v.shape[:-3])
        return y if self.gate is None else y * self.gate

    def modulated(self, gate: Float[Tensor, "batch out"], shift: Float[Tensor, "batch out"]) -> "ConvMap":
        """Return the map followed by y -> gate y + shift."""
        gate, shift = _over_pixels(gate), _over_pixels(shift)
        own = gate if self.gate is None else self.gate * gate
        return ConvMap(self.weight, own, self.shift * gate + shift, self.stride)


def convolve(images: Tensor, weight: Tensor, stride: int, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Convolve with zero padding 1; a stride of -2 is the transposed convolution of stride 2.

    Args:
        images: Images (n, groups in, height, width), or one without n.
        weight: Kernel (groups out, in, kernel, kernel), of a transposed convolution as well.
        stride: 1, 2 or -2.
        bias: Shift of the channels (groups out,).
        groups: Number of groups of channels that do not see each other.
    """
    if stride < 0:
        kernel = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # (groups in, out, kernel, kernel)
        return F.conv_transpose2d(images, kernel, bias, stride=-stride, padding=1, groups=groups)
    return F.conv2d(images, weight, bias, stride=stride, padding=1, groups=groups)


class Coefficients(nn.Conv2d):
    """Kernel (out, in, kernel, kernel) and bias of a convolution, whatever its stride."""

    bias: nn.Parameter


class TimeConv(nn.Module, ABC):
    """A convolution whose coefficients depend on time.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: 1 keeps the size of the image (kernel 3); 2 halves it and -2, a transposed
            convolution, doubles it (kernel 4). The padding is 1 throughout.
    """

    #: Whether the layer is defined only for times in [0, 1].
    unit_time: bool = False

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride
        self.kernel = 3 if stride == 1 else 4

    @abstractmethod
    def at(self, t: Time, size: tuple[int, ...]) -> ConvMap:
        """Return the map at a time, for images of a size (height, width)."""

    def forward(
        self, t: Time, x: Float[Tensor, "batch in height width"]
    ) -> Float[Tensor, "batch out height_out width_out"]:
        """Apply the layer."""
        return self.at(t, x.shape[2:])(x)

    def _coefficients(self, extra_channels: int = 0) -> Coefficients:
        """Return kernel and bias for the input with channels of time or coordinates."""
        return Coefficients(self.in_channels + extra_channels, self.out_channels, self.kernel)


class IgnoreConv(TimeConv):
    """K * x + b, whatever the time."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.linear = self._coefficients()

    def at(self, t: Time, size: tuple[int, ...]) -> ConvMap:
        """Return (K, 1, b)."""
        return ConvMap(self.linear.weight, None, _over_pixels(self.linear.bias), self.stride)


class ConcatConv(TimeConv):
    """K * [t; x] + b, the time as a constant extra first channel, which the zero padding ends at the border."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.linear = self._coefficients(1)

    def at(self, t: Time, size: tuple[int, ...]) -> ConvMap:
        """Split K into the time's kernel, which shifts, and the rest."""
        weight = self.linear.weight
        time = convolve(weight.new_ones(1, *size), weight[:, :1], self.stride)
        return ConvMap(weight[:, 1:], None, _over_pixels(self.linear.bias) + _scaled(t, time), self.stride)


class ConcatCoordConv(TimeConv):
    """K * [x; t; row; column] + b, the indices of the pixel as they are, 0 to height - 1 and width - 1."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.linear = self._coefficients(3)

    def at(self, t: Time, size: tuple[int, ...]) -> ConvMap:
        """Split K into the kernels of time and coordinates, which shift, and the rest."""
        own, of_time, of_place = self.linear.weight.split([self.in_channels, 1, 2], dim=1)
        axes = [torch.arange(length, dtype=own.dtype, device=own.device) for length in size]
        place = convolve(torch.stack(torch.meshgrid(*axes, indexing="ij")), of_place, self.stride)
        time = convolve(own.new_ones(1, *size), of_time, self.stride)
        return ConvMap(own, None, _over_pixels(self.linear.bias) + place + _scaled(t, time), self.stride)


class ConcatV2Conv(TimeConv):
    """K * x + b + v t: like :class:`ConcatConv`, with the time outside a spectrally normalised K."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.linear = self._coefficients()
        self.time_shift = nn.Linear(1, out_channels, bias=False)

    def at(self, t: Time, size: tuple[int, ...]) -> ConvMap:
        """Return (K, 1, b + v t)."""
        shift = _over_pixels(self.linear.bias) + _scaled(t, _over_pixels(self.time_shift.weight[:, 0]))
        return ConvMap(self.linear.weight, None, shift, self.stride)


class SquashConv(TimeConv):
    """(K * x + b) σ(a t + c), with a gate per channel."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.linear = self._coefficients()
        self.time_gate = nn.Linear(1, out_channels)

    def at(self, t: Time, size: tuple[int, ...]) -> ConvMap:
        """Return (K, σ, σ b)."""
        gate = torch.sigmoid(self.time_gate(time_column(t)))
        return _gated(t, self.linear.weight, gate, gate * self.linear.bias, self.stride)


class ConcatSquashConv(TimeConv):
    """(K * x + b) σ(a t + c) + v t, with gate and shift per channel."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.linear = self._coefficients()
        self.time_gate = nn.Linear(1, out_channels)
        self.time_shift = nn.Linear(1, out_channels, bias=False)

    def at(self, t: Time, size: tuple[int, ...]) -> ConvMap:
        """Return (K, σ, σ b + v t)."""
        column = time_column(t)
        gate = torch.sigmoid(self.time_gate(column))
        return _gated(t, self.linear.weight, gate, gate * self.linear.bias + self.time_shift(column), self.stride)


class BlendConv(TimeConv):
    """(1 - t) (K0 * x + b0) + t (K1 * x + b1), for times in [0, 1]."""

    unit_time = True

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.start, self.end = self._coefficients(), self._coefficients()

    def at(self, t: Time, size: tuple[int, ...]) -> ConvMap:
        """Interpolate both kernels and biases; a time per example gives a kernel per example."""
        weight = torch.lerp(self.start.weight, self.end.weight, t.reshape(t.shape + (1, 1, 1, 1)))
        shift = torch.lerp(self.start.bias, self.end.bias, t.reshape(t.shape + (1,)))
        return ConvMap(weight, None, _over_pixels(shift), self.stride)


class HyperConv(TimeConv):
    """K(t) * x + b(t), both affine in time.

    Starts near zero: all slopes are 0, all values at t = 0 are N(0, 0.01²).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.network = nn.Linear(1, out_channels * (in_channels * self.kernel**2 + 1))
        nn.init.zeros_(self.network.weight)
        nn.init.normal_(self.network.bias, std=0.01)

    def at(self, t: Time, size: tuple[int, ...]) -> ConvMap:
        """Return the output of the linear map of time, the entries of K first, then b."""
        out = self.network(time_column(t)).reshape(t.shape + (-1,))
        weight, shift = out.tensor_split([-self.out_channels], dim=-1)
        shape = (self.out_channels, self.in_channels, self.kernel, self.kernel)
        return ConvMap(weight.unflatten(-1, shape), None, _over_pixels(shift), self.stride)


def _gated(t: Time, weight: Tensor, gate: Tensor, shift: Tensor, stride: int) -> ConvMap:
    """Return the map of a gated layer; a gate that all rows share is folded into the kernel."""
    if t.dim() == 0:
        return ConvMap(gate.reshape(-1, 1, 1, 1) * weight, None, _over_pixels(shift.squeeze(0)), stride)
    return ConvMap(weight, _over_pixels(gate), _over_pixels(shift), stride)


def _scaled(t: Time, image: Float[Tensor, "out height width"]) -> Tensor:
    """Return t times an image: of its shape for a scalar time, (batch, out, height, width) otherwise."""
    return t * image if t.dim() == 0 else t.reshape(-1, 1, 1, 1) * image


def _over_pixels(channels: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows out 1 1"]:
    return channels[..., None, None]


class ConvStack(nn.Module):
    r"""Time-conditioned convolutions with activations between them, and gates and shifts from a context.

    The context enters every layer that an activation follows, as
    :math:`(1 + G_l c) \circ (\cdot) + S_l c` with an entry per channel.

    Args:
        channels: Channels of input, hidden layers and output.
        strides: Stride of each layer.
        layer: Kind of time-conditioned convolution.
        activation: Nonlinearity; each place gets a copy of its own.
        context_features: Size of the conditioning context; 0 for none.
        spectral_norm: Whether every kernel, as a matrix of output channels against the rest, is
            divided by its largest singular value.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        layer: type[TimeConv],
        activation: type[Activation],
        context_features: int = 0,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        hidden = channels[1:-1]
        layers = nn.ModuleList(
            layer(n_in, n_out, s) for (n_in, n_out), s in zip(pairwise(channels), strides, strict=True)
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


class ConvField(VectorField):
    r"""A convolutional network of images with time-conditioned layers.

    Args:
        event_shape: Shape of one event, (channels, height, width).
        hidden: Channels of the hidden layers.
        layer: Kind of time-conditioned convolution.
        activation: Nonlinearity between the layers.
        strides: Stride of each layer, one more than hidden layers: 1 keeps the size of the image,
            2 halves it, -2 doubles it. None for 1 throughout.
        context_features: Size of the conditioning context; 0 for none.
        spectral_norm: Whether every kernel is divided by its largest singular value.

    Raises:
        ConfigError: If there is no hidden layer, the strides do not fit, or the data are not images.
    """

    event_dims = 3

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        layer: type[TimeConv],
        activation: type[Activation],
        strides: Sequence[int] | None = None,
        context_features: int = 0,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__(event_shape)
        if not hidden or min(hidden) < 1:
            raise ConfigError(
                "Expected architecture.hidden with at least one positive number of channels, "
                f"got {list(hidden)}. Type architecture.hidden=[64,64,64]."
            )
        strides = [1] * (len(hidden) + 1) if strides is None else list(strides)
        _check_strides(strides, len(hidden) + 1, self.event_shape[1:])
        channels = [event_shape[0], *hidden, event_shape[0]]
        self.unit_time = layer.unit_time
        self.stack = ConvStack(channels, strides, layer, activation, context_features, spectral_norm)
        self._apart = 1 + max(_reach(strides, length) for length in self.event_shape[1:])

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (batch, channels, height, width)."""
        return self.stack(t, x, context)

    def value_and_jvp(
        self, t: Time, x: Tensor, tangents: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and Jacobian-vector products without an autograd transform."""
        return self.stack.value_and_jvp(t, x, tangents, context)

    @property
    def divergence_tangents(self) -> int:
        """Tangents of an exact divergence: (L + 1)² per channel with L layers of stride 1, whatever the image."""
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


def _size_after(stride: int, size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the size (height, width) of a layer's output for one of its input."""
    return tuple(length // 2 if stride == 2 else length * abs(stride) for length in size)


def _check_strides(strides: Sequence[int], layers: int, image: tuple[int, ...]) -> None:
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
