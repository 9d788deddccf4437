"""The network that ours is compared with has the size of the published one."""

from __future__ import annotations

import torch

from benchmarks.eccv16 import Eccv16, flops
from fastcolor.model.network import ColorNetwork, count_parameters


def test_eccv16_has_its_parameters_and_operations():
    # multiplied out by hand from the paper's table: weights and biases, then two for each of the normalizations
    with torch.device("meta"):
        network, L = Eccv16(), torch.empty(1, 1, 256, 256)
    weights = {"conv1": 640 + 36928, "conv2": 73856 + 147584, "conv3": 295168 + 2 * 590080}
    weights |= {"conv4": 1180160 + 2 * 2359808, "conv5-7": 9 * 2359808, "conv8": 2097408 + 2 * 590080}
    heads, norms = 80441 + 626, 2 * (64 + 128 + 256 + 4 * 512)
    assert count_parameters(network) == sum(weights.values()) + heads + norms == 32_236_011
    assert round(flops(network, L) / 1e9, 1) == 83.5


def test_shapes():
    network = Eccv16().eval()
    L = torch.rand(2, 1, 24, 16) * 100
    with torch.inference_mode():
        assert network.logits(L).shape == (2, 313, 6, 4)
        assert network(L).shape == (2, 2, 24, 16)


def test_ours_is_fourteen_times_smaller():
    network, L = ColorNetwork().eval().to("meta"), torch.empty(1, 1, 256, 256, device="meta")
    assert round(flops(network, L) / 1e9, 1) == 5.9
    assert round(count_parameters(network) / 1e6, 1) == 11.5
