from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcolor.evaluation.video import color_distribution_consistency, color_histograms, flicker, flicker_sums


def test_flicker_by_hand():
    """A colour step of 5 (3-4-5), then none; between frames 1 and 2 one corner gets lighter."""
    ab, L = torch.zeros(3, 2, 4, 5), torch.full((3, 1, 4, 5), 50.0)
    ab[1:, 0], ab[1:, 1] = 3, 4
    assert flicker(ab, L).item() == 2.5  # 20 pixels by 5, 20 by 0
    L[2, 0, 0, 0] = 60
    # the corner and its three neighbours are not still in the second pair
    assert [x.item() for x in flicker_sums(ab, L)] == [100, 36]
    assert [x.item() for x in flicker_sums(ab, L, reach=0)] == [100, 39]
    assert [x.item() for x in flicker_sums(ab, L, still=11)] == [100, 40]
    assert flicker(torch.zeros_like(ab), L) == 0


def test_flicker_of_pieces_adds_up():
    ab, L = torch.randn(7, 2, 9, 8), torch.rand(7, 1, 9, 8) * 2
    whole = torch.stack(flicker_sums(ab, L))
    pieces = [torch.stack(flicker_sums(ab[s], L[s])) for s in (slice(0, 3), slice(2, 5), slice(4, 7))]
    assert torch.allclose(whole, sum(pieces)) and 0 < whole[1] < 6 * 72
    assert flicker(ab[:1], L[:1]).isnan()
    moving = L + 10 * torch.arange(7).view(7, 1, 1, 1)
    assert flicker(ab, moving).isnan()


def test_flicker_says_what_it_wants():
    with pytest.raises(ValueError, match=r"ab must have shape \[T, 2, H, W\].*got \[3, 2, 4, 5\] and \[3, 1, 4, 6\]"):
        flicker(torch.zeros(3, 2, 4, 5), torch.zeros(3, 1, 4, 6))
    with pytest.raises(ValueError, match="still must be above 0"):
        flicker(torch.zeros(3, 2, 4, 5), torch.zeros(3, 1, 4, 5), still=0)


def test_cdc_is_that_of_scipys_divergence():
    scipy = pytest.importorskip("scipy.spatial.distance")
    frames = torch.randint(0, 256, (7, 3, 12, 10), dtype=torch.uint8)
    frames[3:] = frames[3:] // 2  # empty bins
    expected = []
    for c in range(3):
        histograms = [np.histogram(f[c].numpy(), 256, (0, 256))[0] for f in frames]
        for d in (1, 2, 4):
            # scipy gives the distance, the square root of the divergence
            pairs = [scipy.jensenshannon(histograms[i], histograms[i + d]) ** 2 for i in range(7 - d)]
            expected.append(np.mean(pairs))
    found = color_distribution_consistency(frames).item()
    assert found == pytest.approx(np.mean(expected), abs=1e-12)
    assert color_distribution_consistency(iter(frames)).item() == found
    assert color_distribution_consistency((), histograms=color_histograms(frames)).item() == found


def test_cdc_by_hand():
    """Frames that share no level are ln 2 apart, equal ones 0: half of the pairs of a film that alternates."""
    frames = torch.zeros(6, 3, 2, 2, dtype=torch.uint8)
    assert color_distribution_consistency(frames) == 0
    frames[1::2] = 255
    # always ln 2 one apart, never two or four apart
    assert color_distribution_consistency(frames).item() == pytest.approx(math.log(2) / 3)
    with pytest.raises(ValueError, match="a distance of 4 needs at least 5 frames, got 4"):
        color_distribution_consistency(frames[:4])
    with pytest.raises(ValueError, match=r"frame 0 must be uint8 \[3, H, W\], got torch.float32 \[3, 2, 2\]"):
        color_distribution_consistency(frames.float())
