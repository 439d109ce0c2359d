"""What failed solves and wrong options say."""

import difflib
from collections.abc import Sequence

from cnf_lab.errors import ConfigError


def solve_failure(
    method: str, t: float, step: float | None, evaluations: int, atol: float, rtol: float, reason: str
) -> str:
    """Return the message of a failed solve in one line.

    Args:
        method: Name of the method.
        t: Where the solve stood.
        step: Size of the step it was about to take; None before the first one.
        evaluations: Evaluations so far.
        atol: Absolute local error bound.
        rtol: Relative local error bound.
        reason: What went wrong.
    """
    size = "not yet chosen" if step is None else f"{step:.3g}"
    return (
        f"The solve with {method} failed at t = {t:.6g} (step size {size}, {evaluations} evaluations, "
        f"atol {atol:g}, rtol {rtol:g}): {first_line(reason)}. {_advice(reason)}"
    )


def first_line(text: str) -> str:
    """Return the first line of a text, shortened, without a full stop."""
    return (text.splitlines() or ["unknown reason"])[0][:160].rstrip(".")


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Raise ConfigError, with the closest choice, where a value is none of the choices."""
    if value not in choices:
        closest = (difflib.get_close_matches(value, choices, n=1) or choices)[0]
        typed = f"{option}.{closest}=..." if option == "solver.options" else f"{option}={closest}"
        raise ConfigError(f"Expected {option} to be one of {', '.join(choices)}, got {value}. Type {typed}.")


def _advice(reason: str) -> str:
    if "start is not finite" in reason:
        return "Look for NaN or infinities in the data, or lower optimiser.lr if they come from the parameters."
    if "max_num_steps" in reason:
        return "Raise solver.options.max_num_steps, loosen solver.atol and solver.rtol, or lower optimiser.lr."
    return (
        "The field is stiff or has exploded: lower optimiser.lr, type trainer.gradient_clip_val=1, use a smooth "
        "activation (tanh, softplus), or loosen solver.atol and solver.rtol."
    )
