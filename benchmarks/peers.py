"""Training steps of other packages, each with its own field of the same sizes; skipped where not installed."""

import contextlib
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from cases import SEED, Case, Missing, Run
from torch import Tensor, nn

from cnf_lab.fields import Softplus

ACTIVATIONS = {Softplus: nn.Softplus}


class Zuko:
    """A training step of zuko's CNF.

    Its time features are 3 cosines and sines beside x, its solve is its own dopri5 with an
    error test per number and the log-det scaled by 0.01, its gradient replays the steps.

    Args:
        case: The shape.
        device: Device type.
        tolerance: Absolute and relative error bound.
        exact: Whether the divergence is exact, by batched reverse mode, or Hutchinson's.
        rows: Number of rows; None for the case's.
    """

    def __init__(self, case: Case, device: str, tolerance: float, exact: bool, rows: int | None = None) -> None:
        try:
            import zuko
        except ImportError as failure:
            raise Missing("zuko: pip install 'cnf-lab[peers]'") from failure
        torch.manual_seed(SEED)
        (features,) = case.event_shape
        options: dict[str, Any] = {"hidden_features": case.hidden, "activation": ACTIVATIONS[case.activation]}
        self.flow = zuko.flows.CNF(features, exact=exact, atol=tolerance, rtol=tolerance, **options).to(device)
        self.x = case.x(device, rows)
        self.evaluations = 0
        self.flow.transform.f = self._counted(self.flow.transform.f)

    def __call__(self) -> Run:
        """Run once."""
        torch.manual_seed(SEED)
        self.evaluations = 0
        loss = -self.flow().log_prob(self.x).mean()
        forward = self.evaluations
        loss.backward()
        self.flow.zero_grad(set_to_none=True)
        return Run(float(loss.detach()), forward, self.evaluations - forward)

    def _counted(self, field: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*arguments: Any, **options: Any) -> Tensor:
            self.evaluations += 1
            return field(*arguments, **options)

        return counted


class Torchdyn:
    """A training step of torchdyn's CNF by dopri5 and its adjoint.

    Time is an extra input of the first layer, by torchdyn's ``DepthCat``.

    Args:
        case: The shape.
        device: Device type.
        tolerance: Absolute and relative error bound, of the backward solve too.
        exact: Whether the divergence is a loop over the dimensions, or Hutchinson's.
        rows: Number of rows; None for the case's.
    """

    def __init__(self, case: Case, device: str, tolerance: float, exact: bool, rows: int | None = None) -> None:
        try:
            from torchdyn.core import NeuralODE
            from torchdyn.models import CNF, autograd_trace, hutch_trace
            from torchdyn.nn import DepthCat
        except ImportError as failure:
            raise Missing("torchdyn: pip install torchdyn") from failure
        torch.manual_seed(SEED)
        (features,) = case.event_shape
        layers: list[nn.Module] = [DepthCat(1)]
        sizes = [features + 1, *case.hidden]
        for n_in, n_out in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(n_in, n_out), ACTIVATIONS[case.activation]()]
        network = nn.Sequential(*layers, nn.Linear(sizes[-1], features))
        zeros = torch.zeros(features, device=device)
        noise = torch.distributions.Independent(torch.distributions.Normal(zeros, zeros + 1), 1)
        cnf = CNF(network, autograd_trace) if exact else CNF(network, hutch_trace, noise)
        bounds = dict.fromkeys(("atol", "rtol", "atol_adjoint", "rtol_adjoint"), tolerance)
        with contextlib.redirect_stdout(sys.stderr):  # it tells what it wraps
            self.ode = NeuralODE(cnf, solver="dopri5", sensitivity="adjoint", return_t_eval=False, **bounds).to(device)
        self.x, self.times = case.x(device, rows), torch.tensor([0.0, 1.0], device=device)

    def __call__(self) -> Run:
        """Run once."""
        torch.manual_seed(SEED)
        self.ode.vf.nfe = 0
        end = self.ode(torch.cat([torch.zeros_like(self.x[:, :1]), self.x], dim=1), self.times)[-1]
        minus_log_det, z = end[:, 0], end[:, 1:]
        log_base = -0.5 * (z.square().sum(dim=1) + z.shape[1] * math.log(2 * math.pi))
        loss = (minus_log_det - log_base).mean()
        forward = int(self.ode.vf.nfe)
        loss.backward()
        self.ode.zero_grad(set_to_none=True)
        return Run(float(loss.detach()), forward, int(self.ode.vf.nfe) - forward)


PEERS = {"zuko": Zuko, "torchdyn": Torchdyn}
