"""Densities of images."""

import math
from typing import Any

from torch import Tensor

from cnf_lab.metrics import bits_per_dim
from cnf_lab.models.likelihood import LikelihoodModule
from cnf_lab.objectives import LossTerms


class ImageModule(LikelihoodModule):
    """A density of images; reports ``bits_per_dim`` beside ``nll`` in nats per image.

    Both bound the probability of the discrete pixels: training draws dequantisation noise anew
    in every step, validation and test ``draws`` times per image. Evaluations and log-dets are
    logged for each block.
    """

    monitor = "val/bits_per_dim"
    unit = "bits/dim"
    by_block = True

    def log_terms(self, result: LossTerms) -> dict[str, Any]:
        """Log the parts of a training loss, its likelihood in bits/dim too."""
        if "nll" in result.terms:
            nll = result.terms["nll"].detach()
            value = bits_per_dim(nll.mean(), self._dimensions)
            self.log("train/bits_per_dim", value, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(nll))
        return super().log_terms(result)

    def log_likelihood(self, stage: str, quantity: str, value: Tensor) -> None:
        """Log a likelihood or an error of it, in nats per image and in bits/dim."""
        super().log_likelihood(stage, quantity, value)
        in_bits = bits_per_dim(value, self._dimensions)
        self.log(f"{stage}/bits_per_dim{quantity}", in_bits, prog_bar=not quantity, sync_dist=True)

    @property
    def _dimensions(self) -> int:
        return math.prod(self.flow.event_shape)
