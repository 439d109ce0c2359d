"""Density estimation on rows."""

from cnf_lab.models.likelihood import LikelihoodModule


class DensityModule(LikelihoodModule):
    """A density of rows, conditional or not; reports ``nll`` in nats per row."""
