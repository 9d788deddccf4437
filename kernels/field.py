"""The mean field as its kernels see it: tensors in the order in which they lie, and plain numbers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """B images, K labels, R columns of the label factors, O offsets. All but the logits are float32 and contiguous."""

    logits: Tensor  # [B, K, H, W], float32, float16 or bfloat16; contiguous, or [B, H, W, K] is with labels_last
    labels_last: bool
    guide: Tensor  # [B, 1, H, W]
    a: Tensor  # [K, R], s = A Bᵀ
    b: Tensor  # [K, R]
    space: Tensor  # [O], the weight of an offset between equal lightnesses
    sharpness: Tensor  # [], 1 / sigma_light
    prior: Tensor | None  # [B, R, H, W], what is added to every Σ_j w_ij F_j
    dy: list[int]  # [O], every offset with its mirror image
    dx: list[int]  # [O]
    counts: list[int]  # [axes] labels of each axis, which is a distribution of its own; they add up to K
    sweeps: int
    checkerboard: bool
    damping: float
    uniform: bool  # start


class Gradients(NamedTuple):
    """Where gradients go: the logits' are written, the others added to. Those of a pair are there or None together."""

    logits: Tensor  # float32, in memory as the logits are
    a: Tensor | None  # [K, R]; with b
    b: Tensor | None  # [K, R]
    guide: Tensor | None  # [B, 1, H, W]; with space and sharpness
    space: Tensor | None  # [O]
    sharpness: Tensor | None  # []
    prior: Tensor | None  # [B, R, H, W]
