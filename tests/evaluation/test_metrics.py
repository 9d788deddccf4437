from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcolor.bins import ColorBins, soft_encode
from fastcolor.evaluation.metrics import (
    ab_accuracy,
    auc,
    balance_weights,
    bin_cross_entropy,
    calibration_error,
    chroma_steps,
    colorfulness,
    delta_e_2000,
    mean_color,
    psnr,
    reliability,
    splotches,
    ssim,
    target_entropy,
)
from fastcolor.reference.cross_entropy import color_cross_entropy

BINS = {kind: ColorBins(kind) for kind in ("joint", "separable")}


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


def test_ssim_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = (torch.randint(0, 256, (2, 3, 23, 17), dtype=torch.uint8) for _ in range(2))
    b[0] = (a[0] * 0.9 + b[0] * 0.1).to(torch.uint8)
    ours = ssim(a, b)
    for i in range(2):
        theirs = metrics.structural_similarity(
            a[i].double().numpy(), b[i].double().numpy(), channel_axis=0, data_range=255, gaussian_weights=True,
            sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert ours[i].item() == pytest.approx(theirs, abs=1e-12)
    assert ours[0] > 0.9 > ours[1]
    assert torch.allclose(ssim(a, a), torch.ones(2, dtype=torch.float64))


def test_ssim_is_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.image")
    a, b = (torch.randint(0, 256, (1, 3, 32, 40), dtype=torch.uint8) for _ in range(2))
    _, theirs = functional.structural_similarity_index_measure(
        a.double(), b.double(), data_range=255.0, return_full_image=True
    )
    # its own mean takes in windows that reach over the edge, which it mirrors
    assert ssim(a, b).item() == pytest.approx(theirs[..., 5:-5, 5:-5].mean().item(), abs=1e-9)


def test_ssim_of_bytes_does_not_wrap():
    a = torch.full((3, 12, 12), 255, dtype=torch.uint8)
    by_hand = (2 * 255 * 127 + (0.01 * 255) ** 2) / (255**2 + 127**2 + (0.01 * 255) ** 2)  # of the means alone
    assert ssim(a, torch.full_like(a, 127)).item() == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="at least 11 pixels a side, got 10×12"):
        ssim(a[:, :10], a[:, :10])


# Sharma, Wu and Dalal 2005, table 1: L a b of both colours, ΔE2000
SHARMA = """
50.0000 2.6772 -79.7751 50.0000 0.0000 -82.7485 2.0425
50.0000 3.1571 -77.2803 50.0000 0.0000 -82.7485 2.8615
50.0000 2.8361 -74.0200 50.0000 0.0000 -82.7485 3.4412
50.0000 -1.3802 -84.2814 50.0000 0.0000 -82.7485 1.0000
50.0000 -1.1848 -84.8006 50.0000 0.0000 -82.7485 1.0000
50.0000 -0.9009 -85.5211 50.0000 0.0000 -82.7485 1.0000
50.0000 0.0000 0.0000 50.0000 -1.0000 2.0000 2.3669
50.0000 -1.0000 2.0000 50.0000 0.0000 0.0000 2.3669
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0009 7.1792
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0010 7.1792
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0011 7.2195
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0012 7.2195
50.0000 -0.0010 2.4900 50.0000 0.0009 -2.4900 4.8045
50.0000 -0.0010 2.4900 50.0000 0.0010 -2.4900 4.8045
50.0000 -0.0010 2.4900 50.0000 0.0011 -2.4900 4.7461
50.0000 2.5000 0.0000 50.0000 0.0000 -2.5000 4.3065
50.0000 2.5000 0.0000 73.0000 25.0000 -18.0000 27.1492
50.0000 2.5000 0.0000 61.0000 -5.0000 29.0000 22.8977
50.0000 2.5000 0.0000 56.0000 -27.0000 -3.0000 31.9030
50.0000 2.5000 0.0000 58.0000 24.0000 15.0000 19.4535
50.0000 2.5000 0.0000 50.0000 3.1736 0.5854 1.0000
50.0000 2.5000 0.0000 50.0000 3.2972 0.0000 1.0000
50.0000 2.5000 0.0000 50.0000 1.8634 0.5757 1.0000
50.0000 2.5000 0.0000 50.0000 3.2592 0.3350 1.0000
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
61.2901 3.7196 -5.3901 61.4292 2.2480 -4.9620 1.8731
35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441
90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377
2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
"""


def test_delta_e_2000_of_the_published_pairs():
    table = torch.tensor([[float(x) for x in line.split()] for line in SHARMA.split("\n") if line], dtype=torch.float64)
    assert table.shape == (34, 7)
    first, second = (table[:, c].T.reshape(3, 1, 34) for c in (slice(0, 3), slice(3, 6)))
    for found in (delta_e_2000(first, second), delta_e_2000(second, first)):  # it is symmetric
        assert (found[0] - table[:, 6]).abs().max() < 5.1e-5  # four places are printed


