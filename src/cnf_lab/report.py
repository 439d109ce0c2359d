"""A page over runs: ``python -m cnf_lab.report outputs/``; report.html, report.md and report.csv.

It reads what runs have written and loads no model: half-written, failed and damaged runs are told as such.
"""

import os
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from cnf_lab.errors import ConfigError, LabError
from cnf_lab.reporting.collect import collect
from cnf_lab.reporting.page import Limits, write_report

HELP = """cnf_lab.report: one self-contained page, report.html, over all runs and sweeps below some folders,
with report.md and report.csv beside it.

  python -m cnf_lab.report outputs/                    everything
  python -m cnf_lab.report outputs/multirun/A B        several folders
  python -m cnf_lab.report outputs/ output=reports pictures=2

Options: change any with key=value.

  output=<folder>    where to write; the first folder, if not given
  title=<text>       title of the page
  pictures=3         most pictures of a run; 0: none
  runs=1000          most runs on the page, the newest; the other two files have all
  megabytes=4.8      most millions of bytes of the page; pictures shrink and drop out first
"""
KINDS = {"output": str, "title": str, "pictures": int, "runs": int, "megabytes": float}
LEAST = {"pictures": 0, "runs": 1, "megabytes": 0.2}
USUAL = {"pictures": 3, "runs": 1000, "megabytes": 4.8}


def report(arguments: Sequence[str]) -> Path:
    """Write the report and return its page.

    Args:
        arguments: Folders, and options as key=value.

    Raises:
        ConfigError: If there is no such folder, no run, no such option, or no place to write.
    """
    folders, options = parsed(arguments)
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(
                f"Expected a folder of runs, got {folder}, which is none. Type python -m cnf_lab.report outputs/."
            )
    runs, problems = collect(folders)
    if not runs:
        raise ConfigError(
            f"Expected runs below {', '.join(map(str, folders))}, got none. "
            "Train one, or name the folder that holds outputs/<model>/<data set>/<time>."
        )
    output = Path(str(options.get("output", folders[0])))
    limits = Limits(**{name: options.get(name, usual) for name, usual in USUAL.items()})  # type: ignore[arg-type]
    title = str(options.get("title") or f"Runs of {', '.join(folder.resolve().name for folder in folders)}")[:300]
    try:
        page = write_report(runs, problems, output, title, limits, time.time())
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"Expected a folder that can be written, got {output} ({reason}). Type output=<folder>."
        ) from error
    for problem in problems:
        print(f"could not look into {problem}")
    states = [run.status for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(
        f"{len(runs)} runs ({counts}): {page}, {page.stat().st_size / 1e6:.1f} MB; report.md and report.csv beside it"
    )
    return page


def parsed(arguments: Sequence[str]) -> tuple[list[Path], dict[str, str | int | float]]:
    """Return folders and options.

    Args:
        arguments: What was typed.

    Raises:
        ConfigError: If an option does not exist or has the wrong value, or there is no folder.
    """
    folders: list[Path] = []
    options: dict[str, str | int | float] = {}
    for argument in arguments:
        key, sign, text = argument.partition("=")
        if not sign or Path(argument).is_dir():
            if argument.startswith("-"):
                raise ConfigError(
                    f"Expected folders and key=value, got {argument}. Type python -m cnf_lab.report --help."
                )
            folders.append(Path(argument).expanduser())
        elif key not in KINDS:
            close = get_close_matches(key, KINDS, 1, 0.3)
            raise ConfigError(
                f"Expected an option that exists, {', '.join(KINDS)}; got {key}."
                + (f" Type {close[0]}={text}." if close else "")
            )
        else:
            options[key] = _value(key, text)
    if not folders:
        raise ConfigError("Expected a folder of runs, got none. Type python -m cnf_lab.report outputs/.")
    return folders, options


def _value(key: str, text: str) -> str | int | float:
    if KINDS[key] is str:
        return text
    try:
        value: int | float = KINDS[key](text)
    except ValueError:
        value = -1
    if not LEAST[key] <= value <= 1e6:
        kind = "whole number" if KINDS[key] is int else "number"
        raise ConfigError(
            f"Expected {key} to be a {kind} of at least {LEAST[key]}, got {text}. Type {key}={USUAL[key]}."
        )
    return value


def main() -> None:
    """Run the command."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return
    try:
        report(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except LabError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
