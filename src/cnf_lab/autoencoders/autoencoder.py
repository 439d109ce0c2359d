r"""The variational autoencoder: an encoder, a posterior, a decoder and a likelihood.

.. math:: \log p(x) \ge \mathrm{ELBO}(x) = E_{q(z \mid x)}\left[\log p(x \mid z) + \log p(z) - \log q(z \mid x)\right]

References:
    Kingma & Welling, Auto-encoding variational Bayes (2014), https://arxiv.org/abs/1312.6114.
    Burda et al., Importance weighted autoencoders (2016), https://arxiv.org/abs/1509.00519.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnf_lab.autoencoders.likelihoods import PixelLikelihood, pixel_likelihood
from cnf_lab.autoencoders.networks import ConvDecoder, ConvEncoder
from cnf_lab.autoencoders.posteriors import Posterior
from cnf_lab.errors import ConfigError
from cnf_lab.flows import StandardNormal, Transform
from cnf_lab.flows.riders import Rider
from cnf_lab.ode import OdeSolver, SolveStats
from cnf_lab.shapes import Float
from cnf_lab.trace import DivergenceEstimator


@dataclass(frozen=True)
class ElboTerms:
    r"""What an ELBO is made of, in nats, for each of K draws and each image (draws, batch).

    Attributes:
        log_likelihood: log p(x \| z).
        log_prior: log p(z).
        log_start: log q(z0 \| x) of the Gaussian.
        log_det: log \|det\| of the posterior's flow.
        latent: z (draws, batch, D).
        integrals: What the riders of the flow measured, (draws, batch) for each.
        solves: What the solves cost.
        log_det_error: Standard error of log_det over probes, in evaluation mode; None where it is exact.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_start: Tensor
    log_det: Tensor
    latent: Tensor
    integrals: tuple[Tensor, ...] = ()
    solves: tuple[SolveStats, ...] = ()
    log_det_error: Tensor | None = None

    @property
    def kl(self) -> Tensor:
        r"""The term log q(z \| x) - log p(z), whose mean over draws estimates the divergence from the prior."""
        return self.log_start - self.log_det - self.log_prior

    @property
    def log_weight(self) -> Tensor:
        r"""Logarithms of importance weights, log p(x, z) - log q(z \| x); their means are ELBOs."""
        return self.log_likelihood - self.kl


