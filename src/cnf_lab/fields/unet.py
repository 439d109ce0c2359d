r"""A U-Net as a vector field of images, for objectives without a solve.

Every layer acts on a pair of the state and, where they are wanted, tangents
(:class:`Dual`), so that the network is written once and its Jacobian-vector products need no
autograd transform: they compile, and training differentiates through them like through anything.

References:
    Ronneberger et al., U-Net (2015), https://arxiv.org/abs/1505.04597.
    Ho et al., Denoising diffusion probabilistic models (2020), https://arxiv.org/abs/2006.11239.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnf_lab.errors import ConfigError
from cnf_lab.fields.activations import Activation
from cnf_lab.fields.base import Time, VectorField
from cnf_lab.fields.embedding import TimeEmbedding

GROUPS = 8  # of a normalisation, at most


@dataclass(frozen=True)
class Dual:
    """Images with tangents, in which they are differentiated.

    Attributes:
        value: Images (batch, channels, height, width).
        tangents: Directions (k, rows, channels, height, width), rows being the batch or 1 where all
            images share them; None for none.
    """

    value: Tensor
    tangents: Tensor | None = None

    def linear(self, function: Callable[[Tensor], Tensor], shift: Tensor | None = None) -> "Dual":
        """Apply a linear map of images, and add to the value what has no derivative."""
        tangents = self.tangents
        if tangents is not None:
            tangents = function(tangents.flatten(0, 1)).unflatten(0, tangents.shape[:2])
        value = function(self.value)
        return Dual(value if shift is None else value + shift, tangents)

    def scaled(self, factor: Tensor, shift: Tensor) -> "Dual":
        """Multiply by a factor and add a shift that do not depend on the images."""
        return Dual(self.value * factor + shift, None if self.tangents is None else self.tangents * factor)

    def __add__(self, other: "Dual") -> "Dual":
        tangents = None if self.tangents is None else self.tangents + cast(Tensor, other.tangents)
        return Dual(self.value + other.value, tangents)

    def through(self, activation: Activation) -> "Dual":
        """Apply a nonlinearity to every entry."""
        if self.tangents is None:
            return Dual(activation(self.value))
        value, slope = activation.value_and_slope(self.value)
        return Dual(value, self.tangents * slope)

    def joined(self, other: "Dual") -> "Dual":
        """Put the channels of both side by side."""
        tangents = None
        if self.tangents is not None and other.tangents is not None:
            rows = max(self.tangents.shape[1], other.tangents.shape[1])
            both = [part.expand(-1, rows, -1, -1, -1) for part in (self.tangents, other.tangents)]
            tangents = torch.cat(both, dim=2)
        return Dual(torch.cat([self.value, other.value], dim=1), tangents)


class Convolution(nn.Conv2d):
    """A 3×3 convolution with padding 1 of images and their tangents.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: 1, or 2 to halve the image, odd sides rounded up.
        zero: Whether it starts at zero.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, zero: bool = False) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=1)
        if zero:
            for parameter in self.parameters():
                nn.init.zeros_(parameter)

    def forward(self, images: Dual) -> Dual:  # type: ignore[override]
        """Convolve."""
        assert self.bias is not None
        if images.tangents is None:
            return Dual(super().forward(images.value))
        return images.linear(lambda v: F.conv2d(v, self.weight, None, self.stride, 1), self.bias[:, None, None])


