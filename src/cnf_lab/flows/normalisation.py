r"""Normalisation layers between the blocks of a chain.

References:
    Dinh et al., Density estimation using Real NVP (2017), https://arxiv.org/abs/1605.08803.
    Kingma and Dhariwal, Glow (2018), https://arxiv.org/abs/1807.03039.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from cnf_lab.flows.base import UnconditionalTransform


class FeatureAffine(UnconditionalTransform):
    """y = (x - shift) exp(log_scale) by feature, for rows, or by channel, for images.

    A subclass says what shift and log_scale are.

    Args:
        event_shape: Shape of one event; the first axis holds the features or channels.
    """

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.features, self.trailing = event_shape[0], len(event_shape) - 1
        self.initialised: Tensor
        self.register_buffer("initialised", torch.tensor(False))

    @abstractmethod
    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Return shift and log_scale, each (features,)."""

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Learn from the rows of a training batch."""

    def to_latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise; in training mode learn from the batch."""
        if self.training:
            self.observe(x)
        shift, log_scale = self.coefficients()
        return (x - self._spread(shift)) * self._spread(log_scale).exp(), self._log_det(x, log_scale)

    def to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Undo the normalisation."""
        shift, log_scale = self.coefficients()
        return z * self._spread(-log_scale).exp() + self._spread(shift), -self._log_det(z, log_scale)

    def _spread(self, coefficient: Tensor) -> Tensor:
        return coefficient.reshape(-1, *(1,) * self.trailing)

    def _log_det(self, x: Tensor, log_scale: Tensor) -> Tensor:
        pixels = x[0, 0].numel()
        return (log_scale.sum() * pixels).expand(len(x))


class MovingBatchNorm(FeatureAffine):
    r"""Batch normalisation by running statistics, :math:`y = e^w (x - \mu)/\sqrt{v + \epsilon} + b`.

    Differences from the original:

    1. The first training batch sets the running statistics; the original starts from mean 0
       and variance 1, so that its first batches pass unnormalised.
    2. There is no lag option: its bias correction inflates the first variances tenfold.
    3. Statistics are those of the global batch when several processes train.

    Args:
        event_shape: Shape of one event.
        decay: Weight of a new batch in the running statistics.
        epsilon: Added to the variance.
    """

    def __init__(self, event_shape: tuple[int, ...], decay: float = 0.1, epsilon: float = 1e-4) -> None:
        super().__init__(event_shape)
        self.decay, self.epsilon = decay, epsilon
        self.weight, self.bias = (
            nn.Parameter(torch.zeros(self.features)),
            nn.Parameter(torch.zeros(self.features)),
        )
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(self.features))
        self.register_buffer("variance", torch.ones(self.features))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Fold b into the shift: y = (x - mu + b / scale) scale."""
        log_scale = self.weight - 0.5 * torch.log(self.variance + self.epsilon)
        return self.mean - self.bias * torch.exp(-log_scale), log_scale

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the running statistics towards those of the batch."""
        mean, variance = batch_moments(x)
        decay = torch.where(self.initialised, self.decay, 1.0)
        self.mean.lerp_(mean, decay)
        self.variance.lerp_(variance, decay)
        self.initialised.fill_(True)


class ActNorm(FeatureAffine):
    """A learned affine layer whose first training batch leaves it with mean 0 and variance 1.

    Args:
        event_shape: Shape of one event.
        epsilon: Added to the first batch's variance.
    """

    def __init__(self, event_shape: tuple[int, ...], epsilon: float = 1e-6) -> None:
        super().__init__(event_shape)
        self.epsilon = epsilon
        self.shift = nn.Parameter(torch.zeros(self.features))
        self.log_scale = nn.Parameter(torch.zeros(self.features))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Return the learned shift and log_scale."""
        return self.shift, self.log_scale

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Initialise from the first training batch."""
        if bool(self.initialised):
            return
        mean, variance = batch_moments(x)
        self.shift.copy_(mean)
        self.log_scale.copy_(-0.5 * torch.log(variance + self.epsilon))
        self.initialised.fill_(True)


@torch.no_grad()
def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population variance (features,) of a batch, over all processes."""
    rows = x.transpose(0, 1).flatten(1).double()  # (features, batch * pixels)
    mean = _global_mean(rows)
    variance = _global_mean((rows - mean[:, None]).square())
    return mean.to(x.dtype), variance.to(x.dtype)


def _global_mean(rows: Tensor) -> Tensor:
    sums = torch.stack([rows.sum(1), torch.full_like(rows[:, 0], rows.shape[1])])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums[0] / sums[1]
