"""Regularisers of trajectories that are no integrals: a random end time, and points close to a polynomial."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cnf_lab.errors import ConfigError
from cnf_lab.flows.riders import EndTime, Waypoints
from cnf_lab.shapes import Float


class RandomEndTime(EndTime):
    r"""STEER: every solve in training ends at its own :math:`T' \sim \mathcal{U}(T - b, T + b)`.

    All rows of a solve share it, as in the paper; evaluation ends at T. It adds no term to the
    loss, and costs nothing.

    Args:
        width: b, above 0 and below T.

    Raises:
        ConfigError: If the width is not positive.

    References:
        Ghosh et al., STEER: simple temporal regularization for neural ODEs (2020), https://arxiv.org/abs/2006.10711.
    """

    def __init__(self, width: float) -> None:
        if not width > 0:
            raise ConfigError(
                f"Expected regulariser.steer.width above 0, got {width}. Type regulariser.steer.width=0.5."
            )
        self.width = width

    def draw(self, end: float, generator: torch.Generator | None, device: torch.device) -> float:
        """Return the end time of one solve; refuse a width that reaches the start."""
        if not self.width < end:
            raise ConfigError(
                f"Expected regulariser.steer.width below the end time, {end:g}, got {self.width:g}. "
                f"Type regulariser.steer.width={end / 2:g}."
            )
        drawn = torch.rand((), generator=generator, device=device, dtype=torch.float64).item()
        return end + self.width * (2 * drawn - 1)


class TrajectoryPolynomial(Waypoints):
    r"""TPR: how far points of a path lie from the polynomial that fits them best.

    .. math:: \frac1n \sum_{i=1}^n \lVert x(t_i) - \hat P(t_i) \rVert^2, \qquad t_1 = 0, \quad t_n = T,

    with the other times uniform in (0, T), drawn once per solve, and :math:`\hat P` by least
    squares. A path of constant velocity costs nothing. As in the authors' code both ends are
    among the points, and squares are summed over the dimensions.

    The solve halts at each of the times. On a fixed grid these are points of the grid, and cost
    nothing; a solver with error control starts again there, with two evaluations and a first
    step of its own.

    Args:
        weight: Factor of the mean in the loss.
        times: Number of times between the ends.
        degree: Degree of the polynomial, at most ``times``: it goes through any ``degree + 1`` points.

    Raises:
        ConfigError: If a number is out of range.

    References:
        Huang & Yeh, Accelerating continuous normalizing flow with trajectory polynomial
        regularization (2021), https://arxiv.org/abs/2012.04228, and its code.
    """

    weight: float

    def __init__(self, weight: float, times: int = 1, degree: int = 1) -> None:
        if degree < 1 or times < degree:
            raise ConfigError(
                "Expected regulariser.tpr.degree of at least 1 and at most regulariser.tpr.times, "
                f"got {degree} and {times}. Type regulariser.tpr.degree=1 regulariser.tpr.times=1."
            )
        self.weight, self.times, self.degree = weight, times, degree

    def draw(self, generator: torch.Generator | None, device: torch.device) -> list[float]:
        """Return the moments, uniform in (0, 1)."""
        return torch.rand(self.times, generator=generator, device=device, dtype=torch.float64).tolist()

    def __call__(self, moments: Sequence[float], states: Float[Tensor, "points batch *event"]) -> Tensor:
        """Return the mean squared distance (batch,)."""
        times = 2 * torch.tensor(moments, dtype=torch.float64) - 1
        basis = torch.linalg.qr(times.unsqueeze(1) ** torch.arange(self.degree + 1))[0]
        residual = torch.eye(len(times), dtype=torch.float64) - basis @ basis.mT
        distances = torch.tensordot(residual.to(states), states, dims=1)
        return distances.flatten(2).square().sum(dim=2).mean(dim=0)
