"""Schedules of the learning rate."""

import pytest
import torch

from cnf_lab.errors import ConfigError
from cnf_lab.training.schedules import cosine, drop


def rates(epochs: int, steps: int, floor: float = 0.0) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = cosine(optimizer, epochs, floor)
    values = []
    for _ in range(steps):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return values


def test_cosine_falls_to_the_floor_and_stays() -> None:
    assert rates(4, 7) == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0, 0.0, 0.0])
    assert rates(2, 4, floor=0.1) == pytest.approx([2.0, 1.1, 0.2, 0.2])


def test_a_resumed_schedule_takes_the_new_length() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    longer = cosine(optimizer, 8)
    longer.load_state_dict(cosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), 4).state_dict())
    for _ in range(4):
        optimizer.step()
        longer.step()
    assert longer.get_last_lr()[0] == pytest.approx(0.5)


def test_endless_training_has_no_cosine() -> None:
    with pytest.raises(ConfigError, match="trainer.max_epochs of at least 1 with schedule=cosine, got -1"):
        rates(-1, 1)


def test_drop_rises_and_falls_at_its_epochs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule, values = drop(optimizer, [4, 6], factor=0.1, lr_warmup=3), []
    for _ in range(8):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert values == pytest.approx([0.5, 1.0, 1.5, 2.0, 0.2, 0.2, 0.02, 0.02])


@pytest.mark.parametrize(("at", "factor"), [([0], 0.1), ([4], 0.0), ([4], 2.0)])
def test_drops_out_of_range(at: list[int], factor: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ConfigError, match=r"schedule\.factor in \(0, 1\] and schedule\.at"):
        drop(optimizer, at, factor)
