"""The mean field in Triton: one launch for each update. The formulas are in fastcolor.reference.mean_field.

An update gathers G = Σ_j w_ij F_j (R numbers a pixel), rebuilds the scores t = u + A G chunk by chunk of labels, and leaves
F = Bᵀ softmax(t) for the next one: the logits are read once, and nothing else has K numbers a pixel. In backward order

    dF_i = Σ_j w_ij dG_j,   dq = B dF,   dt = q ∘ (dq − q·dq),   dH = Aᵀ dt,   du = Σ_k unary_k dt_k

the adjoints of R numbers a pixel come first, update by update; one last pass makes du from all of them and a single read of u.
Nothing is summed by atomics: equal inputs give equal bits.

Up to FEW columns are multiplied one by one; more go to the tensor cores in three products of tf32 each (plain tf32 would
be off by 2^-11 of scores in the hundreds).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from fastcolor.kernels.field import Gradients, Problem
from fastcolor.kernels.triton import interpreting
from torch import Tensor

# A GPU owner may tune these; `python -m benchmarks.registers` shows what they cost.
FEW = 4  # columns R that are multiplied one by one, with registers for each
PIXELS = 64  # of a program, few columns: with 8 lanes of labels, 2 warps have 8 pixels × 8 labels a thread
WARPS = 2
MANY_PIXELS = 64  # of a program, many columns: tiles of [64 labels, 64 pixels] for the tensor cores
MANY_WARPS = 4
CHUNK = 64  # labels of a tile: 313 of them pad to 320
LANES = 8  # of a chunk, few columns: each has its own maximum and sums, which meet after the last chunk
OFFSETS = 8  # neighbours that are on their way from memory at once, few columns
ARRIVING = 128  # many columns: neighbours times columns

_FEATURES, _MARGINALS, _COLORS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what an update leaves
_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3e38)  # in place of −inf, from which −inf can be taken away
_VARYING = ("blocks", "height", "width", "offsets", "slots", "before", "after")  # not worth a compilation each
_PTX = tl.constexpr(torch.version.hip is None and not interpreting())


# --- pixels and labels ------------------------------------------------------------------------------------------------


@triton.jit
def _exp2(x):
    """2^x. Max relative error 2^-22; 0 below 2^-126."""
    if _PTX:  # one instruction: tl.exp2 takes care of denormal numbers
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


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
def _state(ptr, image, slots, slot, which: tl.constexpr, pixels, R: tl.constexpr):
    """The planes of one of the two kinds in a slot of [B, slots, 2, R, pixels]."""
    return ptr + (((image * slots + slot) * 2 + which) * R) * pixels


# --- the stencil ------------------------------------------------------------------------------------------------------


@triton.jit
def _neighbors(
    guide_ptr, space_ptr, sharpness_ptr, offsets_ptr,
    o, i, valid, height, width, offsets,
):  # fmt: skip
    """w_ij of offsets [N] at pixels [P], where j is, and whether it is in the image: [N, P]. guide_ptr: of the image."""
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
    return space * _exp2(scaled * scaled * (-0.5 * _LOG2E)), d, j, inside


@triton.jit
def _gather_few(
    source_ptr, guide_ptr, space_ptr, sharpness_ptr, offsets_ptr,
    i, valid, pixels, height, width, offsets,
    R: tl.constexpr, P: tl.constexpr, O: tl.constexpr,
):  # fmt: skip
    """Σ_j w_ij of each of the planes [R, pixels], [P] each."""
    g0 = tl.zeros([P], tl.float32)
    g1 = tl.zeros([P], tl.float32)
    g2 = tl.zeros([P], tl.float32)
    g3 = tl.zeros([P], tl.float32)
    for first in range(0, offsets, O):
        w, _, j, inside = _neighbors(
            guide_ptr, space_ptr, sharpness_ptr, offsets_ptr, first + tl.arange(0, O), i, valid, height, width, offsets
        )
        at = source_ptr + j
        g0 += tl.sum(w * tl.load(at, mask=inside, other=0.0), 0)
        if R > 1:
            at += pixels  # plane after plane: 3 * pixels could exceed 32 bits
            g1 += tl.sum(w * tl.load(at, mask=inside, other=0.0), 0)
        if R > 2:
            at += pixels
            g2 += tl.sum(w * tl.load(at, mask=inside, other=0.0), 0)
        if R > 3:
            at += pixels
            g3 += tl.sum(w * tl.load(at, mask=inside, other=0.0), 0)
    return g0, g1, g2, g3


@triton.jit
def _gather_many(
    source_ptr, guide_ptr, space_ptr, sharpness_ptr, offsets_ptr,
    i, valid, pixels, height, width, offsets,
    R: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, O: tl.constexpr,
):  # fmt: skip
    """Σ_j w_ij of the planes [R, pixels]: [ROWS, P], 0 from row R."""
    r = tl.arange(0, ROWS)
    planes = source_ptr + r.to(tl.int64)[None, :, None] * pixels
    g = tl.zeros([ROWS, P], tl.float32)
    for first in range(0, offsets, O):
        w, _, j, inside = _neighbors(
            guide_ptr, space_ptr, sharpness_ptr, offsets_ptr, first + tl.arange(0, O), i, valid, height, width, offsets
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


# --- few columns: tiles [L, G, P] of labels and pixels, L in the registers of one thread ------------------------------


@triton.jit
def _labels_few(first, L: tl.constexpr, G: tl.constexpr, TOGETHER: tl.constexpr):
    """Labels of a chunk, int64 [L, G, 1]: side by side in a thread where that makes wide loads, else in its neighbours."""
    l = tl.arange(0, L).to(tl.int64)[:, None, None]
    g = tl.arange(0, G).to(tl.int64)[None, :, None]
    if TOGETHER:
        return g * L + l + first
    else:
        return g + l * G + first


@triton.jit
def _product(table_ptr, label, known, x0, x1, x2, x3, R: tl.constexpr):
    """Σ_r table[l, r] x_r: [L, G, P]."""
    at = table_ptr + label * R
    total = tl.load(at, mask=known, other=0.0) * x0[None, None, :]
    if R > 1:
        total += tl.load(at + 1, mask=known, other=0.0) * x1[None, None, :]
    if R > 2:
        total += tl.load(at + 2, mask=known, other=0.0) * x2[None, None, :]
    if R > 3:
        total += tl.load(at + 3, mask=known, other=0.0) * x3[None, None, :]
    return total


@triton.jit
def _scores_few(
    logits_ptr, a_ptr, label, known, i, valid, pixels, unary, h0, h1, h2, h3,
    FIELD: tl.constexpr, UNARY: tl.constexpr, LABELS_LAST: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """t = unary u + A H, −inf where the axis has ended: [L, G, P]."""
    there = known & valid[None, None, :]
    if UNARY:
        places = _places(label, i[None, None, :], pixels, K, LABELS_LAST)
        t = tl.load(logits_ptr + places, mask=there, other=float("-inf")).to(tl.float32) * unary
    else:  # a uniform start: −inf · 0 must not appear
        t = tl.where(there, 0.0, float("-inf"))
    if FIELD:
        t += _product(a_ptr, label, known, h0, h1, h2, h3, R)
    return t


@triton.jit
def _axis_few(
    logits_ptr, a_ptr, b_ptr, to_ptr, image, i, valid, pixels, unary, scale, h0, h1, h2, h3,
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
    for first in range(BEGIN, END, L * G):
        label = _labels_few(first, L, G, TOGETHER)
        known = label < END
        t = _scores_few(
            logits, a_ptr, label, known, i, valid, pixels, unary, h0, h1, h2, h3,
            FIELD, UNARY, LABELS_LAST, K, R,
        )  # fmt: skip
        most = tl.maximum(m, tl.max(t, 0) * scale)
        shrink = _exp2(m - most)
        # `most` is rounded once for all labels of a lane: that cancels, also at scores of 1e4
        e = _exp2(t * scale - most[None, :, :])
        m = most
        s = s * shrink + tl.sum(e, 0)
        if OUTPUT != _MARGINALS:
            at = b_ptr + label * COLUMNS
            f0 = f0 * shrink + tl.sum(e * tl.load(at, mask=known, other=0.0), 0)
            if COLUMNS > 1:
                f1 = f1 * shrink + tl.sum(e * tl.load(at + 1, mask=known, other=0.0), 0)
            if COLUMNS > 2:
                f2 = f2 * shrink + tl.sum(e * tl.load(at + 2, mask=known, other=0.0), 0)
            if COLUMNS > 3:
                f3 = f3 * shrink + tl.sum(e * tl.load(at + 3, mask=known, other=0.0), 0)
    most = tl.max(m, 0)
    shrink = _exp2(m - most[None, :])
    inverse = 1 / tl.sum(s * shrink, 0)
    if OUTPUT == _MARGINALS:
        for first in range(BEGIN, END, L * G):  # u once more, now from the cache
            label = _labels_few(first, L, G, TOGETHER)
            known = label < END
            t = _scores_few(
                logits, a_ptr, label, known, i, valid, pixels, unary, h0, h1, h2, h3,
                FIELD, UNARY, LABELS_LAST, K, R,
            )  # fmt: skip
            q = _exp2(t * scale - most[None, None, :]) * inverse[None, None, :]
            at = to_ptr + image * K * pixels + _places(label, i[None, None, :], pixels, K, LABELS_LAST)
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
    pixels, blocks, height, width, offsets, slots, before, after, unary, scale, damping,
    OUTPUT: tl.constexpr, PARITY: tl.constexpr, KEEP: tl.constexpr, FIELD: tl.constexpr, UNARY: tl.constexpr,
    DAMPED: tl.constexpr, LABELS_LAST: tl.constexpr, TOGETHER: tl.constexpr,
    K: tl.constexpr, FIRST_AXIS: tl.constexpr, R: tl.constexpr, L: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    O: tl.constexpr,
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
            sharpness_ptr, offsets_ptr, i, valid, pixels, height, width, offsets, R, P, O,
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
        logits_ptr, a_ptr, b_ptr, to_ptr, image, i, active, pixels, unary, scale, h0, h1, h2, h3,
        OUTPUT, FIELD, UNARY, LABELS_LAST, TOGETHER, K, 0, FIRST_AXIS, R, L, G, P,
    )  # fmt: skip
    if FIRST_AXIS < K:
        y0, y1, y2, y3 = _axis_few(
            logits_ptr, a_ptr, b_ptr, to_ptr, image, i, active, pixels, unary, scale, h0, h1, h2, h3,
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
    if UNARY:
        places = _places(label[:, None], i[None, :], pixels, K, LABELS_LAST)
        t = tl.load(logits_ptr + places, mask=there, other=float("-inf")).to(tl.float32) * unary
    else:  # a uniform start: −inf · 0 must not appear
        t = tl.where(there, 0.0, float("-inf"))
    if FIELD:
        t += tl.dot(_table(a_ptr, label, known, R, ROWS), h, input_precision="tf32x3")
    return t


@triton.jit
def _axis_many(
    logits_ptr, a_ptr, b_ptr, to_ptr, image, i, valid, pixels, unary, scale, h,
    OUTPUT: tl.constexpr, FIELD: tl.constexpr, UNARY: tl.constexpr, LABELS_LAST: tl.constexpr,
    K: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One axis of labels: Bᵀ q [OUT, P]; or its marginals, written."""
    logits = logits_ptr + image * K * pixels
    m = tl.full([P], _LOWEST, tl.float32)
    s = tl.zeros([P], tl.float32)
    f = tl.zeros([OUT, P], tl.float32)
    for first in range(BEGIN, END, C):
        label = first + tl.arange(0, C).to(tl.int64)
        known = label < END
        t = _scores_many(
            logits, a_ptr, label, known, i, valid, pixels, unary, h,
            FIELD, UNARY, LABELS_LAST, K, R, ROWS, C, P,
        )  # fmt: skip
        most = tl.maximum(m, tl.max(t, 0) * scale)
        shrink = _exp2(m - most)
        e = _exp2(t * scale - most[None, :])
        m = most
        s = s * shrink + tl.sum(e, 0)
        if OUTPUT != _MARGINALS:
            b = tl.trans(_table(b_ptr, label, known, 2 if OUTPUT == _COLORS else R, OUT))
            f = f * shrink[None, :] + tl.dot(b, e, input_precision="tf32x3")
    inverse = 1 / s
    if OUTPUT == _MARGINALS:
        for first in range(BEGIN, END, C):  # u once more, now from the cache
            label = first + tl.arange(0, C).to(tl.int64)
            known = label < END
            t = _scores_many(
                logits, a_ptr, label, known, i, valid, pixels, unary, h,
                FIELD, UNARY, LABELS_LAST, K, R, ROWS, C, P,
            )  # fmt: skip
            q = _exp2(t * scale - m[None, :]) * inverse[None, :]
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
    pixels, blocks, height, width, offsets, slots, before, after, unary, scale, damping,
    OUTPUT: tl.constexpr, PARITY: tl.constexpr, KEEP: tl.constexpr, FIELD: tl.constexpr, UNARY: tl.constexpr,
    DAMPED: tl.constexpr, LABELS_LAST: tl.constexpr,
    K: tl.constexpr, FIRST_AXIS: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    O: tl.constexpr,
):  # fmt: skip
    image, i, valid = _tile(blocks, pixels, P)
    h = tl.zeros([ROWS, P], tl.float32)
    active = valid
    if FIELD:
        h = _gather_many(
            _state(states_ptr, image, slots, before, 1, pixels, R), guide_ptr + image * pixels, space_ptr,
            sharpness_ptr, offsets_ptr, i, valid, pixels, height, width, offsets, R, ROWS, P, O,
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
        logits_ptr, a_ptr, b_ptr, to_ptr, image, i, active, pixels, unary, scale, h,
        OUTPUT, FIELD, UNARY, LABELS_LAST, K, 0, FIRST_AXIS, R, ROWS, OUT, C, P,
    )  # fmt: skip
    if FIRST_AXIS < K:
        total += _axis_many(
            logits_ptr, a_ptr, b_ptr, to_ptr, image, i, active, pixels, unary, scale, h,
            OUTPUT, FIELD, UNARY, LABELS_LAST, K, FIRST_AXIS, K, R, ROWS, OUT, C, P,
        )  # fmt: skip
    if OUTPUT == _COLORS:
        _store_many(to_ptr + image * 2 * pixels, i, valid, pixels, total, 2, OUT)
    if OUTPUT == _FEATURES:
        if PARITY >= 0:
            old = _load_many(_state(states_ptr, image, slots, before, 1, pixels, R), i, valid, pixels, R, ROWS)
            total = tl.where(active[None, :], total, old)
        _store_many(_state(states_ptr, image, slots, after, 1, pixels, R), i, valid, pixels, total, R, ROWS)


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
    """The share of the logits in the scores after each update: a uniform start has none, and damping keeps some of it."""
    boards = 2 if problem.checkerboard else 1
    shares = [0.0 if problem.uniform else 1.0]
    for k in range(_updates(problem)):
        shares.append(1 - problem.damping + problem.damping * shares[k // boards * boards])
    return shares


def _sizes(problem: Problem) -> dict:
    """The constants that say what a tile is."""
    labels, columns = problem.a.shape
    if len(problem.counts) > 2:
        raise ValueError(f"there must be one or two axes of labels, got {len(problem.counts)}")
    widest = triton.next_power_of_2(max(problem.counts))
    sizes = {"LABELS_LAST": problem.labels_last, "K": labels, "FIRST_AXIS": problem.counts[0], "R": columns}
    if columns > FEW:
        rows = max(16, triton.next_power_of_2(columns))
        chunk = max(16, min(CHUNK, widest))
        return {**sizes, "ROWS": rows, "C": chunk, "P": MANY_PIXELS, "O": max(1, ARRIVING // rows), "num_warps": MANY_WARPS}
    each = max(1, min(CHUNK, widest) // LANES)
    together = problem.labels_last and labels * problem.logits.element_size() % 16 == 0
    return {**sizes, "TOGETHER": together, "L": each, "G": LANES, "P": PIXELS, "O": OFFSETS, "num_warps": WARPS}


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
    blocks = triton.cdiv(pixels, sizes["P"])
    kernel = update_many_kernel if columns > FEW else update_few_kernel
    outputs = [(0, problem.b, states, 1.0)] * updates  # (OUTPUT, B, to, T) of each update
    last = [(_MARGINALS.value, problem.b, marginals, 1.0)] if marginals is not None else []
    last += [(_COLORS.value, colors, ab, temperature)] if ab is not None else []
    for k, (output, b, to, t) in [*enumerate(outputs), *((updates, x) for x in last)]:
        _launch(
            kernel, batch * blocks,
            logits, problem.guide, problem.a, b, problem.space, problem.sharpness, offsets, problem.prior, states, to,
            pixels, blocks, height, width, len(problem.dy), slots, (k - 1) % slots, k % slots,
            unary[k], _LOG2E.value / t, problem.damping,
            OUTPUT=output, PARITY=(k + 1) % 2 if problem.checkerboard and k else -1, KEEP=keep, FIELD=k > 0,
            UNARY=unary[k] != 0, DAMPED=problem.damping != 0, **sizes,
        )  # fmt: skip


def mean_field_backward(problem: Problem, grad: Tensor, states: Tensor, to: Gradients) -> None:
    raise NotImplementedError
