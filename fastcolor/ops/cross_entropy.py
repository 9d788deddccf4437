"""Soft-encoded colour cross-entropy. The formula is in fastcolor.reference.cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcolor.bins import ColorBins
from fastcolor.ops import _backend
from fastcolor.reference import cross_entropy as reference

_REDUCTIONS = ("mean", "sum", "none")

_backend.offer("color_cross_entropy")


def color_cross_entropy(
    logits: Tensor,  # [B, K, H, W]
    ab: Tensor,  # [B, 2, H, W]
    *,
    bins: ColorBins | None = None,
    weights: Tensor | None = None,  # [K]
    ignore: Tensor | None = None,  # [B, H, W]
    reduction: str = "mean",
    neighbors: int = 5,
    sigma: float = 5.0,
) -> Tensor:
    """Cross-entropy between the predicted distribution over ab labels and the soft-encoded true colour.

    loss_i = w_i (logsumexp(u_i) − Σ_k p_ik u_ik): p_i spreads the colour over its nearest labels with a Gaussian, and
    w_i is the weight of the very nearest (Zhang et al. 2016, arXiv 1603.08511, equations 2 and 3). Separable bins are
    one-hot, and the losses of a and b are added. Differentiable in `logits`.

    Args:
        logits: [B, K, H, W] floating unary scores.
        ab: [B, 2, H, W] true colours in ab units.
        bins: the label space; the 313 joint bins if left out.
        weights: [K] class weights, as of `ColorBins.rebalancing_weights`; 1 if left out.
        ignore: [B, H, W] bool, True for pixels without a loss.
        reduction: "mean" over the pixels that count, "sum", or "none" for [B, H, W].
        neighbors: nearest labels that share a colour (joint bins).
        sigma: width of the Gaussian in ab units (joint bins).

    Returns:
        a scalar, or [B, H, W]; float64 for float64 logits, else float32. The mean over no pixel at all is nan.

    Raises:
        TypeError: a tensor of another type. ValueError: a shape or an option that does not fit; the message says which.
    """
    bins = bins or ColorBins()
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating tensor, got {getattr(logits, 'dtype', type(logits).__name__)}")
    if not isinstance(ab, Tensor) or not ab.is_floating_point():
        raise TypeError(f"ab must be a floating tensor, got {getattr(ab, 'dtype', type(ab).__name__)}")
    if logits.ndim != 4 or logits.shape[1] != bins.count:
        raise ValueError(f"logits must have shape [B, {bins.count}, H, W] for {bins}, got {list(logits.shape)}")
    batch, _, height, width = logits.shape
    if ab.shape != (batch, 2, height, width):
        raise ValueError(f"ab must have shape {[batch, 2, height, width]}, got {list(ab.shape)}")
    if weights is not None and weights.shape != (bins.count,):
        raise ValueError(f"weights must have shape [{bins.count}], got {list(weights.shape)}")
    if ignore is not None and (ignore.shape != (batch, height, width) or ignore.dtype != torch.bool):
        raise ValueError(
            f"ignore must be bool of shape {[batch, height, width]}, got {ignore.dtype} of {list(ignore.shape)}"
        )
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}")
    if neighbors < 1 or not sigma > 0:
        raise ValueError(f"neighbors must be at least 1 and sigma positive, got {neighbors} and {sigma}")
    _backend.choose("color_cross_entropy", logits.device)  # raises where a backend was asked for that has no kernel
    return reference.color_cross_entropy(logits, ab, bins, weights, ignore, reduction, neighbors, sigma)
