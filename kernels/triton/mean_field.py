"""The mean field in Triton: one launch for each update. The formulas are in fastcolor.reference.mean_field.

An update gathers G = Σ_j w_ij F_j (R numbers a pixel), rebuilds the scores t = u + A G chunk by chunk of labels, and
leaves F = Bᵀ softmax(t) for the next one: the logits are read once, and nothing else has K numbers a pixel. Backwards

    dF_i = Σ_j w_ij dG_j,   dq = B dF,   dt = q ∘ (dq − q·dq),   dH = Aᵀ dt,   du = Σ_k unary_k dt_k

the adjoints of R numbers a pixel come first, update by update; one last pass makes du from all of them and one more
read of u. To add each dt to du where it is made would read and write N·K float32 an update: four times the logits in
16 bits. Nothing is summed by atomics: equal inputs give equal bits.

Up to FEW columns are multiplied one by one; more go to the tensor cores in three products of tf32 each (plain tf32
would be off by 2^-11 of scores in the hundreds). H·W is below 2^31 − 64; all else is addressed in 64 bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from fastcolor.kernels.field import Gradients, Problem
from fastcolor.kernels.triton.elementary import exp2
from torch import Tensor

# A GPU owner may tune these; `python -m benchmarks.registers` shows what they cost.
FEW = 4  # columns R that are multiplied one by one, with registers for each
PIXELS, FEW_CHUNK = 64, 32  # pixels of a program and labels of a tile, few columns: 8 × 4 in each thread of 2 warps
WARPS = 2
MANY_PIXELS = 32  # of a program, many columns: tiles of [64 labels, 32 pixels] for the tensor cores
MANY_WARPS = 4
CHUNK = 64  # labels of a tile: 313 of them pad to 320
LANES = 8  # of a chunk, few columns: each has sums of its own until the end
OFFSETS = 8  # neighbours that are on their way from memory at once, few columns
ARRIVING = 32  # many columns: neighbours times columns
BACKWARD_CHUNK, BACKWARD_PIXELS = 16, 16  # many columns: four products a tile, each with halves of its operands
FACTOR_GROUPS = 128  # of programs over whose pixels the gradients of A and B are summed apart
PAIR_PIXELS, PAIR_TERMS, PAIR_WARPS = 64, 8, 4  # of a program that makes the gradients of the pair weights

_FEATURES, _MARGINALS, _COLORS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what an update leaves
_NONE, _PART, _WHOLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # of the logits, in the scores
_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3e38)  # in place of −inf, from which −inf can be taken away
_VARYING = (
    "blocks",
    "height",
    "width",
    "offsets",
    "slots",
    "before",
    "after",
    "k",
    "tiles",
    "groups",
)  # not worth a compilation each


# --- pixels and labels ------------------------------------------------------------------------------------------------


@triton.jit
def _tile(blocks, pixels, P: tl.constexpr):
    """The image of this program (int64), its pixels [P], and which of them there are."""
    program = tl.program_id(0)
    i = (program % blocks) * P + tl.arange(0, P)
    return (program // blocks).to(tl.int64), i, i < pixels


@triton.jit
def _places(label, i, pixels, K: tl.constexpr, LABELS_LAST: tl.constexpr):
    """Where the labels (int64, [.., 1]) of the pixels ([P]) lie in [K, pixels] or [pixels, K]."""
    if LABELS_LAST:
        return label + i.to(tl.int64) * K
    else:
        return label * pixels + i


@triton.jit
def _plane(n: tl.constexpr, pixels, R: tl.constexpr):
    """n times R planes, in 64 bits."""
    return tl.full([], n * R, tl.int64) * pixels


@triton.jit
def _state(ptr, image, slots, slot, which: tl.constexpr, pixels, R: tl.constexpr):
    """The planes of one of the two kinds in a slot of [B, slots, 2, R, pixels]."""
    return ptr + (((image * slots + slot) * 2 + which) * R) * pixels


# --- the stencil ------------------------------------------------------------------------------------------------------


@triton.jit
def _neighbors(
    guide_ptr, space_ptr, sharpness_ptr, offsets_ptr,
    o, i, valid, height, width, offsets,
):  # fmt: skip
    """Of offsets [N] at pixels [P], guide_ptr being that of their image: w_ij, the part of it that lightness makes,
    g_i − g_j, where j is, and whether it is in the image; [N, P] each."""
    known = o < offsets
    dy = tl.load(offsets_ptr + o, mask=known, other=0)[:, None]
    dx = tl.load(offsets_ptr + offsets + o, mask=known, other=0)[:, None]
    space = tl.load(space_ptr + o, mask=known, other=0.0)[:, None]
    y = (i // width)[None, :]
    x = (i % width)[None, :]
    inside = (known[:, None] & valid[None, :]) & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
    j = i[None, :] + (dy * width + dx)
    own = tl.load(guide_ptr + i, mask=valid, other=0.0)[None, :]
    d = own - tl.load(guide_ptr + j, mask=inside, other=0.0)
    scaled = d * tl.load(sharpness_ptr)
    nearness = exp2(scaled * scaled * (-0.5 * _LOG2E))
    return space * nearness, nearness, d, j, inside


@triton.jit
def _gather_few(
    source_ptr, guide_ptr, space_ptr, sharpness_ptr, offsets_ptr,
    i, valid, pixels, height, width, offsets,
    R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Σ_j w_ij of each of the planes [R, pixels], [P] each."""
    g0 = tl.zeros([N, P], tl.float32)
    g1 = tl.zeros([N, P], tl.float32)
    g2 = tl.zeros([N, P], tl.float32)
    g3 = tl.zeros([N, P], tl.float32)
    for first in range(0, offsets, N):
        w, _, _, j, inside = _neighbors(
            guide_ptr, space_ptr, sharpness_ptr, offsets_ptr, first + tl.arange(0, N), i, valid, height, width, offsets
        )
        at = source_ptr + j
        g0 += w * tl.load(at, mask=inside, other=0.0)
        if R > 1:
            at += pixels  # plane after plane: 3 * pixels could exceed 32 bits
            g1 += w * tl.load(at, mask=inside, other=0.0)
        if R > 2:
            at += pixels
            g2 += w * tl.load(at, mask=inside, other=0.0)
        if R > 3:
            at += pixels
            g3 += w * tl.load(at, mask=inside, other=0.0)
    return tl.sum(g0, 0), tl.sum(g1, 0), tl.sum(g2, 0), tl.sum(g3, 0)


