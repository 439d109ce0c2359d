r"""Penalties that are integrated over the trajectories in the same solve as the likelihood.

They do not steer the step size: the error norm looks at x and log-det only.
"""

from abc import abstractmethod

from torch import Tensor

from cnf_lab.flows import Integrand
from cnf_lab.trace import Linearised


class Regulariser(Integrand):
    """A weighted integral over time, one number per example.

    Args:
        weight: Factor of the integral's mean in the loss.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @abstractmethod
    def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
        """Return the integrand (batch,) at one time."""


class KineticEnergy(Regulariser):
    r"""The kinetic energy :math:`\frac1D \int_0^T \lVert f(t, x_t) \rVert^2 dt`.

    Straight paths cost least, and are solved in few steps.

    References:
        Finlay et al., How to train your neural ODE (2020), https://arxiv.org/abs/2002.02798.
    """

    def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
        """Return the mean square of the velocity (batch,)."""
        return found.value.flatten(1).square().mean(dim=1)


class JacobianNorm(Regulariser):
    r"""The Jacobian's norm :math:`\frac1D \int_0^T \lVert \partial f / \partial x \rVert_F^2 dt`.

    It takes the products :math:`J v` of the divergence estimate where there are such; beside an
    exact divergence one probe is pushed through the same layers. The mean over probes of
    :math:`\lVert J v \rVert^2` is unbiased.

    References:
        Finlay et al., How to train your neural ODE (2020), https://arxiv.org/abs/2002.02798.
    """

    needs_norm = True

    def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
        """Return the estimate of the squared norm over D (batch,)."""
        assert found.squared_norm is not None
        return found.squared_norm / x.shape[1:].numel()
