"""Instructions of the C++ kernels, counted by callgrind, beside an argued floor.

`python -m benchmarks.instructions [OP...] [--simd avx2|baseline] [--json FILE] [--quick]`

One process under callgrind (valgrind has to be installed) runs each operation on one thread at two sizes; the
difference, over that of the sizes, is what a pixel costs (or a pixel and label, or a pixel, label and sweep): what a
call costs besides falls out. valgrind knows no AVX-512: the kernels run as AVX2 there, with 8 floats in a register,
where AVX-512 has 16. Counts do not depend on what else the machine does.

The floors are argued in FLOORS: what the formula needs if every register is full, a multiplication with an addition is
one instruction, each number is loaded and stored once, and nothing is spent on loops, addresses and edges.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fastcolor
from fastcolor.ops import _backend
from fastcolor.ops.mean_field import mean_field_annealed

from . import timing
from .ops.lab import photograph
from .ops.mean_field import scene as field_scene
from .ops.render import scene as render_scene

LANES = {"avx2": 8, "baseline": 4}
LABELS = 313


@dataclass(frozen=True)
class Counted:
    """An operation at two sizes; `units` is how many of `unit` a size has."""

    unit: str
    sizes: tuple  # the smaller and the larger
    units: Callable[[object], int]
    build: Callable[[object], Callable[[], object]]
    floor: float  # instructions for one unit in one lane, over LANES of a register


def area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def pair(quick: bool) -> tuple:
    return ((64, 16), (64, 32)) if quick else ((512, 64), (512, 2112))


def to_lab(channels_last: bool):
    def build(size):
        rgb = photograph(*size)
        rgb = rgb.movedim(0, -1).contiguous() if channels_last else rgb
        return lambda: fastcolor.rgb_to_lab(rgb, channels_last=channels_last)

    return build


def to_rgb(size):
    lab = fastcolor.rgb_to_lab(photograph(*size))
    return lambda: fastcolor.lab_to_rgb(lab, dtype=torch.uint8)


def render(gamut: str):
    def build(size):
        ab, guide, L = render_scene(*size, 0.3)
        return lambda: fastcolor.render(ab, guide, L, gamut=gamut, channels_last=True)

    return build


def render_uv(size):
    ab, guide, L = render_scene(*size, 0.3)
    luma = (L * 2.19 + 16).to(torch.uint8)
    return lambda: fastcolor.render_uv(ab, guide, luma, fastcolor.YuvFormat())


def network_logits(size) -> tuple[torch.Tensor, torch.Tensor]:
    logits, guide = field_scene(*size)
    return logits.contiguous(memory_format=torch.channels_last), guide


def annealed(size):
    logits, _ = network_logits(size)
    return lambda: fastcolor.annealed_mean(logits, 0.38, fastcolor.ColorBins(), logits=True)


def loss(size):
    logits, guide = network_logits(size)
    ab = torch.cat((guide - 50, 50 - guide), 1)
    logits = logits.requires_grad_()

    def run():
        logits.grad = None
        fastcolor.color_cross_entropy(logits, ab).backward()

    return run


def field(size):
    width, height, sweeps = size
    logits, guide = network_logits((width, height))
    return lambda: mean_field_annealed(logits, guide, similarity="quadratic", weight=0.1, sweeps=sweeps)


def operations(quick: bool) -> dict[str, Counted]:
    small = ((8, 8), (8, 16)) if quick else ((64, 16), (64, 80))
    swept = ((8, 8, 1), (8, 8, 2)) if quick else ((64, 64, 2), (64, 64, 6))
    label = (f"pixel and label of {LABELS}", small, lambda s: area(s) * LABELS)
    return {
        "rgb_to_lab, planes": Counted("pixel", pair(quick), area, to_lab(False), FLOORS["rgb_to_lab"]),
        "rgb_to_lab, interleaved": Counted("pixel", pair(quick), area, to_lab(True), FLOORS["rgb_to_lab"]),
        "lab_to_rgb, planes": Counted("pixel", pair(quick), area, to_rgb, FLOORS["lab_to_rgb"]),
        "render, clipped": Counted("pixel", pair(quick), area, render("clip"), FLOORS["render"]),
        "render, lightness kept": Counted("pixel", pair(quick), area, render("preserve_lightness"), FLOORS["render"]),
        "render_uv, 4:2:0": Counted("pixel", pair(quick), area, render_uv, FLOORS["render_uv"]),
        "annealed_mean, labels last": Counted(*label, annealed, FLOORS["annealed_mean"]),
        "color_cross_entropy and gradient, labels last": Counted(*label, loss, FLOORS["color_cross_entropy"]),
        "mean_field, R = 3, labels last": Counted(
            f"pixel, label of {LABELS} and sweep", swept, lambda s: s[0] * s[1] * s[2] * LABELS, field,
            FLOORS["mean_field"],
        ),
    }  # fmt: skip


# Instructions in one lane. A power, root, exponential or logarithm to float32: a first guess by integers (4), then a
# polynomial or steps of Newton's (8): 12.
_TRANSCENDENTAL = 12
_LAB = (
    2 * 3 + 9 + 3 * _TRANSCENDENTAL + 2 * 3 + 5 + 3
)  # load, to float; matrix; roots; knee: compare, blend; L, a, b; store
FLOORS = {
    "rgb_to_lab": _LAB + 3,  # the transfer of a byte is a look-up
    # f; cubes; knee; matrix; transfer with its knee; clip and round; load and store
    "lab_to_rgb": 3 + 3 * 2 + 3 * 2 + 9 + 3 * (_TRANSCENDENTAL + 2) + 3 * 3 + 6,
    # four neighbours: load, difference, square, exponential, two colours, sum; then as lab_to_rgb
    "render": 4 * (3 + 1 + 1 + _TRANSCENDENTAL + 2 + 1) + 2 + 81,
    # a quarter of the pixels has chroma; all have their lightness looked up and averaged
    "render_uv": (4 * (3 + 1 + 1 + _TRANSCENDENTAL + 2 + 1) + 2 + 81) / 4 + 4,
    "annealed_mean": 1 + 1 + 1 + _TRANSCENDENTAL + 1 + 2,  # load, largest, difference, exponential, sum, two colours
    # twice: load and exponential (nothing is kept between softmax and gradient); largest, sum; scale, target, store
    "color_cross_entropy": 2 * (1 + 1 + _TRANSCENDENTAL) + 2 + 3,
    # load, three products of scores, largest, difference, exponential, sum, three products of features; A and B stay
    # in registers for several pixels
    "mean_field": 1 + 3 + 1 + 1 + _TRANSCENDENTAL + 1 + 3,
}


# --- inside valgrind --------------------------------------------------------------------------------------------------


def control(*arguments: str) -> None:
    """Speaks to the callgrind that runs this process. Half a million instructions of it count, some 5 % more or less:
    the sizes are such that they do not matter.
    """
    command = ["vgdb", f"--pid={os.getpid()}", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def count_here(names: list[str], quick: bool) -> None:
    """Runs what is to be counted; callgrind leaves a file for each call, in this order."""
    torch.set_num_threads(1)
    with fastcolor.use_backend("cpp"):
        for name in names:
            counted = operations(quick)[name]
            for size in counted.sizes:
                run = counted.build(size)
                run()
                control("instrumentation on")
                run()
                control("instrumentation off")
                control(f"dump {name} {size}")


# --- outside ----------------------------------------------------------------------------------------------------------


def absent() -> str | None:
    tools = [tool for tool in ("valgrind", "vgdb") if shutil.which(tool) is None]
    if tools:
        return f"{tools[0]} is not installed; it comes with valgrind"
    return _backend.missing("cpp")


def count(names: list[str], simd: str, quick: bool) -> dict[str, float]:
    """Instructions of one unit of each operation."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTCOLOR_SIMD": simd, "ATEN_CPU_CAPABILITY": "avx2"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind"
        command = [
            "valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", sys.executable, "-m",
            f"{__package__}.instructions", "--inside", *names, *(["--quick"] if quick else []),
        ]  # fmt: skip
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError("\n".join((ran.stdout + ran.stderr).splitlines()[-8:]))
        totals = [total(Path(folder) / f"callgrind.{i + 1}") for i in range(2 * len(names))]
    found = {}
    for i, name in enumerate(names):
        counted = operations(quick)[name]
        fewer, more = (counted.units(size) for size in counted.sizes)
        found[name] = (totals[2 * i + 1] - totals[2 * i]) / (more - fewer)
    return found


