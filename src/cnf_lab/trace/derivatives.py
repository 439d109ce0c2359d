"""Derivatives of the field that some penalties need besides a divergence."""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cnf_lab.errors import ConfigError
from cnf_lab.fields.base import Time, VectorField
from cnf_lab.shapes import Float
from cnf_lab.trace.base import DivergenceEstimator, Linearised, Needs, Probe
from cnf_lab.trace.exact import Exact, fitting_tangents

#: The largest event whose Jacobian is made.
LARGEST = 128


class Extended(DivergenceEstimator):
    r"""An estimator that hands over further derivatives of the field.

    1. The Jacobian takes a product per coordinate, in as many passes as the memory budget asks
       for; those after the first are taken again on the way back. What follows from it costs
       nothing more: an exact divergence, the squared norm, :math:`J^\top f`.
    2. :math:`J^\top f` takes an evaluation and its reverse pass.
    3. The acceleration :math:`\partial_t f + J f` takes an evaluation and a tangent.

    A stochastic divergence stays the estimate that it is, with the same probes: what is wanted
    besides changes no log-density.

    Args:
        estimator: Where the divergence comes from.
        needs: What is wanted besides.
        memory: Budget in GiB of one pass of the Jacobian; an exact estimator has its own.
    """

    def __init__(self, estimator: DivergenceEstimator, needs: Needs, memory: float = 1.0) -> None:
        self.estimator, self.exact, self.count = estimator, estimator.exact, estimator.count
        self.memory = estimator.memory if isinstance(estimator, Exact) else memory
        self.with_jacobian = Needs.JACOBIAN in needs
        self.with_pulled_value = Needs.PULLED_VALUE in needs
        self.with_acceleration = Needs.ACCELERATION in needs

    def describe(self, field: VectorField) -> str:
        """Say where the divergence comes from."""
        return self.estimator.describe(field)

    def start(
        self,
        field: VectorField,
        x: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
        with_norm: bool = False,
    ) -> Probe:
        """Draw the estimator's probe, and choose the products per pass; refuse a field out of reach."""
        self._check(field)
        known = self.with_jacobian and self.exact
        probe = None if known else self.estimator.start(field, x, context, generator, with_norm)
        return probe, fitting_tangents(field, x, context, self.memory) if self.with_jacobian else 0

    def linearise(self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, probe: Probe) -> Linearised:
        """Return what the estimator finds, and the derivatives that are wanted."""
        inner, chunk = probe
        if self.with_jacobian:
            found = self._by_jacobian(field, t, x, context, inner, chunk)
        else:
            found = self.estimator.linearise(field, t, x, context, inner)
        if self.with_pulled_value:
            known = found.jacobian is not None
            pulled = _pulled(found) if known else pulled_value(field, t, x, context)
            found = found._replace(pulled_value=pulled)
        if self.with_acceleration:
            found = found._replace(acceleration=acceleration(field, t, x, found.value, context))
        return found

    def _by_jacobian(
        self, field: VectorField, t: Time, x: Tensor, context: Tensor | None, probe: Probe, chunk: int
    ) -> Linearised:
        value, jacobian = value_and_jacobian(field, t, x, context, chunk)
        if not self.exact:
            return self.estimator.linearise(field, t, x, context, probe)._replace(jacobian=jacobian)
        div = jacobian.diagonal(dim1=1, dim2=2).sum(dim=1)
        return Linearised(value, div, None, jacobian.square().sum(dim=(1, 2)), jacobian)

    def _check(self, field: VectorField) -> None:
        size = math.prod(field.event_shape)
        if self.with_jacobian and size > LARGEST:
            raise ConfigError(
                f"Expected events of at most {LARGEST} numbers for a penalty on the whole Jacobian, which takes a "
                f"product per number and evaluation, got {size}. Type regulariser=jacobian."
            )
        if self.with_acceleration and not field.forward_mode:
            raise ConfigError(
                "Expected a field with forward derivatives for regulariser=total_derivative, "
                f"got architecture {type(field).__name__}. Type regulariser=directional."
            )


def extended(estimator: DivergenceEstimator, needs: Needs) -> DivergenceEstimator:
    """Return an estimator that fulfils the needs: the same one where it does so by itself."""
    return Extended(estimator, needs) if needs & ~Needs.SQUARED_NORM else estimator


def value_and_jacobian(
    field: VectorField, t: Time, x: Tensor, context: Tensor | None, chunk: int
) -> tuple[Tensor, Float[Tensor, "batch D D"]]:
    r"""Return dx/dt (batch, \*event) and its Jacobian, entry (i, k) being df_i/dx_k.

    Args:
        field: The vector field.
        t: Time.
        x: State (batch, \*event).
        context: Conditioning (batch, features) or None.
        chunk: Products per pass.
    """
    size, again = x.shape[1:].numel(), torch.is_grad_enabled()
    value, products = _products(field, t, x, context, 0, min(chunk, size))
    parts = [products]
    for start in range(chunk, size, chunk):
        arguments = (field, t, x, context, start, min(start + chunk, size))
        _, products = checkpoint(_products, *arguments, use_reentrant=False) if again else _products(*arguments)
        parts.append(products)
    stacked = torch.cat(parts).to(x.dtype)  # (D, batch, D)
    # Forward mode gives columns, J e_k, and reverse mode rows.
    return value, stacked.permute(1, 2, 0) if field.forward_mode else stacked.permute(1, 0, 2)


def _products(
    field: VectorField, t: Time, x: Tensor, context: Tensor | None, start: int, stop: int
) -> tuple[Tensor, Float[Tensor, "k batch D"]]:
    value, found = field.value_and_unit_products(t, x, start, stop, context)
    return value, found.flatten(2).expand(-1, len(x), -1)


def pulled_value(field: VectorField, t: Time, x: Tensor, context: Tensor | None) -> Tensor:
    r"""Return :math:`J^\top f` (batch, \*event) by reverse mode."""
    # Unlike autograd.grad it needs no graph around it, and a compiled step takes it.
    value, pull, *_ = torch.func.vjp(lambda y: field(t, y, context), x)
    return pull(value)[0]


def _pulled(found: Linearised) -> Tensor:
    assert found.jacobian is not None
    value = found.value.to(found.jacobian.dtype)
    return torch.einsum("bik,bi->bk", found.jacobian, value.flatten(1)).reshape(value.shape)


def acceleration(field: VectorField, t: Time, x: Tensor, value: Tensor, context: Tensor | None) -> Tensor:
    r"""Return :math:`\partial_t f + J f` (batch, \*event), the field's value f being known."""

    def evaluate(s: Tensor, y: Tensor) -> Tensor:
        return field(s, y, context)

    # jvp refuses rows that share memory, and a time that is one of several.
    t = t.clone()
    tangents = (torch.ones_like(t), value.to(x.dtype).contiguous())
    return torch.func.jvp(evaluate, (t, x.contiguous()), tangents)[1]
