"""One table over the jobs of a multirun."""

import csv
import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

COLUMNS = (
    "val/negative_elbo",
    "test/negative_elbo",
    "test/negative_elbo_standard_error",
    "test/reconstruction",
    "test/kl",
    "val/bits_per_dim",
    "test/bits_per_dim",
    "test/bits_per_dim_standard_error",
    "val/nll",
    "test/nll",
    "test/nll_standard_error",
    "nfe/forward",
    "nfe/backward",
    "time/step_seconds",
)


class SweepSummary(Callback):
    """Prints a table of the jobs after a multirun and writes it as ``summary.csv``."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect metrics.json, or the failure, of every job folder."""
        folder = Path(config.hydra.sweep.dir)
        jobs = sorted((path.parent.parent for path in folder.glob("*/.hydra/overrides.yaml")), key=_job_number)
        if jobs:
            overrides = [list(map(str, OmegaConf.load(job / ".hydra" / "overrides.yaml"))) for job in jobs]
            common = [item for item in overrides[0] if all(item in others for others in overrides)]
            rows = _filled(
                [
                    _row(job, " ".join(item for item in own if item not in common))
                    for job, own in zip(jobs, overrides, strict=True)
                ]
            )
            with (folder / "summary.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            print(f"\n{len(jobs)} jobs in {folder}, all with {' '.join(common) or 'the defaults'}\n{_table(rows)}")


def _job_number(folder: Path) -> int:
    number = folder.name.split("_")[0]
    return int(number) if number.isdigit() else 0


def _row(job: Path, overrides: str) -> dict[str, str]:
    metrics = json.loads((job / "metrics.json").read_text()) if (job / "metrics.json").is_file() else {}
    failure = job / "FAILED"
    row = {"job": str(_job_number(job)), "overrides": overrides}
    row |= {column: _number(metrics.get(column)) for column in COLUMNS}
    row["status"] = " ".join(failure.read_text().split()) if failure.is_file() else "done" if metrics else "unfinished"
    return row


def _filled(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Leave out the metrics that no job has: nothing but images has bits/dim, say."""
    empty = {column for column in COLUMNS if not any(row[column] for row in rows)}
    return [{name: text for name, text in row.items() if name not in empty} for row in rows]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 0.1 else f"{value:.4f}"


def _table(rows: list[dict[str, str]]) -> str:
    shown = [dict(row, status=row["status"][:60]) for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in shown)) for name in shown[0]}
    lines = [[name.ljust(widths[name]) for name in widths]]
    lines += [[row[name].ljust(widths[name]) for name in widths] for row in shown]
    return "\n".join("  ".join(line).rstrip() for line in lines)
