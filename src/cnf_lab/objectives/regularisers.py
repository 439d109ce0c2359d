r"""Penalties that are integrals over the trajectories, in the same solve as the likelihood.

They do not steer the step size: the error norm looks at x and log-det only (scipy's solvers and
the iteration of implicit Adams methods look at all of the state). The original's six integrals
are here per example: l1int, l2int, dl2int, JFrobint, JdiagFrobint, JoffdiagFrobint. What differs
from the original:

1. Its integrals steered the step size.
2. dl2int promised the total derivative and was :math:`J^\top f`; both are here, by their names.
3. JoffdiagFrobint took no root; here it may.
4. A norm that is zero has the gradient zero: fields may start at zero.

References:
    Grathwohl et al., FFJORD (2019), https://arxiv.org/abs/1810.01367, and its code.
    Finlay et al., How to train your neural ODE (2020), https://arxiv.org/abs/2002.02798.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from cnf_lab.flows import Integrand
from cnf_lab.trace import Linearised, Needs


class Regulariser(Integrand):
    """A weighted integral over time, one number per example.

    Args:
        weight: Factor of the integral's mean in the loss.
    """

    weight: float

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

    needs = Needs.SQUARED_NORM

    def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
        """Return the estimate of the squared norm over D (batch,)."""
        assert found.squared_norm is not None
        return found.squared_norm / x.shape[1:].numel()


class L1Speed(Regulariser):
    r"""The mean absolute velocity :math:`\frac1D \int_0^T \lVert f(t, x_t) \rVert_1 dt`: the original's l1int."""

    def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
        """Return the mean of the absolute velocities (batch,)."""
        return found.value.flatten(1).abs().mean(dim=1)


class L2Speed(Regulariser):
    r"""The length of the path :math:`\frac{1}{\sqrt D} \int_0^T \lVert f(t, x_t) \rVert dt`: the original's l2int."""

    def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
        """Return the root mean square of the velocity (batch,)."""
        return _root_mean_square(found.value)


class DirectionalDerivative(Regulariser):
    r"""The norm :math:`\frac{1}{\sqrt D} \int_0^T \lVert J^\top f \rVert dt`, J the Jacobian: the original's dl2int.

    :math:`J^\top f` is the gradient of :math:`\frac12 \lVert f \rVert^2`. The original's help calls it a total
    derivative, which is :class:`TotalDerivative`. An evaluation of the field and its reverse pass.
    """

    needs = Needs.PULLED_VALUE

    def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
        """Return the root mean square of the product (batch,)."""
        assert found.pulled_value is not None
        return _root_mean_square(found.pulled_value)


class TotalDerivative(Regulariser):
    r"""The acceleration :math:`\frac{1}{\sqrt D} \int_0^T \lVert \partial_t f + J f \rVert dt`.

    It is :math:`\lVert d^2 x / dt^2 \rVert`: zero for straight paths of constant speed, however fast. An
    evaluation of the field and a tangent.
    """

    needs = Needs.ACCELERATION

    def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
        """Return the root mean square of the acceleration (batch,)."""
        assert found.acceleration is not None
        return _root_mean_square(found.acceleration)


class JacobianFrobenius(Regulariser):
    r"""The Jacobian's norm without a square, :math:`\frac1D \int_0^T \lVert J \rVert_F dt`: the original's JFrobint.

    Exact, at a product per coordinate and evaluation; :class:`JacobianNorm` is the cheap one.
    """

    needs = Needs.JACOBIAN

    def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
        """Return the root mean square of the entries (batch,)."""
        assert found.jacobian is not None
        return _root_mean_square(found.jacobian)


class JacobianDiagonal(Regulariser):
    r"""The norm of J's diagonal, :math:`\frac{1}{\sqrt D} \int_0^T \lVert \mathrm{diag} J \rVert dt`.

    The original's JdiagFrobint, at a product per coordinate and evaluation.
    """

    needs = Needs.JACOBIAN

    def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
        """Return the root mean square of the entries on the diagonal (batch,)."""
        assert found.jacobian is not None
        return _root_mean_square(found.jacobian.diagonal(dim1=1, dim2=2))


class JacobianOffDiagonal(Regulariser):
    r"""The norm of J beside its diagonal :math:`\int_0^T \big(\frac{1}{D(D-1)} \sum_{i \ne k} J_{ik}^2\big)^{1/2} dt`.

    The original's JoffdiagFrobint with ``root=False``: it takes the root of the other norms, and
    none of this one. A product per coordinate and evaluation.

    Args:
        weight: Factor of the integral's mean in the loss.
        root: Whether the root is taken.
    """

    needs = Needs.JACOBIAN

    def __init__(self, weight: float, root: bool = True) -> None:
        super().__init__(weight)
        self.root = root

    def __call__(self, t: Tensor, x: Tensor, found: Linearised) -> Tensor:
        """Return the root mean square, or the mean square, of the entries beside the diagonal (batch,)."""
        assert found.jacobian is not None
        size = x.shape[1:].numel()
        others = found.jacobian * (1 - torch.eye(size, dtype=x.dtype, device=x.device))
        # The zeros of the diagonal are counted first, and taken out of the mean; one coordinate has no others.
        share = size / max(size - 1, 1)
        return _root_mean_square(others) * share**0.5 if self.root else others.square().mean(dim=(1, 2)) * share


def _root_mean_square(part: Tensor) -> Tensor:
    # The gradient of this norm at zero is zero, where that of a root would be NaN.
    return torch.linalg.vector_norm(part.flatten(1), dim=1) / part.shape[1:].numel() ** 0.5
