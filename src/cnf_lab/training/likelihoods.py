r"""Log-likelihoods of a data set, with what is random in them: dequantisation draws and probes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cnf_lab.data import Batch, Rows
from cnf_lab.flows import Dequantiser, Flow, UniformDequantiser
from cnf_lab.metrics import ErrorOfMean, MeanWithError, bits_per_dim
from cnf_lab.ode import OdeSolver, SolveStats
from cnf_lab.trace import DivergenceEstimator


@dataclass(frozen=True)
class Likelihoods:
    r"""Log-likelihoods of rows, drawn K times.

    Attributes:
        log_prob: :math:`\log p(x + u_k) - \log q(u_k \mid x)` in nats (K, rows), float64; the
            log-density itself, with K = 1, where nothing is dequantised.
        trace_error: Standard errors of them over probes (K, rows); None where the divergence is exact.
        nfe: Evaluations of all solves.
    """

    log_prob: Tensor
    trace_error: Tensor | None
    nfe: int

    def importance_weighted(self) -> Tensor:
        r"""Return :math:`\log \tfrac1K \sum_k e^{\log w_k}` (rows,), a bound that tightens with K.

        Where the divergence is estimated it is no bound: the noise of the probes tightens it too,
        by about half their variance.
        """
        return self.log_prob.logsumexp(dim=0) - math.log(len(self.log_prob))


@torch.no_grad()
def log_likelihoods(
    flow: Flow, rows: Rows, batch_size: int, limit: int | None = None, draws: int = 1, seed: int = 0
) -> Likelihoods:
    """Return the log-likelihoods of rows by a flow in evaluation mode.

    Random numbers of a batch come from (seed, draw, first row): more draws leave the first ones
    as they were, and another solver or precision of the field meets the same noise and probes.

    Args:
        flow: The density.
        rows: The rows.
        batch_size: Rows per solve.
        limit: Only the first rows; None for all.
        draws: Draws K of dequantisation noise; one where nothing is dequantised and probed.
        seed: Seed of noise and probes.
    """
    anchor = flow.base.sample(0)
    values: list[list[Tensor]] = [[] for _ in range(draws)]
    errors: list[list[Tensor]] = [[] for _ in range(draws)]
    nfe = 0
    for start, batch in batches(rows, batch_size, limit):
        context = None if batch.context is None else batch.context.to(anchor.device)
        for draw in range(draws):
            generator = torch.Generator(anchor.device).manual_seed(mixed(seed, draw, start))
            x, log_q = flow.dequantise(batch.x.to(anchor.device), generator)
            mapped = flow.pull_back(x, context, generator)
            log_prob = flow.base.log_prob(mapped.value) + mapped.log_det - log_q
            values[draw].append(log_prob.double().cpu())
            if mapped.log_det_error is not None:
                errors[draw].append(mapped.log_det_error.double().cpu())
            nfe += SolveStats.total(mapped.solves).nfe_forward
    trace_error = torch.stack([torch.cat(parts) for parts in errors]) if errors[0] else None
    return Likelihoods(torch.stack([torch.cat(parts) for parts in values]), trace_error, nfe)


def nll_numbers(likelihoods: Likelihoods) -> dict[str, float]:
    """Return the mean NLL in nats per row, and its standard errors over rows, draws and probes."""
    nll = -likelihoods.log_prob
    mean, error = mean_with_error(nll.mean(dim=0))
    numbers = {"nll": mean, "nll_standard_error": error}
    if len(nll) > 1:
        numbers["nll_dequantisation_standard_error"] = error_of_mean(nll.std(dim=0) / math.sqrt(len(nll)))
    if likelihoods.trace_error is not None:
        spread = likelihoods.trace_error.square().sum(dim=0).sqrt() / len(nll)
        numbers["nll_trace_standard_error"] = error_of_mean(spread)
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
    in_bits = {name.replace("nll", "bits_per_dim"): _bits(value, dimensions) for name, value in numbers.items()}
    return in_bits | numbers


def solver_gap(
    flow: Flow, rows: Rows, count: int, tight: OdeSolver, divergence: DivergenceEstimator, seed: int
) -> dict[str, float]:
    """Solve the first images again at a tighter tolerance in float64, with the same noise and probes.

    Args:
        flow: The density, in evaluation mode; it is float64 and solved tightly from then on.
        rows: The rows.
        count: Number of images.
        tight: The tighter solver.
        divergence: The divergence estimator.
        seed: Seed of noise and probes.

    Returns:
        The mean and the largest change of an image's bits/dim, tight minus usual.
    """
    usual = log_likelihoods(flow, rows, count, count, seed=seed)
    flow.double().set_evaluation(tight, divergence)
    change = usual.log_prob - log_likelihoods(flow, rows, count, count, seed=seed).log_prob
    dimensions = math.prod(flow.event_shape)
    return {
        "bits_per_dim_solver_gap": _bits(float(change.mean()), dimensions),
        "bits_per_dim_largest_solver_gap": _bits(float(change.abs().max()), dimensions),
    }


def uniformly(flow: Flow) -> Dequantiser:
    """Return uniform dequantisation for a flow of images, in its precision and on its device."""
    assert flow.dequantiser is not None
    return UniformDequantiser(flow.event_shape, flow.dequantiser.levels).to(flow.base.sample(0))


def mean_with_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of values (rows,) and its standard error."""
    metric = MeanWithError()
    metric.update(values)
    mean, error = metric.compute()
    return float(mean), float(error)


def error_of_mean(errors: Tensor) -> float:
    """Return the standard error of a mean of rows with errors of their own (rows,)."""
    metric = ErrorOfMean()
    metric.update(errors)
    return float(metric.compute())


def _bits(nats: float, dimensions: int) -> float:
    return float(bits_per_dim(torch.tensor(nats, dtype=torch.float64), dimensions))


def mixed(*words: int) -> int:
    """Return a seed that depends on all of some numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batches(rows: Rows, batch_size: int, limit: int | None) -> Iterator[tuple[int, Batch]]:
    """Yield batches of the first rows, each with the number of its first row; with a progress bar."""
    count = min(len(rows), limit or len(rows))
    # disable=None: a bar on a terminal, nothing in a file.
    for start in tqdm(range(0, count, batch_size), unit="batch", disable=None):
        yield start, rows.__getitems__(range(start, min(start + batch_size, count)))
