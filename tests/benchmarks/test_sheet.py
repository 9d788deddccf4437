"""Photographs side by side."""

from __future__ import annotations

import numpy as np
import pyvips
from skimage import color

from benchmarks import sheet


def test_grey_coloured_and_truth(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name, width in (("wide.png", 400), ("narrow.png", 80)):
        pixels = rng.integers(0, 256, (100, width, 3), dtype=np.uint8)
        pyvips.Image.new_from_array(pixels, interpretation="srgb").write_to_file(str(tmp_path / name))
    out = tmp_path / "sheet.png"
    arguments = ["sheet", str(tmp_path / "wide.png"), str(tmp_path / "narrow.png"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*arguments, "--height", "64", "--columns", "1"])
    sheet.main()
    shown = pyvips.Image.new_from_file(str(out)).numpy()
    assert shown.shape == (2 * 64 + sheet._GAP, 3 * 96, 3)  # the middle of the wide one, 96 pixels
    grey, coloured, truth = np.split(shown[:64].astype(int), 3, axis=1)
    spread = [np.ptp(part, axis=2).mean() for part in (grey, coloured, truth)]
    assert spread[0] < 0.01  # the matrix of sRGB has six digits: now and then a channel is one level off
    assert spread[1] > 1 and spread[2] > 1
    np.testing.assert_array_equal(sheet.grey(truth.astype(np.uint8)), grey)


def test_grey_keeps_lightness():
    pixels = np.array([[[255, 0, 0], [0, 128, 255]]], dtype=np.uint8)
    np.testing.assert_allclose(
        color.rgb2lab(sheet.grey(pixels)), color.rgb2lab(pixels) * np.array([1, 0, 0]), rtol=0, atol=0.25
    )
