"""What the commands share: Hydra's start, ``resume=``, and errors in one line.

A user's mistake never ends in a traceback: the closest names are offered instead. Set
HYDRA_FULL_ERROR=1 to see the traceback all the same.
"""

import difflib
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cnf_lab.errors import ConfigError, LabError
from cnf_lab.training.run import has_checkpoint
from cnf_lab.training.sweep import SweepSummary

log = logging.getLogger("cnf_lab")
FULL_ERROR = "HYDRA_FULL_ERROR"
#: What a checkpoint holds: other values would be ignored when a run is resumed, or not fit.
FIXED_BY_A_RUN = (
    "seed",
    "recipe",
    "model",
    "architecture",
    "preprocess",
    "normalisation",
    "posterior",
    "optimiser",
    "schedule",
)

#: What a group has besides the lab's own options.
ALSO = {
    "experiment": ("null",),
    "debug": ("null",),
    "hydra/launcher": ("basic", "joblib", "submitit_local", "submitit_slurm"),
    "hydra/sweeper": ("basic", "optuna"),
}

OmegaConf.register_new_resolver(
    "hydra_files", lambda folder: None if has_checkpoint(folder) else ".hydra", replace=True
)
OmegaConf.register_new_resolver("slug", lambda text: re.sub(r"[^\w.-]+", "-", str(text))[:100], replace=True)


def config_folder() -> Path:
    """Return the folder of the configuration: inside an installed package, else the repository's."""
    package = Path(__file__).parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent.parent / "conf"


def run_command(task: Callable[[DictConfig], Any], config_name: str) -> None:
    """Run a task under Hydra with the command line's overrides; exit with 2 on a user's mistake.

    Args:
        task: Function of the composed configuration.
        config_name: Name of the primary configuration.
    """
    failures: list[Exception] = []
    SweepSummary.missing.clear()

    def guarded(config: DictConfig) -> Any:
        # Hydra prints a line of its own for an error that it sees, and a multirun would end
        # there. A failed job counts as infinitely bad, and the next one runs.
        _quieten()  # in the process of a launcher too
        try:
            return task(config)
        except Exception as error:
            failures.append(error)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                log.error("This job failed: %s", " ".join(str(error).split()), exc_info=not _for_user(error))
            return math.inf

    _quieten()
    kept = os.environ.get(FULL_ERROR)
    # Makes Hydra raise instead of printing and exiting, so that the message is ours.
    os.environ[FULL_ERROR] = "1"
    try:
        sys.argv[1:] = _resumed(_prepared(sys.argv[1:]))
        hydra.main(config_path=str(config_folder()), config_name=config_name, version_base="1.3")(guarded)()
        if SweepSummary.missing:  # found in the folders: jobs of other processes leave nothing here
            raise LabError(SweepSummary.missing_in_a_line())
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise LabError(f"{len(failures)} jobs failed; the first one: {failures[0]}")
    except BrokenPipeError:
        # The reader of our output has left, as `head` does; nothing is left to flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        error = _missing_extra(error) or error
        if kept == "1" or not _for_user(error):
            raise
        print(f"error: {explain(error, sys.argv[1:], config_name)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        os.environ.pop(FULL_ERROR)
        os.environ.update({} if kept is None else {FULL_ERROR: kept})


def _quieten() -> None:
    # Lightning's hints about hardware and products, and its own use of a deprecated torch type.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    for advice in (
        "does not have many workers",
        "is smaller than the logging interval",
        "Skipping learning rate update",
        "exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=f".*{advice}.*")


def check_number(
    config: DictConfig, name: str, kind: type[int] | type[float], least: int, typed: str, optional: bool = False
) -> None:
    """Check an option of a command that is a number.

    Args:
        config: The configuration.
        name: Name of the option, with dots where it lies in a node.
        kind: int, or float, which admits whole numbers too.
        least: Smallest value; for float the value must lie above it.
        typed: A value to suggest.
        optional: Whether null is admitted.

    Raises:
        ConfigError: If it is another thing, or too small.
    """
    value = OmegaConf.select(config, name, throw_on_missing=True)
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not (value is None and optional) and not (fits and (value >= least if kind is int else value > least)):
        wanted = f"a whole number of at least {least}" if kind is int else f"a number above {least}"
        raise ConfigError(f"Expected {name} to be {wanted}, got {value}. Type {name}={typed}.")


def _for_user(error: BaseException) -> bool:
    # A folder that cannot be written and a full disk are the user's to mend, and say so themselves.
    return isinstance(error, LabError | HydraException | OmegaConfBaseException | OSError)


def _missing_extra(error: Exception) -> ConfigError | None:
    # Hydra's words for a launcher or sweeper whose package is not there.
    unknown = re.search(r"Unknown plugin class : '(hydra_plugins\S+)'", str(error))
    if not unknown:
        return None
    return ConfigError(
        f"Expected Hydra's plugins for sweeps to be installed, got none for {unknown[1]}. "
        'Type pip install "cnf-lab[sweep]".'
    )


def explain(error: BaseException, arguments: Sequence[str], config_name: str) -> str:
    """Return one line for an error: what was given, what there is, what to type."""
    while not isinstance(error, LabError) and isinstance(error.__cause__, LabError):
        error = error.__cause__
    if isinstance(error, LabError):
        return " ".join(str(error).split())
    # A resumed run, or options of the user's own: what exists is not what stands in the lab's folder.
    if any(argument.startswith("--config-") or argument in ("-cp", "-cd") for argument in arguments):
        return " ".join(f"{error} {error.__cause__ or ''}".split())
    groups = _groups() if config_name == "train" else {}
    chosen = [argument for argument in arguments if _is_choice(argument, groups)]
    for argument in arguments:
        unknown = _unknown(argument, groups, chosen, config_name)
        if unknown:
            return unknown
    text = str(error) if error.__cause__ is None else f"{error} {error.__cause__}"
    return " ".join(text.split())


def _prepared(arguments: list[str]) -> list[str]:
    """Put -m first, and leave what does not vary in a sweep out of the names of its folders."""
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
    # argparse takes overrides from one side of -m only.
    arguments = flags + [argument for argument in arguments if argument not in flags]
    if flags:
        overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
        parsed = OverridesParser.create().parse_overrides(overrides)
        fixed = [override.key_or_group for override in parsed if not override.is_sweep_override()]
        arguments.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]")
    return arguments


