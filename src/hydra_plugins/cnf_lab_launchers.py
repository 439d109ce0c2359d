"""Hydra's launchers with every job apart: one that is killed does not take the others with it.

joblib loses all jobs with one worker, and submitit stops waiting for the others. Here every job is
launched by itself, from a thread that waits for it; one that ends without a result counts as
infinitely bad, as a failed one does, and its folder says what happened.

Hydra takes launchers from the package ``hydra_plugins`` only, and imports it at the start of every
application: nothing heavy belongs here.
"""

import logging
import math
import os
import queue
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

try:
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher
except ImportError:  # without cnf-lab[sweep] Hydra sees no launchers here, and the command says what to install
    JoblibLauncher = LocalLauncher = SlurmLauncher = object

log = logging.getLogger(__name__)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
Jobs = Sequence[Sequence[str]]
LaunchOne = Callable[[Sequence[str], int], JobReturn]


class _Apart:
    """What the launchers below share."""

    config: DictConfig | None
    hydra_context: HydraContext | None

    def _launch_apart(self, jobs: Jobs, first: int, launch_one: LaunchOne, at_once: int | None) -> list[JobReturn]:
        def job(overrides: Sequence[str], number: int) -> JobReturn:
            try:
                return launch_one(overrides, number)
            except (Exception, SystemExit) as error:
                if not _is_loss(error):
                    raise
                return self._lost(overrides, number, _reason(error))

        threads = ThreadPoolExecutor(at_once or len(jobs))
        try:
            return list(threads.map(job, jobs, range(first, first + len(jobs))))
        finally:  # after an interrupt too: what has not begun does not begin
            threads.shutdown(wait=False, cancel_futures=True)

    def _composed(self, overrides: Sequence[str], number: int) -> DictConfig:
        assert self.config is not None
        assert self.hydra_context is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        return config

    def _lost(self, overrides: Sequence[str], number: int, reason: str) -> JobReturn:
        """Return what a job is for a sweeper that ended without a result, and note it in the job's folder."""
        log.error("Job %d: %s", number, reason)
        config = self._composed(overrides, number)
        folder = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        if not (folder / ".hydra" / "overrides.yaml").is_file():  # killed before it began
            OmegaConf.save(config.hydra.overrides.task, folder / ".hydra" / "overrides.yaml")
        (folder / "FAILED").write_text(f"{reason}\n")
        lost = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
        lost.return_value = math.inf
        return lost


