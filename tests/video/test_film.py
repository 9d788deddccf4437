"""Whole films: what must come out of them as it went in."""

from __future__ import annotations

import json
from fractions import Fraction

import av
import numpy as np
import pytest
from video.clips import Counting, frame_hashes, luma_planes, make_clip, packets_of, steady, uneven

from fastcolor.video.errors import VideoError
from fastcolor.video.film import QUEUE, FilmOptions, colorize_film

FFV1 = {"codec": "ffv1", "segment": 0.5}


def run(source, target, *, overwrite=False, resume=False, stop=None, watch=None, make=Counting, identity=None, **options):
    return colorize_film(
        str(source), str(target), make, FilmOptions(**options), overwrite=overwrite, resume=resume, stop=stop,
        watch=watch, identity=identity,
    )  # fmt: skip


@pytest.mark.parametrize("times", [steady(30), uneven(30)], ids=["steady", "uneven"])
@pytest.mark.parametrize(
    "pix_fmt", ["yuv420p", "yuv420p10le", "yuv422p12le", "gray", "gray10le", "yuv444p16le"], ids=str
)
def test_lossless_film_keeps_luma_and_times(tmp_path, pix_fmt, times):
    clip = make_clip(tmp_path / "in.mkv", pix_fmt=pix_fmt, times=times, size=(65, 47))
    summary = run(clip, tmp_path / "out.mkv", **FFV1)
    before, after = luma_planes(clip), luma_planes(tmp_path / "out.mkv")
    assert summary.frames == len(after) == len(before) == 30
    for (t, luma), (t2, luma2) in zip(before, after, strict=True):
        assert t == t2 and luma.dtype == luma2.dtype
        np.testing.assert_array_equal(luma, luma2)
    assert packets_of(clip, "audio") == packets_of(tmp_path / "out.mkv", "audio")
    assert not (tmp_path / "out.mkv.parts").exists() and len(list(tmp_path.iterdir())) == 2
    assert summary.notes == [] and summary.broken_off is None and not summary.stopped
