"""The seam of all training objectives."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cnf_lab.flows import Flow
from cnf_lab.ode import SolveStats


@dataclass(frozen=True)
class LossTerms:
    """A loss with its parts.

    Attributes:
        loss: What is minimised, a scalar.
        terms: Named parts, one number per example (batch,), for the logs.
        solves: What the solves cost.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    solves: tuple[SolveStats, ...] = ()


class Objective(ABC):
    """What training minimises."""

    @abstractmethod
    def __call__(self, flow: Flow, x: Tensor, context: Tensor | None, generator: torch.Generator | None) -> LossTerms:
        """Evaluate the objective on a batch.

        Args:
            flow: The density, in training mode.
            x: Rows (batch, \\*event).
            context: Conditioning (batch, features) or None.
            generator: Source of everything random in the objective.
        """
