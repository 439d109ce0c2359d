"""From a configuration to data, flow, LightningModule and Trainer.

Hydra's ``instantiate`` is the only registry. What is added here are the values that one part
needs of another (the event shape, for example), checks that the parts fit together, and
errors that name the option instead of a chain of exceptions.
"""

import difflib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytorch_lightning as pl
import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor
from torch import Tensor

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.data import Batch, FlowDataModule
from cnf_lab.errors import ConfigError, LabError
from cnf_lab.flows import ContextScaler, Flow, Preprocess
from cnf_lab.models import FlowModule

_FITTED_NUMBERS = 2**23  # entries of a batch that fixed layers are fitted to


def build(config: DictConfig | dict[str, Any], what: str, **values: Any) -> Any:
    """Instantiate a node of the configuration, lists and dicts as plain ones.

    Args:
        config: The node.
        what: Name of the option group, for messages.
        **values: Arguments that come from other parts.

    Raises:
        LabError: As the part raised it.
        ConfigError: If the part cannot be made with these options.
    """
    _check_options(config, what)
    try:
        # The values join at the call: inside instantiate they would be copied and searched for targets.
        return instantiate(config, _partial_=True, _convert_="all")(**values)
    except Exception as failure:
        cause = _root(failure)
        if isinstance(cause, LabError):
            raise cause from None
        raise ConfigError(
            f"Expected options of {what} that make a {_target(config)}, got {type(cause).__name__}: "
            f"{' '.join(str(cause).split())}. See the options with --help."
        ) from failure


def build_factory(config: DictConfig | dict[str, Any], what: str) -> Callable[..., Any]:
    """Return a function that builds a fresh part of a node from further values."""

    def factory(**values: Any) -> Any:
        return build(config, what, **values)

    return factory


def build_data(config: DictConfig) -> FlowDataModule:
    """Build the data module and load its splits."""
    data = build(config.dataset, "dataset")
    data.setup()
    return data


def build_flow(config: DictConfig, event_shape: Iterable[int], context_features: int) -> Flow | VariationalAutoencoder:
    """Build the flow of a configuration for events of a shape, or the autoencoder.

    Args:
        config: The whole configuration.
        event_shape: Shape of one event.
        context_features: Number of conditioning columns; 0 for none.
    """
    solver, evaluation_solver = build_solvers(config.solver)
    model = _without(config.model, "name", "module", "monitor", "evaluation_trace")
    parts = {
        "event_shape": tuple(event_shape),
        "context_features": context_features,
        "field": build_factory(config.architecture, "architecture"),
        "solver": solver,
        "evaluation_solver": evaluation_solver,
        "divergence": build(config.trace, "trace"),
        "evaluation_divergence": build(config.model.evaluation_trace, "model.evaluation_trace")
        if "evaluation_trace" in config.model
        else None,
        "preprocess": [build_factory(node, f"preprocess.{name}") for name, node in _layers(config) if node],
        "normalisation": build_factory(config.normalisation, "normalisation") if config.normalisation else None,
    }
    parts["posterior"] = _posterior_factory(config, parts)
    return build(model, "model", **_wanted(model, parts))


def _posterior_factory(config: DictConfig, parts: dict[str, Any]) -> Callable[..., Any]:
    """Return a function that builds the flow of a posterior, with a field of its own where it is continuous."""

    def factory(**values: Any) -> Any:
        if not config.get("posterior"):
            raise ConfigError("Expected a posterior with model=vae, got none. Type posterior=cnf_gated.")
        node = _without(config.posterior, "field")
        given = {**parts, **values}
        if "field" in config.posterior:
            given["field"] = build_factory(config.posterior.field, "posterior.field")
        return build(node, "posterior", **_wanted(node, given))

    return factory


