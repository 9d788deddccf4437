"""Rendering: chroma and full-size lightness to RGB, or to the chroma planes of a video frame. The formulas are in
fastcolor.reference.render, the kernels in fastcolor/kernels/*/render.*.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fastcolor.kernels.memory import SAMPLE, STORAGE, float32
from fastcolor.ops import _backend
from fastcolor.ops.lab import _FLOATS, _GAMUTS, _INTEGERS, _check_dtype
from fastcolor.reference import render as reference
from fastcolor.yuv import YuvFormat

for _name in ("render", "render_uv", "luma_to_lightness"):
    _backend.offer(_name, "cuda", "triton", "cpp")


# --- the boundary that torch.compile sees; behind it are real tensors only --------------------------------------------


def _launch_render(
    ab: Tensor, guide: Tensor, L: Tensor, scale_y: float, scale_x: float, sigma_light: float, dtype: torch.dtype,
    preserve_lightness: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    scale = scale_y, scale_x
    backend = _backend.choose("render", L.device).name
    if backend == "reference":
        gamut = _GAMUTS[preserve_lightness]
        return reference.render(ab, guide, L, scale, sigma_light, dtype, gamut, channels_last).contiguous()
    ab, guide = _low(ab, guide, backend)
    light = (L if L.dtype in STORAGE else L.float()).contiguous()
    places = _places_of(L.shape[2:], scale, (1, 1), (0.5, 0.5), L.device)
    if backend == "triton":
        return _triton().render(
            ab, guide, light, places, _sharpness(sigma_light), reference.FLOOR, dtype, preserve_lightness, channels_last
        )
    rgb = _fake_render(ab, guide, L, *scale, sigma_light, dtype, preserve_lightness, channels_last)
    scene = _scene(ab, guide, L.shape[2:], places, sigma_light, backend)
    planes = rgb.data_ptr(), SAMPLE[dtype], channels_last
    arguments = scene, light.data_ptr(), SAMPLE[light.dtype], planes, preserve_lightness
    if backend == "cuda":
        with _backend.stream(L.device) as stream:
            _backend.native("_cuda").render(*arguments, stream)
    else:
        _backend.native("_cpu").render(*arguments)
    return rgb


def _low(ab: Tensor, guide: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The low-resolution planes as a backend reads them: contiguous, of one type."""
    if backend == "cpp" or ab.dtype != guide.dtype or ab.dtype not in STORAGE:
        ab, guide = float32(ab), float32(guide)
    return ab.contiguous(), guide.contiguous()


def _sharpness(sigma_light: float) -> float:
    return 0.5 * math.log2(math.e) / sigma_light**2


def _scene(ab: Tensor, guide: Tensor, size, places: tuple[Tensor, ...], sigma_light: float, backend: str):
    """RenderProblem of kernels/*/render.h. It points to the tensors, and does not keep them."""
    numbers = (
        ab.shape[0], *ab.shape[2:], *size, *(x.data_ptr() for x in places), _sharpness(sigma_light), reference.FLOOR
    )  # fmt: skip
    if backend == "cuda":
        return _backend.native("_cuda").RenderProblem(ab.data_ptr(), guide.data_ptr(), STORAGE[ab.dtype], *numbers)
    return _backend.native("_cpu").RenderProblem(ab.data_ptr(), guide.data_ptr(), *numbers, torch.get_num_threads())


