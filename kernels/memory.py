"""Tensors as the kernels see them: addresses, sizes and the order of the channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Types as kernels/common/storage.h numbers them: of logits and the like, and of pictures.
STORAGE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SAMPLE = {torch.uint8: 0, torch.uint16: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}


class Channels(NamedTuple):
    """A tensor of three channels in one of the two orders that kernels read without a copy."""

    tensor: Tensor  # kept, so that the address stays valid
    interleaved: bool  # [images, pixels, 3]; else planar [images, 3, pixels]
    images: int
    pixels: int

    @property
    def planes(self) -> tuple[int, int, bool]:
        """Channels of kernels/common/storage.h."""
        return self.tensor.data_ptr(), SAMPLE[self.tensor.dtype], self.interleaved


def channels(tensor: Tensor, channels_last: bool) -> Channels:
    """Looks at (..., 3, H, W), or (..., H, W, 3) with `channels_last`: in place where its memory has either order."""
    height, width = tensor.shape[-3:-1] if channels_last else tensor.shape[-2:]
    pixels = height * width
    images = tensor.numel() // (3 * pixels) if pixels else 0
    if not tensor.is_contiguous():
        other = tensor.movedim(-1, -3) if channels_last else tensor.movedim(-3, -1)
        if other.is_contiguous():
            return Channels(tensor, not channels_last, images, pixels)
        tensor = tensor.contiguous()
    return Channels(tensor, channels_last, images, pixels)


def float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.float()