def _wanted(node: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """Return what a target has an argument for: one without a vector field has none for a solver."""
    wanted = inspect.signature(get_object(node["_target_"])).parameters
    return {name: part for name, part in parts.items() if name in wanted}


def build_solvers(config: DictConfig) -> tuple[Any, Any]:
    """Build the solver of training and the one of evaluation, which changes some of its options."""
    training = _without(config, "evaluation")
    evaluation = {**training, **_without(config.evaluation)}
    return build(training, "solver"), build(evaluation, "solver.evaluation")


def fit_preprocess(flow: Flow | VariationalAutoencoder, data: FlowDataModule) -> None:
    """Fit the fixed layers of a fresh flow to the training split, each to what the ones before it make of it."""
    if isinstance(flow, VariationalAutoencoder):
        return
    fitted: list[Preprocess] = []
    for part in flow.modules():
        if isinstance(part, Preprocess):
            part.fit(_mapped(_dequantised(flow, batch, start), fitted) for start, (batch, _) in _training_rows(data))
            fitted.append(part)
        elif isinstance(part, ContextScaler):
            part.fit(context for _, (_, context) in _training_rows(data) if context is not None)


def build_module(config: DictConfig, flow: Flow | VariationalAutoencoder, data: FlowDataModule) -> FlowModule[Any]:
    """Build the LightningModule around a flow; its checkpoints can rebuild the flow alone."""
    _check_levels(config, flow, data)
    regularisers = {name: build(node, f"regulariser.{name}") for name, node in _several(config, "regulariser")}
    rebuild = {
        "config": plain(config),
        "event_shape": list(data.event_shape),
        "context_features": data.context_features,
        "data": data.describe(),
    }
    return build(
        config.model.module,
        "model.module",
        flow=flow,
        objective=build(config.objective, "objective", regularisers=regularisers),
        optimiser=build_factory(config.optimiser, "optimiser"),
        schedule=_schedule_factory(config.schedule),
        seed=config.seed,
        rebuild=rebuild,
    )


def _check_levels(config: DictConfig, flow: Flow | VariationalAutoencoder, data: FlowDataModule) -> None:
    """Refuse continuous data for a model of pixels, pixels of other levels, and pixels for a continuous density."""
    part = flow.likelihood if isinstance(flow, VariationalAutoencoder) else flow.dequantiser
    levels = getattr(data, "levels", None)
    if part is None:
        if levels is not None:  # a density may grow without bound on whole numbers
            raise ConfigError(
                f"Expected continuous values for model={config.model.name}, got {data.name}, whose values are pixels. "
                "Type model=image."
            )
        return
    if levels is None:
        raise ConfigError(
            f"Expected pixels for model={config.model.name}, got {data.name}, whose values are continuous. "
            "Type model=density."
        )
    if levels != part.levels:
        raise ConfigError(
            f"Expected recipe.levels={levels}, the values of a pixel of {data.name}, got {part.levels}. "
            f"Type recipe.levels={levels}."
        )


def _schedule_factory(config: DictConfig) -> Callable[..., Any]:
    """Return a function that builds a schedule; epochs of a stage reach the schedules that count them."""

    def factory(**values: Any) -> Any:
        known = {name: value for name, value in values.items() if name != "epochs" or name in config}
        return build(config, "schedule", **known)

    return factory


def build_trainer(config: DictConfig) -> pl.Trainer:
    """Build the Trainer with its callbacks and loggers.

    A terminal gets progress bars; a file gets a line per epoch from the callback for it.
    """
    loggers = [build(node, f"logger.{name}") for name, node in _several(config, "logger") if OmegaConf.is_dict(node)]
    callbacks = [build(node, f"callbacks.{name}") for name, node in _several(config, "callbacks") if node]
    if not loggers:
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    return build(
        config.trainer,
        "trainer",
        callbacks=callbacks,
        logger=loggers or False,
        default_root_dir=config.paths.run,
        enable_progress_bar=sys.stdout.isatty(),
    )


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as resolved dicts and lists of primitives."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _several(config: DictConfig, group: str) -> Iterable[tuple[Any, Any]]:
    """Return the nodes of a group of which several options may be chosen, or none."""
    return (OmegaConf.select(config, group) or {}).items()


def _layers(config: DictConfig) -> Iterable[tuple[Any, Any]]:
    """Return the nodes of preprocess; runs before there could be several have one without a name."""
    return [("layer", config.preprocess)] if "_target_" in config.preprocess else _several(config, "preprocess")


def _check_options(config: DictConfig | dict[str, Any], what: str) -> None:
    """Say which option is unknown, or is a text where a number belongs, of parts of the part too."""
    for key, value in config.items():
        if OmegaConf.is_dict(value) and "_target_" in value:
            _check_options(value, f"{what}.{key!s}")
    target = get_object(config["_target_"])
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    hints = _hints(target)
    for key, value in ((str(key), value) for key, value in config.items()):
        if key.startswith("_"):
            continue
        if key not in parameters:
            closest = difflib.get_close_matches(key, parameters, n=1)
            typed = f" Type {what}.{closest[0]}={value}." if closest else ""
            raise ConfigError(f"Expected {what} to have options {', '.join(parameters)}, got {key}.{typed}")
        text = isinstance(value, str) and key in hints and not _admits_text(hints[key])
        fraction = (
            isinstance(value, float) and int in _members(hints.get(key)) and float not in _members(hints.get(key))
        )
        if text or fraction:
            wanted = " or ".join(member.__name__ for member in _members(hints[key]) if member is not type(None))
            raise ConfigError(f"Expected {what}.{key} to be {wanted}, got {value}. Type {what}.{key}=<{wanted}>.")


def _hints(target: Any) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):
        return {}  # annotations that need imports of their own are not ours to check


def _admits_text(hint: Any) -> bool:
    """Whether an annotation leaves room for a text: anything but numbers, truth values and None."""
    return not all(member in (int, float, bool, type(None), torch.Tensor) for member in _members(hint))


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _mapped(x: Tensor, layers: Iterable[Preprocess]) -> Tensor:
    for layer in layers:
        x = layer.to_latent(x)[0]
    return x


def _dequantised(flow: Flow, x: Tensor, seed: int) -> Tensor:
    # The same noise for every layer: each is fitted to what the ones before it made of the same rows.
    with torch.no_grad():
        return flow.dequantise(x, torch.Generator().manual_seed(seed))[0]


def _training_rows(data: FlowDataModule) -> Iterator[tuple[int, Batch]]:
    """Yield batches of the training split, each with the number of its first row."""
    # A fixed number of rows stands for generated data, which have no end.
    rows = data.splits.train
    count, size = len(rows), max(1, _FITTED_NUMBERS // math.prod(data.event_shape))
    for start in range(0, count, size):
        yield start, rows.__getitems__(range(start, min(start + size, count)))


def _without(config: DictConfig, *keys: str) -> dict[str, Any]:
    # Interpolations are resolved first: they may point at the keys left out.
    return {key: value for key, value in plain(config).items() if key not in keys}


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None and not isinstance(error, LabError):
        error = error.__cause__
    return error


def _target(config: DictConfig | dict[str, Any]) -> str:
    return str(config.get("_target_", "part")).rsplit(".", 1)[-1]
