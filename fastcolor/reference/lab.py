"""RGB ↔ CIE L*a*b* in plain PyTorch: the definition that every kernel is tested against, in any floating type.

sRGB transfer of IEC 61966-2-1; matrix and D65 white (2 degree observer) are the constants of scikit-image, the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

# linear sRGB -> XYZ, and its inverse in full float64
RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
XYZ_TO_RGB = tuple(map(tuple, torch.tensor(RGB_TO_XYZ, dtype=torch.float64).inverse().tolist()))
WHITE = (0.95047, 1.0, 1.08883)
# f of CIE 15:2004, 8.2.1.1, in scikit-image's rounding of its constants: the two branches meet to 4e-6 in f
KNEE, INVERSE_KNEE, SLOPE, OFFSET = 0.008856, 0.2068966, 7.787, 16 / 116
LEVELS = {torch.uint8: 255, torch.uint16: 65535}
BISECTIONS = 24
# How far outside [0, 1] linear light may be that counts as inside sRGB. A colour on the border of sRGB that was rounded
# to float32 Lab is up to 2.6e-6 outside (of all 8-bit colours, and four million of 16 bits); as a colour outside it
# would be brought in to another border, where its line of one hue and lightness leaves sRGB twice. L moves by 0.003 at
# most.
GAMUT_TOLERANCE = 4e-6


def srgb_to_linear(c: Tensor) -> Tensor:
    """sRGB in [0, 1] to linear light; values outside are extended by the same two branches."""
    # clamped before pow: where() would otherwise send inf * 0 = nan back at 0
    power = ((c.clamp_min(0.04045) + 0.055) / 1.055).pow(2.4)
    return torch.where(c > 0.04045, power, c / 12.92)


def linear_to_srgb(c: Tensor) -> Tensor:
    """Linear light in [0, 1] to sRGB; values outside are extended by the same two branches."""
    power = 1.055 * c.clamp_min(0.0031308).pow(1 / 2.4) - 0.055
    return torch.where(c > 0.0031308, power, c * 12.92)


def lab_f(t: Tensor) -> Tensor:
    """The cube root, and below the knee about its tangent."""
    return torch.where(t > KNEE, t.clamp_min(KNEE).pow(1 / 3), t * SLOPE + OFFSET)


def lab_f_inverse(f: Tensor) -> Tensor:
    return torch.where(f > INVERSE_KNEE, f * f * f, (f - OFFSET) / SLOPE)


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Arithmetic is float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def rgb_to_lab(rgb: Tensor, channels_last: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """[..., 3, H, W] or [..., H, W, 3]; integers stand for [0, 1]. See `fastcolor.rgb_to_lab`."""
    dim = -1 if channels_last else -3
    c = rgb.to(torch.float64 if dtype == torch.float64 else working_dtype(rgb))
    if rgb.dtype in LEVELS:
        c = c / LEVELS[rgb.dtype]
    r, g, b = srgb_to_linear(c).unbind(dim)
    fx, fy, fz = (lab_f((m[0] * r + m[1] * g + m[2] * b) / white) for m, white in zip(RGB_TO_XYZ, WHITE, strict=True))
    lab = torch.stack((116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)), dim=dim)
    return lab.to(dtype or (rgb.dtype if rgb.is_floating_point() else torch.float32))


def lab_to_linear(L: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lab planes to linear sRGB planes, not clipped."""
    fy = (L + 16) / 116
    xyz = [w * lab_f_inverse(f) for w, f in zip(WHITE, (fy + a / 500, fy, fy - b / 200), strict=True)]
    r, g, b = (m[0] * xyz[0] + m[1] * xyz[1] + m[2] * xyz[2] for m in XYZ_TO_RGB)
    return r, g, b


def gamut_scale(L: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The largest t in [0, 1] such that (L, t a, t b) lies inside sRGB: chroma shrinks, lightness and hue stay.

    Bisection keeps t on the inside, to 2^-24; a Newton step on the bound that is crossed carries the gradient. L
    outside [0, 100] has no such t: 0 is given, and clipping does the rest.
    """

    def excess(t: Tensor) -> Tensor:  # > 0 outside; the largest of six distances to the bounds
        channels = torch.stack(lab_to_linear(L, t * a, t * b))
        return torch.maximum(channels.amax(0) - 1, -channels.amin(0))

    with torch.no_grad():
        inside = excess(torch.ones_like(L)) <= GAMUT_TOLERANCE
        low, high = torch.zeros_like(L), torch.ones_like(L)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            fits = excess(middle) <= GAMUT_TOLERANCE
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    if torch.is_grad_enabled() and (L.requires_grad or a.requires_grad or b.requires_grad):
        with torch.no_grad():
            slope = _excess_slope(L, a, b, low)
            moves = (slope > 1e-12) & (low > 0)
        # the value stays, the gradient is that of the implicit function: dt = -d(excess) / (d excess / dt)
        value = torch.where(moves, excess(low) / slope.clamp_min(1e-12), 0)
        low = low - (value - value.detach())
    return torch.where(inside, torch.ones_like(low), low)


def _excess_slope(L: Tensor, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """d excess / dt at t: the slope of the one channel that touches a bound."""
    fy = (L + 16) / 116
    fx, fz = fy + t * a / 500, fy - t * b / 200
    # of f's inverse: 3 f², or 1 / SLOPE below the knee
    of_x, of_z = (torch.where(f > INVERSE_KNEE, 3 * f * f, 1 / SLOPE) for f in (fx, fz))
    x, z = WHITE[0] * of_x * a / 500, -WHITE[2] * of_z * b / 200
    slopes = torch.stack([m[0] * x + m[2] * z for m in XYZ_TO_RGB])
    channels = torch.stack(lab_to_linear(L, t * a, t * b))
    most, least = channels.max(0), channels.min(0)
    above = most.values - 1 > -least.values
    at = torch.where(above, most.indices, least.indices)
    slope = slopes.gather(0, at[None])[0]
    return torch.where(above, slope, -slope)


def lab_to_rgb(
    lab: Tensor, channels_last: bool = False, dtype: torch.dtype | None = None, gamut: str = "clip"
) -> Tensor:
    """[..., 3, H, W] or [..., H, W, 3] floating Lab to sRGB. See `fastcolor.lab_to_rgb`."""
    dim = -1 if channels_last else -3
    L, a, b = lab.to(working_dtype(lab)).unbind(dim)
    if gamut == "preserve_lightness":
        t = gamut_scale(L, a, b)
        a, b = t * a, t * b
    rgb = linear_to_srgb(torch.stack(lab_to_linear(L, a, b), dim=dim)).clamp(0, 1)
    dtype = dtype or lab.dtype
    if dtype not in LEVELS:
        return rgb.to(dtype)
    # through int32: PyTorch has few kernels for uint16. nan becomes 0, as in the C++ kernels
    return (rgb.nan_to_num(0.0) * LEVELS[dtype] + 0.5).to(torch.int32).to(dtype)
