r"""A continuous normalizing flow: the map made by integrating a vector field.

References:
    Chen et al., Neural Ordinary Differential Equations (2018), https://arxiv.org/abs/1806.07366.
    Grathwohl et al., FFJORD (2019), https://arxiv.org/abs/1810.01367.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf_lab.errors import ConfigError
from cnf_lab.fields import VectorField
from cnf_lab.fields.spectral import iterate_spectral_norms
from cnf_lab.flows.base import Integrand, Mapped, Transform
from cnf_lab.ode import OdeSolver, State
from cnf_lab.trace import DivergenceEstimator


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
        divergence.check(field)
        self.field, self.amortiser = field, amortiser
        self.solver, self.divergence = solver, divergence
        self.evaluation_solver = evaluation_solver or solver
        self.evaluation_divergence = evaluation_divergence or divergence
        self.evaluation_divergence.check(field)
        self.end_time = float(end_time)
        self.log_end_time = nn.Parameter(torch.tensor(self.end_time).log()) if train_end_time else None

    def pull_back(
        self,
        x: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        integrands: Sequence[Integrand] = (),
    ) -> Mapped:
        """Integrate from 0 to T."""
        if self.training:
            iterate_spectral_norms(self.field)
        return self._solve(x, 0.0, self._end, context, generator, integrands, True)

    def push_forward(
        self,
        z: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        with_log_det: bool = True,
    ) -> Mapped:
        """Integrate from T to 0."""
        return self._solve(z, self._end, 0.0, context, generator, (), with_log_det)

    def set_evaluation(self, solver: OdeSolver, divergence: DivergenceEstimator) -> None:
        """Choose the solver and the divergence estimator of evaluation mode."""
        divergence.check(self.field)
        self.evaluation_solver, self.evaluation_divergence = solver, divergence

    def trajectory(self, z: Tensor, context: Tensor | None = None, points: int = 2) -> list[Tensor]:
        """Return the states at ``points`` equally spaced times from T to 0."""
        times = torch.linspace(self._end, 0.0, points + 1, dtype=torch.float64).tolist()
        states = [z]
        for t0, t1 in zip(times[:-1], times[1:], strict=True):
            states.append(self._solve(states[-1], t0, t1, context, None, (), False).value)
        return states[1:]

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
        integrands: Sequence[Integrand],
        with_log_det: bool,
    ) -> Mapped:
        solver = self.solver if self.training else self.evaluation_solver
        divergence = self.divergence if self.training else self.evaluation_divergence
        if self.amortiser is not None:
            context = self.amortiser(context)
        probe = divergence.start(self.field, x, generator) if with_log_det else None
        device = x.device.type
        # In low precision a tight tolerance would chase round-off: evaluation keeps the full one.
        autocast, low = self.training and torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def rhs(s: Tensor, state: State) -> State:
            x = state[0]
            rate = None if self.log_end_time is None else self.log_end_time.exp()
            t = s if rate is None else s * rate
            # The solver has left autocast; only the field runs in low precision.
            with torch.autocast(device, dtype=low, enabled=autocast):
                if not with_log_det:
                    return _scaled((self.field(t, x, context).to(x.dtype),), rate)
                value, div = divergence.value_and_divergence(self.field, t, x, context, probe)
            value, div = value.to(x.dtype), div.to(x.dtype)
            return _scaled((value, div, *(integrand(t, x, value, div) for integrand in integrands)), rate)

        zeros = tuple(x.new_zeros(len(x)) for _ in range(1 + len(integrands)))
        start = (x, *zeros) if with_log_det else (x,)
        # Without the amortiser's: its gradients come through the context.
        parameters: list[Tensor] = [p for p in self.field.parameters() if p.requires_grad]
        if self.log_end_time is not None:
            parameters.append(self.log_end_time)
        if context is not None and context.requires_grad:
            parameters.append(context)
        end, stats = solver.solve(rhs, start, t0, t1, parameters)
        log_det = end[1] if with_log_det else zeros[0]
        return Mapped(end[0], log_det, end[2:], (stats,))


def _scaled(state: State, rate: Tensor | None) -> State:
    return state if rate is None else tuple(part * rate for part in state)