def _launch_render_uv(
    ab: Tensor, guide: Tensor, luma: Tensor, scale_y: float, scale_x: float, sigma_light: float, subsampling: str,
    bits: int, matrix: str, full_range: bool, primaries: str, chroma_location: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    yuv = YuvFormat(subsampling, bits, matrix, full_range, primaries, chroma_location)
    scale = scale_y, scale_x
    backend = _backend.choose("render_uv", luma.device).name
    if backend == "reference":
        return reference.render_uv(ab, guide, luma, scale, sigma_light, yuv)
    height, width = luma.shape[2:]
    size = yuv.chroma_size(height, width)
    ab, guide = _low(ab, guide, backend)
    planes = luma if luma.stride(3) == 1 else luma.contiguous()
    places = _places_of(size, scale, yuv.steps, yuv.offsets, luma.device)
    if backend == "triton":
        return _triton().render_uv(ab, guide, planes, places, _sharpness(sigma_light), reference.FLOOR, yuv)
    u, v = (luma.new_empty(luma.shape[0], 1, *size) for _ in range(2))
    if luma.numel() == 0:
        return u, v
    # on the host, also for the CUDA kernels: they take it along in their arguments
    matrix = torch.tensor(yuv.xyz_to_rgb, dtype=torch.float32, device="cpu")
    red, _, blue = yuv.luma_weights
    arguments = (
        _scene(ab, guide, size, places, sigma_light, backend), *yuv.steps, *yuv.cosited, yuv.bits, yuv.black,
        yuv.luma_span, yuv.chroma_span, red, blue, matrix.data_ptr(), planes.data_ptr(), height, width,
        planes.stride(2), planes.stride(0), u.data_ptr(), v.data_ptr(),
    )  # fmt: skip
    if backend == "cuda":
        with _backend.stream(luma.device) as stream:
            _backend.native("_cuda").render_uv(*arguments, stream)
    else:
        _backend.native("_cpu").render_uv(*arguments)
    return u, v


def _launch_luma_to_lightness(luma: Tensor, bits: int, full_range: bool) -> Tensor:
    backend = _backend.choose("luma_to_lightness", luma.device).name
    if backend == "reference":
        return reference.luma_to_lightness(luma, bits, full_range)
    samples, table = luma.contiguous(), _lightness_table(bits, full_range, luma.device)
    if backend == "triton":
        return _triton().look_up(samples, table)
    L = luma.new_empty(luma.shape, dtype=torch.float32)
    arguments = samples.data_ptr(), bits > 8, table.data_ptr(), L.data_ptr(), L.numel()
    if backend == "cuda":
        with _backend.stream(luma.device) as stream:
            _backend.native("_cuda").look_up(*arguments, stream)
    else:
        _backend.native("_cpu").look_up(*arguments, torch.get_num_threads())
    return L


def _triton():
    from fastcolor.kernels.triton import render  # triton is optional

    return render


# Tables are made on the CPU, and kept where they are used: only the first call for a size waits for a copy.


def _places_of(size, scale, steps, offsets, device: torch.device) -> tuple[Tensor, ...]:
    """Rows and columns, where they are nearest and how far beyond: four tables."""
    tables = []
    for n, s, step, offset in zip(size, scale, steps, offsets, strict=True):
        tables += _places(n, s, step, offset, device)
    return tuple(tables)


@lru_cache(maxsize=256)
def _places(size: int, scale: float, step: int, offset: float, device: torch.device) -> tuple[Tensor, Tensor]:
    at, beyond = reference.nearest_low(size, scale, step, offset, torch.device("cpu"))
    return at.to(device), beyond.float().to(device)


@lru_cache(maxsize=64)
def _lightness_table(bits: int, full_range: bool, device: torch.device) -> Tensor:
    """[256 or 65536]: every value that a sample may have, also beyond its bits."""
    every = torch.arange(256 if bits == 8 else 65536, device="cpu")
    return reference.luma_to_lightness(every, bits, full_range, torch.float64).float().to(device)


def _fake_render(ab, guide, L, scale_y, scale_x, sigma_light, dtype, preserve_lightness, channels_last):
    batch, _, height, width = L.shape
    return L.new_empty((batch, height, width, 3) if channels_last else (batch, 3, height, width), dtype=dtype)


def _fake_render_uv(
    ab, guide, luma, scale_y, scale_x, sigma_light, subsampling, bits, matrix, full_range, primaries, chroma_location
):
    size = YuvFormat(subsampling).chroma_size(*luma.shape[2:])
    return tuple(luma.new_empty(luma.shape[0], 1, *size) for _ in range(2))


_library = torch.library.Library("fastcolor", "FRAGMENT")
for _schema, _launch, _fake in (
    (
        "render(Tensor ab, Tensor guide, Tensor L, float scale_y, float scale_x, float sigma_light, ScalarType dtype, "
        "bool preserve_lightness, bool channels_last) -> Tensor",
        _launch_render,
        _fake_render,
    ),
    (
        "render_uv(Tensor ab, Tensor guide, Tensor luma, float scale_y, float scale_x, float sigma_light, "
        "str subsampling, int bits, str matrix, bool full_range, str primaries, str chroma_location) "
        "-> (Tensor, Tensor)",
        _launch_render_uv,
        _fake_render_uv,
    ),
    (
        "luma_to_lightness(Tensor luma, int bits, bool full_range) -> Tensor",
        _launch_luma_to_lightness,
        lambda luma, bits, full_range: luma.new_empty(luma.shape, dtype=torch.float32),
    ),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _launch, _device)
    torch.library.register_fake(f"fastcolor::{_name}", _fake, lib=_library)

_render = torch.ops.fastcolor.render.default
_render_uv = torch.ops.fastcolor.render_uv.default
_luma_to_lightness = torch.ops.fastcolor.luma_to_lightness.default


# --- public -----------------------------------------------------------------------------------------------------------


def render(
    ab: Tensor,  # [B, 2, h, w]
    guide: Tensor,  # [B, 1, h, w]
    L: Tensor,  # [B, 1, H, W]
    *,
    scale: tuple[float, float] | None = None,
    sigma_light: float = 3.0,
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
        sRGB [B, 3, H, W], or [B, H, W, 3] with `channels_last`. The reference computes it for float64, and where a
        gradient is wanted of a floating result; else the kernels do, in float32. nan in guide or ab makes nan of the
        pixels near it: 0 in integers.

    Raises:
        TypeError: `dtype` is another type. ValueError: shapes that do not belong together, or an option out of range.
        BackendError: a backend was asked for that does not take these types, or gradients.
    """
    _check_planes(ab, guide, "L", L, sigma_light)
    if not L.is_floating_point():
        raise ValueError(f"L must be floating of shape [B, 1, H, W], got {L.dtype} {list(L.shape)}")
    _check_dtype(dtype, (*_INTEGERS, *_FLOATS))
    if gamut not in _GAMUTS:
        raise ValueError(f"gamut must be one of {', '.join(_GAMUTS)}; got {gamut!r}")
    scale = _scale(scale, ab, L)
    if _on_reference("render", dtype, ab, guide, L):
        return reference.render(ab, guide, L, scale, sigma_light, dtype, gamut, channels_last)
    return _render(ab, guide, L, *scale, sigma_light, dtype, gamut == "preserve_lightness", channels_last)


def render_uv(
    ab: Tensor,  # [B, 2, h, w]
    guide: Tensor,  # [B, 1, h, w]
    luma: Tensor,  # [B, 1, H, W]
    yuv: YuvFormat,
    *,
    scale: tuple[float, float] | None = None,
    sigma_light: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """The chroma planes that colour a video frame whose luma plane stays bit for bit as it is.

    Chroma is brought to the places of the frame's chroma samples along the edges of its lightness, as in `render`. The
    colour there has the a and b that were asked for and the luma that is there; where sRGB (or the format's primaries)
    has no such colour, (Cb, Cr) is scaled towards grey.

    Args:
        ab: [B, 2, h, w] colours at low resolution.
        guide: [B, 1, h, w] lightness at the same low resolution, in [0, 100].
        luma: [B, 1, H, W], uint8 for 8 bits, else uint16; rows may lie apart, as decoders leave them.
        yuv: the format of the planes.
        scale: low-resolution pixels per luma sample, (vertical, horizontal); (h/H, w/W) if left out.
        sigma_light: width in L units of the Gaussian of the lightness difference.

    Returns:
        U and V (Cb and Cr), [B, 1, ⌈H/down⌉, ⌈W/across⌉] each, of the type of `luma`. Not differentiable. Where a or b
        is nan, they are neutral.

    Raises:
        TypeError: `luma` has not the type of the format. ValueError: shapes that do not belong together, or an option
        out of range.
    """
    _check_planes(ab, guide, "luma", luma, sigma_light)
    if luma.dtype != yuv.dtype:
        raise TypeError(f"luma must be {yuv.dtype} for {yuv.bits} bits, got {luma.dtype}")
    scale = _scale(scale, ab, luma)
    if _on_reference("render_uv", luma.dtype, ab, guide, luma):
        return reference.render_uv(ab, guide, luma, scale, sigma_light, yuv)
    return _render_uv(
        ab, guide, luma, *scale, sigma_light, yuv.subsampling, yuv.bits, yuv.matrix, yuv.full_range, yuv.primaries,
        yuv.chroma_location,
    )  # fmt: skip


def luma_to_lightness(luma: Tensor, bits: int = 8, full_range: bool = True) -> Tensor:
    """The lightness L of grey samples: of a luma plane, or of a grey picture (8 or 16 bits, full range).

    Args:
        luma: integers of any shape, uint8 for 8 bits, else uint16.
        bits: of a sample, 8 to 16.
        full_range: as of `YuvFormat`.

    Returns:
        L float32 in the shape of `luma`, in [0, 100]; samples below black and above white are clipped.

    Raises:
        TypeError: `luma` has not the type of its bits. ValueError: `bits` out of range.
    """
    dtype = YuvFormat(bits=bits).dtype
    if not isinstance(luma, Tensor) or luma.dtype != dtype:
        raise TypeError(f"luma must be {dtype} for {bits} bits, got {getattr(luma, 'dtype', type(luma).__name__)}")
    if _on_reference("luma_to_lightness", luma.dtype, luma):
        return reference.luma_to_lightness(luma, bits, full_range)
    return _luma_to_lightness(luma, bits, full_range)


def _on_reference(op: str, dtype: torch.dtype, *tensors: Tensor) -> bool:
    """No op, so that torch.compile fuses the formulas with their neighbours and gradients flow."""
    device = tensors[-1].device
    if device.type not in ("cpu", "cuda") or _backend.forced()[:1] == ("reference",):
        return True
    if dtype == torch.float64 or any(t.dtype == torch.float64 for t in tensors):
        why = _backend.FLOAT64
    elif dtype.is_floating_point and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        why = "gradients are computed on the reference; torch.no_grad() does without"
    else:
        return False
    _backend.left_to_reference(op, device, why)
    return True


def _check_planes(ab: Tensor, guide: Tensor, name: str, full: Tensor, sigma_light: float) -> None:
    for plane, tensor, count in (("ab", ab, 2), ("guide", guide, 1), (name, full, 1)):
        low = tensor is not full
        if tensor.ndim != 4 or tensor.shape[1] != count or (low and not tensor.is_floating_point()):
            size = "h, w" if low else "H, W"
            raise ValueError(
                f"{plane} must be {'floating ' if low else ''}of shape [B, {count}, {size}], "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    if guide.shape[2:] != ab.shape[2:] or not ab.shape[0] == guide.shape[0] == full.shape[0]:
        raise ValueError(
            f"ab {list(ab.shape)}, guide {list(guide.shape)} and {name} {list(full.shape)} do not belong together: "
            "guide needs the size of ab, and all three the same batch"
        )
    if not ab.device == guide.device == full.device:
        raise ValueError(f"ab, guide and {name} must be on one device, got {ab.device}, {guide.device}, {full.device}")
    if not sigma_light > 0:
        raise ValueError(f"sigma_light must be positive, got {sigma_light}")
    if min(ab.shape[2:]) == 0 and full.numel():
        raise ValueError(f"ab must have at least one pixel, got {list(ab.shape)}")


def _scale(scale: tuple[float, float] | None, ab: Tensor, full: Tensor) -> tuple[float, float]:
    if scale is None:
        return ab.shape[2] / max(1, full.shape[2]), ab.shape[3] / max(1, full.shape[3])
    if len(scale) != 2 or not all(0 < s < float("inf") for s in scale):
        raise ValueError(f"scale must be two positive numbers, got {scale}")
    return float(scale[0]), float(scale[1])
