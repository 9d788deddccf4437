"""The colour network beside one of the shape of Zhang et al. 2016: images/s, and TFLOP/s beside a matrix product.

`python -m benchmarks.network [--size 256x256] [--device cpu|cuda] [--json FILE] [--quick]`

Lightness to logits at a quarter of the size, batches of several pictures, float32 and bfloat16 (weights and
activations). Ours has the bundled weights where they are there. The other network has random ones: its result is not
compared.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastcolor.model.checkpoint import CheckpointError, load_checkpoint
from fastcolor.model.colorizer import BUNDLED
from fastcolor.model.network import ColorNetwork, count_parameters

from . import timing, work
from .eccv16 import Eccv16, flops
from .timing import Candidate

BATCHES = {"cpu": (1, 4, 16), "cuda": (1, 16, 128)}
PEER_BATCHES = {"cpu": (1, 4), "cuda": (1, 16, 128)}  # of the other network: 16 pictures take a CPU ten seconds
SIDE = {"cpu": 1536, "cuda": 8192}  # of the matrix product
# Of ours, the largest difference from float64 over the largest logit: eight bits of mantissa pass some 20 layers
BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.05}
TF32_BOUND = 0.02  # in place of the first, on a GPU: ten bits
LAYOUTS = {"channels_last": torch.channels_last, "planes": torch.contiguous_format}


@dataclass
class Peer:
    name: str
    operations: int
    moved: int  # bytes that have to be: weights, lightness, logits
    build: Callable[[], Callable[[int], Tensor]]
    dtype: torch.dtype
    ours: bool


def our_network() -> ColorNetwork:
    try:
        return load_checkpoint(BUNDLED).network.eval()
    except (CheckpointError, OSError):
        torch.manual_seed(0)
        return ColorNetwork().eval()


def called(network: nn.Module, L: Tensor, dtype: torch.dtype, layout: torch.memory_format, device: str, compile=False):
    """Builds a call of a network in a type and layout: fresh weights each, so that none is converted on the way."""

    def build():
        made = copy.deepcopy(network).to(device, dtype, memory_format=layout)
        inputs = L.to(device, dtype).contiguous(memory_format=layout)
        if not compile:
            return lambda i: made(inputs)
        torch._dynamo.reset()
        function = torch.compile(made)
        function(inputs)
        return lambda i: function(inputs)

    return build


def product(dtype: torch.dtype, device: str, side: int) -> tuple[Candidate, int]:
    a = torch.randn(side, side).to(device, dtype)
    out = torch.empty_like(a)
    return Candidate(f"{work.PRODUCT}, {name_of(dtype)}", lambda i: torch.mm(a, a, out=out)), 2 * side**3


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def peers(mine: ColorNetwork, other: Eccv16 | None, L: Tensor, device: str, quick: bool) -> Iterator[Peer]:
    own_work = flops(mine, L)
    other_work = flops(other, L) if other else 0
    logits = len(L) * mine.config.bins.count * L[0].numel() // mine.stride**2
    for dtype in (torch.float32, torch.bfloat16):
        kind, item = name_of(dtype), dtype.itemsize
        moved = item * (count_parameters(mine) + L.numel() + logits)
        for order, layout in LAYOUTS.items():
            if order == "channels_last" or not quick:
                build = called(mine, L, dtype, layout, device)
                yield Peer(f"fastcolor, {kind}, {order}", own_work, moved, build, dtype, True)
        if not quick and len(L) == BATCHES[device][1]:  # it compiles for half a minute
            build = called(mine, L, dtype, torch.channels_last, device, compile=True)
            yield Peer(f"fastcolor, {kind}, torch.compile", own_work, moved, build, dtype, True)
        if other:
            more = item * (count_parameters(other) - count_parameters(mine))
            network = _Logits(other)
            for order, layout in LAYOUTS.items():
                if order == "channels_last" or not quick:
                    build = called(network, L, dtype, layout, device)
                    yield Peer(f"eccv16-shaped, {kind}, {order}", other_work, moved + more, build, dtype, False)


class _Logits(nn.Module):
    """Logits, as our network gives them."""

    def __init__(self, network: Eccv16):
        super().__init__()
        self.network = network

    def forward(self, L: Tensor) -> Tensor:
        return self.network.logits(L)


def benchmark(batch: int, width: int, height: int, mine: ColorNetwork, other: Eccv16 | None, options) -> list[dict]:
    """The rows of one batch. The first picture of ours is compared with float64 before anything is timed."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 1, max(2, height // 16), max(2, width // 16), generator=generator) * 100
    L = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    exact = copy.deepcopy(mine).double()(L[:1].double())
    candidates, operations, moved, kinds, peaks = [], {}, {}, {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        candidate, count = product(dtype, options.device, 512 if options.quick else SIDE[options.device])
        candidates.append(candidate)
        operations[candidate.name], kinds[candidate.name] = count, name_of(dtype)
    for peer in peers(mine, other, L, options.device, options.quick):
        candidate = Candidate(peer.name, None, ours=peer.ours)
        candidates.append(candidate)
        operations[peer.name], kinds[peer.name] = peer.operations, name_of(peer.dtype)
        moved[peer.name] = peer.moved
        try:
            run = peer.build()
            result = run(0)
        except Exception as error:  # no compiler, one that fails, or too little memory
            if not peer.name.endswith("torch.compile") and not isinstance(error, RuntimeError):
                raise
            candidate.why_not = timing.first_line(error)
            continue
        if peer.ours:
            candidate.error = ((result[:1].cpu().double() - exact).abs().max() / exact.abs().max()).item()
            bound = max(BOUND[peer.dtype], TF32_BOUND if options.device == "cuda" else 0)
            if not candidate.error <= bound:
                candidate.why_not = f"off by {candidate.error:.2g} of the largest, more than {bound:g}"
                continue
        candidate.run = run
        peaks[peer.name] = timing.peak(lambda run=run: run(0), options.device)
    able = [c for c in candidates if c.run]
    times = timing.measure(able, options.device, rounds=3 if options.quick else 9, calls=4)
    title = f"network, {batch} of {width}×{height}; error in shares of the largest logit against float64"
    context = {"op": "network", "size": f"{width}x{height}", "batch": batch, "title": title, "oracle": "float64"}
    rows = []
    for c in candidates:
        row = timing.row(
            c, times.get(c.name), moved.get(c.name, 0), operations[c.name], arithmetic=kinds[c.name], **context
        )
        if c.name in peaks and c.name in times:
            row["images_per_s"] = round(batch / times[c.name].median, 2)
            row["note"] = f"{row['images_per_s']:,.1f} images/s"
            if peaks[c.name] is not None:
                row["peak_MB"] = round(peaks[c.name] / 1e6, 1)
                row["note"] += f", {row['peak_MB']} MB"
        rows.append(row)
    rows = timing.compare(rows)
    timing.show(rows, title)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser("network", __doc__, "256x256", "few samples, one picture, no torch.compile")
    options = timing.parse(parser, arguments)
    width, height = options.size or ((128, 128) if options.quick else (256, 256))
    if width % 8 or height % 8:
        parser.error(f"--size must have sides that divide by 8, for the peer's sake; got {width}x{height}")
    record, rows = timing.machine(options.device, options.commit), []
    # on a GPU PyTorch's convolutions of float32 are products of TF32: so is the matrix product beside them
    torch.set_float32_matmul_precision("high" if options.device == "cuda" else "highest")
    torch.manual_seed(0)
    mine, other = our_network(), Eccv16().eval()
    picture = torch.zeros(1, 1, height, width)
    record["networks"] = {
        name: {"parameters": count_parameters(n), "GFLOP": round(flops(n, picture) / 1e9, 2)}
        for name, n in (("fastcolor", mine), ("eccv16-shaped", other))
    }
    for name, facts in record["networks"].items():
        print(f"{name}: {facts['parameters'] / 1e6:.1f} M parameters, {facts['GFLOP']} GFLOP at {width}×{height}")
    for batch in BATCHES[options.device][: 1 if options.quick else None]:
        with torch.inference_mode():
            peer = other if batch in PEER_BATCHES[options.device] else None
            rows += benchmark(batch, width, height, mine, peer, options)
    return timing.finish("network", options, record, rows)


if __name__ == "__main__":
    sys.exit(main())
