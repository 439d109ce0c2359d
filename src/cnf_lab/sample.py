"""Sample from a run: ``python -m cnf_lab.sample run=outputs/density/8gaussians/... n=10000``.

Of an image flow the file holds pixels, whole numbers (n, channels, height, width).
"""

import logging
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.data.custom import read_rows
from cnf_lab.errors import ConfigError
from cnf_lab.flows import Flow
from cnf_lab.trace import Exact
from cnf_lab.training.command import check_number, run_command
from cnf_lab.training.pictures import save_grid, to_pixels
from cnf_lab.training.plots import sample_plot
from cnf_lab.training.run import choose_device, converged_solver, require_run, restore_flow, run_folder
from cnf_lab.training.sample_metrics import draw

log = logging.getLogger("cnf_lab")
NUMBERS = (
    ("n", int, 1, "1000", False),
    ("batch_size", int, 1, "10000", True),
    ("seed", int, 0, "0", False),
    ("temperature", float, 0, "0.7", False),
    ("atol", float, 0, "1e-6", True),
    ("rtol", float, 0, "1e-6", True),
)
GRID = 100  # images in the picture


def sample(config: DictConfig) -> None:
    """Draw rows from a trained density and write them, with a picture where they can be plotted.

    Args:
        config: The composed configuration of ``sample.yaml``.
    """
    for name, kind, least, typed, optional in NUMBERS:
        check_number(config, name, kind, least, typed, optional)
    run = require_run(config.run)
    flow, rebuild = restore_flow(run)
    pixels = flow.likelihood if isinstance(flow, VariationalAutoencoder) else flow.dequantiser
    levels = None if pixels is None else pixels.levels
    usual = (1e-6, 10000, torch.float64) if levels is None else (1e-5, 500, torch.float32)
    tolerance, batch_size, precision = usual
    path = Path(config.output) if config.output else run_folder(run) / "samples" / f"samples_seed_{config.seed}.npy"
    suffixes = (".npy", ".csv") if levels is None else (".npy",)
    if path.suffix not in suffixes:
        raise ConfigError(
            f"Expected output to end in {' or '.join(suffixes)}, got {path}. Type output={path.with_suffix('.npy')}."
        )
    device = choose_device(config.device)
    flow.set_evaluation(converged_solver(config.method, config.atol or tolerance, config.rtol or tolerance), Exact())
    flow.to(device, precision)

    context = open_context(config, flow, rebuild["data"]["context_names"])
    generator = torch.Generator(device).manual_seed(config.seed)
    samples = draw(flow, config.n, context, config.batch_size or batch_size, config.temperature, generator)

    path.parent.mkdir(parents=True, exist_ok=True)
    names = rebuild["data"]["column_names"]
    if levels is not None:
        samples = to_pixels(samples, levels)
    if path.suffix == ".npy":
        np.save(path, samples)
    else:
        header = ",".join(names or (f"x{number}" for number in range(samples.shape[1])))
        np.savetxt(path, samples, delimiter=",", header=header, comments="", fmt="%.9g")
    log.info("%s %s: %s", f"{len(samples):,}", "rows" if levels is None else "images", path)
    if config.plot:
        picture = path.with_suffix(".png")
        if levels is None:
            sample_plot(samples, names=names).savefig(picture)
        else:
            save_grid(picture, samples[:GRID], levels)
        log.info("picture: %s", picture)


def open_context(config: DictConfig, flow: Flow | VariationalAutoencoder, names: list[str] | None) -> Tensor | None:
    """Return the context of every sample (n or 1, features), or None for a density without one."""
    given = config.context
    if isinstance(flow, VariationalAutoencoder) or not flow.context_features:
        if given is not None:
            raise ConfigError("Expected no context for this density, which has none. Leave out context=....")
        return None
    wanted = f"context=[{','.join('0' * flow.context_features)}] or a file with {config.n} rows"
    if given is None:
        raise ConfigError(f"Expected a context, for this density is conditional, got none. Type {wanted}.")
    if isinstance(given, str):
        rows = read_rows(given, flow.context_features, names)
        context = rows.__getitems__(range(len(rows))).x
    else:
        row = list(given) if OmegaConf.is_list(given) else [given]
        if not all(isinstance(value, int | float) for value in row):
            raise ConfigError(f"Expected a context of numbers, got {row}. Type {wanted}.")
        context = torch.tensor([row], dtype=torch.float64)
    if context.shape[1:] != (flow.context_features,) or len(context) not in (1, config.n):
        raise ConfigError(
            f"Expected a context of {flow.context_features} columns and 1 or {config.n} rows, "
            f"got shape {tuple(context.shape)}. Type {wanted}."
        )
    return context


def main() -> None:
    """Run the command."""
    run_command(sample, "sample")


if __name__ == "__main__":
    main()
