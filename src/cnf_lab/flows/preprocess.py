r"""Fixed layers between the data's own units and the flow, fitted on the training split.

Their log-det is part of the density, so that a reported likelihood is always one of the data
as the data set gives them. They are saved with the weights.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cnf_lab.errors import DataError
from cnf_lab.flows.base import UnconditionalTransform


class Preprocess(UnconditionalTransform):
    """A fixed layer that is fitted once, before training.

    Args:
        event_shape: Shape of one event.
    """

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        # The dtype that the flow works in, whatever the data's; follows flow.double().
        self._anchor: Tensor
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)

    @abstractmethod
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Fit to the training rows, handed over in batches (rows, \\*event)."""


class NoPreprocess(Preprocess):
    """The data as they are."""

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Do nothing."""

    def to_latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x in the flow's dtype."""
        return x.to(self._anchor), self._anchor.expand(len(x))

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return z."""
        return z, self._anchor.expand(len(z))


class DoubleBuffers(nn.Module):
    """Keeps float64 buffers float64 when a module is moved to another precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        buffers = [(name, buffer) for name, buffer in self.named_buffers(recurse=False) if name != "_anchor"]
        kept = {name: buffer for name, buffer in buffers if buffer.dtype == torch.float64}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class LinearPreprocess(DoubleBuffers, Preprocess):
    r""":math:`y = A (x - \mu)` with A fitted so that y has mean 0 and unit variances.

    Coefficients are float64 and the map is computed in float64: columns with a large mean and
    a small spread (a timestamp, say) would lose their digits in float32.
    """

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape)
        size = torch.Size(event_shape).numel()
        self.mean: Tensor
        self.matrix: Tensor
        self.inverse: Tensor
        self.log_abs_det: Tensor
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("matrix", torch.eye(size, dtype=torch.float64))
        self.register_buffer("inverse", torch.eye(size, dtype=torch.float64))
        self.register_buffer("log_abs_det", torch.zeros((), dtype=torch.float64))

    @abstractmethod
    def whitener(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and its inverse for a covariance matrix."""

    def fit(self, batches: Iterable[Tensor]) -> None:
        r"""Set mean, A, its inverse and log|det A| from the training rows.

        Args:
            batches: Training rows, each batch (rows, \*event).

        Raises:
            DataError: If a feature is constant, or one is a combination of others.
        """
        self.mean, covariance = moments(batches)
        check_variation(covariance.diagonal(), "features", "type preprocess=none")
        self.matrix, self.inverse = self.whitener(covariance)
        self.log_abs_det = torch.linalg.slogdet(self.matrix).logabsdet

    def to_latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (x - mu) in the flow's dtype."""
        value = (x.flatten(1).to(self.mean) - self.mean) @ self.matrix.mT
        return value.to(self._anchor).reshape(x.shape), self.log_abs_det.to(self._anchor).expand(len(x))

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return A^-1 z + mu in float64, whatever the flow's dtype."""
        value = (z.flatten(1).to(self.mean) @ self.inverse.mT + self.mean).reshape(z.shape)
        return value, -self.log_abs_det.to(self._anchor).expand(len(z))


class Standardise(LinearPreprocess):
    """Every feature to mean 0 and variance 1."""

    def whitener(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Return diagonal matrices."""
        deviation = covariance.diagonal().sqrt()
        return torch.diag(1 / deviation), torch.diag(deviation)


class Whiten(LinearPreprocess):
    r"""Mean 0 and identity covariance: :math:`A = R^{-1/2} S^{-1}`, S the deviations, R the correlations.

    Standardising first keeps features of very different spreads apart from round-off.
    """

    def whitener(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inverse root and the root of the covariance."""
        deviation = covariance.diagonal().sqrt()
        values, vectors = torch.linalg.eigh(covariance / torch.outer(deviation, deviation))
        # Below this a direction is round-off: features that determine one another.
        if values[0] <= values[-1] * torch.finfo(torch.float64).eps * len(values):
            raise DataError(
                "Expected features that do not determine one another, got a singular covariance matrix. "
                "Drop the redundant columns, or type preprocess=standardise."
            )
        root, inverse = vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT
        return inverse / deviation, root * deviation[:, None]


class ContextScaler(DoubleBuffers):
    """Standardises a conditioning context; there is no log-det, for the context has no density.

    Args:
        features: Number of context columns.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("deviation", torch.ones(features, dtype=torch.float64))
        self._anchor: Tensor
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Set mean and deviation from the training rows' contexts."""
        self.mean, covariance = moments(batches)
        check_variation(covariance.diagonal(), "context columns", "leave them out of dataset.context")
        self.deviation = covariance.diagonal().sqrt()

    def forward(self, context: Tensor) -> Tensor:
        """Return the standardised context in the flow's dtype."""
        return ((context.to(self.mean) - self.mean) / self.deviation).to(self._anchor)


def moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and population covariance (D, D) of rows in float64, in one pass.

    Rows are shifted by the first batch's mean, so that a large mean does not eat the digits
    of a small spread.
    """
    count, shift, total, outer = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for batch in batches:
        rows = batch.flatten(1).double()
        if count == 0:
            shift = rows.mean(0)
        centred = rows - shift
        count += len(rows)
        total, outer = total + centred.sum(0), outer + centred.mT @ centred
    mean = total / count
    return shift + mean, outer / count - torch.outer(mean, mean)


def check_variation(spreads: Tensor, what: str, advice: str) -> None:
    """Refuse columns whose variances, or other spreads, are not positive."""
    constant = (spreads <= 0).nonzero().flatten().tolist()
    if constant:
        raise DataError(
            f"Expected {what} that vary over the training rows, got constant {what} number {constant}. "
            f"Drop them, or {advice}."
        )
