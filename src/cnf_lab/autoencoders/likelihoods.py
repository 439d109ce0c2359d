"""Likelihoods of whole-number pixels given what a decoder puts out."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from cnf_lab.errors import ConfigError
from cnf_lab.shapes import Float


class PixelLikelihood(ABC):
    r"""p(x \| z), a distribution of pixels that are independent given the decoder's outputs."""

    #: Number L of values of a pixel.
    levels: int
    #: Outputs of the decoder per entry of an image.
    outputs: int
    #: Least and greatest variance of the posterior's Gaussian, where the published models bound it.
    variance_bounds: tuple[float, float] | None = None

    def scaled(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Return pixels in [0, 1], as encoders get them."""
        return x / (self.levels - 1)

    @abstractmethod
    def log_prob(self, parameters: Tensor, x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        r"""Return log p(x \| z) in nats per image, in float32 at least.

        Args:
            parameters: The decoder's outputs (batch, outputs, \*event).
            x: Pixels.
        """

    @abstractmethod
    def mean(self, parameters: Tensor) -> Float[Tensor, "batch *event"]:
        """Return the expected pixels."""

    @abstractmethod
    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Float[Tensor, "batch *event"]:
        """Draw pixels."""


class Bernoulli(PixelLikelihood):
    """Pixels 0 or 1; the decoder's output is the log-odds of 1.

    The original clamps probabilities to [1e-5, 1 - 1e-5] in its evaluation by importance
    sampling; log-odds need none.
    """

    levels = 2
    outputs = 1

    def log_prob(self, parameters: Tensor, x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        """Return minus the binary cross-entropy, summed over pixels."""
        logits = _full(parameters).squeeze(1)
        return -F.binary_cross_entropy_with_logits(logits, x.to(logits), reduction="none").flatten(1).sum(dim=1)

    def mean(self, parameters: Tensor) -> Float[Tensor, "batch *event"]:
        """Return the probabilities of 1."""
        return torch.sigmoid(_full(parameters).squeeze(1))

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Float[Tensor, "batch *event"]:
        """Draw zeros and ones."""
        return torch.bernoulli(self.mean(parameters), generator=generator)


class Categorical(PixelLikelihood):
    """Pixels 0..L-1, with a class for each value; the decoder's outputs are logits.

    Args:
        levels: L.

    Raises:
        ConfigError: If there are fewer than two.
    """

    variance_bounds = (0.01, 7.0)  # of the published models of Frey Faces

    def __init__(self, levels: int = 256) -> None:
        if levels < 2:
            raise ConfigError(f"Expected recipe.levels of at least 2, got {levels}. Type recipe.levels=256.")
        self.levels = self.outputs = levels

    def log_prob(self, parameters: Tensor, x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        """Return minus the cross-entropy, summed over pixels."""
        return -F.cross_entropy(_full(parameters), x.long(), reduction="none").flatten(1).sum(dim=1)

    def mean(self, parameters: Tensor) -> Float[Tensor, "batch *event"]:
        """Return the expected values."""
        probabilities = _full(parameters).softmax(dim=1)
        values = torch.arange(self.levels, dtype=probabilities.dtype, device=probabilities.device)
        return torch.tensordot(probabilities, values, dims=([1], [0]))

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Float[Tensor, "batch *event"]:
        """Draw values."""
        probabilities = _full(parameters).softmax(dim=1).movedim(1, -1)
        drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
        return drawn.reshape(probabilities.shape[:-1]).to(probabilities)


def pixel_likelihood(levels: int) -> PixelLikelihood:
    """Return the usual likelihood of pixels with L values: Bernoulli for 2, a class for each beyond."""
    return Bernoulli() if levels == 2 else Categorical(levels)


def _full(parameters: Tensor) -> Tensor:
    """Leave low precision: a sum over hundreds of pixels would lose digits."""
    return parameters if parameters.dtype == torch.float64 else parameters.float()
