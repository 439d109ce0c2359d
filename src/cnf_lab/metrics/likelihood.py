"""Likelihoods over a data set, exact whatever the batches and processes."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from cnf_lab.shapes import Float


class MeanWithError(Metric):
    r"""Mean over examples with its standard error, from sums that add up over processes.

    .. math:: \bar a = \frac1n \sum_i a_i, \qquad
              \mathrm{se} = \sqrt{\frac{\sum_i a_i^2 / n - \bar a^2}{n - 1}}.

    Sums are float64, so that the size of the set costs no digits.

    Args:
        sync_on_compute: Whether processes hold different examples, which are put together.
    """

    full_state_update = False

    def __init__(self, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.count: Tensor
        self.total: Tensor
        self.squares: Tensor
        for name in ("count", "total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Float[Tensor, " batch"]) -> None:
        """Add the values of a batch."""
        values = values.detach().double()
        self.count += len(values)
        self.total += values.sum()
        self.squares += values.square().sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard error; the error of a single value is NaN."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0)
        return mean, (variance / (self.count - 1)).sqrt()


class ErrorOfMean(Metric):
    r"""Standard error of a mean whose examples have independent standard errors of their own.

    .. math:: \mathrm{se} = \frac1n \sqrt{\sum_i \mathrm{se}_i^2}.

    Args:
        sync_on_compute: Whether processes hold different examples, which are put together.
    """

    full_state_update = False

    def __init__(self, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.count: Tensor
        self.squares: Tensor
        for name in ("count", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, errors: Float[Tensor, " batch"]) -> None:
        """Add the standard errors of a batch of examples."""
        self.count += len(errors)
        self.squares += errors.detach().double().square().sum()

    def compute(self) -> Tensor:
        """Return the standard error of the mean."""
        return self.squares.sqrt() / self.count


def bits_per_dim(nll: Tensor, dimensions: int) -> Tensor:
    r"""Return an NLL of discrete pixels in bits per dimension, :math:`\mathrm{nll} / (D \ln 2)`.

    The NLL is that of the whole numbers 0..L-1: with a density y of dequantised pixels in [0, L)
    no constant is missing, and a uniform model of 256 levels scores 8.

    Args:
        nll: Negative log-likelihoods or their errors in nats per image, of any shape.
        dimensions: D, channels times height times width.
    """
    return nll / (dimensions * math.log(2))
