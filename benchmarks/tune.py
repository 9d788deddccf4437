"""Tiles and warps of the Triton kernels: tries them, checks each against the ones that are set, and prints the table.

`python -m benchmarks.tune [KERNEL...] [--json FILE] [--quick] [--seconds 480]`

The constants are those at the top of kernels/triton/*.py; the best ones are written there by hand, after a look at the
table and at `python -m benchmarks.registers`. Without a GPU: TRITON_INTERPRET=1 and --device cpu --quick goes through
every kernel with two settings, in Triton's interpreter, whose times mean nothing.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

import fastcolor
from fastcolor.ops import _backend
from fastcolor.ops.mean_field import mean_field_annealed

from . import timing
from .ops.lab import photograph
from .ops.render import scene as render_scene
from .timing import Candidate

# Between two settings: sums in another order. Of the largest entry of the result.
BOUND = {torch.float32: 1e-3, torch.bfloat16: 2**-6, torch.uint8: 1 / 255}


@dataclass(frozen=True)
class Kernel:
    """One operation as it is launched, and the settings to try."""

    module: str  # below fastcolor.kernels.triton
    grid: dict[str, tuple]  # constant: values
    build: Callable[[str, bool], Callable[[], Tensor]]  # device, quick -> a call


def lab_call(op: str):
    def build(device: str, quick: bool):
        rgb = photograph(*((24, 20) if quick else (3840, 2160))).to(device)
        lab = fastcolor.rgb_to_lab(rgb)
        if op == "rgb_to_lab":
            return lambda: fastcolor.rgb_to_lab(rgb)
        return lambda: fastcolor.lab_to_rgb(lab, dtype=torch.uint8)

    return build


def render_call(uv: bool):
    def build(device: str, quick: bool):
        width, height = (24, 20) if quick else (3840, 2160)
        ab, guide, L = (x.to(device) for x in render_scene(width, height, 0.3))
        if not uv:
            return lambda: fastcolor.render(ab, guide, L, channels_last=True)
        luma = (L * 2.19 + 16).to(torch.uint8)
        return lambda: fastcolor.render_uv(ab, guide, luma, fastcolor.YuvFormat())[0]

    return build


def loss_call(device: str, quick: bool):
    batch, side = (1, 4) if quick else (64, 64)
    generator = torch.Generator().manual_seed(0)
    logits = _logits(batch, side, generator, device, quick).requires_grad_()
    ab = (torch.randn(batch, 2, side, side, generator=generator) * 25).to(device)

    def run() -> Tensor:
        logits.grad = None
        fastcolor.color_cross_entropy(logits, ab).backward()
        return logits.grad

    return run


def _logits(batch: int, side: int, generator, device: str, quick: bool) -> Tensor:
    dtype = torch.float32 if quick else torch.bfloat16  # the interpreter has no bfloat16
    logits = torch.randn(batch, 313, side, side, generator=generator) * 3
    return logits.to(device, dtype).contiguous(memory_format=torch.channels_last)


def field_call(rank: int, backward: bool = False):
    def build(device: str, quick: bool):
        batch, side, sweeps = (1, 4, 1) if quick else (32, 64, 8)
        generator = torch.Generator().manual_seed(0)
        logits = _logits(batch, side, generator, device, quick)
        guide = (100 * F.interpolate(torch.rand(batch, 1, 3, 3, generator=generator), (side, side))).to(device)
        similarity = "quadratic"
        if rank > 3:
            similarity = tuple(
                m.float().to(device) for m in fastcolor.label_factors("gaussian", gamma=40.0, rank=rank)[:2]
            )
        field = {"similarity": similarity, "sweeps": sweeps, "weight": 0.1}
        if not backward:
            return lambda: mean_field_annealed(logits, guide, **field)
        logits.requires_grad_()

        def run() -> Tensor:
            logits.grad = None
            fastcolor.mean_field(logits, guide, **field).float().square().sum().backward()
            return logits.grad

        return run

    return build


_FEW = {"PIXELS": (32, 64, 128), "FEW_CHUNK": (16, 32, 64), "WARPS": (1, 2, 4)}
_BLOCKS = {"BLOCK": (512, 1024, 2048, 4096), "WARPS": (4, 8, 16)}
_RENDER = {"BLOCK": (512, 1024, 2048), "WARPS": (2, 4, 8)}
KERNELS = {
    "rgb_to_lab": Kernel("lab", _BLOCKS, lab_call("rgb_to_lab")),
    "lab_to_rgb": Kernel("lab", _BLOCKS, lab_call("lab_to_rgb")),
    "render": Kernel("render", _RENDER, render_call(False)),
    "render_uv": Kernel("render", _RENDER, render_call(True)),
    "color_cross_entropy": Kernel(
        "cross_entropy", {"PIXELS": (16, 32, 64), "CHUNK": (32, 64, 128), "WARPS": (2, 4, 8)}, loss_call
    ),
    "mean_field, few columns": Kernel("mean_field", {**_FEW, "OFFSETS": (4, 8)}, field_call(3)),
    "mean_field, few columns, backward": Kernel("mean_field", _FEW, field_call(3, True)),
    "mean_field, many columns": Kernel(
        "mean_field", {"MANY_PIXELS": (16, 32, 64), "CHUNK": (32, 64), "MANY_WARPS": (2, 4, 8)}, field_call(32)
    ),
}


def settings(kernel: Kernel, module: ModuleType, quick: bool) -> Iterator[dict]:
    """The one that is set first, then the others."""
    now = {name: getattr(module, name) for name in kernel.grid}
    yield now
    others = [dict(zip(kernel.grid, values, strict=True)) for values in itertools.product(*kernel.grid.values())]
    others = [s for s in others if s != now]
    yield from others[-1:] if quick else others


def named(values: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def tune(name: str, kernel: Kernel, options, deadline: float) -> list[dict]:
    """The rows of one kernel, the fastest first."""
    from importlib import import_module

    from fastcolor.kernels.triton import tiles

    module = import_module(f"fastcolor.kernels.triton.{kernel.module}")
    with fastcolor.use_backend("triton"):
        call = kernel.build(options.device, options.quick)
        exact = call().detach().clone()
        bound = BOUND[exact.dtype] * exact.abs().max().float().item()
        candidates, first = [], {}
        for chosen in settings(kernel, module, options.quick):
            candidate = Candidate(named(chosen), None, ours=True, note="" if candidates else "as it is set")
            candidates.append(candidate)
            if time.monotonic() > deadline:
                candidate.why_not = "out of time"
                continue

            def run(i: int, chosen=chosen) -> Tensor:
                with tiles(module, **chosen):
                    return call()

            begin = time.perf_counter()
            try:
                candidate.error = (run(0).float() - exact.float()).abs().max().item()
            except Exception as error:  # too many registers or too much shared memory: the compiler and driver say so
                candidate.why_not = timing.first_line(error)
                continue
            if candidate.error > bound:
                candidate.why_not = f"off by {candidate.error:.2g}, more than {bound:.2g}"
                continue
            candidate.run = run
            first[candidate.name] = timing.Timing(time.perf_counter() - begin, 0.0, 1)
        able = [c for c in candidates if c.run]
        # the interpreter's times mean nothing: the first call, compilation included, has to do
        times = first if options.quick else timing.measure(able, options.device, rounds=9, calls=4, budget=1.0)
    title = f"tune {name}, {options.device}"
    rows = [timing.row(c, times.get(c.name), 0, title=title, op=name) for c in candidates]
    rows.sort(key=lambda r: r["median_us"] if r["median_us"] != timing.NOT_MEASURED else float("inf"))
    timing.show(rows, title)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser("tune", __doc__, "not taken", "two settings of each kernel, tiny sizes")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {'; '.join(KERNELS)}; all if left out")
    parser.add_argument("--seconds", type=float, default=480, help="after which no new setting is begun")
    options = timing.parse(parser, arguments)
    if unknown := [name for name in options.kernels if name not in KERNELS]:
        parser.error(f"no kernel is called {unknown[0]!r}; there are {', '.join(KERNELS)}")
    reason = _backend.missing("triton") or _backend.runs_on("triton", torch.device(options.device))
    if reason:
        parser.error(f"{reason} (TRITON_INTERPRET=1 runs it on the CPU, with --device cpu --quick)")
    record, rows = timing.machine(options.device, options.commit), []
    deadline = time.monotonic() + options.seconds
    for name in options.kernels or KERNELS:
        rows += tune(name, KERNELS[name], options, deadline)
    return timing.finish("tune", options, record, rows)


if __name__ == "__main__":
    sys.exit(main())
