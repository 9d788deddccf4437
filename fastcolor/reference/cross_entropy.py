"""Soft-encoded colour cross-entropy in plain PyTorch (Zhang et al. 2016, equations 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcolor.bins import ColorBins, soft_encode


def color_cross_entropy(
    logits: Tensor,  # [B, K, H, W]
    ab: Tensor,  # [B, 2, H, W]
    bins: ColorBins,
    weights: Tensor | None = None,  # [K]
    ignore: Tensor | None = None,  # [B, H, W] bool
    reduction: str = "mean",
    neighbors: int = 5,
    sigma: float = 5.0,
) -> Tensor:
    """w_i (logsumexp(u_i) − Σ_k p_ik u_ik), summed over the label axes. See `fastcolor.color_cross_entropy`."""
    u = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    index, p = soft_encode(bins, ab.movedim(1, -1).to(u.dtype), neighbors, sigma)  # [G, B, H, W, n]
    loss = u.new_zeros(u.shape[0], *u.shape[2:])  # [B, H, W]
    for g, (place, _) in enumerate(bins.groups()):
        u_g, at, p_g = u[:, place], index[g].movedim(-1, 1), p[g].movedim(-1, 1)
        loss_g = u_g.logsumexp(1) - (p_g * u_g.gather(1, at)).sum(1)
        if weights is not None:
            loss_g = loss_g * weights[place].to(u)[at[:, 0]]  # w of the nearest label
        loss = loss + loss_g
    if ignore is not None:
        loss = loss.masked_fill(ignore, 0)  # not multiplied: 0 * nan would be nan
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    counted = loss.numel() if ignore is None else (~ignore).sum()
    return loss.sum() / counted
