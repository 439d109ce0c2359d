"""Continuous blocks that follow one another, seen as one path from data to latent."""

from collections.abc import Callable
from itertools import takewhile

import torch
from torch import Tensor

from cnf_lab.errors import ConfigError
from cnf_lab.flows.base import Chain, Flow, Transform
from cnf_lab.flows.continuous import ContinuousFlow
from cnf_lab.flows.multiscale import View, Viewed

#: A path between pairs of rows x and z: their states and velocities at times u (batch,).
Path = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class BlockSequence:
    r"""The blocks of a flow as one vector field over u in [0, 1], for objectives without a solve.

    Of n blocks block k has the times :math:`[k/n, (k+1)/n)`, where
    :math:`dx/du = n\, T_k f_k(T_k (n u - k), x)`: solved one after the other they follow one path.

    In a multiscale flow what is factored out at a scale must have arrived at the base when the
    blocks of that scale end. Each such part therefore has a path of its own, over the times of its
    scale, and stands still before and after: the blocks of a scale learn its part given the parts
    that stay, which are still data.

    Args:
        flow: A density whose continuous blocks stand side by side at the latent end; fixed
            layers may come before them.

    Raises:
        ConfigError: If there is no continuous block, or another layer among or after them.
    """

    def __init__(self, flow: Flow) -> None:
        parts = _parts(flow.transform)
        self.flow, self.leading = flow, fixed_layers(flow)
        rest = parts[len(self.leading) :]
        self.blocks = [block for block in map(_inner, rest) if isinstance(block, ContinuousFlow)]
        self.views = [part.view if isinstance(part, Viewed) else View() for part in rest]
        if not self.blocks:
            raise ConfigError(
                "Expected a flow with continuous blocks for flow matching, got "
                f"{' and '.join(type(part).__name__ for part in parts)}. Type objective=likelihood."
            )
        if len(rest) > len(self.blocks):
            between = next(type(_inner(part)).__name__ for part in rest if not isinstance(_inner(part), ContinuousFlow))
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

    def along(self, path: Path, x: Tensor, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return states and velocities dx/du on the way from rows as the first block gets them to latent rows.

        Args:
            path: The path of a part over its own time in [0, 1].
            x: Start (batch, \*event).
            z: Latent rows (batch, \*event).
            u: Time of each row in [0, 1] (batch,).
        """
        last = self.views[-1].scale
        if last == 0:
            return path(x, z, u)
        state, velocity = self._along_scale(last, path, x, z, u)
        for scale in reversed(range(last)):
            stays = View(scale + 1)  # which does not show what leaves at this scale
            leaving, speed = self._along_scale(scale, path, x, z, u)
            state, velocity = (stays.put(a, stays.take(b)) for a, b in ((leaving, state), (speed, velocity)))
        return state, velocity

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
        number = self._number(u)
        value = torch.zeros_like(x)
        for k, (block, view) in enumerate(zip(self.blocks, self.views, strict=True)):
            # A block without rows in this batch is called all the same: every process of a
            # distributed run then has gradients of the same parameters.
            rows = (number == k).nonzero().squeeze(1)
            own = None if context is None else context[rows]
            part = count * block.velocity(u[rows] * count - k, view.take(x[rows]), own)
            value = value.index_add(0, rows, view.put(torch.zeros_like(x[rows]), part))
        return value

    def _along_scale(self, scale: int, path: Path, x: Tensor, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return states and velocities over the times of a scale, standing still outside of them."""
        own = [k for k, view in enumerate(self.views) if view.scale == scale]
        share = (u * len(self.blocks) - own[0]) / len(own)
        state, velocity = path(x, z, share.clamp(0, 1))
        number = self._number(u)
        rate = ((number >= own[0]) & (number <= own[-1])) * (len(self.blocks) / len(own))
        return state, velocity * rate.reshape(-1, *[1] * (x.dim() - 1))

    def _number(self, u: Tensor) -> Tensor:
        count = len(self.blocks)
        return (u * count).long().clamp(max=count - 1)


def fixed_layers(flow: Flow) -> list[Transform]:
    """Return the layers between the data and the first continuous block."""
    return list(takewhile(lambda part: not isinstance(_inner(part), ContinuousFlow), _parts(flow.transform)))


def _inner(part: Transform) -> Transform:
    return part.transform if isinstance(part, Viewed) else part


def _parts(transform: Transform) -> list[Transform]:
    if not isinstance(transform, Chain):
        return [transform]
    return [part for inner in transform.transforms for part in _parts(inner)]
