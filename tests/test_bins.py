"""Label spaces: the published bins, exact nearest labels, soft-encoding and class weights."""

from __future__ import annotations

import pytest
import torch

from fastcolor.bins import ColorBins, soft_encode
from fastcolor.reference import lab


def test_the_published_bins():
    bins = ColorBins()
    assert (bins.count, len(bins), bins.kind) == (313, 313, "joint")
    assert bins.centers[0].tolist() == [-90, 50] and bins.centers[-1].tolist() == [100, 0]
    assert torch.equal(bins.centers % 10, torch.zeros_like(bins.centers))
    assert bins.centers.tolist() == sorted(bins.centers.tolist())


def test_bins_are_the_colours_of_srgb():
    """Each bin lies in sRGB or next to it (the published set keeps bins that its border crosses), and no 8-bit colour
    is farther than the diagonal of a grid cell from all bins."""
    v = torch.arange(0, 256, 15, dtype=torch.uint8)
    rgb = torch.stack(torch.meshgrid(v, v, v, indexing="ij")).reshape(3, -1, 1)
    ab = lab.rgb_to_lab(rgb, dtype=torch.float64)[1:, :, 0].T
    distance = torch.cdist(ColorBins().centers, ab)
    assert distance.amin(1).max() < 16
    assert distance.amin(0).max() < 200**0.5


def test_separable():
    bins = ColorBins("separable")
    assert bins.count == 50
    (a, ca), (b, cb) = bins.groups()
    assert (a, b) == (slice(0, 25), slice(25, 50)) and ca.shape == cb.shape == (25, 1)
    index, squared = bins.nearest(torch.tensor([[14.0, -37.0]]))
    assert ca[index[0, 0, 0]].item() == 10 and cb[index[1, 0, 0]].item() == -40
    assert squared[:, 0, 0].tolist() == [16, 9]


@pytest.mark.parametrize("k", [1, 5, 12])
def test_nearest_is_exact(k):
    """Against every distance: inside, at the borders of the gamut, far outside, and on exact ties."""
    bins = ColorBins()
    points = (torch.rand(4000, 2, dtype=torch.float64) - 0.5) * 300
    ties = torch.cartesian_prod(torch.arange(-120, 121, 5.0), torch.arange(-120, 121, 5.0)).double()
    points = torch.cat([points, ties, bins.centers, torch.tensor([[1e6, -1e6]], dtype=torch.float64)])
    index, squared = bins.nearest(points, k)
    every = (points[:, None] - bins.centers).square().sum(-1)
    expected = every.sort(dim=-1, stable=True)  # equal distances by ascending label
    assert torch.equal(index[0], expected.indices[:, :k])
    assert torch.equal(squared[0], expected.values[:, :k])


def test_nearest_of_few_labels_and_of_nothing():
    bins = ColorBins(centers=[[0, 0], [10, 10]])
    index, _ = bins.nearest(torch.tensor([[9.0, 9.0]]), neighbors=5)
    assert index.tolist() == [[[1, 0]]]
    assert ColorBins().nearest(torch.empty(0, 7, 2), 5)[0].shape == (1, 0, 7, 5)


def test_soft_encoding():
    bins = ColorBins()
    index, p = soft_encode(bins, torch.tensor([[3.0, 4.0]]))
    squared = (bins.centers[index[0, 0]] - torch.tensor([3.0, 4.0])).square().sum(-1)
    expected = torch.exp(-squared / 50)
    assert torch.allclose(p[0, 0].double(), expected / expected.sum())
    far = soft_encode(bins, torch.tensor([[1e5, 0.0]]))[1]
    assert far.isfinite().all() and far.sum().item() == pytest.approx(1)
    assert soft_encode(ColorBins("separable"), torch.zeros(3, 2))[1].tolist() == [[[1.0]] * 3] * 2


def test_rebalancing_weights():
    for kind in ("joint", "separable"):
        bins = ColorBins(kind)
        prior = torch.rand(bins.count, dtype=torch.float64) ** 4
        for mix in (0.0, 0.5, 1.0):
            w = bins.rebalancing_weights(prior, mix, sigma=0)
            for place, _ in bins.groups():
                p = prior[place] / prior[place].sum()
                expected = 1 / ((1 - mix) * p + mix / len(p)).clamp_min(1e-12)
                assert torch.allclose(w[place], expected / (expected * p).sum())
                assert (w[place] * p).sum().item() == pytest.approx(1)
        assert torch.allclose(bins.rebalancing_weights(prior, 1.0), torch.ones(bins.count, dtype=torch.float64))
    rare = torch.ones(313, dtype=torch.float64)
    rare[100] = 1e-6
    assert ColorBins().rebalancing_weights(rare, sigma=0)[100] > 1.5


def test_smoothing_keeps_the_mass():
    bins = ColorBins()
    one = torch.zeros(313)
    one[150] = 1
    smoothed = bins.smoothed_prior(one)
    assert smoothed.sum().item() == pytest.approx(1) and smoothed.argmax() == 150 and smoothed[150] < 1
    assert torch.equal(bins.smoothed_prior(one * 7, sigma=0), one.double())
    w = bins.rebalancing_weights(one, mix=0.5, sigma=5)
    assert w.argmin() == 150 and (w > 0).all()


def test_histogram():
    ab = torch.tensor([[0.0, 0.0], [1.0, 1.0], [100.0, 0.0]])
    counts = ColorBins().histogram(ab)
    assert counts.sum() == 3 and counts[-1] == 1 and counts.max() == 2


def test_equality_and_round_trip():
    own = ColorBins(centers=[[0, 0], [10.5, -3]])
    for bins in (ColorBins(), ColorBins("separable"), own):
        assert ColorBins.from_dict(bins.to_dict()) == bins
    assert own != ColorBins() and ColorBins().to_dict()["centers"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("other",), "kind must be 'joint' or 'separable', got 'other'"),
        (("joint", [[1, 2, 3]]), r"centers must have shape \[K, 2\], got \[1, 3\]"),
        (("joint", [[1, float("nan")]]), "centers must be finite"),
        (("joint", [[1, 2], [1, 2]]), "centers must be distinct"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ColorBins(*arguments)


def test_weight_errors():
    with pytest.raises(ValueError, match=r"prior must have shape \[313\], got \[5\]"):
        ColorBins().rebalancing_weights(torch.ones(5))
    with pytest.raises(ValueError, match="not all zero"):
        ColorBins().rebalancing_weights(torch.zeros(313))
    with pytest.raises(ValueError, match="mix must be between 0 and 1, got 2"):
        ColorBins().rebalancing_weights(torch.ones(313), mix=2)
