r"""The multiscale flow of images: blocks that see an image squeezed, and without what was factored out.

At every scale but the last come blocks on the image, then blocks on the squeezed image, and half of
its channels leave to the base; the last scale has blocks only. Nothing is rearranged for good: a
block takes the part that it sees out of the image and puts the result back in its place
(:class:`View`). So states and latents have the shape of the image at all times, the flow is a plain
chain, and what was factored out stays where it is.

References:
    Dinh et al., Density estimation using Real NVP (2017), section 3.6, https://arxiv.org/abs/1605.08803.
    Grathwohl et al., FFJORD (2019), section 4.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cnf_lab.errors import ConfigError
from cnf_lab.fields import VectorField
from cnf_lab.fields.squeeze import squeeze, unsqueeze
from cnf_lab.flows.base import Chain, Flow, Mapped, Transform
from cnf_lab.flows.base_distribution import StandardNormal
from cnf_lab.flows.continuous import ContinuousFlow
from cnf_lab.flows.dequantise import Dequantiser
from cnf_lab.flows.preprocess import NoPreprocess, Preprocess
from cnf_lab.flows.riders import Rider
from cnf_lab.ode import OdeSolver
from cnf_lab.trace import DivergenceEstimator

SMALLEST = 4  # an image whose shorter side is at least this long makes a scale, as in the original


@dataclass(frozen=True)
class View:
    """The part of an image that a block of a multiscale flow sees.

    Attributes:
        scale: How often the image has been squeezed and half of its channels factored out.
        squeezed: Whether it is squeezed once more.
    """

    scale: int = 0
    squeezed: bool = False

    def take(self, image: Tensor) -> Tensor:
        """Return the part, (batch, channels', height', width')."""
        for _ in range(self.scale):
            image = squeeze(image).chunk(2, dim=1)[0]
        return squeeze(image) if self.squeezed else image

    def put(self, image: Tensor, part: Tensor) -> Tensor:
        """Return the image with the part replaced."""
        if self.scale == 0:
            return unsqueeze(part) if self.squeezed else part
        seen, factored_out = squeeze(image).chunk(2, dim=1)
        return unsqueeze(torch.cat([replace(self, scale=self.scale - 1).put(seen, part), factored_out], dim=1))

    def shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the part of an image of a shape (channels, height, width)."""
        channels, height, width = event_shape
        size, shrunk = 2**self.scale, 2 if self.squeezed else 1
        # Squeezing quadruples the channels, and half of them leave.
        return (channels * size * shrunk**2, height // size // shrunk, width // size // shrunk)


class Viewed(Transform):
    """A transform of the part of an image that a view shows; the rest stays as it is.

    Args:
        transform: The transform of the part.
        view: The view.
    """

    def __init__(self, transform: Transform, view: View) -> None:
        super().__init__()
        self.transform, self.view = transform, view

    def pull_back(
        self,
        x: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        integrands: Sequence[Rider] = (),
    ) -> Mapped:
        """Map the part to latent."""
        mapped = self.transform.pull_back(self.view.take(x), context, generator, integrands)
        return replace(mapped, value=self.view.put(x, mapped.value))

    def push_forward(
        self,
        z: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        with_log_det: bool = True,
    ) -> Mapped:
        """Map the part to data."""
        mapped = self.transform.push_forward(self.view.take(z), context, generator, with_log_det)
        return replace(mapped, value=self.view.put(z, mapped.value))

    def trajectory(self, z: Tensor, context: Tensor | None = None, points: int = 2) -> list[Tensor]:
        """Return the images on the way."""
        return [self.view.put(z, part) for part in self.transform.trajectory(self.view.take(z), context, points)]

    def extra_repr(self) -> str:
        """Describe the view for ``print(flow)``."""
        return f"scale={self.view.scale}, squeezed={self.view.squeezed}"


def published_scales(event_shape: tuple[int, ...]) -> int:
    """Return how many scales the original takes: 3 for 28×28, 4 for 32×32."""
    side, scales = min(event_shape[1:]), 0
    while side >= SMALLEST:
        side, scales = side // 2, scales + 1
    return max(scales, 1)


def views(scales: int, blocks: int) -> list[View]:
    """Return the views of the blocks in order: N before and N after the squeeze, N at the last scale.

    Args:
        scales: Number of scales.
        blocks: N.
    """
    inner = [View(scale, squeezed) for scale in range(scales - 1) for squeezed in (False, True)]
    return [view for view in [*inner, View(scales - 1)] for _ in range(blocks)]


def factored_out(images: Tensor, scales: int) -> list[Tensor]:
    """Return what leaves at each scale, in order; flattened and joined it is the original's latent vector.

    Args:
        images: Latent images (batch, channels, height, width).
        scales: Number of scales.
    """
    parts = []
    for _ in range(scales - 1):
        images, leaving = squeeze(images).chunk(2, dim=1)
        parts.append(leaving)
    return [*parts, images]


def image_flow(
    event_shape: tuple[int, ...],
    context_features: int,
    field: Callable[..., VectorField],
    solver: OdeSolver,
    evaluation_solver: OdeSolver,
    divergence: DivergenceEstimator,
    evaluation_divergence: DivergenceEstimator,
    preprocess: Sequence[Callable[..., Preprocess]],
    dequantisation: Callable[..., Dequantiser],
    normalisation: Callable[..., Transform] | None = None,
    scales: int | None = None,
    blocks: int = 2,
    end_time: float = 1.0,
    train_end_time: bool = False,
) -> Flow:
    """Build a density of images: dequantisation, fixed layers, and continuous flows at one scale or several.

    Normalisation, if asked for, comes before every block.

    Args:
        event_shape: Shape of one image, (channels, height, width).
        context_features: Number of conditioning columns; image flows have none.
        field: Makes a vector field from ``event_shape``.
        solver: Solver in training mode.
        evaluation_solver: Solver in evaluation mode.
        divergence: Divergence estimator in training mode.
        evaluation_divergence: Divergence estimator in evaluation mode.
        preprocess: Make the fixed layers from ``event_shape``, the first one next to the data.
        dequantisation: Makes the dequantiser from ``event_shape``.
        normalisation: Makes a normalisation layer from ``event_shape``.
        scales: Number of scales; 1 is a single-scale flow, None takes the original's number.
        blocks: Number of continuous flows before and after each squeeze.
        end_time: End time T of each block.
        train_end_time: Whether the end times are trained.

    Raises:
        ConfigError: If the data are not images, their size does not fit the scales, or there are no blocks.
    """
    scales = _checked(event_shape, context_features, scales, blocks)
    transforms: list[Transform] = [make(event_shape=event_shape) for make in preprocess or [NoPreprocess]]
    for view in views(scales, blocks):
        shape = view.shape(event_shape)
        block: Transform = ContinuousFlow(
            field(event_shape=shape, context_features=0),
            solver,
            divergence,
            evaluation_solver,
            evaluation_divergence,
            end_time,
            train_end_time,
        )
        layers = [block] if normalisation is None else [normalisation(event_shape=shape), block]
        transforms += [layer if view == View() else Viewed(layer, view) for layer in layers]
    return Flow(Chain(transforms), StandardNormal(event_shape), dequantiser=dequantisation(event_shape=event_shape))


def _checked(event_shape: tuple[int, ...], context_features: int, scales: int | None, blocks: int) -> int:
    """Return the number of scales, or refuse what does not fit."""
    if len(event_shape) != 3:
        raise ConfigError(
            f"Expected images for model=image, got data of event shape {tuple(event_shape)}. "
            "Type model=density, or dataset=mnist."
        )
    if context_features:
        raise ConfigError("Expected images without a context for model=image, got one. Leave out dataset.context.")
    if blocks < 1:
        raise ConfigError(f"Expected model.blocks of at least 1, got {blocks}. Type model.blocks=2.")
    scales = published_scales(event_shape) if scales is None else scales
    _, height, width = event_shape
    most = 1
    while height % 2**most == width % 2**most == 0:
        most += 1
    if not 1 <= scales <= most:
        raise ConfigError(
            f"Expected model.scales of 1 to {most} for images of {height}x{width}, which are halved at every scale "
            f"but the last, got {scales}. Type model.scales={most}."
        )
    return scales
