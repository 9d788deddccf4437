"""Colour cross-entropy, forward and backward, against dense soft targets and our own reference in PyTorch.

`python -m benchmarks.ops.loss [--size 64x64] [--device cpu|cuda] [--json FILE] [--quick]`
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import fastcolor
from fastcolor.bins import ColorBins, soft_encode
from fastcolor.ops import _backend
from fastcolor.ops.head_cross_entropy import FEWEST
from fastcolor.reference import cross_entropy as reference

from .. import timing, work
from ..timing import Candidate

BINS = ColorBins()
SIZES = {"cpu": [(16, 32, 32), (16, 64, 64)], "cuda": [(64, 64, 64)]}
CHANNELS = 64  # of the network's last features
# Of ours, relative to the largest entry of the gradient: float32 rounds exponentials of differences of logits
GRADIENT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
HEAD_BOUND = {torch.float32: 1e-4, torch.bfloat16: 2**-6}  # of the layer's weight, a sum over all pixels


def dense(logits: Tensor, ab: Tensor) -> Tensor:
    """With a tensor of N·K soft targets, as ports of Zhang et al. 2016 do it."""
    index, p = soft_encode(BINS, ab.movedim(1, -1))
    target = logits.new_zeros(*ab.shape[:1], *ab.shape[2:], BINS.count)
    target.scatter_(-1, index[0], p[0].to(logits.dtype))
    return F.cross_entropy(logits, target.movedim(-1, 1))


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, ab: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    loss(logits, ab).backward()
    return logits.grad


def peers(logits: Tensor, ab: Tensor, quick: bool) -> Iterator[tuple[str, Callable]]:
    def compiled():
        torch._dynamo.reset()
        function = torch.compile(lambda u: reference.color_cross_entropy(u, ab, BINS))
        with_gradient(lambda u, _: function(u), logits, ab)
        return lambda i: with_gradient(lambda u, _: function(u), logits, ab)

    def ours():
        if _backend.choose("color_cross_entropy", logits.device).name == "reference":
            raise ImportError(f"color_cross_entropy has no kernel for {logits.device.type}")
        return lambda i: with_gradient(fastcolor.color_cross_entropy, logits, ab)

    yield "fastcolor", ours
    yield "dense soft targets, F.cross_entropy", lambda: lambda i: with_gradient(dense, logits, ab)
    yield (
        "our reference, PyTorch eager",
        lambda: lambda i: with_gradient(lambda u, t: reference.color_cross_entropy(u, t, BINS), logits, ab),
    )
    if not quick:
        yield "our reference, torch.compile", compiled


def head_peers(features: Tensor, weight: Tensor, bias: Tensor, ab: Tensor) -> Iterator[tuple[str, Callable]]:
    def run(loss: Callable[..., Tensor]):
        def call(i: int) -> Tensor:
            inputs = [x.detach().requires_grad_() for x in (features, weight, bias)]
            loss(*inputs).backward()
            return inputs[1].grad

        return call

    def apart(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fastcolor.color_cross_entropy(F.conv2d(x, w.to(x.dtype), b.to(x.dtype)), ab)

    yield "fastcolor, in one", lambda: run(lambda *inputs: fastcolor.head_cross_entropy(*inputs, ab))
    yield "convolution, then fastcolor's loss", lambda: run(apart)


def table(title: str, moved: int, operations: int, contestants, exact: Tensor, bound: float, options) -> list[dict]:
    candidates, peaks = [timing.plain_copy(moved, options.device)], {}
    for name, build in contestants:
        candidate = Candidate(name, None, ours=name.startswith("fastcolor"))
        candidates.append(candidate)
        try:
            run = build()
        except Exception as error:  # no kernel, no compiler, or one that fails
            candidate.why_not = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            continue
        candidate.error = ((run(0).cpu().double() - exact).abs().max() / exact.abs().max()).item()
        if candidate.ours and not candidate.error <= bound:
            candidate.why_not = f"off by {candidate.error:.2g} of the largest, more than {bound:g}"
            continue
        candidate.run = run
        peaks[name] = timing.peak(lambda run=run: run(0), options.device)
    able = [c for c in candidates if c.run]
    times = timing.measure(able, options.device, rounds=3 if options.quick else 9, calls=4)
    op = "head_cross_entropy" if "last layer" in title else "color_cross_entropy"
    context = {"title": title, "op": op}
    context |= {"error_unit": "of the gradient's largest entry", "oracle": "our reference in float64"}
    rows = timing.compare([timing.row(c, times.get(c.name), moved, operations, **context) for c in candidates])
    for row in rows:
        if peaks.get(row["candidate"]) is not None and row["median_us"] != timing.NOT_MEASURED:
            row["peak_MB"] = round(peaks[row["candidate"]] / 1e6, 1)
            row["note"] = f"{row['peak_MB']} MB"
    timing.show(rows, title)
    return rows


def benchmark(size: tuple[int, int, int], options) -> list[dict]:
    batch, height, width = size
    generator = torch.Generator().manual_seed(0)
    ab = torch.randn(batch, 2, height, width, generator=generator) * 25
    wide = torch.randn(batch, BINS.count, height, width, generator=generator) * 3
    operations = work.color_cross_entropy(batch * height * width, BINS.count)
    layer = 3 * 2 * CHANNELS * BINS.count * batch * height * width  # forward, gradients of features and of weights
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for order, layout in (("labels last", torch.channels_last), ("planes", torch.contiguous_format)):
            logits = wide.to(dtype).contiguous(memory_format=layout)
            exact = with_gradient(lambda u, t: reference.color_cross_entropy(u, t, BINS), logits.double(), ab.double())
            title = f"loss and gradient, {batch}×{height}×{width} pixels, K = {BINS.count}, {dtype}, {order}"
            moved = 2 * logits.numel() * logits.element_size()
            contestants = peers(logits.to(options.device), ab.to(options.device), options.quick)
            rows += table(title, moved, operations, contestants, exact, GRADIENT_BOUND[dtype], options)
        if batch * height * width < FEWEST:
            continue  # there "in one" is the two operations
        features = torch.randn(batch, CHANNELS, height, width, generator=generator).to(options.device, dtype)
        features = features.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(BINS.count, CHANNELS, 1, 1, generator=generator).to(options.device) * 0.05
        bias = torch.zeros(BINS.count, device=options.device)
        title = f"last layer, loss and gradients, {batch}×{height}×{width} pixels, {CHANNELS} channels, {dtype}"
        moved = 2 * features.numel() * features.element_size()
        contestants = head_peers(features, weight, bias, ab.to(options.device))
        inputs = [x.double().detach().requires_grad_() for x in (features, weight.to(dtype), bias)]
        reference.color_cross_entropy(F.conv2d(*inputs), ab.double().to(options.device), BINS).backward()
        exact = inputs[1].grad.cpu()
        rows += table(title, moved, operations + layer, contestants, exact, HEAD_BOUND[dtype], options)
    return rows


def main(arguments: list[str] | None = None) -> int:
    sizes = "of 16 images; 32x32 and 64x64, on CUDA 64 of 64x64"
    options = timing.parse(
        timing.parser("loss", __doc__, sizes, "few samples, the smallest size, no torch.compile"), arguments
    )
    record, rows = timing.machine(options.device, options.commit), []
    sizes = [(2, 32, 32)] if options.quick else SIZES[options.device]
    if options.size:
        width, height = options.size
        sizes = [(2 if options.quick else 16, height, width)]
    for size in sizes:
        rows += benchmark(size, options)
    return timing.finish("loss", options, record, rows)


if __name__ == "__main__":
    sys.exit(main())
