r"""Flow matching, alone or as the first stage before maximum likelihood."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cnf_lab.errors import ConfigError
from cnf_lab.flows import BlockSequence, Flow
from cnf_lab.flows.riders import Rider
from cnf_lab.objectives.base import LossTerms, Objective, Stage, StagedObjective, StagePlan
from cnf_lab.objectives.likelihood import Likelihood
from cnf_lab.objectives.paths import Coupling, Path, Times


class FlowMatching(Objective[Flow]):
    r"""The mean squared distance of the field from the velocity of a path, without a solve.

    .. math:: \frac{1}{B D} \sum_b \lVert f(u_b, x_b(u_b)) - \dot x_b(u_b) \rVert^2,
              \qquad x_b(u) = a(u)\, x_b + b(u)\, z_b, \quad z_b \sim \mathcal{N}(0, I).

    The field that minimises it moves the data's density to the base's along the path, so that
    ``log_prob`` and ``sample`` of the same flow work at once. Its loss is not a likelihood: look
    at ``val/nll``. Blocks that follow one another share the path, each its part of it. A learned
    dequantiser is used as it is: only the likelihood trains it.

    Args:
        path: The path from a data row to a latent row.
        times: The distribution of the times u.
        coupling: Which latent row a data row gets.
        regularisers: None can be had: penalties ride in a solve.

    Raises:
        ConfigError: If there are penalties.

    References:
        Lipman et al., Flow Matching for Generative Modeling (2023), https://arxiv.org/abs/2210.02747.
    """

    solves = False

    def __init__(
        self,
        path: Path,
        times: Times,
        coupling: Coupling,
        regularisers: Mapping[str, Rider] | None = None,
    ) -> None:
        if regularisers:
            raise ConfigError(
                f"Expected no penalty with objective=flow_matching, which has no solve, got {', '.join(regularisers)}. "
                "Type regulariser=none, or objective=flow_matching_then_likelihood."
            )
        self.path, self.times, self.coupling = path, times, coupling

    def check(self, flow: nn.Module) -> None:
        """Refuse a flow whose blocks are not one path, and couplings that would bias a conditional density."""
        super().check(flow)
        assert isinstance(flow, Flow)
        BlockSequence(flow)
        if self.coupling.joint and flow.context_features:
            raise ConfigError(
                "Expected objective/coupling=independent for a conditional density, whose pairs must not depend on "
                f"other rows' contexts, got {type(self.coupling).__name__}. Type objective/coupling=independent."
            )

    def __call__(self, flow: Flow, x: Tensor, context: Tensor | None, generator: torch.Generator | None) -> LossTerms:
        """Return the loss with the term ``flow_matching``, a mean square per dimension."""
        blocks = BlockSequence(flow)
        with torch.no_grad():  # a dequantiser's own objective is the likelihood
            x = flow.dequantise(x, generator)[0]
        start, context = blocks.start(x, context)
        latent = flow.base.sample(len(start), generator).to(start)
        u = self.times.sample(len(start), generator, start)
        state, velocity = blocks.along(self.path, start, self.coupling(start, latent), u)
        error = (blocks.velocity(u, state, context) - velocity).flatten(1).square().mean(dim=1)
        return LossTerms(error.mean() + _untouched(flow), {"flow_matching": error})


def _untouched(flow: Flow) -> Tensor | float:
    """Return a zero that depends on a learned dequantiser: of several processes each wants a gradient of everything."""
    if flow.dequantiser is None:
        return 0.0
    return sum((0.0 * parameter.sum() for parameter in flow.dequantiser.parameters()), start=0.0)


class FlowMatchingThenLikelihood(StagedObjective):
    """Flow matching as a start without solves, then maximum likelihood of the same flow.

    Args:
        path: The path of flow matching.
        times: Its distribution of times.
        coupling: Its coupling.
        flow_matching: What the first stage has of its own; its ``steps`` must be given.
        likelihood: What the second stage has of its own.
        regularisers: Penalties of the second stage by name.

    Raises:
        ConfigError: If the first stage would never end.
    """

    def __init__(
        self,
        path: Path,
        times: Times,
        coupling: Coupling,
        flow_matching: StagePlan,
        likelihood: StagePlan,
        regularisers: Mapping[str, Rider] | None = None,
    ) -> None:
        if flow_matching.steps is None:
            raise ConfigError(
                "Expected objective.flow_matching.steps, got null. Type objective.flow_matching.steps=2000."
            )
        self._stages = (
            Stage("flow_matching", FlowMatching(path, times, coupling), flow_matching),
            Stage("likelihood", Likelihood(regularisers), likelihood),
        )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Flow matching, then likelihood."""
        return self._stages
