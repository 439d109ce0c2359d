"""The exact divergence."""

import torch
from torch import Tensor

from cnf_lab.errors import ConfigError
from cnf_lab.fields.base import Time, VectorField
from cnf_lab.trace.base import DivergenceEstimator, Probe


class Exact(DivergenceEstimator):
    r"""The exact divergence: the field's closed form where it has one, else D tangents at once.

    Without a closed form the D unit vectors go through the field in one batched forward-mode
    pass, or in several of ``chunk`` tangents; only the diagonal of the Jacobian is kept.

    Args:
        chunk: Largest number of tangents per pass, to bound memory; None takes all D at once.
        closed_form: Whether a closed form is used where the field has one.
    """

    exact = True

    def __init__(self, chunk: int | None = None, closed_form: bool = True) -> None:
        if chunk is not None and chunk < 1:
            raise ConfigError(f"Expected trace.chunk of at least 1 or null, got {chunk}. Type trace.chunk=null.")
        self.chunk, self.closed_form = chunk, closed_form

    def start(self, field: VectorField, x: Tensor, generator: torch.Generator | None) -> Probe:
        """Return None: nothing is random."""
        return None

    def value_and_divergence(
        self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, probe: Probe
    ) -> tuple[Tensor, Tensor]:
        """Return dx/dt and its exact divergence (batch,)."""
        if self.closed_form and field.has_closed_form:
            return field.value_and_divergence(t, x, context)
        event = x.shape[1:].numel()
        units = torch.eye(event, dtype=x.dtype, device=x.device)
        div = x.new_zeros(len(x))
        for start in range(0, event, self.chunk or event):
            tangents = units[start : start + (self.chunk or event)]
            value, products = field.value_and_jvp(t, x, tangents.reshape(-1, 1, *x.shape[1:]), context)
            # Entry (k, b) of the diagonal is d f_{start + k} / d x_{start + k} of row b.
            rows = products.flatten(2)[:, :, start : start + len(tangents)]
            div = div + rows.diagonal(dim1=0, dim2=2).sum(dim=-1)
        return value, div