def _resumed(arguments: list[str]) -> list[str]:
    """Turn ``resume=<run>`` into Hydra's own options for running a saved configuration again."""
    resumed = [argument for argument in arguments if argument.startswith("resume=")]
    if not resumed or resumed[-1] == "resume=null" or "--config-path" in arguments:
        return arguments
    folder = Path(resumed[-1].partition("=")[2].strip("'\"")).resolve()
    if not (folder / "checkpoints" / "last.ckpt").is_file() or not (folder / ".hydra" / "config.yaml").is_file():
        raise ConfigError(
            f"Expected resume to be a run folder with .hydra/config.yaml and checkpoints/last.ckpt, got {folder}. "
            "Type resume=outputs/<model>/<data set>/<time>."
        )
    others = [argument for argument in arguments if argument not in resumed]
    groups = [argument for argument in others if argument.partition("=")[0].lstrip("+~") in _groups()]
    if groups:
        raise ConfigError(
            f"Expected single values to change when a run is resumed, such as trainer.max_epochs=200, got {groups[0]}. "
            "Leave it out, or start a new run."
        )
    fixed = [argument for argument in others if argument.lstrip("+~").split("=")[0].split(".")[0] in FIXED_BY_A_RUN]
    if fixed:
        raise ConfigError(
            f"Expected options that a checkpoint does not fix, such as trainer.max_epochs=200, got {fixed[0]}. "
            "Leave it out, or start a new run."
        )
    if {"-m", "--multirun"} & set(others):
        raise ConfigError("Expected resume to continue one run, got it with --multirun. Leave out -m.")
    saved = ["--config-path", str(folder / ".hydra"), "--config-name", "config"]
    # The saved configuration is rewritten only when the checkpoint has been found to fit it.
    kept = [f"hydra.run.dir='{folder}'", "hydra.output_subdir=null", "hydra.job.name=train"]
    return [*saved, *others, f"resume='{folder}'", *kept]


def _is_choice(argument: str, groups: dict[str, list[str]]) -> bool:
    group, _, option = argument.partition("=")
    return group in groups and all(item in groups[group] for item in _items(option))


def _items(value: str) -> list[str]:
    return [item for item in re.split(r"[\[\],'\" ]+", value) if item]


def _unknown(argument: str, groups: dict[str, list[str]], chosen: Sequence[str], config_name: str) -> str | None:
    """Explain what is unknown about one override, or None where it is known."""
    match = re.match(r"^[+~]{0,2}([\w/.@-]+)=(.*)$", argument)
    if not match:
        return None
    key, value = match.group(1).split("@")[0], match.group(2)
    if key in groups:
        wrong = [item for item in _items(value) if item not in (*groups[key], *ALSO.get(key, ()))]
        return _expected(f"{key} to be one of", wrong[0], groups[key], f"{key}=") if wrong else None
    if key.startswith("hydra"):
        return None
    keys = _keys(config_name, chosen)
    if not keys or key in keys or argument.startswith(("+", "~")):
        return None
    names = sorted({*keys, *groups})
    return _expected("an option that exists, such as", key, _closest(key, names, 5), "", "=" + value)


def _expected(what: str, given: str, choices: Sequence[str], before: str = "", after: str = "") -> str:
    closest = _closest(given, choices, 1)
    typed = f" Type {before}{closest[0]}{after}." if closest else ""
    return f"Expected {what} {', '.join(choices)}; got {given}.{typed}"


def _closest(given: str, choices: Sequence[str], count: int) -> list[str]:
    def likeness(choice: str) -> float:
        whole = difflib.SequenceMatcher(None, given, choice).ratio()
        return max(whole, difflib.SequenceMatcher(None, given.split(".")[-1], choice.split(".")[-1]).ratio() - 0.05)

    return sorted(choices, key=lambda choice: -likeness(choice))[:count]


def _groups() -> dict[str, list[str]]:
    """Return the option groups with their options."""
    folder = config_folder()
    groups: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*/**/*.yaml")):
        group = file.parent.relative_to(folder).as_posix()
        groups.setdefault(group, []).append(file.stem)
        top = file.relative_to(folder).parts[0]
        if top == "experiment" and group != top:
            groups.setdefault(top, []).append(file.relative_to(folder / top).with_suffix("").as_posix())
    return groups


def _keys(config_name: str, chosen: Sequence[str]) -> set[str]:
    """Return all keys of the configuration with these choices of options, dotted."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            config = compose(config_name, list(chosen))
        except HydraException:  # choices that exclude each other: Hydra's own words say it
            return set()
    return set(_dotted(OmegaConf.to_container(config, resolve=False)))


def _dotted(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    names = []
    for key, value in node.items():
        names += [f"{prefix}{key}", *_dotted(value, f"{prefix}{key}.")]
    return names
