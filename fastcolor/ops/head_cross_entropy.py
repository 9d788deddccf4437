"""The network's last layer and the colour cross-entropy in one: logits of a few pixels at a time, never of all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastcolor.bins import ColorBins
from fastcolor.ops import _backend
from fastcolor.ops import cross_entropy as op

# Pixels whose logits are held: what was fastest, by the bytes of a number.
_CHUNK = {4: 1024, 2: 4096}

# Pixels: with fewer, whose logits are no burden, the two operations are faster (benchmarks/ops/loss.py).
FEWEST = 1 << 15

_REDUCTIONS = ("mean", "sum")


def head_cross_entropy(
    features: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [K, C] or [K, C, 1, 1]
    bias: Tensor | None,  # [K]
    ab: Tensor,  # [B, 2, H, W]
    *,
    bins: ColorBins | None = None,
    weights: Tensor | None = None,  # [K]
    ignore: Tensor | None = None,  # [B, H, W]
    reduction: str = "mean",
    neighbors: int = 5,
    sigma: float = 5.0,
) -> Tensor:
    """`color_cross_entropy(conv2d(features, weight, bias), ab, ...)` without the N·K logits and their gradient.

    Logits of some pixels are made, turned into their gradient in the cache, and that into the gradients of features,
    weight and bias; the backward only scales those. Without a gradient, for few pixels, on a GPU, or where the loss
    runs on the reference, it is those two operations.

    Args:
        features: [B, C, H, W] floating; channels_last is read in place.
        weight: [K, C] or [K, C, 1, 1] of the 1×1 convolution; cast to the type of `features`, as autocast does.
        bias: [K] or None.
        reduction: "mean" over the pixels that count, or "sum".
        ab, bins, weights, ignore, neighbors, sigma: as of `color_cross_entropy`.

    Returns:
        a scalar, float32 (float64 for float64 features). Differentiable in features, weight and bias, once.

    Raises:
        TypeError, ValueError: as `color_cross_entropy`, or a weight or bias that does not fit.
    """
    bins = bins or op._JOINT
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}")
    if not isinstance(features, Tensor) or features.ndim != 4 or not features.is_floating_point():
        got = f"{features.dtype} {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"features must be floating [B, C, H, W], got {got}")
    labels, channels = bins.count, features.shape[1]
    if weight.numel() != labels * channels or weight.shape[:2] != (labels, channels):
        raise ValueError(f"weight must have shape [{labels}, {channels}] for {bins}, got {list(weight.shape)}")
    if bias is not None and bias.shape != (labels,):
        raise ValueError(f"bias must have shape [{labels}], got {list(bias.shape)}")
    options = {"bins": bins, "weights": weights, "ignore": ignore, "neighbors": neighbors, "sigma": sigma}
    wants = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (features, weight, bias))
    # chunks are made for a cache; on a GPU they would be launches
    on_cpp = features.device.type == "cpu" and op._chosen(features.device, _backend.forced()) == "cpp"
    few = features.numel() < FEWEST * channels
    if few or not on_cpp or not wants or op._left_to_reference(features, neighbors) or torch.compiler.is_compiling():
        cast = [None if x is None else x.to(features.dtype) for x in (weight.reshape(labels, channels, 1, 1), bias)]
        return op.color_cross_entropy(F.conv2d(features, *cast), ab, reduction=reduction, **options)
    shape = [features.shape[0], 2, *features.shape[2:]]
    if not isinstance(ab, Tensor) or list(ab.shape) != shape:
        raise ValueError(f"ab must have shape {shape}, got {list(getattr(ab, 'shape', ()))}")
    if ignore is not None and list(ignore.shape) != shape[:1] + shape[2:]:
        raise ValueError(f"ignore must have shape {shape[:1] + shape[2:]}, got {list(ignore.shape)}")
    # checks the rest as the loss does, on no pixel at all
    part = None if ignore is None else ignore[:0]
    op.color_cross_entropy(
        features.new_empty(0, labels, *features.shape[2:]), ab[:0], reduction="sum", **{**options, "ignore": part}
    )
    fixed = op.kernel_options(bins, neighbors, sigma)
    with torch.autocast(features.device.type, enabled=False):  # the types are those of features, sums are float32
        return _HeadCrossEntropy.apply(features, weight, bias, ab, weights, ignore, reduction == "mean", fixed)


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, ab, weights, ignore, mean, fixed):
        batch, channels, height, width = features.shape
        pixels, labels = batch * height * width, len(weight)
        rows = features.movedim(1, -1).reshape(pixels, channels)
        matrix = weight.reshape(labels, channels).to(features.dtype)
        offset = features.new_zeros(labels) if bias is None else bias.to(features.dtype)
        planes = ab.movedim(1, 0).reshape(2, pixels).float()
        mask = None if ignore is None else ignore.reshape(pixels)
        grad_rows = torch.empty_like(rows)
        grad_matrix = torch.zeros_like(matrix, dtype=torch.float32)
        grad_offset = torch.zeros_like(offset, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=features.device)
        chunk = _CHUNK[features.element_size()]
        buffer = rows.new_empty(min(chunk, pixels), labels)
        for start in range(0, pixels, chunk):
            part = slice(start, min(pixels, start + chunk))
            n = part.stop - start
            logits = torch.addmm(offset, rows[part], matrix.T, out=buffer[:n])
            loss, grad = op._cross_entropy(
                logits.view(1, 1, n, labels).movedim(-1, 1), planes[:, part].reshape(1, 2, 1, n), weights,
                None if mask is None else mask[part].view(1, 1, n), *fixed, "sum", True,
            )  # fmt: skip
            grad = grad.movedim(1, -1).reshape(n, labels)
            torch.mm(grad, matrix, out=grad_rows[part])
            grad_matrix += grad.T @ rows[part]
            grad_offset += grad.sum(0, dtype=torch.float32)
            total += loss
        ctx.count = 1 if not mean else pixels if mask is None else pixels - int(mask.sum())
        ctx.shape, ctx.has_bias = (batch, height, width, channels), bias is not None
        ctx.types = weight.shape, weight.dtype, offset.dtype if bias is None else bias.dtype
        ctx.save_for_backward(grad_rows, grad_matrix, grad_offset)
        return (total / ctx.count if ctx.count else total * torch.nan).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        rows, matrix, offset = ctx.saved_tensors
        factor = upstream / max(1, ctx.count)
        shape, of_weight, of_bias = ctx.types
        grad_features = (rows * factor).to(rows.dtype).view(ctx.shape).movedim(-1, 1)
        grad_bias = (offset * factor).to(of_bias) if ctx.has_bias else None
        return grad_features, (matrix * factor).view(shape).to(of_weight), grad_bias, *(None,) * 5
