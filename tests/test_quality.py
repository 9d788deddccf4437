"""The quality report reads colours as the colorizer does, and its curves are compared where they can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pyvips = pytest.importorskip("pyvips")

from benchmarks import quality  # noqa: E402
from fastcolor.model.colorizer import Colorizer  # noqa: E402


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(0)
    for i in range(2):
        y = np.mgrid[:72, :96][0] + random.normal(0, 2, (72, 96))
        pixels = np.where(y[..., None] < 30 + 10 * i, (110, 150, 220), (70, 120, 40)).astype(np.uint8)
        pyvips.Image.new_from_array(pixels).write_to_file(str(tmp_path / f"{i}.png"))
    return sorted(tmp_path.glob("*.png"))


def test_rows(photos):
    colorizer = Colorizer.from_pretrained("cpu", size=64, vividness=0.5)
    pictures = quality.prepared(photos, colorizer)
    chosen = quality.methods(colorizer, [quality.options_of("radius=1,sigma_light=3.5,neighborhood=cross")])
    log_weights = colorizer.bins.rebalancing_weights(colorizer.checkpoint.prior).log().float()[None, :, None, None]
    with torch.inference_mode():
        for p in pictures:
            u = p.logits.float() + 0.5 * log_weights
            ours = quality.rgb_of(chosen["field (default)"](u, p.guide), p, 4)
            off = (ours.int() - colorizer.colorize(p.truth).int()).abs()
            assert off.float().mean() < 0.2 and off.max() <= 6  # logits are kept in 16 bits
    rows = list(quality.measure(pictures, colorizer, chosen, [0.0, 1.0]))
    grey, truth = rows[:2]
    assert grey["colorfulness"] < 0.01 and truth["psnr"] == 100
    assert truth["auc"] == pytest.approx(1) and truth["auc_rebalanced"] == pytest.approx(1)
    assert len(rows) == 2 + 2 * len(chosen) == 2 + 2 * 7
    for row in rows[2:]:
        assert 0 < row["auc"] < 1 and 0 < row["auc_rebalanced"] < 1 and 0 < row["psnr"] < 100
        assert row["splotches"] >= 0 and row["bleeding"] > 0
    vivid = {r["method"]: r["colorfulness"] for r in rows if r["vividness"] == 1}
    pale = {r["method"]: r["colorfulness"] for r in rows if r["vividness"] == 0}
    assert all(vivid[name] > pale[name] for name in vivid)


def test_equal_color():
    rows = [{"colorfulness": 0.5, "psnr": 23.0}, {"colorfulness": 1.0, "psnr": 21.0}]
    assert quality.at_equal_color(rows, "psnr", 0.75) == 22
    assert quality.at_equal_color(rows, "psnr", 0.4) is None


def test_joint_to_separable_keeps_the_marginals():
    """One label alone: its a and its b have it all."""
    bins = Colorizer.from_pretrained("cpu").bins
    logits = torch.full((1, 313, 1, 1), -1e4)
    logits[0, 100] = 0
    q = quality.joint_to_separable(logits, bins).exp()
    for axis, (place, centers) in enumerate(quality.SEPARABLE.groups()):
        assert centers[q[0, place, 0, 0].argmax(), 0] == bins.centers[100, axis]
        assert q[0, place].sum().item() == pytest.approx(1, abs=1e-5)
