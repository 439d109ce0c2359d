r"""Log-likelihoods of a data set, with what is random in them: dequantisation draws and probes."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cnf_lab.data import Batch, Rows
from cnf_lab.flows import Dequantiser, Flow, UniformDequantiser
from cnf_lab.metrics import ErrorOfMean, MeanWithError, bits_per_dim
from cnf_lab.ode import SolveStats
from cnf_lab.training.shares import Shares, in_order


@dataclass(frozen=True)
class Likelihoods:
    r"""Log-likelihoods of rows, drawn K times.

    Attributes:
        log_prob: :math:`\log p(x + u_k) - \log q(u_k \mid x)` in nats (K, rows), float64; the
            log-density itself, with K = 1, where nothing is dequantised.
        trace_error: Standard errors of them over probes (K, rows); None where the divergence is exact.
        nfe: Evaluations for each batch and draw.
    """

    log_prob: Tensor
    trace_error: Tensor | None
    nfe: tuple[int, ...]

    def importance_weighted(self) -> Tensor:
        r"""Return :math:`\log \tfrac1K \sum_k e^{\log w_k}` (rows,), a bound that tightens with K.

        Where the divergence is estimated it is no bound: the noise of the probes tightens it too,
        by about half their variance.
        """
        return log_mean(self.log_prob)


@torch.no_grad()
def log_likelihoods(
    flow: Flow,
    rows: Rows,
    batch_size: int,
    limit: int | None = None,
    draws: int = 1,
    seed: int = 0,
    shares: Shares | None = None,
) -> Likelihoods:
    """Return the log-likelihoods of rows by a flow in evaluation mode.

    Random numbers of a batch come from (seed, draw, its number): more draws leave the first ones
    as they were, and another solver or precision of the field meets the same noise and probes.

    Args:
        flow: The density.
        rows: The rows.
        batch_size: Rows per solve.
        limit: Only the first rows; None for all.
        draws: Draws K of dequantisation noise; one where nothing is dequantised and probed.
        seed: Seed of noise and probes.
        shares: The processes that share the batches; None for this one alone.
    """
    anchor = flow.base.sample(0)

    def one(number: int, batch: Batch) -> tuple[list[Tensor], list[Tensor], list[int]]:
        context = None if batch.context is None else batch.context.to(anchor.device)
        values, errors, nfe = [], [], []
        for draw in range(draws):
            generator = torch.Generator(anchor.device).manual_seed(mixed(seed, draw, number))
            x, log_q = flow.dequantise(batch.x.to(anchor.device), generator)
            mapped = flow.pull_back(x, context, generator)
            values.append((flow.base.log_prob(mapped.value) + mapped.log_det - log_q).double().cpu())
            if mapped.log_det_error is not None:
                errors.append(mapped.log_det_error.double().cpu())
            nfe.append(SolveStats.total(mapped.solves).nfe_forward)
        return values, errors, nfe

    found = (shares or Shares()).by_batch(rows, batch_size, limit, one)
    values, errors, nfe = zip(*found, strict=True)
    trace_error = in_order([torch.stack(part) for part in errors], dim=1) if errors[0] else None
    return Likelihoods(in_order([torch.stack(part) for part in values], dim=1), trace_error, tuple(sum(nfe, [])))


def nll_numbers(likelihoods: Likelihoods) -> dict[str, float]:
    """Return the mean NLL in nats per row, and its standard errors over rows, draws and probes."""
    nll = -likelihoods.log_prob
    mean, error = mean_with_error(nll.mean(dim=0))
    numbers = {"nll": mean, "nll_standard_error": error}
    if len(nll) > 1:
        numbers["nll_dequantisation_standard_error"] = error_of_mean(nll.std(dim=0) / math.sqrt(len(nll)))
    if likelihoods.trace_error is not None:
        numbers["nll_trace_standard_error"] = error_of_mean(error_over_draws(likelihoods.trace_error))
    return numbers


def image_numbers(likelihoods: Likelihoods, uniform: Likelihoods, dimensions: int) -> dict[str, float]:
    """Return likelihoods of images in nats per image and in bits/dim.

    Besides the mean over all draws there are ``bits_per_dim_uniform_1``, that of one draw of uniform
    noise, which published numbers are, and with several draws and an exact divergence the
    importance-weighted bound: the noise of probes would pass for a better one.

    Args:
        likelihoods: By the flow's own dequantisation.
        uniform: By uniform noise; only the first draw is used.
        dimensions: Entries of an image.
    """
    numbers = nll_numbers(likelihoods)
    bounds = {"uniform_1": uniform.log_prob[0]}
    if len(likelihoods.log_prob) > 1 and likelihoods.trace_error is None:
        bounds["importance_weighted"] = likelihoods.importance_weighted()
    for name, log_prob in bounds.items():
        numbers[f"nll_{name}"], numbers[f"nll_{name}_standard_error"] = mean_with_error(-log_prob)
    in_bits = {name.replace("nll", "bits_per_dim"): nats_in_bits(value, dimensions) for name, value in numbers.items()}
    return in_bits | numbers


def uniformly(flow: Flow) -> Dequantiser:
    """Return uniform dequantisation for a flow of images, in its precision and on its device."""
    assert flow.dequantiser is not None
    return UniformDequantiser(flow.event_shape, flow.dequantiser.levels).to(flow.base.sample(0))


def log_mean(log_weight: Tensor) -> Tensor:
    r"""Return :math:`\log \tfrac1K \sum_k w_k` of log-weights (draws, rows)."""
    return log_weight.logsumexp(dim=0) - math.log(len(log_weight))


def sample_size(log_weight: Tensor) -> Tensor:
    r"""Return effective numbers of draws, :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, of log-weights (draws, rows)."""
    return (2 * log_weight.logsumexp(dim=0) - (2 * log_weight).logsumexp(dim=0)).exp()


def jackknife_error(log_weight: Tensor) -> Tensor:
    r"""Return standard errors of :math:`\log \tfrac1K \sum_k w_k` over draws, each left out in turn.

    .. math:: \mathrm{se}^2 = \tfrac{K-1}{K} \sum_k (\theta_{-k} - \bar\theta)^2

    Unlike the delta method it does not stay small where one weight outweighs the others.

    Args:
        log_weight: Logarithms of weights (draws, rows); the errors of one draw are NaN.
    """
    draws = len(log_weight)
    share = (log_weight - log_weight.logsumexp(dim=0)).exp().clamp(max=1 - 1e-15)
    left = torch.log1p(-share)  # θ without k, but for a constant of the row
    return ((draws - 1) * left.var(dim=0, correction=0)).sqrt() if draws > 1 else torch.full_like(left[0], torch.nan)


def mean_with_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of values (rows,), which every process has, and its standard error."""
    metric = MeanWithError(sync_on_compute=False)
    metric.update(values)
    mean, error = metric.compute()
    return float(mean), float(error)


def error_of_mean(errors: Tensor) -> float:
    """Return the standard error of a mean of rows with errors of their own (rows,), which every process has."""
    metric = ErrorOfMean(sync_on_compute=False)
    metric.update(errors)
    return float(metric.compute())


def error_over_draws(errors: Tensor) -> Tensor:
    """Return the standard errors of rows' means over draws, whose own are independent (draws, rows)."""
    return errors.square().sum(dim=0).sqrt() / len(errors)


def nats_in_bits(nats: float, dimensions: int) -> float:
    """Return nats per image in bits/dim."""
    return float(bits_per_dim(torch.tensor(nats, dtype=torch.float64), dimensions))


def mixed(*words: int) -> int:
    """Return a seed that depends on all of some numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
