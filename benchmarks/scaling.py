"""How the cost of an operation grows: one thing changes, the rest stays. Size, batch, threads, labels, sweeps, window.

`python -m benchmarks.scaling [AXIS...] [--device cpu|cuda] [--json FILE] [--quick]`

Every curve has the law that it should follow beside it: time ∝ value ("linear"), ∝ 1 / value ("inverse", threads), or
growing by the same step for every unit on top of a fixed part ("affine": labels, sweeps, neighbours). Ours is compared
with the reference where that takes no longer than a moment; the points of one curve are timed in turn, in one run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import fastcolor
from fastcolor.bins import ColorBins
from fastcolor.model.network import ColorNetwork
from fastcolor.ops.mean_field import mean_field_annealed
from fastcolor.reference import lab as lab_reference
from fastcolor.reference import mean_field as field_reference

from . import timing, work
from .network import our_network
from .ops.lab import interleaved, on_cpu_only, photograph
from .ops.mean_field import scene as field_scene
from .ops.render import scene as render_scene
from .timing import Candidate

PICTURES = [(64, 64), (256, 256), (1024, 1024), (1920, 1080), (3840, 2160), (7680, 4320)]  # up to 8K
GRIDS = [(64, 64), (128, 128), (256, 256), (480, 270)]  # of the mean field: a quarter of a picture's sides
NETWORK = [(64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024)]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
LABELS = [25, 50, 100, 200, 313]
SWEEPS = [1, 2, 4, 8, 16]
RADII = [1, 2, 3, 4, 5]  # windows of 3 to 11
FIELD = {"radius": 2, "sigma_light": 10.0, "weight": 0.1, "sweeps": 5}
CHECKED = 1 << 23  # numbers up to which a result is compared with the reference
BOUNDS = {"rgb_to_lab": 1e-3, "mean_field": 0.02}  # Lab units; ab units


@dataclass
class Point:
    """One measurement of a curve."""

    op: str
    value: int
    size: str
    build: Callable[[], Callable[[], object]]
    operations: int = 0
    moved: int = 0
    ours: bool = True
    error: Callable[[], float | None] = lambda: None  # against the reference


@dataclass(frozen=True)
class Axis:
    label: str
    law: str  # linear, inverse, affine
    points: Callable[[str, bool], Iterator[Point]]


def fewer(values: list, quick: bool) -> list:
    return values[:2] if quick else values


# --- the operations ---------------------------------------------------------------------------------------------------


def lab_point(value: int, images: int, width: int, height: int, device: str, threads: int | None = None) -> Point:
    rgb = photograph(width, height).to(device).expand(images, -1, -1, -1).contiguous()

    def error() -> float | None:
        if rgb.numel() > CHECKED:
            return None
        exact = lab_reference.rgb_to_lab(rgb.double() / 255)
        return (fastcolor.rgb_to_lab(rgb).double() - exact).abs().max().item()

    def build():
        return _on(threads, lambda: fastcolor.rgb_to_lab(rgb))

    pixels = images * width * height
    return Point("rgb_to_lab", value, f"{width}x{height}", build, work.rgb_to_lab(pixels), 15 * pixels, error=error)


def opencv_point(value: int, width: int, height: int, device: str) -> Point:
    def build():
        on_cpu_only(device)
        import cv2
        import numpy as np

        cv2.setNumThreads(torch.get_num_threads())
        image, scale = interleaved(photograph(width, height)).numpy(), np.float32(1 / 255)
        return lambda: cv2.cvtColor(np.multiply(image, scale, dtype=np.float32), cv2.COLOR_RGB2Lab)

    pixels = width * height
    what = "rgb_to_lab, OpenCV float32"
    return Point(what, value, f"{width}x{height}", build, work.rgb_to_lab(pixels), 15 * pixels, ours=False)


def render_point(value: int, width: int, height: int, device: str, threads: int | None = None) -> Point:
    def build():
        ab, guide, L = (x.to(device) for x in render_scene(width, height, 0.3))
        return _on(threads, lambda: fastcolor.render(ab, guide, L, channels_last=True))

    pixels = width * height
    moved = pixels * 7 + pixels // 16 * 12
    return Point("render", value, f"{width}x{height}", build, work.render(pixels), moved)


def field_point(
    value: int, images: int, width: int, height: int, device: str, labels: int = 313, threads: int | None = None,
    marginals: bool = False, **field,
) -> Point:  # fmt: skip
    """To ab, or to marginals, from float32 logits, labels last, as `colorize` has them; the first `labels` of 313."""
    field = {**FIELD, **field}
    centers = ColorBins().centers[:labels].to(device)

    def inputs() -> tuple[Tensor, Tensor]:
        logits, guide = field_scene(width, height, min(images, 4))
        again = -(-images // len(logits))
        logits, guide = (x.repeat(again, 1, 1, 1)[:images].to(device) for x in (logits[:, :labels], guide))
        return logits.contiguous(memory_format=torch.channels_last), guide

    def factors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        c = centers.to(dtype)
        a = torch.cat((-(c**2).sum(1, keepdim=True), 2 * c), 1) / 200  # quadratic, gamma 10
        return a, torch.cat((torch.ones_like(c[:, :1]), c), 1)

    def error() -> float | None:
        if images * labels * width * height > CHECKED:
            return None
        logits, guide = inputs()
        fast = fastcolor.mean_field(logits, guide, similarity=factors(torch.float32), **field)
        exact = field_reference.mean_field(logits.double(), guide.double(), similarity=factors(torch.float64), **field)
        return torch.einsum("bkhw,kc->bchw", fast.double() - exact, centers.double()).abs().max().item()

    def build():
        logits, guide = inputs()
        if marginals:
            pair = factors(torch.float32)
            return _on(threads, lambda: fastcolor.mean_field(logits, guide, similarity=pair, **field))
        return _on(threads, lambda: mean_field_annealed(logits, guide, similarity="quadratic", **field))

    pixels, neighbors = images * width * height, (2 * field["radius"] + 1) ** 2 - 1
    operations = work.mean_field(pixels, labels, 3, neighbors, field["sweeps"])
    moved = 4 * labels * pixels * (2 if marginals else 1)
    return Point("mean_field", value, f"{width}x{height}", build, operations, moved, error=error)


def network_point(value: int, images: int, width: int, height: int, device: str, threads: int | None = None) -> Point:
    from .eccv16 import flops

    network = shared_network(device)
    operations = flops(network, torch.zeros(1, 1, height, width, device=device)) * images

    def build():
        L = torch.full((images, 1, height, width), 50.0, device=device)
        return _on(threads, lambda: network(L))

    return Point("network", value, f"{width}x{height}", build, operations)


@cache
def shared_network(device: str) -> ColorNetwork:
    return our_network().to(device, memory_format=torch.channels_last)


def _on(threads: int | None, run: Callable[[], object]) -> Callable[[], object]:
    if threads is None:
        return run

    def with_threads():
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return run()
        finally:
            torch.set_num_threads(before)

    return with_threads


# --- the axes ---------------------------------------------------------------------------------------------------------


def sizes(device: str, quick: bool) -> Iterator[Point]:
    for width, height in fewer(PICTURES, quick):
        yield lab_point(width * height, 1, width, height, device)
        yield opencv_point(width * height, width, height, device)
        yield render_point(width * height, width, height, device)
    for width, height in fewer(GRIDS, quick):
        yield field_point(width * height, 1, width, height, device)
    for width, height in fewer(NETWORK, quick):
        yield network_point(width * height, 1, width, height, device)


def batches(device: str, quick: bool) -> Iterator[Point]:
    for images in fewer(BATCHES, quick):
        yield lab_point(images, images, 64, 64, device)
        yield field_point(images, images, 16, 16, device)
        yield network_point(images, images, 64, 64, device)


def threads(device: str, quick: bool) -> Iterator[Point]:
    if device != "cpu":
        return
    most = torch.get_num_threads()
    counts = sorted({1, most} | {n for n in (2, 4, 8, 16, 32, 64) if n < most})
    width, height = (256, 256) if quick else (1920, 1080)
    for n in counts:
        yield lab_point(n, 1, width, height, device, n)
        yield render_point(n, width, height, device, n)
        yield field_point(n, 1, width // 8, height // 8, device, threads=n)
        yield network_point(n, 1, 64 if quick else 256, 64 if quick else 256, device, n)


def grid(quick: bool) -> tuple[int, int]:
    return (24, 16) if quick else (128, 128)


def labels(device: str, quick: bool) -> Iterator[Point]:
    for count in fewer(LABELS, quick):
        yield field_point(count, 1, *grid(quick), device, count, marginals=True)


def sweeps(device: str, quick: bool) -> Iterator[Point]:
    for count in fewer(SWEEPS, quick):
        yield field_point(count, 1, *grid(quick), device, sweeps=count)


def windows(device: str, quick: bool) -> Iterator[Point]:
    for radius in fewer(RADII, quick):
        yield field_point((2 * radius + 1) ** 2 - 1, 1, *grid(quick), device, radius=radius)


AXES = {
    "size": Axis("pixels", "linear", sizes),
    "batch": Axis("pictures in a batch", "linear", batches),
    "threads": Axis("threads", "inverse", threads),
    "labels": Axis("labels", "affine", labels),
    "sweeps": Axis("sweeps", "affine", sweeps),
    "window": Axis("neighbours of a pixel", "affine", windows),
}


def benchmark(name: str, options) -> list[dict]:
    """The rows of one axis: a table for each of its operations."""
    axis = AXES[name]
    curves: dict[str, list[Point]] = {}
    for point in axis.points(options.device, options.quick):
        curves.setdefault(point.op, []).append(point)
    rows = []
    for op, points in curves.items():
        title = f"{op} by {name}; {axis.law} in {axis.label}"
        candidates, by_name = [], {}
        for point in points:
            candidate = Candidate(f"{point.value:,} {axis.label}", None, ours=point.ours)
            candidates.append(candidate)
            by_name[candidate.name] = point
            try:
                candidate.error = point.error()
                run = point.build()
            except (ImportError, MemoryError, RuntimeError) as error:  # a peer that is not there, or too little memory
                candidate.why_not = timing.first_line(error)
                continue
            if candidate.error is not None and not candidate.error <= BOUNDS[op]:
                candidate.why_not = f"off by {candidate.error:.2g}, more than {BOUNDS[op]:g}"
                continue
            candidate.run = lambda i, run=run: run()
        able = [c for c in candidates if c.run]
        times = timing.measure(able, options.device, rounds=3 if options.quick else 7, calls=4, budget=1.0)
        table = []
        for c in candidates:
            point = by_name[c.name]
            context = {
                "title": title,
                "op": op,
                "axis": name,
                "unit": axis.label,
                "value": point.value,
                "law": axis.law,
            }
            context["size"] = point.size
            row = timing.row(c, times.get(c.name), point.moved, point.operations, **context)
            if c.name in times:
                row["ns_per_unit"] = round(times[c.name].median * 1e9 / point.value, 4)
                row["note"] = f"{row['ns_per_unit']:,.3g} ns for each"
            table.append(row)
        timing.show(table, title)
        rows += table
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser("scaling", __doc__, "not taken: the sizes are an axis", "two points of each curve, small")
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"of {', '.join(AXES)}; all if left out")
    options = timing.parse(parser, arguments)
    if unknown := [name for name in options.axes if name not in AXES]:
        parser.error(f"no axis is called {unknown[0]!r}; there are {', '.join(AXES)}")
    record, rows = timing.machine(options.device, options.commit), []
    for name in options.axes or AXES:
        with torch.inference_mode():
            rows += benchmark(name, options)
    return timing.finish("scaling", options, record, rows)


if __name__ == "__main__":
    sys.exit(main())
