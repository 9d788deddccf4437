"""Annealed mean of a network's logits, against what others run: a softmax, a power and a product with the colours.

`python -m benchmarks.ops.annealed_mean [--size 480x270] [--device cpu|cuda] [--json FILE] [--quick]`
"""

from __future__ import annotations

import sys

import torch

import fastcolor
from fastcolor.bins import ColorBins
from fastcolor.ops import _backend
from fastcolor.reference import mean_field as reference

from .. import timing, work
from ..timing import Candidate

BINS = ColorBins()
TEMPERATURE = 0.38
BOUND = 5e-3  # of ab, against float64


def unfused(logits: torch.Tensor) -> torch.Tensor:
    """The steps of Zhang et al. 2016, equation 5, one tensor each."""
    q = (logits.float() / TEMPERATURE).softmax(1)
    return torch.einsum("bkhw,kc->bchw", q, BINS.centers.to(q))


def benchmark(width: int, height: int, options) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(1, BINS.count, height, width, generator=generator) * 4
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for order, layout in (("labels last", torch.channels_last), ("planes", torch.contiguous_format)):
            logits = wide.to(dtype).contiguous(memory_format=layout)
            exact = reference.annealed_mean(logits.double(), TEMPERATURE, BINS, True)
            logits = logits.to(options.device)
            moved = logits.numel() * logits.element_size() + 8 * width * height
            title = f"annealed mean, {width}×{height}, K = {BINS.count}, {dtype}, {order}"
            rows += table(title, moved, logits, exact, options)
    return rows


def table(title: str, moved: int, logits: torch.Tensor, exact: torch.Tensor, options) -> list[dict]:
    def ours():
        if _backend.choose("mean_field", logits.device).name == "reference":
            raise ImportError(f"mean_field has no kernel for {logits.device.type}")
        return lambda i: fastcolor.annealed_mean(logits, TEMPERATURE, BINS, logits=True)

    def compiled():
        torch._dynamo.reset()
        function = torch.compile(unfused)
        function(logits)
        return lambda i: function(logits)

    peers = [("fastcolor", ours), ("unfused PyTorch", lambda: lambda i: unfused(logits))]
    if not options.quick:
        peers.append(("the same by torch.compile", compiled))
    candidates = [timing.plain_copy(moved, options.device)]
    for name, build in peers:
        candidate = Candidate(name, None, ours=name == "fastcolor")
        candidates.append(candidate)
        try:
            run = build()
        except Exception as error:  # no kernel, no compiler, or one that fails
            candidate.why_not = timing.first_line(error)
            continue
        candidate.error = (run(0).cpu().double() - exact).abs().max().item()
        if candidate.ours and not candidate.error <= BOUND:
            candidate.why_not = f"off by {candidate.error:.2g}, more than {BOUND:g}"
            continue
        candidate.run = run
    able = [c for c in candidates if c.run]
    times = timing.measure(able, options.device, rounds=3 if options.quick else 11, calls=4)
    _, labels, height, width = logits.shape
    context = {"title": title, "op": "annealed_mean", "size": f"{width}x{height}", "labels": labels}
    context |= {"error_unit": "ab", "oracle": "our reference in float64"}
    operations = work.annealed_mean(width * height, labels)
    rows = timing.compare([timing.row(c, times.get(c.name), moved, operations, **context) for c in candidates])
    timing.show(rows, title)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser("annealed_mean", __doc__, "480x270", "few samples, a small picture, no torch.compile")
    options = timing.parse(parser, arguments)
    record = timing.machine(options.device, options.commit)
    size = options.size or ((96, 64) if options.quick else (480, 270))
    return timing.finish("annealed_mean", options, record, benchmark(*size, options))


if __name__ == "__main__":
    sys.exit(main())
