"""What all LightningModules share: random numbers by step, schedules, failures of the adjoint."""

from unittest.mock import PropertyMock, patch

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from cnf_lab.errors import SolverError
from cnf_lab.fields import Concat, Mlp, Tanh
from cnf_lab.flows import Chain, ContinuousFlow, Flow, StandardNormal
from cnf_lab.models import DensityModule
from cnf_lab.objectives import Likelihood
from cnf_lab.ode import RungeKuttaSolver
from cnf_lab.trace import Exact
from cnf_lab.training.command import config_folder


def module(seed: int = 0) -> DensityModule:
    flow = Flow(
        Chain([ContinuousFlow(Mlp((2,), [3], Concat, Tanh), RungeKuttaSolver("dopri5"), Exact())]),
        StandardNormal((2,)),
    )
    parts = {"flow": flow, "objective": Likelihood(), "optimiser": torch.optim.Adam, "schedule": None}
    return DensityModule(**parts, seed=seed, rebuild={"event_shape": [2]})


def first_draw(seed: int = 0, stage: str = "train", rank: int = 0, epoch: int = 0, step: int = 0) -> float:
    places = {"global_rank": rank, "current_epoch": epoch}
    with patch.multiple(DensityModule, **{name: PropertyMock(return_value=value) for name, value in places.items()}):
        return float(torch.rand((), generator=module(seed).step_generator(stage, step)))


def test_random_numbers_of_a_step_depend_on_where_it_is_and_on_nothing_else() -> None:
    base = first_draw()
    torch.rand(100)  # the global stream has moved
    assert first_draw() == base
    others = [
        first_draw(seed=1),
        first_draw(rank=1),
        first_draw(epoch=1),
        first_draw(step=1),
        first_draw(stage="val"),
        first_draw(stage="test"),
    ]
    assert len({base, *others}) == 7


def test_validation_draws_the_same_numbers_in_every_epoch() -> None:
    assert first_draw(stage="val", epoch=0) == first_draw(stage="val", epoch=5)


class FailingBackward(torch.autograd.Function):
    """A number whose gradient fails as torchdiffeq's adjoint does."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        raise AssertionError("underflow in dt 0.0")


def test_failed_backward_solve_is_a_solver_error() -> None:
    loss = FailingBackward.apply(torch.ones((), requires_grad=True))
    with pytest.raises(
        SolverError, match=r"backward solve of the adjoint failed: underflow in dt 0.0.*gradient=direct"
    ):
        module().backward(loss)


def test_every_trainer_leaves_autograd_on_in_evaluation() -> None:
    for path in (config_folder() / "trainer").glob("*.yaml"):
        config = OmegaConf.load(path)
        assert config.get("inference_mode", "inherited") in (False, "inherited"), path
    auto = OmegaConf.load(config_folder() / "trainer" / "auto.yaml")
    assert auto.inference_mode is False
    assert auto.use_distributed_sampler is False
