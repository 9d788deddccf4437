from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "video"))  # for films.py
pytest.importorskip("cv2")
pytest.importorskip("matplotlib")

from films import tiny

import fastcolor
from benchmarks import flicker


def picture():
    return flicker.generated(64, 96)


def test_films():
    still, moving = flicker.noisy(picture(), 5, sigma=2.0), flicker.pan(picture(), 5, speed=2.0)
    assert all(frame.shape == (3, 64, 96) and frame.min() >= 0 and frame.max() <= 1 for frame in still)
    lab = fastcolor.rgb_to_lab(torch.stack(still))
    assert (lab[1:, 0] - lab[:-1, 0]).abs().mean() > 1  # lightness is noisy
    assert (lab[1:, 1:] - lab[:-1, 1:]).abs().mean() < 0.5  # colours stay, where sRGB has them
    assert moving[0].shape == (3, 42, 64) and torch.allclose(moving[0][:, :, 2:], moving[1][:, :, :-2], atol=1e-5)


def test_figures(tmp_path):
    film = flicker.pan(picture(), 8)
    methods = {name: flicker.METHODS[name] for name in ("alone", "keyframes (default)")}
    figures, frames = flicker.measured(film, methods, tiny(32))
    assert list(figures) == list(frames) == ["truth", *methods]
    truth, alone, kept = figures.values()
    assert alone["network_runs_per_frame"] == 1 and kept["network_runs_per_frame"] < 0.5
    assert kept["step"] < alone["step"] and truth["psnr"] is None and alone["psnr"] > 5
    flicker.draw_slices(tmp_path / "s.png", frames, None, "pan")
    flicker.draw_frames(tmp_path / "f.png", frames, [0, 4, 99])
    assert (tmp_path / "s.png").stat().st_size > 1000 and (tmp_path / "f.png").stat().st_size > 1000


def test_truth_is_measured_as_truth():
    """A method that gives back the truth has the truth's own figures."""
    film = flicker.pan(picture(), 6)
    L = torch.stack([fastcolor.rgb_to_lab(frame)[:1] for frame in film])
    flows, seen = flicker.moving(L)
    still = torch.ones(6, 2, 42, 64)
    assert flicker.steps(still, flows, seen) == pytest.approx([0] * 5, abs=1e-6)
    jumps = still * torch.tensor([0.0, 3.0, 3.0, 3.0, 3.0, 3.0])[:, None, None, None]
    assert flicker.steps(jumps, flows, seen) == pytest.approx([3 * 2**0.5, 0, 0, 0, 0], abs=1e-4)
