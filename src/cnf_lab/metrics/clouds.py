r"""Distances between clouds of points, and what a set of clouds says of another one through them.

A cloud is K points of :math:`\mathbb{R}^d`, and a set of clouds has the shape (clouds, K, d); with
K = 1 a cloud is a row. Nothing here holds more than ``memory`` of distances at once, but for the
one cost matrix of an exact assignment.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from cnf_lab.errors import ConfigError
from cnf_lab.shapes import Float, Int

MOST_ITERATIONS = 2000  # of Sinkhorn's
HEAD = 1000  # points by which the mean cost of a large pair of clouds is taken


@dataclass(frozen=True)
class Distance(ABC):
    """A distance between two clouds, made of distances between their points.

    Attributes:
        squared: Whether distances between points are squared Euclidean ones.
        memory: GiB of distances held at once.
    """

    squared: bool
    memory: float = 0.5

    @abstractmethod
    def between(self, a: Float[Tensor, "pairs k d"], b: Float[Tensor, "pairs l d"]) -> Float[Tensor, " pairs"]:
        """Return the distance of every pair of clouds."""

    def table(self, a: Float[Tensor, "m k d"], b: Float[Tensor, "n l d"]) -> Float[Tensor, "m n"]:
        """Return the distances of all clouds of one set from all of another."""
        return torch.stack([self.between(cloud.expand(len(b), -1, -1), b) for cloud in a])

    def rows_of_table(self, columns: int) -> int:
        """Return how many rows of such a table are taken at once."""
        return 1

    def points(self, x: Float[Tensor, "*batch k d"], y: Float[Tensor, "*batch l d"]) -> Float[Tensor, "*batch k l"]:
        """Return the distances of all points of x from all of y."""
        # Not by a matrix product, whose rounding sets equal points apart.
        apart = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return apart.square() if self.squared else apart

    def room(self, numbers: int) -> int:
        """Return how many times so many numbers, and a copy of them, fit into the memory; at least one."""
        return room(self.memory, 2 * numbers)


class Euclidean(Distance):
    r"""Distance of clouds as long vectors, :math:`\lVert a - b \rVert` or its square."""

    def between(self, a: Float[Tensor, "pairs k d"], b: Float[Tensor, "pairs l d"]) -> Float[Tensor, " pairs"]:
        apart = (a - b).flatten(1).norm(dim=1)
        return apart.square() if self.squared else apart

    def table(self, a: Float[Tensor, "m k d"], b: Float[Tensor, "n l d"]) -> Float[Tensor, "m n"]:
        return self.points(a.flatten(1), b.flatten(1))

    def rows_of_table(self, columns: int) -> int:
        return self.room(columns)


class Chamfer(Distance):
    r"""Chamfer distance, the sum of the two mean distances to the nearest point of the other cloud.

    .. math:: \frac1K \sum_x \min_y \lVert x - y \rVert^p + \frac1L \sum_y \min_x \lVert x - y \rVert^p,

    p = 2 where distances are squared, as Achlioptas et al. (2018) have it, else 1.
    """

    def between(self, a: Float[Tensor, "pairs k d"], b: Float[Tensor, "pairs l d"]) -> Float[Tensor, " pairs"]:
        pairs = self.room(a.shape[1] * b.shape[1])
        both = zip(a.split(pairs), b.split(pairs), strict=True)
        return torch.cat([self._between(some, others) for some, others in both])

    def _between(self, a: Tensor, b: Tensor) -> Tensor:
        # One pair may be too large by itself, and is then taken some points at a time.
        to_b, to_a = [], a.new_full(b.shape[:2], math.inf)
        for part in a.split(self.room(len(a) * b.shape[1]), dim=1):
            apart = self.points(part, b)  # (pairs, part, L)
            to_b.append(apart.amin(dim=2))
            to_a = torch.minimum(to_a, apart.amin(dim=1))
        return torch.cat(to_b, dim=1).mean(dim=1) + to_a.mean(dim=1)


@dataclass(frozen=True)
class EarthMover(Distance):
    r"""Earth mover's distance, the mean distance of points in the cheapest one-to-one assignment.

    .. math:: \min_\phi \frac1K \sum_x \lVert x - \phi(x) \rVert^p, \qquad p = 1, \text{ or } 2 \text{ if squared.}

    Exact for clouds of up to ``exact_up_to`` points; larger ones are moved by Sinkhorn's plan, whose cost
    lies above the exact one, and the closer to it the smaller the regularisation.

    Attributes:
        exact_up_to: Points of a cloud up to which the assignment is exact.
        regularisation: Weight of the plan's entropy, in units of the mean cost.

    References:
        Cuturi (2013), Sinkhorn distances.
    """

    exact_up_to: int = 5000
    regularisation: float = 0.01

    def between(self, a: Float[Tensor, "pairs k d"], b: Float[Tensor, "pairs k d"]) -> Float[Tensor, " pairs"]:
        one = self._assignment if a.shape[1] <= self.exact_up_to else self._sinkhorn
        return torch.tensor([one(x, y) for x, y in zip(a, b, strict=True)], dtype=a.dtype, device=a.device)

    def solved(self, points: int) -> str:
        """Say how clouds of so many points are moved."""
        return "exact" if points <= self.exact_up_to else f"sinkhorn {self.regularisation:g}"

    def _assignment(self, x: Tensor, y: Tensor) -> float:
        cost = self.points(x, y).cpu().numpy()
        return float(cost[linear_sum_assignment(cost)].mean())

    def _sinkhorn(self, x: Tensor, y: Tensor) -> float:
        mean = float(self.points(x[:HEAD], y[:HEAD]).mean())
        if mean == 0:
            return 0.0
        points = len(x)
        # Its working set is some four matrices; beyond that distances are computed again in every iteration.
        lazy = self.room(2 * points) < points
        return float(
            transport().bregman.empirical_sinkhorn2(
                x,
                y,
                self.regularisation * mean,
                metric="sqeuclidean" if self.squared else "euclidean",
                isLazy=lazy,
                batchSize=min(self.room(points), points),
                numIterMax=MOST_ITERATIONS,
                stopThr=1e-3 / math.sqrt(points),  # of the norm of what the plan's marginals miss: a thousandth
                warn=False,
                **({} if lazy else {"method": "sinkhorn_log"}),
            )
        )


def transport() -> ModuleType:
    """Import POT, which only large clouds need.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import ot
    except ImportError as failure:
        raise ConfigError(
            "Expected the package POT for Sinkhorn's plan of a large cloud, got none. "
            "Type pip install 'cnf-lab[metrics]', or raise sample_metrics.sinkhorn_above."
        ) from failure
    return ot


