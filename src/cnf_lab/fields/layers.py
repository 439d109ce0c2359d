r"""Time-conditioned linear layers: at every time each of them is an affine map.

All layers, the original's and ours, have the form :math:`y = g(t) \circ (W(t) x) + s(t)`. A layer says
what W, g and s are (:meth:`TimeLinear.at`), and values, forward-mode products and closed-form
divergences follow from that one description.

References:
    Grathwohl et al., FFJORD (2019), https://arxiv.org/abs/1810.01367, and its code.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnf_lab.fields.base import Time, time_column
from cnf_lab.fields.embedding import TimeEmbedding
from cnf_lab.shapes import Float


class AffineMap(NamedTuple):
    r"""The map :math:`x \mapsto g \circ (W x) + s`, and :math:`+\, V^\top U^\top x` where rows differ.

    Attributes:
        weight: W (out, in), or (batch, out, in) where it differs between rows. A gate that all
            rows share is folded in.
        gate: g (batch, out) where it differs between rows; None stands for 1.
        shift: s, (out,) or (batch, out).
        low_rank: U (batch, in, rank) and V (batch, rank, out) of a part of the weight that
            differs between rows; None for none.
    """

    weight: Tensor
    gate: Tensor | None
    shift: Tensor
    low_rank: tuple[Tensor, Tensor] | None = None

    @property
    def shared(self) -> bool:
        """Whether all rows have the same weight."""
        return self.weight.dim() == 2 and self.low_rank is None

    def __call__(self, x: Float[Tensor, "batch in"]) -> Float[Tensor, "batch out"]:
        if self.shared and self.gate is None and self.shift.dim() == 1:
            return F.linear(x, self.weight, self.shift)
        return self.linear(x) + self.shift

    def linear(self, v: Float[Tensor, "*more rows in"]) -> Float[Tensor, "*more rows_out out"]:
        """Apply the linear part, to tangents as well."""
        per_row = self.weight.dim() == 3
        y = torch.einsum("boi,...bi->...bo", self.weight, v) if per_row else F.linear(v, self.weight)
        if self.gate is not None:
            y = y * self.gate
        if self.low_rank is not None:
            # All tangents of a row in one product with that row's factors.
            inner = torch.einsum("...bi,bir->...br", v, self.low_rank[0])
            y = y + torch.einsum("...br,bro->...bo", inner, self.low_rank[1])
        return y

    def modulated(self, gate: Tensor, shift: Tensor) -> "AffineMap":
        """Return the map followed by y -> gate y + shift, both (batch, out)."""
        own = gate if self.gate is None else self.gate * gate
        low_rank = None if self.low_rank is None else (self.low_rank[0], self.low_rank[1] * gate.unsqueeze(1))
        return AffineMap(self.weight, own, self.shift * gate + shift, low_rank)


class TimeLinear(nn.Module, ABC):
    """A linear layer whose coefficients depend on time.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
    """

    #: Whether the layer is defined only for times in [0, 1].
    unit_time: bool = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    @abstractmethod
    def at(self, t: Time) -> AffineMap:
        """Return the affine map at a time."""

    def forward(self, t: Time, x: Float[Tensor, "batch in"]) -> Float[Tensor, "batch out"]:
        """Apply the layer."""
        return self.at(t)(x)

    def zero(self) -> None:
        """Set the parameters so that the output is zero at all times, and can be learned from there."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class Ignore(TimeLinear):
    """W x + b, whatever the time."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.linear = nn.Linear(in_features, out_features)

    def at(self, t: Time) -> AffineMap:
        """Return (W, 1, b)."""
        return AffineMap(self.linear.weight, None, self.linear.bias)


class Concat(TimeLinear):
    """W [t; x] + b, the time as an extra first input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.linear = nn.Linear(in_features + 1, out_features)

    def at(self, t: Time) -> AffineMap:
        """Split W into its time column, which shifts, and the rest."""
        weight = self.linear.weight
        return AffineMap(weight[:, 1:], None, self.linear.bias + _scaled(t, weight[:, 0]))


class ConcatCoord(Concat):
    """For rows the same as :class:`Concat`; images also get the coordinates of the pixel."""


