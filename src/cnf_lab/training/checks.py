"""What an evaluation tries on its own numbers: tighter solves, exact divergences, the way back, the total mass."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.data import Batch, Rows
from cnf_lab.data.base import ArrayRows
from cnf_lab.flows import Flow
from cnf_lab.training.bounds import elbos
from cnf_lab.training.likelihoods import log_likelihoods, mixed
from cnf_lab.training.sample_metrics import draw
from cnf_lab.training.settings import AnyModel, Settings
from cnf_lab.training.shares import EvenRows, Shares, in_order

#: Points along each axis of the grid that a density is summed on, by its number of dimensions.
GRID = {1: 2001, 2: 201, 3: 41}
GRID_TOLERANCE = 1e-5  # of the solves there: the mass is told to five digits
SAMPLES = 2000  # that tell where a density lies
MARGIN = 0.25  # of the extent of the samples, beyond them on either side


@dataclass(frozen=True)
class Evaluated:
    """Rows, and how they are gone through.

    Attributes:
        rows: The rows.
        count: How many of them, the first ones.
        pass_rows: Rows per solve.
        seed: Seed of noise and probes.
        shares: The processes that share the batches.
    """

    rows: Rows
    count: int
    pass_rows: int
    seed: int
    shares: Shares

    def some(self, count: int) -> "Evaluated":
        """Return some of the rows, evenly spaced: files are often sorted."""
        return replace(self, rows=EvenRows(self.rows, self.count, count), count=count)


def negative(model: AnyModel, what: Evaluated, draws: int = 1) -> Tensor:
    """Return NLLs, or negative ELBOs, of rows in nats (draws, rows).

    Args:
        model: The model, in evaluation mode.
        what: The rows.
        draws: Draws per row.
    """
    if isinstance(model, VariationalAutoencoder):
        return -elbos(model, what.rows, what.pass_rows, what.count, draws, what.seed, what.shares).log_weight
    return -log_likelihoods(model, what.rows, what.pass_rows, what.count, draws, what.seed, what.shares).log_prob


def change(model: AnyModel, usual: Settings, other: Settings, measure: Callable[[], Tensor]) -> Tensor:
    """Return what a measurement changes by under other settings, which hold for it alone.

    Args:
        model: The model.
        usual: The settings that it has.
        other: The settings of the second measurement.
        measure: Returns the measured values, with the same random numbers each time.
    """
    before = measure()
    other.apply(model)
    try:
        return measure() - before
    finally:
        usual.apply(model)


@torch.no_grad()
def inversion_errors(model: AnyModel, what: Evaluated) -> Tensor:
    r"""Return how far rows are from themselves after the way to the latent end and back (rows,).

    .. math:: \max_i |x'_i - x_i| / \sigma_i

    with the deviations σ of the features over these rows (1 for a constant one). Of an autoencoder they are
    latents of the posterior's flow, on the way back and forth again.

    Args:
        model: The model, whose flow has an inverse.
        what: The rows.
    """
    anchor = (model.prior if isinstance(model, VariationalAutoencoder) else model.base).sample(0)

    def one(number: int, batch: Batch) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(anchor.device).manual_seed(mixed(what.seed, 0, number))
        if isinstance(model, VariationalAutoencoder):
            images = batch.x.to(anchor)
            context = model.encoder(model.likelihood.scaled(images))
            x = model.latents(images, 1, generator)[0]
            middle = model.posterior.transform.push_forward(x, context, generator, with_log_det=False).value
            back = model.posterior.transform.pull_back(middle, context, generator).value
        else:
            given = None if batch.context is None else batch.context.to(anchor.device)
            x, _ = model.dequantise(batch.x.to(anchor.device), generator)
            z = model.pull_back(x, given, generator).value
            back = model.push_forward(z, given, with_log_det=False).value
        return x.flatten(1).double().cpu(), (back - x).flatten(1).double().cpu()

    found = what.shares.by_batch(what.rows, what.pass_rows, what.count, one)
    x, difference = (in_order(parts) for parts in zip(*found, strict=True))
    deviation = x.std(dim=0, correction=0)
    return (difference.abs() / torch.where(deviation > 0, deviation, 1.0)).amax(dim=1)


@dataclass(frozen=True)
class Mass:
    """The total mass of a density on a grid; 1, but for what lies outside and between.

    Attributes:
        mass: The sum over the grid.
        resolution: What every second point along each axis gives instead, as a difference.
        outside: Share of other samples that lie outside.
        points: Points along each axis.
    """

    mass: float
    resolution: float
    outside: float
    points: int


def total_mass(flow: Flow, what: Evaluated, settings: Settings) -> Mass:
    """Sum a density of at most three dimensions over a box around its samples, by the trapezoidal rule.

    With exact divergences: a mean of exponentials of what probes say would be too large. A conditional density
    is taken given the context of the first row.

    Args:
        flow: The density.
        what: Rows, of which the first may bring a context.
        settings: The settings that the density has; on the grid it is solved at 1e-5, if they are tighter.
    """
    dimensions = math.prod(flow.event_shape)
    points = GRID[dimensions]
    device = flow.base.sample(0).device
    context = what.rows.__getitems__([0]).context
    drawn = _samples(flow, context, device, what.pass_rows, what.seed)
    low, high = drawn.amin(dim=0), drawn.amax(dim=0)
    low, high = low - MARGIN * (high - low), high + MARGIN * (high - low)
    axes = [np.linspace(float(a), float(b), points) for a, b in zip(low, high, strict=True)]
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    given = None if context is None else np.broadcast_to(context.numpy(), (len(grid), context.shape[1]))
    rows = ArrayRows(grid.reshape(-1, *flow.event_shape), given)
    atol, rtol = (max(bound, GRID_TOLERANCE) for bound in (settings.atol, settings.rtol))
    replace(settings.exactly(), atol=atol, rtol=rtol).apply(flow)
    try:
        log_prob = log_likelihoods(flow, rows, what.pass_rows, seed=what.seed, shares=what.shares).log_prob[0]
    finally:
        settings.apply(flow)
    density = log_prob.exp().reshape([points] * dimensions)
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    coarse = density[(slice(None, None, 2),) * dimensions]
    mass, halved = _trapezoid(density) * cell, _trapezoid(coarse) * cell * 2**dimensions
    again = _samples(flow, context, device, what.pass_rows, what.seed + 1)
    outside = ((again < low) | (again > high)).any(dim=1).double().mean()
    return Mass(mass, abs(mass - halved), float(outside), points)


def _samples(flow: Flow, context: Tensor | None, device: torch.device, batch_size: int, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.from_numpy(draw(flow, SAMPLES, context, batch_size, 1.0, generator)).flatten(1).double()


def _trapezoid(values: Tensor) -> float:
    for _ in range(values.dim()):
        values = torch.trapezoid(values, dim=0)
    return float(values)
