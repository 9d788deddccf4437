"""The nearest labels of colours in Triton, bit for bit those of `ColorBins.nearest`; how often each is the nearest."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 32  # of a program
CHUNK = 64  # labels that a colour in no cell is compared with at a time
WARPS = 4

_FARTHEST = tl.constexpr(1e18)  # of a colour in a table of one cell: no square is infinite


@triton.jit
def _next_nearest(d, label, last_d, last_label, best_d, best_label, COUNT: tl.constexpr):
    """The nearest of labels [P, W] after the last one that was found, or the best so far: distance and label, [P]."""
    after = (d > last_d[:, None]) | ((d == last_d[:, None]) & (label > last_label[:, None]))
    after = after & (label < COUNT)
    least = tl.min(tl.where(after, d, float("inf")), 1)
    first = tl.min(tl.where(after & (d == least[:, None]), label, COUNT), 1)
    better = (first < COUNT) & ((best_label >= COUNT) | (least < best_d) | ((least == best_d) & (first < best_label)))
    return tl.where(better, least, best_d), tl.where(better, first, best_label)


@triton.jit
def nearest_labels(
    x, y, valid, axis, centers_ptr, cells_ptr, labels_ptr, cell_first, cell_size,
    COUNT: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The N labels of an axis that are nearest to the colours (x, y), and their squared distances: [P, COLUMNS] twice.
    They are looked for in the cell of the colour, and among all labels where no cell has it.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    w = tl.arange(0, WIDTH)[None, :]
    c = tl.arange(0, C)[None, :]
    if SIDE == 1:
        near = tl.abs(x) < _FARTHEST  # false for nan
        cell = tl.zeros([P], tl.int32)
    else:
        row, line = tl.floor((x - cell_first) / cell_size), tl.floor((y - cell_first) / cell_size)
        near = (row >= 0) & (row < SIDE) & (line >= 0) & (line < SIDE)
        cell = tl.where(near, row, 0.0).to(tl.int32) * SIDE + tl.where(near, line, 0.0).to(tl.int32)
    far = valid & ~near
    some_far = tl.max(far.to(tl.int32), 0) > 0
    cells = axis * SIDE * SIDE + cell[:, None]
    label = tl.load(labels_ptr + cells * WIDTH + w)
    dx = x[:, None] - tl.load(cells_ptr + cells * (2 * WIDTH) + w)
    dy = y[:, None] - tl.load(cells_ptr + cells * (2 * WIDTH) + WIDTH + w)
    d = dx * dx + dy * dy
    index = tl.zeros([P, COLUMNS], tl.int32)
    squared = tl.full([P, COLUMNS], float("inf"), tl.float32)
    last_d = tl.full([P], -1.0, tl.float32)
    last_label = tl.full([P], -1, tl.int32)
    for j in tl.static_range(N):
        best_d = tl.full([P], float("inf"), tl.float32)
        best_label = tl.full([P], COUNT, tl.int32)
        found_d, found = _next_nearest(d, label, last_d, last_label, best_d, best_label, COUNT)
        if some_far:
            all_d, all_label = best_d, best_label
            for first in range(0, COUNT, C):
                every = first + c
                there = every < COUNT
                cx = tl.load(centers_ptr + axis * 2 * COUNT + every, mask=there, other=0.0)
                cy = tl.load(centers_ptr + axis * 2 * COUNT + COUNT + every, mask=there, other=0.0)
                ex = x[:, None] - cx
                ey = y[:, None] - cy
                all_d, all_label = _next_nearest(
                    ex * ex + ey * ey,
                    every + tl.zeros([P, C], tl.int32),
                    last_d,
                    last_label,
                    all_d,
                    all_label,
                    COUNT,
                )
            found_d = tl.where(far, all_d, found_d)
            found = tl.where(far, all_label, found)
        lost = found >= COUNT  # of nan: the first labels, at a distance that is none
        found_d = tl.where(lost, float("nan"), found_d)
        found = tl.where(lost, j, found)
        index = tl.where(column == j, found[:, None], index)
        squared = tl.where(column == j, found_d[:, None], squared)
        last_d = found_d
        last_label = found
    return index, squared


@triton.jit
def labels_kernel(
    ab_ptr, centers_ptr, cells_ptr, labels_ptr, index_ptr, squared_ptr, counts_ptr, n, cell_first, cell_size,
    AXES: tl.constexpr, COUNT: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    COLUMNS: tl.constexpr, HISTOGRAM: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    valid = i < n
    a = tl.load(ab_ptr + 2 * i, mask=valid, other=0.0)
    b = tl.load(ab_ptr + 2 * i + 1, mask=valid, other=0.0)
    column = tl.arange(0, COLUMNS)[None, :]
    for axis in tl.static_range(AXES):
        if AXES == 1:
            x, y = a, b
        else:
            x = a if axis == 0 else b
            y = tl.zeros([P], tl.float32)
        index, squared = nearest_labels(
            x, y, valid, axis, centers_ptr, cells_ptr, labels_ptr, cell_first, cell_size,
            COUNT, SIDE, WIDTH, N, COLUMNS, P, C,
        )  # fmt: skip
        if HISTOGRAM:  # integers: whatever the order of the additions, the sum is the same
            label = tl.sum(tl.where(column == 0, index, 0), 1)
            tl.atomic_add(counts_ptr + axis * COUNT + label, tl.full([P], 1, tl.int64), mask=valid, sem="relaxed")
        else:
            at = (i + axis * tl.full([], 1, tl.int64) * n)[:, None] * N + column
            some = valid[:, None] & (column < N)
            tl.store(index_ptr + at, index.to(tl.int64), mask=some)
            tl.store(squared_ptr + at, squared, mask=some)


def label_histogram(ab: Tensor, tables: tuple[Tensor, Tensor, Tensor], side: int, first: float, size: float) -> Tensor:
    """ab: [..., 2] float32, contiguous. `tables` as of `cross_entropy`. [AXES · COUNT] int64."""
    centers = tables[0]
    counts = ab.new_zeros(centers.shape[0] * centers.shape[2], dtype=torch.int64)
    _launch(ab, tables, side, first, size, 1, (ab, ab, counts), HISTOGRAM=True)
    return counts


def nearest(
    ab: Tensor, tables: tuple[Tensor, Tensor, Tensor], side: int, first: float, size: float, neighbors: int
) -> tuple[Tensor, Tensor]:
    """ab: [..., 2] float32, contiguous. Index [AXES, ..., neighbors] int64, and squared distance."""
    shape = (len(tables[0]), *ab.shape[:-1], neighbors)
    index, squared = ab.new_empty(shape, dtype=torch.int64), ab.new_empty(shape)
    _launch(ab, tables, side, first, size, neighbors, (index, squared, index), HISTOGRAM=False)
    return index, squared


def _launch(ab, tables, side, first, size, neighbors, results, **constants) -> None:
    centers, cells, labels = tables
    n = ab.numel() // 2
    if n == 0:
        return
    with torch.cuda.device_of(ab):
        labels_kernel[(triton.cdiv(n, PIXELS),)](
            ab, centers, cells, labels, *results, n, first, size, AXES=len(centers), COUNT=centers.shape[2], SIDE=side,
            WIDTH=labels.shape[2], N=neighbors, COLUMNS=triton.next_power_of_2(neighbors), **constants, P=PIXELS,
            C=CHUNK, num_warps=WARPS, enable_fp_fusion=False,  # distances are rounded as in PyTorch
        )  # fmt: skip
