"""Rendering: chroma and full-size lightness to RGB. The formulas are in fastcolor.reference.render."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcolor.ops import _backend
from fastcolor.ops.lab import lab_to_rgb
from fastcolor.reference import render as reference

_STRIP = 1 << 20  # pixels handled at a time: bounds the memory, whatever the size of a scan

_backend.offer("render")


def render(
    ab: Tensor,  # [B, 2, h, w]
    guide: Tensor,  # [B, 1, h, w]
    L: Tensor,  # [B, 1, H, W]
    *,
    scale: tuple[float, float] | None = None,
    sigma_light: float = 8.0,
    dtype: torch.dtype = torch.uint8,
    gamut: str = "preserve_lightness",
    channels_last: bool = False,
) -> Tensor:
    """Brings chroma to the size of the lightness along its edges (joint bilateral upsampling, Kopf et al. 2007), and
    converts both to sRGB.

    Args:
        ab: [B, 2, h, w] colours at low resolution.
        guide: [B, 1, h, w] lightness at the same low resolution, in [0, 100].
        L: [B, 1, H, W] lightness at full resolution, in [0, 100]; it is kept as it is.
        scale: low-resolution pixels per full-resolution pixel, (vertical, horizontal); (h/H, w/W) if left out.
        sigma_light: width in L units of the Gaussian of the lightness difference.
        dtype: of the result; integers are rounded. gamut, channels_last: as of `lab_to_rgb`.

    Returns:
        sRGB [B, 3, H, W], or [B, H, W, 3] with `channels_last`.

    Raises:
        ValueError: shapes that do not belong together, or an option out of range.
    """
    for name, tensor, count in (("ab", ab, 2), ("guide", guide, 1), ("L", L, 1)):
        if tensor.ndim != 4 or tensor.shape[1] != count or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be floating of shape [B, {count}, H, W], got {tensor.dtype} {list(tensor.shape)}"
            )
    if guide.shape[2:] != ab.shape[2:] or not ab.shape[0] == guide.shape[0] == L.shape[0]:
        raise ValueError(
            f"ab {list(ab.shape)}, guide {list(guide.shape)} and L {list(L.shape)} do not belong together: "
            "guide needs the size of ab, and all three the same batch"
        )
    if not sigma_light > 0:
        raise ValueError(f"sigma_light must be positive, got {sigma_light}")
    batch, _, height, width = L.shape
    if min(ab.shape[2:]) == 0 and height * width:
        raise ValueError(f"ab must have at least one pixel, got {list(ab.shape)}")
    scale = scale or (ab.shape[2] / max(1, height), ab.shape[3] / max(1, width))
    _backend.choose("render", ab.device)  # raises where a backend was asked for that has no kernel
    rgb = L.new_empty((batch, height, width, 3) if channels_last else (batch, 3, height, width), dtype=dtype)
    rows = max(1, _STRIP // max(1, width))
    for top in range(0, height, rows):
        part = slice(top, min(top + rows, height))
        for i in range(batch):
            one = slice(i, i + 1)
            light = L[one, :, part]
            chroma = reference.upsample_chroma(ab[one], guide[one], light, scale, sigma_light, top)
            lab = torch.cat((light.to(chroma.dtype), chroma), 1)
            if channels_last:
                rgb[i, part] = lab_to_rgb(lab[0].permute(1, 2, 0), channels_last=True, dtype=dtype, gamut=gamut)
            else:
                rgb[i, :, part] = lab_to_rgb(lab[0], dtype=dtype, gamut=gamut)
    return rgb
