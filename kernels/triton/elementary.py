"""Elementary functions that several kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastcolor.kernels.triton import interpreting

PTX = tl.constexpr(torch.version.hip is None and not interpreting())


@triton.jit
def exp2(x):
    """2^x. Max relative error 2^-22 (test_elementary_triton.py); 0 below 2^-126."""
    if PTX:  # one instruction: tl.exp2 takes care of denormal numbers
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)