@triton.jit
def _gather_many(
    source_ptr, guide_ptr, space_ptr, sharpness_ptr, offsets_ptr,
    i, valid, pixels, height, width, offsets,
    R: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Σ_j w_ij of the planes [R, pixels]: [ROWS, P], 0 from row R."""
    r = tl.arange(0, ROWS)
    planes = source_ptr + r.to(tl.int64)[None, :, None] * pixels
    g = tl.zeros([ROWS, P], tl.float32)
    for first in range(0, offsets, N):
        w, _, _, j, inside = _neighbors(
            guide_ptr, space_ptr, sharpness_ptr, offsets_ptr, first + tl.arange(0, N), i, valid, height, width, offsets
        )
        f = tl.load(planes + j[:, None, :], mask=inside[:, None, :] & (r < R)[None, :, None], other=0.0)
        g += tl.sum(w[:, None, :] * f, 0)
    return g


@triton.jit
def _load_few(ptr, i, valid, pixels, R: tl.constexpr):
    """The planes [R, pixels] at pixels [P], up to four of them."""
    at = ptr + i
    x0 = tl.load(at, mask=valid, other=0.0)
    x1 = x0
    x2 = x0
    x3 = x0
    if R > 1:
        at += pixels
        x1 = tl.load(at, mask=valid, other=0.0)
    if R > 2:
        at += pixels
        x2 = tl.load(at, mask=valid, other=0.0)
    if R > 3:
        at += pixels
        x3 = tl.load(at, mask=valid, other=0.0)
    return x0, x1, x2, x3


@triton.jit
def _store_few(ptr, i, valid, pixels, x0, x1, x2, x3, R: tl.constexpr):
    at = ptr + i
    tl.store(at, x0, mask=valid)
    if R > 1:
        at += pixels
        tl.store(at, x1, mask=valid)
    if R > 2:
        at += pixels
        tl.store(at, x2, mask=valid)
    if R > 3:
        at += pixels
        tl.store(at, x3, mask=valid)


@triton.jit
def _load_many(ptr, i, valid, pixels, R: tl.constexpr, ROWS: tl.constexpr):
    """The planes [R, pixels] at pixels [P]: [ROWS, P], 0 from row R."""
    r = tl.arange(0, ROWS)
    at = ptr + r.to(tl.int64)[:, None] * pixels + i[None, :]
    return tl.load(at, mask=(r < R)[:, None] & valid[None, :], other=0.0)


@triton.jit
def _store_many(ptr, i, valid, pixels, x, R: tl.constexpr, ROWS: tl.constexpr):
    r = tl.arange(0, ROWS)
    at = ptr + r.to(tl.int64)[:, None] * pixels + i[None, :]
    tl.store(at, x, mask=(r < R)[:, None] & valid[None, :])


@triton.jit
def _store_norms(ptr, i, valid, active, pixels, most, inverse, mean):
    """What makes q again from the scores: q = 2^(t log2 e − most) · inverse, 0 at pixels that did not take part."""
    at = ptr + i
    tl.store(at, tl.where(active, most, -_LOWEST), mask=valid)
    at += pixels
    tl.store(at, tl.where(active, inverse, 0.0), mask=valid)
    at += pixels
    tl.store(at, tl.where(active, mean, 0.0), mask=valid)


@triton.jit
def _load_norms(ptr, i, valid, pixels):
    at = ptr + i
    most = tl.load(at, mask=valid, other=-_LOWEST)
    at += pixels
    inverse = tl.load(at, mask=valid, other=0.0)
    at += pixels
    return most, inverse, tl.load(at, mask=valid, other=0.0)


@triton.jit
def _chunk(chunk, K: tl.constexpr, FIRST_AXIS: tl.constexpr, C: tl.constexpr):
    """The axis of a chunk, its first label, and the label after the last one of the axis."""
    FIRST: tl.constexpr = (FIRST_AXIS + C - 1) // C
    axis = tl.where(chunk < FIRST, 0, 1)
    first = tl.where(chunk < FIRST, chunk * C, FIRST_AXIS + (chunk - FIRST) * C)
    return axis, first, tl.where(chunk < FIRST, FIRST_AXIS, K)


@triton.jit
def _chunk_tile(blocks, pixels, K: tl.constexpr, FIRST_AXIS: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """Image, pixels and chunk of a program, the chunks of the same pixels side by side."""
    CHUNKS: tl.constexpr = (FIRST_AXIS + C - 1) // C + (K - FIRST_AXIS + C - 1) // C
    program = tl.program_id(0)
    tile = program // CHUNKS
    i = (tile % blocks) * P + tl.arange(0, P)
    axis, first, end = _chunk(program % CHUNKS, K, FIRST_AXIS, C)
    return (tile // blocks).to(tl.int64), i, i < pixels, axis, first, end


# --- few columns: tiles [L, G, P] of labels and pixels, L in the registers of one thread ------------------------------


@triton.jit
def _labels_few(first, L: tl.constexpr, G: tl.constexpr, TOGETHER: tl.constexpr):
    """Labels of a chunk, int64 [L, G, 1]: side by side in a thread where that makes wide loads, else in neighbours."""
    each = tl.arange(0, L).to(tl.int64)[:, None, None]
    lane = tl.arange(0, G).to(tl.int64)[None, :, None]
    if TOGETHER:
        return lane * L + each + first
    else:
        return lane + each * G + first


@triton.jit
def _rows(label, END: tl.constexpr):
    """Rows of A and B for labels; the last one past the end of the axis, where e^t is 0: loads without a mask."""
    return tl.minimum(label, END - 1).to(tl.int32)


@triton.jit
def _add_product(total, table_ptr, row, x0, x1, x2, x3, R: tl.constexpr):
    """total + Σ_r table[l, r] x_r: [L, G, P], R fused multiply-adds."""
    at = table_ptr + row * R
    total += tl.load(at) * x0[None, None, :]
    if R > 1:
        total += tl.load(at + 1) * x1[None, None, :]
    if R > 2:
        total += tl.load(at + 2) * x2[None, None, :]
    if R > 3:
        total += tl.load(at + 3) * x3[None, None, :]
    return total


@triton.jit
def _at_few(
    ptr, label, i, pixels,
    LABELS_LAST: tl.constexpr, TOGETHER: tl.constexpr, K: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Addresses of a tile, with a word on which of its axes go to the lanes of a warp.

    Triton shares tiles out in the order of contiguity, and versions differ on equal axes. One that is called contiguous
    by 2, but is not the most contiguous one, precedes L, and is never read as if it were.
    """
    at = ptr + _places(label, i[None, None, :], pixels, K, LABELS_LAST)
    if LABELS_LAST and not TOGETHER:
        return tl.max_contiguous(at, [1, G, 2])
    elif not LABELS_LAST:
        return tl.max_contiguous(at, [1, 2, P])
    else:
        return at


@triton.jit
def _scores_few(
    logits_ptr, a_ptr, label, row, known, i, valid, pixels, unary, h0, h1, h2, h3,
    FIELD: tl.constexpr, UNARY: tl.constexpr, LABELS_LAST: tl.constexpr, TOGETHER: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """t = unary u + A H, −inf where the axis has ended: [L, G, P]."""
    there = known & valid[None, None, :]
    if UNARY != _NONE:
        at = _at_few(logits_ptr, label, i, pixels, LABELS_LAST, TOGETHER, K, G, P)
        t = tl.load(at, mask=there, other=float("-inf")).to(tl.float32)
        if UNARY == _PART:
            t *= unary
    else:  # a uniform start: −inf · 0 must not appear
        t = tl.where(there, 0.0, float("-inf"))
    if FIELD:
        t = _add_product(t, a_ptr, row, h0, h1, h2, h3, R)
    return t


@triton.jit
def _axis_few(
    logits_ptr, a_ptr, b_ptr, to_ptr, image, i, valid, pixels, unary, scale, steps, h0, h1, h2, h3,
    OUTPUT: tl.constexpr, FIELD: tl.constexpr, UNARY: tl.constexpr, LABELS_LAST: tl.constexpr, TOGETHER: tl.constexpr,
    K: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, R: tl.constexpr, L: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """One axis of labels: Σ_l b[l] q_l, [P] for each column of B; or its marginals, written."""
    COLUMNS: tl.constexpr = 2 if OUTPUT == _COLORS else R
    logits = logits_ptr + image * K * pixels
    # Every lane g of labels goes by itself: m is its largest score, the sums are relative to 2^m.
    m = tl.full([G, P], _LOWEST, tl.float32)
    s = tl.zeros([G, P], tl.float32)
    f0 = tl.zeros([G, P], tl.float32)
    f1 = tl.zeros([G, P], tl.float32)
    f2 = tl.zeros([G, P], tl.float32)
    f3 = tl.zeros([G, P], tl.float32)
    for step in range(steps):
        label = _labels_few(BEGIN + step * (L * G), L, G, TOGETHER)
        row = _rows(label, END)
        known = label < END
        t = _scores_few(
            logits, a_ptr, label, row, known, i, valid, pixels, unary, h0, h1, h2, h3,
            FIELD, UNARY, LABELS_LAST, TOGETHER, K, R, G, P,
        )  # fmt: skip
        most = tl.maximum(m, tl.max(t, 0) * scale)
        shrink = exp2(m - most)
        # `most` is rounded once for all labels of a lane: that cancels, also at scores of 1e4
        e = exp2(t * scale - most[None, :, :])
        m = most
        s = s * shrink + tl.sum(e, 0)
        if OUTPUT != _MARGINALS:
            at = b_ptr + row * COLUMNS
            f0 = f0 * shrink + tl.sum(e * tl.load(at), 0)
            if COLUMNS > 1:
                f1 = f1 * shrink + tl.sum(e * tl.load(at + 1), 0)
            if COLUMNS > 2:
                f2 = f2 * shrink + tl.sum(e * tl.load(at + 2), 0)
            if COLUMNS > 3:
                f3 = f3 * shrink + tl.sum(e * tl.load(at + 3), 0)
    most = tl.max(m, 0)
    shrink = exp2(m - most[None, :])
    inverse = 1 / tl.sum(s * shrink, 0)
    if OUTPUT == _MARGINALS:
        for step in range(steps):  # u once more, now from the cache
            label = _labels_few(BEGIN + step * (L * G), L, G, TOGETHER)
            row = _rows(label, END)
            known = label < END
            t = _scores_few(
                logits, a_ptr, label, row, known, i, valid, pixels, unary, h0, h1, h2, h3,
                FIELD, UNARY, LABELS_LAST, TOGETHER, K, R, G, P,
            )  # fmt: skip
            q = exp2(t * scale - most[None, None, :]) * inverse[None, None, :]
            at = _at_few(to_ptr + image * K * pixels, label, i, pixels, LABELS_LAST, TOGETHER, K, G, P)
            tl.store(at, q.to(to_ptr.dtype.element_ty), mask=known & valid[None, None, :])
    return (
        tl.sum(f0 * shrink, 0) * inverse, tl.sum(f1 * shrink, 0) * inverse,
        tl.sum(f2 * shrink, 0) * inverse, tl.sum(f3 * shrink, 0) * inverse,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def update_few_kernel(
    logits_ptr,  # [B, K, pixels] or [B, pixels, K]
    guide_ptr,  # [B, pixels]
    a_ptr,  # [K, R]
    b_ptr,  # [K, R], or colours [K, 2]
    space_ptr,  # [offsets]
    sharpness_ptr,  # []
    offsets_ptr,  # [2, offsets] dy, dx
    prior_ptr,  # [B, R, pixels] or None
    states_ptr,  # [B, slots, 2 (H, F), R, pixels]
    to_ptr,  # marginals as the logits, or ab [B, 2, pixels]
    pixels, blocks, height, width, offsets, slots, before, after, steps, unary, scale, damping,
    OUTPUT: tl.constexpr, PARITY: tl.constexpr, KEEP: tl.constexpr, FIELD: tl.constexpr, UNARY: tl.constexpr,
    DAMPED: tl.constexpr, LABELS_LAST: tl.constexpr, TOGETHER: tl.constexpr,
    K: tl.constexpr, FIRST_AXIS: tl.constexpr, R: tl.constexpr, L: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    image, i, valid = _tile(blocks, pixels, P)
    states = _state(states_ptr, image, slots, after, 0, pixels, R)
    h0 = tl.zeros([P], tl.float32)
    h1 = h0
    h2 = h0
    h3 = h0
    active = valid
    if FIELD:
        h0, h1, h2, h3 = _gather_few(
            _state(states_ptr, image, slots, before, 1, pixels, R), guide_ptr + image * pixels, space_ptr,
            sharpness_ptr, offsets_ptr, i, valid, pixels, height, width, offsets, R, P, N,
        )  # fmt: skip
        if prior_ptr is not None:
            p0, p1, p2, p3 = _load_few(prior_ptr + image * R * pixels, i, valid, pixels, R)
            h0 += p0
            h1 += p1
            h2 += p2
            h3 += p3
        if DAMPED or PARITY >= 0:
            old = _state(states_ptr, image, slots, before, 0, pixels, R)
            o0, o1, o2, o3 = _load_few(old, i, valid, pixels, R)
            if DAMPED:
                h0 = (1 - damping) * h0 + damping * o0
                h1 = (1 - damping) * h1 + damping * o1
                h2 = (1 - damping) * h2 + damping * o2
                h3 = (1 - damping) * h3 + damping * o3
            if PARITY >= 0:
                active = valid & ((i // width + i % width) % 2 == PARITY)
                h0 = tl.where(active, h0, o0)
                h1 = tl.where(active, h1, o1)
                h2 = tl.where(active, h2, o2)
                h3 = tl.where(active, h3, o3)
    if KEEP:
        _store_few(states, i, valid, pixels, h0, h1, h2, h3, R)
    if OUTPUT != _FEATURES:
        active = valid  # the marginals of both colours of the board
    x0, x1, x2, x3 = _axis_few(
        logits_ptr, a_ptr, b_ptr, to_ptr, image, i, active, pixels, unary, scale, steps, h0, h1, h2, h3,
        OUTPUT, FIELD, UNARY, LABELS_LAST, TOGETHER, K, 0, FIRST_AXIS, R, L, G, P,
    )  # fmt: skip
    if FIRST_AXIS < K:
        y0, y1, y2, y3 = _axis_few(
            logits_ptr, a_ptr, b_ptr, to_ptr, image, i, active, pixels, unary, scale, steps, h0, h1, h2, h3,
            OUTPUT, FIELD, UNARY, LABELS_LAST, TOGETHER, K, FIRST_AXIS, K, R, L, G, P,
        )  # fmt: skip
        x0 += y0
        x1 += y1
        x2 += y2
        x3 += y3
    if OUTPUT == _COLORS:
        _store_few(to_ptr + image * 2 * pixels, i, valid, pixels, x0, x1, x2, x3, 2)
    if OUTPUT == _FEATURES:
        if PARITY >= 0:
            old = _state(states_ptr, image, slots, before, 1, pixels, R)
            o0, o1, o2, o3 = _load_few(old, i, valid, pixels, R)
            x0 = tl.where(active, x0, o0)
            x1 = tl.where(active, x1, o1)
            x2 = tl.where(active, x2, o2)
            x3 = tl.where(active, x3, o3)
        after_ptr = _state(states_ptr, image, slots, after, 1, pixels, R)
        _store_few(after_ptr, i, valid, pixels, x0, x1, x2, x3, R)


@triton.jit
def _axis_adjoint_few(
    logits_ptr, grad_ptr, a_ptr, b_ptr, norms_ptr, image, i, valid, active, pixels, unary, shift, steps,
    h0, h1, h2, h3, d0, d1, d2, d3,
    LAST: tl.constexpr, FIELD: tl.constexpr, UNARY: tl.constexpr, LABELS_LAST: tl.constexpr, TOGETHER: tl.constexpr,
    K: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, R: tl.constexpr, L: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """One axis of labels: dH = Aᵀ dt, [P] for each column of A, and what q and dt come from again (norms [3, pixels]).

    In one pass, dH = Σ A q dq − (Σ q dq) (Σ A q). `shift` is what dq has in common, which dt does not feel.
    """
    logits = logits_ptr + image * K * pixels
    m = tl.full([G, P], _LOWEST, tl.float32)
    s = tl.zeros([G, P], tl.float32)
    d = tl.zeros([G, P], tl.float32)
    x0 = tl.zeros([G, P], tl.float32)
    x1 = tl.zeros([G, P], tl.float32)
    x2 = tl.zeros([G, P], tl.float32)
    x3 = tl.zeros([G, P], tl.float32)
    y0 = tl.zeros([G, P], tl.float32)
    y1 = tl.zeros([G, P], tl.float32)
    y2 = tl.zeros([G, P], tl.float32)
    y3 = tl.zeros([G, P], tl.float32)
    for step in range(steps):
        label = _labels_few(BEGIN + step * (L * G), L, G, TOGETHER)
        row = _rows(label, END)
        known = label < END
        t = _scores_few(
            logits, a_ptr, label, row, known, i, active, pixels, unary, h0, h1, h2, h3,
            FIELD, UNARY, LABELS_LAST, TOGETHER, K, R, G, P,
        )  # fmt: skip
        if LAST:
            at = _at_few(grad_ptr + image * K * pixels, label, i, pixels, LABELS_LAST, TOGETHER, K, G, P)
            dq = tl.load(at, mask=known & active[None, None, :], other=0.0).to(tl.float32)
        else:
            dq = tl.zeros([L, G, P], tl.float32) - shift[None, None, :]
            dq = _add_product(dq, b_ptr, row, d0, d1, d2, d3, R)
        most = tl.maximum(m, tl.max(t, 0) * _LOG2E)
        shrink = exp2(m - most)
        e = exp2(t * _LOG2E - most[None, :, :])
        m = most
        s = s * shrink + tl.sum(e, 0)
        moved = e * dq
        d = d * shrink + tl.sum(moved, 0)
        if FIELD:
            at = a_ptr + row * R
            a = tl.load(at)
            x0 = x0 * shrink + tl.sum(moved * a, 0)
            y0 = y0 * shrink + tl.sum(e * a, 0)
            if R > 1:
                a = tl.load(at + 1)
                x1 = x1 * shrink + tl.sum(moved * a, 0)
                y1 = y1 * shrink + tl.sum(e * a, 0)
            if R > 2:
                a = tl.load(at + 2)
                x2 = x2 * shrink + tl.sum(moved * a, 0)
                y2 = y2 * shrink + tl.sum(e * a, 0)
            if R > 3:
                a = tl.load(at + 3)
                x3 = x3 * shrink + tl.sum(moved * a, 0)
                y3 = y3 * shrink + tl.sum(e * a, 0)
    most = tl.max(m, 0)
    shrink = exp2(m - most[None, :])
    inverse = 1 / tl.sum(s * shrink, 0)
    mean = tl.sum(d * shrink, 0) * inverse
    _store_norms(norms_ptr, i, valid, active, pixels, most, inverse, mean + shift)
    return (
        (tl.sum(x0 * shrink, 0) - mean * tl.sum(y0 * shrink, 0)) * inverse,
        (tl.sum(x1 * shrink, 0) - mean * tl.sum(y1 * shrink, 0)) * inverse,
        (tl.sum(x2 * shrink, 0) - mean * tl.sum(y2 * shrink, 0)) * inverse,
        (tl.sum(x3 * shrink, 0) - mean * tl.sum(y3 * shrink, 0)) * inverse,
    )


@triton.jit(do_not_specialize=_VARYING)
def adjoint_few_kernel(
    logits_ptr,  # [B, K, pixels] or [B, pixels, K]
    grad_ptr,  # of the marginals, as the logits
    guide_ptr,  # [B, pixels]
    a_ptr,  # [K, R]
    b_ptr,  # [K, R]
    space_ptr,  # [offsets]
    sharpness_ptr,  # []
    offsets_ptr,  # [2, offsets] dy, dx
    states_ptr,  # [B, slots, 2 (H, F), R, pixels]
    adjoints_ptr,  # [B, slots, 2 (dG, dF), R, pixels]
    later_ptr,  # [B, R, pixels] dH of the update that comes after this one, and then of this one
    norms_ptr,  # [B, slots, axes, 3 (log2 of the largest e^t, 1 / Σ, q·dq), pixels]
    pixels, blocks, height, width, offsets, slots, k, steps, unary, damping,
    LAST: tl.constexpr, PARITY: tl.constexpr, CARRY: tl.constexpr, LATER: tl.constexpr, FIELD: tl.constexpr,
    UNARY: tl.constexpr, LABELS_LAST: tl.constexpr, TOGETHER: tl.constexpr,
    K: tl.constexpr, FIRST_AXIS: tl.constexpr, R: tl.constexpr, L: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """What update k hands back: dF_k, dH_k and dG_k."""
    image, i, valid = _tile(blocks, pixels, P)
    mine = valid
    if PARITY >= 0:
        mine = valid & ((i // width + i % width) % 2 == PARITY)
    d0 = tl.zeros([P], tl.float32)
    d1 = d0
    d2 = d0
    d3 = d0
    shift = d0
    if not LAST:
        d0, d1, d2, d3 = _gather_few(
            _state(adjoints_ptr, image, slots, k + 1, 0, pixels, R), guide_ptr + image * pixels, space_ptr,
            sharpness_ptr, offsets_ptr, i, valid, pixels, height, width, offsets, R, P, N,
        )  # fmt: skip
        if CARRY:  # update k + 1, of the other colour, left these features as they were
            c0, c1, c2, c3 = _load_few(_state(adjoints_ptr, image, slots, k + 1, 1, pixels, R), i, mine, pixels, R)
            d0 += c0
            d1 += c1
            d2 += c2
            d3 += c3
        _store_few(_state(adjoints_ptr, image, slots, k, 1, pixels, R), i, valid, pixels, d0, d1, d2, d3, R)
        f0, f1, f2, f3 = _load_few(_state(states_ptr, image, slots, k, 1, pixels, R), i, valid, pixels, R)
        shift = d0 * f0
        if R > 1:
            shift += d1 * f1
        if R > 2:
            shift += d2 * f2
        if R > 3:
            shift += d3 * f3
    active = valid
    if FIELD and not LAST:
        active = mine
    h0, h1, h2, h3 = _load_few(_state(states_ptr, image, slots, k, 0, pixels, R), i, valid, pixels, R)
    AXES: tl.constexpr = 1 if FIRST_AXIS == K else 2
    norms = norms_ptr + (image * slots + k) * AXES * 3 * pixels
    x0, x1, x2, x3 = _axis_adjoint_few(
        logits_ptr, grad_ptr, a_ptr, b_ptr, norms, image, i, valid, active, pixels, unary, shift, steps,
        h0, h1, h2, h3, d0, d1, d2, d3,
        LAST, FIELD, UNARY, LABELS_LAST, TOGETHER, K, 0, FIRST_AXIS, R, L, G, P,
    )  # fmt: skip
    if FIRST_AXIS < K:
        y0, y1, y2, y3 = _axis_adjoint_few(
            logits_ptr, grad_ptr, a_ptr, b_ptr, norms + 3 * pixels, image, i, valid, active, pixels, unary, shift,
            steps, h0, h1, h2, h3, d0, d1, d2, d3,
            LAST, FIELD, UNARY, LABELS_LAST, TOGETHER, K, FIRST_AXIS, K, R, L, G, P,
        )  # fmt: skip
        x0 += y0
        x1 += y1
        x2 += y2
        x3 += y3
    if FIELD:  # the start has none
        x0 = tl.where(active, x0, 0.0)
        x1 = tl.where(active, x1, 0.0)
        x2 = tl.where(active, x2, 0.0)
        x3 = tl.where(active, x3, 0.0)
        later = later_ptr + image * R * pixels
        if LATER:
            if not LAST:
                kept = tl.full([P], damping, tl.float32)
                if PARITY >= 0:  # update k + 1 took H as it was here
                    kept = tl.where(mine, 1.0, damping)
                c0, c1, c2, c3 = _load_few(later, i, valid, pixels, R)
                x0 += kept * c0
                x1 += kept * c1
                x2 += kept * c2
                x3 += kept * c3
            _store_few(later, i, valid, pixels, x0, x1, x2, x3, R)
        taken = tl.where(mine, 1 - damping, 0.0)
        _store_few(
            _state(adjoints_ptr, image, slots, k, 0, pixels, R), i, valid, pixels,
            taken * x0, taken * x1, taken * x2, taken * x3, R,
        )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def logits_gradient_few_kernel(
    logits_ptr,  # [B, K, pixels] or [B, pixels, K]
    grad_ptr,  # as the logits
    a_ptr,  # [K, R]
    b_ptr,  # [K, R]
    states_ptr,  # [B, slots, 2 (H, F), R, pixels]
    adjoints_ptr,  # [B, slots, 2 (dG, dF), R, pixels]
    norms_ptr,  # [B, slots, axes, 3, pixels]
    to_ptr,  # as the logits, float32
    pixels, blocks, slots, damping,
    UNIFORM: tl.constexpr, BOARDS: tl.constexpr, LABELS_LAST: tl.constexpr, TOGETHER: tl.constexpr,
    K: tl.constexpr, FIRST_AXIS: tl.constexpr, R: tl.constexpr, L: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """du = Σ_k unary_k dt_k of one chunk of labels: no sums over labels are left to do."""
    AXES: tl.constexpr = 1 if FIRST_AXIS == K else 2
    image, i, valid, axis, first, end = _chunk_tile(blocks, pixels, K, FIRST_AXIS, L * G, P)
    label = _labels_few(first, L, G, TOGETHER)
    row = tl.minimum(label, end - 1).to(tl.int32)
    known = label < end
    there = known & valid[None, None, :]
    begin = image * K * pixels
    u = tl.load(
        _at_few(logits_ptr + begin, label, i, pixels, LABELS_LAST, TOGETHER, K, G, P), mask=there, other=0.0
    ).to(tl.float32)
    du = tl.zeros([L, G, P], tl.float32)
    absent = 1.0 if UNIFORM else 0.0  # 1 − unary_k
    absent = absent * 1.0
    for k in range(1 if UNIFORM else 0, slots):
        if UNIFORM:
            absent = tl.where((k - 1) % BOARDS == 0, absent * damping, absent)
        h0, h1, h2, h3 = _load_few(_state(states_ptr, image, slots, k, 0, pixels, R), i, valid, pixels, R)
        most, inverse, mean = _load_norms(
            norms_ptr + ((image * slots + k) * AXES + axis) * 3 * pixels, i, valid, pixels
        )
        t = _add_product(u * (1 - absent), a_ptr, row, h0, h1, h2, h3, R)
        if k == slots - 1:
            dq = tl.load(
                _at_few(grad_ptr + begin, label, i, pixels, LABELS_LAST, TOGETHER, K, G, P), mask=there, other=0.0
            ).to(tl.float32)
        else:
            d0, d1, d2, d3 = _load_few(_state(adjoints_ptr, image, slots, k, 1, pixels, R), i, valid, pixels, R)
            dq = _add_product(tl.zeros([L, G, P], tl.float32), b_ptr, row, d0, d1, d2, d3, R)
        q = exp2(t * _LOG2E - most[None, None, :]) * ((1 - absent) * inverse)[None, None, :]
        du += q * (dq - mean[None, None, :])
    tl.store(_at_few(to_ptr + begin, label, i, pixels, LABELS_LAST, TOGETHER, K, G, P), du, mask=there)


# --- many columns: tiles [C, P] of labels and pixels, products on the tensor cores ------------------------------------


@triton.jit
def _table(ptr, label, known, R: tl.constexpr, ROWS: tl.constexpr):
    """Rows of [K, R] at labels [C]: [C, ROWS], 0 from column R."""
    r = tl.arange(0, ROWS)
    return tl.load(ptr + label[:, None] * R + r[None, :], mask=known[:, None] & (r < R)[None, :], other=0.0)


@triton.jit
def _scores_many(
    logits_ptr, a_ptr, label, known, i, valid, pixels, unary, h,
    FIELD: tl.constexpr, UNARY: tl.constexpr, LABELS_LAST: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """t = unary u + A H, −inf where the axis has ended: [C, P]."""
    there = known[:, None] & valid[None, :]
    if UNARY != _NONE:
        places = _places(label[:, None], i[None, :], pixels, K, LABELS_LAST)
        t = tl.load(logits_ptr + places, mask=there, other=float("-inf")).to(tl.float32)
        if UNARY == _PART:
            t *= unary
    else:  # a uniform start: −inf · 0 must not appear
        t = tl.where(there, 0.0, float("-inf"))
    if FIELD:
        t += tl.dot(_table(a_ptr, label, known, R, ROWS), h, input_precision="tf32x3")
    return t


@triton.jit
def _axis_many(
    logits_ptr, a_ptr, b_ptr, to_ptr, image, i, valid, pixels, unary, scale, steps, h,
    OUTPUT: tl.constexpr, FIELD: tl.constexpr, UNARY: tl.constexpr, LABELS_LAST: tl.constexpr,
    K: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One axis of labels: Bᵀ q [OUT, P]; or its marginals, written."""
    logits = logits_ptr + image * K * pixels
    m = tl.full([P], _LOWEST, tl.float32)
    s = tl.zeros([P], tl.float32)
    f = tl.zeros([OUT, P], tl.float32)
    for step in range(steps):
        label = BEGIN + step * C + tl.arange(0, C).to(tl.int64)
        known = label < END
        t = _scores_many(
            logits, a_ptr, label, known, i, valid, pixels, unary, h,
            FIELD, UNARY, LABELS_LAST, K, R, ROWS, C, P,
        )  # fmt: skip
        most = tl.maximum(m, tl.max(t, 0) * scale)
        shrink = exp2(m - most)
        e = exp2(t * scale - most[None, :])
        m = most
        s = s * shrink + tl.sum(e, 0)
        if OUTPUT != _MARGINALS:
            b = tl.trans(_table(b_ptr, label, known, 2 if OUTPUT == _COLORS else R, OUT))
            f = f * shrink[None, :] + tl.dot(b, e, input_precision="tf32x3")
    inverse = 1 / s
    if OUTPUT == _MARGINALS:
        for step in range(steps):  # u once more, now from the cache
            label = BEGIN + step * C + tl.arange(0, C).to(tl.int64)
            known = label < END
            t = _scores_many(
                logits, a_ptr, label, known, i, valid, pixels, unary, h,
                FIELD, UNARY, LABELS_LAST, K, R, ROWS, C, P,
            )  # fmt: skip
            q = exp2(t * scale - m[None, :]) * inverse[None, :]
            at = to_ptr + image * K * pixels + _places(label[:, None], i[None, :], pixels, K, LABELS_LAST)
            tl.store(at, q.to(to_ptr.dtype.element_ty), mask=known[:, None] & valid[None, :])
    return f * inverse[None, :]


@triton.jit(do_not_specialize=_VARYING)
def update_many_kernel(
    logits_ptr,  # [B, K, pixels] or [B, pixels, K]
    guide_ptr,  # [B, pixels]
    a_ptr,  # [K, R]
    b_ptr,  # [K, R], or colours [K, 2]
    space_ptr,  # [offsets]
    sharpness_ptr,  # []
    offsets_ptr,  # [2, offsets] dy, dx
    prior_ptr,  # [B, R, pixels] or None
    states_ptr,  # [B, slots, 2 (H, F), R, pixels]
    to_ptr,  # marginals as the logits, or ab [B, 2, pixels]
    pixels, blocks, height, width, offsets, slots, before, after, steps, unary, scale, damping,
    OUTPUT: tl.constexpr, PARITY: tl.constexpr, KEEP: tl.constexpr, FIELD: tl.constexpr, UNARY: tl.constexpr,
    DAMPED: tl.constexpr, LABELS_LAST: tl.constexpr,
    K: tl.constexpr, FIRST_AXIS: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    image, i, valid = _tile(blocks, pixels, P)
    h = tl.zeros([ROWS, P], tl.float32)
    active = valid
    if FIELD:
        h = _gather_many(
            _state(states_ptr, image, slots, before, 1, pixels, R), guide_ptr + image * pixels, space_ptr,
            sharpness_ptr, offsets_ptr, i, valid, pixels, height, width, offsets, R, ROWS, P, N,
        )  # fmt: skip
        if prior_ptr is not None:
            h += _load_many(prior_ptr + image * R * pixels, i, valid, pixels, R, ROWS)
        if DAMPED or PARITY >= 0:
            old = _load_many(_state(states_ptr, image, slots, before, 0, pixels, R), i, valid, pixels, R, ROWS)
            if DAMPED:
                h = (1 - damping) * h + damping * old
            if PARITY >= 0:
                active = valid & ((i // width + i % width) % 2 == PARITY)
                h = tl.where(active[None, :], h, old)
    if KEEP:
        _store_many(_state(states_ptr, image, slots, after, 0, pixels, R), i, valid, pixels, h, R, ROWS)
    if OUTPUT != _FEATURES:
        active = valid  # the marginals of both colours of the board
    OUT: tl.constexpr = 16 if OUTPUT == _COLORS else ROWS
    total = _axis_many(
        logits_ptr, a_ptr, b_ptr, to_ptr, image, i, active, pixels, unary, scale, steps, h,
        OUTPUT, FIELD, UNARY, LABELS_LAST, K, 0, FIRST_AXIS, R, ROWS, OUT, C, P,
    )  # fmt: skip
    if FIRST_AXIS < K:
        total += _axis_many(
            logits_ptr, a_ptr, b_ptr, to_ptr, image, i, active, pixels, unary, scale, steps, h,
            OUTPUT, FIELD, UNARY, LABELS_LAST, K, FIRST_AXIS, K, R, ROWS, OUT, C, P,
        )  # fmt: skip
    if OUTPUT == _COLORS:
        _store_many(to_ptr + image * 2 * pixels, i, valid, pixels, total, 2, OUT)
    if OUTPUT == _FEATURES:
        if PARITY >= 0:
            old = _load_many(_state(states_ptr, image, slots, before, 1, pixels, R), i, valid, pixels, R, ROWS)
            total = tl.where(active[None, :], total, old)
        _store_many(_state(states_ptr, image, slots, after, 1, pixels, R), i, valid, pixels, total, R, ROWS)


@triton.jit
def _axis_adjoint_many(
    logits_ptr, grad_ptr, a_ptr, b_ptr, norms_ptr, image, i, valid, active, pixels, unary, shift, steps, h, df,
    LAST: tl.constexpr, FIELD: tl.constexpr, UNARY: tl.constexpr, LABELS_LAST: tl.constexpr,
    K: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """As _axis_adjoint_few: dH [ROWS, P]."""
    logits = logits_ptr + image * K * pixels
    m = tl.full([P], _LOWEST, tl.float32)
    s = tl.zeros([P], tl.float32)
    d = tl.zeros([P], tl.float32)
    x = tl.zeros([ROWS, P], tl.float32)
    y = tl.zeros([ROWS, P], tl.float32)
    for step in range(steps):
        label = BEGIN + step * C + tl.arange(0, C).to(tl.int64)
        known = label < END
        t = _scores_many(
            logits, a_ptr, label, known, i, active, pixels, unary, h,
            FIELD, UNARY, LABELS_LAST, K, R, ROWS, C, P,
        )  # fmt: skip
        if LAST:
            at = grad_ptr + image * K * pixels + _places(label[:, None], i[None, :], pixels, K, LABELS_LAST)
            dq = tl.load(at, mask=known[:, None] & active[None, :], other=0.0).to(tl.float32)
        else:
            dq = tl.dot(_table(b_ptr, label, known, R, ROWS), df, input_precision="tf32x3") - shift[None, :]
        most = tl.maximum(m, tl.max(t, 0) * _LOG2E)
        shrink = exp2(m - most)
        e = exp2(t * _LOG2E - most[None, :])
        m = most
        s = s * shrink + tl.sum(e, 0)
        moved = e * dq
        d = d * shrink + tl.sum(moved, 0)
        if FIELD:
            a = tl.trans(_table(a_ptr, label, known, R, ROWS))
            x = x * shrink[None, :] + tl.dot(a, moved, input_precision="tf32x3")
            y = y * shrink[None, :] + tl.dot(a, e, input_precision="tf32x3")
    inverse = 1 / s
    mean = d * inverse
    _store_norms(norms_ptr, i, valid, active, pixels, m, inverse, mean + shift)
    return (x - mean[None, :] * y) * inverse[None, :]


@triton.jit(do_not_specialize=_VARYING)
def adjoint_many_kernel(
    logits_ptr,  # [B, K, pixels] or [B, pixels, K]
    grad_ptr,  # of the marginals, as the logits
    guide_ptr,  # [B, pixels]
    a_ptr,  # [K, R]
    b_ptr,  # [K, R]
    space_ptr,  # [offsets]
    sharpness_ptr,  # []
    offsets_ptr,  # [2, offsets] dy, dx
    states_ptr,  # [B, slots, 2 (H, F), R, pixels]
    adjoints_ptr,  # [B, slots, 2 (dG, dF), R, pixels]
    later_ptr,  # [B, R, pixels] dH of the update that comes after this one, and then of this one
    norms_ptr,  # [B, slots, axes, 3 (log2 of the largest e^t, 1 / Σ, q·dq), pixels]
    pixels, blocks, height, width, offsets, slots, k, steps, unary, damping,
    LAST: tl.constexpr, PARITY: tl.constexpr, CARRY: tl.constexpr, LATER: tl.constexpr, FIELD: tl.constexpr,
    UNARY: tl.constexpr, LABELS_LAST: tl.constexpr,
    K: tl.constexpr, FIRST_AXIS: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """What update k hands back: dF_k, dH_k and dG_k."""
    image, i, valid = _tile(blocks, pixels, P)
    mine = valid
    if PARITY >= 0:
        mine = valid & ((i // width + i % width) % 2 == PARITY)
    df = tl.zeros([ROWS, P], tl.float32)
    shift = tl.zeros([P], tl.float32)
    if not LAST:
        df = _gather_many(
            _state(adjoints_ptr, image, slots, k + 1, 0, pixels, R), guide_ptr + image * pixels, space_ptr,
            sharpness_ptr, offsets_ptr, i, valid, pixels, height, width, offsets, R, ROWS, P, N,
        )  # fmt: skip
        if CARRY:  # update k + 1, of the other colour, left these features as they were
            df += _load_many(_state(adjoints_ptr, image, slots, k + 1, 1, pixels, R), i, mine, pixels, R, ROWS)
        _store_many(_state(adjoints_ptr, image, slots, k, 1, pixels, R), i, valid, pixels, df, R, ROWS)
        f = _load_many(_state(states_ptr, image, slots, k, 1, pixels, R), i, valid, pixels, R, ROWS)
        shift = tl.sum(f * df, 0)
    active = valid
    if FIELD and not LAST:
        active = mine
    h = _load_many(_state(states_ptr, image, slots, k, 0, pixels, R), i, valid, pixels, R, ROWS)
    AXES: tl.constexpr = 1 if FIRST_AXIS == K else 2
    norms = norms_ptr + (image * slots + k) * AXES * 3 * pixels
    x = _axis_adjoint_many(
        logits_ptr, grad_ptr, a_ptr, b_ptr, norms, image, i, valid, active, pixels, unary, shift, steps, h, df,
        LAST, FIELD, UNARY, LABELS_LAST, K, 0, FIRST_AXIS, R, ROWS, C, P,
    )  # fmt: skip
    if FIRST_AXIS < K:
        x += _axis_adjoint_many(
            logits_ptr, grad_ptr, a_ptr, b_ptr, norms + 3 * pixels, image, i, valid, active, pixels, unary, shift,
            steps, h, df, LAST, FIELD, UNARY, LABELS_LAST, K, FIRST_AXIS, K, R, ROWS, C, P,
        )  # fmt: skip
    if FIELD:  # the start has none
        x = tl.where(active[None, :], x, 0.0)
        later = later_ptr + image * R * pixels
        if LATER:
            if not LAST:
                kept = tl.full([P], damping, tl.float32)
                if PARITY >= 0:  # update k + 1 took H as it was here
                    kept = tl.where(mine, 1.0, damping)
                x += kept[None, :] * _load_many(later, i, valid, pixels, R, ROWS)
            _store_many(later, i, valid, pixels, x, R, ROWS)
        taken = tl.where(mine, 1 - damping, 0.0)
        dg = _state(adjoints_ptr, image, slots, k, 0, pixels, R)
        _store_many(dg, i, valid, pixels, taken[None, :] * x, R, ROWS)


@triton.jit(do_not_specialize=_VARYING)
def logits_gradient_many_kernel(
    logits_ptr,  # [B, K, pixels] or [B, pixels, K]
    grad_ptr,  # as the logits
    a_ptr,  # [K, R]
    b_ptr,  # [K, R]
    states_ptr,  # [B, slots, 2 (H, F), R, pixels]
    adjoints_ptr,  # [B, slots, 2 (dG, dF), R, pixels]
    norms_ptr,  # [B, slots, axes, 3, pixels]
    to_ptr,  # as the logits, float32
    factors_ptr,  # [groups, 2 (dA, dB), K, R] or None: the sums of the pixels that one program sees
    pixels, blocks, slots, tiles, groups, damping,
    UNIFORM: tl.constexpr, BOARDS: tl.constexpr, LABELS_LAST: tl.constexpr,
    K: tl.constexpr, FIRST_AXIS: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """du = Σ_k unary_k dt_k of one chunk of labels; and dA = Σ_k dt_k H_kᵀ, dB = Σ_k q_k dF_kᵀ, over all pixels."""
    AXES: tl.constexpr = 1 if FIRST_AXIS == K else 2
    CHUNKS: tl.constexpr = (FIRST_AXIS + C - 1) // C + (K - FIRST_AXIS + C - 1) // C
    axis, first, end = _chunk(tl.program_id(0) % CHUNKS, K, FIRST_AXIS, C)
    group = tl.program_id(0) // CHUNKS
    label = first + tl.arange(0, C).to(tl.int64)
    known = label < end
    a = _table(a_ptr, label, known, R, ROWS)
    b = _table(b_ptr, label, known, R, ROWS)
    grad_a = tl.zeros([C, ROWS], tl.float32)
    grad_b = tl.zeros([C, ROWS], tl.float32)
    for tile in range(group, tiles, groups):
        i = (tile % blocks) * P + tl.arange(0, P)
        valid = i < pixels
        image = (tile // blocks).to(tl.int64)
        there = known[:, None] & valid[None, :]
        places = image * K * pixels + _places(label[:, None], i[None, :], pixels, K, LABELS_LAST)
        u = tl.load(logits_ptr + places, mask=there, other=0.0).to(tl.float32)
        du = tl.zeros([C, P], tl.float32)
        absent = 1.0 if UNIFORM else 0.0  # 1 − unary_k
        absent = absent * 1.0
        for k in range(1 if UNIFORM and factors_ptr is None else 0, slots):
            if UNIFORM:
                absent = tl.where((k > 0) & ((k - 1) % BOARDS == 0), absent * damping, absent)
            h = _load_many(_state(states_ptr, image, slots, k, 0, pixels, R), i, valid, pixels, R, ROWS)
            most, inverse, mean = _load_norms(
                norms_ptr + ((image * slots + k) * AXES + axis) * 3 * pixels, i, valid, pixels
            )
            t = tl.where(absent == 1, 0.0, u * (1 - absent)) + tl.dot(a, h, input_precision="tf32x3")
            q = exp2(t * _LOG2E - most[None, :]) * inverse[None, :]
            if k == slots - 1:
                dq = tl.load(grad_ptr + places, mask=there, other=0.0).to(tl.float32)
            else:
                df = _load_many(_state(adjoints_ptr, image, slots, k, 1, pixels, R), i, valid, pixels, R, ROWS)
                dq = tl.dot(b, df, input_precision="tf32x3")
                if factors_ptr is not None:
                    grad_b += tl.dot(q, tl.trans(df), input_precision="tf32x3")
            dt = q * (dq - mean[None, :])
            if factors_ptr is not None:
                grad_a += tl.dot(dt, tl.trans(h), input_precision="tf32x3")
            du += (1 - absent) * dt
        tl.store(to_ptr + places, du, mask=there)
    if factors_ptr is not None:
        r = tl.arange(0, ROWS)
        at = factors_ptr + group.to(tl.int64) * 2 * K * R + label[:, None] * R + r[None, :]
        tl.store(at, grad_a, mask=known[:, None] & (r < R)[None, :])
        tl.store(at + K * R, grad_b, mask=known[:, None] & (r < R)[None, :])


# --- gradients of the pair weights ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_VARYING)
def pair_gradient_kernel(
    guide_ptr,  # [B, pixels]
    space_ptr,  # [offsets]
    sharpness_ptr,  # []
    offsets_ptr,  # [2, offsets] dy, dx
    states_ptr,  # [B, slots, 2 (H, F), R, pixels]
    adjoints_ptr,  # [B, slots, 2 (dG, dF), R, pixels]
    to_guide_ptr,  # [B, pixels], added to
    sums_ptr,  # [programs, offsets + 1]: dspace and dsharpness of the pixels of each program
    pixels, blocks, height, width, offsets, slots,
    R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dL/dw_ij = Σ_k Σ_r dG_k,i F_k−1,j, N of the sum at once, seen from both ends of a pair."""
    image, i, valid = _tile(blocks, pixels, P)
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * (offsets + 1)
    sharpness = tl.load(sharpness_ptr)
    of_guide = tl.zeros([P], tl.float32)
    of_sharpness = tl.zeros([P], tl.float32)
    for o in range(offsets):
        w, nearness, d, j, inside = _neighbors(
            guide_ptr + image * pixels, space_ptr, sharpness_ptr, offsets_ptr, o + tl.arange(0, 1), i, valid,
            height, width, offsets,
        )  # fmt: skip
        received = tl.zeros([N, P], tl.float32)
        sent = tl.zeros([N, P], tl.float32)
        for begin in range(0, (slots - 1) * R, N):
            term = begin + tl.arange(0, N)
            known = (term < (slots - 1) * R)[:, None]
            before = ((image * slots + term // R) * 2 * R + term % R)[:, None] * pixels
            features = states_ptr + before + _plane(1, pixels, R)
            gathered = adjoints_ptr + before + _plane(2, pixels, R)
            here = known & valid[None, :]
            there = known & inside
            received += tl.load(gathered + i[None, :], mask=here, other=0.0) * tl.load(
                features + j, mask=there, other=0.0
            )
            sent += tl.load(gathered + j, mask=there, other=0.0) * tl.load(features + i[None, :], mask=here, other=0.0)
        received_all = tl.sum(received, 0)
        sent_all = tl.sum(sent, 0)
        light = tl.sum(d, 0)  # [1, P] -> [P]
        weights = tl.sum(w, 0)
        # sharpness · light may be inf where w is 0
        slope = tl.where(weights != 0, weights * (light * sharpness), 0.0)
        of_sharpness -= received_all * slope * light
        of_guide -= (received_all + sent_all) * slope * sharpness
        # each ordered pair (i, j) is counted once, at i
        tl.store(sums + o, tl.sum(received_all * tl.sum(nearness, 0), 0))
    tl.store(sums + offsets, tl.sum(of_sharpness, 0))
    at = to_guide_ptr + image * pixels + i
    tl.store(at, tl.load(at, mask=valid, other=0.0) + of_guide, mask=valid)


# --- launches ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _offsets(dy: tuple[int, ...], dx: tuple[int, ...], device: torch.device) -> Tensor:
    """[2, O]. Kept, since a copy to the device makes the host wait."""
    with torch.inference_mode(False):
        return torch.tensor([dy, dx], dtype=torch.int32, device=device).reshape(2, len(dy))


def _launch(kernel, programs: int, *arguments, **constants) -> None:
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants)


def _updates(problem: Problem) -> int:
    return problem.sweeps * (2 if problem.checkerboard else 1)


def _unary(problem: Problem) -> list[float]:
    """The share of the logits in the scores after each update: none in a uniform start, of which damping keeps some."""
    boards = 2 if problem.checkerboard else 1
    shares = [0.0 if problem.uniform else 1.0]
    for k in range(_updates(problem)):
        shares.append(1 - problem.damping + problem.damping * shares[k // boards * boards])
    return shares


def _steps(problem: Problem, sizes: dict) -> int:
    """Chunks of the longer axis. A number at run time: else LLVM may unroll the loop over them, and registers spill."""
    return triton.cdiv(max(problem.counts), sizes["C"] if "C" in sizes else sizes["L"] * sizes["G"])


def _kind(unary: float) -> int:
    return (_WHOLE if unary == 1 else _PART if unary else _NONE).value


def _sizes(problem: Problem, few: bool | None = None, backward: bool = False) -> dict:
    """The constants that say what a tile is: with registers for each column where they are few."""
    labels, columns = problem.a.shape
    if len(problem.counts) > 2:
        raise ValueError(f"there must be one or two axes of labels, got {len(problem.counts)}")
    widest = triton.next_power_of_2(max(problem.counts))
    sizes = {"LABELS_LAST": problem.labels_last, "K": labels, "FIRST_AXIS": problem.counts[0], "R": columns}
    if not (columns <= FEW if few is None else few):
        rows = max(16, triton.next_power_of_2(columns))
        largest, tile = (BACKWARD_CHUNK, BACKWARD_PIXELS) if backward else (CHUNK, MANY_PIXELS)
        if not backward and rows > 32:
            tile //= 2
        chunk = max(16, min(largest, widest))
        return {**sizes, "ROWS": rows, "C": chunk, "P": tile, "N": max(1, ARRIVING // rows), "num_warps": MANY_WARPS}
    each, pixels = max(1, min(FEW_CHUNK, widest) // LANES), PIXELS
    if backward and problem.labels_last:  # half of the tile, which would spill
        pixels //= 2
    elif backward:
        each = max(1, each // 2)
    together = problem.labels_last and labels * problem.logits.element_size() % 16 == 0
    return {**sizes, "TOGETHER": together, "L": each, "G": LANES, "P": pixels, "N": OFFSETS, "num_warps": WARPS}


def mean_field(
    problem: Problem,
    marginals: Tensor | None,  # as the logits
    colors: Tensor | None,  # [K, 2]
    temperature: float,
    ab: Tensor | None,  # [B, 2, H, W]
    states: Tensor | None,  # [B, U + 1, 2 (H, F), R, H, W], or None: then two slots are kept
) -> None:
    logits, columns = problem.logits, problem.a.shape[1]
    batch, _, height, width = logits.shape
    pixels = height * width
    if batch * pixels == 0:
        return
    updates, unary, sizes = _updates(problem), _unary(problem), _sizes(problem)
    slots = updates + 1
    # what the next update or the backward looks at: without damping and boards, nobody needs H
    keep = states is not None or problem.damping != 0 or problem.checkerboard
    if states is None:
        slots = min(slots, 2)
        states = problem.guide.new_empty(batch * slots * 2 * columns * pixels)
    offsets = _offsets(tuple(problem.dy), tuple(problem.dx), logits.device)
    blocks, steps = triton.cdiv(pixels, sizes["P"]), _steps(problem, sizes)
    kernel = update_many_kernel if columns > FEW else update_few_kernel
    outputs = [(0, problem.b, states, 1.0)] * updates  # (OUTPUT, B, to, T) of each update
    last = [(_MARGINALS.value, problem.b, marginals, 1.0)] if marginals is not None else []
    last += [(_COLORS.value, colors, ab, temperature)] if ab is not None else []
    for k, (output, b, to, t) in [*enumerate(outputs), *((updates, x) for x in last)]:
        _launch(
            kernel, batch * blocks,
            logits, problem.guide, problem.a, b, problem.space, problem.sharpness, offsets, problem.prior, states, to,
            pixels, blocks, height, width, len(problem.dy), slots, (k - 1) % slots, k % slots,
            steps, unary[k], _LOG2E.value / t, problem.damping,
            OUTPUT=output, PARITY=(k + 1) % 2 if problem.checkerboard and k else -1, KEEP=keep, FIELD=k > 0,
            UNARY=_kind(unary[k]), DAMPED=problem.damping != 0, **sizes,
        )  # fmt: skip


def mean_field_backward(
    problem: Problem,
    grad: Tensor,  # of the marginals, in dtype and memory as the logits
    states: Tensor,  # [B, U + 1, 2 (H, F), R, H, W]
    to: Gradients,
) -> None:
    logits, columns = problem.logits, problem.a.shape[1]
    batch, labels, height, width = logits.shape
    pixels = height * width
    if batch * pixels == 0:
        return
    updates, unary, sizes = _updates(problem), _unary(problem), _sizes(problem, backward=True)
    few, slots, axes = columns <= FEW, updates + 1, len(problem.counts)
    sums = to.a is not None
    new = problem.guide.new_empty
    adjoints = new(batch, slots, 2, columns, pixels)
    norms = new(batch, slots, axes, 3, pixels)
    kept = problem.damping != 0 or problem.checkerboard
    later = new(batch * columns * pixels if kept else 0)
    offsets = _offsets(tuple(problem.dy), tuple(problem.dx), logits.device)
    blocks, steps = triton.cdiv(pixels, sizes["P"]), _steps(problem, sizes)
    for k in range(updates, -1, -1):
        if unary[k] == 0 and not sums:
            break  # a uniform start depends on nothing
        _launch(
            adjoint_few_kernel if few else adjoint_many_kernel, batch * blocks,
            logits, grad, problem.guide, problem.a, problem.b, problem.space, problem.sharpness, offsets, states,
            adjoints, later, norms, pixels, blocks, height, width, len(problem.dy), slots, k, steps, unary[k],
            problem.damping,
            LAST=k == updates, PARITY=(k + 1) % 2 if problem.checkerboard else -1,
            CARRY=problem.checkerboard and k + 1 < updates, LATER=kept, FIELD=k > 0, UNARY=_kind(unary[k]), **sizes,
        )  # fmt: skip
    _logits_gradient(problem, grad, states, adjoints, norms, to, unary[updates], few and not sums)
    if to.prior is not None and updates:
        to.prior.add_(adjoints[:, 1:, 0].sum(1).view_as(to.prior))
    if to.guide is not None and updates:
        blocks = triton.cdiv(pixels, PAIR_PIXELS)
        partial = new(batch * blocks, len(problem.dy) + 1)
        _launch(
            pair_gradient_kernel, batch * blocks,
            problem.guide, problem.space, problem.sharpness, offsets, states, adjoints, to.guide, partial,
            pixels, blocks, height, width, len(problem.dy), slots,
            R=columns, P=PAIR_PIXELS, N=PAIR_TERMS, num_warps=PAIR_WARPS,
        )  # fmt: skip
        total = partial.sum(0)
        to.space.add_(total[:-1])
        to.sharpness.add_(total[-1])


def _logits_gradient(problem: Problem, grad, states, adjoints, norms, to: Gradients, unary: float, few: bool) -> None:
    """The last pass. Where the factors have gradients too, their sums over pixels are products for the tensor cores."""
    if unary == 0:  # no update, and a uniform start
        to.logits.zero_()
        return
    batch, labels, height, width = problem.logits.shape
    pixels, columns, slots = height * width, problem.a.shape[1], adjoints.shape[1]
    sizes = _sizes(problem, few, backward=True)
    del sizes["N"]
    blocks = triton.cdiv(pixels, sizes["P"])
    tiles = batch * blocks
    chunk = sizes["L"] * sizes["G"] if few else sizes["C"]
    chunks = sum(triton.cdiv(count, chunk) for count in problem.counts)
    constants = {"UNIFORM": problem.uniform, "BOARDS": 2 if problem.checkerboard else 1, **sizes}
    arguments = (problem.logits, grad, problem.a, problem.b, states, adjoints, norms, to.logits)
    if few:
        _launch(
            logits_gradient_few_kernel, tiles * chunks, *arguments, pixels, blocks, slots, problem.damping, **constants
        )
        return
    groups, factors = tiles, None
    if to.a is not None:
        groups = min(tiles, FACTOR_GROUPS)
        factors = adjoints.new_empty(groups, 2, labels, columns)
    _launch(
        logits_gradient_many_kernel, groups * chunks,
        *arguments, factors, pixels, blocks, slots, tiles, groups, problem.damping, **constants,
    )  # fmt: skip
    if factors is not None:
        grad_a, grad_b = factors.sum(0)
        to.a.add_(grad_a)
        to.b.add_(grad_b)
