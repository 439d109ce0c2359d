"""The seam of all training objectives."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.errors import ConfigError
from cnf_lab.flows import Flow
from cnf_lab.ode import SolveStats

#: What is trained: a density, or an autoencoder with one inside.
Model = TypeVar("Model", Flow, VariationalAutoencoder)


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


class Objective(ABC, Generic[Model]):
    """What training minimises."""

    #: Whether its steps solve, with the solver and the divergence of training.
    solves: bool = True
    #: What it can train.
    kind: type[nn.Module] = Flow

    def check(self, flow: nn.Module) -> None:
        """Refuse a model that this objective cannot train.

        Args:
            flow: The model.

        Raises:
            ConfigError: If it cannot.
        """
        if not isinstance(flow, self.kind):
            typed = "elbo" if isinstance(flow, VariationalAutoencoder) else "likelihood"
            raise ConfigError(
                f"Expected objective=elbo with model=vae, and another one with any other model, got "
                f"{type(self).__name__} for a {type(flow).__name__}. Type objective={typed}."
            )

    def begin_epoch(self, epoch: int) -> None:
        """Learn which epoch of the stage begins, counted from 0; for objectives that change with time.

        Args:
            epoch: Number of the epoch.
        """

    @abstractmethod
    def __call__(self, flow: Model, x: Tensor, context: Tensor | None, generator: torch.Generator | None) -> LossTerms:
        """Evaluate the objective on a batch.

        Args:
            flow: The model, in training mode.
            x: Rows (batch, \\*event).
            context: Conditioning (batch, features) or None.
            generator: Source of everything random in the objective.
        """


@dataclass(frozen=True)
class StagePlan:
    """What a stage of training has of its own.

    Attributes:
        steps: Optimiser steps, rounded up to whole epochs; None lasts until training ends.
        lr: Learning rate at the start; None takes the optimiser's.
        rows: Rows of each batch that are used; None uses all.
        validate_every_n_epochs: Epochs between validations; None takes the trainer's.
        from_best: Whether the stage starts from the weights that validated best so far, where there
            is a checkpoint of them, and not from the last ones.

    Raises:
        ConfigError: If a number is out of range.
    """

    steps: int | None = None
    lr: float | None = None
    rows: int | None = None
    validate_every_n_epochs: int | None = None
    from_best: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "rows", "validate_every_n_epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(
                    f"Expected {name} of a stage above 0, got {value}. Type objective.<stage>.{name}=<number>."
                )


@dataclass(frozen=True)
class Stage:
    """A part of training with one objective.

    Attributes:
        name: Name in the logs.
        objective: What is minimised.
        plan: What else is the stage's own.
    """

    name: str
    objective: Objective[Any]
    plan: StagePlan = StagePlan()


class StagedObjective(ABC):
    """Objectives that train one after the other; the weights go on from stage to stage."""

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The stages in their order."""
