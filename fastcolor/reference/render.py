"""Rendering in plain PyTorch: chroma brought to full size along the edges of the lightness, then Lab to RGB, or to the
chroma planes of a video frame.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcolor.reference.lab import (
    lab_f,
    lab_f_inverse,
    lab_to_rgb,
    linear_to_srgb,
    srgb_to_linear,
    working_dtype,
)
from fastcolor.yuv import YuvFormat

# Added to every weight: where no neighbour has a like lightness (thin lines, grain) the spatial tent alone decides.
# Chosen with sigma_light on photographs and a chart (benchmarks/edges.py): as near to the truth as bilinear on the
# former, half its bleeding on the latter.
FLOOR = 0.2
_STRIP = 1 << 20  # pixels handled at a time: bounds the memory, whatever the size of a scan
_LUMA_STEPS = 2  # for photographs a, b err by 0.009 then, by 0.36 without (mean; largest 23 and 33)


def upsample_chroma(
    ab: Tensor,  # [B, 2, h, w]
    guide: Tensor,  # [B, 1, h, w]
    L: Tensor,  # [B, 1, H, W]
    rows: tuple[Tensor, Tensor],  # of `nearest_low`: [H] and [H]
    columns: tuple[Tensor, Tensor],  # [W] and [W]
    sigma_light: float,
) -> Tensor:  # [B, 2, H, W]
    """Joint bilateral upsampling (Kopf et al. 2007, section 3): each pixel takes the mean of the
    low-resolution colours around it, weighted by a spatial tent (that of bilinear interpolation) and a Gaussian of the
    lightness difference.

        ab(p) = Σ_q w_q ab_q / Σ_q w_q
        w_q = tent(y_p − y_q) tent(x_p − x_q) (exp(−(L_p − g_q)² / 2 sigma_light²) + FLOOR)
        tent(d) = max(0, 1 − |d|)

    Places outside the low-resolution grid repeat the colour of its border. A nan in guide or ab makes nan of the pixels
    that have a share of it.
    """
    dtype = working_dtype(ab)
    ab, guide, L = ab.to(dtype), guide.to(dtype), L.to(dtype)
    total, weights = L.new_zeros(L.shape[0], 2, *L.shape[-2:]), torch.zeros_like(L)
    for y, tent_y in _three(rows, ab.shape[-2], dtype):
        ab_y, guide_y = ab.index_select(2, y), guide.index_select(2, y)  # [B, 2, H, w]
        for x, tent_x in _three(columns, ab.shape[-1], dtype):
            difference = guide_y.index_select(3, x) - L
            tent = tent_y[:, None] * tent_x
            w = ((difference.square() * (-0.5 / sigma_light**2)).exp() + FLOOR) * tent
            # not 0 · nan: a neighbour without a share has no say
            total = total + torch.where(tent > 0, w * ab_y.index_select(3, x), 0)
            weights = weights + torch.where(tent > 0, w, 0)
    return total / weights


def nearest_low(size: int, scale: float, step: int, offset: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the places k · step + offset, k = 0 .. size − 1, in units of full-resolution pixels, lie on the
    low-resolution grid: the nearest of its positions [size] int32, which may be outside, and how far beyond
    it [size] float64, in [−½, ½].

    `scale` is low-resolution pixels per full-resolution pixel; pixel centres are at + ½ on both grids.
    """
    # float64: positions of a 50,000 pixel scan need more than 24 bits
    place = (torch.arange(size, device=device, dtype=torch.float64) * step + offset) * scale - 0.5
    at = place.round()
    return at.int(), place - at


def _three(nearest: tuple[Tensor, Tensor], low: int, dtype: torch.dtype):
    """The three positions about each place, brought inside, and their tents: (index [n], tent [n]) three times."""
    at, beyond = nearest
    for step in (-1, 0, 1):
        yield (at + step).clamp(0, low - 1).long(), (1 - (beyond - step).abs()).clamp_min(0).to(dtype)


