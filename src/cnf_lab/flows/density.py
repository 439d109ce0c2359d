"""The chain that estimates a density of rows."""

from collections.abc import Callable, Sequence

from torch import nn

from cnf_lab.errors import ConfigError
from cnf_lab.fields import VectorField
from cnf_lab.flows.base import Chain, Flow, Transform
from cnf_lab.flows.base_distribution import StandardNormal
from cnf_lab.flows.continuous import ContinuousFlow
from cnf_lab.flows.preprocess import ContextScaler, NoPreprocess, Preprocess
from cnf_lab.ode import OdeSolver
from cnf_lab.trace import DivergenceEstimator


def density_flow(
    event_shape: tuple[int, ...],
    context_features: int,
    field: Callable[..., VectorField],
    solver: OdeSolver,
    evaluation_solver: OdeSolver,
    divergence: DivergenceEstimator,
    evaluation_divergence: DivergenceEstimator,
    preprocess: Sequence[Callable[..., Preprocess]],
    normalisation: Callable[..., Transform] | None = None,
    blocks: int = 1,
    end_time: float = 1.0,
    train_end_time: bool = False,
    context_width: int = 64,
) -> Flow:
    """Build preprocess, then blocks of continuous flow, with normalisation between them if asked for.

    With normalisation N the chain is N, (block, N) × blocks, as in the original. A context is
    standardised and encoded by a network of two layers before every block gets it.

    Args:
        event_shape: Shape of one event.
        context_features: Number of conditioning columns; 0 for none.
        field: Makes a vector field from ``event_shape`` and ``context_features``.
        solver: Solver in training mode.
        evaluation_solver: Solver in evaluation mode.
        divergence: Divergence estimator in training mode.
        evaluation_divergence: Divergence estimator in evaluation mode.
        preprocess: Make the fixed layers from ``event_shape``, the first one next to the data.
        normalisation: Makes a normalisation layer from ``event_shape``.
        blocks: Number of continuous flows.
        end_time: End time T of each block.
        train_end_time: Whether the end times are trained.
        context_width: Width of the encoded context.

    Raises:
        ConfigError: If there are no blocks, or the parts do not fit together.
    """
    if blocks < 1:
        raise ConfigError(f"Expected model.blocks of at least 1, got {blocks}. Type model.blocks=1.")
    encoded = context_width if context_features else 0
    transforms: list[Transform] = [make(event_shape=event_shape) for make in preprocess or [NoPreprocess]]
    for _ in range(blocks):
        if normalisation is not None:
            transforms.append(normalisation(event_shape=event_shape))
        transforms.append(
            ContinuousFlow(
                field(event_shape=event_shape, context_features=encoded),
                solver,
                divergence,
                evaluation_solver,
                evaluation_divergence,
                end_time,
                train_end_time,
            )
        )
    if normalisation is not None:
        transforms.append(normalisation(event_shape=event_shape))
    encoder = context_encoder(context_features, context_width) if context_features else None
    return Flow(Chain(transforms), StandardNormal(event_shape), context_features, encoder)


def context_encoder(features: int, width: int) -> nn.Module:
    """Return the network between the context as the data give it and as transforms get it.

    Args:
        features: Number of conditioning columns.
        width: Width of the encoded context.
    """
    return nn.Sequential(
        ContextScaler(features), nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
    )
