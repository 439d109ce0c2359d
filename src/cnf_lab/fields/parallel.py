"""A field that looks at an image at several scales side by side."""

from collections.abc import Sequence
from functools import reduce
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from cnf_lab.errors import ConfigError
from cnf_lab.fields.activations import Activation
from cnf_lab.fields.base import Time, VectorField
from cnf_lab.fields.conv_layers import TimeConv
from cnf_lab.fields.convolutional import ConvStack, check_hidden
from cnf_lab.fields.squeeze import squeeze, unsqueeze


class ParallelMultiscale(VectorField):
    r"""The sum of convolutional networks on the image squeezed 0, 1, ... times.

    .. math:: f(t, x) = \sum_{s=0}^{S-1} \mathrm{unsqueeze}^s\, f_s(t, \mathrm{squeeze}^s x)

    Images whose sides :math:`2^{S-1}` does not divide are filled up with zeros at the right and the
    bottom, and cut again; the original refuses them.

    Args:
        event_shape: Shape of one event, (channels, height, width).
        hidden: Channels of the hidden layers of each network.
        convolution: Kind of time-conditioned convolution.
        activation: Nonlinearity between the layers.
        scales: Number S of networks.
        context_features: Size of the conditioning context; 0 for none.
        spectral_norm: Whether every kernel is divided by its largest singular value.

    Raises:
        ConfigError: If there is no network or no hidden layer, or the data are not images.

    References:
        Grathwohl et al., FFJORD (2019), the code's parallel multiscale network.
    """

    event_dims = 3

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        convolution: type[TimeConv],
        activation: type[Activation],
        scales: int = 4,
        context_features: int = 0,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__(event_shape)
        check_hidden(hidden)
        if scales < 1:
            raise ConfigError(f"Expected architecture.scales of at least 1, got {scales}. Type architecture.scales=4.")
        self.unit_time = convolution.unit_time
        widths = [event_shape[0] * 4**scale for scale in range(scales)]
        strides = [1] * (len(hidden) + 1)
        stacks = nn.ModuleList(
            ConvStack([n, *hidden, n], strides, convolution, activation, False, context_features, spectral_norm)
            for n in widths
        )
        self.stacks = cast(Sequence[ConvStack], stacks)
        side = 2 ** (scales - 1)
        height, width = self.event_shape[1:]
        self._padding = (0, -width % side, 0, -height % side)  # left, right, top, bottom

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return dx/dt (batch, channels, height, width)."""
        padded = F.pad(x, self._padding)
        parts = [stack(t, _squeezed(padded, scale), context) for scale, stack in enumerate(self.stacks)]
        return self._cut(_joined(parts))

    def value_and_jvp(
        self, t: Time, x: Tensor, tangents: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and Jacobian-vector products without an autograd transform."""
        x, tangents = F.pad(x, self._padding), F.pad(tangents, self._padding)
        parts = [
            stack.value_and_jvp(t, _squeezed(x, scale), _squeezed(tangents, scale), context)
            for scale, stack in enumerate(self.stacks)
        ]
        values, products = zip(*parts, strict=True)
        return self._cut(_joined(values)), self._cut(_joined(products))

    def _cut(self, images: Tensor) -> Tensor:
        return images[..., : self.event_shape[1], : self.event_shape[2]]


def _squeezed(images: Tensor, times: int) -> Tensor:
    for _ in range(times):
        images = squeeze(images)
    return images


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of parts, the k-th unsqueezed k times."""
    return reduce(lambda total, part: part + unsqueeze(total), reversed(parts))
