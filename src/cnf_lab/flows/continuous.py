r"""A continuous normalizing flow: the map made by integrating a vector field.

References:
    Chen et al., Neural Ordinary Differential Equations (2018), https://arxiv.org/abs/1806.07366.
    Grathwohl et al., FFJORD (2019), https://arxiv.org/abs/1810.01367.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cnf_lab.errors import ConfigError
from cnf_lab.fields import VectorField
from cnf_lab.fields.spectral import iterate_spectral_norms
from cnf_lab.flows.base import Mapped, Transform
from cnf_lab.flows.riders import EndTime, Integrand, Rider, Waypoints, halts, legs, needs_of
from cnf_lab.ode import OdeSolver, State
from cnf_lab.trace import DivergenceEstimator, Needs, Probe, extended


class ContinuousFlow(Transform):
    r"""The flow of dx/dt = f(t, x) from data at t = 0 to latent at t = T.

    .. math:: z = x + \int_0^T f(t, x_t)\,dt, \qquad
              \log\left|\det \frac{\partial z}{\partial x}\right| = \int_0^T \mathrm{div} f(t, x_t)\,dt.

    A trained end time is :math:`T = e^\theta`; the solve then runs over s in [0, 1] with
    dx/ds = T f(T s, x), so that T gets its gradient like any other parameter (the original
    flags T as trainable, but its graph is cut and T never moves).

    Args:
        field: The vector field.
        solver: Solver in training mode.
        divergence: Divergence estimator in training mode.
        evaluation_solver: Solver in evaluation mode; None takes ``solver``.
        evaluation_divergence: Estimator in evaluation mode; None takes ``divergence``.
        end_time: T, positive.
        train_end_time: Whether T is trained.
        amortiser: Computes this block's context from the flow's, once per solve; None hands
            the flow's context on.

    Raises:
        ConfigError: If the field, the estimators and T do not fit together.
    """

    def __init__(
        self,
        field: VectorField,
        solver: OdeSolver,
        divergence: DivergenceEstimator,
        evaluation_solver: OdeSolver | None = None,
        evaluation_divergence: DivergenceEstimator | None = None,
        end_time: float = 1.0,
        train_end_time: bool = False,
        amortiser: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not end_time > 0:
            raise ConfigError(f"Expected model.end_time above 0, got {end_time}. Type model.end_time=1.0.")
        if field.unit_time and (end_time != 1 or train_end_time):
            raise ConfigError(
                "Expected model.end_time=1.0 and model.train_end_time=false with architecture/layer=blend, whose time "
                f"runs from 0 to 1, got {end_time} and {str(train_end_time).lower()}. Type model.end_time=1.0."
            )
        self.field, self.amortiser = field, amortiser
        self.solver, self.divergence = solver, divergence.chosen_for(field)
        self.evaluation_solver = evaluation_solver or solver
        self.evaluation_divergence = (evaluation_divergence or divergence).chosen_for(field)
        self.evaluation_autocast = False
        self.end_time = float(end_time)
        self.log_end_time = nn.Parameter(torch.tensor(self.end_time).log()) if train_end_time else None

    def pull_back(
        self,
        x: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        integrands: Sequence[Rider] = (),
    ) -> Mapped:
        """Integrate from 0 to T; in training to the end time that a rider chooses, if one does."""
        end = self._end
        if self.training:
            iterate_spectral_norms(self.field)
            end = self._drawn_end(integrands, generator, x.device)
        return self._solve(x, 0.0, end, context, generator, integrands, True)

    def push_forward(
        self,
        z: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        with_log_det: bool = True,
    ) -> Mapped:
        """Integrate from T to 0."""
        return self._solve(z, self._end, 0.0, context, generator, (), with_log_det)

    def velocity(self, share: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Return the field per whole time, :math:`T f(T u, x)`, at a share u of the time for each row.

        There is no solve in it: simulation-free objectives compare it with a velocity they know.

        Args:
            share: u in [0, 1] (batch,).
            x: State (batch, \*event).
            context: Conditioning (batch, features) or None.
        """
        if self.training:
            iterate_spectral_norms(self.field)
        context = self._amortised(context)
        end = self.end_time if self.log_end_time is None else self.log_end_time.exp()
        return end * self.field(share * end, x, context).to(x.dtype)

    def set_evaluation(self, solver: OdeSolver, divergence: DivergenceEstimator, autocast: bool = False) -> None:
        """Choose the solver and the divergence estimator of evaluation mode."""
        self.evaluation_divergence = divergence.chosen_for(self.field)
        self.evaluation_solver, self.evaluation_autocast = solver, autocast

    def trajectory(self, z: Tensor, context: Tensor | None = None, points: int = 2) -> list[Tensor]:
        """Return the states at ``points`` equally spaced times from T to 0."""
        times = torch.linspace(self._end, 0.0, points + 1, dtype=torch.float64).tolist()
        states = [z]
        for t0, t1 in zip(times[:-1], times[1:], strict=True):
            states.append(self._solve(states[-1], t0, t1, context, None, (), False).value)
        return states[1:]

    def _amortised(self, context: Tensor | None) -> Tensor | None:
        if self.amortiser is None:
            return context
        if context is None:
            return self.amortiser(None)
        with torch.autocast(context.device.type, enabled=False):  # evaluation keeps the full precision
            return self.amortiser(context)

    def _drawn_end(self, riders: Sequence[Rider], generator: torch.Generator | None, device: torch.device) -> float:
        choices = [rider for rider in riders if isinstance(rider, EndTime)]
        if not choices:
            return self._end
        if self.field.unit_time:
            raise ConfigError(
                "Expected no random end time with architecture/layer=blend, whose time runs from 0 to 1, "
                f"got {type(choices[0]).__name__}. Type architecture/layer=concatsquash."
            )
        end = usual = self.end_time if self.log_end_time is None else self.log_end_time.exp().item()
        for choice in choices:
            end = choice.draw(end, generator, device)
        return self._end * (end / usual)

    @property
    def _end(self) -> float:
        # The end of the solver's own time: with a trained T that time is s in [0, 1].
        return self.end_time if self.log_end_time is None else 1.0

    def extra_repr(self) -> str:
        """Describe the end time for ``print(flow)``."""
        return f"end_time={self.end_time if self.log_end_time is None else self.log_end_time.exp().item():g}"

    def _solve(
        self,
        x: Tensor,
        t0: float,
        t1: float,
        context: Tensor | None,
        generator: torch.Generator | None,
        riders: Sequence[Rider],
        with_log_det: bool,
    ) -> Mapped:
        solver = self.solver if self.training else self.evaluation_solver
        divergence = self.divergence if self.training else self.evaluation_divergence
        context = self._amortised(context)
        integrands = tuple(rider for rider in riders if isinstance(rider, Integrand))
        needs = needs_of(integrands)
        divergence, with_norm = extended(divergence, needs), Needs.SQUARED_NORM in needs
        probe = divergence.start(self.field, x, context, generator, with_norm) if with_log_det else None
        device = x.device.type
        # In low precision a tight tolerance would chase round-off: evaluation keeps the full one.
        autocast = (self.training or self.evaluation_autocast) and torch.is_autocast_enabled(device)
        dynamics = _Dynamics(
            self.field,
            divergence if with_log_det else None,
            integrands,
            self.log_end_time,
            torch.get_autocast_dtype(device) if autocast else None,
            # Training has no use for it.
            not self.training,
        )
        waypoints = [rider for rider in riders if isinstance(rider, Waypoints)]
        times = {rider: halts(solver, t1, rider.draw(generator, x.device)) for rider in waypoints}
        # Without the amortiser's: its gradients come through the context.
        parameters = [*self.field.parameters(), *([] if self.log_end_time is None else [self.log_end_time])]
        end, states, solves = dynamics.start(x), {t0: x}, []
        with _frozen_weights(self.field):
            for part, start, stop in legs(solver, t0, t1, chain.from_iterable(times.values())):
                end, stats = part.solve(dynamics, end, start, stop, (context, probe), parameters)
                states[stop] = end[0]
                solves.append(stats)
        if not with_log_det:
            return Mapped(end[0], x.new_zeros(len(x)), (), tuple(solves))
        integrals, error = end[2 : 2 + len(integrands)], None
        if not divergence.exact and not self.training:
            error = standard_error(end[-1]) if len(end) > 2 + len(integrands) else torch.full_like(end[1], torch.nan)
        return Mapped(end[0], end[1], _measured(riders, integrals, times, states), tuple(solves), error, (end[1],))


