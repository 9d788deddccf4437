"""The tables in which C++ kernels look up the nearest labels of a colour. The definition is `ColorBins.nearest`."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastcolor.bins import CELL, CELLS, CELLS_FROM, ColorBins
from fastcolor.ops import _backend

_backend.offer("label_histogram", "cpp")

_LANES = 16  # kTableLanes of kernels/cpu/labels.h


class Tables:
    """`kernels/cpu/labels.h: LabelTables`, and the tensors whose addresses it has."""

    def __init__(self, bins: ColorBins, neighbors: int):
        if bins.kind == "joint":
            centers = bins.centers.float()[None]  # [axes, count, 2]
            labels = bins.candidates(neighbors, torch.device("cpu")).reshape(1, CELLS**2, -1)
            side = CELLS
        else:  # two axes of one coordinate, each with all of its labels in one cell
            columns = bins.centers.float().T
            centers = torch.stack((columns, torch.zeros_like(columns)), -1)
            labels = torch.arange(len(bins.centers)).expand(2, 1, -1)
            side = 1
        axes, count, _ = centers.shape
        cells, width = labels.shape[1], -(-labels.shape[2] // _LANES) * _LANES
        padded = torch.full((axes, cells, width), count)
        padded[..., : labels.shape[2]] = labels
        far = torch.cat((centers, centers.new_full((axes, 1, 2), torch.inf)), 1)
        axis = torch.arange(axes)[:, None, None]
        self.kept = (
            centers.movedim(-1, 1).contiguous(),  # [axes, 2, count]
            far[axis, padded].movedim(-1, 2).contiguous(),  # [axes, cells, 2, width]
            padded.int(),
        )
        self.axes, self.count = axes, count
        addresses = [x.data_ptr() for x in self.kept]
        self.native = _backend.native("_cpu").LabelTables(
            axes, count, addresses[0], side, width, CELLS_FROM, CELL, *addresses[1:]
        )


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def tables(kind: str, centers: tuple[tuple[float, float], ...] | None, neighbors: int) -> Tables:
    """Those of a label space for so many neighbours; kept, since they take a while to make."""
    return Tables(ColorBins(kind, centers), neighbors)


def nearest_labels(ab: Tensor, bins: ColorBins, neighbors: int = 1) -> tuple[Tensor, Tensor]:
    """`bins.nearest(ab, neighbors)` in C++ for float32 colours [..., 2] on the CPU; elsewhere that itself.

    Returns:
        index [G, ..., neighbors] int64 and squared distance [G, ..., neighbors].
    """
    if not _on_cpp(ab):
        return bins.nearest(ab, neighbors)
    k = min(neighbors, len(bins.centers))
    space = tables(bins.kind, bins.own_centers, k)
    shape = (space.axes, *ab.shape[:-1], k)
    index, squared = ab.new_empty(shape, dtype=torch.int64), ab.new_empty(shape)
    flat = ab.contiguous()
    _backend.native("_cpu").nearest_labels(
        space.native, flat.data_ptr(), True, 1, flat.numel() // 2, k, index.data_ptr(), squared.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return index, squared


def label_histogram(ab: Tensor, bins: ColorBins) -> Tensor:
    """`bins.histogram(ab)` in C++ for float32 colours [..., 2] on the CPU; elsewhere that itself. [K] float64."""
    if not _on_cpp(ab):
        return bins.histogram(ab)
    space = tables(bins.kind, bins.own_centers, 1)
    counts = ab.new_empty(bins.count, dtype=torch.int64)
    flat = ab.contiguous()
    _backend.native("_cpu").label_histogram(
        space.native, flat.data_ptr(), True, 1, flat.numel() // 2, counts.data_ptr(), torch.get_num_threads()
    )
    return counts.double()


def _on_cpp(ab: Tensor) -> bool:
    takes = ab.device.type == "cpu" and ab.dtype == torch.float32
    return takes and _backend.choose("label_histogram", ab.device).name == "cpp"
