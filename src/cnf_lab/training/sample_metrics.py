"""Samples of a restored model against held-out rows, and training rows in the place of samples beside them."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.data import Rows
from cnf_lab.errors import ConfigError, DataError
from cnf_lab.flows import Flow
from cnf_lab.metrics.samples import METRICS, SampleMetrics
from cnf_lab.training.command import check_number
from cnf_lab.training.pictures import to_pixels

log = logging.getLogger("cnf_lab")
NORMALISERS = ("none", "standard_deviation", "range")
USUAL_ROWS = 1000
#: Options that are numbers: kind, least value, a value to type, and whether null is admitted.
NUMBERS = (
    ("n_reference", int, 2, "1000", True),
    ("n_generated", int, 2, "1000", True),
    ("cloud_size", int, 1, "100", False),
    ("projections", int, 1, "1000", False),
    ("sinkhorn_above", int, 1, "5000", False),
    ("sinkhorn_regularisation", float, 0, "0.01", False),
    ("oracle_repeats", int, 1, "3", False),
    ("seed", int, 0, "0", False),
    ("memory", float, 0, "0.5", False),
)


def check_samples(config: DictConfig) -> None:
    """Check the options of the sample metrics, where they are asked for.

    Args:
        config: The composed configuration of ``evaluate.yaml``.

    Raises:
        ConfigError: If one of them is wrong.
    """
    if not isinstance(config.samples, bool):
        raise ConfigError(f"Expected samples to be true or false, got {config.samples}. Type samples=true.")
    if not config.samples:
        return
    for name, kind, least, typed, optional in NUMBERS:
        check_number(config, f"sample_metrics.{name}", kind, least, typed, optional)
    options = config.sample_metrics
    if config.split == "train" and config.data is None:
        raise ConfigError(
            "Expected a split that was not trained on for samples=true, for training rows are the oracle, got train. "
            "Type split=test."
        )
    _check_choice("squared", options.squared, (None, True, False), "null")
    _check_choice("normaliser", options.normaliser, (None, *NORMALISERS), "null")
    for name in _metrics(options):
        _check_choice("metrics", name, METRICS, "all")
    for ratio in _listed(options.bandwidths) or [None]:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
            raise ConfigError(
                f"Expected sample_metrics.bandwidths to be numbers above 0, got {options.bandwidths}. "
                "Type sample_metrics.bandwidths=[0.5,1,2]."
            )


def sample_findings(
    model: Flow | VariationalAutoencoder, reference: Rows, training: Rows, options: DictConfig, batch_size: int
) -> list[dict[str, Any]]:
    """Draw samples and compare them, and training rows in their place, with rows that were not trained on.

    Samples of a conditional density are drawn given the contexts of the reference rows. Pixels are
    divided by L - 1, to lie in [0, 1], before anything else.

    Args:
        model: The model, with the solver by which it samples.
        reference: Rows that were not trained on.
        training: Rows that were.
        options: The node ``sample_metrics`` of ``evaluate.yaml``, checked by :func:`check_samples`.
        batch_size: Samples per solve.

    Returns:
        One row per figure: ``metric``, ``distance``, ``value``; the ``oracle``, its mean over
        ``oracle_repeats`` choices of training rows, with the standard deviation of one choice
        (``oracle_deviation``) and the standard error of the mean; and what all of them depend on.
    """
    counts = _count(options, len(reference), len(training))
    x, context = _read(reference, next(_choices(len(reference), counts["n_reference"], 1, options.seed)))
    device = (model.prior if isinstance(model, VariationalAutoencoder) else model.base).sample(0).device
    generator = torch.Generator(device).manual_seed(options.seed)
    if context is not None:
        context = context[torch.arange(counts["n_generated"]) % len(context)]
    drawn = torch.from_numpy(draw(model, counts["n_generated"], context, batch_size, 1.0, generator))

    pixels = model.likelihood if isinstance(model, VariationalAutoencoder) else model.dequantiser
    levels = None if pixels is None else pixels.levels
    x = _as_rows(x, levels).to(device)
    normaliser = options.normaliser or ("standard_deviation" if levels is None else "none")
    scale = _scale(x, normaliser)
    compared = SampleMetrics(
        x / scale,
        _metrics(options),
        options.cloud_size,
        options.squared,
        tuple(map(float, _listed(options.bandwidths))),
        options.projections,
        options.sinkhorn_above,
        float(options.sinkhorn_regularisation),
        options.seed,
        float(options.memory),
    )
    log.info("sample metrics: %s samples against %s rows", f"{len(drawn):,}", f"{len(x):,}")
    found = compared.measure(_finite(_as_rows(drawn, levels)).to(device) / scale)
    # Another seed than that of the reference rows, which may lie in the same order in another file.
    choices = _choices(len(training), counts["n_generated"], options.oracle_repeats, options.seed + 1)
    oracles = [
        compared.measure(_as_rows(_read(training, chosen)[0], levels).to(device) / scale)
        for chosen in tqdm(choices, total=options.oracle_repeats, desc="oracle", leave=False, disable=None)
    ]
    told = {"normaliser": normaliser, "pixels": None if levels is None else "[0, 1]", "seed": options.seed}
    return [
        {**row, **_oracle([repeat["value"] for repeat in repeats]), **told}
        for row, *repeats in zip(found, *oracles, strict=True)
    ]


def draw(
    flow: Flow | VariationalAutoencoder,
    n: int,
    context: Tensor | None,
    batch_size: int,
    temperature: float,
    generator: torch.Generator,
) -> np.ndarray:
    """Draw n rows in batches.

    Args:
        flow: The model.
        n: Number of rows.
        context: Conditioning, a row for each or one for all; None for a density without one.
        batch_size: Rows per solve.
        temperature: Deviation of the latents.
        generator: Source of the latents, on the device of the model.
    """
    parts = []
    for start in tqdm(range(0, n, batch_size), unit="batch", disable=None):
        count = min(batch_size, n - start)
        shared = context if context is None or len(context) == 1 else context[start : start + count]
        given = None if shared is None else shared.to(generator.device)
        if isinstance(flow, VariationalAutoencoder):
            parts.append(flow.sample(count, generator, temperature).cpu())
        else:
            parts.append(flow.sample(count, given, generator, temperature).cpu())
    return torch.cat(parts).numpy()


def report_samples(rows: Sequence[dict[str, Any]]) -> None:
    """Log one table of metric, value and oracle.

    Args:
        rows: What :func:`sample_findings` returned.
    """
    cells = [("metric", "distance", "samples", "training rows", "points", "reference")]
    for row in rows:
        spread = f" ± {row['oracle_deviation']:.1g}" if row["oracle_deviation"] is not None else ""
        squared = " squared" if row["squared"] and row["metric"] != "kernel_mmd" else ""
        points = f"{row['n_generated']:,}" + (f" in clouds of {row['cloud_size']:,}" if row["cloud_size"] > 1 else "")
        distance = row["distance"] + squared + (", Sinkhorn" if "sinkhorn" in row.get("solved", "") else "")
        figures = (f"{row['value']:.4g}", f"{row['oracle']:.4g}{spread}", points, f"{row['n_reference']:,}")
        cells.append((row["metric"].replace("_", " "), distance, *figures))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        log.info("%s", "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    log.info("normaliser %s, seed %d; the nearer to the training rows' figure the better", *_told(rows))


def _told(rows: Sequence[dict[str, Any]]) -> tuple[str, int]:
    return rows[0]["normaliser"], rows[0]["seed"]


def _check_choice(name: str, value: Any, choices: Sequence[Any], typed: str) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        words = ", ".join("null" if choice is None else str(choice).lower() for choice in choices)
        raise ConfigError(
            f"Expected sample_metrics.{name} to be one of {words}, got {value}. Type sample_metrics.{name}={typed}."
        )


def _listed(value: Any) -> list[Any]:
    return list(value) if OmegaConf.is_list(value) else [value]


def _metrics(options: DictConfig) -> tuple[str, ...]:
    named = _listed(options.metrics)
    return METRICS if named == ["all"] or not named else tuple(named)


def _count(options: DictConfig, reference: int, training: int) -> dict[str, int]:
    # What is left open is as much as there is of everything, up to the usual number.
    n_reference = options.n_reference or min(USUAL_ROWS, reference, training)
    n_generated = options.n_generated or n_reference
    for name, count, least, most, whose in (
        ("n_reference", n_reference, options.cloud_size, reference, "rows of the split"),
        ("n_generated", n_generated, options.cloud_size, training, "training rows of the oracle"),
    ):
        if count > most:
            raise ConfigError(
                f"Expected sample_metrics.{name} of at most {most:,}, the {whose}, got {count:,}. "
                f"Type sample_metrics.{name}={most}."
            )
        if count < max(2, least):
            raise ConfigError(
                f"Expected sample_metrics.cloud_size to leave a cloud of the {count:,} rows, "
                f"got {options.cloud_size:,}. Type sample_metrics.cloud_size=1."
            )
    return {"n_reference": n_reference, "n_generated": n_generated}


def _choices(rows: int, count: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
    # Apart from each other where there are rows enough, so that the spread of repeats is an honest one.
    rng = np.random.default_rng(seed)
    if repeats * count <= rows:
        yield from np.split(rng.choice(rows, repeats * count, replace=False), repeats)
    else:
        for _ in range(repeats):
            yield rng.choice(rows, count, replace=False)


def _read(rows: Rows, chosen: np.ndarray) -> tuple[Tensor, Tensor | None]:
    # In the order of the file, which may be large, and then as they were drawn: clouds are runs of rows.
    order = np.argsort(chosen)
    batch = rows.__getitems__(chosen[order].tolist())
    back = torch.from_numpy(np.argsort(order))
    return batch.x[back], None if batch.context is None else batch.context[back]


def _as_rows(x: Tensor, levels: int | None) -> Tensor:
    if levels is not None:
        x = torch.from_numpy(to_pixels(x, levels).astype(np.float64)) / (levels - 1)
    return x.flatten(1).double()


def _scale(x: Tensor, normaliser: str) -> Tensor:
    if normaliser == "none":
        return x.new_ones(x.shape[1])
    scale = x.std(dim=0) if normaliser == "standard_deviation" else x.amax(dim=0) - x.amin(dim=0)
    return torch.where(scale > 0, scale, 1.0)  # a constant feature is left as it is


def _finite(x: Tensor) -> Tensor:
    wrong = int((~x.isfinite().all(dim=1)).sum())
    if wrong:
        raise DataError(
            f"Expected finite samples, got {wrong:,} of {len(x):,} that are not. "
            "Train for longer, or type samples=false."
        )
    return x


def _oracle(values: list[float]) -> dict[str, Any]:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {
        "oracle": float(np.mean(values)),
        "oracle_deviation": deviation,
        "oracle_standard_error": None if deviation is None else deviation / math.sqrt(len(values)),
        "oracle_repeats": len(values),
    }
