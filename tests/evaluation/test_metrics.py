from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcolor.evaluation.metrics import colorfulness, psnr


def test_psnr_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = (torch.randint(0, 256, (2, 3, 9, 11), dtype=torch.uint8) for _ in range(2))
    ours = psnr(a, b)
    for i in range(2):
        theirs = metrics.peak_signal_noise_ratio(b[i].numpy(), a[i].numpy(), data_range=255)
        assert ours[i].item() == pytest.approx(theirs)


def test_psnr_of_bytes_does_not_wrap():
    """Noise of sigma 16 is 24.05 dB; squares of uint8 differences would read some 5 dB more."""
    truth = torch.full((3, 256, 256), 128, dtype=torch.uint8)
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 16, (3, 256, 256)))
    image = (truth + noise).round().clamp(0, 255).to(torch.uint8)
    assert psnr(image, truth).item() == pytest.approx(20 * math.log10(255 / 16), abs=0.05)
    assert psnr(truth, truth).item() == math.inf
    with pytest.raises(ValueError, match="must have the shape of truth"):
        psnr(image, truth[:, :5])


def test_colorfulness_by_hand():
    """Two pixels, pure red and pure blue: rg = 255, 0 and yb = 127.5, -255."""
    image = torch.tensor([[[255, 0]], [[0, 0]], [[0, 255]]], dtype=torch.uint8)
    spread = math.hypot(127.5, 191.25)
    mean = math.hypot(127.5, -63.75)
    assert colorfulness(image).item() == pytest.approx(spread + 0.3 * mean)
    assert colorfulness(torch.full((2, 3, 4, 4), 77, dtype=torch.uint8)).tolist() == [0, 0]


def test_colorfulness_is_signed():
    """Red and green in equal parts have a mean opponent of 0: with |R − G| it would be 255."""
    image = torch.tensor([[[255, 0]], [[0, 255]], [[0, 0]]], dtype=torch.uint8)
    assert colorfulness(image).item() == pytest.approx(255 + 0.3 * 127.5)
