"""The bounds beside the elementary functions of the Triton kernels, over four million points each: on a GPU as it runs
them, and in the interpreter.
"""

from __future__ import annotations

import pytest
import torch

from fastcolor.ops import _backend

triton = pytest.importorskip("triton", reason="triton is not installed")
if _backend.missing("triton") is not None:
    pytest.skip(_backend.missing("triton"), allow_module_level=True)

import triton.language as tl  # noqa: E402
from fastcolor.kernels.triton.elementary import exp2  # noqa: E402
from fastcolor.kernels.triton.lab import _inverse_cbrt, _power  # noqa: E402

DEVICE = "cpu" if _backend.interpreting() else "cuda"
POINTS, BLOCK = 1 << 22, 1 << 18 if _backend.interpreting() else 1024


@triton.jit
def exp2_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, exp2(tl.load(x_ptr + i)))


@triton.jit
def cbrt_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, _inverse_cbrt(tl.load(x_ptr + i)))


@triton.jit
def power_kernel(x_ptr, out_ptr, P: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, _power(tl.load(x_ptr + i), P))


def error(kernel, x, exact, **constants):
    """The largest relative one."""
    x = x.float().to(DEVICE)
    out = torch.empty_like(x)
    kernel[(POINTS // BLOCK,)](x, out, **constants, BLOCK=BLOCK)
    expected = exact(x.double())
    return ((out.double() - expected).abs() / expected).max().item()


def test_exp2():
    assert error(exp2_kernel, torch.linspace(-125.9, 0, POINTS, dtype=torch.float64), torch.exp2) <= 2**-22


def test_cube_root():
    x = torch.exp2(torch.linspace(-9, 3, POINTS, dtype=torch.float64))
    assert error(cbrt_kernel, x, lambda x: x.pow(-1 / 3)) <= 3e-7


@pytest.mark.parametrize("p", [2.4, 1 / 2.4, 1.4, 1 / 2.4 - 1])
def test_power(p):
    far = min(20, 12 / abs(p))
    x = torch.exp2(torch.linspace(-far, far, POINTS, dtype=torch.float64) * 0.999)
    assert error(power_kernel, x, lambda x: x.pow(torch.tensor(p).float().item()), P=p) <= 3e-6
