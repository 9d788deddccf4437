"""Colour cross-entropy in Triton: targets, loss and gradient of a block of pixels in one program. The formulas are in
fastcolor.reference.cross_entropy.

A program looks up the nearest labels of its pixels, goes over their logits once for the softmax, and once more, out of
the caches, for the gradient. Nothing is summed by atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastcolor.kernels.triton.elementary import exp2
from fastcolor.kernels.triton.labels import nearest_labels
from torch import Tensor

PIXELS = 32  # of a program
CHUNK = 64  # labels of a tile: 313 of them pad to 320
WARPS = 4

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3e38)  # in place of −inf, from which −inf can be taken away


@triton.jit
def cross_entropy_kernel(
    logits_ptr, ab_ptr, centers_ptr, cells_ptr, labels_ptr, weights_ptr, ignore_ptr, upstream_ptr, scale_ptr,
    losses_ptr, grad_ptr, blocks, pixels, sharpness, cell_first, cell_size,
    K: tl.constexpr, AXES: tl.constexpr, COUNT: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    COLUMNS: tl.constexpr, LABELS_LAST: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr,
    UPSTREAM: tl.constexpr, GRAD: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    i = (program % blocks) * P + tl.arange(0, P)
    valid = i < pixels
    a_of = tl.load(ab_ptr + image * 2 * pixels + i, mask=valid, other=0.0)
    b_of = tl.load(ab_ptr + image * 2 * pixels + pixels + i, mask=valid, other=0.0)
    kept = valid
    if MASKED:
        kept = kept & (tl.load(ignore_ptr + image * pixels + i, mask=valid, other=1) == 0)
    column = tl.arange(0, COLUMNS)[None, :]
    c = tl.arange(0, C)[None, :]
    loss = tl.zeros([P], tl.float32)
    if LABELS_LAST:
        step = tl.full([], 1, tl.int64)
        base = (image * pixels + i.to(tl.int64)) * K
    else:
        step = tl.full([], 1, tl.int64) * pixels
        base = image * K * pixels + i.to(tl.int64)
    for axis in tl.static_range(AXES):
        if AXES == 1:
            x, y = a_of, b_of
        else:
            x = a_of if axis == 0 else b_of
            y = tl.zeros([P], tl.float32)
        index, squared = nearest_labels(
            x, y, valid, axis, centers_ptr, cells_ptr, labels_ptr, cell_first, cell_size,
            COUNT, SIDE, WIDTH, N, COLUMNS, P, C,
        )  # fmt: skip
        nearest = tl.sum(tl.where(column == 0, squared, 0.0), 1)
        beyond = tl.where(column < N, squared - nearest[:, None], 0.0)
        share = tl.where(column < N, exp2(beyond * (sharpness * -_LOG2E)), 0.0)
        share = share / tl.sum(share, 1)[:, None]
        weight = tl.full([P], 1.0, tl.float32)
        if WEIGHTED:
            closest = tl.sum(tl.where(column == 0, index, 0), 1)
            weight = tl.load(weights_ptr + axis * COUNT + closest)
        # the softmax
        most = tl.full([P, C], _LOWEST, tl.float32)
        total = tl.zeros([P, C], tl.float32)
        for first in range(0, COUNT, C):
            number = first + c
            inside = valid[:, None] & (number < COUNT)
            at = base[:, None] + (axis * COUNT + number).to(tl.int64) * step
            u = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(most, u, propagate_nan=tl.PropagateNan.ALL)
            total = total * exp2((most - higher) * _LOG2E) + exp2((u - higher) * _LOG2E)
            most = higher
        highest = tl.max(most, 1)
        total = tl.sum(total * exp2((most - highest[:, None]) * _LOG2E), 1)
        places = base[:, None] + (axis * COUNT + index).to(tl.int64) * step
        picked = tl.load(logits_ptr + places, mask=valid[:, None] & (column < N), other=0.0).to(tl.float32)
        below = tl.sum(tl.where(column < N, share * (highest[:, None] - picked), 0.0), 1)
        loss += weight * (below + tl.log2(total) * _LN2)
        if GRAD:
            factor = weight * tl.load(scale_ptr)
            if UPSTREAM:
                factor = factor * tl.load(upstream_ptr + image * pixels + i, mask=valid, other=0.0)
            inverse = 1.0 / total
            for first in range(0, COUNT, C):
                number = first + c
                inside = valid[:, None] & (number < COUNT)
                at = base[:, None] + (axis * COUNT + number).to(tl.int64) * step
                u = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
                g = exp2((u - highest[:, None]) * _LOG2E) * inverse[:, None]
                for j in tl.static_range(N):
                    hit = tl.sum(tl.where(column == j, index, 0), 1)
                    part = tl.sum(tl.where(column == j, share, 0.0), 1)
                    g = tl.where(number == hit[:, None], g - part[:, None], g)
                g = tl.where(kept[:, None], g * factor[:, None], 0.0)
                tl.store(grad_ptr + at, g.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(losses_ptr + image * pixels + i, tl.where(kept, loss, 0.0), mask=valid)


def cross_entropy(
    logits: Tensor,  # [B, K, H, W] as labels_last says, without gaps
    labels_last: bool,
    ab: Tensor,  # [B, 2, H, W] float32, contiguous
    tables: tuple[Tensor, Tensor, Tensor],  # of fastcolor.ops.labels.arrays, on the device
    side: int,
    first: float,
    size: float,
    weights: Tensor | None,
    ignore: Tensor | None,
    upstream: Tensor | None,
    scale: Tensor,  # [] factor of the gradient
    neighbors: int,
    sharpness: float,
    losses: Tensor,  # [B, H, W] float32
    grad: Tensor | None,  # as the logits
) -> None:
    """Writes the losses of all pixels, 0 where they are ignored, and the gradient of the logits."""
    centers, cells, labels = tables
    batch, count = logits.shape[0], logits.shape[1]
    pixels = logits.shape[2] * logits.shape[3]
    blocks = triton.cdiv(pixels, PIXELS)
    if batch * blocks == 0:
        return
    nothing = losses
    with torch.cuda.device_of(losses):
        cross_entropy_kernel[(batch * blocks,)](
            logits, ab, centers, cells, labels, nothing if weights is None else weights,
            nothing if ignore is None else ignore.view(torch.uint8), nothing if upstream is None else upstream, scale,
            losses, nothing if grad is None else grad, blocks, pixels, sharpness, first, size,
            K=count, AXES=len(centers), COUNT=centers.shape[2], SIDE=side, WIDTH=labels.shape[2], N=neighbors,
            COLUMNS=triton.next_power_of_2(neighbors), LABELS_LAST=labels_last, WEIGHTED=weights is not None,
            MASKED=ignore is not None, UPSTREAM=upstream is not None, GRAD=grad is not None, P=PIXELS, C=CHUNK,
            num_warps=WARPS,
        )  # fmt: skip
