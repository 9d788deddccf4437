"""3×3 convolutions whose weight gradient is one matrix product: for training on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x). Where oneDNN's own gradient of the weights is slow, that is made another way.

    It splits the batch among threads, which wait for each other in a loop many times over. Where another process (a
    loader's worker) has one of the cores, each time costs a time slice: 512 → 512 channels at 4×4 pixels in bfloat16
    took 580 ms instead of 10. The matrix product has no such waits, and with as many channels it is faster without
    company too (7 ms); with few it is slower, and oneDNN keeps those.
    """
    if not _pays(conv, x):
        return conv(x)
    weight = conv.weight
    if torch.is_autocast_enabled("cpu"):  # which looks into no function of our own
        kind = torch.get_autocast_dtype("cpu")
        x, weight = x.to(kind), weight.to(kind)
    return _Convolution.apply(x, weight, conv.stride[0])


def _pays(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether there is a gradient of wide 3×3 weights to make on a CPU, channels last."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if not (torch.is_grad_enabled() and conv.weight.requires_grad) or x.dtype == torch.float64:
        return False
    if conv.kernel_size != (3, 3) or conv.padding != (1, 1) or conv.groups != 1 or conv.bias is not None:
        return False
    if conv.dilation != (1, 1) or conv.padding_mode != "zeros" or conv.stride not in ((1, 1), (2, 2)):
        return False
    if not conv.weight.is_contiguous(memory_format=torch.channels_last):
        return False
    halves = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    wide = conv.out_channels if conv.stride == (2, 2) else conv.in_channels
    return wide >= (256 if halves or conv.stride == (2, 2) else 512)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, None, stride, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        s = [ctx.stride, ctx.stride]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, s, [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad, x, ctx.stride)
        return grad_x, grad_weight, None


def weight_gradient(grad: Tensor, x: Tensor, stride: int) -> Tensor:
    """Of a 3×3 convolution with a margin of 1: grad [B, O, h, w], x [B, I, H, W] -> [O, I, 3, 3], channels last."""
    batch, outputs, height, width = grad.shape
    inputs = x.shape[1]
    wide = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # [B, H + 2, W + 2, I]
    of_image, of_row, of_column, of_channel = wide.stride()
    windows = wide.as_strided(
        (batch, height, width, 3, 3, inputs),
        (of_image, of_row * stride, of_column * stride, of_row, of_column, of_channel),
    ).reshape(batch * height * width, 9 * inputs)
    rows = grad.permute(0, 2, 3, 1).reshape(batch * height * width, outputs)
    return (rows.T @ windows).view(outputs, 3, 3, inputs).permute(0, 3, 1, 2)
