"""cnf_lab: continuous normalizing flows, from density estimation to images.

``cnf_lab.load(run)`` gives a trained flow; ``python -m cnf_lab.train`` makes one. The numerical
core (:mod:`cnf_lab.fields`, :mod:`cnf_lab.trace`, :mod:`cnf_lab.ode`, :mod:`cnf_lab.flows`,
:mod:`cnf_lab.autoencoders`, :mod:`cnf_lab.objectives`) is plain torch and can be used without the lab.
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from pathlib import Path as _Path
from typing import TYPE_CHECKING

from cnf_lab.errors import ConfigError, DataError, LabError, SolverError

if TYPE_CHECKING:
    from cnf_lab.autoencoders import VariationalAutoencoder
    from cnf_lab.flows import Flow

try:
    __version__ = _version("cnf_lab")
except _PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["ConfigError", "DataError", "LabError", "SolverError", "__version__", "load"]


def load(run: str | _Path) -> "Flow | VariationalAutoencoder":
    """Load a trained flow, or autoencoder, in evaluation mode.

    Args:
        run: A run folder (its best checkpoint, else its last) or a checkpoint file.

    Returns:
        A flow with ``log_prob``, ``sample``, ``pull_back`` and ``push_forward``; of a run of model=vae
        an autoencoder with ``elbo``, ``latents``, ``decode`` and ``sample``. Its parameters are
        frozen; ``flow.requires_grad_()`` makes them trainable again.

    Raises:
        ConfigError: If there is no checkpoint.
        DataError: If the checkpoint is damaged.
    """
    # Hydra and Lightning are needed for this only, not for the numerical core.
    from cnf_lab.training.run import restore_flow

    return restore_flow(run)[0]
