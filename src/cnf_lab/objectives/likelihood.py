"""Maximum likelihood."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cnf_lab.flows import Flow
from cnf_lab.objectives.base import LossTerms, Objective
from cnf_lab.objectives.regularisers import Regulariser


class Likelihood(Objective):
    r"""The mean negative log-density, :math:`-\frac1B \sum_b \log p(x_b)`, plus weighted penalties.

    Args:
        regularisers: Penalties by name.
    """

    def __init__(self, regularisers: Mapping[str, Regulariser] | None = None) -> None:
        self.regularisers = dict(regularisers or {})

    def __call__(self, flow: Flow, x: Tensor, context: Tensor | None, generator: torch.Generator | None) -> LossTerms:
        """Return the loss with the terms ``nll`` (nats) and one per regulariser."""
        mapped = flow.pull_back(x, context, generator, list(self.regularisers.values()))
        nll = -(flow.base.log_prob(mapped.value) + mapped.log_det)
        loss, terms = nll.mean(), {"nll": nll}
        for (name, regulariser), integral in zip(self.regularisers.items(), mapped.integrals, strict=True):
            loss = loss + regulariser.weight * integral.mean()
            terms[name] = integral
        return LossTerms(loss, terms, mapped.solves)
