"""What all tests share: seeds, one thread, the reference numbers, and an autoencoder whose likelihood is known."""

import math
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

from cnf_lab.autoencoders import PixelLikelihood, Posterior, VariationalAutoencoder, no_flow
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


class GaussianPixels(PixelLikelihood):
    """N(x; decoder's output, s²): with linear maps everything is Gaussian."""

    levels, outputs, deviation = 2, 1, 0.7

    def log_prob(self, parameters, x):
        error = (x - parameters.squeeze(1)).flatten(1) / self.deviation
        constant = math.log(self.deviation * math.sqrt(2 * math.pi))
        return (-0.5 * error.square() - constant).sum(dim=1)

    def mean(self, parameters):
        return parameters.squeeze(1)

    def sample(self, parameters, generator=None):
        return self.mean(parameters) + self.deviation * torch.randn(parameters.squeeze(1).shape, generator=generator)


class LinearEncoder(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1))


class LinearDecoder(nn.Linear):
    def forward(self, z):
        return super().forward(z).reshape(-1, 1, 1, 1, 5)


class LinearGaussian(VariationalAutoencoder):
    """An autoencoder of 5 pixels whose marginal likelihood is that of a Gaussian."""

    def truth(self, x: Tensor) -> Tensor:
        """Return log p(x) = log N(x; b, W W' + s²)."""
        weight, bias = self.decoder.weight, self.decoder.bias
        covariance = weight @ weight.mT + self.likelihood.deviation**2 * torch.eye(5, dtype=weight.dtype)
        return torch.distributions.MultivariateNormal(bias, covariance).log_prob(x.flatten(1))


@pytest.fixture(scope="session")
def linear_gaussian() -> Callable[..., LinearGaussian]:
    """Make a linear Gaussian autoencoder with a posterior, float64 and in evaluation mode."""

    def make(posterior: Callable[..., nn.Module] = no_flow, latent: int = 2) -> LinearGaussian:
        torch.manual_seed(3)
        own = Posterior(4, latent, posterior(dimension=latent, context_features=4))
        parts = (LinearEncoder(5, 4), own, LinearDecoder(latent, 5), GaussianPixels(), latent)
        model = LinearGaussian((1, 1, 5), *parts).double()
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, std=0.15 if name.startswith("posterior") else 0.4)
        # Wider than the true posterior, so that importance weights have a variance.
        nn.init.constant_(model.posterior.variance.bias, 1.0)
        return model.eval()

    return make
