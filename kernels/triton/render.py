"""Rendering in Triton: chroma is brought to full size along the edges of the lightness, and with it to RGB, or to the
chroma planes of a video frame, in one pass. The formulas are in fastcolor.reference.render.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastcolor.kernels.triton.elementary import exp2
from fastcolor.kernels.triton.lab import (
    _encode,
    _f,
    _f_inverse,
    _from_linear,
    _gamut_scale,
    _lab_to_linear,
    _to_linear,
)
from torch import Tensor

from fastcolor.reference.lab import LEVELS
from fastcolor.yuv import YuvFormat

BLOCK = 512  # pixels of a program; with four warps four for each thread
COLUMNS = (32, 128, 512)  # of them, by the width of the result; the others lie in rows below
LOOK_UP = 1024
WARPS = 4


class Places(NamedTuple):
    """Places of the result on the low-resolution grid, of each row and column: see `reference.nearest_low`."""

    rows_at: Tensor  # [H] int32
    rows_beyond: Tensor  # [H] float32
    columns_at: Tensor  # [W]
    columns_beyond: Tensor  # [W]


@triton.jit
def _between(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _tile(across, down, height, width, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The image of this program, the rows (one number where it is one row) and columns of its pixels, and which of
    them are inside; rows are brought inside.
    """
    program = tl.program_id(0)
    image = (program // (across * down)).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = (program % across) * COLUMNS + i % COLUMNS
    y = (program // across) % down
    inside = x < width
    if COLUMNS < BLOCK:
        y = y * (BLOCK // COLUMNS) + i // COLUMNS
        inside = inside & (y < height)
        y = tl.minimum(y, height - 1)
    return image, y, x, inside


@triton.jit
def _before(at, beyond):
    """The low-resolution position before a place, and the share of the one behind it."""
    return tl.where(beyond < 0, at - 1, at), tl.where(beyond < 0, beyond + 1, beyond)


@triton.jit
def _upsample(
    ab_ptr, guide_ptr, rows_at_ptr, rows_beyond_ptr, columns_at_ptr, columns_beyond_ptr, image, y, x, inside, L,
    low_height, low_width, sharpness, floor,
):  # fmt: skip
    """a and b of pixels x of row y, given their lightness; 0 for those that are not inside."""
    above, low = _before(tl.load(rows_at_ptr + y), tl.load(rows_beyond_ptr + y))
    left, behind = _before(
        tl.load(columns_at_ptr + x, mask=inside, other=0), tl.load(columns_beyond_ptr + x, mask=inside, other=0.0)
    )
    high = 1 - low
    ahead = 1 - behind
    right = tl.minimum(tl.maximum(left + 1, 0), low_width - 1)
    left = tl.minimum(tl.maximum(left, 0), low_width - 1)
    plane = image * low_height * low_width
    weights = tl.zeros_like(L)
    a = tl.zeros_like(L)
    b = tl.zeros_like(L)
    for k in tl.static_range(2):
        row = tl.minimum(tl.maximum(above + k, 0), low_height - 1).to(tl.int64) * low_width
        tent = low if k == 1 else high
        for m in tl.static_range(2):
            column = right if m == 1 else left
            share = behind if m == 1 else ahead
            d = tl.load(guide_ptr + plane + row + column).to(tl.float32) - L
            w = (exp2(-(d * d) * sharpness) + floor) * (tent * share)
            from_a = ab_ptr + plane * 2 + row
            from_b = from_a + low_height * low_width
            a += w * tl.load(from_a + column).to(tl.float32)
            b += w * tl.load(from_b + column).to(tl.float32)
            weights += w
    scale = 1 / weights
    return tl.where(inside, a * scale, 0.0), tl.where(inside, b * scale, 0.0)


# --- to RGB ---------------------------------------------------------------------------------------------------------


@triton.jit
def render_kernel(
    ab_ptr, guide_ptr, L_ptr, rgb_ptr, rows_at_ptr, rows_beyond_ptr, columns_at_ptr, columns_beyond_ptr,
    across, down, height, width, pixels, low_height, low_width, sharpness, floor,
    LARGEST: tl.constexpr, PRESERVE: tl.constexpr, INTERLEAVED: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, y, x, inside = _tile(across, down, height, width, COLUMNS, BLOCK)
    row = y.to(tl.int64) * width
    L = tl.load(L_ptr + image * pixels + row + x, mask=inside, other=0.0).to(tl.float32)
    a, b = _upsample(
        ab_ptr, guide_ptr, rows_at_ptr, rows_beyond_ptr, columns_at_ptr, columns_beyond_ptr, image, y, x, inside, L,
        low_height, low_width, sharpness, floor,
    )  # fmt: skip
    if PRESERVE:
        t = _gamut_scale(L, a, b)
        a = t * a
        b = t * b
    red, green, blue = _lab_to_linear(L, a, b)
    red = _encode(red, LARGEST)
    green = _encode(green, LARGEST)
    blue = _encode(blue, LARGEST)
    to = rgb_ptr.dtype.element_ty
    if INTERLEAVED:  # as rows of four samples, the last masked off: see _store of lab.py
        samples = tl.join(tl.join(red, blue), tl.join(green, green)).reshape(BLOCK, 4)
        c = tl.arange(0, 4)
        at = rgb_ptr + (image * pixels + row + x)[:, None] * 3 + c[None, :]
        tl.store(at, samples.to(to), mask=inside[:, None] & (c < 3)[None, :])
    else:
        first = rgb_ptr + image * pixels * 3 + row + x
        second = first + pixels  # plane after plane: 2 * pixels could exceed 32 bits
        tl.store(first, red.to(to), mask=inside)
        tl.store(second, green.to(to), mask=inside)
        tl.store(second + pixels, blue.to(to), mask=inside)


# --- to the chroma planes of a video frame --------------------------------------------------------------------------


@triton.jit
def _grey_lightness(y):
    """L of the grey with luma y, in [0, 100]."""
    return _between(116 * _f(_to_linear(_between(y, 0.0, 1.0))) - 16, 0.0, 100.0)


@triton.jit
def _unclipped_rgb(L, a, b, rx, ry, rz, gx, gy, gz, bx, by, bz):
    fy = (L + 16) * (1 / 116)
    x = _f_inverse(fy + a * 0.002)
    y = _f_inverse(fy)
    z = _f_inverse(fy - b * 0.005)
    return (
        _from_linear(x * rx + y * ry + z * rz),
        _from_linear(x * gx + y * gy + z * gz),
        _from_linear(x * bx + y * by + z * bz),
    )


@triton.jit
def _room(difference, y):
    """The share of the chroma that keeps a channel, `difference` above the luma y, inside [0, 1]."""
    bound = tl.where(difference > 0, 1 - y, -y)
    t = _between(bound / tl.where(difference == 0, 1.0, difference), 0.0, 1.0)
    return tl.where(difference == 0, 1.0, t)


@triton.jit
def _level(x, middle, largest):
    """nan is neutral."""
    return tl.where(x == x, _between(x, 0.0, largest), middle).to(tl.int32)


@triton.jit
def render_uv_kernel(
    ab_ptr, guide_ptr, luma_ptr, u_ptr, v_ptr, rows_at_ptr, rows_beyond_ptr, columns_at_ptr, columns_beyond_ptr,
    across, down, height, width, low_height, low_width, luma_height, luma_width, luma_row, luma_image,
    sharpness, floor, black, scale, red, blue, rx, ry, rz, gx, gy, gz, bx, by, bz, of_u, of_v, middle, largest,
    DOWN: tl.constexpr, BEFORE_DOWN: tl.constexpr, ACROSS: tl.constexpr, BEFORE_ACROSS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, y, x, inside = _tile(across, down, height, width, COLUMNS, BLOCK)

    # luma at the chroma samples: a mean of two, or (1 2 1) / 4 with the one before; repeated at the border
    luma = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(-BEFORE_DOWN, DOWN):
        share_down = (1.0 if DOWN == 1 else 0.5) if k == 0 else (0.25 if BEFORE_DOWN else 0.5)
        row = tl.minimum(tl.maximum(y * DOWN + k, 0), luma_height - 1).to(tl.int64)
        from_row = luma_ptr + image * luma_image + row * luma_row
        for m in tl.static_range(-BEFORE_ACROSS, ACROSS):
            share_across = (1.0 if ACROSS == 1 else 0.5) if m == 0 else (0.25 if BEFORE_ACROSS else 0.5)
            column = tl.minimum(tl.maximum(x * ACROSS + m, 0), luma_width - 1)
            luma += tl.load(from_row + column).to(tl.float32) * (share_down * share_across)
    luma = (luma - black) * scale

    grey = _grey_lightness(luma)
    a, b = _upsample(
        ab_ptr, guide_ptr, rows_at_ptr, rows_beyond_ptr, columns_at_ptr, columns_beyond_ptr, image, y, x, inside, grey,
        low_height, low_width, sharpness, floor,
    )  # fmt: skip
    green = 1 - red - blue
    L = grey
    for _ in range(2):
        r, g, bl = _unclipped_rgb(L, a, b, rx, ry, rz, gx, gy, gz, bx, by, bz)
        own = _between(r, 0.0, 1.0) * red + _between(g, 0.0, 1.0) * green + _between(bl, 0.0, 1.0) * blue
        L = _between(L + grey - _grey_lightness(own), 0.0, 100.0)
    r, g, bl = _unclipped_rgb(L, a, b, rx, ry, rz, gx, gy, gz, bx, by, bz)
    own = r * red + g * green + bl * blue
    luma = _between(luma, 0.0, 1.0)
    t0 = _room(r - own, luma)
    t1 = _room(g - own, luma)
    t2 = _room(bl - own, luma)
    t = tl.where(t0 < t1, t0, t1)
    t = tl.where(t < t2, t, t2)
    row = (image * height + y) * width
    u = _level(t * (bl - own) * of_u + middle, middle, largest)
    v = _level(t * (r - own) * of_v + middle, middle, largest)
    tl.store(u_ptr + row + x, u.to(u_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + row + x, v.to(v_ptr.dtype.element_ty), mask=inside)


@triton.jit
def look_up_kernel(samples_ptr, table_ptr, out_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = i < n - start
    sample = tl.load(samples_ptr + start + i, mask=inside, other=0).to(tl.int32)
    tl.store(out_ptr + start + i, tl.load(table_ptr + sample), mask=inside)


# --- launches: all tensors but the luma are contiguous --------------------------------------------------------------


def render(
    ab: Tensor, guide: Tensor, L: Tensor, places: Places, sharpness: float, floor: float, dtype: torch.dtype,
    preserve_lightness: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    batch, _, height, width = L.shape
    shape = (batch, height, width, 3) if channels_last else (batch, 3, height, width)
    rgb = L.new_empty(shape, dtype=dtype)
    _launch(
        render_kernel, (batch, height, width), (ab, guide, L, rgb, *places), (height * width, *ab.shape[2:]),
        (sharpness, floor),
        LARGEST=LEVELS.get(dtype, 0), PRESERVE=preserve_lightness, INTERLEAVED=channels_last,
    )  # fmt: skip
    return rgb


def render_uv(
    ab: Tensor, guide: Tensor, luma: Tensor, places: Places, sharpness: float, floor: float, yuv: YuvFormat
) -> tuple[Tensor, Tensor]:
    """Samples of a row of `luma` are neighbours."""
    batch, _, height, width = luma.shape
    size = yuv.chroma_size(height, width)
    u, v = (luma.new_empty(batch, 1, *size) for _ in range(2))
    red, _, blue = yuv.luma_weights
    (down, across), (on_row, on_column) = yuv.steps, yuv.cosited
    numbers = (
        sharpness, floor, float(yuv.black), 1 / yuv.luma_span, red, blue, *(m for row in yuv.xyz_to_rgb for m in row),
        yuv.chroma_span / (2 * (1 - blue)), yuv.chroma_span / (2 * (1 - red)), (1 << (yuv.bits - 1)) + 0.5,
        float((1 << yuv.bits) - 1),
    )  # fmt: skip
    _launch(
        render_uv_kernel, (batch, *size), (ab, guide, luma, u, v, *places),
        (*ab.shape[2:], height, width, luma.stride(2), luma.stride(0)), numbers,
        DOWN=down, BEFORE_DOWN=int(down == 2 and on_row), ACROSS=across, BEFORE_ACROSS=int(across == 2 and on_column),
    )  # fmt: skip
    return u, v


def look_up(samples: Tensor, table: Tensor) -> Tensor:
    out = samples.new_empty(samples.shape, dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(out):
            look_up_kernel[(triton.cdiv(out.numel(), LOOK_UP),)](samples, table, out, out.numel(), BLOCK=LOOK_UP)
    return out


def _launch(kernel, result, tensors, sizes, numbers, **constants) -> None:
    batch, height, width = result
    if batch * height * width == 0:
        return
    columns = COLUMNS[0] if width <= COLUMNS[0] else COLUMNS[1] if width <= 2 * COLUMNS[1] else COLUMNS[2]
    across, down = triton.cdiv(width, columns), triton.cdiv(height, BLOCK // columns)
    with torch.cuda.device_of(tensors[0]):
        kernel[(batch * across * down,)](
            *tensors, across, down, height, width, *sizes, *numbers,
            **constants, COLUMNS=columns, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
