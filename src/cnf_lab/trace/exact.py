"""The exact divergence."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cnf_lab.errors import ConfigError
from cnf_lab.fields.base import Time, VectorField
from cnf_lab.trace.base import DivergenceEstimator, Linearised, Probe
from cnf_lab.trace.hutchinson import Rademacher, square

GIBIBYTE = 2**30


class Exact(DivergenceEstimator):
    r"""The exact divergence: the field's closed form where it has one, else a tangent per coordinate.

    Without a closed form all tangents (one per coordinate, or fewer, for a convolution) go
    through the field in one batched pass, or in as many as the memory budget asks for; only the
    diagonal of the Jacobian is kept. Where gradients are wanted, the passes after the first are
    taken again on the way back instead of being remembered.

    The squared norm of the Jacobian is the estimate :math:`\lVert J v \rVert^2` with one
    Rademacher probe; beside a closed form its product shares layers and slopes.

    Args:
        memory: Budget in GiB of one pass.
        chunk: Tangents per pass; None takes as many as the budget holds.
        closed_form: Whether a closed form is used where the field has one.

    Raises:
        ConfigError: If a number is out of range.
    """

    exact = True

    def __init__(self, memory: float = 1.0, chunk: int | None = None, closed_form: bool = True) -> None:
        if chunk is not None and chunk < 1:
            raise ConfigError(f"Expected trace.chunk of at least 1 or null, got {chunk}. Type trace.chunk=null.")
        if not memory > 0:
            raise ConfigError(f"Expected trace.memory above 0 GiB, got {memory}. Type trace.memory=1.0.")
        self.memory, self.chunk, self.closed_form = memory, chunk, closed_form

    def describe(self, field: VectorField) -> str:
        """Say which exact way a field takes."""
        if self.closed_form and field.has_closed_form:
            return "exact, closed form"
        return f"exact, {field.divergence_tangents} tangents"

    def start(
        self,
        field: VectorField,
        x: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
        with_norm: bool = False,
    ) -> Probe:
        """Return the number of tangents per pass, and the probe of the norm where it is wanted."""
        chunk = None
        if not (self.closed_form and field.has_closed_form):
            chunk = self.chunk or fitting_tangents(field, x, context, self.memory)
        return chunk, Rademacher()((1, *x.shape), x, generator) if with_norm else None

    def linearise(self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, probe: Probe) -> Linearised:
        """Return dx/dt and its exact divergence; without a norm it needs no probe."""
        chunk, vectors = self.start(field, x, context, None) if probe is None else probe
        if chunk is None:
            value, div, products = field.value_and_divergence(t, x, context, vectors)
        else:
            value, div = self._by_tangents(field, t, x, context, chunk)
            products = None if vectors is None else field.value_and_jvp(t, x, vectors, context)[1]
        return Linearised(value, div, None, None if products is None else square(products)[0])

    def _by_tangents(
        self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, chunk: int
    ) -> tuple[Tensor, Tensor]:
        tangents = field.divergence_tangents
        value, div = field.value_and_partial_divergence(t, x, 0, min(chunk, tangents), context)
        for start in range(chunk, tangents, chunk):
            arguments = (field, t, x, start, min(start + chunk, tangents), context)
            again = torch.is_grad_enabled()
            div = div + (checkpoint(_partial, *arguments, use_reentrant=False) if again else _partial(*arguments))
        return value, div


def _partial(field: VectorField, t: Time, x: Tensor, start: int, stop: int, context: Tensor | None) -> Tensor:
    return field.value_and_partial_divergence(t, x, start, stop, context)[1]


def fitting_tangents(field: VectorField, x: Tensor, context: Tensor | None, memory: float) -> int:
    """Return how many of the tangents of an exact divergence fit into a memory budget in GiB, at least one."""
    tangent = numbers_per_row(field, x, context) * len(x) * x.element_size()
    return max(1, min(field.divergence_tangents, int(memory * GIBIBYTE / tangent)))


_MEASURED: WeakKeyDictionary[VectorField, float] = WeakKeyDictionary()


@torch.no_grad()
def numbers_per_row(field: VectorField, x: Tensor, context: Tensor | None) -> float:
    """Return how many numbers an evaluation makes on its way for each row: a tangent makes as many.

    Measured once per field, on three rows.
    """
    if field not in _MEASURED:
        x, context = x[:3], None if context is None else context[:3]
        with _Count(len(x)) as count:
            field(x.new_zeros(()), x, context)
        _MEASURED[field] = max(1.0, count.numbers / len(x))
    return _MEASURED[field]


class _Count(TorchDispatchMode):
    """Counts the numbers that operations write for each row."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.numbers = rows, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape[:1] == (self.rows,) and out._base is None:
            self.numbers += out.numel()
        return out
