"""Metrics over whole data sets."""

from cnf_lab.metrics.likelihood import ErrorOfMean as ErrorOfMean
from cnf_lab.metrics.likelihood import MeanWithError as MeanWithError
from cnf_lab.metrics.likelihood import bits_per_dim as bits_per_dim
