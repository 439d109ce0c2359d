"""Metrics over whole data sets."""

from cnf_lab.metrics.likelihood import ErrorOfMean as ErrorOfMean
from cnf_lab.metrics.likelihood import MeanWithError as MeanWithError
