from __future__ import annotations

import pytest
import torch
from films import scene

from fastcolor.model.network import pool_to
from fastcolor.video import motion


def flow(now, before):
    """Between two pictures, in pixels."""
    return 2 * motion.flow(motion.pyramid(now), motion.pyramid(before))


def at(picture, x, y):
    """A window of 128×64 whose left upper corner lies at (x, y), in parts of a pixel."""
    return motion.read_at(picture, motion.positions(64, 128, 1.0, picture.device) + torch.tensor([x, y])[:, None, None])


@pytest.mark.parametrize("shift", [(0.0, 0.0), (1.0, 0.0), (0.5, -0.75), (-5.0, 3.0), (14.0, 0.0)], ids=str)
def test_shift(shift):
    picture = scene(1)
    dx, dy = shift
    found = flow(at(picture, 20 + dx, 16 + dy), at(picture, 20.0, 16.0))
    inner = found[0, :, 8:-8, 8:-8].flatten(1)  # what came in from outside is nowhere in the frame before
    assert (inner.median(1).values - torch.tensor(shift)).abs().max() < 0.25
    assert (inner - torch.tensor(shift)[:, None]).abs().mean() < 0.6


def test_still_is_zero():
    picture = at(scene(1), 20.0, 16.0)
    assert not flow(picture, picture).any()
    noise = torch.randn(2, *picture.shape[1:])
    assert (flow(picture + 2 * noise[:1], picture + 2 * noise[1:]) == 0).float().mean() > 0.95


def test_light_is_no_motion():
    picture = at(scene(1), 20.0, 16.0)
    assert flow(picture + 20, picture).abs().max() < 0.1


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (24, 24), (49, 51)], ids=str)
def test_any_size(size):
    found = motion.flow(motion.pyramid(100 * torch.rand(1, 1, *size)), motion.pyramid(100 * torch.rand(1, 1, *size)))
    assert found.shape == (1, 2, -(-size[0] // 2), -(-size[1] // 2)) and found.isfinite().all()


def test_batch_is_each_by_itself():
    now, before = (100 * torch.rand(3, 1, 40, 56) for _ in range(2))
    together = flow(now, before)
    for i in range(3):
        assert (together[i] - flow(now[i, None], before[i, None])[0]).abs().max() < 1e-3


def test_box_is_a_mean():
    x = torch.rand(2, 3, 11, 6)
    expected = torch.nn.functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False)
    assert (motion.box(x, 5) - expected).abs().max() < 1e-6


def test_read_at_is_bilinear_and_ends_at_the_edge():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    places = torch.tensor([[1.5, 0.25], [-3.0, 1.0], [9.0, 9.0]]).T[None, :, None]  # (x, y)
    assert motion.read_at(x, places).flatten().tolist() == pytest.approx([2.5, 4.0, 11.0], abs=1e-4)


def test_positions_are_those_of_the_pooled_picture():
    x = torch.arange(8.0)[None, None, None].expand(1, 1, 6, 8)
    assert torch.equal(motion.read_at(x, motion.positions(3, 4, 2.0, x.device)), pool_to(x, 2))
