"""Small films and a small colorizer, for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcolor.bins import ColorBins
from fastcolor.model.checkpoint import Checkpoint
from fastcolor.model.colorizer import Colorizer
from fastcolor.model.network import ColorNetwork, NetworkConfig


def tiny(size: int = 32, head: str = "distribution", bins: str = "joint", **options) -> Colorizer:
    """A network that was never trained but has opinions: its colours vary over the picture."""
    torch.manual_seed(3)
    network = ColorNetwork(NetworkConfig(head=head, bins=ColorBins(bins))).eval()
    last = network.head if head == "distribution" else network.head[-1]
    torch.nn.init.normal_(last.weight, std=0.2 if head == "distribution" else 0.02)
    return Colorizer(Checkpoint(network, torch.rand(network.config.bins.count), {"size": size}), "cpu", **options)


def scene(seed: int, height: int = 96, width: int = 192) -> Tensor:
    """Lightness with structure at several sizes, [1, 1, H, W]."""
    rng = torch.Generator().manual_seed(seed)
    picture = torch.zeros(1, 1, height, width)
    for side in (8, 24, 48):
        blobs = torch.rand(1, 1, height // side + 2, width // side + 2, generator=rng)
        picture += F.interpolate(blobs, (height, width), mode="bilinear") * side
    return picture / 80 * 100


def luma(seed: int = 1, x: int = 0, height: int = 48, width: int = 64, bits: int = 8) -> Tensor:
    """A luma plane [H, W]: a window of a scene at column x."""
    plane = (16 + scene(seed, height, 128)[0, 0, :, x : x + width] * 2.19) * 2 ** (bits - 8)
    return plane.to(torch.uint8 if bits == 8 else torch.uint16)
