"""The mean field over 313 labels: ours against its reference, a windowed PyTorch version (unfold) and pydensecrf.

`python -m benchmarks.ops.mean_field [--size 480x270] [--json FILE] [--quick]`

pydensecrf (Krähenbühl and Koltun 2011) filters K channels through a permutohedral lattice. What differs: its Gaussian
has no window and takes the pixel itself as a neighbour, the lattice errs by some percent, its guide is integers, and it
compares labels by Potts, its cheapest. So its result is not ours; its time is what it takes for as many labels, pixels
and sweeps. Widths and weight are the same. It runs on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fastcolor
from benchmarks import timing
from benchmarks.timing import Candidate
from fastcolor.ops import _backend
from fastcolor.ops.mean_field import mean_field_annealed
from fastcolor.reference import mean_field as reference

LABELS = 313
SIZES = [(64, 64), (128, 128), (480, 270)]
FIELD = {"radius": 2, "sigma_space": 3.0, "sigma_light": 10.0, "weight": 0.1, "sweeps": 5}
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
BOUND = {"float32": 1e-5, "bfloat16": 2**-8}  # of a marginal, else it is not timed; 16 bits round it once
AB_BOUND = 0.02  # of ab units
EXACT_UP_TO = 128 * 128  # pixels for which the oracle is in float64: beyond it would take gigabytes
SLOW = 2.0  # seconds of a first call from which that one is the measurement


@dataclass
class Peer:
    """A contestant, built when its turn comes."""

    name: str
    moved: int  # bytes
    build: Callable[[], Callable[[int], object]]
    problem: str = ""  # whose result it should give
    kind: str = "float32"  # storage of its logits


def scene(width: int, height: int) -> tuple[Tensor, Tensor]:
    """Logits like a network's, smooth with noise, and a guide with edges: [1, K, H, W], [1, 1, H, W]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, LABELS, max(2, height // 16), max(2, width // 16), generator=generator)
    logits = 3 * F.interpolate(coarse, size=(height, width), mode="bilinear")
    logits += torch.randn(logits.shape, generator=generator)
    areas = torch.rand(1, 1, max(2, height // 24), max(2, width // 24), generator=generator)
    guide = 100 * F.interpolate(areas, size=(height, width), mode="nearest")
    return logits, (guide + 2 * torch.randn(guide.shape, generator=generator)).clamp_(0, 100)


# --- peers ------------------------------------------------------------------------------------------------------------


def unfolded(logits: Tensor, guide: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The field as one would write it first: every neighbour's q is copied beside the pixel, k² K values each."""
    batch, labels, height, width = logits.shape
    reach, pixels = FIELD["radius"], height * width
    side = 2 * reach + 1
    place = torch.arange(side) - reach
    near = torch.exp(-(place[:, None] ** 2 + place**2) / (2 * FIELD["sigma_space"] ** 2)).flatten()
    near[side * side // 2] = 0
    there = F.unfold(torch.ones_like(guide), side, padding=reach)
    light = F.unfold(guide, side, padding=reach) - guide.reshape(batch, 1, pixels)
    w = FIELD["weight"] * there * near[:, None] * torch.exp(-(light**2) / (2 * FIELD["sigma_light"] ** 2))
    s, q = a @ b.T, logits.softmax(1)
    for _ in range(FIELD["sweeps"]):
        window = F.unfold(q, side, padding=reach).reshape(batch, labels, side * side, pixels)
        message = (window * w[:, None]).sum(2)
        q = (logits + (s @ message).reshape(logits.shape)).softmax(1)
    return q


def unfolding(logits: Tensor, guide: Tensor, a: Tensor, b: Tensor):
    def build():
        needed = 2.5 * (2 * FIELD["radius"] + 1) ** 2 * logits.numel() * 4
        free = available_memory()
        if free is not None and needed > free:
            raise ImportError(f"needs some {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
        return lambda i: unfolded(logits, guide, a, b)

    return build


def pydensecrf(logits: Tensor, guide: Tensor):
    def build():
        from pydensecrf import densecrf

        _, labels, height, width = logits.shape
        energy = np.ascontiguousarray(-logits[0].reshape(labels, -1).numpy())
        grey = (guide[0, 0] * 2.55).round().to(torch.uint8).numpy()
        image = np.ascontiguousarray(np.repeat(grey[:, :, None], 3, 2))

        def run(i: int):
            crf = densecrf.DenseCRF2D(width, height, labels)
            crf.setUnaryEnergy(energy)
            crf.addPairwiseBilateral(
                sxy=FIELD["sigma_space"],
                srgb=FIELD["sigma_light"] * 2.55 * 3**0.5,  # three equal channels
                rgbim=image,
                compat=FIELD["weight"],
                normalization=densecrf.NO_NORMALIZATION,
            )
            return np.asarray(crf.inference(FIELD["sweeps"]))

        return run

    return build


def ours(logits: Tensor, guide: Tensor, similarity, name: str) -> Iterator[Peer]:
    def on_cpp(run: Callable[[int], object]):
        def build():
            reason = _backend.missing("cpp")
            if reason:
                raise ImportError(reason)
            return run

        return build

    for dtype, kind in TYPES.items():
        for order, layout in (("planes", torch.contiguous_format), ("labels last", torch.channels_last)):
            u = logits.to(dtype, memory_format=layout)
            read = u.numel() * u.element_size()

            def marginals(i: int, u=u):
                return fastcolor.mean_field(u, guide, similarity=similarity, **FIELD)

            def colors(i: int, u=u):
                return mean_field_annealed(u, guide, similarity=similarity, **FIELD)

            what = f"cpp, {name}, {kind}, {order}"
            yield Peer(what, 2 * read, on_cpp(marginals), name, kind)
            yield Peer(f"{what}, to ab", read, on_cpp(colors), name, kind)


# --- memory -----------------------------------------------------------------------------------------------------------


def available_memory() -> int | None:
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes that a call adds to the process at its peak; None where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed before would be reused unseen

    def field(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    try:
        reset.write_text("5")
        before = field("VmRSS")
        run()
        return max(0, field("VmHWM") - before)
    except (OSError, StopIteration):
        return None


# --- one table --------------------------------------------------------------------------------------------------------


def benchmark(width: int, height: int, quick: bool) -> list[dict]:
    """The rows of one size; ours are checked against the reference before anything is timed."""
    logits, guide = scene(width, height)
    size = logits.numel() * 4
    small = width * height <= EXACT_UP_TO
    problems = {
        "R=3": "quadratic",
        "R=8": tuple(m.float() for m in fastcolor.label_factors("gaussian", gamma=40.0, rank=8)[:2]),
    }
    a, b, _ = fastcolor.label_factors("quadratic")
    peers: list[Peer] = []
    exact: dict[tuple[str, str], Tensor] = {}
    for name, similarity in problems.items():
        peers += ours(logits, guide, similarity, name)

        def plain(i: int, similarity=similarity):
            return reference.mean_field(logits, guide, similarity=similarity, **FIELD)

        peers.append(Peer(f"reference, PyTorch eager, {name}", 2 * size, lambda plain=plain: plain, name))
        for dtype, kind in TYPES.items():
            wide = torch.float64 if small else torch.float32
            exact[name, kind] = reference.mean_field(
                logits.to(dtype).to(wide), guide.to(wide), similarity=similarity, **FIELD
            ).float()
    peers.append(Peer("windowed PyTorch, R=3", 2 * size, unfolding(logits, guide, a.float(), b.float()), "R=3"))
    peers.append(Peer("pydensecrf, Potts", 2 * size, pydensecrf(logits, guide)))
    oracle = f"our reference in {'float64' if small else 'float32'}"

    times: dict[str, timing.Timing] = {}
    candidates, moved, peaks = [timing.plain_copy(2 * size, "cpu")], {timing.COPY: 2 * size}, {}
    for peer in peers:
        candidate = Candidate(peer.name, None, ours=peer.name.startswith("cpp"))
        candidates.append(candidate)
        moved[peer.name] = peer.moved
        try:
            run = peer.build()
        except ImportError as error:
            candidate.why_not = str(error)
            continue
        results: list[object] = []
        started = time.perf_counter()
        peaks[peer.name] = peak_memory(lambda run=run, results=results: results.append(run(0)))
        took = time.perf_counter() - started
        if took > SLOW:
            times[peer.name] = timing.Timing(took, 0.0, 1)
        if peer.problem:
            expected, bound = exact[peer.problem, peer.kind], BOUND[peer.kind]
            if results[0].shape[1] == 2:
                expected, bound = fastcolor.annealed_mean(expected), AB_BOUND
            candidate.error = (results[0].float() - expected).abs().max().item()
            if candidate.ours and not candidate.error <= bound:
                candidate.why_not = f"off by {candidate.error:.2g}, more than {bound:g}"
                continue
        candidate.run = run

    fast = [c for c in candidates if c.run and c.name not in times]
    times |= timing.measure(fast, "cpu", rounds=3 if quick else 9)
    context = {"op": "mean_field", "size": f"{width}x{height}", "labels": LABELS, **FIELD, "oracle": oracle}
    context["title"] = (
        f"mean_field, {LABELS} labels, {width}×{height}, {FIELD['sweeps']} sweeps; error of marginals (of ab) "
        f"against {oracle}"
    )
    rows = []
    for c in candidates:
        row = timing.row(c, times.get(c.name), moved[c.name], **context)
        if c.name in times and c.name != timing.COPY:
            row["ms_per_sweep"] = round(times[c.name].median * 1e3 / FIELD["sweeps"], 3)
            row["peak_MB"] = None if peaks[c.name] is None else round(peaks[c.name] / 1e6, 1)
            row["note"] = f"{row['ms_per_sweep']:.2f} ms a sweep, {row['peak_MB']} MB"
        rows.append(row)
    return timing.compare(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.mean_field", description=__doc__.splitlines()[0])
    parser.add_argument("--size", help="width x height; all of the sizes if left out")
    parser.add_argument("--json", type=Path, help="results file, or the folder for one with the usual name")
    parser.add_argument("--quick", action="store_true", help="few samples, and the smallest size alone")
    parser.add_argument("--threads", type=int, default=timing.threads(), help="of every candidate but pydensecrf alike")
    parser.add_argument("--commit", help="to record, where there is no git")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    sizes = SIZES[:1] if options.quick else SIZES
    if options.size:
        try:
            sizes = [tuple(int(n) for n in options.size.split("x"))]
            (_, _) = sizes[0]
        except ValueError:
            parser.error(f"--size must look like 480x270, got {options.size}")

    record = timing.machine("cpu", options.commit)
    rows = []
    for width, height in sizes:
        with torch.inference_mode():
            rows += (table := benchmark(width, height, options.quick))
        timing.show(table, table[0]["title"])
    if options.json:
        print(f"written: {timing.write(options.json, 'mean_field', 'cpu', record, rows).name}")
    wrong = [r for r in rows if r["ours"] and r.get("why", "").startswith("off by")]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
