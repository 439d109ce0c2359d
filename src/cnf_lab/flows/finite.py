r"""Flows of finitely many maps in closed form: the baselines of the continuous ones.

Maps and networks are zuko's. Preprocessing, context encoder, base distribution, training and
evaluation are those of a continuous flow, so that the numbers of both compare.

References:
    Dinh et al., Density estimation using Real NVP (2017), https://arxiv.org/abs/1605.08803.
    Papamakarios et al., Masked Autoregressive Flow for Density Estimation (2017), https://arxiv.org/abs/1705.07057.
    Durkan et al., Neural Spline Flows (2019), https://arxiv.org/abs/1906.04032.
    Rozet et al., Zuko: Normalizing flows in PyTorch (2022), https://zuko.readthedocs.io.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cnf_lab.errors import ConfigError
from cnf_lab.flows.base import Chain, Flow, Mapped, Transform
from cnf_lab.flows.base_distribution import StandardNormal
from cnf_lab.flows.density import context_encoder
from cnf_lab.flows.preprocess import Preprocess
from cnf_lab.flows.riders import Rider


class FiniteTransform(Transform):
    r"""A composition of maps in closed form, made anew for each context.

    .. math:: z = (f_K \circ \dots \circ f_1)(x \mid c), \qquad
              \log\left|\det \frac{\partial z}{\partial x}\right| = \sum_k \log|\det J_{f_k}|.

    There is no time to integrate over, so that no regulariser can ride along. Events are
    flattened to columns.

    Args:
        transform: zuko's lazy transform: a function of a context (batch, features) or None
            that returns the map from data to latent.
    """

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def pull_back(
        self,
        x: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        integrands: Sequence[Rider] = (),
    ) -> Mapped:
        """Map data to latent; integrands are refused."""
        if integrands:
            kinds = ", ".join(type(integrand).__name__ for integrand in integrands)
            raise ConfigError(
                f"Expected no regulariser on a model without a vector field, got {kinds}. Type regulariser=none."
            )
        with self._precision(x):
            value, log_det = self._map(x, context).call_and_ladj(x.flatten(1))
        return Mapped(value.reshape(x.shape).to(x), log_det.to(x))

    def push_forward(
        self,
        z: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        with_log_det: bool = True,
    ) -> Mapped:
        """Map latent to data; an autoregressive map takes one pass of its network per column."""
        with self._precision(z):
            inverse = self._map(z, context).inv
            if not with_log_det:
                return Mapped(inverse(z.flatten(1)).reshape(z.shape).to(z), z.new_zeros(len(z)))
            value, log_det = inverse.call_and_ladj(z.flatten(1))
        return Mapped(value.reshape(z.shape).to(z), log_det.to(z))

    def _map(self, x: Tensor, context: Tensor | None) -> Any:
        return self.transform(None if context is None else context.to(x))

    def _precision(self, x: Tensor) -> AbstractContextManager[Any]:
        # As in a continuous flow: evaluation keeps the full precision under an autocast of training.
        return nullcontext() if self.training else torch.autocast(x.device.type, enabled=False)


def realnvp_flow(
    event_shape: tuple[int, ...],
    context_features: int,
    preprocess: Sequence[Callable[..., Preprocess]],
    normalisation: Callable[..., Transform] | None = None,
    transforms: int = 10,
    hidden: Sequence[int] = (128, 128),
    context_width: int = 64,
) -> Flow:
    """Build RealNVP: affine coupling layers, each of which transforms every second column given the others."""
    make = _zuko("realnvp").RealNVP
    return _flow(make, event_shape, context_features, preprocess, normalisation, transforms, hidden, context_width)


def maf_flow(
    event_shape: tuple[int, ...],
    context_features: int,
    preprocess: Sequence[Callable[..., Preprocess]],
    normalisation: Callable[..., Transform] | None = None,
    transforms: int = 5,
    hidden: Sequence[int] = (128, 128),
    context_width: int = 64,
) -> Flow:
    """Build MAF: affine maps of each column given those before it, the order reversed from one to the next."""
    make = _zuko("maf").MAF
    return _flow(make, event_shape, context_features, preprocess, normalisation, transforms, hidden, context_width)


def nsf_flow(
    event_shape: tuple[int, ...],
    context_features: int,
    preprocess: Sequence[Callable[..., Preprocess]],
    normalisation: Callable[..., Transform] | None = None,
    transforms: int = 5,
    hidden: Sequence[int] = (128, 128),
    context_width: int = 64,
    bins: int = 8,
) -> Flow:
    """Build NSF: rational-quadratic splines with some bins on [-5, 5] in place of MAF's affine maps.

    Outside of that interval a spline is the identity: it wants data of mean 0 and variance 1.
    """
    if bins < 2:
        raise ConfigError(f"Expected model.bins of at least 2, got {bins}. Type model.bins=8.")

    def make(**sizes: Any) -> Any:
        return _zuko("nsf").NSF(bins=bins, **sizes)

    return _flow(make, event_shape, context_features, preprocess, normalisation, transforms, hidden, context_width)


def _flow(
    make: Callable[..., Any],
    event_shape: tuple[int, ...],
    context_features: int,
    preprocess: Sequence[Callable[..., Preprocess]],
    normalisation: Callable[..., Transform] | None,
    transforms: int,
    hidden: Sequence[int],
    context_width: int,
) -> Flow:
    """Build preprocess, then a flow of zuko; a context is encoded as for continuous blocks.

    Args:
        make: zuko's flow, of which only the transform is taken: its base is ours.
        event_shape: Shape of one event.
        context_features: Number of conditioning columns; 0 for none.
        preprocess: Make the fixed layers from ``event_shape``, the first one next to the data.
        normalisation: None: the maps have no place for a layer between them.
        transforms: Number of maps.
        hidden: Widths of the hidden layers of each map's network, whose activation is zuko's, ReLU.
        context_width: Width of the encoded context.

    Raises:
        ConfigError: If an option is out of range, or a normalisation is asked for.
    """
    if normalisation is not None:
        raise ConfigError("Expected no normalisation in a model of zuko's, got one. Type normalisation=none.")
    if transforms < 1:
        raise ConfigError(f"Expected model.transforms of at least 1, got {transforms}. Type model.transforms=5.")
    if not hidden or min(hidden) < 1:
        raise ConfigError(
            f"Expected model.hidden with at least one positive width, got {list(hidden)}. Type model.hidden=[128,128]."
        )
    lazy = make(
        features=math.prod(event_shape),
        context=context_width if context_features else 0,
        transforms=transforms,
        hidden_features=tuple(hidden),
    ).transform
    chain = Chain([*(layer(event_shape=event_shape) for layer in preprocess), FiniteTransform(lazy)])
    encoder = context_encoder(context_features, context_width) if context_features else None
    return Flow(chain, StandardNormal(event_shape), context_features, encoder)


def _zuko(model: str) -> ModuleType:
    try:
        import zuko
    except ModuleNotFoundError as failure:
        raise ConfigError(
            f'Expected the package zuko for model={model}, got none. Type pip install "cnf-lab[peers]".'
        ) from failure
    return zuko.flows
