"""Continuous blocks that follow one another, seen as one path from data to latent."""

from itertools import takewhile

import torch
from torch import Tensor

from cnf_lab.errors import ConfigError
from cnf_lab.flows.base import Chain, Flow, Transform
from cnf_lab.flows.continuous import ContinuousFlow


class BlockSequence:
    r"""The blocks of a flow as one vector field over u in [0, 1], for objectives without a solve.

    Of n blocks block k has the times :math:`[k/n, (k+1)/n)`, where
    :math:`dx/du = n\, T_k f_k(T_k (n u - k), x)`: solved one after the other they follow one path.

    Args:
        flow: A density whose continuous blocks stand side by side at the latent end; fixed
            layers may come before them.

    Raises:
        ConfigError: If there is no continuous block, or another layer among or after them.
    """

    def __init__(self, flow: Flow) -> None:
        parts = _parts(flow.transform)
        self.flow = flow
        self.leading = list(takewhile(lambda part: not isinstance(part, ContinuousFlow), parts))
        rest = parts[len(self.leading) :]
        self.blocks = [part for part in rest if isinstance(part, ContinuousFlow)]
        if not self.blocks:
            raise ConfigError(
                "Expected a flow with continuous blocks for flow matching, got "
                f"{' and '.join(type(part).__name__ for part in parts)}. Type objective=likelihood."
            )
        if len(rest) > len(self.blocks):
            between = next(type(part).__name__ for part in rest if not isinstance(part, ContinuousFlow))
            raise ConfigError(
                "Expected continuous blocks with no other layer between or after them for flow matching, "
                f"got {between}. Type normalisation=none, or objective=likelihood."
            )

    def start(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        r"""Return rows as the first block gets them, and the context as all blocks get it.

        Args:
            x: Data (batch, \*event).
            context: Conditioning (batch, features), for a conditional density.

        Raises:
            ValueError: If shapes of data or context do not fit the flow.
        """
        context = self.flow.encode(x, context)
        for layer in self.leading:
            x = layer.pull_back(x, context).value
        return x, context

    def velocity(self, u: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        r"""Return dx/du.

        Args:
            u: Time of each row in [0, 1] (batch,).
            x: State (batch, \*event).
            context: Encoded conditioning (batch, features) or None.
        """
        count = len(self.blocks)
        if count == 1:
            return self.blocks[0].velocity(u, x, context)
        number = (u * count).long().clamp(max=count - 1)
        value = torch.zeros_like(x)
        for k, block in enumerate(self.blocks):
            # A block without rows in this batch is called all the same: every process of a
            # distributed run then has gradients of the same parameters.
            rows = (number == k).nonzero().squeeze(1)
            own = None if context is None else context[rows]
            value = value.index_add(0, rows, count * block.velocity(u[rows] * count - k, x[rows], own))
        return value


def _parts(transform: Transform) -> list[Transform]:
    if not isinstance(transform, Chain):
        return [transform]
    return [part for inner in transform.transforms for part in _parts(inner)]