class VariationalAutoencoder(nn.Module):
    r"""A generative model of images with a latent vector, and an approximation of its posterior.

    Put it in evaluation mode (``model.eval()``) before using its numbers: evaluation mode takes the
    evaluation solver and the exact divergence, and full precision whatever the autocast.

    Args:
        event_shape: Shape of one image.
        encoder: Map of images in [0, 1] to features.
        posterior: q(z \| x) from features.
        decoder: Map of latents to the parameters of the likelihood.
        likelihood: p(x \| z).
        latent: Size of the latent vector.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        encoder: nn.Module,
        posterior: Posterior,
        decoder: nn.Module,
        likelihood: PixelLikelihood,
        latent: int,
    ) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.encoder, self.posterior, self.decoder = encoder, posterior, decoder
        self.likelihood, self.prior = likelihood, StandardNormal((latent,))

    def terms(
        self,
        x: Float[Tensor, "batch *event"],
        draws: int = 1,
        generator: torch.Generator | None = None,
        riders: Sequence[Rider] = (),
    ) -> ElboTerms:
        r"""Draw latents for images, and return what an ELBO is made of.

        Args:
            x: Images as the data give them, whole numbers (batch, \*event).
            draws: Draws K for each image.
            generator: Source of the draws and of the probes of the posterior.
            riders: What rides along the posterior's flow.

        Raises:
            ValueError: If the shape of the images does not fit.
        """
        self.check(x)
        with self._precision(x):
            features = self.encoder(self.likelihood.scaled(x)).to(x.dtype)
        drawn = self.posterior(features, draws, generator, riders)  # which knows what it may do in low precision
        z = drawn.mapped.value
        with self._precision(x):
            log_likelihood = self.likelihood.log_prob(self.decoder(z), x.repeat(draws, *[1] * (x.dim() - 1)))

        def apart(values: Tensor) -> Tensor:
            return values.unflatten(0, (draws, len(x)))

        error = drawn.mapped.log_det_error
        return ElboTerms(
            apart(log_likelihood).to(z),
            apart(self.prior.log_prob(z)),
            apart(drawn.log_start),
            apart(drawn.mapped.log_det),
            apart(z),
            tuple(map(apart, drawn.mapped.integrals)),
            drawn.mapped.solves,
            None if error is None else apart(error),
        )

    def elbo(
        self, x: Float[Tensor, "batch *event"], draws: int = 1, generator: torch.Generator | None = None
    ) -> Float[Tensor, " batch"]:
        """Return the ELBO of each image in nats, a mean over draws."""
        return self.terms(x, draws, generator).log_weight.mean(dim=0)

    def decode(self, z: Float[Tensor, "batch d"]) -> Float[Tensor, "batch *event"]:
        """Return the expected images of latents."""
        return self.likelihood.mean(self.decoder(z))

    def latents(
        self, x: Float[Tensor, "batch *event"], draws: int = 1, generator: torch.Generator | None = None
    ) -> Float[Tensor, "draws batch d"]:
        """Draw from the posterior of each image."""
        self.check(x)
        features = self.encoder(self.likelihood.scaled(x))
        return self.posterior(features, draws, generator).mapped.value.unflatten(0, (draws, len(x)))

    def sample(
        self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Float[Tensor, "n *event"]:
        """Draw n images without a gradient.

        Args:
            n: Number of images.
            generator: Source of latents and pixels.
            temperature: Deviation of the latents; below 1 they keep to the likelier ones.
        """
        with torch.no_grad():
            latent = temperature * self.prior.sample(n, generator)
            return self.likelihood.sample(self.decoder(latent), generator)

    def set_evaluation(self, solver: OdeSolver, divergence: DivergenceEstimator, autocast: bool = False) -> None:
        """Choose the solver and the divergence estimator of evaluation mode in every block of the posterior.

        Args:
            solver: The solver.
            divergence: The divergence estimator.
            autocast: Whether fields honour an autocast around them, as in training.
        """
        for part in self.modules():
            if isinstance(part, Transform):
                part.set_evaluation(solver, divergence, autocast)

    def check(self, x: Tensor) -> None:
        """Refuse images of another shape."""
        if tuple(x.shape[1:]) != self.event_shape:
            expected = ", ".join(("batch", *map(str, self.event_shape)))
            raise ValueError(f"Expected images with shape ({expected}), got {tuple(x.shape)}. Reshape the input.")

    def _precision(self, x: Tensor) -> torch.autocast:
        device = x.device.type
        return torch.autocast(device, enabled=self.training and torch.is_autocast_enabled(device))


def variational_autoencoder(
    event_shape: tuple[int, ...],
    context_features: int,
    posterior: Callable[..., Transform],
    levels: int = 2,
    latent: int = 64,
    features: int = 256,
) -> VariationalAutoencoder:
    """Build the published gated convolutional autoencoder with a posterior.

    Args:
        event_shape: Shape of one image, (channels, height, width).
        context_features: Number of conditioning columns; autoencoders have none.
        posterior: Makes the posterior's flow from ``dimension`` and ``context_features``.
        levels: Number of values of a pixel: 2 for a Bernoulli likelihood, more for classes.
        latent: Size of the latent vector.
        features: Size of the encoder's features.

    Raises:
        ConfigError: If the data are not images, or an option is out of range.
    """
    if context_features:
        raise ConfigError("Expected images without a context for model=vae, got one. Leave out dataset.context.")
    likelihood = pixel_likelihood(levels)
    encoder, decoder = ConvEncoder(event_shape, features), ConvDecoder(event_shape, latent, likelihood.outputs)
    flow = posterior(dimension=latent, context_features=features)
    own = Posterior(features, latent, flow, likelihood.variance_bounds)
    return VariationalAutoencoder(event_shape, encoder, own, decoder, likelihood, latent)
