r"""Vector fields whose layers get weights, gates or biases of each row's own, computed by an amortiser.

The context of such a field is the vector of its amortised values: a
:class:`~cnf_lab.flows.ContinuousFlow` with an ``amortiser`` computes it once per solve, and its
gradient comes back like that of any context.

What differs from the original code:

1. The amortised values are arguments of a solve, not parts of its state with derivative zero.
2. With one hidden layer, and with two where the weights are shared, the divergence has a closed
   form; the original tests with one reverse pass per coordinate.
3. No activation follows the last layer. In the original's ``cnf_hyper`` one does, by an oversight:
   with softplus every component of the field is then positive.

References:
    Grathwohl et al., FFJORD (2019), https://arxiv.org/abs/1810.01367, section 4.3 and its code.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from cnf_lab.errors import ConfigError
from cnf_lab.fields.activations import Activation
from cnf_lab.fields.base import Time
from cnf_lab.fields.layers import AffineMap, Ignore, TimeLinear
from cnf_lab.fields.mlp import Stack, StackField, check_hidden


class Amortised(StackField):
    """Time-conditioned layers of which some coefficients belong to each row: its context holds them.

    Args:
        event_shape: Shape of one event, (D,).
        hidden: Widths of the hidden layers.
        stack: Makes the layers from the sizes of input, hidden layers and output.
        layer: Kind of time-conditioned layer.
        context_features: Size of the context; 0 where it is not known beforehand.

    Attributes:
        amortised_features: Number of amortised values per row, the size of the context.

    Raises:
        ConfigError: If there is no hidden layer, the data are not rows, or the context has another size.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        stack: Callable[[Sequence[int]], "_AmortisedStack"],
        layer: type[TimeLinear],
        context_features: int,
    ) -> None:
        super().__init__(event_shape)
        check_hidden(hidden)
        self.unit_time = layer.unit_time
        self.stack = made = stack([event_shape[0], *hidden, event_shape[0]])
        self.amortised_features = sum(made.parts)
        if context_features:
            check_context(self.amortised_features, context_features)


class AmortisedBias(Amortised):
    r"""Shared layers with a bias of each row's own, the original's ``cnf_bias``.

    .. math:: y_l = L_l(t, x) + b_l

    The divergence has a closed form with one or two hidden layers.

    Args:
        event_shape: Shape of one event, (D,).
        hidden: Widths of the hidden layers.
        layer: Kind of time-conditioned layer.
        activation: Nonlinearity between the layers.
        context_features: Size of the context; 0 where it is not known beforehand.

    Raises:
        ConfigError: If there is no hidden layer, the data are not rows, or the context has another size.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        layer: type[TimeLinear],
        activation: type[Activation],
        context_features: int = 0,
    ) -> None:
        def stack(sizes: Sequence[int]) -> _AmortisedStack:
            return _LowRankStack(sizes, layer, activation, 0)

        super().__init__(event_shape, hidden, stack, layer, context_features)


class AmortisedLowRank(Amortised):
    r"""Shared layers with a low-rank part of the weights and a bias of each row's own, ``cnf_rank``.

    .. math:: y_l = L_l(t, x) + (x\, U_l) V_l + b_l

    with :math:`U_l` (in, rank), :math:`V_l` (rank, out) and :math:`b_l` (out) of each row, which do
    not see the time. The context holds them layer by layer, in this order, unscaled.

    The field of the published variational autoencoders. The divergence has a closed form with
    one hidden layer.

    Args:
        event_shape: Shape of one event, (D,).
        hidden: Widths of the hidden layers.
        layer: Kind of time-conditioned layer.
        activation: Nonlinearity between the layers.
        rank: Rank of the per-row part of the weights.
        context_features: Size of the context; 0 where it is not known beforehand.

    Raises:
        ConfigError: If the rank is below 1, there is no hidden layer, the data are not rows, or the
            context has another size.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        layer: type[TimeLinear],
        activation: type[Activation],
        rank: int,
        context_features: int = 0,
    ) -> None:
        if rank < 1:
            raise ConfigError(
                f"Expected architecture.rank of at least 1, got {rank}. Type architecture.rank=1, "
                "or choose the architecture that amortises biases only."
            )

        def stack(sizes: Sequence[int]) -> _AmortisedStack:
            return _LowRankStack(sizes, layer, activation, rank)

        super().__init__(event_shape, hidden, stack, layer, context_features)


class AmortisedGates(Amortised):
    r"""Shared layers with gates and shifts of each row's own on what the activations get.

    .. math:: y_l = (1 + g_l) \circ L_l(t, x) + s_l, \qquad y_L = L_L(t, x) + s_L

    with :math:`g_l` and :math:`s_l` (out) of each row; the context holds them layer by layer, in this
    order, and the last layer has a shift only. Gates and shifts are diagonal: with two hidden
    layers the divergence keeps its closed form with one matrix that all rows share, and a row takes
    twice as many amortised values as there are hidden units, not thousands times as many.

    Args:
        event_shape: Shape of one event, (D,).
        hidden: Widths of the hidden layers.
        layer: Kind of time-conditioned layer.
        activation: Nonlinearity between the layers.
        context_features: Size of the context; 0 where it is not known beforehand.
        zero_start: Whether the last layer starts at zero; with a context of zeros the flow is the identity then.

    Raises:
        ConfigError: If there is no hidden layer, the data are not rows, or the context has another size.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        layer: type[TimeLinear],
        activation: type[Activation],
        context_features: int = 0,
        zero_start: bool = False,
    ) -> None:
        def stack(sizes: Sequence[int]) -> _AmortisedStack:
            return _GatedStack(sizes, layer, activation)

        super().__init__(event_shape, hidden, stack, layer, context_features)
        if zero_start:
            self.stack.layers[-1].zero()


class AmortisedLastLayer(Amortised):
    """Shared hidden layers, and a last layer of each row's own, the original's ``cnf_lyper``.

    The last layer is W [t; x] + b; the context holds b and then the rows of W. The divergence has a
    closed form with one hidden layer.

    Args:
        event_shape: Shape of one event, (D,).
        hidden: Widths of the hidden layers.
        layer: Kind of time-conditioned layer of the hidden ones.
        activation: Nonlinearity between the layers.
        context_features: Size of the context; 0 where it is not known beforehand.

    Raises:
        ConfigError: If there is no hidden layer, the data are not rows, or the context has another size.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        layer: type[TimeLinear],
        activation: type[Activation],
        context_features: int = 0,
    ) -> None:
        def stack(sizes: Sequence[int]) -> _AmortisedStack:
            return _OwnLayersStack(sizes, layer, activation, 1)

        super().__init__(event_shape, hidden, stack, layer, context_features)


