"""RGB ↔ Lab against a plain copy, OpenCV, kornia, scikit-image and our own reference.

`python -m benchmarks.ops.lab [--size 1920x1080] [--device cpu|cuda] [--json FILE] [--quick]`
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import fastcolor
from fastcolor.ops import _backend
from fastcolor.reference import lab as reference

from .. import timing, work
from ..timing import Candidate

LAB_BOUND = 1e-3  # of ours, against float64: else they are not timed
LEVEL_BOUND = 0.5 + 1e-3  # of 8-bit levels: rounding alone is 0.5
NARROW = (torch.uint16, torch.float16, torch.bfloat16)  # measured beside 8 bits
SMALL = [(64, 64), (256, 256)]  # where the overhead of the call rules

Peer = tuple[str, Callable[[], Callable[[int], object]]]


def photograph(width: int, height: int, seed: int = 0) -> Tensor:
    """[3, H, W] uint8 like a photograph: smooth areas of saturated colour, edges, and the noise of a sensor."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(2, height // 48), max(2, width // 48), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0]
    noise = torch.randn(3, height, width, generator=generator) * 3
    return ((smooth * 1.5 - 0.25) * 255 + noise).clamp(0, 255).to(torch.uint8)


def oracle() -> tuple[Callable, Callable, str]:
    """rgb -> Lab and back in float64 on numpy arrays [H, W, 3]: scikit-image, or our reference where it is missing."""
    try:
        from skimage import color
    except ImportError:

        def through(function):
            return lambda x: function(torch.from_numpy(x), channels_last=True).numpy()

        return through(reference.rgb_to_lab), through(reference.lab_to_rgb), "our reference in float64"
    return color.rgb2lab, color.lab2rgb, "scikit-image in float64"


def interleaved(planar: Tensor) -> Tensor:
    return planar.movedim(-3, -1).contiguous()


def as_interleaved(result: object) -> np.ndarray:
    """What a candidate gave, as [H, W, 3] in float64."""
    array = result.cpu().double().numpy() if isinstance(result, Tensor) else np.asarray(result, dtype=np.float64)
    array = array.reshape(array.shape[-3:])
    return array if array.shape[-1] == 3 else np.moveaxis(array, 0, -1)


# --- the candidates: each is built when its turn comes, and skipped by name where it cannot be ----------------------


def ours(convert: Callable, inputs: list[Tensor], device: str, **options) -> Iterator[Peer]:
    def on(backend: str, tensors: list[Tensor], channels_last: bool):
        def build():
            reason = _backend.missing(backend) or _backend.runs_on(backend, torch.device(device))
            if reason:
                raise ImportError(reason)

            def run(i: int):
                return convert(tensors[i % len(tensors)], channels_last=channels_last, **options)

            def run_asked_for(i: int):
                with fastcolor.use_backend(backend):
                    return run(i)

            auto = _backend.choose(convert.__name__, torch.device(device)).name
            return run if auto == backend else run_asked_for

        return build

    last = [interleaved(x) for x in inputs]
    for backend in ("cuda", "triton") if device == "cuda" else ("cpp",):
        yield f"fastcolor {backend}, planar", on(backend, inputs, False)
        yield f"fastcolor {backend}, interleaved", on(backend, last, True)


def references(function: Callable[[Tensor], Tensor], inputs: list[Tensor], quick: bool) -> Iterator[Peer]:
    def compiled():
        if quick:
            raise ImportError("left out by --quick")
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True)
        try:
            compiled(inputs[0])
        except Exception as error:  # no compiler, or one that fails
            raise ImportError(str(error).strip().splitlines()[0][:200]) from error
        return lambda i: compiled(inputs[i % len(inputs)])

    yield "our reference, PyTorch eager", lambda: lambda i: function(inputs[i % len(inputs)])
    yield "our reference, torch.compile", compiled


def on_cpu_only(device: str) -> None:
    if device != "cpu":
        raise ImportError("runs on the CPU only")


