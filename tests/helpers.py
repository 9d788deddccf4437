"""What the tests share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fastcolor.ops import _backend

every_simd = pytest.mark.usefixtures("simd")  # runs a test with each instruction set: see conftest.py


@dataclass(frozen=True)
class Backend:
    name: str
    device: str

    def __str__(self) -> str:
        return self.name


def available(*names: str) -> list[Backend]:
    """Those of the backends that run here: C++ and the reference on the CPU, the others on a CUDA device."""
    device = {"cpp": "cpu", "reference": "cpu"}
    return [
        Backend(n, device.get(n, "cuda"))
        for n in names
        if _backend.missing(n) is None and (n in device or torch.cuda.is_available())
    ]


def largest_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest |a − b|; inf where one of them is nan."""
    assert a.shape == b.shape, f"{list(a.shape)} against {list(b.shape)}"
    difference = (a.double() - b.double()).abs()
    return difference.nan_to_num(torch.inf).max().item() if difference.numel() else 0.0
