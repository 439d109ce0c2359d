r"""The squeeze of images: space to depth, a permutation of the entries of an image."""

from torch import Tensor

from cnf_lab.shapes import Float


def squeeze(
    images: Float[Tensor, "*rows channels height width"],
) -> Float[Tensor, "*rows channels4 height2 width2"]:
    r"""Turn every 2×2 block of pixels into channels: (C, 2H, 2W) to (4C, H, W).

    Channel c of pixel (2i + p, 2j + q) becomes channel 4c + 2p + q of pixel (i, j).

    Args:
        images: Images with even height and width.

    References:
        Dinh et al., Density estimation using Real NVP (2017), section 3.6, https://arxiv.org/abs/1605.08803.
    """
    # Not by F.pixel_unshuffle, which returns a batch of no images as it is.
    blocks = images.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2))  # (*, C, H, 2, W, 2)
    return blocks.movedim((-3, -1), (-4, -3)).flatten(-5, -3)


def unsqueeze(
    images: Float[Tensor, "*rows channels4 height2 width2"],
) -> Float[Tensor, "*rows channels height width"]:
    """Undo :func:`squeeze`.

    Args:
        images: Images with a number of channels that 4 divides.
    """
    blocks = images.unflatten(-3, (-1, 2, 2))  # (*, C, 2, 2, H, W)
    return blocks.movedim((-4, -3), (-3, -1)).flatten(-4, -3).flatten(-2, -1)
