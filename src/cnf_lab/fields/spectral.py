r"""Spectral normalisation that holds still during a solve.

torch's own parametrisation runs a power iteration at every access of the weight, so that a
field would change between two evaluations of one solve. Here the singular vectors move only
when asked to, once before each training solve.

References:
    Miyato et al., Spectral Normalization for GANs (2018), https://arxiv.org/abs/1802.05957.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize


class SpectralNorm(nn.Module):
    r"""The parametrisation :math:`W / \hat\sigma`, :math:`\hat\sigma = u^\top W v`.

    u and v are buffers; :meth:`iterate` moves them by power iterations. The weight is seen as a
    matrix of its first axis against the rest.

    Args:
        weight: The weight to normalise; 500 power iterations start u and v, as in the original.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.u: Tensor
        self.v: Tensor
        self.register_buffer("u", F.normalize(torch.randn(matrix.shape[0], dtype=matrix.dtype), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(matrix.shape[1], dtype=matrix.dtype), dim=0))
        self.iterate(weight, 500)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight divided by the estimate of its largest singular value."""
        with torch.autocast(weight.device.type, enabled=False):
            sigma = torch.dot(self.u, weight.flatten(1) @ self.v)
        return weight / torch.where(sigma == 0, 1.0, sigma)

    @torch.no_grad()
    def iterate(self, weight: Tensor, iterations: int) -> None:
        """Improve u and v for the current weight."""
        matrix = weight.detach().flatten(1)
        with torch.autocast(weight.device.type, enabled=False):
            for _ in range(iterations):
                self.v = F.normalize(matrix.mT @ self.u, dim=0)
                self.u = F.normalize(matrix @ self.v, dim=0)

    @staticmethod
    def apply_to(module: nn.Module) -> None:
        """Normalise the weight of every linear and convolution layer below a module."""
        for layer in list(module.modules()):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))


def iterate_spectral_norms(module: nn.Module, iterations: int = 1) -> None:
    """Run power iterations for every spectrally normalised weight below a module."""
    for layer in module.modules():
        if isinstance(layer, parametrize.ParametrizationList) and isinstance(layer[0], SpectralNorm):
            layer[0].iterate(layer.original, iterations)
