r"""Vector fields whose layers get weights and biases of each row's own, computed by an amortiser.

The context of such a field is the vector of its amortised values: a
:class:`~cnf_lab.flows.ContinuousFlow` with an ``amortiser`` computes it once per solve, and its
gradient comes back like that of any context.

What differs from the original code:

1. The amortised values are arguments of a solve, not parts of its state with derivative zero.
2. With one hidden layer, and with two where the weights are shared, the divergence has a closed
   form; the original tests with one reverse pass per coordinate.

References:
    Grathwohl et al., FFJORD (2019), https://arxiv.org/abs/1810.01367, section 4.3 and its code.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from cnf_lab.errors import ConfigError
from cnf_lab.fields.activations import Activation
from cnf_lab.fields.base import Time
from cnf_lab.fields.layers import AffineMap, TimeLinear
from cnf_lab.fields.mlp import Stack, StackField, check_hidden


class Amortised(StackField):
    r"""Time-conditioned layers that all rows share, plus per-row parts that do not see the time.

    .. math:: y_l = L_l(t, x) + (x\, U_l) V_l + b_l

    with :math:`U_l` (in, rank), :math:`V_l` (rank, out) and :math:`b_l` (out) of each row. The
    context (batch, amortised_features) holds them layer by layer, in this order, unscaled. With
    rank 0 only the biases are amortised.

    Args:
        event_shape: Shape of one event, (D,).
        hidden: Widths of the hidden layers.
        layer: Kind of time-conditioned layer.
        activation: Nonlinearity between the layers.
        rank: Rank of the per-row part of the weights.
        context_features: Size of the context; 0 where it is not known beforehand.

    Attributes:
        amortised_features: Number of amortised values per row, the size of the context: the sum
            of rank (in + out) + out over the layers.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        hidden: Sequence[int],
        layer: type[TimeLinear],
        activation: type[Activation],
        rank: int,
        context_features: int,
    ) -> None:
        super().__init__(event_shape)
        check_hidden(hidden)
        self.unit_time = layer.unit_time
        self.stack = _AmortisedStack([event_shape[0], *hidden, event_shape[0]], layer, activation, rank)
        self.amortised_features = sum(self.stack.parts)
        if context_features:
            _check_size(self.amortised_features, context_features)


class AmortisedBias(Amortised):
    """Shared layers with a bias of each row's own, the original's ``cnf_bias``.

    The divergence has a closed form with one or two hidden layers. See :class:`Amortised`.

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
        super().__init__(event_shape, hidden, layer, activation, 0, context_features)


class AmortisedLowRank(Amortised):
    """Shared layers with a low-rank part of the weights and a bias of each row's own, ``cnf_rank``.

    The field of the published variational autoencoders. The divergence has a closed form with
    one hidden layer. See :class:`Amortised`.

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
        super().__init__(event_shape, hidden, layer, activation, rank, context_features)


class _AmortisedStack(Stack):
    """A stack whose context holds U, V and bias of every layer for each row."""

    def __init__(self, sizes: Sequence[int], layer: type[TimeLinear], activation: type[Activation], rank: int) -> None:
        super().__init__(sizes, layer, activation)
        self.rank, self.shared = rank, rank == 0
        #: Sizes of the parts of the context.
        self.parts = [size for n_in, n_out in pairwise(sizes) for size in (rank * n_in, rank * n_out, n_out)]

    def maps(self, t: Time, context: Tensor | None) -> list[AffineMap]:
        """Return the layers' affine maps at a time with the parts of each row."""
        _check_size(sum(self.parts), 0 if context is None else context.shape[1])
        assert context is not None
        own, maps = context.split(self.parts, dim=1), []
        for layer, u, v, bias in zip(self.layers, own[::3], own[1::3], own[2::3], strict=True):
            shared = layer.at(t)
            low_rank = (u.unflatten(1, (-1, self.rank)), v.unflatten(1, (self.rank, -1))) if self.rank else None
            maps.append(AffineMap(shared.weight, shared.gate, shared.shift + bias, low_rank))
        return maps


def _check_size(expected: int, got: int) -> None:
    if got != expected:
        raise ConfigError(
            f"Expected a context of {expected} amortised values per row for this architecture, got {got}. "
            "Choose another architecture=..., or give the flow an amortiser with that many outputs."
        )