def rgb_to_lab_peers(inputs: list[Tensor], device: str) -> Iterator[Peer]:
    def opencv(from_bytes: bool):
        def build():
            on_cpu_only(device)
            import cv2

            cv2.setNumThreads(torch.get_num_threads())
            image = interleaved(inputs[0]).numpy()
            scaled = image.astype(np.float32) / 255
            if not from_bytes:
                return lambda i: cv2.cvtColor(scaled, cv2.COLOR_RGB2Lab)
            scale = np.float32(1 / 255)
            return lambda i: cv2.cvtColor(np.multiply(image, scale, dtype=np.float32), cv2.COLOR_RGB2Lab)

        return build

    def kornia():
        from kornia.color import rgb_to_lab

        return lambda i: rgb_to_lab(inputs[i % len(inputs)][None].float() / 255)

    def scikit_image():
        on_cpu_only(device)
        from skimage.color import rgb2lab

        image = interleaved(inputs[0]).numpy()
        return lambda i: rgb2lab(image)

    yield "OpenCV float32", opencv(from_bytes=True)
    yield "OpenCV float32, from float32", opencv(from_bytes=False)
    yield "kornia", kornia
    yield "scikit-image", scikit_image


def lab_to_rgb_peers(inputs: list[Tensor], device: str) -> Iterator[Peer]:
    def opencv(to_bytes: bool):
        def build():
            on_cpu_only(device)
            import cv2

            cv2.setNumThreads(torch.get_num_threads())
            lab = interleaved(inputs[0]).numpy()
            if not to_bytes:
                return lambda i: cv2.cvtColor(lab, cv2.COLOR_Lab2RGB)
            return lambda i: cv2.convertScaleAbs(cv2.cvtColor(lab, cv2.COLOR_Lab2RGB), alpha=255)

        return build

    def kornia():
        from kornia.color import lab_to_rgb

        return lambda i: lab_to_rgb(inputs[i % len(inputs)][None]).mul_(255).round_().to(torch.uint8)

    def scikit_image():
        on_cpu_only(device)
        from skimage.color import lab2rgb

        lab = interleaved(inputs[0]).numpy()
        return lambda i: np.rint(lab2rgb(lab) * 255).astype(np.uint8)

    yield "OpenCV float32", opencv(to_bytes=True)
    yield "OpenCV float32, to float32", opencv(to_bytes=False)
    yield "kornia", kornia
    yield "scikit-image", scikit_image


# --- one table ------------------------------------------------------------------------------------------------------


def benchmark(op: str, width: int, height: int, device: str, quick: bool) -> list[dict]:
    """The rows of one operation at one size; the first input is checked against the oracle before anything is timed."""
    moved = width * height * 3 * (1 + 4)  # uint8 on one side, float32 on the other
    to_lab, to_rgb, oracle_name = oracle()
    images = [photograph(width, height, seed) for seed in range(timing.rotation(moved, device))]
    if op == "rgb_to_lab":
        inputs = [x.to(device) for x in images]
        exact, bound, unit = to_lab(interleaved(images[0]).double().numpy() / 255), LAB_BOUND, "Lab"
        peers = [
            *ours(fastcolor.rgb_to_lab, inputs, device),
            *references(reference.rgb_to_lab, inputs, quick),
            *rgb_to_lab_peers(inputs, device),
        ]
    else:
        inputs = [reference.rgb_to_lab(x).to(device) for x in images]
        lab = interleaved(inputs[0]).cpu().double().numpy()
        exact, bound, unit = to_rgb(lab) * 255, LEVEL_BOUND, "8-bit levels"
        peers = [
            *ours(fastcolor.lab_to_rgb, inputs, device, dtype=torch.uint8),
            *references(lambda x: reference.lab_to_rgb(x, dtype=torch.uint8), inputs, quick),
            *lab_to_rgb_peers(inputs, device),
        ]

    candidates = [timing.plain_copy(moved, device), *checked(peers, exact, 255, bound, unit)]
    types = "uint8 → float32" if op == "rgb_to_lab" else "float32 → uint8"
    context = {"op": op, "types": types, "error_unit": unit, "oracle": oracle_name}
    return timed(candidates, moved, width, height, device, quick, context)


