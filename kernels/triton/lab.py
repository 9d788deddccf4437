"""RGB ↔ CIE L*a*b* in Triton: one pass over memory. The formulas are in fastcolor.reference.lab."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastcolor.kernels.memory import channels
from fastcolor.kernels.triton.elementary import PTX
from torch import Tensor

from fastcolor.reference import lab as reference
from fastcolor.reference.lab import LEVELS, RGB_TO_XYZ, WHITE, XYZ_TO_RGB

BLOCK = 1024  # pixels of a program; with 8 warps four for each thread: 16-byte accesses in float32 planes
WARPS = 8

# Linear sRGB -> XYZ divided by the white point, and back. Always the right factor: in Triton's interpreter a constexpr
# on the left makes the product one too.
_XR, _XG, _XB = (tl.constexpr(m / WHITE[0]) for m in RGB_TO_XYZ[0])
_YR, _YG, _YB = (tl.constexpr(m / WHITE[1]) for m in RGB_TO_XYZ[1])
_ZR, _ZG, _ZB = (tl.constexpr(m / WHITE[2]) for m in RGB_TO_XYZ[2])
_RX, _RY, _RZ = (tl.constexpr(m * w) for m, w in zip(XYZ_TO_RGB[0], WHITE, strict=True))
_GX, _GY, _GZ = (tl.constexpr(m * w) for m, w in zip(XYZ_TO_RGB[1], WHITE, strict=True))
_BX, _BY, _BZ = (tl.constexpr(m * w) for m, w in zip(XYZ_TO_RGB[2], WHITE, strict=True))

_KNEE, _INVERSE_KNEE = tl.constexpr(reference.KNEE), tl.constexpr(reference.INVERSE_KNEE)
_SLOPE, _OFFSET = tl.constexpr(reference.SLOPE), tl.constexpr(reference.OFFSET)
_BISECTIONS = tl.constexpr(16)  # of the gamut scale: chroma to 2^-16 of itself
_TOLERANCE = tl.constexpr(reference.GAMUT_TOLERANCE)


# --- memory to planes and back --------------------------------------------------------------------------------------


@triton.jit
def _tile(blocks, pixels, BLOCK: tl.constexpr):
    """The image of this program, its first pixel (both int64), and how many are left from there."""
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    start = (program % blocks).to(tl.int64) * BLOCK
    return image, start, pixels - start


@triton.jit
def _load(ptr, image, start, left, pixels, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Three channels of a block in float32; 0 past the end. Planar [images, 3, pixels], or [images, pixels, 3]."""
    i = tl.arange(0, BLOCK)
    if INTERLEAVED:  # the three loads share their cache lines, so that memory is read once
        first = ptr + (image * pixels + start) * 3 + 3 * i
        second, third = first + 1, first + 2
    else:  # plane after plane: 2 * pixels could exceed 32 bits
        first = ptr + image * 3 * pixels + start + i
        second = first + pixels
        third = second + pixels
    inside = i < left
    x = tl.load(first, mask=inside, other=0).to(tl.float32)
    y = tl.load(second, mask=inside, other=0).to(tl.float32)
    z = tl.load(third, mask=inside, other=0).to(tl.float32)
    return x, y, z


