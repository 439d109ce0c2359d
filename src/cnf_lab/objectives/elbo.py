r"""Variational inference."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cnf_lab.autoencoders import VariationalAutoencoder
from cnf_lab.errors import ConfigError
from cnf_lab.flows.riders import Rider
from cnf_lab.objectives.base import LossTerms, Objective


class Elbo(Objective[VariationalAutoencoder]):
    r"""The mean negative ELBO, its KL weighted by :math:`\beta_e` in epoch e.

    .. math:: -\frac1B \sum_b \left[\log p(x_b \mid z_b) - \beta_e \big(\log q(z_b \mid x_b) - \log p(z_b)\big)\right],
              \qquad \beta_e = \beta \min\left(\tfrac{e + 1}{W}, 1\right)

    with one draw of z for each image and W epochs of KL warm-up. With K draws it is the importance-weighted bound,

    .. math:: -\frac1B \sum_b \log \frac1K \sum_k w_{bk}, \qquad
              \log w_{bk} = \log p(x_b \mid z_{bk}) - \beta_e \big(\log q(z_{bk} \mid x_b) - \log p(z_{bk})\big).

    Free bits put a floor under the mean KL of a batch: below it the KL has no gradient. It is that of
    all latents together, for behind a flow they are not independent.

    Args:
        kl_warmup: W; 0 or 1 for none. Epochs are those of the trainer.
        beta: Weight of the KL after warm-up; 1 for a bound.
        free_bits: Floor of the mean KL, in nats; 0 for none.
        draws: K; 1 for the ELBO.
        regularisers: Penalties of the posterior's flow by name.

    Raises:
        ConfigError: If a number is out of range.

    References:
        Burda et al., Importance weighted autoencoders (2016), https://arxiv.org/abs/1509.00519.
        Sønderby et al., Ladder variational autoencoders (2016), for the warm-up, https://arxiv.org/abs/1602.02282.
        Kingma et al., Improved variational inference with inverse autoregressive flow (2016), for free bits,
        https://arxiv.org/abs/1606.04934.
    """

    kind = VariationalAutoencoder

    def __init__(
        self,
        kl_warmup: int = 0,
        beta: float = 1.0,
        free_bits: float = 0.0,
        draws: int = 1,
        regularisers: Mapping[str, Rider] | None = None,
    ) -> None:
        for name, value, least in (("kl_warmup", kl_warmup, 0), ("beta", beta, 0), ("free_bits", free_bits, 0)):
            if value < least:
                raise ConfigError(
                    f"Expected objective.{name} of at least {least}, got {value}. Type objective.{name}={least}."
                )
        if draws < 1 or (draws > 1 and free_bits):
            raise ConfigError(
                "Expected objective.draws of at least 1, and 1 with free bits, got "
                f"{draws} and objective.free_bits={free_bits}. Type objective.draws=1."
            )
        self.kl_warmup, self.final_beta, self.free_bits, self.draws = kl_warmup, beta, free_bits, draws
        self.regularisers = dict(regularisers or {})
        self.beta = self._beta(0)

    def begin_epoch(self, epoch: int) -> None:
        """Set the weight of the KL."""
        self.beta = self._beta(epoch)

    def __call__(
        self, flow: VariationalAutoencoder, x: Tensor, context: Tensor | None, generator: torch.Generator | None
    ) -> LossTerms:
        """Return the loss.

        Its terms, in nats and means over draws: ``negative_elbo`` (of weight 1), its parts
        ``reconstruction`` and ``kl``, the posterior flow's ``log_det``, and one per penalty.
        """
        found = flow.terms(x, self.draws, generator, list(self.regularisers.values()))
        if self.draws > 1:
            weighted = found.log_likelihood - self.beta * found.kl
            loss = math.log(self.draws) - weighted.logsumexp(dim=0).mean()
        else:
            kl = found.kl.mean()  # of draws: it may be negative
            kl = kl.clamp(min=self.free_bits) if self.free_bits else kl
            loss = -found.log_likelihood.mean() + self.beta * kl
        terms = {
            "negative_elbo": -found.log_weight.mean(dim=0),
            "reconstruction": -found.log_likelihood.mean(dim=0),
            "kl": found.kl.mean(dim=0),
            "log_det": found.log_det.mean(dim=0),
        }
        for (name, regulariser), measured in zip(self.regularisers.items(), found.integrals, strict=True):
            if regulariser.weight is not None:
                loss = loss + regulariser.weight * measured.mean()
                terms[name] = measured.mean(dim=0)
        return LossTerms(loss, terms, found.solves)

    def _beta(self, epoch: int) -> float:
        return self.final_beta * min((epoch + 1) / max(self.kl_warmup, 1), 1.0)
