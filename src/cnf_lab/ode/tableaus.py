r"""Butcher tableaus of explicit Runge-Kutta methods.

The embedded pairs are torchdiffeq's own numbers; the fixed-grid methods are those that it
writes out as formulas.

References:
    Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I (1993), section II.1.
"""

from typing import NamedTuple

from torchdiffeq._impl.odeint import SOLVERS


class Tableau(NamedTuple):
    r"""A method :math:`k_i = f(t + c_i h,\ x + h \sum_j a_{ij} k_j)`, :math:`x' = x + h \sum_i b_i k_i`.

    Attributes:
        nodes: c, one per evaluation; the first is 0.
        matrix: The rows of a; row i has i entries.
        weights: b, one per evaluation of the solution.
        errors: Weights of the error estimate, empty for a method without one.
        order: Order of the solution.
        reuses_last: Whether the last evaluation stands at the new state (first same as last).
            It then serves the error estimate and the next step, and not the solution.
    """

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    errors: tuple[float, ...]
    order: int
    reuses_last: bool = False


def _embedded(method: str) -> Tableau:
    solver = SOLVERS[method]
    nodes, matrix, weights, errors = solver.tableau
    rows = ((), *(tuple(row.tolist()) for row in matrix))
    solution = tuple(weights.tolist())
    reuses_last = solution[-1] == 0 and solution[:-1] == rows[-1]
    return Tableau((0.0, *nodes.tolist()), rows, solution, tuple(errors.tolist()), solver.order, reuses_last)


EMBEDDED = {name: _embedded(name) for name in ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")}
FIXED = {
    "euler": Tableau((0.0,), ((),), (1.0,), (), 1),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0), (), 2),
    "heun2": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5), (), 2),
    "heun3": Tableau((0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75), (), 3),
    # Kutta's 3/8 rule, whose error is smaller than that of the more common one.
    "rk4": Tableau(
        (0.0, 1 / 3, 2 / 3, 1.0),
        ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
        (),
        4,
    ),
}
TABLEAUS = EMBEDDED | FIXED
