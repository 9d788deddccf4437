"""Soft-encoded colour cross-entropy. The formula is in fastcolor.reference.cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcolor.bins import CELL, CELLS_FROM, ColorBins
from fastcolor.kernels.memory import STORAGE
from fastcolor.ops import _backend
from fastcolor.ops.labels import device_tables, side_of, tables
from fastcolor.reference import cross_entropy as reference

_REDUCTIONS = ("mean", "sum", "none")

_MOST_NEIGHBORS = 16  # of the kernels
_SMALLEST_SIGMA = 1e-6  # in ab units: far below it, squares of its inverse overflow
_JOINT = ColorBins()

_backend.offer("color_cross_entropy", "triton", "cpp")


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
    bins = bins or _JOINT
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
    if neighbors < 1 or not sigma >= _SMALLEST_SIGMA:
        raise ValueError(
            f"neighbors must be at least 1 and sigma at least {_SMALLEST_SIGMA}, got {neighbors} and {sigma}"
        )
    if _chosen(logits.device, _backend.forced()) == "reference" or _left_to_reference(logits, neighbors):
        return reference.color_cross_entropy(logits, ab, bins, weights, ignore, reduction, neighbors, sigma)
    fixed = (*kernel_options(bins, neighbors, sigma), reduction)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropy.apply(logits, ab, weights, ignore, *fixed)
    return _cross_entropy(logits, ab, weights, ignore, *fixed, False)[0]


def kernel_options(bins: ColorBins, neighbors: int, sigma: float) -> tuple:
    """(kind, centers, neighbors, sharpness) of the operations below."""
    count = min(neighbors, len(bins.centers)) if bins.kind == "joint" else 1
    centers = None if bins.own_centers is None else [x for center in bins.own_centers for x in center]
    return bins.kind, centers, count, 0.5 / (sigma * sigma)


@torch.compiler.assume_constant_result
def _chosen(device: torch.device, forced: tuple[str, ...]) -> str:
    """The backend. A constant to torch.compile, which cannot trace the search; it guards on `forced`."""
    return _backend.choose("color_cross_entropy", device).name


def _left_to_reference(logits: Tensor, neighbors: int) -> bool:
    """Whether kernels do not take this; an error where a backend was asked for that is one of them."""
    if logits.dtype == torch.float64:
        why = _backend.FLOAT64
    elif logits.dtype not in STORAGE:
        why = f"{logits.dtype} is computed on the reference"
    elif neighbors > _MOST_NEIGHBORS:
        why = f"kernels take up to {_MOST_NEIGHBORS} neighbors, got {neighbors}"
    else:
        return False
    _backend.left_to_reference("color_cross_entropy", logits.device, why)
    return True


def _labels_last(logits: Tensor) -> bool:
    """Whether labels are side by side in memory; planes of pixels where both can be said, and where neither can."""
    return not logits.is_contiguous() and logits.movedim(1, -1).is_contiguous()


def _empty_like(logits: Tensor) -> Tensor:
    batch, labels, height, width = logits.shape
    if _labels_last(logits):
        return logits.new_empty((batch, height, width, labels)).movedim(-1, 1)
    return logits.new_empty(logits.shape)


def _run(logits, ab, weights, ignore, upstream, kind, centers, neighbors, sharpness, mean, loss, losses, grad) -> None:
    """The kernel; its arguments are those of kernels/cpu/cross_entropy.h."""
    last = _labels_last(logits)
    read = logits if last else logits.contiguous()
    own = None if centers is None else tuple(zip(centers[::2], centers[1::2], strict=True))
    plain = [None if x is None else x.float().contiguous() for x in (ab, weights, upstream)]
    mask = None if ignore is None else ignore.contiguous()
    if _backend.choose("color_cross_entropy", logits.device).name == "triton":
        from fastcolor.kernels.triton import cross_entropy  # triton is optional

        each = ab.new_empty(logits.shape[0], *logits.shape[2:], dtype=torch.float32) if losses is None else losses
        # on the device: nothing waits, and a graph can be captured
        counted = each.numel() if mask is None else (~mask).sum()
        scale = each.new_ones(()) / counted if mean else each.new_ones(())
        cross_entropy.cross_entropy(
            read, last, plain[0], device_tables(kind, own, neighbors, logits.device), side_of(kind), CELLS_FROM, CELL,
            plain[1], mask, plain[2], scale, neighbors, sharpness, each, grad,
        )  # fmt: skip
        if loss is not None:
            total = each.sum(dtype=torch.float64)
            loss.copy_(total / counted if mean else total)
        return
    space = tables(kind, own, neighbors)
    of_ab, of_weights, of_upstream, of_mask, of_loss, of_losses, of_grad = (
        0 if x is None else x.data_ptr() for x in (*plain, mask, loss, losses, grad)
    )
    _backend.native("_cpu").cross_entropy(
        read.data_ptr(), STORAGE[logits.dtype], last, logits.shape[0], logits.shape[2] * logits.shape[3],
        space.native, of_ab, of_weights, of_mask, of_upstream, neighbors, sharpness, mean, torch.get_num_threads(),
        of_loss, of_losses, of_grad,
    )  # fmt: skip


def _launch(logits, ab, weights, ignore, kind, centers, neighbors, sharpness, reduction, keep):
    result, grad = _fake(logits, ab, weights, ignore, kind, centers, neighbors, sharpness, reduction, keep)
    each = reduction == "none"
    _run(
        logits, ab, weights, ignore, None, kind, centers, neighbors, sharpness, reduction == "mean",
        None if each else result, result if each else None, grad if keep else None,
    )  # fmt: skip
    return result, grad


def _fake(logits, ab, weights, ignore, kind, centers, neighbors, sharpness, reduction, keep):
    shape = (logits.shape[0], *logits.shape[2:]) if reduction == "none" else ()
    return logits.new_empty(shape, dtype=torch.float32), _empty_like(logits) if keep else logits.new_empty(0)


def _launch_backward(upstream, logits, ab, weights, ignore, kind, centers, neighbors, sharpness):
    grad = _empty_like(logits)
    _run(logits, ab, weights, ignore, upstream, kind, centers, neighbors, sharpness, False, None, None, grad)
    return grad


_ARGUMENTS = (
    "Tensor logits, Tensor ab, Tensor? weights, Tensor? ignore, str kind, float[]? centers, int neighbors, "
    "float sharpness"
)
_library = torch.library.Library("fastcolor", "FRAGMENT")
for _schema, _implementation, _meta in (
    (f"color_cross_entropy({_ARGUMENTS}, str reduction, bool keep) -> (Tensor, Tensor)", _launch, _fake),
    (
        f"color_cross_entropy_backward(Tensor upstream, {_ARGUMENTS}) -> Tensor",
        _launch_backward,
        lambda upstream, logits, *_: _empty_like(logits),
    ),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _device)
    torch.library.register_fake(f"fastcolor::{_name}", _meta, lib=_library)

# Alone they drop gradients: callers go through the function above.
_cross_entropy = torch.ops.fastcolor.color_cross_entropy.default
_cross_entropy_backward = torch.ops.fastcolor.color_cross_entropy_backward.default


def _graph_is_kept() -> bool:
    """Whether the backward pass under way may be gone through again. torch does not say so in public: where it does not
    say so at all, a graph counts as kept, which costs a copy.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


