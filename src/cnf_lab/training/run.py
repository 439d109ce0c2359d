"""The run folder: what is written there, and how a flow comes back from it."""

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.errors import ConfigError, DataError
from cnf_lab.flows import Flow
from cnf_lab.ode import ADAPTIVE, RungeKuttaSolver
from cnf_lab.training.build import build_flow, plain

CHECKPOINTS = ("best.ckpt", "last.ckpt")
PACKAGES = ("cnf_lab", "torch", "pytorch-lightning", "torchdiffeq", "hydra-core", "numpy", "zuko")


def has_checkpoint(folder: str | Path) -> bool:
    """Say whether a run has left a checkpoint in a folder, which another run must not overwrite."""
    return any((Path(folder) / "checkpoints").glob("*.ckpt"))


def save_config(config: DictConfig, folder: Path) -> None:
    """Write the configuration with every interpolation resolved."""
    folder.mkdir(parents=True, exist_ok=True)
    if config.resume is not None:  # what the next resumption starts from
        again = config.copy()
        again.resume = None
        (folder / ".hydra").mkdir(exist_ok=True)
        _replace(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(again))
    _replace(folder / "config_resolved.yaml", yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def _replace(path: Path, text: str) -> None:
    # At once: a kill leaves no half of it, and the processes of a job write and read the same files.
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    whole.write_text(text)
    whole.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file; numbers that are not finite become null, which every reader takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n")


def environment() -> dict[str, Any]:
    """Return what a number depends on besides data and configuration."""
    return {
        "command": _command(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "git": _git_state(),
    }


def require_run(run: Any) -> Path:
    """Return the path of ``run=``, or say that it is missing."""
    if not run:
        raise ConfigError(
            "Expected a run folder or a checkpoint file, got none. Type run=outputs/<model>/<data set>/<time>."
        )
    return Path(str(run))


def run_folder(path: Path) -> Path:
    """Return the run folder of a run folder or of one of its checkpoints."""
    return find_checkpoint(path).parent.parent if path.is_dir() or path.parent.name == "checkpoints" else path.parent


def choose_device(name: str) -> torch.device:
    """Return the device of an option ``device``.

    Args:
        name: auto, cpu or cuda.

    Raises:
        ConfigError: If it is not one of auto, cpu, cuda, or there is no GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(
            f"Expected device to be auto, cpu, or cuda where there is a GPU, got {name}. Type device=auto."
        )
    return torch.device(name)


def converged_solver(method: str, atol: float, rtol: float) -> RungeKuttaSolver:
    """Return an adaptive solver that holds every row to the tolerance.

    Args:
        method: An adaptive method.
        atol: Absolute local error bound.
        rtol: Relative local error bound.

    Raises:
        ConfigError: If the method has no error control.
    """
    if method not in ADAPTIVE:
        raise ConfigError(f"Expected method to be one of {', '.join(ADAPTIVE)}, got {method}. Type method=dopri5.")
    return RungeKuttaSolver(method, atol, rtol, error_norm="example")


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that a run folder or a file stands for: the best, else the last.

    Args:
        path: A run folder or a checkpoint file.

    Raises:
        ConfigError: If there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    for name in CHECKPOINTS:
        if (path / "checkpoints" / name).is_file():
            return path / "checkpoints" / name
    found = "an empty or unfinished run" if path.is_dir() else "no such folder"
    raise ConfigError(
        f"Expected a run folder with checkpoints/best.ckpt or a checkpoint file, got {path} ({found}). "
        "Type run=outputs/<model>/<data set>/<time>."
    )


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of the lab: tensors and plain values only.

    Args:
        path: A run folder or a checkpoint file.

    Raises:
        DataError: If the file is damaged or not one of the lab's.
    """
    file = find_checkpoint(path)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint["hyper_parameters"]["event_shape"]
    except Exception as failure:
        reason = str(failure).partition(".")[0] or type(failure).__name__
        raise DataError(
            f"Expected a checkpoint written by cnf_lab, got {file} ({reason}). Choose another run=..., or train again."
        ) from failure
    return checkpoint


def restore_flow(path: str | Path) -> tuple[Flow | VariationalAutoencoder, dict[str, Any]]:
    """Rebuild a flow, or an autoencoder, from its checkpoint alone.

    Args:
        path: A run folder or a checkpoint file.

    Returns:
        The model in evaluation mode, its parameters frozen, and the plain values it was rebuilt from.
    """
    checkpoint = load_checkpoint(path)
    rebuild = checkpoint["hyper_parameters"]
    flow = build_flow(OmegaConf.create(rebuild["config"]), rebuild["event_shape"], rebuild["context_features"])
    prefix = "flow."
    state = {key[len(prefix) :]: value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)}
    # Not of just any value: fixed layers keep float64 in a flow of float32.
    precision = next((state[name].dtype for name, _ in flow.named_parameters() if name in state), torch.float32)
    load_state(flow.to(precision), state, Path(path))
    return flow.eval().requires_grad_(False), rebuild


def load_state(module: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load weights into a module.

    Args:
        module: The module.
        state: The weights by name.
        path: Where they come from, for the message.

    Raises:
        DataError: If they are not those of the module.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as failure:
        raise DataError(
            f"Expected the weights of this configuration in {path}, got others: "
            f"{' '.join(str(failure).split())[:200]}. Choose another run, or the configuration that made it."
        ) from failure


def check_same_rows(found: dict[str, int], trained: dict[str, int], name: str) -> None:
    """Refuse data whose splits are not those of the training: rows would change sides.

    Args:
        found: Rows of each split now.
        trained: Rows of each split in training.
        name: The data set.

    Raises:
        DataError: If a number of rows differs.
    """
    if found != trained:
        raise DataError(
            f"Expected {name} to have the rows of the training, {trained}, got {found}. "
            "Put the file of the training back; other rows are evaluated with data=<file>."
        )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value


def _command() -> str | None:
    # As Hydra understood it: in a multirun the job's own choices.
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    return f"python -m cnf_lab.{hydra.job.name} {shlex.join(hydra.overrides.task)}".strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> str | None:
    # The state of the checkout that the code lies in, if it is one.
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
