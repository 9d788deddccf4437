"""Rendering against OpenCV and our own reference: chroma at a quarter of the size and full lightness to RGB, or U, V.

`python -m benchmarks.ops.render [--size 1920x1080] [--device cpu|cuda] [--json FILE] [--quick]`
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fastcolor
from fastcolor.ops import _backend
from fastcolor.reference import render as reference

from .. import timing, work
from ..timing import Candidate
from .lab import SMALL, interleaved, on_cpu_only, photograph

LEVEL_BOUND = 1.0  # of 8-bit levels, against float64: rounding alone is 0.5
# Of 100,000 samples: where a line of one hue and lightness leaves sRGB and enters it again (four pixels of two million
# here), bisection in float32 and in float64 may find different borders.
EXCEPTIONS = 1
YUV = fastcolor.YuvFormat()
SATURATIONS = {"colours of a photograph": 0.3, "half of the colours outside sRGB": 1.5}

Peer = tuple[str, Callable[[], Callable[[int], object]]]


def scene(width: int, height: int, saturation: float) -> tuple[Tensor, Tensor, Tensor]:
    """ab [1, 2, h, w] and guide [1, 1, h, w] at a quarter, L [1, 1, H, W]."""
    lab = fastcolor.rgb_to_lab(photograph(width, height))[None]
    low = F.avg_pool2d(lab, 4, ceil_mode=True, count_include_pad=False)
    return low[:, 1:] * saturation, low[:, :1].contiguous(), lab[:, :1].contiguous()


def ours(op: str, backend: str, device: str, run: Callable[[int], object]) -> Callable[[], Callable[[int], object]]:
    """Builds a candidate that runs on a backend, or says why it cannot."""

    def build():
        reason = _backend.missing(backend) or _backend.runs_on(backend, torch.device(device))
        if reason or backend not in _backend.OFFERS[op]:
            raise ImportError(reason or f"{op} has no {backend} kernel")

        def run_asked_for(i: int):
            with fastcolor.use_backend(backend):
                return run(i)

        auto = _backend.choose(op, torch.device(device)).name
        return run if auto == backend else run_asked_for

    return build


def backends(device: str) -> tuple[str, ...]:
    return ("cuda", "triton") if device == "cuda" else ("cpp",)


def rotated(tensor: Tensor, moved: int, device: str) -> list[Tensor]:
    """Copies to take in turn, so that a GPU's cache holds none of them."""
    return [tensor, *(tensor.clone() for _ in range(timing.rotation(moved, device) - 1))]


def rgb_peers(inputs: tuple[Tensor, Tensor, Tensor], moved: int, device: str, quick: bool) -> Iterator[Peer]:
    ab, guide, L = inputs
    lights = rotated(L, moved, device)

    def render(gamut: str) -> Callable[[int], Tensor]:
        return lambda i: fastcolor.render(ab, guide, lights[i % len(lights)], gamut=gamut, channels_last=True)

    def opencv():
        on_cpu_only(device)
        import cv2

        cv2.setNumThreads(torch.get_num_threads())
        chroma, light = interleaved(ab[0]).numpy(), L[0, 0].numpy()

        def run(i: int):
            full = cv2.resize(chroma, light.shape[::-1], interpolation=cv2.INTER_LINEAR)
            return cv2.convertScaleAbs(cv2.cvtColor(np.dstack((light, full)), cv2.COLOR_Lab2RGB), alpha=255)

        return run

    def scikit_image():
        on_cpu_only(device)
        from skimage.color import lab2rgb
        from skimage.transform import resize

        chroma, light = interleaved(ab[0]).numpy(), L[0, 0].numpy()

        def run(i: int):
            full = resize(chroma, light.shape, order=1)
            return (lab2rgb(np.dstack((light, full))) * 255 + 0.5).astype(np.uint8)

        return run

    def kornia():
        from kornia.color import lab_to_rgb

        def run(i: int):
            full = F.interpolate(ab, L.shape[2:], mode="bilinear", align_corners=False)
            return lab_to_rgb(torch.cat((L, full), 1)).mul_(255).round_().to(torch.uint8)

        return run

    scale = tuple(a / b for a, b in zip(ab.shape[2:], L.shape[2:], strict=True))

    def upsampled(ab: Tensor, guide: Tensor, L: Tensor) -> Tensor:
        return reference.render(ab, guide, L, scale, 3.0, torch.uint8, "preserve_lightness", True)

    def compiled():
        torch._dynamo.reset()
        function = torch.compile(upsampled)
        function(ab, guide, L)
        return lambda i: function(ab, guide, L)

    for backend in backends(device):
        yield f"fastcolor {backend}, lightness kept", ours("render", backend, device, render("preserve_lightness"))
        yield f"fastcolor {backend}, clipped", ours("render", backend, device, render("clip"))
    yield "bilinear and OpenCV float32, clipped", opencv
    if not quick:
        yield "bilinear and scikit-image, clipped", scikit_image
        yield "bilinear and kornia, clipped", kornia
        yield "our reference, PyTorch eager", lambda: lambda i: upsampled(ab, guide, L)
        yield "our reference, torch.compile", compiled


