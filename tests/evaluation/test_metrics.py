from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcolor.evaluation.metrics import ab_accuracy, auc, chroma_steps, colorfulness, psnr, splotches


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


def test_ab_accuracy_by_hand():
    """Errors of 0, 5 (a 3-4-5 triangle), 10.2 and 200: in from t = 0, 5, 11 and never."""
    truth = torch.zeros(2, 2, 2)
    ab = torch.tensor([[[0.0, 3.0], [10.2, 200.0]], [[0.0, 4.0], [0.0, 0.0]]])
    curve = ab_accuracy(ab, truth)
    assert curve.shape == (151,)
    assert curve[[0, 4, 5, 10, 11, 150]].tolist() == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    naive = [(ab.norm(dim=0) <= t).double().mean().item() for t in range(151)]
    assert curve.tolist() == pytest.approx(naive)
    assert auc(curve).item() == pytest.approx(sum((a + b) / 2 for a, b in zip(naive, naive[1:], strict=False)) / 150)
    weighted = ab_accuracy(ab, truth, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert weighted[[0, 5, 11]].tolist() == pytest.approx([0.1, 0.3, 0.6])
    assert auc(ab_accuracy(truth, truth)).item() == 1
    assert ab_accuracy(truth + math.nan, truth)[-1] == 0
    with pytest.raises(ValueError, match=r"must have one shape \[..., 2, H, W\], got \[2, 2, 2\], \[3, 2, 2\]"):
        ab_accuracy(ab, torch.zeros(3, 2, 2))


def test_chroma_steps_by_hand():
    """Three pixels in a row: a colour step of 5 in plain light, then one of 2 over an edge."""
    ab = torch.tensor([[[0.0, 3.0, 3.0]], [[0.0, 4.0, 2.0]]])
    L = torch.tensor([[[50.0, 51.0, 80.0]]])
    flat, edge = chroma_steps(ab, L)
    assert flat.tolist() == [5, 1] and edge.tolist() == [2, 1]
    twice = chroma_steps(ab.expand(2, 2, 3), L.expand(1, 2, 3))  # three steps of 0 downwards
    assert twice[0].tolist() == [10, 5] and twice[1].tolist() == [4, 2]


def test_splotches_by_hand():
    ab, guide = torch.zeros(2, 9, 9), torch.full((1, 9, 9), 50.0)
    assert splotches(ab, guide).tolist() == [0, 25]
    ab[0, 4, 4] = 11
    assert splotches(ab, guide).tolist() == [1, 25]
    ab[:, :, 6:] = 80  # an area of its own is no splotch
    assert splotches(ab, guide).tolist() == [1, 25]
    guide[0, 4, 5] = 70  # no plain surroundings around there
    assert splotches(ab, guide).tolist() == [0, 5]
    assert splotches(ab[:, :4], guide[:, :4]).tolist() == [0, 0]
