"""What all tests share: seeds, one thread, and the reference numbers."""

import re
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from torch import Tensor, nn

from cnf_lab.training.command import config_folder

torch.set_num_threads(1)
hypothesis.settings.register_profile("cnf_lab", deadline=None, derandomize=True, max_examples=20)
hypothesis.settings.load_profile("cnf_lab")

# Parameter names of the original, and ours.
NAMES = {
    r"_layer0/": "start.",
    r"_layer1/": "end.",
    r"_layer/": "linear.",
    r"_hyper_bias/": "time_shift.",
    r"(_hyper_gate|_hyper)/": "time_gate.",
    r"_hypernet/": "network.",
    r"/": ".",
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Tensor]]:
    """Read one file of the reference numbers."""

    def read(name: str) -> dict[str, Tensor]:
        with np.load(Path(__file__).parent / "reference" / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays}

    return read


@pytest.fixture(scope="session")
def load_original() -> Callable[[nn.Module, dict[str, Tensor], str], nn.Module]:
    """Make a module float64 and give it the original's weights below a prefix."""

    def load(module: nn.Module, case: dict[str, Tensor], prefix: str = "w/") -> nn.Module:
        state = {key.removeprefix(prefix): value for key, value in case.items() if key.startswith(prefix)}
        for theirs, ours in NAMES.items():
            state = {re.sub(theirs, ours, key): value for key, value in state.items()}
        module.double().load_state_dict(state)
        return module

    return load


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Make a module float64 with normal weights, also where a layer starts at zero."""

    def fill(module: nn.Module, scale: float = 0.5) -> nn.Module:
        for parameter in module.double().parameters():
            nn.init.normal_(parameter, std=scale)
        return module

    return fill


@pytest.fixture
def lab_config(tmp_path: Path) -> Callable[..., DictConfig]:
    """Compose a command's configuration for a run in the test's own folder, without loggers."""

    def composed(*overrides: str, command: str = "train", run: Path | None = None) -> DictConfig:
        fixed = [f"paths.run={run or tmp_path / 'run'}", "logger=none"] if command == "train" else []
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return compose(command, [*fixed, *overrides])

    return composed