class Normalise(nn.Module):
    r"""Group normalisation of each image, :math:`y = w (u - \mu)/\sigma + b`, and its derivative.

    .. math:: \dot y = \frac{w}{\sigma} \Big(\dot u - \overline{\dot u} - \hat u\, \overline{\hat u \dot u}\Big),
              \qquad \hat u = (u - \mu) / \sigma,

    with means over the channels of a group and all pixels. Statistics are float32 at least.

    Args:
        channels: Number of channels; the groups are their largest divisor up to 8.
        epsilon: Added to the variance.
    """

    def __init__(self, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.groups = next(n for n in range(min(GROUPS, channels), 0, -1) if channels % n == 0)
        self.epsilon = epsilon
        self.weight, self.bias = nn.Parameter(torch.ones(channels, 1, 1)), nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, images: Dual) -> Dual:
        """Normalise."""
        if images.tangents is None:
            weight, bias = self.weight.flatten(), self.bias.flatten()
            # Not by F.group_norm, which refuses a single image of one pixel.
            return Dual(torch.group_norm(images.value, self.groups, weight, bias, self.epsilon))
        u = self._grouped(images.value)
        centred = u - u.mean(dim=-1, keepdim=True)
        rate = (centred.square().mean(dim=-1, keepdim=True) + self.epsilon).rsqrt()
        hat, v = centred * rate, self._grouped(images.tangents)
        moved = rate * (v - v.mean(dim=-1, keepdim=True) - hat * (hat * v).mean(dim=-1, keepdim=True))
        shape = (images.tangents.shape[0], *images.value.shape)
        value = hat.reshape(images.value.shape) * self.weight + self.bias
        tangents = moved.reshape(shape) * self.weight
        return Dual(value.to(images.value.dtype), tangents.to(images.tangents.dtype))

    def _grouped(self, images: Tensor) -> Tensor:
        precise = images if images.dtype == torch.float64 else images.float()
        return precise.unflatten(-3, (self.groups, -1)).flatten(-3)  # (*, groups, channels / groups * pixels)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, gated and shifted between them by time and context.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        features: Size of the embedding of time and context.
        activation: Nonlinearity.
    """

    def __init__(self, in_channels: int, out_channels: int, features: int, activation: type[Activation]) -> None:
        super().__init__()
        self.before, self.first = Normalise(in_channels), Convolution(in_channels, out_channels)
        self.between, self.second = Normalise(out_channels), Convolution(out_channels, out_channels, zero=True)
        self.modulation = nn.Linear(features, 2 * out_channels)
        self.activations = nn.ModuleList([activation(), activation()])
        self.shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, images: Dual, embedding: Tensor) -> Dual:
        """Apply the block; the second convolution starts at zero, and the block as its shortcut."""
        gate, shift = self.modulation(embedding)[..., None, None].chunk(2, dim=1)
        first, second = cast(Sequence[Activation], self.activations)
        inner = self.between(self.first(self.before(images).through(first))).scaled(1 + gate, shift)
        kept = images if self.shortcut is None else images.linear(self.shortcut)
        return kept + self.second(inner.through(second))


class UNet(VectorField):
    r"""Residual blocks at ever lower resolutions and back, with skip connections across.

    Time enters every block by a learned embedding that gates and shifts its channels. Odd sides are
    rounded up on the way down and cut on the way up. The last convolution starts at zero, and the
    flow as the identity.

    Args:
        event_shape: Shape of one event, (channels, height, width).
        channels: Channels at full resolution.
        multipliers: Factors of the channels at each resolution, the first one full.
        blocks: Residual blocks at each resolution on the way down, and again on the way up.
        activation: Nonlinearity; smooth, for the field to be.
        embedding: Size of the embedding of time.
        context_features: Size of the conditioning context; 0 for none.

    Raises:
        ConfigError: If an option is out of range, or the data are not images.
    """

    event_dims = 3

    def __init__(
        self,
        event_shape: tuple[int, ...],
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        activation: type[Activation],
        embedding: int = 128,
        context_features: int = 0,
    ) -> None:
        super().__init__(event_shape)
        _check(channels, multipliers, blocks, embedding)
        self.time, features = TimeEmbedding(embedding), embedding + context_features
        widths = [channels * multiplier for multiplier in multipliers]
        self.first = Convolution(event_shape[0], channels)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        width, skips = channels, [channels]
        for level, out in enumerate(widths):
            for _ in range(blocks):
                self.down.append(ResidualBlock(width, out, features, activation))
                width = out
                skips.append(out)
            if level < len(widths) - 1:
                self.shrink.append(Convolution(width, width, stride=2))
                skips.append(width)
        self.middle = ResidualBlock(width, width, features, activation)
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(ResidualBlock(width + skips.pop(), out, features, activation))
                width = out
            if level > 0:
                self.grow.append(Convolution(width, width))
        self.norm, self.activation = Normalise(width), activation()
        self.last = Convolution(width, event_shape[0], zero=True)
        self.blocks, self.levels = blocks, len(widths)

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (batch, channels, height, width)."""
        return self._walk(t, Dual(x), context).value

    def value_and_jvp(
        self, t: Time, x: Tensor, tangents: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and Jacobian-vector products, layer by layer."""
        found = self._walk(t, Dual(x, tangents), context)
        assert found.tangents is not None
        return found.value, found.tangents.expand(-1, len(x), -1, -1, -1)

    def _walk(self, t: Time, images: Dual, context: Tensor | None) -> Dual:
        embedding = self.time(t)
        if context is not None:
            embedding = torch.cat([embedding.expand(len(context), -1), context], dim=1)
        images = self.first(images)
        skips, down, up = [images], iter(self.down), iter(self.up)
        for level in range(self.levels):
            for _ in range(self.blocks):
                images = next(down)(images, embedding)
                skips.append(images)
            if level < self.levels - 1:
                images = self.shrink[level](images)
                skips.append(images)
        images = self.middle(images, embedding)
        for level in range(self.levels):
            for _ in range(self.blocks + 1):
                images = next(up)(images.joined(skips.pop()), embedding)
            if level < self.levels - 1:
                images = self.grow[level](_doubled(images, skips[-1].value.shape[-2:]))
        return self.last(self.norm(images).through(self.activation))


def _check(channels: int, multipliers: Sequence[int], blocks: int, embedding: int) -> None:
    """Refuse numbers that are not positive."""
    for name, number, usual in (("channels", channels, 32), ("blocks", blocks, 1), ("embedding", embedding, 128)):
        if number < 1:
            raise ConfigError(
                f"Expected architecture.{name} of at least 1, got {number}. Type architecture.{name}={usual}."
            )
    if not multipliers or min(multipliers) < 1:
        raise ConfigError(
            "Expected architecture.multipliers with at least one positive factor, "
            f"got {list(multipliers)}. Type architecture.multipliers=[1,2,2]."
        )


def _doubled(images: Dual, size: torch.Size) -> Dual:
    """Repeat every pixel in both directions, and cut to a size (height, width)."""
    return images.linear(lambda v: F.interpolate(v, scale_factor=2.0, mode="nearest")[..., : size[0], : size[1]])