class ConcatV2(TimeLinear):
    """W x + b + v t: like :class:`Concat`, with the time outside a spectrally normalised W."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.linear = nn.Linear(in_features, out_features)
        self.time_shift = nn.Linear(1, out_features, bias=False)

    def at(self, t: Time) -> AffineMap:
        """Return (W, 1, b + v t)."""
        return AffineMap(self.linear.weight, None, self.linear.bias + _scaled(t, self.time_shift.weight[:, 0]))


class Squash(TimeLinear):
    """(W x + b) σ(a t + c)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.linear = nn.Linear(in_features, out_features)
        self.time_gate = nn.Linear(1, out_features)

    def at(self, t: Time) -> AffineMap:
        """Return (W, σ, σ b)."""
        gate = torch.sigmoid(self.time_gate(time_column(t)))
        return _gated(t, self.linear, gate, gate * self.linear.bias)


class ConcatSquash(TimeLinear):
    """(W x + b) σ(a t + c) + v t."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.linear = nn.Linear(in_features, out_features)
        self.time_gate = nn.Linear(1, out_features)
        self.time_shift = nn.Linear(1, out_features, bias=False)

    def at(self, t: Time) -> AffineMap:
        """Return (W, σ, σ b + v t)."""
        column = time_column(t)
        gate = torch.sigmoid(self.time_gate(column))
        return _gated(t, self.linear, gate, gate * self.linear.bias + self.time_shift(column))


class Blend(TimeLinear):
    """(1 - t) (W0 x + b0) + t (W1 x + b1), for times in [0, 1]."""

    unit_time = True

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.start = nn.Linear(in_features, out_features)
        self.end = nn.Linear(in_features, out_features)

    def at(self, t: Time) -> AffineMap:
        """Interpolate both weights and biases; a time per example gives a weight per example."""
        weight = torch.lerp(self.start.weight, self.end.weight, t.reshape(t.shape + (1, 1)))
        shift = torch.lerp(self.start.bias, self.end.bias, t.reshape(t.shape + (1,)))
        return AffineMap(weight, None, shift)


class Hyper(TimeLinear):
    """W(t) x + b(t) with both from a small network of time, 1-8-(out + out in), tanh.

    Starts near zero: all weights of the network are 0, its biases N(0, 0.01²).
    """

    width = 8

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        outputs = out_features * (in_features + 1)
        self.network = nn.Sequential(nn.Linear(1, self.width), nn.Tanh(), nn.Linear(self.width, outputs))
        for name, parameter in self.network.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.01)
            else:
                nn.init.zeros_(parameter)

    def at(self, t: Time) -> AffineMap:
        """Return the network's output, bias first, then the rows of W."""
        out = self.network(time_column(t)).reshape(t.shape + (-1,))
        shift, weight = out.split([self.out_features, self.out_features * self.in_features], dim=-1)
        return AffineMap(weight.unflatten(-1, (self.out_features, self.in_features)), None, shift)

    def zero(self) -> None:
        """Set the network's last layer to zero; a network of zeros could not learn what depends on time."""
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)


class Embedded(TimeLinear):
    """(1 + g(e)) (W x + b) + s(e), with e a learned embedding of time, g and s linear in it.

    Starts as W x + b at all times.
    """

    width = 64

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.linear = nn.Linear(in_features, out_features)
        self.embedding = TimeEmbedding(self.width)
        self.modulation = nn.Linear(self.width, 2 * out_features)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def at(self, t: Time) -> AffineMap:
        """Return (W, 1 + g, (1 + g) b + s)."""
        change, shift = self.modulation(self.embedding(t)).chunk(2, dim=-1)
        return _gated(t, self.linear, 1 + change, (1 + change) * self.linear.bias + shift)

    def zero(self) -> None:
        """Set W and b to zero; an embedding of zeros could not learn."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


def _gated(t: Time, linear: nn.Linear, gate: Tensor, shift: Tensor) -> AffineMap:
    """Return the map of a gated layer; a gate that all rows share is folded into the weight.

    Weights are small beside a batch of activations, and the layer is one matrix product then.
    """
    if t.dim() == 0:
        return AffineMap(gate.reshape(-1, 1) * linear.weight, None, shift.squeeze(0))
    return AffineMap(linear.weight, gate, shift)


def _scaled(t: Time, vector: Float[Tensor, " out"]) -> Tensor:
    """Return t times a vector: (out,) for a scalar time, (batch, out) otherwise."""
    return t * vector if t.dim() == 0 else t.unsqueeze(-1) * vector