def render(
    ab: Tensor,  # [B, 2, h, w]
    guide: Tensor,  # [B, 1, h, w]
    L: Tensor,  # [B, 1, H, W]
    scale: tuple[float, float],
    sigma_light: float,
    dtype: torch.dtype,
    gamut: str,
    channels_last: bool,
) -> Tensor:  # [B, 3, H, W] or [B, H, W, 3]
    """A strip of rows at a time. See `fastcolor.render`."""
    height, width = L.shape[-2:]
    rows, columns = (nearest_low(size, s, 1, 0.5, L.device) for size, s in zip((height, width), scale, strict=True))
    at_a_time = max(1, _STRIP // max(1, width))
    images = []
    for i in range(L.shape[0]):
        one, strips = slice(i, i + 1), []
        for top in range(0, max(1, height), at_a_time):
            part = slice(top, top + at_a_time)
            light = L[one, :, part]
            chroma = upsample_chroma(ab[one], guide[one], light, (rows[0][part], rows[1][part]), columns, sigma_light)
            lab = torch.cat((light.to(chroma.dtype), chroma), 1)
            lab = lab.permute(0, 2, 3, 1) if channels_last else lab
            strips.append(lab_to_rgb(lab, channels_last, dtype, gamut))
        images.append(torch.cat(strips, 1 if channels_last else 2))
    shape = (0, height, width, 3) if channels_last else (0, 3, height, width)
    return torch.cat(images) if images else L.new_empty(shape, dtype=dtype)


# --- video ----------------------------------------------------------------------------------------------------------


def luma_to_lightness(luma: Tensor, bits: int, full_range: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """L of the grey that has this luma, clipped to [0, 100], in its shape. See `fastcolor.luma_to_lightness`."""
    return grey_to_lightness(normalized_luma(luma, YuvFormat(bits=bits, full_range=full_range)).to(dtype))


def normalized_luma(luma: Tensor, yuv: YuvFormat) -> Tensor:
    """Samples to Y', 0 at black and 1 at white, float64."""
    return (luma.to(torch.float64) - yuv.black) / yuv.luma_span


def grey_to_lightness(y: Tensor) -> Tensor:
    """Y' to L of the grey R' = G' = B' = Y', clipped to [0, 100]."""
    return (116 * lab_f(srgb_to_linear(y.clamp(0, 1))) - 16).clamp(0, 100)


def luma_at_chroma(y: Tensor, yuv: YuvFormat) -> Tensor:
    """Y' [B, 1, H, W] at the places of chroma samples: a mean of two between luma samples, (1 2 1) / 4 on one.

    Samples beyond the border repeat it.
    """
    for dim, (step, cosited) in enumerate(zip(yuv.steps, yuv.cosited, strict=True), start=2):
        if step == 1:
            continue
        pad = [0, 0, 0, 0]
        pad[0 if dim == 3 else 2], pad[1 if dim == 3 else 3] = 1, 1
        padded = F.pad(y, pad, mode="replicate").movedim(dim, -1)  # sample k at k + 1
        size = y.shape[dim]
        before, on, after = (padded[..., d : d + size][..., ::2] for d in (0, 1, 2))
        y = ((before + 2 * on + after) / 4 if cosited else (on + after) / 2).movedim(-1, dim)
    return y


def render_uv(
    ab: Tensor,  # [B, 2, h, w]
    guide: Tensor,  # [B, 1, h, w]
    luma: Tensor,  # [B, 1, H, W] integer
    scale: tuple[float, float],
    sigma_light: float,
    yuv: YuvFormat,
) -> tuple[Tensor, Tensor]:  # [B, 1, H / down, W / across] each
    """Chroma planes for a luma plane that stays as it is. At each chroma sample

    1. Y' is the luma there (`luma_at_chroma`), L that of its grey, and (a, b) the upsampled chroma at L;
    2. L is moved until the colour (L, a, b) has the luma Y', so that what a player decodes has the a and b that were
       asked for: _LUMA_STEPS times L += lightness of the grey Y' − lightness of the grey with the colour's luma, whose
       channels are clipped to [0, 1]; exact for greys, and better with each step for others;
    3. the colour's chroma (Cb, Cr) is scaled towards 0, Y' held, until R', G', B' are inside [0, 1], and rounded; nan
       becomes neutral.
    """
    dtype = working_dtype(ab)
    height, width = luma.shape[-2:]
    if luma.numel() == 0:
        empty = luma.new_empty(luma.shape[0], 1, *yuv.chroma_size(height, width))
        return empty, empty.clone()
    size = yuv.chroma_size(height, width)
    rows, columns = (
        nearest_low(n, s, step, offset, luma.device)
        for n, s, step, offset in zip(size, scale, yuv.steps, yuv.offsets, strict=True)
    )
    y = luma_at_chroma(normalized_luma(luma, yuv), yuv).to(dtype)
    L = grey_to_lightness(y)
    chroma = upsample_chroma(ab, guide, L, rows, columns, sigma_light)
    a, b = chroma.split(1, dim=1)
    grey = L
    for _ in range(_LUMA_STEPS):
        own = _luma(_unclipped_rgb(L, a, b, yuv).clamp(0, 1), yuv)
        L = (L + grey - grey_to_lightness(own)).clamp(0, 100)
    rgb = _unclipped_rgb(L, a, b, yuv)  # [B, 3, h', w']
    difference, y = rgb - _luma(rgb, yuv), y.clamp(0, 1)
    room = torch.where(difference > 0, 1 - y, -y) / torch.where(difference == 0, 1, difference)
    t = torch.where(difference == 0, 1, room).amin(1, keepdim=True).clamp(0, 1)
    red, _, blue = yuv.luma_weights
    planes = []
    for channel, weight in ((2, blue), (0, red)):
        value = t[:, 0] * difference[:, channel] / (2 * (1 - weight))  # Cb or Cr, in [−½, ½]
        level = (value * yuv.chroma_span + (1 << (yuv.bits - 1)) + 0.5).floor().clamp(0, 2**yuv.bits - 1)
        planes.append(level.nan_to_num(1 << (yuv.bits - 1)).to(torch.int32).to(luma.dtype)[:, None])
    return planes[0], planes[1]


def _luma(rgb: Tensor, yuv: YuvFormat) -> Tensor:
    """Y' [B, 1, ...] of R', G', B' [B, 3, ...]."""
    return (rgb * rgb.new_tensor(yuv.luma_weights)[:, None, None]).sum(1, keepdim=True)


def _unclipped_rgb(L: Tensor, a: Tensor, b: Tensor, yuv: YuvFormat) -> Tensor:
    """R', G', B' [B, 3, ...] of Lab planes [B, 1, ...], also beyond [0, 1]."""
    fy = (L + 16) / 116
    xyz = lab_f_inverse(torch.cat((fy + a / 500, fy, fy - b / 200), 1))
    with torch.autocast(L.device.type, enabled=False):  # it would multiply in 16 bits
        return linear_to_srgb(torch.einsum("cd,bdyx->bcyx", L.new_tensor(yuv.xyz_to_rgb), xyz))


def yuv_to_rgb(
    luma: Tensor,  # [B, 1, H, W]
    u: Tensor,
    v: Tensor,  # [B, 1, H, W]: 4:4:4
    yuv: YuvFormat,
) -> Tensor:  # [B, 3, H, W] float64
    """R', G', B', not clipped: the definition of the matrix, for tests and benchmarks."""
    red, green, blue = yuv.luma_weights
    y = normalized_luma(luma, yuv)
    cb, cr = ((c.to(torch.float64) - (1 << (yuv.bits - 1))) / yuv.chroma_span for c in (u, v))
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    return torch.cat((r, (y - red * r - blue * b) / green, b), 1)
