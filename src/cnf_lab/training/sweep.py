"""One table over the jobs of a multirun."""

import csv
import json
from pathlib import Path
from typing import Any, ClassVar

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
LIKELIHOODS = [column for column in COLUMNS if column.startswith("val/")]
#: A job's word that it left the run in its folder alone; read and removed at the end of the multirun.
REFUSED = "REFUSED"


class SweepSummary(Callback):
    """Prints a table of the jobs after a multirun and writes it as ``summary.csv``; lists those that are not done.

    It goes by the job folders: whatever launched a job, and however it ended, they tell.
    """

    #: Reason by job that is not done, of the last multirun of this process; the command ends with an error for them.
    missing: ClassVar[dict[str, str]] = {}

    @classmethod
    def missing_in_a_line(cls) -> str:
        """Return how many jobs are not done, and why the first one is not."""
        job, reason = next(iter(cls.missing.items()))
        count = "1 job is not done" if len(cls.missing) == 1 else f"{len(cls.missing)} jobs are not done; the first one"
        return f"{count}: {job}: {reason}"

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect metrics.json, or the failure, of every job folder."""
        folder = Path(config.hydra.sweep.dir)
        jobs = sorted((path.parent.parent for path in folder.glob("*/.hydra/overrides.yaml")), key=_job_number)
        self.missing.clear()
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
            status = {job.name: row["status"] for job, row in zip(jobs, rows, strict=True)}
            self.missing.update({job: reason for job, reason in status.items() if reason != "done"})
            if self.missing:
                print("\nNot done:")
                for job, reason in self.missing.items():
                    print(f"  {job}: {reason}")
                print(
                    f"The same command with hydra.sweep.dir={folder} skip_done=true runs failed and killed jobs again."
                )


def _job_number(folder: Path) -> int:
    number = folder.name.split("_")[0]
    return int(number) if number.isdigit() else 0


def _row(job: Path, overrides: str) -> dict[str, str]:
    try:
        metrics = json.loads((job / "metrics.json").read_text())
    except (OSError, ValueError):  # not there, or damaged
        metrics = {}
    row = {"job": str(_job_number(job)), "overrides": overrides}
    row |= {column: _number(metrics.get(column)) for column in COLUMNS}
    row["status"] = _status(job, metrics)
    return row


def _status(job: Path, metrics: dict[str, Any]) -> str:
    for mark in (REFUSED, "FAILED"):
        if (job / mark).is_file():
            reason = " ".join((job / mark).read_text().split()) or f"{mark} is empty"
            (job / REFUSED).unlink(missing_ok=True)
            return reason
    if not metrics:
        return "killed: neither metrics.json nor FAILED"
    return (
        "done" if any(metrics.get(column) is not None for column in LIKELIHOODS) else "diverged: no finite likelihood"
    )


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
