from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest

from benchmarks import video


def test_scene_moves_and_cuts():
    frames = list(islice(video.scene(64, 48), 4 * video.RATE + 2))
    assert all(f.shape == (48, 64) and f.dtype == np.uint8 for f in frames)
    steps = [np.abs(a.astype(int) - b).mean() for a, b in zip(frames, frames[1:], strict=False)]
    assert min(steps) > 0 and int(np.argmax(steps)) == 4 * video.RATE - 1


def test_repeated_film_is_as_long_as_it_says(tmp_path):
    once = video.make_film(tmp_path / "once.mp4", video.scene(64, 48), 20)
    many = video.repeat_film(tmp_path / "many.mp4", once, 3)
    with av.open(str(many)) as film:
        times = [f.pts * f.time_base for f in film.decode(video=0)]
    assert len(times) == 60 and [float(t) for t in times] == pytest.approx([i / video.RATE for i in range(60)])


def test_quick(tmp_path, monkeypatch):
    """One pass over a tiny film: every candidate gives all frames, or the benchmark says that it cannot."""
    monkeypatch.setitem(video.WIDTHS, 48, 64)
    assert video.main(["--quick", "--sizes", "48", "--seconds", "0.25", "--json", str(tmp_path), "--threads", "1"]) == 0
    (file,) = Path(tmp_path).glob("video--*--cpu.json")
    rows = json.loads(file.read_text())["rows"]
    names = ["decoding alone", "encoding alone", "ours, no codec", "fastcolor video", "PNGs, one at a time"]
    assert [r["candidate"] for r in rows] == names
    for row in rows:
        assert row["median_us"] == "not measured" or (row["fps"] > 0 and row["core_ms"] >= 0 and row["frames"] == 6)
    whole = rows[3]
    assert set(whole["busy_of_wall"]) == {"read", "colour", "write"} and whole["network_runs"] >= 1