@dataclass(frozen=True)
class _Dynamics:
    """The right-hand side of a solve: the derivatives of x, log-det, integrals, and single estimates.

    The state's last part, (k, batch), integrates the k estimates of a stochastic divergence
    apart, where their spread is wanted. Time, state and derivatives keep the state's precision;
    only the field runs in the low one. It is made anew for each solve, which a compiled step
    does not notice: what differs between solves are its arguments.
    """

    field: VectorField
    divergence: DivergenceEstimator | None
    integrands: tuple[Integrand, ...]
    log_end_time: Tensor | None
    low_precision: torch.dtype | None
    with_estimates: bool

    def start(self, x: Tensor) -> State:
        """Return the state at the start of a solve."""
        if self.divergence is None:
            return (x,)
        zeros = tuple(x.new_zeros(len(x)) for _ in range(1 + len(self.integrands)))
        several = self.divergence.count if self.with_estimates else 1
        return (x, *zeros, x.new_zeros(several, len(x))) if several > 1 else (x, *zeros)

    def __call__(self, s: Tensor, state: State, context: Tensor | None, probe: Probe) -> State:
        x = state[0]
        rate = None if self.log_end_time is None else self.log_end_time.exp()
        t = s if rate is None else s * rate
        with torch.autocast(x.device.type, dtype=self.low_precision, enabled=self.low_precision is not None):
            if self.divergence is None:
                return _scaled((self.field(t, x, context).to(x.dtype),), rate)
            found = self.divergence.linearise(self.field, t, x, context, probe)
        found = found.to(x.dtype)
        integrals = tuple(integrand(t, x, found) for integrand in self.integrands)
        estimates = (found.estimates,) if len(state) > 2 + len(integrals) else ()
        return _scaled((found.value, found.div, *integrals, *estimates), rate)


