"""The mean field over 313 labels: ours against its reference, a windowed PyTorch version (unfold) and pydensecrf.

`python -m benchmarks.ops.mean_field [--size 480x270] [--device cpu|cuda] [--json FILE] [--quick] [--perf]`

pydensecrf (Krähenbühl and Koltun 2011) filters K channels through a permutohedral lattice. What differs: its Gaussian
has no window and takes the pixel itself as a neighbour, the lattice errs by some percent, its guide is integers, and it
compares labels by Potts, its cheapest. So its result is not ours; its time is what it takes for as many labels, pixels
and sweeps. Widths and weight are the same. It runs on one thread.

On a GPU: batches in bfloat16 against the reference and torch.compile, on the scale of what one read of the logits and
a plain copy take there. `--perf` counts instructions (Linux, where the machine lets processes count them).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fastcolor
from fastcolor.ops import _backend
from fastcolor.ops.mean_field import mean_field_annealed
from fastcolor.reference import mean_field as reference
from fastcolor.training.memory import free_bytes

from .. import timing, work
from ..timing import Candidate, peak_memory

LABELS = 313
SIZES = [(1, 64, 64), (1, 128, 128), (1, 480, 270)]  # images, width, height
# images, width, height: 20, 82 and 328 MB of logits, of which the shared memory of an H200 holds 30
CUDA_SIZES = [(8, 64, 64), (32, 64, 64), (128, 64, 64)]
FIELD = {"radius": 2, "sigma_space": 3.0, "sigma_light": 10.0, "weight": 0.1, "sweeps": 5}
NEIGHBORS = (2 * FIELD["radius"] + 1) ** 2 - 1
CUDA_SWEEPS = 8
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
BOUND = {"float32": 1e-5, "bfloat16": 2**-8}  # of a marginal, else it is not timed; 16 bits round it once
AB_BOUND = 0.02  # of ab units
BAND = 64  # rows of the oracle at a time, for its memory
SLOW = 8.0  # seconds of a first call, fresh memory and all, from which that one is the measurement


@dataclass
class Peer:
    """A contestant, built when its turn comes."""

    name: str
    moved: int  # bytes
    build: Callable[[], Callable[[int], object]]
    problem: str = ""  # whose result it should give
    kind: str = "float32"  # storage of its logits
    ours: bool = False


def scene(width: int, height: int, images: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits like a network's, smooth with noise, and a guide with edges: [B, K, H, W], [B, 1, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(images, LABELS, max(2, height // 16), max(2, width // 16), generator=generator)
    logits = 3 * F.interpolate(coarse, size=(height, width), mode="bilinear")
    logits += torch.randn(logits.shape, generator=generator)
    areas = torch.rand(images, 1, max(2, height // 24), max(2, width // 24), generator=generator)
    guide = 100 * F.interpolate(areas, size=(height, width), mode="nearest")
    return logits, (guide + 2 * torch.randn(guide.shape, generator=generator)).clamp_(0, 100)


def exact(logits: Tensor, guide: Tensor, **field) -> Tensor:
    """The reference in float64, rounded to float32, band after band: each with the rows that its sweeps can reach."""
    reach, height = field["sweeps"] * field["radius"], logits.shape[2]
    bands = []
    for first in range(0, height, BAND):
        last = min(first + BAND, height)
        rows = slice(max(0, first - reach), min(height, last + reach))
        q = reference.mean_field(logits[:, :, rows].double(), guide[:, :, rows].double(), **field)
        bands.append(q[:, :, first - rows.start : last - rows.start].float())
    return torch.cat(bands, 2)


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
        free = free_bytes(torch.device("cpu"))
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


def ours(backend: str, inputs: list[tuple[Tensor, Tensor]], name: str, types, **field) -> Iterator[Peer]:
    """Marginals and their colours, from each storage and layout. `inputs` take turns."""
    device = inputs[0][0].device

    def on_backend(run: Callable[[int], object]):
        def build():
            reason = _backend.missing(backend) or _backend.runs_on(backend, device)
            if reason:
                raise ImportError(reason)

            def run_asked_for(i: int):
                with fastcolor.use_backend(backend):
                    return run(i)

            return run_asked_for

        return build

    for dtype, kind in types.items():
        for order, layout in (("planes", torch.contiguous_format), ("labels last", torch.channels_last)):
            logits = [u.to(dtype, memory_format=layout) for u, _ in inputs]
            read = logits[0].numel() * logits[0].element_size()

            def marginals(i: int, logits=logits):
                return fastcolor.mean_field(logits[i % len(logits)], inputs[i % len(logits)][1], **field)

            def colors(i: int, logits=logits):
                return mean_field_annealed(logits[i % len(logits)], inputs[i % len(logits)][1], **field)

            what = f"{backend}, {name}, {kind}, {order}"
            yield Peer(what, 2 * read, on_backend(marginals), name, kind, True)
            yield Peer(f"{what}, to ab", read, on_backend(colors), name, kind, True)


def compiled(function: Callable[[Tensor, Tensor], Tensor], inputs: list[tuple[Tensor, Tensor]], quick: bool):
    def build():
        if quick:
            raise ImportError("left out by --quick")
        torch._dynamo.reset()
        run = torch.compile(function, fullgraph=True)
        try:
            run(*inputs[0])
        except Exception as error:  # no compiler, one that fails, or too little memory
            raise ImportError(str(error).strip().splitlines()[0][:200]) from error
        return lambda i: run(*inputs[i % len(inputs)])

    return build


# --- instructions -----------------------------------------------------------------------------------------------------


def instructions(run: Callable[[], object]) -> int | str:
    """Instructions of this thread in user space during a call; or why nobody can tell."""
    numbers = {"x86_64": 298, "aarch64": 241}  # of perf_event_open
    if sys.platform != "linux" or platform.machine() not in numbers:
        return "instructions are counted on Linux alone"
    # struct perf_event_attr, version 0: type hardware, 64 bytes, config instructions; disabled, without the kernel
    attributes = struct.pack("IIQQQQQIIQ", 0, 64, 1, 0, 0, 0, 0b1100001, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    counter = libc.syscall(numbers[platform.machine()], ctypes.c_char_p(attributes), 0, -1, -1, 0)
    if counter < 0:
        return f"this machine does not let us count instructions: {os.strerror(ctypes.get_errno())}"
    try:
        libc.ioctl(counter, 0x2400, 0)  # enable
        run()
        libc.ioctl(counter, 0x2401, 0)  # disable
        return struct.unpack("Q", os.read(counter, 8))[0]
    finally:
        os.close(counter)


def counted(run: Callable[[int], object]) -> int | str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the counter is of one thread
    run(0)
    count = instructions(lambda: run(0))
    torch.set_num_threads(threads)
    return count


# --- one table --------------------------------------------------------------------------------------------------------


def check(candidate: Candidate, peer: Peer, result: Tensor, expected: Tensor) -> bool:
    """Notes the error of a result; False for one of ours that is too far off to be timed."""
    bound = BOUND[peer.kind]
    if result.shape[1] == 2:
        expected, bound = fastcolor.annealed_mean(expected), AB_BOUND
    candidate.error = (result.float() - expected).abs().max().item()
    if peer.ours and not candidate.error <= bound:
        candidate.why_not = f"off by {candidate.error:.2g}, more than {bound:g}"
        return False
    return True


def cpu_peers(logits: Tensor, guide: Tensor) -> tuple[list[Peer], dict[tuple[str, str], Tensor]]:
    size = logits.numel() * 4
    problems = {
        "R=3": "quadratic",
        "R=8": tuple(m.float() for m in fastcolor.label_factors("gaussian", gamma=40.0, rank=8)[:2]),
    }
    peers: list[Peer] = []
    expected = {}
    for name, similarity in problems.items():
        peers += ours("cpp", [(logits, guide)], name, TYPES, similarity=similarity, **FIELD)

        def plain(i: int, similarity=similarity):
            return reference.mean_field(logits, guide, similarity=similarity, **FIELD)

        peers.append(Peer(f"reference, PyTorch eager, {name}", 2 * size, lambda plain=plain: plain, name))
        for dtype, kind in TYPES.items():
            expected[name, kind] = exact(logits.to(dtype), guide, similarity=similarity, **FIELD)
    a, b, _ = fastcolor.label_factors("quadratic")
    peers.append(Peer("windowed PyTorch, R=3", 2 * size, unfolding(logits, guide, a.float(), b.float()), "R=3"))
    peers.append(Peer("pydensecrf, Potts", 2 * size, pydensecrf(logits, guide)))
    return peers, expected


def on_cpu(width: int, height: int, quick: bool, perf: bool) -> list[dict]:
    """The rows of one size; ours are checked against the oracle before anything is timed."""
    logits, guide = scene(width, height)
    size = logits.numel() * 4
    peers, expected = cpu_peers(logits, guide)
    times: dict[str, timing.Timing] = {}
    candidates, moved, peaks = [timing.plain_copy(2 * size, "cpu")], {timing.COPY: 2 * size}, {}
    counts: dict[str, int | str] = {}
    for peer in peers:
        candidate = Candidate(peer.name, None, ours=peer.ours)
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
        if peer.problem and not check(candidate, peer, results[0], expected[peer.problem, peer.kind]):
            continue
        candidate.run = run
        if perf and peer.ours:
            counts[peer.name] = counted(run)

    fast = [c for c in candidates if c.run and c.name not in times]
    times |= timing.measure(fast, "cpu", rounds=3 if quick else 9)
    context = {"op": "mean_field", "size": f"{width}x{height}", "labels": LABELS, **FIELD, "oracle": "float64"}
    context["title"] = (
        f"mean_field, {LABELS} labels, {width}×{height}, {FIELD['sweeps']} sweeps; error of marginals (of ab) "
        "against our reference in float64"
    )
    rows = []
    for c in candidates:
        rank = 8 if "R=8" in c.name else 3
        operations = work.mean_field(width * height, LABELS, rank, NEIGHBORS, FIELD["sweeps"])
        row = timing.row(c, times.get(c.name), moved[c.name], operations, **context)
        if c.name in times and c.name != timing.COPY:
            row["ms_per_sweep"] = round(times[c.name].median * 1e3 / FIELD["sweeps"], 3)
            row["peak_MB"] = None if peaks[c.name] is None else round(peaks[c.name] / 1e6, 1)
            row["note"] = f"{row['ms_per_sweep']:.2f} ms a sweep, {row['peak_MB']} MB"
        if c.name in counts:
            _note_instructions(row, counts[c.name], logits.numel() * FIELD["sweeps"])
        rows.append(row)
    return timing.compare(rows)


def _note_instructions(row: dict, count: int | str, work: int) -> None:
    if isinstance(count, str):
        row |= {"instructions": timing.NOT_MEASURED, "why_no_instructions": count}
        return
    row["instructions"] = round(count / work, 3)  # per pixel, label and sweep
    row["note"] = f"{row.get('note', '')}, {row['instructions']} instructions"


def on_cuda(images: int, width: int, height: int, quick: bool) -> list[dict]:
    """The rows of one batch. Images are independent: the first two of each batch are checked against float64."""
    field = {**FIELD, "sweeps": CUDA_SWEEPS, "similarity": "quadratic"}
    dtype, kind = torch.bfloat16, "bfloat16"
    size = images * LABELS * height * width * 2  # bytes of the logits
    inputs = []
    for seed in range(min(timing.rotation(2 * size, "cuda"), 8)):
        u, g = scene(width, height, min(images, 4), seed)
        again = -(-images // len(u))
        inputs.append(tuple(x.repeat(again, 1, 1, 1)[:images].cuda() for x in (u.to(dtype), g)))
    expected = exact(inputs[0][0][:2], inputs[0][1][:2], **field)

    def plain(u: Tensor, g: Tensor) -> Tensor:
        return reference.mean_field(u, g, **field)

    def eager():
        return lambda i: plain(*inputs[i % len(inputs)])

    peers = [p for name in ("cuda", "triton") for p in ours(name, inputs, "R=3", {dtype: kind}, **field)]
    peers.append(Peer("reference, PyTorch eager, R=3", 2 * size, eager, "R=3", kind))
    peers.append(Peer("reference, torch.compile, R=3", 2 * size, compiled(plain, inputs, quick), "R=3", kind))

    candidates, moved = [timing.plain_copy(2 * size, "cuda")], {timing.COPY: 2 * size}
    for peer in peers:
        candidate = Candidate(peer.name, None, ours=peer.ours)
        candidates.append(candidate)
        moved[peer.name] = peer.moved
        try:
            run = peer.build()
            result = run(0)
        except (ImportError, fastcolor.BackendError, torch.cuda.OutOfMemoryError) as error:
            candidate.why_not = str(error).strip().splitlines()[0]
            continue
        if check(candidate, peer, result[:2], expected):
            candidate.run = run

    able = [c for c in candidates if c.run]
    times = timing.measure(able, "cuda", rounds=3 if quick else 15, calls=max(len(inputs), 4))
    shape = f"{images}x{width}x{height}"
    context = {"op": "mean_field", "size": shape, "labels": LABELS, **field, "types": kind, "oracle": "float64"}
    context["title"] = (
        f"mean_field, {LABELS} labels, {images} of {width}×{height}, {kind}, {CUDA_SWEEPS} sweeps; error of marginals "
        "(of ab) against our reference in float64"
    )
    operations = work.mean_field(images * width * height, LABELS, 3, NEIGHBORS, CUDA_SWEEPS)
    rows = timing.compare([timing.row(c, times.get(c.name), moved[c.name], operations, **context) for c in candidates])
    # a plain copy reads and writes as much as its time says: half of it is one read of the logits
    read = times[timing.COPY].median / 2
    for row in rows:
        if row["candidate"] in times and row["candidate"] != timing.COPY:
            row["reads_of_logits"] = round(times[row["candidate"]].median / read, 2)
            row["note"] = f"{row['note']} {row['reads_of_logits']} reads of the logits".strip()
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(
        "mean_field", __doc__, "all of the sizes if left out", "few samples, no torch.compile, the smallest size alone"
    )
    parser.add_argument("--images", type=int, default=1, help="batch of --size, on CUDA")
    parser.add_argument("--perf", action="store_true", help="instructions per pixel, label and sweep, on the CPU")
    options = timing.parse(parser, arguments)
    sizes = CUDA_SIZES if options.device == "cuda" else SIZES
    if options.quick:
        sizes = sizes[:1]
    if options.size:
        sizes = [(options.images, *options.size)]

    record = timing.machine(options.device, options.commit)
    rows = []
    for images, width, height in sizes:
        with torch.inference_mode():
            if options.device == "cuda":
                table = on_cuda(images, width, height, options.quick)
            else:
                table = on_cpu(width, height, options.quick, options.perf)
        rows += table
        timing.show(table, table[0]["title"])
    return timing.finish("mean_field", options, record, rows)


if __name__ == "__main__":
    sys.exit(main())
