r"""Two-dimensional densities to draw from, most of them with their true log-density.

A new one is a subclass of :class:`Distribution` and a yaml file that names it. Scales, noise and
the order of operations are those of the FFJORD code (Grathwohl et al., 2019), with differences:

1. Everything is drawn from a generator that is handed over, so that a seed fixes every row.
2. Each set returns exactly as many rows as asked: where the arms of the pinwheel or the
   spirals cannot share them evenly, the first arms get one more.
3. The line and the cosine can be jittered, which gives them a density in the plane.

Entropies are the integral of -p log p over a grid that is finer than the smallest standard
deviation; the tests repeat them.
"""

from abc import abstractmethod
from functools import cache

import numpy as np

from cnf_lab.data.drawn import EXTENT, Distribution, DrawnDataModule, in_pieces
from cnf_lab.errors import ConfigError


class SwissRoll(Distribution):
    """A spiral of one and a half turns, of even density in its angle."""

    entropy = 2.66965
    start, stop, scale, std = 1.5 * np.pi, 4.5 * np.pi, 5.0, 1.0

    def draw(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        centres = self._centres(rng.uniform(self.start, self.stop, rows))
        return (centres + rng.normal(0, self.std, (rows, 2))) / self.scale

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Return the log-density in nats (rows,): the spiral blurred by the noise."""
        angle, weight = _quadrature(self.start, self.stop, 64)
        centres = self._centres(angle) / self.scale
        return _blurred(x, centres, weight / weight.sum(), self.std / self.scale)

    def _centres(self, angle: np.ndarray) -> np.ndarray:
        return angle[:, None] * _on_circle(angle)


class ConcentricCircles(Distribution):
    """Circles around the origin, of equal weight, with Gaussian noise.

    Angles are equispaced, and the log-density is the limit of many rows: in a batch of fewer
    than about 400 rows the outermost ring of :class:`Rings` falls apart into single bumps.
    """

    radii: tuple[float, ...]
    std: float

    def draw(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        """Draw rows with shape (rows, 2), float64; the last circle takes the remainder."""
        share = rows // len(self.radii)
        counts = [share] * (len(self.radii) - 1) + [rows - share * (len(self.radii) - 1)]
        circles = [
            radius * _on_circle(np.linspace(0, 2 * np.pi, count, endpoint=False))
            for radius, count in zip(self.radii, counts, strict=True)
        ]
        return rng.permutation(np.concatenate(circles)) + rng.normal(0, self.std, (rows, 2))

    def log_density(self, x: np.ndarray) -> np.ndarray:
        r"""Return the log-density in nats (rows,).

        .. math:: p(x) = \frac{1}{K} \sum_k \frac{1}{2\pi\sigma^2}
                  e^{-(r^2 + R_k^2) / 2\sigma^2} I_0(r R_k / \sigma^2), \qquad r = |x|.
        """
        from scipy.special import i0e, logsumexp

        r, radii, variance = np.hypot(x[:, 0], x[:, 1])[:, None], np.array(self.radii), self.std**2
        # i0e(u) = exp(-u) I0(u) stays in range where I0 overflows.
        terms = -((r - radii) ** 2) / (2 * variance) + np.log(i0e(r * radii / variance))
        return logsumexp(terms, axis=1) - np.log(2 * np.pi * variance * len(radii))


class Circles(ConcentricCircles):
    """Two concentric circles."""

    entropy = 3.26814
    radii, std = (3.0, 1.5), 0.24


class Rings(ConcentricCircles):
    """Four thin concentric circles."""

    entropy = 2.62318
    radii, std = (3.0, 2.25, 1.5, 0.75), 0.08


class Moons(Distribution):
    """Two interleaving half circles."""

    entropy = 2.39388
    scale, shift, std = 2.0, (-1.0, -0.2), 0.1

    def draw(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        upper = rows // 2
        centres = self._centres(np.linspace(0, np.pi, upper), np.linspace(0, np.pi, rows - upper))
        noisy = rng.permutation(centres) + rng.normal(0, self.std, (rows, 2))
        return noisy * self.scale + self.shift

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Return the log-density in nats (rows,): the half circles blurred by the noise."""
        angle, weight = _quadrature(0.0, np.pi, 16)
        centres = self._centres(angle, angle) * self.scale + self.shift
        return _blurred(x, centres, np.tile(weight / weight.sum(), 2) / 2, self.std * self.scale)

    def _centres(self, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
        return np.concatenate([_on_circle(upper), np.array([1.0, 0.5]) - _on_circle(lower)])


class EightGaussians(Distribution):
    """Eight Gaussians on a circle."""

    entropy = 2.83188  # 2.838 is log 8 and the entropy of one: eight that do not overlap
    scale = 1.414  # not the root of 2, as in the original code
    radius, std = 4.0, 0.5

    def draw(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        centres = self._centres()[rng.integers(8, size=rows)]
        return (centres + rng.normal(0, self.std, (rows, 2))) / self.scale

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Return the log-density in nats (rows,)."""
        return _blurred(x, self._centres() / self.scale, np.full(8, 1 / 8), self.std / self.scale)

    def _centres(self) -> np.ndarray:
        return self.radius * _on_circle(np.arange(8) * np.pi / 4)


class Pinwheel(Distribution):
    r"""Five bent arms around the origin.

    .. math:: x = 2 f R(2\pi k / 5 + e^{f_1} / 4), \qquad
              f \sim \mathcal{N}((1, 0), \mathrm{diag}(0.3^2, 0.1^2)),

    a row vector times a rotation, for k uniform in 0..4.
    """

    entropy = 2.31779
    arms, rate, scale = 5, 0.25, 2.0
    mean, std = np.array([1.0, 0.0]), np.array([0.3, 0.1])

    def draw(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        """Draw rows with shape (rows, 2), float64; the arms share them as evenly as possible."""
        features = self.mean + self.std * rng.normal(size=(rows, 2))
        angle = 2 * np.pi * (np.arange(rows) % self.arms) / self.arms + self.rate * np.exp(features[:, 0])
        cos, sin = np.cos(angle), np.sin(angle)
        turned = np.stack([features[:, 0] * cos + features[:, 1] * sin, features[:, 1] * cos - features[:, 0] * sin])
        return rng.permutation(self.scale * turned.T)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        r"""Return the log-density in nats (rows,), by the change of variables.

        .. math:: p(x) = \frac{1}{5 \cdot 2^2} \sum_f \frac{N(f)}{|1 + f_2 e^{f_1} / 4|}

        over the features f that come to lie at x in one of the arms.
        """
        with np.errstate(divide="ignore"):
            return np.log(in_pieces(self._density, x, 257))

    def _density(self, x: np.ndarray) -> np.ndarray:
        row, features = self._features_at(x)
        density = np.exp(-(((features - self.mean) / self.std) ** 2).sum(axis=1) / 2)
        density /= np.abs(1 + features[:, 1] * self.rate * np.exp(features[:, 0]))
        total = np.bincount(row, density, minlength=len(x))
        return total / (2 * np.pi * self.std.prod() * self.arms * self.scale**2)

    def _features_at(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # The rotation keeps the length of f, and f = r (cos a, sin a) comes to lie at x where
        # the function `arm` of a below is a whole number, that of the arm. The density is 0
        # in floating point from length 12 on; 20 keeps the exponential in range.
        length = np.minimum(np.hypot(x[:, 0], x[:, 1]) / self.scale, 20)
        argument = np.arctan2(x[:, 1], x[:, 0])

        def arm(angle: np.ndarray, row: np.ndarray) -> np.ndarray:
            bend = self.rate * np.exp(length[row] * np.cos(angle))
            return self.arms * (angle - bend - argument[row]) / (2 * np.pi)

        grid = np.linspace(-np.pi, np.pi, 257)
        number = np.floor(arm(grid, np.arange(len(x))[:, None]))
        row, cell = np.nonzero(number[:, 1:] != number[:, :-1])
        before, after = number[row, cell], number[row, cell + 1]
        low, high = grid[cell], grid[cell + 1]
        for _ in range(50):  # halvings, to the last bit
            middle = (low + high) / 2
            passed = (arm(middle, row) >= np.maximum(before, after)) == (after > before)
            low, high = np.where(passed, low, middle), np.where(passed, middle, high)
        return row, length[row, None] * _on_circle(low)


class TwoSpirals(Distribution):
    """Two spirals around the origin, one the negative of the other."""

    entropy = 2.64545
    stop, scale, side, std = 3 * np.pi, 3.0, 0.5, 0.1

    def draw(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        half = (rows + 1) // 2
        corners = self._corners(self.stop * np.sqrt(rng.random(half)))
        spiral = (corners + self.side * rng.random((half, 2))) / self.scale
        return rng.permutation(np.concatenate([spiral, -spiral])[:rows]) + rng.normal(0, self.std, (rows, 2))

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Return the log-density in nats (rows,): squares along the spirals, blurred by the noise."""
        radius, weight = _quadrature(0.0, self.stop, 48)
        weight = weight * radius / self.stop**2  # 2 r / stop^2 is the density of r, and half is each arm's
        half = self.side / self.scale / 2
        middles = self._corners(radius) / self.scale + half

        def density(part: np.ndarray) -> np.ndarray:
            total = np.zeros(len(part))
            for spiral in (middles, -middles):
                across = _box(part[:, :1] - spiral[:, 0], half, self.std)
                total += (across * _box(part[:, 1:] - spiral[:, 1], half, self.std)) @ weight
            return total

        with np.errstate(divide="ignore"):
            return np.log(in_pieces(density, x, len(weight)))

    def _corners(self, radius: np.ndarray) -> np.ndarray:
        return radius[:, None] * np.stack([-np.cos(radius), np.sin(radius)], axis=1)


class Checkerboard(Distribution):
    """Eight squares of side 2, of constant density."""

    entropy = float(np.log(32))

    def draw(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        first = rng.uniform(-2, 2, rows)
        second = rng.random(rows) - 2 * rng.integers(2, size=rows) + np.floor(first) % 2
        return 2 * np.stack([first, second], axis=1)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Return the log-density in nats (rows,): -log 32 on the squares, else -inf."""
        # The product is positive on the squares; the margin keeps rows that float32 rounds over an edge.
        margin = 1e-6
        inside = (np.abs(x) <= EXTENT + margin).all(axis=1) & (np.sin(np.pi * x / 2).prod(axis=1) >= -margin)
        return np.where(inside, -self.entropy, -np.inf)


class Graph(Distribution):
    """The graph of a function over (-2.5, 2.5), of even density in its argument.

    Args:
        jitter: Standard deviation of the Gaussian noise added to both coordinates. With 0, as
            in the original code, all mass lies on a curve and there is no density.
    """

    stop = 2.5

    def __init__(self, jitter: float = 0.0) -> None:
        if jitter < 0:
            raise ConfigError(
                f"Expected dataset.distribution.jitter of at least 0, got {jitter}. "
                "Type dataset.distribution.jitter=0.1."
            )
        self.jitter = jitter
        if jitter:
            self.log_density = self._log_density
        else:
            self.note = (
                "All mass lies on a curve: there is no density in the plane, and the NLL falls without "
                "bound. dataset.distribution.jitter=0.1 gives it one."
            )

    @abstractmethod
    def height(self, argument: np.ndarray) -> np.ndarray:
        """Return the second coordinate for the first one."""

    def draw(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        argument = rng.uniform(-self.stop, self.stop, rows)
        return np.stack([argument, self.height(argument)], axis=1) + rng.normal(0, self.jitter, (rows, 2))

    def _log_density(self, x: np.ndarray) -> np.ndarray:
        # Two standard deviations of arc length per panel where the slope is 2.5, its largest.
        panels = int(np.ceil(self.stop * np.hypot(1, 2.5) / self.jitter))
        argument, weight = _quadrature(-self.stop, self.stop, panels)
        centres = np.stack([argument, self.height(argument)], axis=1)
        return _blurred(x, centres, weight / weight.sum(), self.jitter)


class Line(Graph):
    """The diagonal y = x."""

    def height(self, argument: np.ndarray) -> np.ndarray:
        """Return the argument."""
        return argument


class Cosine(Graph):
    """The wave y = 2.5 sin x, which the original code calls cos."""

    def height(self, argument: np.ndarray) -> np.ndarray:
        """Return 2.5 sin of the argument."""
        return 2.5 * np.sin(argument)


# -- what they are made of ----------------------------------------------------------------------


def _on_circle(angle: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


@cache
def _quadrature(start: float, stop: float, panels: int) -> tuple[np.ndarray, np.ndarray]:
    # Nodes and weights of Gauss and Legendre's rule with 8 points on each of equal panels.
    node, weight = np.polynomial.legendre.leggauss(8)
    edges, half = np.linspace(start, stop, panels + 1), (stop - start) / panels / 2
    return (edges[:-1, None] + half * (1 + node)).ravel(), np.tile(half * weight, panels)


def _blurred(x: np.ndarray, centres: np.ndarray, weights: np.ndarray, std: float) -> np.ndarray:
    # The log-density of weighted points under isotropic Gaussian noise.
    from scipy.special import logsumexp

    def log_density(part: np.ndarray) -> np.ndarray:
        squares = (part**2).sum(axis=1)[:, None] - 2 * part @ centres.T + (centres**2).sum(axis=1)
        return logsumexp(np.log(weights) - squares / (2 * std**2), axis=1)

    return in_pieces(log_density, x, len(centres)) - np.log(2 * np.pi * std**2)


def _box(distance: np.ndarray, half: float, std: float) -> np.ndarray:
    # The density of uniform noise on (-half, half) plus Gaussian noise. It is even, and on the
    # negative side both terms are small and their difference keeps its digits.
    from scipy.special import ndtr

    outward = -np.abs(distance)
    return (ndtr((outward + half) / std) - ndtr((outward - half) / std)) / (2 * half)


class ToyDataModule(DrawnDataModule):
    """One of the two-dimensional sets above.

    Args:
        name: Name of the data set in folders and reports.
        distribution: The density that rows are drawn from.
        batch_size: Rows per training step and process.
        evaluation_batch_size: Rows per evaluation step and process.
        evaluation_rows: Rows of the validation split, and of the test split.
        steps_per_epoch: Training steps between two validations.
        num_workers: Worker processes of each loader; drawing needs none.
        seed: Seed of all rows.
    """

    def __init__(
        self,
        name: str,
        distribution: Distribution,
        batch_size: int = 512,
        evaluation_batch_size: int = 2000,
        evaluation_rows: int = 10_000,
        steps_per_epoch: int | None = 100,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(name, batch_size, evaluation_batch_size, evaluation_rows, steps_per_epoch, num_workers, seed)
        self._distribution = distribution

    @property
    def distribution(self) -> Distribution:
        """The density that rows are drawn from."""
        return self._distribution
