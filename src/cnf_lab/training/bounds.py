r"""Bounds of the log-likelihood by an autoencoder: the ELBO, and the importance-weighted bound.

.. math:: \log p(x) \ge E\left[\log \frac1K \sum_k w_k\right], \qquad
          w_k = \frac{p(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q(\cdot \mid x),

which is the ELBO with K = 1 and tightens with K (Burda et al. 2016, https://arxiv.org/abs/1509.00519).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.data import Batch, Rows
from cnf_lab.ode import SolveStats
from cnf_lab.training.likelihoods import (
    error_of_mean,
    error_over_draws,
    jackknife_error,
    log_mean,
    mean_with_error,
    mixed,
    nats_in_bits,
    sample_size,
)
from cnf_lab.training.shares import Shares, in_order

ACTIVE = 0.01  # variance of a latent's posterior mean over images beyond which it is active (Burda et al.)


@dataclass(frozen=True)
class Elbos:
    r"""ELBOs of images, drawn K times.

    Attributes:
        log_weight: log p(x, z) - log q(z \| x) in nats (K, images), float64; its mean is the ELBO.
        reconstruction: -log p(x \| z) (K, images).
        latent_mean: Mean of the draws of each latent (images, D).
        latent_variance: Variance of the draws of each latent (images, D); NaN with one draw.
        trace_error: Standard errors of the log-weights over probes (K, images); None where divergences are exact.
        nfe: Evaluations for each batch and draw.
    """

    log_weight: Tensor
    reconstruction: Tensor
    latent_mean: Tensor
    latent_variance: Tensor
    trace_error: Tensor | None
    nfe: tuple[int, ...]


@torch.no_grad()
def elbos(
    model: VariationalAutoencoder,
    rows: Rows,
    batch_size: int,
    limit: int | None,
    draws: int,
    seed: int,
    shares: Shares | None = None,
) -> Elbos:
    """Return the ELBOs of images by a model in evaluation mode.

    Random numbers of a batch come from (seed, draw, its number): more draws leave the first ones as
    they were, and another solver or precision meets the same draws and probes.

    Args:
        model: The autoencoder.
        rows: The images.
        batch_size: Images per solve.
        limit: Only the first images; None for all.
        draws: Draws K of the posterior.
        seed: Seed of draws and probes.
        shares: The processes that share the batches; None for this one alone.
    """
    anchor = model.prior.sample(0)

    def one(number: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[int]]:
        found = [model.terms(batch.x.to(anchor), 1, _generator(anchor, seed, draw, number)) for draw in range(draws)]
        weights = torch.cat([term.log_weight for term in found]).double().cpu()
        parts = -torch.cat([term.log_likelihood for term in found]).double().cpu()
        latents = torch.cat([term.latent for term in found]).double().cpu()
        errors = [term.log_det_error.double().cpu() for term in found if term.log_det_error is not None]
        return weights, parts, latents, errors, [SolveStats.total(term.solves).nfe_forward for term in found]

    found = (shares or Shares()).by_batch(rows, batch_size, limit, one)
    weights, parts, latents, errors, nfe = zip(*found, strict=True)
    drawn = in_order(latents, dim=1)
    variance = drawn.var(dim=0) if draws > 1 else torch.full_like(drawn[0], torch.nan)
    spread = in_order([torch.cat(own) for own in errors], dim=1) if errors[0] else None
    evaluations = tuple(sum(nfe, []))
    return Elbos(in_order(weights, dim=1), in_order(parts, dim=1), drawn.mean(dim=0), variance, spread, evaluations)


@dataclass(frozen=True)
class ImportanceWeighted:
    r"""Importance-weighted bounds of images.

    Attributes:
        bound: :math:`\log \tfrac1K \sum_k w_k` in nats (images,), float64.
        sample_size: Effective number of draws, :math:`(\sum_k w_k)^2 / \sum_k w_k^2` of K (images,).
        error: Standard error of the bound over draws (images,); NaN with one draw.
    """

    bound: Tensor
    sample_size: Tensor
    error: Tensor


@torch.no_grad()
def importance_weighted(
    model: VariationalAutoencoder,
    rows: Rows,
    draws: int,
    pass_rows: int,
    limit: int | None,
    seed: int,
    shares: Shares | None = None,
) -> ImportanceWeighted:
    """Return importance-weighted bounds with K draws, in passes of a size that fits the memory.

    Args:
        model: The autoencoder, in evaluation mode.
        rows: The images.
        draws: K.
        pass_rows: Latents that are drawn and decoded at once.
        limit: Only the first images; None for all.
        seed: Seed of the draws.
        shares: The processes that share the images; None for this one alone.
    """
    anchor = model.prior.sample(0)
    together = max(1, pass_rows // draws)  # images in a pass, where all draws of some fit
    per_pass = min(draws, pass_rows)

    def one(number: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        x, drawn = batch.x.to(anchor), []
        for done in range(0, draws, per_pass):
            # Another word than those of the ELBO's draws: the two are independent.
            generator = _generator(anchor, seed, 1, number, done)
            drawn.append(model.terms(x, min(per_pass, draws - done), generator).log_weight.double().cpu())
        log_weight = torch.cat(drawn)
        return log_mean(log_weight), sample_size(log_weight), jackknife_error(log_weight)

    found = zip(*(shares or Shares()).by_batch(rows, together, limit, one), strict=True)
    return ImportanceWeighted(*(in_order(part) for part in found))


def elbo_numbers(found: Elbos, model: VariationalAutoencoder) -> dict[str, float]:
    """Return the mean negative ELBO with its standard errors over images, draws and probes, and its parts.

    With several draws and images there are ``active_units``, the latents whose posterior mean differs between
    images: its variance, less what the finite number of draws adds, is above 0.01, and by three
    deviations of the noise that these draws leave.

    Args:
        found: The ELBOs.
        model: The autoencoder.
    """
    negative = -found.log_weight
    draws = len(negative)
    mean, error = mean_with_error(negative.mean(dim=0))
    numbers = {"negative_elbo": mean, "elbo": -mean, "negative_elbo_standard_error": error}
    reconstruction = float(found.reconstruction.mean())
    numbers |= {"reconstruction": reconstruction, "kl": mean - reconstruction}
    if draws > 1:
        numbers["negative_elbo_draws_standard_error"] = error_of_mean(negative.std(dim=0) / math.sqrt(draws))
    if draws > 1 and len(found.latent_mean) > 1:
        added = found.latent_variance.mean(dim=0) / draws
        noise = added * math.sqrt(2 / (len(found.latent_mean) - 1))  # of a variance of that many normal means
        between = found.latent_mean.var(dim=0) - added
        numbers["active_units"] = float((between > ACTIVE + 3 * noise).sum())
    if found.trace_error is not None:
        numbers["negative_elbo_trace_standard_error"] = error_of_mean(error_over_draws(found.trace_error))
    return numbers | _in_bits(numbers, model, "negative_elbo", "bits_per_dim")


def importance_numbers(found: ImportanceWeighted, model: VariationalAutoencoder) -> dict[str, float]:
    """Return the mean of minus the bound with its standard error, and the effective sample sizes.

    Args:
        found: The bounds.
        model: The autoencoder.
    """
    mean, error = mean_with_error(-found.bound)
    numbers = {"negative_iwae_bound": mean, "negative_iwae_bound_standard_error": error}
    numbers |= _in_bits(numbers, model, "negative_iwae_bound", "bits_per_dim_iwae")
    median, least = float(found.sample_size.median()), float(found.sample_size.min())
    return numbers | {"effective_sample_size_median": median, "effective_sample_size_least": least}


def _in_bits(numbers: dict[str, float], model: VariationalAutoencoder, name: str, called: str) -> dict[str, float]:
    """Return the numbers that begin with a name in bits/dim, where pixels have more than two values."""
    if model.likelihood.levels == 2:
        return {}
    dimensions = math.prod(model.event_shape)
    return {
        key.replace(name, called): nats_in_bits(value, dimensions)
        for key, value in numbers.items()
        if key.startswith(name)
    }


def _generator(anchor: Tensor, *words: int) -> torch.Generator:
    return torch.Generator(anchor.device).manual_seed(mixed(*words))