def test_delta_e_2000_is_scikit_images():
    color = pytest.importorskip("skimage.color")
    scale, low = torch.tensor([100.0, 220, 220]).view(3, 1, 1), torch.tensor([0.0, -110, -110]).view(3, 1, 1)
    a, b = (torch.rand(3, 100, 100, dtype=torch.float64) * scale + low for _ in range(2))
    b[:, :50] = a[:, :50] + torch.randn(3, 50, 100)  # near ones too
    b[1:, :10], a[1:, 5:15] = 0, 0  # and greys
    theirs = color.deltaE_ciede2000(a.numpy(), b.numpy(), channel_axis=0)
    assert np.abs(delta_e_2000(a, b).numpy() - theirs).max() < 1e-10
    assert delta_e_2000(a, a).max() == 0
    with pytest.raises(ValueError, match=r"must have one shape \[..., 3, H, W\], got \[2, 9, 9\], \[2, 9, 9\]"):
        delta_e_2000(a[:2, :9, :9], b[:2, :9, :9])


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


def test_rebalanced_auc_by_hand():
    """Of three grey pixels and a vivid one grey gets three; rebalanced, the one weighs as much as all three."""
    bins = BINS["joint"]
    truth = torch.zeros(2, 1, 4)
    truth[:, 0, 3] = torch.tensor([60.0, 50.0])
    prior = bins.histogram(truth.movedim(0, -1))
    weights = balance_weights(truth, bins, prior)
    p = bins.smoothed_prior(prior)
    grey, vivid = (bins.nearest(torch.tensor(c))[0].item() for c in ([0.0, 0.0], [60.0, 50.0]))
    assert (weights[0, 3] / weights[0, 0]).item() == pytest.approx((p[grey] / p[vivid]).item())
    share = (weights[0, :3].sum() / weights.sum()).item()
    curve = ab_accuracy(torch.zeros_like(truth), truth, weights)
    assert curve[0].item() == pytest.approx(share) and share == pytest.approx(0.5, abs=0.1)
    assert curve[78] < 1 and curve[79].item() == pytest.approx(1)  # |(60, 50)| = 78.1
    with pytest.raises(ValueError, match="two for each"):
        balance_weights(truth, BINS["separable"], torch.ones(50))


@pytest.mark.parametrize("kind", ["joint", "separable"])
def test_bin_cross_entropy_is_the_loss_of_training(kind):
    bins, ab = BINS[kind], torch.randn(2, 2, 4, 5, dtype=torch.float64) * 30
    logits = torch.randn(2, bins.count, 4, 5, dtype=torch.float64)
    q = torch.cat([logits[:, place].softmax(1) for place, _ in bins.groups()], 1)
    expected = color_cross_entropy(logits, ab, bins, reduction="none").mean((1, 2))
    assert torch.allclose(bin_cross_entropy(q, ab, bins), expected)
    uniform = torch.ones_like(q) / len(bins.centers)
    assert bin_cross_entropy(uniform, ab, bins).tolist() == pytest.approx([math.log(len(bins.centers)) * len(
        bins.groups())] * 2)  # fmt: skip


def test_target_entropy_is_the_least_cross_entropy():
    bins, ab = BINS["joint"], torch.randn(1, 2, 3, 3) * 30
    best = torch.zeros(1, 313, 3, 3, dtype=torch.float64)
    index, p = soft_encode(bins, ab.movedim(1, -1).double())
    best.scatter_(1, index[0].movedim(-1, 1), p[0].movedim(-1, 1))
    assert bin_cross_entropy(best, ab, bins).item() == pytest.approx(target_entropy(ab, bins).item())
    assert target_entropy(ab, BINS["separable"]).item() == 0
    assert bin_cross_entropy(best.roll(100, 1), ab, bins).isfinite().all()  # sure, and wrong


def test_reliability_by_hand():
    """Two sure pixels of which one is right, one that is 0.4 sure and right."""
    bins = ColorBins("joint", [[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    q = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0.3, 0.4, 0.3]]).T.reshape(1, 3, 1, 3)
    ab = torch.tensor([[1.0, 2], [40, 0], [60, 0]]).T.reshape(1, 2, 1, 3)
    sums = reliability(q, ab, bins, count=10)
    assert sums[0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 2]
    assert sums[1, [4, 9]].tolist() == pytest.approx([0.4, 2]) and sums[2, [4, 9]].tolist() == [1, 1]
    assert calibration_error(sums).item() == pytest.approx((0.6 + 1) / 3)


def test_calibration_error_is_torchmetrics():
    classification = pytest.importorskip("torchmetrics.functional.classification")
    bins, ab = BINS["joint"], torch.randn(2, 2, 16, 16) * 20
    q = (torch.randn(2, 313, 16, 16) * 4).softmax(1)
    label = bins.nearest(ab.movedim(1, -1))[0][0, ..., 0]
    theirs = classification.multiclass_calibration_error(q.movedim(1, -1).reshape(-1, 313), label.flatten(), 313, 15)
    sums = reliability(q[:1], ab[:1], bins) + reliability(q[1:], ab[1:], bins)
    assert calibration_error(sums).item() == pytest.approx(theirs.item(), abs=1e-5)


def test_mean_color_by_hand():
    prior = torch.zeros(313)
    prior[BINS["joint"].nearest(torch.tensor([[10.0, 20.0]]))[0].item()] = 3
    prior[BINS["joint"].nearest(torch.tensor([[-10.0, 0.0]]))[0].item()] = 1
    assert mean_color(prior, BINS["joint"]).tolist() == [5, 15]
    apart = torch.zeros(50)
    apart[[12, 13, 25 + 12]] = torch.tensor([2.0, 2.0, 7.0])  # a: 0 and 10, b: 0
    assert mean_color(apart, BINS["separable"]).tolist() == [5, 0]


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