def benchmark_narrow(op: str, dtype: torch.dtype, width: int, height: int, device: str, quick: bool) -> list[dict]:
    """The same for other types: uint16 and float32, or 16 bits on both sides."""
    floating = dtype.is_floating_point
    moved = width * height * 3 * (4 if floating else 6)
    to_lab, to_rgb, oracle_name = oracle()
    images = [photograph(width, height, seed) for seed in range(timing.rotation(moved, device))]
    rounding = torch.finfo(dtype).eps / 2 if floating else 0  # of what is written
    if op == "rgb_to_lab":
        inputs = [x.to(dtype) if floating else (x.int() * 257).to(dtype) for x in images]
        inputs = [x / 255 if floating else x for x in inputs]
        top, bound, unit = 1, LAB_BOUND + 128 * rounding, "Lab"
        exact = to_lab(interleaved(inputs[0].double() / (1 if floating else 65535)).numpy())
        result = dtype if floating else torch.float32
    else:
        inputs = [reference.rgb_to_lab(x).to(dtype if floating else torch.float32) for x in images]
        top, unit = (1, "RGB") if floating else (65535, "16-bit levels")
        bound = 1e-5 + rounding if floating else 1.5
        exact, result = to_rgb(interleaved(inputs[0].double()).numpy()) * top, dtype
    inputs = [x.to(device) for x in inputs]
    plain = getattr(reference, op)
    peers = [
        *ours(getattr(fastcolor, op), inputs, device, dtype=result),
        *references(lambda x: plain(x, dtype=result), inputs, quick),
    ]
    candidates = [timing.plain_copy(moved, device), *checked(peers, exact, top, bound, unit)]
    types = " → ".join(str(x).removeprefix("torch.") for x in (inputs[0].dtype, result))
    context = {"op": op, "types": types, "error_unit": unit, "oracle": oracle_name}
    return timed(candidates, moved, width, height, device, quick, context)


def checked(peers: list[Peer], exact: np.ndarray, top: int, bound: float, unit: str) -> list[Candidate]:
    """Built, and held against the oracle: ours are left out where they are further off than the bound."""
    candidates = []
    for name, build in peers:
        candidate = Candidate(name, None, ours=name.startswith("fastcolor"))
        candidates.append(candidate)
        try:
            run = build()
        except ImportError as error:
            candidate.why_not = str(error)
            continue
        result = as_interleaved(run(0))
        if name.endswith("to float32"):
            result = result * top
        candidate.error = float(np.abs(result - exact).max())
        if candidate.ours and not candidate.error <= bound:
            candidate.why_not = f"off by {candidate.error:.2g} {unit}, more than {bound:g}"
            continue
        candidate.run = run

    return candidates


def timed(
    candidates: list[Candidate], moved: int, width: int, height: int, device: str, quick: bool, context: dict[str, str]
) -> list[dict]:
    """One table; `context` says what it is of."""
    op, types, unit, oracle_name = context.values()
    context = {**context, "size": f"{width}x{height}"}
    context["title"] = f"{op}, {width}×{height}, {types}; error in {unit} against {oracle_name}"
    able = [c for c in candidates if c.run]
    calls = max(timing.rotation(moved, device), 8 if moved > 1e7 else 50)
    times = timing.measure(able, device, rounds=3 if quick else 15, calls=calls)
    operations = getattr(work, op)(width * height)
    return timing.compare([timing.row(c, times.get(c.name), moved, operations, **context) for c in candidates])


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(
        "lab", __doc__, "1920x1080, on CUDA 3840x2160", "few samples, no torch.compile, no second size"
    )
    options = timing.parse(parser, arguments)
    size = options.size or timing.PICTURE["quick" if options.quick else options.device]
    record = timing.machine(options.device, options.commit)
    rows = []
    for op in ("rgb_to_lab", "lab_to_rgb"):
        for w, h in [size] if options.quick else [size, *SMALL]:
            rows += (table := benchmark(op, w, h, options.device, options.quick))
            timing.show(table, table[0]["title"])
        for dtype in NARROW:
            rows += (table := benchmark_narrow(op, dtype, *size, options.device, options.quick))
            timing.show(table, table[0]["title"])
    return timing.finish("lab", options, record, rows)


if __name__ == "__main__":
    sys.exit(main())
