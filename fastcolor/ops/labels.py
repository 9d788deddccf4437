"""The nearest labels of colours, and the tables in which kernels find them. The definition is `ColorBins.nearest`."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastcolor.bins import CELL, CELLS, CELLS_FROM, ColorBins
from fastcolor.ops import _backend

_backend.offer("label_histogram", "triton", "cpp")

_LANES = 16  # kTableLanes of kernels/cpu/labels.h


def _arrays(bins: ColorBins, neighbors: int, lanes) -> tuple[Tensor, Tensor, Tensor]:
    """Centers [axes, 2, count]; and for each cell of the ab plane the labels that may be near a colour in it: their
    coordinates [axes, cells, 2, width] and numbers [axes, cells, width] int32, padded with inf and `count`.

    `lanes` makes a width from the least that will do.
    """
    with torch.device("cpu"):
        if bins.kind == "joint":
            centers = bins.centers.float()[None]  # [axes, count, 2]
            labels = bins.candidates(neighbors, torch.device("cpu")).reshape(1, CELLS**2, -1)
        else:  # two axes of one coordinate, each with all of its labels in one cell
            columns = bins.centers.float().T
            centers = torch.stack((columns, torch.zeros_like(columns)), -1)
            labels = torch.arange(len(bins.centers)).expand(2, 1, -1)
        axes, count, _ = centers.shape
        cells, width = labels.shape[1], lanes(labels.shape[2])
        padded = torch.full((axes, cells, width), count)
        padded[..., : labels.shape[2]] = labels
        far = torch.cat((centers, centers.new_full((axes, 1, 2), torch.inf)), 1)
        axis = torch.arange(axes)[:, None, None]
        return centers.movedim(-1, 1).contiguous(), far[axis, padded].movedim(-1, 2).contiguous(), padded.int()


def side_of(kind: str) -> int:
    """Cells along a side of the table."""
    return CELLS if kind == "joint" else 1


class Tables:
    """`kernels/cpu/labels.h: LabelTables`, and the tensors whose addresses it has."""

    def __init__(self, bins: ColorBins, neighbors: int):
        self.kept = _arrays(bins, neighbors, lambda n: -(-n // _LANES) * _LANES)
        self.axes, _, self.count = self.kept[0].shape
        addresses = [x.data_ptr() for x in self.kept]
        self.native = _backend.native("_cpu").LabelTables(
            self.axes, self.count, addresses[0], side_of(bins.kind), self.kept[2].shape[2], CELLS_FROM, CELL,
            *addresses[1:],
        )  # fmt: skip


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def tables(kind: str, centers: tuple[tuple[float, float], ...] | None, neighbors: int) -> Tables:
    """Those of a label space for so many neighbours; kept, since they take a while to make."""
    return Tables(ColorBins(kind, centers), neighbors)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def device_tables(
    kind: str, centers: tuple[tuple[float, float], ...] | None, neighbors: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """`_arrays` on a device, its width a power of two, as Triton's tiles are."""
    arrays = _arrays(ColorBins(kind, centers), neighbors, lambda n: max(_LANES, 1 << (n - 1).bit_length()))
    return tuple(x.to(device) for x in arrays)


def nearest_labels(ab: Tensor, bins: ColorBins, neighbors: int = 1) -> tuple[Tensor, Tensor]:
    """`bins.nearest(ab, neighbors)` of colours [..., 2] in C++ or Triton; of float64, on the reference, that itself.

    Returns:
        index [G, ..., neighbors] int64 and squared distance [G, ..., neighbors] float32.
    """
    k = min(neighbors, len(bins.centers))
    backend = _backend_of(ab)
    if backend == "reference":
        return bins.nearest(ab, neighbors)
    flat = ab.float().contiguous()
    if backend == "triton":
        from fastcolor.kernels.triton import labels  # triton is optional

        return labels.nearest(flat, *_on_device(bins, k, ab.device), k)
    space = tables(bins.kind, bins.own_centers, k)
    shape = (space.axes, *ab.shape[:-1], k)
    index, squared = ab.new_empty(shape, dtype=torch.int64), flat.new_empty(shape)
    _backend.native("_cpu").nearest_labels(
        space.native, flat.data_ptr(), True, 1, flat.numel() // 2, k, index.data_ptr(), squared.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return index, squared


def label_histogram(ab: Tensor, bins: ColorBins) -> Tensor:
    """`bins.histogram(ab)` of colours [..., 2] in C++ or Triton; of float64, on the reference, that itself. [K] float64
    on the device of the colours.
    """
    backend = _backend_of(ab)
    if backend == "reference":
        return bins.histogram(ab)
    flat = ab.float().contiguous()
    if backend == "triton":
        from fastcolor.kernels.triton import labels  # triton is optional

        return labels.label_histogram(flat, *_on_device(bins, 1, ab.device)).double()
    space = tables(bins.kind, bins.own_centers, 1)
    counts = ab.new_empty(bins.count, dtype=torch.int64)
    _backend.native("_cpu").label_histogram(
        space.native, flat.data_ptr(), True, 1, flat.numel() // 2, counts.data_ptr(), torch.get_num_threads()
    )
    return counts.double()


def _on_device(bins: ColorBins, neighbors: int, device: torch.device) -> tuple:
    """What Triton's kernels are told of a label space."""
    return device_tables(bins.kind, bins.own_centers, neighbors, device), side_of(bins.kind), CELLS_FROM, CELL


def _backend_of(ab: Tensor) -> str:
    if ab.dtype == torch.float64 or ab.device.type not in ("cpu", "cuda"):
        return "reference"
    return _backend.choose("label_histogram", ab.device).name
