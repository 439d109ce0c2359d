"""Learning-rate schedules that torch's own do not cover."""

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cnf_lab.errors import ConfigError


def cosine(optimizer: Optimizer, epochs: int, floor: float = 0.0, lr_warmup: int = 0) -> LambdaLR:
    r"""A straight rise to the optimiser's rate, and half a cosine down to a share of it, and no further.

    .. math:: \eta_e = \eta_0 \min\big(1, \tfrac{e + 1}{w + 1}\big)
              \big(f + (1 - f)\tfrac12 (1 + \cos(\pi \min(e / E, 1)))\big).

    torch's own schedule rises again after E epochs, and keeps the E of a checkpoint when a run
    is resumed for longer.

    Args:
        optimizer: The optimiser.
        epochs: Number E of epochs.
        floor: Share f of the rate at the end.
        lr_warmup: Epochs w below the optimiser's rate.

    Raises:
        ConfigError: If the number of epochs is not known.
    """
    if epochs < 1:
        raise ConfigError(
            f"Expected trainer.max_epochs of at least 1 with schedule=cosine, got {epochs}. "
            "Type trainer.max_epochs=100."
        )

    def share(epoch: int) -> float:
        fall = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1.0)))
        return _rise(epoch, lr_warmup) * fall

    return LambdaLR(optimizer, share)


def drop(optimizer: Optimizer, at: Sequence[int], factor: float = 0.1, lr_warmup: int = 0) -> LambdaLR:
    r"""A straight rise to the optimiser's rate, which some epochs multiply by a factor.

    .. math:: \eta_e = \eta_0 \min\big(1, \tfrac{e + 1}{w + 1}\big)\, f^{\,\#\{a \le e\}}.

    Args:
        optimizer: The optimiser.
        at: Epochs a, counted from 0, from which on the rate is lower.
        factor: Factor f of each drop.
        lr_warmup: Epochs w below the optimiser's rate.

    Raises:
        ConfigError: If the factor or an epoch is out of range.
    """
    if not 0 < factor <= 1 or min(at, default=1) < 1:
        raise ConfigError(
            f"Expected schedule.factor in (0, 1] and schedule.at of epochs from 1 on, got {factor} and {list(at)}. "
            "Type schedule.factor=0.1 schedule.at=[250]."
        )
    return LambdaLR(optimizer, lambda epoch: _rise(epoch, lr_warmup) * factor ** sum(a <= epoch for a in at))


def _rise(epoch: int, lr_warmup: int) -> float:
    return min(1.0, (epoch + 1) / (lr_warmup + 1))
