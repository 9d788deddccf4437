from __future__ import annotations

import pytest
import torch
from films import scene, tiny

from fastcolor.model.network import pool_to
from fastcolor.video import cuts, motion
from fastcolor.video.colorizer import VideoColorizer, VideoOptions


def window(picture, x=0, width=128):
    return picture[..., x : x + width]


def found(film):
    """Numbers of the frames that start a scene, as VideoColorizer goes about it."""
    video = VideoColorizer(tiny(size=96), options=VideoOptions(keyframes=1000, lookahead=4))
    numbers = []
    work = video._follow

    def follow(frames):
        work(frames)
        numbers.extend(frame.number for frame in frames if frame.cut)

    video._follow = follow
    list(video.colorize(frame[0, 0].clamp(0, 100) / 100 for frame in film))
    assert video.stats.cuts == len(numbers)
    return numbers


a, b = window(scene(1)), window(scene(2))


@pytest.mark.parametrize(
    "name, film, expected",
    [
        ("still", [a] * 5, []),
        ("cut", [a, a, a, b, b], [3]),
        ("two cuts", [a, b, b, a], [1, 3]),
        ("noise", [a + 4 * torch.randn(a.shape, generator=torch.Generator().manual_seed(i)) for i in range(5)], []),
        ("pan", [window(scene(1), x) for x in range(0, 60, 4)], []),
        ("fast pan", [window(scene(1), x) for x in range(0, 60, 12)], []),
        ("white flash", [a, a, torch.full_like(a, 100), a, a], []),
        ("bright flash", [a, a, a * 1.4 + 10, a, a], []),
        ("fade to black", [a * k for k in (1, 0.8, 0.6, 0.4, 0.2, 0, 0)], []),
        ("through black and back", [a * k for k in (1, 0.5, 0, 0, 0.2, 0.5, 1)], []),
        ("through black to another", [a, a * 0.5, a * 0, b * 0, b * 0.2, b * 0.5, b], [4]),
        ("cut from black", [a * 0, a * 0, b, b], []),
        ("dissolve", [a * (1 - k / 8) + b * k / 8 for k in range(9)], []),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_films(name, film, expected):
    assert found(film) == expected


def test_features():
    guide = pool_to(a, 4)
    pairs = [(guide, guide), (guide + 5, guide), (torch.full_like(guide, 50), guide)]
    same, brighter, blank = cuts.features(*map(torch.cat, zip(*pairs, strict=True))).tolist()
    assert same[:3] == pytest.approx([0, 1, 0], abs=1e-5)
    assert brighter[0] == pytest.approx(5, abs=0.1) and brighter[1] == pytest.approx(1, abs=1e-5)
    assert brighter[2] == pytest.approx(5, abs=1e-4)
    assert blank[3] == 0 and cuts.is_blank(blank[3]) and not cuts.is_blank(same[3])


def test_signature_is_a_distribution():
    pictures = torch.tensor([0.0, 100.0, 33.3])[:, None, None, None].expand(3, 1, 3, 5)
    assert cuts.signature(pictures).sum(1).tolist() == pytest.approx([1, 1, 1])


def test_motion_is_no_cut_where_the_plain_difference_is_large():
    before, now = (pool_to(window(scene(1), x), 4) for x in (0, 12))
    levels = [motion.pyramid(pool_to(window(scene(1), x), 2)) for x in (0, 12)]
    moved = motion.warp(before, motion.flow(levels[1], levels[0]))
    assert cuts.features(now, moved)[0, 2] < 0.5 * cuts.features(now, before)[0, 2]
