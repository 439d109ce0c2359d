"""The errors that a user can cause or must know of; a command prints them as one line.

Anything else that is raised is a defect of the lab and keeps its traceback.
"""


class LabError(Exception):
    """Base of the errors whose message is written for the user."""


class ConfigError(LabError, ValueError):
    """Options that do not exist, have the wrong value, or do not fit together."""


class RunExistsError(ConfigError):
    """A folder that holds a run already, which another one would overwrite."""


class DataError(LabError, ValueError):
    """Data that are missing, damaged, incomplete or of the wrong form."""


class SolverError(LabError, RuntimeError):
    """A solve that failed or left the finite numbers.

    Args:
        message: What happened, with t, step size, NFE and tolerance, and what to change.
    """
