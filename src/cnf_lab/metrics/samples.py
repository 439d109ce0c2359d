"""How close samples are to data: distances between two sets of rows, and all of them in one call."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import ks_2samp
from torch import Tensor
from tqdm import tqdm

from cnf_lab.metrics.clouds import (
    Chamfer,
    Distance,
    EarthMover,
    Euclidean,
    across,
    coverage,
    minimum_matching_distance,
    nearest_neighbour_accuracy,
    room,
    to_clouds,
    within,
)
from cnf_lab.shapes import Float

MEDIAN_ROWS = 2000  # rows whose mutual distances give the bandwidth
MANY_FEATURES = 100  # beyond which a row does not list every feature
#: Metrics of sets of clouds or rows.
SET_METRICS = ("minimum_matching_distance", "coverage", "nearest_neighbour_accuracy")
METRICS = ("chamfer", "earth_mover", *SET_METRICS, "kernel_mmd", "sliced_wasserstein", "kolmogorov_smirnov")


def median_bandwidth(rows: Float[Tensor, "n d"]) -> float:
    """Return the median distance between the first rows; 1 where more than half of them are equal."""
    return float(torch.nn.functional.pdist(rows[:MEDIAN_ROWS]).median()) or 1.0


def kernel_mmd(
    reference: Float[Tensor, "n d"], generated: Float[Tensor, "m d"], bandwidths: list[float], memory: float = 0.5
) -> Float[Tensor, " bandwidths"]:
    r"""Return the unbiased estimate of the squared maximum mean discrepancy, for each Gaussian kernel.

    .. math:: \mathrm{MMD}^2 = \frac{\sum_{i \ne j} k(x_i, x_j)}{n (n-1)} + \frac{\sum_{i \ne j} k(y_i, y_j)}{m (m-1)}
              - \frac{2 \sum_{ij} k(x_i, y_j)}{n m}, \qquad k(x, y) = e^{-\lVert x - y \rVert^2 / 2 h^2}.

    Zero on average where the distributions agree, and so negative for half of such pairs.

    Args:
        reference: Rows of data.
        generated: Samples.
        bandwidths: h of each kernel.
        memory: GiB of distances held at once.

    References:
        Gretton et al. (2012), A kernel two-sample test, equation 3.
    """
    n, m = len(reference), len(generated)
    within_reference = (_kernel_sums(reference, reference, bandwidths, memory) - n) / (n * (n - 1))
    within_generated = (_kernel_sums(generated, generated, bandwidths, memory) - m) / (m * (m - 1))
    return within_reference + within_generated - 2 * _kernel_sums(reference, generated, bandwidths, memory) / (n * m)


def _kernel_sums(x: Tensor, y: Tensor, bandwidths: list[float], memory: float) -> Tensor:
    sums = x.new_zeros(len(bandwidths))
    squares = x.new_tensor([2 * bandwidth**2 for bandwidth in bandwidths])
    for part in _progress(x.split(room(memory, 3 * len(y))), "kernel"):
        apart = torch.cdist(part, y).square()
        sums += torch.stack([apart.div(-square).exp_().sum() for square in squares])
    return sums


def sliced_wasserstein(
    reference: Float[Tensor, "n d"],
    generated: Float[Tensor, "m d"],
    projections: int,
    generator: torch.Generator,
    memory: float = 0.5,
) -> float:
    r"""Return the sliced 2-Wasserstein distance, from random directions.

    .. math:: \mathrm{SW}_2^2 = E_{\theta \sim \mathcal{U}(S^{d-1})}
              \int_0^1 \bigl( F^{-1}_{\theta^\top x}(u) - F^{-1}_{\theta^\top y}(u) \bigr)^2 du.

    Args:
        reference: Rows of data.
        generated: Samples, as many or not.
        projections: Number of directions.
        generator: Source of the directions, on the CPU.
        memory: GiB of projections held at once.

    References:
        Bonneel et al. (2015), Sliced and Radon Wasserstein barycenters of measures.
    """
    n, m, d = len(reference), len(generated), reference.shape[1]
    directions = torch.randn(d, projections, generator=generator, dtype=torch.float64).to(reference)
    directions /= directions.norm(dim=0)
    # Quantile functions are steps; both are constant between two levels of the union.
    levels = torch.cat(
        [torch.arange(n, dtype=torch.float64) / n, torch.arange(m, dtype=torch.float64) / m, torch.ones(1)]
    )
    levels = levels.sort().values
    widths, middles = levels.diff(), (levels[1:] + levels[:-1]) / 2
    i, j = ((middles * count).long().clamp(max=count - 1).to(reference.device) for count in (n, m))
    weights = widths.to(reference)
    total = 0.0
    for part in _progress(directions.split(room(memory, 6 * (n + m)), dim=1), "slices"):
        x, y = (reference @ part).sort(dim=0).values, (generated @ part).sort(dim=0).values
        total += float((weights @ (x[i] - y[j]).square()).sum())
    return math.sqrt(total / projections)


def kolmogorov_smirnov(reference: Float[Tensor, "n d"], generated: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    r"""Return the largest difference of the distribution functions of every feature, :math:`\sup |F - G|`."""
    columns = zip(reference.T.cpu().numpy(), generated.T.cpu().numpy(), strict=True)
    return torch.tensor([float(ks_2samp(x, y, method="asymp").statistic) for x, y in columns], dtype=torch.float64)


@dataclass
class SampleMetrics:
    """All metrics of rows against the same reference rows.

    Clouds are runs of ``cloud_size`` rows. The Chamfer and the earth mover's distance are means over pairs of
    a reference cloud and the generated cloud of the same number; with ``cloud_size`` 1 all rows are one cloud.
    Minimum matching distance, coverage and 1-nearest-neighbour accuracy are taken of rows under the Euclidean
    distance and, with a ``cloud_size`` above 1, of clouds under the other two.

    Attributes:
        reference: Rows of data, float64.
        metrics: Names among ``METRICS``.
        cloud_size: Points of a cloud.
        squared: Whether distances between points are squared; None for what is usual: Chamfer and Euclidean
            distances are, the earth mover's is not.
        bandwidths: Bandwidths of the kernel MMD, in units of the median distance between reference rows.
        projections: Directions of the sliced Wasserstein distance.
        sinkhorn_above: Points of a cloud above which the earth mover's distance is Sinkhorn's.
        regularisation: Of Sinkhorn's plan, in units of the mean cost.
        seed: Seed of the directions.
        memory: GiB of distances held at once.
    """

    reference: Float[Tensor, "n d"]
    metrics: tuple[str, ...] = METRICS
    cloud_size: int = 1
    squared: bool | None = None
    bandwidths: tuple[float, ...] = (0.5, 1.0, 2.0)
    projections: int = 1000
    sinkhorn_above: int = 5000
    regularisation: float = 0.01
    seed: int = 0
    memory: float = 0.5
    _within: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False)

    def measure(self, generated: Float[Tensor, "m d"]) -> list[dict[str, Any]]:
        """Return one row per figure: ``metric``, ``distance``, ``value`` and what the value depends on.

        Args:
            generated: Samples, or any other rows in their place.
        """
        rows: list[dict[str, Any]] = []
        for name, distance in self._distances().items():
            rows += self._of_distance(name, distance, generated)
        single: dict[str, Callable[[Tensor], Iterator[dict[str, Any]]]] = {
            "kernel_mmd": self._kernel_mmd,
            "sliced_wasserstein": self._sliced_wasserstein,
            "kolmogorov_smirnov": self._kolmogorov_smirnov,
        }
        counts = {"n_reference": len(self.reference), "n_generated": len(generated), "cloud_size": 1, "squared": None}
        for name, rows_of in single.items():
            if name in self.metrics:
                rows += [{"metric": name, **counts, **row} for row in rows_of(generated)]
        return rows

    def _distances(self) -> dict[str, Distance]:
        def squares(usual: bool) -> bool:
            return usual if self.squared is None else self.squared

        return {
            "chamfer": Chamfer(squares(True), self.memory),
            "emd": EarthMover(squares(False), self.memory, self.sinkhorn_above, self.regularisation),
            "l2": Euclidean(squares(True), self.memory),
        }

    def _of_distance(self, name: str, distance: Distance, generated: Tensor) -> Iterator[dict[str, Any]]:
        paired = {"chamfer": "chamfer", "emd": "earth_mover"}.get(name)
        if paired in self.metrics:
            yield {"metric": paired, "distance": name, **self._paired(distance, generated)}
        wanted = [metric for metric in SET_METRICS if metric in self.metrics]
        if wanted and (name == "l2" or self.cloud_size > 1):
            yield from self._of_sets(wanted, name, distance, generated)

    def _paired(self, distance: Distance, generated: Tensor) -> dict[str, Any]:
        # Of as many rows on both sides: the assignment is one to one.
        count = min(len(self.reference), len(generated))
        size = self.cloud_size if self.cloud_size > 1 else count
        a, b = to_clouds(self.reference[:count], size), to_clouds(generated[:count], size)
        pairs = zip(a.split(1), b.split(1), strict=True)
        value = torch.cat([distance.between(*pair) for pair in _progress(list(pairs), "pairs")]).mean()
        return {"value": float(value), **self._used(distance, a, b)}

    def _of_sets(self, wanted: list[str], name: str, distance: Distance, generated: Tensor) -> Iterator[dict[str, Any]]:
        size = 1 if name == "l2" else self.cloud_size
        a, b = to_clouds(self.reference, size), to_clouds(generated, size)
        both = across(a, b, distance)
        used = {"distance": name, **self._used(distance, a, b)}
        if "minimum_matching_distance" in wanted:
            yield {"metric": "minimum_matching_distance", "value": minimum_matching_distance(both), **used}
        if "coverage" in wanted:
            yield {"metric": "coverage", "value": coverage(both), **used}
        if "nearest_neighbour_accuracy" in wanted:
            count = min(len(a), len(b))
            a, b = a[:count], b[:count]
            same = len(both.to_generated) == len(both.to_reference)
            both = both if same else across(a, b, distance)
            if (name, count) not in self._within:
                self._within[name, count] = within(a, distance)
            value = nearest_neighbour_accuracy(both, self._within[name, count], within(b, distance))
            used = {"distance": name, **self._used(distance, a, b)}
            yield {"metric": "nearest_neighbour_accuracy", "value": value, **used}

    def _used(self, distance: Distance, a: Tensor, b: Tensor) -> dict[str, Any]:
        size = a.shape[1]
        used = {"n_reference": len(a) * size, "n_generated": len(b) * size, "cloud_size": size}
        solved = {"solved": distance.solved(size)} if isinstance(distance, EarthMover) else {}
        return {**used, "squared": distance.squared, **solved}

    def _kernel_mmd(self, generated: Tensor) -> Iterator[dict[str, Any]]:
        median = median_bandwidth(self.reference)
        values = kernel_mmd(self.reference, generated, [ratio * median for ratio in self.bandwidths], self.memory)
        for ratio, value in zip(self.bandwidths, values.tolist(), strict=True):
            told = {"bandwidth": ratio * median, "bandwidth_over_median": ratio}
            yield {"distance": f"gaussian kernel, {ratio:g} median", "value": value, "squared": True, **told}

    def _sliced_wasserstein(self, generated: Tensor) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.seed)
        value = sliced_wasserstein(self.reference, generated, self.projections, generator, self.memory)
        yield {"distance": "2-wasserstein", "value": value, "squared": False, "projections": self.projections}

    def _kolmogorov_smirnov(self, generated: Tensor) -> Iterator[dict[str, Any]]:
        values = kolmogorov_smirnov(self.reference, generated)
        yield {"distance": "mean over features", "value": float(values.mean())}
        listed = {"per_feature": values.tolist()} if len(values) <= MANY_FEATURES else {}
        yield {"distance": "largest of features", "value": float(values.max()), **listed}


def _progress(parts: Any, name: str) -> Any:
    return tqdm(parts, desc=name, unit="block", leave=False, disable=None)