@triton.jit
def _store(ptr, image, start, left, pixels, x, y, z, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    to = ptr.dtype.element_ty
    if INTERLEAVED:
        # As rows of four samples, the last masked off: neighbouring lanes write neighbouring samples. Three strided
        # stores would send each sector to the L2 cache three times.
        rows = tl.join(tl.join(x, z), tl.join(y, y)).reshape(BLOCK, 4)
        c = tl.arange(0, 4)
        at = ptr + (image * pixels + start) * 3 + 3 * i[:, None] + c[None, :]
        tl.store(at, rows.to(to), mask=(i < left)[:, None] & (c < 3)[None, :])
    else:
        first = ptr + image * 3 * pixels + start + i
        second = first + pixels
        third = second + pixels
        inside = i < left
        tl.store(first, x.to(to), mask=inside)
        tl.store(second, y.to(to), mask=inside)
        tl.store(third, z.to(to), mask=inside)


# --- pixels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _power(x, p):
    """x^p for 2^-20 <= x <= 2^20. Max relative error 3e-6 for |p log2 x| <= 12 (test_elementary_triton.py): log2 and
    exp2 err by 2^-22 each.
    """
    if PTX:  # three instructions; tl.log2 alone is some twenty, and would bound the kernels by arithmetic
        return tl.inline_asm_elementwise(
            "{.reg .f32 y; lg2.approx.ftz.f32 y, $1; mul.ftz.f32 y, y, $2; ex2.approx.ftz.f32 $0, y;}",
            "=f,f,f", [x, p], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.exp2(tl.log2(x) * p)


@triton.jit
def _inverse_cbrt(x):
    """x^(-1/3). Max relative error 3e-7 (test_elementary_triton.py): a Newton step, which needs no division, makes up
    for log2 and exp2.
    """
    z = _power(x, -1 / 3)
    return z + z * (1 - x * (z * z * z)) * (1 / 3)


@triton.jit
def _f(t):
    x = tl.where(t > _KNEE, t, 1.0)
    z = _inverse_cbrt(x)
    return tl.where(t > _KNEE, x * z * z, t * _SLOPE + _OFFSET)


@triton.jit
def _f_slope(t):
    z = _inverse_cbrt(tl.where(t > _KNEE, t, 1.0))
    return tl.where(t > _KNEE, z * z * (1 / 3), _SLOPE)


@triton.jit
def _f_inverse(f):
    return tl.where(f > _INVERSE_KNEE, f * f * f, (f - _OFFSET) * (1 / _SLOPE))


@triton.jit
def _f_inverse_slope(f):
    return tl.where(f > _INVERSE_KNEE, 3 * f * f, 1 / _SLOPE)


@triton.jit
def _to_linear(c):
    x = tl.where(c > 0.04045, c, 1.0)
    return tl.where(c > 0.04045, _power((x + 0.055) * (1 / 1.055), 2.4), c * (1 / 12.92))


@triton.jit
def _to_linear_slope(c):
    x = tl.where(c > 0.04045, c, 1.0)
    return tl.where(c > 0.04045, (2.4 / 1.055) * _power((x + 0.055) * (1 / 1.055), 1.4), 1 / 12.92)


@triton.jit
def _from_linear(c):
    x = tl.where(c > 0.0031308, c, 1.0)
    return tl.where(c > 0.0031308, 1.055 * _power(x, 1 / 2.4) - 0.055, c * 12.92)


@triton.jit
def _from_linear_slope(c):
    x = tl.where(c > 0.0031308, c, 1.0)
    return tl.where(c > 0.0031308, (1.055 / 2.4) * _power(x, 1 / 2.4 - 1), 12.92)


@triton.jit
def _rgb_to_xyz(r, g, b):
    return r * _XR + g * _XG + b * _XB, r * _YR + g * _YG + b * _YB, r * _ZR + g * _ZG + b * _ZB


@triton.jit
def _xyz_to_rgb(x, y, z):
    return x * _RX + y * _RY + z * _RZ, x * _GX + y * _GY + z * _GZ, x * _BX + y * _BY + z * _BZ


@triton.jit
def _lab_to_linear(L, a, b):
    fy = (L + 16) * (1 / 116)
    return _xyz_to_rgb(_f_inverse(fy + a * 0.002), _f_inverse(fy), _f_inverse(fy - b * 0.005))


@triton.jit
def _lab_to_linear_backward(L, a, b, grad_r, grad_g, grad_b):
    fy = (L + 16) * (1 / 116)
    x = (grad_r * _RX + grad_g * _GX + grad_b * _BX) * _f_inverse_slope(fy + a * 0.002)
    y = (grad_r * _RY + grad_g * _GY + grad_b * _BY) * _f_inverse_slope(fy)
    z = (grad_r * _RZ + grad_g * _GZ + grad_b * _BZ) * _f_inverse_slope(fy - b * 0.005)
    return (x + y + z) * (1 / 116), x * 0.002, z * -0.005


@triton.jit
def _excess(r, g, b):
    """How far linear light lies outside [0, 1]: the largest of the six distances, negative inside."""
    return tl.maximum(tl.maximum(tl.maximum(r, g), b) - 1, -tl.minimum(tl.minimum(r, g), b))


@triton.jit
def _gamut_scale(L, a, b):
    """The largest t in [0, 1] such that (L, t a, t b) is inside sRGB, by bisection; 0 for L outside [0, 100]."""
    red, green, blue = _lab_to_linear(L, a, b)
    outside = _excess(red, green, blue) > _TOLERANCE
    t = tl.full(L.shape, 1.0, tl.float32)
    # bisection costs some ten times a conversion: blocks that are wholly inside, as most are, go without
    if tl.max(outside.to(tl.int32)) > 0:
        low = tl.zeros_like(t)
        high = t
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            red, green, blue = _lab_to_linear(L, middle * a, middle * b)
            fits = _excess(red, green, blue) <= _TOLERANCE
            low = tl.where(fits, middle, low)
            high = tl.where(fits, high, middle)
        t = tl.where(outside, low, t)
    return t


@triton.jit
def _gamut_scale_backward(L, a, b, t, grad_L, grad_a, grad_b):
    """Gradient of (L, a, b) -> (L, t a, t b), given that of its result.

    t follows from the one bound that it touches: excess(L, t a, t b) = 0, so dt = -d(excess) / (d excess / dt).
    """
    red, green, blue = _lab_to_linear(L, t * a, t * b)
    most = tl.maximum(tl.maximum(red, green), blue)
    least = tl.minimum(tl.minimum(red, green), blue)
    above = most - 1 > -least
    bound = tl.where(above, most, least)
    sign = tl.where(above, 1.0, -1.0)
    first = red == bound
    second = (red != bound) & (green == bound)
    d_L, d_a, d_b = _lab_to_linear_backward(
        L, t * a, t * b, tl.where(first, sign, 0.0), tl.where(second, sign, 0.0), tl.where(first | second, 0.0, sign)
    )
    slope = d_a * a + d_b * b  # d excess / dt
    moves = (t < 1) & (t > 0) & (slope > 1e-12)
    along = tl.where(moves, (grad_a * a + grad_b * b) / tl.where(moves, slope, 1.0), 0.0)
    return grad_L - along * d_L, t * (grad_a - along * d_a), t * (grad_b - along * d_b)


@triton.jit
def _encode(c, LARGEST: tl.constexpr):
    """Linear light, clipped, to sRGB in [0, 1], or to levels up to LARGEST. nan stays nan, and becomes level 0."""
    c = _from_linear(tl.where(c < 0, 0.0, tl.where(c > 1, 1.0, c)))
    if LARGEST > 0:
        c = tl.where(c > 0, c, 0.0)
        c = (tl.where(c < 1, c, 1.0) * LARGEST + 0.5).to(tl.int32)
    return c


@triton.jit
def _encode_gradient(c, grad):
    """A clipped channel passes no gradient; at the very bounds it does, as torch.clamp has it."""
    return tl.where((c >= 0) & (c <= 1), grad * _from_linear_slope(c), 0.0)


# --- kernels: tensors are [images, 3, pixels], or [images, pixels, 3] where interleaved -----------------------------


@triton.jit
def rgb_to_lab_kernel(
    rgb_ptr, lab_ptr, blocks, pixels,
    SCALE: tl.constexpr, IN_INTERLEAVED: tl.constexpr, OUT_INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, start, left = _tile(blocks, pixels, BLOCK)
    r, g, b = _load(rgb_ptr, image, start, left, pixels, IN_INTERLEAVED, BLOCK)
    x, y, z = _rgb_to_xyz(_to_linear(r * SCALE), _to_linear(g * SCALE), _to_linear(b * SCALE))
    fx = _f(x)
    fy = _f(y)
    fz = _f(z)
    _store(lab_ptr, image, start, left, pixels, 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz), OUT_INTERLEAVED, BLOCK)


@triton.jit
def rgb_to_lab_backward_kernel(
    rgb_ptr, grad_lab_ptr, grad_rgb_ptr, blocks, pixels,
    IN_INTERLEAVED: tl.constexpr, GRAD_INTERLEAVED: tl.constexpr, OUT_INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, start, left = _tile(blocks, pixels, BLOCK)
    r, g, b = _load(rgb_ptr, image, start, left, pixels, IN_INTERLEAVED, BLOCK)
    grad_L, grad_a, grad_b = _load(grad_lab_ptr, image, start, left, pixels, GRAD_INTERLEAVED, BLOCK)
    x, y, z = _rgb_to_xyz(_to_linear(r), _to_linear(g), _to_linear(b))
    x = 500 * grad_a * _f_slope(x)
    y = (116 * grad_L - 500 * grad_a + 200 * grad_b) * _f_slope(y)
    z = -200 * grad_b * _f_slope(z)
    r = (x * _XR + y * _YR + z * _ZR) * _to_linear_slope(r)
    g = (x * _XG + y * _YG + z * _ZG) * _to_linear_slope(g)
    b = (x * _XB + y * _YB + z * _ZB) * _to_linear_slope(b)
    _store(grad_rgb_ptr, image, start, left, pixels, r, g, b, OUT_INTERLEAVED, BLOCK)


@triton.jit
def lab_to_rgb_kernel(
    lab_ptr, rgb_ptr, blocks, pixels,
    LARGEST: tl.constexpr, PRESERVE: tl.constexpr,
    IN_INTERLEAVED: tl.constexpr, OUT_INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, start, left = _tile(blocks, pixels, BLOCK)
    L, a, b = _load(lab_ptr, image, start, left, pixels, IN_INTERLEAVED, BLOCK)
    if PRESERVE:
        t = _gamut_scale(L, a, b)
        a = t * a
        b = t * b
    red, green, blue = _lab_to_linear(L, a, b)
    _store(
        rgb_ptr, image, start, left, pixels,
        _encode(red, LARGEST), _encode(green, LARGEST), _encode(blue, LARGEST), OUT_INTERLEAVED, BLOCK,
    )  # fmt: skip


@triton.jit
def lab_to_rgb_backward_kernel(
    lab_ptr, grad_rgb_ptr, grad_lab_ptr, blocks, pixels, PRESERVE: tl.constexpr,
    IN_INTERLEAVED: tl.constexpr, GRAD_INTERLEAVED: tl.constexpr, OUT_INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, start, left = _tile(blocks, pixels, BLOCK)
    L, a, b = _load(lab_ptr, image, start, left, pixels, IN_INTERLEAVED, BLOCK)
    grad_r, grad_g, grad_b = _load(grad_rgb_ptr, image, start, left, pixels, GRAD_INTERLEAVED, BLOCK)
    t = tl.full(L.shape, 1.0, tl.float32)
    if PRESERVE:
        t = _gamut_scale(L, a, b)
    red, green, blue = _lab_to_linear(L, t * a, t * b)
    d_L, d_a, d_b = _lab_to_linear_backward(
        L, t * a, t * b, _encode_gradient(red, grad_r), _encode_gradient(green, grad_g), _encode_gradient(blue, grad_b)
    )
    if PRESERVE:
        d_L, d_a, d_b = _gamut_scale_backward(L, a, b, t, d_L, d_a, d_b)
    _store(grad_lab_ptr, image, start, left, pixels, d_L, d_a, d_b, OUT_INTERLEAVED, BLOCK)


# --- launches -------------------------------------------------------------------------------------------------------


def rgb_to_lab(rgb: Tensor, channels_last: bool, dtype: torch.dtype) -> Tensor:
    lab = rgb.new_empty(rgb.shape, dtype=dtype)
    _launch(rgb_to_lab_kernel, (rgb,), lab, channels_last, SCALE=1 / LEVELS.get(rgb.dtype, 1))
    return lab


def rgb_to_lab_backward(grad: Tensor, rgb: Tensor, channels_last: bool) -> Tensor:
    grad_rgb = rgb.new_empty(rgb.shape)
    _launch(rgb_to_lab_backward_kernel, (rgb, grad), grad_rgb, channels_last)
    return grad_rgb


def lab_to_rgb(lab: Tensor, channels_last: bool, dtype: torch.dtype, preserve_lightness: bool) -> Tensor:
    rgb = lab.new_empty(lab.shape, dtype=dtype)
    _launch(lab_to_rgb_kernel, (lab,), rgb, channels_last, LARGEST=LEVELS.get(dtype, 0), PRESERVE=preserve_lightness)
    return rgb


def lab_to_rgb_backward(grad: Tensor, lab: Tensor, channels_last: bool, preserve_lightness: bool) -> Tensor:
    grad_lab = lab.new_empty(lab.shape)
    _launch(lab_to_rgb_backward_kernel, (lab, grad), grad_lab, channels_last, PRESERVE=preserve_lightness)
    return grad_lab


def _launch(kernel, inputs: tuple[Tensor, ...], out: Tensor, channels_last: bool, **constants) -> None:
    """Inputs are read where they are, planar or interleaved; `out` is contiguous."""
    if out.numel() == 0:
        return
    views = [channels(tensor, channels_last) for tensor in inputs]
    images, pixels = views[0].images, views[0].pixels
    if channels_last and all(view.interleaved for view in views):
        images, pixels = 1, images * pixels  # one long run: no part-filled program at the end of each image
    for name, view in zip(("IN_INTERLEAVED", "GRAD_INTERLEAVED"), views):  # noqa: B905, forward kernels have no gradient
        constants[name] = view.interleaved
    blocks = triton.cdiv(pixels, BLOCK)
    with torch.cuda.device_of(out):
        kernel[(images * blocks,)](
            *(view.tensor for view in views), out, blocks, pixels,
            **constants, OUT_INTERLEAVED=channels_last, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
