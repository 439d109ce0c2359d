"""The seam of all divergence estimators."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnf_lab.fields.base import Time, VectorField

#: What :meth:`DivergenceEstimator.start` hands to every evaluation of a solve.
Probe = Any


class Linearised(NamedTuple):
    r"""What an estimator learns of a field at one time and state.

    Attributes:
        value: dx/dt (batch, \*event).
        div: The divergence or its estimate (batch,).
        estimates: The independent estimates (k, batch) whose mean is ``div``; None where it is exact.
        squared_norm: The squared Frobenius norm of the Jacobian or its estimate (batch,), from the
            same products; None unless it was asked for.
    """

    value: Tensor
    div: Tensor
    estimates: Tensor | None = None
    squared_norm: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Linearised":
        """Return the same in another precision."""
        estimates = None if self.estimates is None else self.estimates.to(dtype)
        norm = None if self.squared_norm is None else self.squared_norm.to(dtype)
        return Linearised(self.value.to(dtype), self.div.to(dtype), estimates, norm)


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
