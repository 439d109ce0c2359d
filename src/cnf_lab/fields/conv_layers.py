r"""Time-conditioned convolutions of images.

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
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnf_lab.fields.base import Time, time_column
from cnf_lab.fields.embedding import TimeEmbedding
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
        gate, shift = over_pixels(gate), over_pixels(shift)
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

    def zero(self) -> None:
        """Set the parameters so that the output is zero at all times, and can be learned from there."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

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
        return ConvMap(self.linear.weight, None, over_pixels(self.linear.bias), self.stride)


class ConcatConv(TimeConv):
    """K * [t; x] + b, the time as a constant extra first channel, which the zero padding ends at the border."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.linear = self._coefficients(1)

    def at(self, t: Time, size: tuple[int, ...]) -> ConvMap:
        """Split K into the time's kernel, which shifts, and the rest."""
        weight = self.linear.weight
        time = convolve(weight.new_ones(1, *size), weight[:, :1], self.stride)
        return ConvMap(weight[:, 1:], None, over_pixels(self.linear.bias) + _scaled(t, time), self.stride)


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
        return ConvMap(own, None, over_pixels(self.linear.bias) + place + _scaled(t, time), self.stride)


class ConcatV2Conv(TimeConv):
    """K * x + b + v t: like :class:`ConcatConv`, with the time outside a spectrally normalised K."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.linear = self._coefficients()
        self.time_shift = nn.Linear(1, out_channels, bias=False)

    def at(self, t: Time, size: tuple[int, ...]) -> ConvMap:
        """Return (K, 1, b + v t)."""
        shift = over_pixels(self.linear.bias) + _scaled(t, over_pixels(self.time_shift.weight[:, 0]))
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
        return ConvMap(weight, None, over_pixels(shift), self.stride)


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
        return ConvMap(weight.unflatten(-1, shape), None, over_pixels(shift), self.stride)


class EmbeddedConv(TimeConv):
    """(1 + g(e)) (K * x + b) + s(e), with e a learned embedding of time, g and s linear in it by channel.

    Starts as K * x + b at all times.
    """

    width = 64

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.linear = self._coefficients()
        self.embedding = TimeEmbedding(self.width)
        self.modulation = nn.Linear(self.width, 2 * out_channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def at(self, t: Time, size: tuple[int, ...]) -> ConvMap:
        """Return (K, 1 + g, (1 + g) b + s)."""
        change, shift = self.modulation(self.embedding(t)).chunk(2, dim=-1)
        return _gated(t, self.linear.weight, 1 + change, (1 + change) * self.linear.bias + shift, self.stride)

    def zero(self) -> None:
        """Set K and b to zero; an embedding of zeros could not learn."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


def _gated(t: Time, weight: Tensor, gate: Tensor, shift: Tensor, stride: int) -> ConvMap:
    """Return the map of a gated layer; a gate that all rows share is folded into the kernel."""
    if t.dim() == 0:
        return ConvMap(gate.reshape(-1, 1, 1, 1) * weight, None, over_pixels(shift.squeeze(0)), stride)
    return ConvMap(weight, over_pixels(gate), over_pixels(shift), stride)


def _scaled(t: Time, image: Float[Tensor, "out height width"]) -> Tensor:
    """Return t times an image: of its shape for a scalar time, (batch, out, height, width) otherwise."""
    return t * image if t.dim() == 0 else t.reshape(-1, 1, 1, 1) * image


def over_pixels(channels: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows out 1 1"]:
    """Return values by channel as images of one pixel, which broadcast."""
    return channels[..., None, None]
