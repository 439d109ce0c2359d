r"""The gated convolutional encoder and decoder of the published comparisons.

References:
    van den Berg et al., Sylvester normalizing flows for variational inference (2018) and its code,
    https://arxiv.org/abs/1803.05649; Grathwohl et al., FFJORD (2019) took them over.
"""

import torch
from torch import Tensor, nn

from cnf_lab.errors import ConfigError
from cnf_lab.shapes import Float


class GatedConv(nn.Module):
    r"""A gated convolution, :math:`(W * x + b) \circ \sigma(V * x + c)`, with no other activation.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        kernel: Size of the kernel.
        stride: Step of the output on the input.
        padding: Zeros on every side.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int | tuple[int, int], stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        # Value and gate in one product.
        self.both = nn.Conv2d(channels_in, 2 * channels_out, kernel, stride, padding)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c2 h2 w2"]:
        """Apply the gated convolution."""
        return nn.functional.glu(self.both(x), dim=1)


class GatedConvTranspose(nn.Module):
    """A gated transposed convolution; see :class:`GatedConv`.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        kernel: Size of the kernel.
        stride: Step of the input on the output.
        padding: Rows and columns that are left out on every side of the output.
        output_padding: Rows and columns that are added to it at the bottom and at the right.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int = 0,
        output_padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.both = nn.ConvTranspose2d(channels_in, 2 * channels_out, kernel, stride, padding, output_padding)
        with torch.no_grad():  # torch goes by the number of outputs here, and takes both halves for one
            for parameter in self.both.parameters():
                parameter.mul_(2**0.5)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c2 h2 w2"]:
        """Apply the gated transposed convolution."""
        return nn.functional.glu(self.both(x), dim=1)


class ConvEncoder(nn.Sequential):
    """Six gated convolutions from an image to a vector of features, two of them with stride 2.

    Args:
        event_shape: Shape of one image, (channels, height, width).
        features: Size of the vector.

    Raises:
        ConfigError: If the data are not images, or there is no feature.
    """

    def __init__(self, event_shape: tuple[int, ...], features: int = 256) -> None:
        channels, heights, widths = sizes(event_shape)
        if features < 1:
            raise ConfigError(f"Expected model.features of at least 1, got {features}. Type model.features=256.")
        super().__init__(
            GatedConv(channels, 32, 5, 1, 2),
            GatedConv(32, 32, 5, 2, 2),
            GatedConv(32, 64, 5, 1, 2),
            GatedConv(64, 64, 5, 2, 2),
            GatedConv(64, 64, 5, 1, 2),
            GatedConv(64, features, (heights[2], widths[2])),
            nn.Flatten(),
        )


class ConvDecoder(nn.Module):
    """Six gated transposed convolutions from a latent vector to an image, and a head of plain ones.

    With one output per entry the head is a 1×1 convolution; with more, one of 5×5 and one of 1×1,
    and nothing between them.

    Args:
        event_shape: Shape of one image, (channels, height, width).
        latent: Size of the latent vector.
        outputs: Outputs per entry of the image.

    Raises:
        ConfigError: If the data are not images, or the latent has no entry.
    """

    def __init__(self, event_shape: tuple[int, ...], latent: int = 64, outputs: int = 1) -> None:
        super().__init__()
        channels, heights, widths = sizes(event_shape)
        if latent < 1:
            raise ConfigError(f"Expected model.latent of at least 1, got {latent}. Type model.latent=64.")
        # A stride of 2 makes 2h - 1 rows of h; one more where there were 2h.
        grown = [(heights[k] - 2 * heights[k + 1] + 1, widths[k] - 2 * widths[k + 1] + 1) for k in (1, 0)]
        self.latent, self.outputs, self.event_shape = latent, outputs, tuple(event_shape)
        self.body = nn.Sequential(
            GatedConvTranspose(latent, 64, (heights[2], widths[2])),
            GatedConvTranspose(64, 64, 5, 1, 2),
            GatedConvTranspose(64, 32, 5, 2, 2, grown[0]),
            GatedConvTranspose(32, 32, 5, 1, 2),
            GatedConvTranspose(32, 32, 5, 2, 2, grown[1]),
            GatedConvTranspose(32, 32, 5, 1, 2),
        )
        self.head = (
            nn.Conv2d(32, channels, 1)
            if outputs == 1
            else nn.Sequential(nn.Conv2d(32, outputs, 5, 1, 2), nn.Conv2d(outputs, outputs * channels, 1))
        )

    def forward(self, z: Float[Tensor, "batch d"]) -> Float[Tensor, "batch outputs c h w"]:
        """Return the outputs for each entry of the image."""
        return self.head(self.body(z.reshape(len(z), -1, 1, 1))).unflatten(1, (self.outputs, -1))


def sizes(event_shape: tuple[int, ...]) -> tuple[int, list[int], list[int]]:
    """Return channels, and heights and widths of an image before, between and after two strides of 2."""
    if len(event_shape) != 3:
        raise ConfigError(
            f"Expected images for model=vae, got data of event shape {tuple(event_shape)}. "
            "Type model=density, or dataset=omniglot."
        )
    channels, height, width = event_shape
    halves = [[-(-side // 2**k) for k in range(3)] for side in (height, width)]
    return channels, halves[0], halves[1]
