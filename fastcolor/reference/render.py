"""Rendering in plain PyTorch: chroma brought to full size along the edges of the lightness, then Lab to RGB."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcolor.reference.lab import working_dtype

# Added to every weight: where no neighbour has a like lightness (thin lines, grain) the spatial tent alone decides.
FLOOR = 1e-3


def upsample_chroma(
    ab: Tensor,  # [B, 2, h, w]
    guide: Tensor,  # [B, 1, h, w]
    L: Tensor,  # [B, 1, H, W]
    scale: tuple[float, float],
    sigma_light: float,
    first_row: int = 0,
) -> Tensor:  # [B, 2, H, W]
    """Joint bilateral upsampling (Kopf et al. 2007, section 3): each pixel takes the mean of the 3×3 nearest
    low-resolution colours, weighted by a spatial tent of half-width 1.5 and a Gaussian of the lightness difference.

    `scale` is low-resolution pixels per full-resolution pixel, (vertical, horizontal), with pixel centres at + ½: the
    low-resolution grid may end before or behind the image. `first_row` is the place of L's first row in the
    whole image.
    """
    dtype = working_dtype(ab)
    ab, guide, L = ab.to(dtype), guide.to(dtype), L.to(dtype)
    rows = _nearest_three(L.shape[-2], first_row, ab.shape[-2], scale[0], ab)
    columns = _nearest_three(L.shape[-1], 0, ab.shape[-1], scale[1], ab)
    total, weights = L.new_zeros(L.shape[0], 2, *L.shape[-2:]), torch.zeros_like(L)
    for y, tent_y in zip(*rows, strict=True):
        ab_y, guide_y = ab.index_select(2, y), guide.index_select(2, y)  # [B, 2, H, w]
        for x, tent_x in zip(*columns, strict=True):
            difference = guide_y.index_select(3, x) - L
            w = (difference.square_().mul_(-0.5 / sigma_light**2).exp_() + FLOOR) * (tent_y[:, None] * tent_x)
            total += w * ab_y.index_select(3, x)
            weights += w
    return total / weights


def _nearest_three(size: int, first: int, low: int, scale: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """For pixels first .. first + size − 1: indices [3, size] of the nearest three of `low` positions, and their tents.

    Indices outside are brought to the border, where they repeat its colour.
    """
    # float64: positions of a 50,000 pixel scan need more than 24 bits
    place = (torch.arange(first, first + size, device=like.device, dtype=torch.float64) + 0.5) * scale - 0.5
    steps = torch.tensor([-1.0, 0.0, 1.0], device=like.device, dtype=torch.float64)[:, None]
    at = place.round() + steps  # [3, size]
    tent = (1.5 - (place - at).abs()).clamp_min(0).to(like.dtype)
    return at.clamp(0, low - 1).long(), tent
