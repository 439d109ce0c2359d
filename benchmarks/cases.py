"""What is timed: shapes of published models, their weights and rows, and one training step or evaluation."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from baseline import (
    AmortisedBaseline,
    Baseline,
    Blocks,
    ConcatConv2d,
    ConcatSquashLinear,
    LowRankNetwork,
    MultiscaleBaseline,
    Network,
)
from torch import Tensor, nn
from torch.nn import functional as F

from cnf_lab.fields import (
    Activation,
    Amortised,
    AmortisedGates,
    AmortisedLowRank,
    Concat,
    ConcatConv,
    ConcatSquash,
    ConvField,
    Mlp,
    Softplus,
    Tanh,
    VectorField,
)
from cnf_lab.flows import Chain, ContinuousFlow, Flow, StandardNormal, Transform, View, Viewed, factored_out
from cnf_lab.flows.multiscale import views
from cnf_lab.ode import OdeSolver, SolveStats
from cnf_lab.trace import DivergenceEstimator, Rademacher

SEED = 0
BLOCKS = 2  # before and after each squeeze, as published
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
        scales: Scales of a multiscale flow; 0 for a single block.
    """

    name: str
    what: str
    event_shape: tuple[int, ...]
    hidden: tuple[int, ...]
    activation: type[Activation]
    rows: Mapping[str, int]
    scales: int = 0

    def small(self) -> "Case":
        """Return the same with few rows and units, to try the benchmark itself."""
        side = 4 * 2**self.scales // 2 if self.scales else 6
        event = self.event_shape if len(self.event_shape) == 1 else (self.event_shape[0], side, side)
        return replace(self, event_shape=event, hidden=tuple(8 for _ in self.hidden), rows={"cpu": 12, "cuda": 12})

    @property
    def views(self) -> list[View]:
        """What the blocks see, two before and after each squeeze as published."""
        return views(self.scales, BLOCKS) if self.scales else [View()]

    def field(self, device: str, view: View = View()) -> VectorField:  # noqa: B008
        """Return the vector field of a block with its default initialisation under the fixed seed."""
        torch.manual_seed(SEED)
        if len(self.event_shape) == 1:
            field: VectorField = Mlp(self.event_shape, self.hidden, ConcatSquash, self.activation)
        else:
            field = ConvField(view.shape(self.event_shape), self.hidden, ConcatConv, self.activation)
        return field.to(device)

    def network(self, device: str, view: View = View()) -> Network:  # noqa: B008
        """Return the baseline's network with the weights of :meth:`field`."""
        channels = self.event_shape[0] if len(self.event_shape) == 1 else view.shape(self.event_shape)[0]
        layer = ConcatSquashLinear if len(self.event_shape) == 1 else ConcatConv2d
        network = Network([channels, *self.hidden, channels], layer, ACTIVATIONS[self.activation])
        weights = self.field("cpu", view).state_dict()
        network.load_state_dict({name.removeprefix("stack."): value for name, value in weights.items()})
        return network.to(device)

    def transform(self, device: str, solver: OdeSolver, estimator: DivergenceEstimator) -> Transform:
        """Return cnf_lab's block, or its blocks."""
        blocks = [(view, ContinuousFlow(self.field(device, view), solver, estimator)) for view in self.views]
        return Chain([Viewed(block, view) for view, block in blocks]) if self.scales else blocks[0][1]

    def baseline(self, device: str, **options: Any) -> Baseline | Blocks:
        """Return the baseline's block, or its blocks."""
        blocks = [Baseline(self.network(device, view), **options) for view in self.views]
        return MultiscaleBaseline(blocks, self.scales, BLOCKS) if self.scales else blocks[0]

    def context(self, device: str, rows: int) -> Tensor | None:
        """Return what rows are conditioned on: nothing."""
        return None

    def probe(self, x: Tensor, generator: torch.Generator) -> Any:
        """Return the probe that cnf_lab draws, or those of all blocks."""
        shapes = [self.event_shape if len(self.event_shape) == 1 else v.shape(self.event_shape) for v in self.views]
        probes = [Rademacher()((len(x), *shape), x, generator) for shape in shapes]
        return probes if self.scales else probes[0]

    def latents(self, z: Tensor) -> Tensor:
        """Return latents of cnf_lab in the order of the baseline's."""
        parts = factored_out(z, self.scales) if self.scales else [z]
        return torch.cat([part.flatten(1) for part in parts], dim=1) if self.scales else z

    def x(self, device: str, rows: int | None = None) -> Tensor:
        """Return normal rows under the fixed seed."""
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(rows or self.rows[device], *self.event_shape, generator=generator).to(device)