def continuous_blocks(module: nn.Module) -> list[ContinuousFlow]:
    """Return the continuous flows below a module, from data to latent."""
    return [part for part in module.modules() if isinstance(part, ContinuousFlow)]


def standard_error(estimates: Tensor) -> Tensor:
    """Return the standard error of the mean of k estimates, (k, batch) to (batch,)."""
    return estimates.std(dim=0) / math.sqrt(len(estimates))


def _measured(
    riders: Sequence[Rider],
    integrals: Sequence[Tensor],
    times: Mapping[Waypoints, Sequence[float]],
    states: Mapping[float, Tensor],
) -> tuple[Tensor, ...]:
    """Return what each rider measured: an integral, a quantity of its waypoints, or nothing."""
    rest, measured = iter(integrals), []
    for rider in riders:
        if isinstance(rider, Integrand):
            measured.append(next(rest))
        elif isinstance(rider, Waypoints):
            own = times[rider]
            measured.append(rider([t / own[-1] for t in own], torch.stack([states[t] for t in own])))
        else:
            measured.append(states[0.0].new_zeros(len(states[0.0])))
    return tuple(measured)


@contextmanager
def _frozen_weights(field: VectorField) -> Iterator[None]:
    """Compute parametrised weights (spectral norms) once per solve and not at every evaluation."""
    parametrised = any(isinstance(part, parametrize.ParametrizationList) for part in field.modules())
    with parametrize.cached() if parametrised else nullcontext():
        yield


def _scaled(state: State, rate: Tensor | None) -> State:
    return state if rate is None else tuple(part * rate for part in state)
