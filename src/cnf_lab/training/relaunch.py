r"""Multirun together with DDP: every process of a job must run that job's configuration.

Lightning's ``ddp`` starts its other processes by running the same command line again. In a
multirun that command line is the whole sweep: each child would run a sweep of its own, and
ranks would train different configurations. Here the children of a job are pointed at the
configuration that Hydra saved for that job.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

#: What Lightning leaves in the environment of the process that launched the others.
LAUNCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED")


@contextmanager
def one_job(module: str) -> Iterator[None]:
    """Run one job of a multirun so that its processes agree on the configuration.

    Restores command line and environment afterwards and closes the process group, so that the
    next job launches processes of its own. Outside a multirun there is nothing to do.

    Args:
        module: The command's module, which the children run.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        yield
        return
    folder = Path(hydra.runtime.output_dir)
    main = sys.modules["__main__"]
    kept_argv, kept_spec = sys.argv[:], main.__spec__
    kept_environment = {name: os.environ.get(name) for name in LAUNCH_VARIABLES}
    # Typed as a dataclass, in truth a node of a read-only configuration.
    with read_write(cast(DictConfig, hydra)), open_dict(cast(DictConfig, hydra)):
        hydra.run.dir = str(folder)
    sys.argv[1:] = ["--config-path", str(folder / ".hydra"), "--config-name", "config"]
    main.__spec__ = find_spec(module)
    try:
        yield
    finally:
        sys.argv[:], main.__spec__ = kept_argv, kept_spec
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in kept_environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
