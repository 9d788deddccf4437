"""RGB ↔ CIE L*a*b*. The formulas are in fastcolor.reference.lab, the kernels in fastcolor/kernels/*/lab.*."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcolor.kernels.memory import SAMPLE, channels
from fastcolor.ops import _backend
from fastcolor.reference import lab as reference

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.uint16)
_GAMUTS = ("clip", "preserve_lightness")

for _name in ("rgb_to_lab", "lab_to_rgb"):
    _backend.offer(_name, "cuda", "triton", "cpp")


# --- the boundary that torch.compile sees; behind it are real tensors only --------------------------------------------


def _launch_rgb_to_lab(rgb: Tensor, channels_last: bool, dtype: torch.dtype) -> Tensor:
    backend = _backend.choose("rgb_to_lab", rgb.device).name
    if backend == "reference":
        return reference.rgb_to_lab(rgb, channels_last, dtype).contiguous()
    if backend == "triton":
        return _triton().rgb_to_lab(rgb, channels_last, dtype)
    return _native(backend, "rgb_to_lab", channels_last, (rgb,), dtype)


def _launch_rgb_to_lab_backward(grad: Tensor, rgb: Tensor, channels_last: bool) -> Tensor:
    backend = _backend.choose("rgb_to_lab", rgb.device).name
    if backend == "reference":
        return _reference_gradient(lambda x: reference.rgb_to_lab(x, channels_last), rgb, grad)
    if backend == "triton":
        return _triton().rgb_to_lab_backward(grad, rgb, channels_last)
    return _native(backend, "rgb_to_lab_backward", channels_last, (grad, rgb), rgb.dtype)


def _launch_lab_to_rgb(lab: Tensor, channels_last: bool, dtype: torch.dtype, preserve_lightness: bool) -> Tensor:
    backend = _backend.choose("lab_to_rgb", lab.device).name
    if backend == "reference":
        gamut = _GAMUTS[preserve_lightness]
        return reference.lab_to_rgb(lab, channels_last, dtype, gamut).contiguous()
    if backend == "triton":
        return _triton().lab_to_rgb(lab, channels_last, dtype, preserve_lightness)
    return _native(backend, "lab_to_rgb", channels_last, (lab,), dtype, preserve_lightness)


def _launch_lab_to_rgb_backward(grad: Tensor, lab: Tensor, channels_last: bool, preserve_lightness: bool) -> Tensor:
    backend = _backend.choose("lab_to_rgb", lab.device).name
    if backend == "reference":
        gamut = _GAMUTS[preserve_lightness]
        return _reference_gradient(lambda x: reference.lab_to_rgb(x, channels_last, gamut=gamut), lab, grad)
    if backend == "triton":
        return _triton().lab_to_rgb_backward(grad, lab, channels_last, preserve_lightness)
    return _native(backend, "lab_to_rgb_backward", channels_last, (grad, lab), lab.dtype, preserve_lightness)


def _native(
    backend: str, name: str, channels_last: bool, inputs: tuple[Tensor, ...], dtype: torch.dtype, *options: bool
) -> Tensor:
    """Calls a C++ or CUDA kernel, which share their arguments but for the last: threads, or a stream. Every type is
    read and written as it is, but for float64, which the kernels do not know.
    """
    views = [channels(x if x.dtype in SAMPLE else x.float(), channels_last) for x in inputs]
    first = inputs[0]
    result = first.new_empty(first.shape, dtype=dtype if dtype in SAMPLE else torch.float32)
    planes = result.data_ptr(), SAMPLE[result.dtype], channels_last
    arguments = (*(v.planes for v in views), planes, *options, views[0].images, views[0].pixels)
    if backend == "cpp":
        getattr(_backend.native("_cpu"), name)(*arguments, torch.get_num_threads())
    else:
        with _backend.stream(first.device) as stream:
            getattr(_backend.native("_cuda"), name)(*arguments, stream)
    return result if result.dtype == dtype else result.to(dtype)


def _triton():
    from fastcolor.kernels.triton import lab  # triton is optional

    return lab


def _reference_gradient(function, x: Tensor, grad: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x, grad)[0].contiguous()


_library = torch.library.Library("fastcolor", "FRAGMENT")
for _schema, _launch, _fake in (
    (
        "rgb_to_lab(Tensor rgb, bool channels_last, ScalarType dtype) -> Tensor",
        _launch_rgb_to_lab,
        lambda rgb, channels_last, dtype: rgb.new_empty(rgb.shape, dtype=dtype),
    ),
    (
        "rgb_to_lab_backward(Tensor grad, Tensor rgb, bool channels_last) -> Tensor",
        _launch_rgb_to_lab_backward,
        lambda grad, rgb, channels_last: rgb.new_empty(rgb.shape),
    ),
    (
        "lab_to_rgb(Tensor lab, bool channels_last, ScalarType dtype, bool preserve_lightness) -> Tensor",
        _launch_lab_to_rgb,
        lambda lab, channels_last, dtype, preserve_lightness: lab.new_empty(lab.shape, dtype=dtype),
    ),
    (
        "lab_to_rgb_backward(Tensor grad, Tensor lab, bool channels_last, bool preserve_lightness) -> Tensor",
        _launch_lab_to_rgb_backward,
        lambda grad, lab, channels_last, preserve_lightness: lab.new_empty(lab.shape),
    ),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _launch, _device)
    torch.library.register_fake(f"fastcolor::{_name}", _fake, lib=_library)

# Alone they drop gradients: callers go through the functions below.
_rgb_to_lab = torch.ops.fastcolor.rgb_to_lab.default
_rgb_to_lab_backward = torch.ops.fastcolor.rgb_to_lab_backward.default
_lab_to_rgb = torch.ops.fastcolor.lab_to_rgb.default
_lab_to_rgb_backward = torch.ops.fastcolor.lab_to_rgb_backward.default


class _RgbToLab(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rgb: Tensor, channels_last: bool, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(rgb)
        ctx.channels_last = channels_last
        return _rgb_to_lab(rgb, channels_last, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (rgb,) = ctx.saved_tensors
        return _rgb_to_lab_backward(grad, rgb, ctx.channels_last), None, None


class _LabToRgb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lab: Tensor, channels_last: bool, dtype: torch.dtype, preserve_lightness: bool) -> Tensor:
        ctx.save_for_backward(lab)
        ctx.options = channels_last, preserve_lightness
        return _lab_to_rgb(lab, channels_last, dtype, preserve_lightness)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (lab,) = ctx.saved_tensors
        return _lab_to_rgb_backward(grad, lab, *ctx.options), None, None, None


# --- public -----------------------------------------------------------------------------------------------------------


def rgb_to_lab(rgb: Tensor, *, channels_last: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """sRGB to CIE 1976 L*a*b* (D65, 2 degree observer), differentiable.

    sRGB transfer of IEC 61966-2-1, f of CIE 15:2004 section 8.2.1.1, constants of scikit-image. On all 16,777,216 8-bit
    colours the kernels differ from float64 by less than 1e-3.

    Args:
        rgb: [..., 3, H, W], or [..., H, W, 3] with `channels_last`: uint8 (0..255), uint16 (0..65535) or floating
            (0..1; values beyond, up to ±1e3, are extended by the same formulas). Planar and interleaved memory are both
            read in place.
        channels_last: where the channels are.
        dtype: floating type of the result; that of a floating `rgb`, else float32.

    Returns:
        Lab in the shape of `rgb`: L in [0, 100], a and b about [-108, 108]. float64 input, or a float64 result, is
        computed in float64, on the reference; all else in float32.

    Raises:
        TypeError: `rgb` is not a tensor or of another type. ValueError: its shape has no 3 channels.
        BackendError: a backend was asked for that cannot run here.
    """
    _check_channels("rgb", rgb, channels_last, (*_INTEGERS, *_FLOATS))
    dtype = _check_dtype(dtype or (rgb.dtype if rgb.is_floating_point() else torch.float32), _FLOATS)
    if _on_reference("rgb_to_lab", rgb, rgb.dtype, dtype):
        return reference.rgb_to_lab(rgb, channels_last, dtype)
    if rgb.requires_grad and torch.is_grad_enabled():
        return _RgbToLab.apply(rgb, channels_last, dtype)
    return _rgb_to_lab(rgb, channels_last, dtype)


def lab_to_rgb(
    lab: Tensor, *, channels_last: bool = False, dtype: torch.dtype | None = None, gamut: str = "clip"
) -> Tensor:
    """CIE 1976 L*a*b* (D65, 2 degree observer) to sRGB, differentiable for floating results.

    Args:
        lab: floating [..., 3, H, W], or [..., H, W, 3] with `channels_last`.
        channels_last: where the channels are.
        dtype: torch.uint8 (0..255), torch.uint16 (0..65535), both rounded, or a floating type (0..1); that of `lab` if
            left out.
        gamut: what becomes of colours outside sRGB. "clip" cuts each channel, which changes lightness and hue;
            "preserve_lightness" scales (a, b) towards 0, at the same L and hue, until the colour is inside.

    Returns:
        sRGB in the shape of `lab`. float64 input is computed in float64, on the reference; all else in float32.
        nan becomes 0 in integers, and stays nan in floating results.

    Raises:
        TypeError: `lab` is not a floating tensor, or `dtype` of another type. ValueError: no 3 channels, or an unknown
        gamut. BackendError: a backend was asked for that cannot run here.
    """
    _check_channels("lab", lab, channels_last, _FLOATS)
    dtype = _check_dtype(dtype or lab.dtype, (*_INTEGERS, *_FLOATS))
    if gamut not in _GAMUTS:
        raise ValueError(f"gamut must be one of {', '.join(_GAMUTS)}; got {gamut!r}")
    if _on_reference("lab_to_rgb", lab, lab.dtype):
        return reference.lab_to_rgb(lab, channels_last, dtype, gamut)
    preserve_lightness = gamut == "preserve_lightness"
    if lab.requires_grad and torch.is_grad_enabled() and dtype not in _INTEGERS:
        return _LabToRgb.apply(lab, channels_last, dtype, preserve_lightness)
    return _lab_to_rgb(lab, channels_last, dtype, preserve_lightness)


def _on_reference(op: str, tensor: Tensor, *types: torch.dtype) -> bool:
    """No op, so that torch.compile fuses the formulas with their neighbours."""
    if tensor.device.type not in ("cpu", "cuda") or _backend.forced()[:1] == ("reference",):
        return True
    if torch.float64 in types:
        _backend.left_to_reference(op, tensor.device, _backend.FLOAT64)
    return torch.float64 in types


def _check_channels(name: str, tensor: Tensor, channels_last: bool, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be of {', '.join(str(d) for d in dtypes)}; got {tensor.dtype}")
    if tensor.ndim < 3 or tensor.shape[-1 if channels_last else -3] != 3:
        shape = "[..., H, W, 3]" if channels_last else "[..., 3, H, W]"
        raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")


def _check_dtype(dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> torch.dtype:
    if dtype not in dtypes:
        raise TypeError(f"dtype must be one of {', '.join(str(d) for d in dtypes)}; got {dtype}")
    return dtype