def total(path: Path) -> int:
    """Of one file of callgrind."""
    found = re.search(r"^totals: (\d+)", path.read_text() if path.exists() else "", re.MULTILINE)
    if found is None:
        raise RuntimeError(f"callgrind left no count in {path.name}: vgdb could not reach it")
    return int(found[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {'; '.join(operations(False))}; all if left out")
    parser.add_argument("--simd", choices=tuple(LANES), default="avx2", help="instruction set of the kernels")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--commit", help="to record, where there is no git")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = operations(options.quick)
    if unknown := [name for name in options.ops if name not in known]:
        parser.error(f"no operation is called {unknown[0]!r}; there are {'; '.join(known)}")
    names = options.ops or list(known)
    if options.inside:
        count_here(names, options.quick)
        return 0
    if reason := absent():
        parser.error(reason)
    rows = []
    for name, instructions in count(names, options.simd, options.quick).items():
        floor = known[name].floor / LANES[options.simd]
        rows.append({
            "op": name, "unit": known[name].unit, "simd": options.simd, "instructions": round(instructions, 3),
            "floor": round(floor, 3), "times_floor": round(instructions / floor, 2),
        })  # fmt: skip
        r = rows[-1]
        print(
            f"{name}: {instructions:.2f} instructions a {r['unit']}, {r['times_floor']:.1f} × the floor of {floor:.2f}"
        )
    if options.json:
        record = {**timing.machine("cpu", options.commit), "threads": 1, "simd": options.simd}
        result = {"suite": "instructions", **record, "quick": options.quick, "counts": rows}
        timing.write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
