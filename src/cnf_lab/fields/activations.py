r"""Nonlinearities that also give their slope.

Exact divergences and forward-mode products need :math:`a'(u)` beside :math:`a(u)`; both
together cost little more than one.
"""

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Activation(nn.Module, ABC):
    """An elementwise nonlinearity with its derivative."""

    @abstractmethod
    def value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return a(u) and a'(u), both differentiable."""

    def forward(self, u: Tensor) -> Tensor:
        """Return a(u)."""
        return self.value_and_slope(u)[0]


class _Pair(torch.autograd.Function):
    """(a(u), a'(u)), whose derivatives need no more than the two results.

    Left to themselves value and slope would each remember and differentiate on their own, twice
    the passes over the activations; these passes are what a field costs besides its products.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*output)


class _TanhPair(_Pair):
    @staticmethod
    def forward(u: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.tanh(u)
        return value, 1 - value * value

    @staticmethod
    def backward(ctx: Any, by_value: Tensor, by_slope: Tensor) -> Tensor:
        value, slope = ctx.saved_tensors
        return torch.addcmul(by_value, by_slope, value, value=-2) * slope


class _SoftplusPair(_Pair):
    @staticmethod
    def forward(u: Tensor) -> tuple[Tensor, Tensor]:
        return F.softplus(u), torch.sigmoid(u)

    @staticmethod
    def backward(ctx: Any, by_value: Tensor, by_slope: Tensor) -> Tensor:
        _, slope = ctx.saved_tensors
        return torch.addcmul(by_value + by_slope, by_slope, slope, value=-1) * slope


class _SiluPair(_Pair):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def forward(u: Tensor) -> tuple[Tensor, Tensor]:
        value, slope, _ = _silu(u)
        return value, slope

    @staticmethod
    def backward(ctx: Any, by_value: Tensor, by_slope: Tensor) -> Tensor:
        _, slope, curvature = _silu(*ctx.saved_tensors)
        return by_value * slope + by_slope * curvature


def _silu(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u σ(u) and its first two derivatives."""
    gate = torch.sigmoid(u)
    value = u * gate
    slope = gate + value * (1 - gate)
    return value, slope, gate * (1 - gate) * (2 + u * (1 - 2 * gate))


# The compiler takes no Function with a forward derivative, which torch.func.jvp asks for: both exist.
class _ForwardMode(_Pair):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)


class _TanhPairForward(_ForwardMode, _TanhPair):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = ctx.saved_tensors
        return slope * tangent, -2 * value * slope * tangent


class _SoftplusPairForward(_ForwardMode, _SoftplusPair):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        _, slope = ctx.saved_tensors
        return slope * tangent, slope * (1 - slope) * tangent


class _SiluPairForward(_SiluPair):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        _, slope, curvature = _silu(*ctx.saved_tensors)
        return slope * tangent, curvature * tangent


def _apply(plain: type[_Pair], forward_mode: type[_Pair], u: Tensor) -> tuple[Tensor, Tensor]:
    pair = plain if torch.compiler.is_compiling() else forward_mode
    return cast(tuple[Tensor, Tensor], pair.apply(u))


class Tanh(Activation):
    """The hyperbolic tangent."""

    def value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return tanh u and 1 - tanh² u."""
        return _apply(_TanhPair, _TanhPairForward, u)

    def forward(self, u: Tensor) -> Tensor:
        """Return tanh u."""
        return torch.tanh(u)


class Softplus(Activation):
    """log(1 + exp u)."""

    def value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return softplus u and the logistic function of u."""
        return _apply(_SoftplusPair, _SoftplusPairForward, u)

    def forward(self, u: Tensor) -> Tensor:
        """Return softplus u."""
        return F.softplus(u)


class Silu(Activation):
    """u σ(u): smooth, and linear far from the origin as the exact field of a heavy tail is."""

    def value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return u σ(u) and σ(u) (1 + u (1 - σ(u)))."""
        return _apply(_SiluPair, _SiluPairForward, u)

    def forward(self, u: Tensor) -> Tensor:
        """Return u σ(u)."""
        return F.silu(u)


class Elu(Activation):
    """u for u > 0, exp(u) - 1 otherwise."""

    def value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return elu u and its slope, exp(min(u, 0))."""
        return F.elu(u), torch.exp(u.clamp(max=0))


class Relu(Activation):
    """max(u, 0): its kinks cost an adaptive solver many small steps; prefer a smooth one."""

    def value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return relu u and 1 where u > 0."""
        return F.relu(u), (u > 0).to(u.dtype)


class Swish(Activation):
    r"""u σ(βu) with a β of its own that is learned (the original shared one among all layers)."""

    def __init__(self) -> None:
        super().__init__()
        self.raw_beta = nn.Parameter(torch.tensor(0.5))

    def value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return u σ(βu) and σ(βu) (1 + βu (1 - σ(βu)))."""
        beta = F.softplus(self.raw_beta)
        gate = torch.sigmoid(beta * u)
        return u * gate, gate * (1 + beta * u * (1 - gate))


class Square(Activation):
    """u²."""

    def value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return u² and 2u."""
        return u * u, 2 * u


class Identity(Activation):
    """u, for linear fields whose flows are known exactly."""

    def value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return u and 1."""
        return u, torch.ones_like(u)
