"""Maximum likelihood."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cnf_lab.flows import Flow
from cnf_lab.flows.riders import Rider
from cnf_lab.objectives.base import LossTerms, Objective


class Likelihood(Objective[Flow]):
    r"""The mean negative log-density, :math:`-\frac1B \sum_b \log p(x_b)`, plus weighted penalties.

    For pixels it is the bound :math:`-\frac1B \sum_b (\log p(x_b + u_b) - \log q(u_b \mid x_b))`, with
    u drawn anew in every step.

    Args:
        regularisers: Penalties by name, and what else changes the solve in training.
    """

    def __init__(self, regularisers: Mapping[str, Rider] | None = None) -> None:
        self.regularisers = dict(regularisers or {})

    def __call__(self, flow: Flow, x: Tensor, context: Tensor | None, generator: torch.Generator | None) -> LossTerms:
        """Return the loss with the terms ``nll`` (nats) and one per penalty."""
        x, log_q = flow.dequantise(x, generator)
        mapped = flow.pull_back(x, context, generator, list(self.regularisers.values()))
        nll = log_q - (flow.base.log_prob(mapped.value) + mapped.log_det)
        loss, terms = nll.mean(), {"nll": nll}
        for (name, regulariser), measured in zip(self.regularisers.items(), mapped.integrals, strict=True):
            if regulariser.weight is not None:
                loss = loss + regulariser.weight * measured.mean()
                terms[name] = measured
        return LossTerms(loss, terms, mapped.solves)