def to_clouds(rows: Float[Tensor, "n *event"], size: int) -> Float[Tensor, "clouds k d"]:
    """Return rows as clouds of so many points each, in their order; what is left over is dropped."""
    clouds = len(rows) // size
    return rows[: clouds * size].reshape(clouds, size, -1)


class Neighbours(NamedTuple):
    """Nearest neighbours across two sets of clouds.

    Attributes:
        to_generated: Distance of every reference cloud from the nearest generated one.
        to_reference: Distance of every generated cloud from the nearest reference cloud.
        nearest_reference: Which one that is.
    """

    to_generated: Float[Tensor, " references"]
    to_reference: Float[Tensor, " generated"]
    nearest_reference: Int[Tensor, " generated"]


def across(reference: Float[Tensor, "m k d"], generated: Float[Tensor, "n k d"], distance: Distance) -> Neighbours:
    """Find the nearest neighbours across two sets.

    Args:
        reference: Clouds of data.
        generated: Clouds of samples.
        distance: The distance.
    """
    to_generated, to_reference = [], reference.new_full((len(generated),), math.inf)
    nearest = torch.zeros(len(generated), dtype=torch.long, device=reference.device)
    for block in _blocks(len(reference), distance.rows_of_table(len(generated))):
        apart = distance.table(reference[block], generated)
        to_generated.append(apart.amin(dim=1))
        least, row = apart.min(dim=0)
        nearest = torch.where(least < to_reference, row + block.start, nearest)
        to_reference = torch.minimum(least, to_reference)
    return Neighbours(torch.cat(to_generated), to_reference, nearest)


def within(clouds: Float[Tensor, "n k d"], distance: Distance) -> Float[Tensor, " n"]:
    """Return the distance of every cloud from its nearest neighbour in the same set; infinite for a single one."""
    nearest = clouds.new_full((len(clouds),), math.inf)
    for block in _blocks(len(clouds), distance.rows_of_table(len(clouds))):
        apart = distance.table(clouds[block], clouds[block.start :])  # what lies before is known from the other side
        apart.fill_diagonal_(math.inf)
        nearest[block] = torch.minimum(nearest[block], apart.amin(dim=1))
        nearest[block.start :] = torch.minimum(nearest[block.start :], apart.amin(dim=0))
    return nearest


def minimum_matching_distance(neighbours: Neighbours) -> float:
    r"""Return the mean distance of reference clouds from their nearest generated one, low where all are met.

    .. math:: \mathrm{MMD} = \frac1{|R|} \sum_{r \in R} \min_{g \in G} D(r, g).

    Falls with the number of generated clouds. Not the kernel MMD.

    Args:
        neighbours: Nearest neighbours across the two sets.

    References:
        Achlioptas et al. (2018), Learning representations and generative models for 3D point clouds.
    """
    return float(neighbours.to_generated.mean())


def coverage(neighbours: Neighbours) -> float:
    r"""Return the share of reference clouds that are nearest to some generated one.

    .. math:: \mathrm{COV} = \frac1{|R|} \bigl| \{ \arg\min_{r \in R} D(r, g) : g \in G \} \bigr|.

    Samples of the true distribution cover half of as many reference clouds, or less.

    Args:
        neighbours: Nearest neighbours across the two sets.

    References:
        Achlioptas et al. (2018).
    """
    return len(neighbours.nearest_reference.unique()) / len(neighbours.to_generated)


def nearest_neighbour_accuracy(
    neighbours: Neighbours, reference: Float[Tensor, " n"], generated: Float[Tensor, " n"]
) -> float:
    """Return how often the nearest neighbour of a cloud tells which set it is from, each left out in turn.

    A half where the sets cannot be told apart, one where they lie apart, zero where samples are copies.
    Where a neighbour of each set is equally near, half of it counts as told.

    Args:
        neighbours: Nearest neighbours across two sets of the same size.
        reference: What :func:`within` returns of the reference clouds.
        generated: Likewise of the generated ones.

    References:
        Lopez-Paz & Oquab (2017), Revisiting classifier two-sample tests.
    """
    own, other = torch.cat([reference, generated]), torch.cat([neighbours.to_generated, neighbours.to_reference])
    return float(((own < other).double() + 0.5 * (own == other)).mean())


def room(memory: float, numbers: int) -> int:
    """Return how many times so many float64 numbers fit into GiB of memory; at least one."""
    return max(1, int(memory * 2**30 / (8 * max(1, numbers))))


def _blocks(count: int, size: int) -> Iterator[slice]:
    starts = range(0, count, size)
    for start in tqdm(starts, desc="distances", unit="block", leave=False, disable=None):
        yield slice(start, min(start + size, count))