def uv_peers(
    inputs: tuple[Tensor, Tensor, Tensor], luma: Tensor, moved: int, device: str, quick: bool
) -> Iterator[Peer]:
    ab, guide, _ = inputs
    frames = rotated(luma, moved, device)

    def render(i: int) -> tuple[Tensor, Tensor]:
        return fastcolor.render_uv(ab, guide, frames[i % len(frames)], YUV)

    def opencv():
        """Colour in RGB, and from there to planes of which the luma is thrown away: what others do."""
        on_cpu_only(device)
        import cv2

        cv2.setNumThreads(torch.get_num_threads())
        chroma, grey = interleaved(ab[0]).numpy(), luma[0, 0].numpy()

        def run(i: int):
            light = grey.astype(np.float32) * np.float32(100 / 255)
            full = cv2.resize(chroma, light.shape[::-1], interpolation=cv2.INTER_LINEAR)
            rgb = cv2.convertScaleAbs(cv2.cvtColor(np.dstack((light, full)), cv2.COLOR_Lab2RGB), alpha=255)
            return cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420)

        return run

    def eager():
        scale = tuple(a / b for a, b in zip(ab.shape[2:], luma.shape[2:], strict=True))
        return lambda i: reference.render_uv(ab, guide, luma, scale, 3.0, YUV)[0]

    for backend in backends(device):
        yield f"fastcolor {backend}", ours("render_uv", backend, device, render)
    yield "OpenCV, through RGB", opencv
    if not quick:
        yield "our reference, PyTorch eager", eager


def table(
    title: str, moved: int, operations: int, peers: Iterator[Peer], exact: dict[str, Tensor], options
) -> list[dict]:
    """`exact` has what candidates of ours must give, by how their names end; they are checked before they are timed."""
    candidates = [timing.plain_copy(moved, options.device)]
    for name, build in peers:
        candidate = Candidate(name, None, ours=name.startswith("fastcolor"))
        candidates.append(candidate)
        try:
            candidate.run = build()
        except Exception as error:  # no kernel, a peer that is not there, no compiler, or one that fails
            candidate.why_not = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            continue
        expected = next((e for ending, e in exact.items() if name.endswith(ending)), None)
        if candidate.ours and expected is not None:
            result = candidate.run(0)
            planes = torch.cat(result) if isinstance(result, tuple) else result
            off = (planes.cpu().double() - expected).abs().flatten()
            candidate.error = off.topk(1 + EXCEPTIONS * off.numel() // 100_000).values[-1].item()
            if not candidate.error <= LEVEL_BOUND:
                candidate.run, candidate.why_not = None, f"off by {candidate.error:.3g} levels, more than {LEVEL_BOUND}"
    able = [c for c in candidates if c.run]
    calls = max(timing.rotation(moved, options.device), 8 if moved > 1e7 else 50)
    times = timing.measure(able, options.device, rounds=3 if options.quick else 11, calls=calls)
    context = {
        "title": title,
        "op": "render_uv" if "U, V" in title else "render",
        "error_unit": "levels, but for 1 sample in 100,000",
        "oracle": "our reference in float64",
    }
    rows = timing.compare([timing.row(c, times.get(c.name), moved, operations, **context) for c in candidates])
    timing.show(rows, title)
    return rows


def benchmark(width: int, height: int, options) -> list[dict]:
    rows, pixels = [], width * height
    for kind, saturation in SATURATIONS.items():
        inputs = scene(width, height, saturation)
        scale = tuple(a / b for a, b in zip(inputs[0].shape[2:], (height, width), strict=True))
        on_device = tuple(x.to(options.device) for x in inputs)
        double = [x.double() for x in on_device]
        exact = {
            ending: (reference.render(*double, scale, 3.0, torch.float64, gamut, True) * 255).cpu()
            for ending, gamut in (("kept", "preserve_lightness"), ("clipped", "clip"))
        }
        title = f"render, {width}×{height}, {kind}: float32 lightness → uint8 RGB"
        moved = pixels * (4 + 3) + 4 * inputs[0].numel() * 3 // 2
        peers = rgb_peers(on_device, moved, options.device, options.quick)
        rows += table(title, moved, work.render(pixels), peers, exact, options)
    inputs = scene(width, height, 0.3)
    luma = (fastcolor.lab_to_rgb(F.pad(inputs[2][0], (0, 0, 0, 0, 0, 2)))[:1][None] * 219 + 16).to(torch.uint8)
    u_and_v = torch.cat(reference.render_uv(*(x.double() for x in inputs[:2]), luma, scale, 3.0, YUV)).double()
    on_device = tuple(x.to(options.device) for x in inputs)
    title = f"render to U, V, {width}×{height}, 4:2:0, 8 bits"
    moved = pixels * 3 // 2 + 4 * inputs[0].numel() * 3 // 2
    peers = uv_peers(on_device, luma.to(options.device), moved, options.device, options.quick)
    rows += table(title, moved, work.render_uv(u_and_v.numel() // 2, pixels), peers, {"": u_and_v}, options)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(
        "render", __doc__, "1920x1080, on CUDA 3840x2160", "few samples, no reference, no second size"
    )
    options = timing.parse(parser, arguments)
    size = options.size or timing.PICTURE["quick" if options.quick else options.device]
    record, rows = timing.machine(options.device, options.commit), []
    for width, height in [size] if options.quick else [size, *SMALL]:
        rows += benchmark(width, height, options)
    return timing.finish("render", options, record, rows)


if __name__ == "__main__":
    sys.exit(main())
