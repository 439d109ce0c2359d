"""Data sets, from embedded generators to the user's own files."""

from cnf_lab.data.base import Batch as Batch
from cnf_lab.data.base import FlowDataModule as FlowDataModule
from cnf_lab.data.base import Rows as Rows
from cnf_lab.data.base import Splits as Splits
