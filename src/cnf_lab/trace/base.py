"""The seam of all divergence estimators."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cnf_lab.fields.base import Time, VectorField

Probe = Tensor | None


class DivergenceEstimator(ABC):
    r"""A way to get the divergence :math:`\sum_i \partial f_i / \partial x_i` of a vector field.

    An estimator has no state: what is random is drawn by :meth:`start` once per solve, one
    probe per example, and handed back at every evaluation. A fresh draw per evaluation would
    turn the right-hand side into noise, and an adaptive solver's step size would collapse.
    """

    #: Whether the divergence is exact, so that a log-density needs no average over probes.
    exact: bool = False

    def check(self, field: VectorField) -> None:
        """Raise ConfigError where the estimator does not fit the field."""

    @abstractmethod
    def start(self, field: VectorField, x: Tensor, generator: torch.Generator | None) -> Probe:
        """Draw the probe of one solve for the rows of x; None where nothing is random."""

    @abstractmethod
    def value_and_divergence(
        self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, probe: Probe
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt (batch, \\*event) and the divergence or its estimate (batch,)."""
