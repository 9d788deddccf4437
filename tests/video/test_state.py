from __future__ import annotations

import pytest
import torch

from fastcolor.video.motion import positions, read_at
from fastcolor.video.state import (
    Evidence,
    Track,
    _corners,
    evidence_of,
    from_dict,
    gather,
    still,
    to_dict,
    trusted,
)

CPU = torch.device("cpu")


def rows(x):
    """[1, C, h, w] to [h·w, C]."""
    return x.movedim(1, -1).flatten(0, 2)


@pytest.mark.parametrize("size", [(6, 9), (1, 5), (4, 1), (1, 1)], ids=str)
def test_gather_reads_between_pixels(size):
    old, new = torch.rand(2, 1, 7, *size).unbind(0)
    guide = 100 * torch.rand(1, 1, *size)
    places = positions(*size, 1.0, CPU) + 3 * torch.randn(1, 2, *size)
    scores = evidence_of(rows(old), rows(new), guide)
    got = gather(scores, torch.tensor([0.3, 0.7]), places)
    assert (got - rows(0.3 * read_at(old, places) + 0.7 * read_at(new, places))).abs().max() < 1e-5


def test_standing_still_is_exact():
    old, new = torch.randn(2, 30, 7).unbind(0)
    guide = 100 * torch.rand(1, 1, 5, 6)
    scores = evidence_of(old, new, guide)
    trust = torch.ones_like(guide)
    assert torch.equal(gather(scores, torch.tensor([0.0, 1.0]), still(guide), guide, trust), new)


def test_what_is_new_takes_from_its_like():
    """A dark thing appears in the light half: it gets what dark things have, not what was there."""
    guide = torch.full((1, 1, 8, 12), 20.0)
    guide[..., 6:] = 80
    scores = torch.nn.functional.one_hot((guide > 50).long().flatten(), 2).float()
    evidence = evidence_of(scores, scores, guide)
    now, trust = guide.clone(), torch.ones_like(guide)
    now[..., 3:5, 8:10], trust[..., 3:5, 8:10] = 20, 0
    got = gather(evidence, torch.tensor([0.5, 0.5]), still(guide), now, trust)
    assert (got - torch.nn.functional.one_hot((now > 50).long().flatten(), 2)).abs().max() < 0.01
    assert (got.sum(1) - 1).abs().max() < 1e-5  # shares add up, whatever the trust


def test_the_grid_knows_places():
    """Of two things of one lightness, the nearer one counts."""
    guide = torch.full((1, 1, 8, 12), 50.0)
    scores = (torch.arange(12) >= 6).float().expand(8, 12).flatten()[:, None]
    evidence = evidence_of(scores, scores, guide)
    got = gather(evidence, torch.tensor([0.5, 0.5]), still(guide), guide, torch.zeros_like(guide)).view(8, 12)
    assert got[:, 0].max() < 0.05 and got[:, -1].min() > 0.95


def test_lightness_that_is_nowhere_takes_the_nearest():
    guide = torch.linspace(40, 60, 24).view(1, 1, 4, 6)
    evidence = evidence_of(rows(guide), rows(guide), guide)
    black = gather(evidence, torch.tensor([0.5, 0.5]), still(guide), 0 * guide, torch.zeros_like(guide))
    assert black.isfinite().all() and (black >= 39.9).all() and black.mean() < 50


def test_corners_add_up():
    index, weight = _corners(torch.tensor([[-1.0, 0.5, 9.0], [0.0, 1.25, 1.0], [0.0, 0.0, 0.5]]), (4, 3, 1))
    assert index.shape == weight.shape == (3, 8) and weight.sum(1).tolist() == pytest.approx([1, 1, 1])
    assert index.min() >= 0 and index.max() < 12
    assert (index[0][weight[0] > 0]).tolist() == [0]
    assert sorted(index[1][weight[1] > 0].tolist()) == [1, 2, 4, 5]


def test_trust():
    guide = 20 + 60 * torch.rand(1, 1, 9, 12)
    places = still(guide)
    assert (trusted(guide, guide, places) == 1).all()
    assert (trusted(0.8 * guide + 5, guide, places) == 1).all()  # a fade
    moved = guide.clone()
    moved[..., 4, 4] += 40
    trust = trusted(moved, guide, places)
    assert trust[..., 4, 4] < 0.01 and (trust > 0.9).float().mean() > 0.98
    assert trusted(guide, guide, places - 3)[..., 0].max() < 0.2  # from outside the picture


def test_state_goes_through_plain_containers():
    track = Track(number=7, pyramid=[torch.rand(2), torch.rand(3)], guide=torch.rand(1))
    values = to_dict(track)
    assert values["pyramid"][0] is not track.pyramid[0]
    again = from_dict(Track, values, CPU)
    assert again.number == 7 and torch.equal(again.pyramid[1], track.pyramid[1]) and again.places is None
    with pytest.raises(ValueError, match="state of a film must have age"):
        from_dict(Evidence, {"age": 1}, CPU)
