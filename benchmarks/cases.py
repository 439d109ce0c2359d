"""What is timed: shapes of published models, their weights and rows, and one training step or evaluation."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from baseline import Baseline, ConcatConv2d, ConcatSquashLinear, Network
from torch import Tensor
from torch.nn import functional as F

from cnf_lab.fields import Activation, ConcatConv, ConcatSquash, ConvField, Mlp, Softplus, Tanh, VectorField
from cnf_lab.flows import ContinuousFlow, Flow, StandardNormal
from cnf_lab.ode import OdeSolver
from cnf_lab.trace import DivergenceEstimator, Rademacher

SEED = 0
ACTIVATIONS: dict[type[Activation], Callable[[Tensor], Tensor]] = {Softplus: F.softplus, Tanh: torch.tanh}


class Missing(Exception):
    """A package that a figure needs is not installed; the message says what to install."""


class Run(NamedTuple):
    """One timed run: its loss, and the evaluations of the field."""

    loss: float
    nfe_forward: int
    nfe_backward: int


@dataclass(frozen=True)
class Case:
    """A shape of data and field.

    Args:
        name: Name in figures.
        what: How it differs from the published model, for the report.
        event_shape: Shape of one event.
        hidden: Widths, or channels, of the hidden layers.
        activation: Nonlinearity.
        rows: Batch size per device type.
    """

    name: str
    what: str
    event_shape: tuple[int, ...]
    hidden: tuple[int, ...]
    activation: type[Activation]
    rows: Mapping[str, int]

    def small(self) -> "Case":
        """Return the same with few rows and units, to try the benchmark itself."""
        event = self.event_shape if len(self.event_shape) == 1 else (self.event_shape[0], 6, 6)
        return replace(self, event_shape=event, hidden=tuple(8 for _ in self.hidden), rows={"cpu": 12, "cuda": 12})

    def field(self, device: str) -> VectorField:
        """Return the vector field with its default initialisation under the fixed seed."""
        torch.manual_seed(SEED)
        if len(self.event_shape) == 1:
            field: VectorField = Mlp(self.event_shape, self.hidden, ConcatSquash, self.activation)
        else:
            field = ConvField(self.event_shape, self.hidden, ConcatConv, self.activation)
        return field.to(device)

    def network(self, device: str) -> Network:
        """Return the baseline's network with the weights of :meth:`field`."""
        sizes = [self.event_shape[0], *self.hidden, self.event_shape[0]]
        layer = ConcatSquashLinear if len(self.event_shape) == 1 else ConcatConv2d
        network = Network(sizes, layer, ACTIVATIONS[self.activation])
        weights = self.field("cpu").state_dict()
        network.load_state_dict({name.removeprefix("stack."): value for name, value in weights.items()})
        return network.to(device)

    def x(self, device: str, rows: int | None = None) -> Tensor:
        """Return normal rows under the fixed seed."""
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(rows or self.rows[device], *self.event_shape, generator=generator).to(device)


CASES = {
    case.name: case
    for case in (
        Case("MINIBOONE", "as published", (43,), (860, 860), Softplus, {"cpu": 1000, "cuda": 1000}),
        Case("POWER", "one of the five published blocks", (6,), (60, 60, 60), Tanh, {"cpu": 10000, "cuda": 10000}),
        Case(
            "BSDS300",
            "one of the two published blocks; batch 10000 is published",
            (63,),
            (1260, 1260, 1260),
            Softplus,
            {"cpu": 1000, "cuda": 10000},
        ),
        Case(
            "BSDS300, two layers",
            "two hidden layers where three are published, for the closed form; batch 10000 is published",
            (63,),
            (1260, 1260),
            Softplus,
            {"cpu": 1000, "cuda": 10000},
        ),
        Case(
            "MNIST, one block",
            "one of the ten published blocks; batch 200 is the original's default",
            (1, 28, 28),
            (64, 64, 64),
            Softplus,
            {"cpu": 64, "cuda": 200},
        ),
    )
}


class Ours:
    """A training step or an evaluation of cnf_lab: forward, and backward with the gradients of all parameters.

    Args:
        case: The shape.
        device: Device type.
        estimator: Divergence estimator.
        solver: Solver.
        low_precision: Precision of the field under autocast; None for float32.
        train: Whether it is a training step; otherwise log p(x) without a gradient.
        rows: Number of rows; None for the case's.
    """

    def __init__(
        self,
        case: Case,
        device: str,
        estimator: DivergenceEstimator,
        solver: OdeSolver,
        low_precision: torch.dtype | None = None,
        train: bool = True,
        rows: int | None = None,
    ) -> None:
        transform = ContinuousFlow(case.field(device), solver, estimator)
        self.flow = Flow(transform, StandardNormal(case.event_shape)).to(device).train(train)
        self.x, self.low_precision, self.is_training = case.x(device, rows), low_precision, train

    def __call__(self) -> Run:
        """Run once; every run draws the same probe."""
        generator = torch.Generator(self.x.device).manual_seed(SEED)
        low = self.low_precision
        autocast = nullcontext() if low is None else torch.autocast(self.x.device.type, low)
        with torch.set_grad_enabled(self.is_training):
            with autocast:
                mapped = self.flow.pull_back(self.x, None, generator)
            loss = -(self.flow.base.log_prob(mapped.value) + mapped.log_det).mean()
        if self.is_training:
            loss.backward()
        self.flow.zero_grad(set_to_none=True)
        (stats,) = mapped.solves
        return Run(float(loss.detach()), stats.nfe_forward, stats.nfe_backward)


class Theirs:
    """The same by the baseline.

    Args:
        case: The shape.
        baseline: The baseline.
        device: Device type.
        exact: Whether the divergence is the loop over the dimensions.
        train: Whether it is a training step.
        rows: Number of rows; None for the case's.
    """

    def __init__(
        self,
        case: Case,
        baseline: Baseline,
        device: str,
        exact: bool = False,
        train: bool = True,
        rows: int | None = None,
    ) -> None:
        self.baseline, self.x, self.exact, self.is_training = baseline, case.x(device, rows), exact, train

    def __call__(self) -> Run:
        """Run once; every run draws the same probe as :class:`Ours`."""
        generator = torch.Generator(self.x.device).manual_seed(SEED)
        probe = None if self.exact else Rademacher()(tuple(self.x.shape), self.x, generator)
        with torch.set_grad_enabled(self.is_training):
            loss = -self.baseline.log_prob(self.x, probe).mean()
        if self.is_training:
            loss.backward()
        self.baseline.network.zero_grad(set_to_none=True)
        return Run(float(loss.detach()), self.baseline.nfe_forward, self.baseline.nfe_backward)
