"""Look-ups of the nearest labels in C++ against `ColorBins`, bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers import every_simd

from fastcolor import ColorBins
from fastcolor.ops import _backend
from fastcolor.ops.labels import label_histogram, nearest_labels

pytestmark = pytest.mark.skipif(_backend.missing("cpp") is not None, reason="no C++ kernels")
SPACES = [ColorBins(), ColorBins("separable"), ColorBins(centers=[[0, 0], [10, 0.5], [3.25, 7]])]


def points():
    """Inside, at the borders of the gamut and of the table, far outside, on exact ties, and no colours at all."""
    inf, nan = float("inf"), float("nan")
    return torch.cat(
        [
            torch.randn(2000, 2) * 60,
            torch.cartesian_prod(torch.arange(-140, 141, 5.0), torch.arange(-140, 141, 5.0)),
            torch.tensor([[nan, 0], [0, nan], [inf, 1], [-inf, -inf], [1e30, 2], [1e6, -1e6], [130.0, 129.99999]]),
        ]
    )


@every_simd
@pytest.mark.parametrize("bins", SPACES, ids=str)
@pytest.mark.parametrize("neighbors", [1, 5, 12])
def test_nearest_is_that_of_the_bins(bins, neighbors):
    ab = points()
    index, squared = nearest_labels(ab, bins, neighbors)
    expected, distance = bins.nearest(ab, neighbors)
    assert torch.equal(index, expected)
    assert torch.equal(squared.view(torch.int32)[~distance.isnan()], distance.view(torch.int32)[~distance.isnan()])
    assert torch.equal(squared.isnan(), distance.isnan())


@every_simd
@pytest.mark.parametrize("bins", SPACES, ids=str)
def test_histogram_is_that_of_the_bins(bins):
    ab, before = points(), torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(label_histogram(ab, bins), bins.histogram(ab))
    torch.set_num_threads(before)


def test_shapes_and_other_types():
    bins = ColorBins()
    ab = torch.randn(2, 2, 3, 5) * 40
    assert torch.equal(nearest_labels(ab.movedim(1, -1), bins, 5)[0], bins.nearest(ab.movedim(1, -1), 5)[0])
    assert nearest_labels(torch.empty(0, 7, 2), bins, 5)[0].shape == (1, 0, 7, 5)
    assert label_histogram(torch.empty(0, 2), bins).sum() == 0
    assert torch.equal(label_histogram(ab.double().movedim(1, -1), bins), bins.histogram(ab.double().movedim(1, -1)))
