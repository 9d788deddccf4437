"""The comparison of choices: its figures from curves, and the folders with a share of the photos."""

from __future__ import annotations

import pytest

from benchmarks.ablation import VARIANTS, part_of, shown, summary
from fastcolor.training.config import TrainConfig


def curve(*points: tuple[float, float]) -> list[dict]:
    return [{"psnr_gain": g, "colorfulness_ratio": c, "auc": 0.9, "auc_rebalanced": 0.7} for c, g in points]


def test_gains_at_equal_colourfulness():
    found = summary([curve((0.5, 1.0), (0.7, 0.8), (0.8, 0.0)), curve((0.61, 1.0), (1.0, 0.0))])
    assert found["gain"]["0.6"] == [pytest.approx(0.9), None]  # the second curve does not reach so far down
    assert found["gain"]["0.75"] == [pytest.approx(0.4), pytest.approx(1 - 14 / 39)]
    assert found["gain"]["0.9"][0] is None
    assert found["colorfulness"] == [[0.5, 0.8], [0.61, 1.0]]


def test_seeds_are_shown_by_mean_and_half_range():
    assert shown([1.0, 1.5]) == "+1.25 ±0.25"
    assert shown([1.0]) == "+1.00"
    assert shown([1.0, None]) == shown([]) == "–"


def test_part_of_the_photos(tmp_path):
    for split, count in (("train", 8), ("val", 2)):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "photos" / split / f"{i}.jpg").touch()
    part = part_of(tmp_path / "photos", tmp_path / "out", 0.25)
    assert sorted(p.name for p in (part / "train").iterdir()) == ["0.jpg", "1.jpg"]
    assert len(list((part / "val").iterdir())) == 2
    assert part_of(tmp_path / "photos", tmp_path / "out", 0.25) == part  # again


def test_variants_are_options_of_training():
    for _, changes in VARIANTS.values():
        TrainConfig(**changes).check()