class AmortisedLayers(Amortised):
    """All layers of each row's own: a full hypernetwork, the original's ``cnf_hyper``.

    Every layer is W [t; x] + b; the context holds b and then the rows of W, layer by layer. The
    divergence has a closed form with one hidden layer.

    Args:
        event_shape: Shape of one event, (D,).
        hidden: Widths of the hidden layers.
        activation: Nonlinearity between the layers.
        context_features: Size of the context; 0 where it is not known beforehand.

    Raises:
        ConfigError: If there is no hidden layer, the data are not rows, or the context has another size.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        activation: type[Activation],
        context_features: int = 0,
    ) -> None:
        def stack(sizes: Sequence[int]) -> _AmortisedStack:
            return _OwnLayersStack(sizes, Ignore, activation, len(sizes) - 1)

        super().__init__(event_shape, hidden, stack, Ignore, context_features)


class _AmortisedStack(Stack):
    """A stack whose context holds coefficients of each row."""

    #: Sizes of the parts of the context.
    parts: list[int]

    def own(self, context: Tensor | None) -> tuple[Tensor, ...]:
        """Return the parts of the context."""
        check_context(sum(self.parts), 0 if context is None else context.shape[1])
        assert context is not None
        return context.split(self.parts, dim=1)


class _LowRankStack(_AmortisedStack):
    """U, V and bias of every layer."""

    def __init__(self, sizes: Sequence[int], layer: type[TimeLinear], activation: type[Activation], rank: int) -> None:
        super().__init__(sizes, layer, activation)
        self.rank, self.shared = rank, rank == 0
        self.parts = [size for n_in, n_out in pairwise(sizes) for size in (rank * n_in, rank * n_out, n_out)]

    def maps(self, t: Time, context: Tensor | None) -> list[AffineMap]:
        """Return the layers' affine maps at a time with the parts of each row."""
        own, maps = self.own(context), []
        for layer, u, v, bias in zip(self.layers, own[::3], own[1::3], own[2::3], strict=True):
            shared = layer.at(t)
            low_rank = (u.unflatten(1, (-1, self.rank)), v.unflatten(1, (self.rank, -1))) if self.rank else None
            maps.append(AffineMap(shared.weight, shared.gate, shared.shift + bias, low_rank))
        return maps


class _GatedStack(_AmortisedStack):
    """Gate and shift of every hidden layer, and the shift of the last."""

    def __init__(self, sizes: Sequence[int], layer: type[TimeLinear], activation: type[Activation]) -> None:
        super().__init__(sizes, layer, activation)
        self.parts = [*(size for size in sizes[1:-1] for _ in range(2)), sizes[-1]]

    def maps(self, t: Time, context: Tensor | None) -> list[AffineMap]:
        """Return the layers' affine maps at a time with the gates and shifts of each row."""
        *own, shift = self.own(context)
        maps = [layer.at(t) for layer in self.layers]
        hidden = [affine.modulated(1 + g, s) for affine, g, s in zip(maps, own[::2], own[1::2], strict=False)]
        last = maps[-1]
        return [*hidden, AffineMap(last.weight, last.gate, last.shift + shift, last.low_rank)]


class _OwnLayersStack(_AmortisedStack):
    """Bias and weight of the last layers, which see the time as an extra first input."""

    shared = False

    def __init__(
        self, sizes: Sequence[int], layer: type[TimeLinear], activation: type[Activation], number: int
    ) -> None:
        super().__init__(sizes, layer, activation)
        del self.layers[len(self.layers) - number :]  # type: ignore[attr-defined]
        owned = list(pairwise(sizes))[-number:]
        self.depth = len(sizes) - 1
        self.parts = [size for n_in, n_out in owned for size in (n_out, n_out * (n_in + 1))]

    def maps(self, t: Time, context: Tensor | None) -> list[AffineMap]:
        """Return the affine maps of the shared layers, and of each row's own."""
        own, maps = self.own(context), [layer.at(t) for layer in self.layers]
        for bias, flat in zip(own[::2], own[1::2], strict=True):
            weight = flat.unflatten(1, (bias.shape[1], -1))
            maps.append(AffineMap(weight[:, :, 1:], None, bias + t.reshape(-1, 1) * weight[:, :, 0]))
        return maps


def check_context(expected: int, got: int) -> None:
    """Refuse a context of another size than the amortised values."""
    if got != expected:
        raise ConfigError(
            f"Expected a context of {expected} amortised values per row for this architecture, got {got}. "
            "Choose another architecture=..., or give the flow an amortiser with that many outputs."
        )