class ProcessLauncher(_Apart, JoblibLauncher):
    """Several jobs at a time on this machine, each in a process of joblib's loky that lives for it only.

    Args:
        n_jobs: Jobs at a time; -1 takes the number of CPUs.
        gpus: Numbers of GPUs; every job sees one of them, and no two jobs the same at a time.
    """

    def __init__(self, n_jobs: int, gpus: Sequence[int | str] | None = None) -> None:
        super().__init__()
        self.n_jobs = n_jobs if n_jobs > 0 else os.cpu_count() or 1
        self.gpus = list(gpus or [])

    def launch(self, job_overrides: Jobs, initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return what became of them."""
        from hydra_plugins.hydra_joblib_launcher._core import execute_job
        from joblib.externals.loky import ProcessPoolExecutor

        assert self.config is not None
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        at_once = min(self.n_jobs, len(self.gpus) or self.n_jobs, len(job_overrides))
        log.info("Launching %d jobs, %d at a time", len(job_overrides), at_once)
        state = Singleton.get_state()
        free: queue.SimpleQueue[int | str] = queue.SimpleQueue()
        for gpu in self.gpus:
            free.put(gpu)
        # As joblib does: processes that all take all cores would wait for each other.
        cores = max((os.cpu_count() or 1) // at_once, 1)
        threads = {name: os.environ.get(name, str(cores)) for name in THREADS}

        def launch_one(overrides: Sequence[str], number: int) -> JobReturn:
            log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
            gpu = free.get() if self.gpus else None
            environment = threads if gpu is None else {**threads, "CUDA_VISIBLE_DEVICES": str(gpu)}
            try:
                with ProcessPoolExecutor(max_workers=1, env=environment) as process:
                    job = (number, overrides, self.hydra_context, self.config, self.task_function, state)
                    return process.submit(execute_job, *job).result()
            finally:
                if gpu is not None:
                    free.put(gpu)

        return self._launch_apart(job_overrides, initial_job_idx, launch_one, at_once)


class LocalQueueLauncher(_Apart, LocalLauncher):
    """Several jobs at a time on this machine through submitit, which keeps their output below ``.submitit/``.

    Args:
        n_jobs: Jobs at a time; -1 takes the number of CPUs.
        **params: Options of submitit.
    """

    def __init__(self, n_jobs: int, **params: Any) -> None:
        super().__init__(**params)
        self.n_jobs = n_jobs if n_jobs > 0 else os.cpu_count() or 1

    def launch(self, job_overrides: Jobs, initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return what became of them."""

        def launch_one(overrides: Sequence[str], number: int) -> JobReturn:
            return LocalLauncher.launch(self, [overrides], number)[0]

        return self._launch_apart(job_overrides, initial_job_idx, launch_one, self.n_jobs)


class ClusterLauncher(_Apart, SlurmLauncher):
    """Every job as a job of Slurm, submitted by submitit; this process waits for them.

    Args:
        **params: Options of submitit and Slurm.
    """

    def launch(self, job_overrides: Jobs, initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the jobs, wait, and return what became of them."""
        from cnf_lab.errors import ConfigError

        if shutil.which("srun") is None or shutil.which("sbatch") is None:
            raise ConfigError(
                "Expected Slurm's srun and sbatch on this machine, got none. "
                "Type the command on a login node of the cluster, or hydra/launcher=submitit."
            )
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            self._check_processes(self._composed(overrides, number))

        def launch_one(overrides: Sequence[str], number: int) -> JobReturn:
            return SlurmLauncher.launch(self, [overrides], number)[0]

        return self._launch_apart(job_overrides, initial_job_idx, launch_one, self.params.get("array_parallelism"))

    def _check_processes(self, config: DictConfig) -> None:
        # Lightning trains in the processes that Slurm started: one per GPU, or it waits for the others forever.
        from cnf_lab.errors import ConfigError

        tasks, nodes = self.params.get("tasks_per_node", 1), self.params.get("nodes", 1)
        devices = OmegaConf.select(config, "trainer.devices", default=tasks)
        found = tasks if devices in (-1, "-1", "auto") else devices
        if found != tasks or OmegaConf.select(config, "trainer.num_nodes", default=nodes) != nodes:
            trainer = "trainer=auto" if tasks == nodes == 1 else f"trainer=ddp trainer.devices={tasks}"
            raise ConfigError(
                f"Expected trainer.devices={tasks} and trainer.num_nodes={nodes}, the processes and nodes of this "
                f"launcher, got {devices} and {config.trainer.num_nodes}. Type {trainer} trainer.num_nodes={nodes}, "
                "or change hydra.launcher.tasks_per_node, gpus_per_node and nodes."
            )


def _is_loss(error: BaseException) -> bool:
    from joblib.externals.loky import BrokenProcessPool
    from submitit.core.utils import FailedJobError, UncompletedJobError

    return isinstance(error, (BrokenProcessPool, FailedJobError, UncompletedJobError, SystemExit))


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        return f"Stopped: the job ended with exit code {error.code}"
    if codes := re.search(r"exit codes of the workers are \{(.+?)\}", text):
        return f"Killed: the job's process ended with {codes[1]}"
    if state := re.search(r"has not produced any output \(state: (.+?)\)", text):
        return f"Killed: the job's process ended without a result (submitit's state: {state[1]})"
    return f"Lost: {text[:400]}"