@dataclass(frozen=True)
class PosteriorCase(Case):
    """The flow of an autoencoder's posterior with its amortisers, without encoder and decoder.

    Args:
        features: Size of the encoder's features.
        rank: Rank of the products that each row adds to the weights.
        blocks: Number of blocks.
        end_time: End time T of a block.
    """

    features: int = 256
    rank: int = 64
    blocks: int = 2
    end_time: float = 0.5

    def field(self, device: str, view: View = View()) -> Amortised:  # noqa: B008
        """Return the published field of a block with its default initialisation under the fixed seed."""
        torch.manual_seed(SEED)
        return AmortisedLowRank(self.event_shape, self.hidden, Concat, self.activation, self.rank).to(device)

    def gates(self, device: str) -> Amortised:
        """Return our field, with gates and shifts in the place of low-rank products."""
        torch.manual_seed(SEED)
        return AmortisedGates(self.event_shape, self.hidden, ConcatSquash, Tanh).to(device)

    def amortiser(self, device: str, field: Amortised) -> nn.Linear:
        """Return the map from features to the values of a field, under the fixed seed."""
        torch.manual_seed(SEED)
        return nn.Linear(self.features, field.amortised_features).to(device)

    def context(self, device: str, rows: int) -> Tensor:
        """Return normal features under the fixed seed, as large as an encoder's."""
        generator = torch.Generator().manual_seed(SEED + 1)
        drawn = torch.randn(max(rows, self.rows[device]), self.features, generator=generator)
        return 0.1 * drawn[:rows].to(device)  # the same rows, however many

    def transform(
        self, device: str, solver: OdeSolver, estimator: DivergenceEstimator, gated: bool = False
    ) -> Transform:
        """Return cnf_lab's blocks."""
        fields = [self.gates(device) if gated else self.field(device) for _ in range(self.blocks)]
        options: dict[str, Any] = {"end_time": self.end_time}
        return Chain(
            [
                ContinuousFlow(field, solver, estimator, amortiser=self.amortiser(device, field), **options)
                for field in fields
            ]
        )

    def baseline(self, device: str, **options: Any) -> AmortisedBaseline:
        """Return the baseline's blocks."""
        dimension, weights = self.event_shape[0], self.field("cpu").state_dict()
        networks = []
        for _ in range(self.blocks):
            sizes = [dimension, *self.hidden, dimension]
            network = LowRankNetwork(sizes, ACTIVATIONS[self.activation], self.rank)
            network.load_state_dict({name.removeprefix("stack."): value for name, value in weights.items()})
            networks.append(network.to(device))
        blocks = [Baseline(network, end_time=self.end_time, **options) for network in networks]
        amortisers = [self.amortiser(device, self.field(device)) for _ in range(self.blocks)]
        return AmortisedBaseline(blocks, amortisers, self.context(device, self.rows[device]))

    def probe(self, x: Tensor, generator: torch.Generator) -> Any:
        """Return the probes that cnf_lab draws, one for each block."""
        return [Rademacher()(tuple(x.shape), x, generator) for _ in range(self.blocks)]


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
        Case(
            "MNIST, multiscale",
            "the ten published blocks; batch 200 is the original's default",
            (1, 28, 28),
            (64, 64, 64),
            Softplus,
            {"cpu": 16, "cuda": 200},
            scales=3,
        ),
        PosteriorCase(
            "MNIST, posterior",
            "the two published blocks, rank 64, with their amortisers; encoder and decoder left out",
            (64,),
            (1024, 1024),
            Softplus,
            {"cpu": 100, "cuda": 100},
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
        **options: Of the case's transform.
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
        **options: Any,
    ) -> None:
        transform = case.transform(device, solver, estimator, **options)
        self.x, self.low_precision, self.is_training = case.x(device, rows), low_precision, train
        self.context = case.context(device, len(self.x))
        features = 0 if self.context is None else self.context.shape[1]
        self.flow = Flow(transform, StandardNormal(case.event_shape), features).to(device).train(train)

    def __call__(self) -> Run:
        """Run once; every run draws the same probe."""
        generator = torch.Generator(self.x.device).manual_seed(SEED)
        low = self.low_precision
        autocast = nullcontext() if low is None else torch.autocast(self.x.device.type, low)
        with torch.set_grad_enabled(self.is_training):
            with autocast:
                mapped = self.flow.pull_back(self.x, self.context, generator)
            loss = -(self.flow.base.log_prob(mapped.value) + mapped.log_det).mean()
        if self.is_training:
            loss.backward()
        self.flow.zero_grad(set_to_none=True)
        stats = SolveStats.total(mapped.solves)
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
        baseline: Baseline | Blocks,
        device: str,
        exact: bool = False,
        train: bool = True,
        rows: int | None = None,
    ) -> None:
        self.case, self.baseline, self.x = case, baseline, case.x(device, rows)
        self.exact, self.is_training = exact, train

    def __call__(self) -> Run:
        """Run once; every run draws the same probe as :class:`Ours`."""
        generator = torch.Generator(self.x.device).manual_seed(SEED)
        probe = None if self.exact else self.case.probe(self.x, generator)
        with torch.set_grad_enabled(self.is_training):
            loss = -self.baseline.log_prob(self.x, probe).mean()
        if self.is_training:
            loss.backward()
        self.baseline.network.zero_grad(set_to_none=True)
        return Run(float(loss.detach()), self.baseline.nfe_forward, self.baseline.nfe_backward)
