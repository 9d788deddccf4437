"""The arithmetic that each operation's definition asks for, and what the machine can do in the same run: its roofline.

An addition, multiplication or comparison counts one, and so does a root, power, exponential or logarithm: what the
formula says, not what a kernel executes (`python -m benchmarks.instructions` counts that).
"""

from __future__ import annotations

import time

import torch

COPY = "plain copy"
PRODUCT = "matrix product"

NEIGHBORS = 4  # low-resolution pixels with a share in a pixel: the tents of the others of the 3×3 are 0


def rgb_to_lab(pixels: int) -> int:
    # transfer 3 × (scale, offset, power); matrix 9 + 6; roots 3; L, a and b 2 each
    return pixels * (9 + 15 + 3 + 6)


def lab_to_rgb(pixels: int) -> int:
    # f of L, a and b 2 each; cubes 3 × 2; matrix 9 + 6; transfer 3 × (power, scale, offset); clipped and rounded 3 × 3
    return pixels * (6 + 6 + 15 + 9 + 9)


def render(pixels: int) -> int:
    # each neighbour: difference, square, scale, exponential, times its tent, two colours and the sum of weights
    return pixels * (NEIGHBORS * 10 + 2) + lab_to_rgb(pixels)


def render_uv(samples: int, luma: int) -> int:
    """`samples` of each chroma plane, from so many of luma."""
    # luma is weighed and summed; the lightness of its mean: transfer 3, root, scale and offset
    # a colour: f of L, a and b 2 each; cubes 3 × 2; matrix 9 + 6; transfer 3 × 3; its luma 3 + 2
    # three colours, and of two of them the lightness; differences 3, their room 3 × 2, the least 2; U and V 3 each
    lightness, colour = 3 + 1 + 2, 6 + 6 + 15 + 9 + 5
    return 2 * luma + samples * (NEIGHBORS * 10 + 2 + 3 * (lightness + colour) + 3 + 6 + 2 + 6)


def mean_field(pixels: int, labels: int, rank: int, neighbors: int, sweeps: int) -> int:
    # each label: A G and Bᵀ q of `rank` columns, the largest, a difference, an exponential, the sum;
    # each neighbour: its weight (difference, square, scale, exponential, product) and `rank` columns
    return pixels * sweeps * (labels * (4 * rank + 4) + neighbors * (2 * rank + 5))


def annealed_mean(pixels: int, labels: int) -> int:
    # each label: temperature, the largest, a difference, an exponential, the sum, two colours
    return pixels * labels * 9


def color_cross_entropy(pixels: int, labels: int) -> int:
    # each label: the largest, a difference, an exponential, the sum; its gradient is scaled, weighted, less its target
    return pixels * labels * 7


def is_limit(row: dict) -> bool:
    """Whether a row is no contestant, but shows what the machine can do, or is a part of one."""
    return row["candidate"].startswith((COPY, PRODUCT)) or row.get("part", False)


# --- what the machine can do ------------------------------------------------------------------------------------------


def _fastest(run, device: str, seconds: float, least: int = 5) -> float:
    """Seconds of the fastest call: a limit is what was reached at best."""
    best, begin, count = float("inf"), time.perf_counter(), 0
    while count < least or time.perf_counter() - begin < seconds:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


def limits(device: str, seconds: float = 0.25, copied: int | None = None, side: int | None = None) -> dict:
    """GB/s of a plain copy (read and written together) and TFLOP/s of matrix products, on the threads of this run.

    Args:
        seconds: for each.
        copied: bytes of the source, by default more than any cache holds.
        side: of the square matrices.
    """
    cuda = device == "cuda"
    copied, side = copied or (1 << 30 if cuda else 1 << 27), side or (8192 if cuda else 1536)
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    took = _fastest(lambda: target.copy_(source), device, seconds)
    found = {"copy_GB_per_s": round(2 * copied / took / 1e9, 3)}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(a)
        took = _fastest(lambda a=a, out=out: torch.mm(a, a, out=out), device, seconds)
        found[f"{str(dtype).removeprefix('torch.')}_TFLOP_per_s"] = round(2 * side**3 / took / 1e12, 4)
    return found


def floors(rows: list[dict], limits: dict) -> list[dict]:
    """Adds to every timed row the time that memory or arithmetic alone would take, whichever is longer, and its share.

    Memory by the plain copy of as many bytes in the same table (which knows the caches), else by the copy of the run;
    arithmetic by the matrix product of the row's type ("arithmetic", float32 if it has none).
    """
    copies = {
        r.get("title"): r["bytes"] / r["median_us"]
        for r in rows
        if r["candidate"] == COPY and isinstance(r["median_us"], float)
    }
    for r in rows:
        if is_limit(r) or not isinstance(r["median_us"], float):
            continue
        kinds = {}
        if r.get("bytes"):
            kinds["memory"] = r["bytes"] / copies.get(r.get("title"), limits["copy_GB_per_s"] * 1e3)
        if r.get("operations"):
            kinds["arithmetic"] = r["operations"] / (limits[f"{r.get('arithmetic', 'float32')}_TFLOP_per_s"] * 1e6)
        if not kinds:
            continue
        r["bound"] = max(kinds, key=kinds.get)
        r["floor_us"] = round(kinds[r["bound"]], 3)
        r["share_of_floor"] = round(kinds[r["bound"]] / r["median_us"], 4)
    return rows
