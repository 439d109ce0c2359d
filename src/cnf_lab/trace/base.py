"""The seam of all divergence estimators."""

from abc import ABC, abstractmethod
from enum import Flag, auto
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnf_lab.fields.base import Time, VectorField

#: What :meth:`DivergenceEstimator.start` hands to every evaluation of a solve.
Probe = Any


class Needs(Flag):
    r"""What is wanted of a field besides its value and divergence."""

    #: The squared Frobenius norm of the Jacobian J, or its estimate.
    SQUARED_NORM = auto()
    #: J itself: a product per coordinate.
    JACOBIAN = auto()
    #: :math:`J^\top f`: an evaluation and a pass of reverse mode.
    PULLED_VALUE = auto()
    #: :math:`\partial_t f + J f`: an evaluation and a tangent.
    ACCELERATION = auto()


class Linearised(NamedTuple):
    r"""What an estimator learns of a field at one time and state.

    Attributes:
        value: dx/dt (batch, \*event).
        div: The divergence or its estimate (batch,).
        estimates: The independent estimates (k, batch) whose mean is ``div``; None where it is exact.
        squared_norm: The squared Frobenius norm of the Jacobian or its estimate (batch,), from the
            same products; None unless it was asked for.
        jacobian: The Jacobian (batch, D, D), entry (i, k) being df_i/dx_k; None unless it was asked for.
        pulled_value: The value times the Jacobian, :math:`J^\top f`, (batch, \*event); None
            unless it was asked for.
        acceleration: The second derivative of x along its path, :math:`\partial_t f + J f`,
            (batch, \*event); None unless it was asked for.
    """

    value: Tensor
    div: Tensor
    estimates: Tensor | None = None
    squared_norm: Tensor | None = None
    jacobian: Tensor | None = None
    pulled_value: Tensor | None = None
    acceleration: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Linearised":
        """Return the same in another precision."""
        further = (None if part is None else part.to(dtype) for part in self[2:])
        return Linearised(self.value.to(dtype), self.div.to(dtype), *further)


class DivergenceEstimator(ABC):
    r"""A way to get the divergence :math:`\sum_i \partial f_i / \partial x_i` of a vector field.

    An estimator has no state: what is random is drawn by :meth:`start` once per solve, one
    probe per example, and handed back at every evaluation. A fresh draw per evaluation would
    turn the right-hand side into noise, and an adaptive solver's step size would collapse.
    """

    #: Whether the divergence is exact, so that a log-density needs no average over probes.
    exact: bool = False
    #: Number of independent estimates whose mean is the divergence.
    count: int = 1

    def chosen_for(self, field: VectorField) -> "DivergenceEstimator":
        """Return the estimator that a solve of this field uses: itself, unless it is there to choose.

        Args:
            field: The vector field.

        Raises:
            ConfigError: If the estimator does not fit the field.
        """
        return self

    @abstractmethod
    def describe(self, field: VectorField) -> str:
        """Say in some words what is done for a field, for the log."""

    @abstractmethod
    def start(
        self,
        field: VectorField,
        x: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
        with_norm: bool = False,
    ) -> Probe:
        r"""Draw the probe of one solve, one per row of x.

        Args:
            field: The vector field.
            x: State at the start (batch, \*event).
            context: Conditioning (batch, features) or None.
            generator: Source of the random numbers.
            with_norm: Whether the Jacobian's squared norm is wanted as well.
        """

    @abstractmethod
    def linearise(self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, probe: Probe) -> Linearised:
        r"""Evaluate a field and its divergence.

        Args:
            field: The vector field.
            t: Time.
            x: State (batch, \*event).
            context: Conditioning (batch, features) or None.
            probe: What :meth:`start` returned.
        """

    def value_and_divergence(
        self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, probe: Probe
    ) -> tuple[Tensor, Tensor]:
        r"""Return dx/dt (batch, \*event) and the divergence or its estimate (batch,)."""
        return self.linearise(field, t, x, context, probe)[:2]