class _CrossEntropy(torch.autograd.Function):
    """A scalar loss leaves its gradient in the forward. That of each pixel has factors which only the backward knows:
    it reads the logits once more, where a product with a kept gradient would read and write as much as they are.

    In float16 a mean's parts would vanish before a gradient scaler's factor reaches them: the sum's are kept instead.
    """

    @staticmethod
    def forward(ctx, logits, ab, weights, ignore, *fixed):
        *options, reduction = fixed
        ctx.options, ctx.each, ctx.count = options, reduction == "none", None
        if reduction == "mean" and logits.dtype == torch.float16:
            ctx.count = ab[:, 0].numel() if ignore is None else ab[:, 0].numel() - ignore.sum()
            reduction = "sum"
        loss, grad = _cross_entropy(logits, ab, weights, ignore, *options, reduction, not ctx.each)
        ctx.save_for_backward(*((logits, ab, weights, ignore) if ctx.each else (grad,)))
        return loss if ctx.count is None else loss / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        none = (None,) * (4 + len(ctx.options))
        if ctx.each:
            return _cross_entropy_backward(upstream, *ctx.saved_tensors, *ctx.options), *none
        (grad,) = ctx.saved_tensors
        if ctx.count is not None:
            upstream = upstream / (max(1, ctx.count) if isinstance(ctx.count, int) else ctx.count.clamp_min(1))
        if torch.compiler.is_compiling() or _graph_is_kept():
            return (grad * upstream).to(grad.dtype), *none  # a graph that is kept may be gone through again
        # On the CPU a look at the factor is free, and a pass over the gradient is not: nearly always it is 1.
        if not grad.is_cuda and upstream.item() == 1:
            return grad, *none
        return grad.mul_(upstream), *none
