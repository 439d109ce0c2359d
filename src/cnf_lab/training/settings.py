"""How an evaluation computes: solver, tolerance, precision, divergence and draws, given or chosen by the model."""

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from omegaconf import DictConfig

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.errors import ConfigError
from cnf_lab.flows import Flow, continuous_blocks
from cnf_lab.ode import OdeSolver
from cnf_lab.trace import DivergenceEstimator, Exact, Hutchinson, Rademacher
from cnf_lab.training.run import converged_solver

AnyModel: TypeAlias = Flow | VariationalAutoencoder
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
DIVERGENCES = ("exact", "hutchinson")
MANY = 256  # entries of an image above which divergence=auto goes by probes
LOOSEST_CHECK = 1e-6  # a hundredth of a coarse tolerance is none to check by
FINEST, FINEST_CHECK = 1e-12, 1e-13  # tolerances beyond which float64 has nothing to give
#: What converge=true goes up to.
MOST_PROBES, MOST_DRAWS = 256, 1000


@dataclass(frozen=True)
class Settings:
    """How a likelihood is computed.

    Attributes:
        method: Adaptive method of the solver.
        atol: Absolute local error bound.
        rtol: Relative local error bound.
        precision: float64 or float32.
        divergence: exact or hutchinson.
        probes: Probes per row of the latter.
        draws: Draws of dequantisation noise, or of the posterior, per row.
        memory: GiB of a pass of the exact divergence, where it has no closed form.
        chunk: Tangents of a pass; None takes what the memory holds.
    """

    method: str
    atol: float
    rtol: float
    precision: str
    divergence: str
    probes: int
    draws: int
    memory: float = 1.0
    chunk: int | None = None

    @property
    def exact(self) -> bool:
        """Whether divergences are exact."""
        return self.divergence == "exact"

    def solver(self) -> OdeSolver:
        """Return the solver."""
        return converged_solver(self.method, self.atol, self.rtol)

    def estimator(self) -> DivergenceEstimator:
        """Return the divergence estimator."""
        return Exact(self.memory, self.chunk) if self.exact else Hutchinson(Rademacher(), self.probes)

    def apply(self, model: AnyModel) -> None:
        """Make a model compute in this way; what its float32 weights are is not lost by float64.

        Args:
            model: The model, in evaluation mode.
        """
        model.to(PRECISIONS[self.precision])
        model.set_evaluation(self.solver(), self.estimator())

    def tight(self) -> "Settings":
        """Return what a check computes with: float64, at a hundredth of the tolerance and no more than 1e-6."""
        atol, rtol = (max(FINEST_CHECK, min(bound / 100, LOOSEST_CHECK)) for bound in (self.atol, self.rtol))
        return replace(self, atol=atol, rtol=rtol, precision="float64")

    def exactly(self) -> "Settings":
        """Return the same with exact divergences."""
        return replace(self, divergence="exact")

    def tightened(self, excess: dict[str, float], tangents: int) -> "Settings | None":
        """Return settings that bring sources of an error down, or None where there are none.

        Args:
            excess: By how much each source is too large: solver, probes, draws.
            tangents: Tangents of the exact divergence, which takes the place of as many probes, or of too many.
        """
        better = self
        excess = {source: ratio for source, ratio in excess.items() if math.isfinite(ratio)}
        if excess.get("solver", 0) > 1:
            # The error of a mean falls about as the tolerance does; one digit beyond, for certainty.
            factor = 10 ** -math.ceil(math.log10(excess["solver"]) + 0.5)
            atol, rtol = (max(bound * factor, FINEST) for bound in (self.atol, self.rtol))
            better = replace(better, atol=atol, rtol=rtol, precision="float64")
        if excess.get("probes", 0) > 1:
            probes = math.ceil(1.2 * self.probes * excess["probes"] ** 2)
            exactly = probes >= min(tangents, MOST_PROBES)
            better = replace(better, divergence="exact") if exactly else replace(better, probes=max(2, probes))
        if excess.get("draws", 0) > 1:
            better = replace(better, draws=min(MOST_DRAWS, math.ceil(1.2 * self.draws * excess["draws"] ** 2)))
        return better if better != self else None

    def described(self) -> str:
        """Say it in some words."""
        probes = "exact divergence" if self.exact else f"{self.probes} probes"
        return f"atol {self.atol:g}, rtol {self.rtol:g}, {self.precision}, {probes}, draws {self.draws}"


def chosen(config: DictConfig, model: AnyModel) -> Settings:
    """Return the settings, with what is left open decided by what is modelled.

    Args:
        config: The composed configuration of ``evaluate.yaml``.
        model: The model.

    Raises:
        ConfigError: If an option is none of its choices, or a tolerance too fine.
    """
    images = is_of_images(model)
    precision = config.precision or ("float32" if images else "float64")
    if precision not in PRECISIONS:
        raise ConfigError(f"Expected precision float64 or float32, got {precision}. Type precision=float64.")
    if config.divergence not in (*DIVERGENCES, "auto"):
        raise ConfigError(
            f"Expected divergence to be auto, exact or hutchinson, got {config.divergence}. Type divergence=auto."
        )
    fields = [block.field for block in continuous_blocks(model)]
    large = images and any(math.prod(field.event_shape) > MANY and not field.has_closed_form for field in fields)
    usual = 1e-5 if images else 1e-7
    settings = Settings(
        config.method,
        float(config.atol or usual),
        float(config.rtol or usual),
        precision,
        config.divergence if config.divergence != "auto" else "hutchinson" if large else "exact",
        config.probes,
        config.draws,
        float(config.memory),
        config.chunk,
    )
    for name, bound in (("atol", settings.atol), ("rtol", settings.rtol)):
        if bound < FINEST:
            raise ConfigError(
                f"Expected {name} of at least {FINEST:g}, the finest that float64 can hold, got {bound:g}. "
                f"Type {name}=1e-9."
            )
    settings.solver()  # which refuses a method without error control
    return settings


def is_of_images(model: AnyModel) -> bool:
    """Whether a model is one of pixels."""
    return isinstance(model, VariationalAutoencoder) or model.dequantiser is not None


def tangents(model: AnyModel) -> int:
    """Return the most tangents that an exact divergence of a model takes; 1 for closed forms."""
    fields = [block.field for block in continuous_blocks(model)]
    return max((1 if field.has_closed_form else field.divergence_tangents for field in fields), default=1)
