"""How good a colorization is. Pictures are RGB in [0, 255], [..., 3, H, W]; all arithmetic is float64."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, over all its pixels and channels; inf where they are equal.

    Args:
        image, truth: [..., 3, H, W] in [0, 255].

    Returns:
        [...] float64.
    """
    if image.shape != truth.shape:
        raise ValueError(f"image must have the shape of truth, {list(truth.shape)}, got {list(image.shape)}")
    # widened before the difference: uint8 would wrap around
    error = (image.double() - truth.double()).square().mean((-3, -2, -1))
    return 10 * torch.log10(255**2 / error)


def colorfulness(image: Tensor) -> Tensor:
    """Hasler and Süsstrunk 2003: √(σ_rg² + σ_yb²) + 0.3 √(μ_rg² + μ_yb²), signed rg = R − G, yb = ½(R + G) − B.

    Args:
        image: [..., 3, H, W] in [0, 255].

    Returns:
        [...] float64; 0 for grey.
    """
    r, g, b = image.double().unbind(-3)
    opponent = torch.stack((r - g, (r + g) / 2 - b), -3).flatten(-2)  # [..., 2, H·W]
    spread = opponent.var(-1, correction=0).sum(-1).sqrt()
    return spread + 0.3 * opponent.mean(-1).square().sum(-1).sqrt()
