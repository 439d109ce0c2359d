r"""Penalties that are integrated over the trajectories in the same solve as the likelihood.

They do not steer the step size: the error norm looks at x and log-det only.
"""

from abc import ABC, abstractmethod

from torch import Tensor


class Regulariser(ABC):
    """A weighted integral over time, one number per example.

    Args:
        weight: Factor of the integral's mean in the loss.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @abstractmethod
    def __call__(self, t: Tensor, x: Tensor, velocity: Tensor, div: Tensor) -> Tensor:
        """Return the integrand (batch,) at one time; velocity is dx/dt."""


class KineticEnergy(Regulariser):
    r"""The kinetic energy :math:`\frac1D \int_0^T \lVert f(t, x_t) \rVert^2 dt`.

    Straight paths cost least, and are solved in few steps.

    References:
        Finlay et al., How to train your neural ODE (2020), https://arxiv.org/abs/2002.02798.
    """

    def __call__(self, t: Tensor, x: Tensor, velocity: Tensor, div: Tensor) -> Tensor:
        """Return the mean square of the velocity (batch,)."""
        return velocity.flatten(1).square().mean(dim=1)
