"""Metrics over whole data sets."""

from cnf_lab.metrics.likelihood import MeanWithError as MeanWithError
