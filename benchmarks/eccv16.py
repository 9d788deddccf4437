"""A network of the shape of Zhang et al. 2016 (arXiv 1603.08511), built from the layer table of its appendix.

What most notebooks run. Random weights: its time does not depend on them. 32.2 M parameters, 83.5 GFLOP at 256×256
(a test counts both).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BINS = 313
# Convolutions of 3×3 by block: channels, stride and dilation of each; batch normalization ends a block. conv8 begins
# with a transposed convolution of 4×4 that doubles the size, and has no normalization.
TABLE = {
    "conv1": [(64, 1, 1), (64, 2, 1)],
    "conv2": [(128, 1, 1), (128, 2, 1)],
    "conv3": [(256, 1, 1), (256, 1, 1), (256, 2, 1)],
    "conv4": [(512, 1, 1)] * 3,
    "conv5": [(512, 1, 2)] * 3,
    "conv6": [(512, 1, 2)] * 3,
    "conv7": [(512, 1, 1)] * 3,
}
UPSAMPLED = [256, 256, 256]  # conv8


class Eccv16(nn.Module):
    """L [B, 1, H, W] in [0, 100] -> ab [B, 2, H, W]; sides divide by 8. `logits` are at H/4."""

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for block in TABLE.values():
            for outputs, stride, dilation in block:
                layers += [nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation), nn.ReLU(inplace=True)]
                inputs = outputs
            layers.append(nn.BatchNorm2d(inputs))
        layers += [nn.ConvTranspose2d(inputs, UPSAMPLED[0], 4, 2, 1), nn.ReLU(inplace=True)]
        inputs = UPSAMPLED[0]
        for outputs in UPSAMPLED[1:]:
            layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.ReLU(inplace=True)]
            inputs = outputs
        self.layers = nn.Sequential(*layers, nn.Conv2d(inputs, BINS, 1))
        self.colors = nn.Conv2d(BINS, 2, 1, bias=False)  # the mean over the bins
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def logits(self, L: Tensor) -> Tensor:
        return self.layers((L - 50) / 100)

    def forward(self, L: Tensor) -> Tensor:
        ab = self.colors(self.logits(L).softmax(1))
        return F.interpolate(ab, scale_factor=4.0, mode="bilinear", align_corners=False) * 110


def flops(network: nn.Module, L: Tensor) -> int:
    """Of a forward pass: a multiplication and an addition count two, in convolutions and matrix products alone.

    Nothing is computed: shapes are enough.
    """
    from torch.utils.flop_counter import FlopCounterMode

    shape = copy.deepcopy(network).to("meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        shape(torch.empty_like(L, device="meta"))
    return counter.get_total_flops()
