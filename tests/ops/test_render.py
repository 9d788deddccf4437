"""Joint bilateral chroma upsampling against a naive loop, and what it is for: edges, alignment, lightness."""

from __future__ import annotations

import math

import pytest
import torch

import fastcolor
from fastcolor.reference import lab
from fastcolor.reference import render as reference
from fastcolor.reference.render import FLOOR, nearest_low


def upsample_chroma(ab, guide, L, scale, sigma):
    places = (nearest_low(n, s, 1, 0.5, L.device) for n, s in zip(L.shape[2:], scale, strict=True))
    return reference.upsample_chroma(ab, guide, L, *places, sigma)


def naive(ab, guide, L, scale, sigma):
    """From the formula, a pixel and a neighbour at a time."""
    _, h, w = ab.shape
    H, W = L.shape
    result = torch.zeros(2, H, W, dtype=torch.float64)
    for y in range(H):
        for x in range(W):
            v, u = (y + 0.5) * scale[0] - 0.5, (x + 0.5) * scale[1] - 0.5
            total = 0.0
            for i in range(round(v) - 1, round(v) + 2):
                for j in range(round(u) - 1, round(u) + 2):
                    k, m = min(max(i, 0), h - 1), min(max(j, 0), w - 1)
                    near = math.exp(-((guide[k, m] - L[y, x]).item() ** 2) / (2 * sigma**2)) + FLOOR
                    weight = near * max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j))
                    result[:, y, x] += weight * ab[:, k, m]
                    total += weight
            result[:, y, x] /= total
    return result


@pytest.mark.parametrize(
    ("low", "full", "scale"),
    [
        ((3, 4), (12, 16), (0.25, 0.25)),
        ((1, 1), (5, 3), (0.2, 0.3)),
        ((5, 7), (13, 9), (0.37, 0.71)),
        ((4, 4), (3, 3), (1.5, 1.3)),
    ],
)
def test_matches_the_naive_loop(low, full, scale):
    ab = torch.randn(1, 2, *low, dtype=torch.float64) * 30
    guide, L = (torch.rand(1, 1, *s, dtype=torch.float64) * 100 for s in (low, full))
    ours = upsample_chroma(ab, guide, L, scale, 10.0)
    assert torch.allclose(ours[0], naive(ab[0], guide[0, 0], L[0, 0], scale, 10.0), rtol=1e-9)


def test_strips_are_seamless(monkeypatch):
    ab, guide, L = torch.randn(2, 2, 9, 11) * 20, torch.rand(2, 1, 9, 11) * 100, torch.rand(2, 1, 41, 47) * 100
    whole = fastcolor.render(ab, guide, L, dtype=torch.float32)
    monkeypatch.setattr("fastcolor.reference.render._STRIP", 47 * 3)
    assert torch.allclose(fastcolor.render(ab, guide, L, dtype=torch.float32), whole, atol=1e-6)


def test_chroma_stops_at_a_lightness_edge():
    """Red left and blue right of an edge that lies between low-resolution centres: far less bleeds than bilinear
    lets.
    """
    L = torch.full((1, 1, 32, 32), 40.0)
    L[..., 18:] = 80.0
    ab = torch.zeros(1, 2, 8, 8)
    ab[:, 0, :, :5], ab[:, 0, :, 5:] = 30.0, -30.0
    ab[:, 0, :, 4] = 0.0  # the mixed block
    guide = torch.nn.functional.avg_pool2d(L, 4)
    ours = upsample_chroma(ab, guide, L, (0.25, 0.25), 8.0)
    bilinear = torch.nn.functional.interpolate(ab, (32, 32), mode="bilinear")
    truth = torch.where(L == 40, 30.0, -30.0)
    assert (ours[:, :1] - truth).abs().mean() < 0.6 * (bilinear[:, :1] - truth).abs().mean()


def test_a_flat_picture_is_not_shifted():
    """Symmetric colours stay symmetric: the grids are aligned by pixel centres."""
    ramp = torch.linspace(-30, 30, 8).expand(1, 2, 8, 8)
    up = upsample_chroma(ramp, torch.full((1, 1, 8, 8), 50.0), torch.full((1, 1, 32, 32), 50.0), (0.25, 0.25), 8.0)
    assert torch.allclose(up, -up.flip(3), atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32], ids=str)
def test_outputs_keep_lightness(channels_last, dtype):
    L = torch.rand(2, 1, 21, 18) * 100
    rgb = fastcolor.render(
        torch.randn(2, 2, 6, 5) * 80, torch.rand(2, 1, 6, 5) * 100, L, dtype=dtype, channels_last=channels_last
    )
    assert rgb.dtype == dtype and rgb.shape == ((2, 21, 18, 3) if channels_last else (2, 3, 21, 18))
    back = lab.rgb_to_lab(rgb, channels_last, dtype=torch.float64)
    back = back[..., :1].permute(0, 3, 1, 2) if channels_last else back[:, :1]
    assert (back - L).abs().max() <= (0.75 if dtype == torch.uint8 else 0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ab": torch.zeros(1, 3, 2, 2)}, r"ab must be floating of shape \[B, 2, h, w\]"),
        ({"guide": torch.zeros(1, 1, 3, 2)}, "guide needs the size of ab"),
        ({"L": torch.zeros(2, 1, 8, 8)}, "all three the same batch"),
        ({"sigma_light": -1.0}, "sigma_light must be positive, got -1.0"),
    ],
)
def test_errors(change, message):
    arguments = {
        "ab": torch.zeros(1, 2, 2, 2),
        "guide": torch.zeros(1, 1, 2, 2),
        "L": torch.zeros(1, 1, 8, 8),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        fastcolor.render(arguments.pop("ab"), arguments.pop("guide"), arguments.pop("L"), **arguments)
