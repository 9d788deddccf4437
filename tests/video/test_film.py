"""Whole films: what must come out of them as it went in."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from video.clips import Counting, frame_hashes, luma_planes, make_clip, packets_of, pattern, steady, uneven

from fastcolor.imaging.files import Picture, read_picture, write_picture
from fastcolor.video.errors import VideoError
from fastcolor.video.film import QUEUE, FilmOptions, colorize_film, peak_memory
from fastcolor.video.reader import Reader
from fastcolor.video.segments import fingerprint

FFV1 = {"codec": "ffv1", "segment": 0.5}


def run(
    source, target, *, overwrite=False, resume=False, stop=None, watch=None, make=Counting, identity=None, **options
):
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


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1", "prores_ks"])
@pytest.mark.parametrize("times", [steady(40), uneven(40)], ids=["steady", "uneven"])
def test_joined_segments_decode_in_order(tmp_path, codec, times):
    """B-frames across joints: decoding times rise, none comes after its frame's time, every frame is there once."""
    clip = make_clip(tmp_path / "in.mkv", times=times, size=(128, 96), audio="aac")
    suffix = ".mov" if codec == "prores_ks" else ".mp4"
    run(clip, tmp_path / f"out{suffix}", codec=codec, preset="medium" if codec == "libx264" else None, segment=0.5)
    with av.open(str(tmp_path / f"out{suffix}")) as film:
        stream = film.streams.video[0]
        packets = [(p.dts, p.pts) for p in film.demux(stream) if p.size]
        tick = stream.time_base
    assert [float(b * tick) for _, b in sorted(packets, key=lambda p: p[1])] == pytest.approx(
        [float(t) for t, _ in luma_planes(clip)], abs=1e-9
    )
    assert all(a[0] < b[0] for a, b in zip(packets, packets[1:], strict=False))
    assert all(dts <= pts for dts, pts in packets)
    if codec in ("libx264", "libx265"):
        assert any(a[1] > b[1] for a, b in zip(packets, packets[1:], strict=False)), "no B-frames: nothing was tested"
    assert len(luma_planes(tmp_path / f"out{suffix}")) == 40
    assert packets_of(clip, "audio") == packets_of(tmp_path / f"out{suffix}", "audio")


def test_what_belongs_to_the_film_is_kept(tmp_path):
    clip = make_clip(
        tmp_path / "in.mp4", codec="libx264", audio="aac", chapters=True, rotation=90, aspect=Fraction(4, 3),
        tags=(2, 1, 1, 13),
    )  # fmt: skip
    for name in ("out.mp4", "out.mkv"):
        assert run(clip, tmp_path / name).notes == []
    for name in ("out.mp4", "out.mkv"):
        with av.open(str(clip)) as before, av.open(str(tmp_path / name)) as after:
            assert after.metadata.get("title", after.metadata.get("TITLE")) == "A film"
            assert [(c["start"] * c["time_base"], c["end"] * c["time_base"], c["metadata"]["title"])
                    for c in after.chapters()] == [(0, 0.5, "one"), (0.5, 1.25, "two")]  # fmt: skip
            a, b = before.streams.video[0], after.streams.video[0]
            assert a.sample_aspect_ratio == b.sample_aspect_ratio == Fraction(4, 3)
            assert a.average_rate == b.average_rate == 24
            assert [s.language for s in after.streams][:2] == ["fra", "deu"]
            assert [s.type for s in after.streams] == ["video", "audio", "data"][: len(after.streams)]
            one, two = next(before.decode(video=0)), next(after.decode(video=0))
            assert one.rotation == two.rotation == 90
            for tag in ("color_range", "colorspace", "color_primaries", "color_trc"):
                assert getattr(one, tag) == getattr(two, tag), tag


@pytest.mark.parametrize(
    ("size", "pix_fmt", "codec", "expected"),
    [
        ((64, 48), "yuv420p", "libx264", (1, 6)),  # range, matrix
        ((64, 576), "yuv420p", "libx264", (1, 5)),
        ((1280, 48), "yuv420p", "libx264", (1, 1)),
        ((64, 48), "gray", "libx264", (1, 6)),
        ((64, 48), "gray", "ffv1", (2, 6)),  # as FFmpeg takes it
    ],
)
def test_unspecified_colours_are_chosen_and_written(tmp_path, size, pix_fmt, codec, expected):
    clip = make_clip(tmp_path / "in.mkv", size=size, pix_fmt=pix_fmt, codec=codec, times=steady(3))
    seen = []
    run(clip, tmp_path / "out.mp4", make=lambda yuv: seen.append(yuv) or Counting(yuv))
    with av.open(str(tmp_path / "out.mp4")) as film:
        frame = next(film.decode(video=0))
    assert (frame.color_range, frame.colorspace) == expected
    assert (frame.color_primaries, frame.color_trc) == (1, 1)
    assert seen[0].full_range == (expected[0] == 2) and seen[0].matrix == ("bt709" if expected[1] == 1 else "bt601")


def test_part_of_a_film(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", times=steady(96), chapters=True)
    summary = run(clip, tmp_path / "out.mkv", start=0.75, end=3.0, **FFV1)
    whole = luma_planes(clip)
    kept = [(t, luma) for t, luma in whole if 0.75 <= t < 3.0]
    part = luma_planes(tmp_path / "out.mkv")
    assert summary.frames == len(part) == len(kept)
    for (t, luma), (t2, luma2) in zip(kept, part, strict=True):
        assert t - Fraction(3, 4) == t2
        np.testing.assert_array_equal(luma, luma2)
    with av.open(str(tmp_path / "out.mkv")) as film:
        sound = [p.pts * p.time_base for p in film.demux(audio=0) if p.size]
        assert 0 <= sound[0] < 0.1 and 2.1 < sound[-1] < 2.25
        assert [(c["start"], c["metadata"]["title"]) for c in film.chapters()] == [(0, "two")]


@pytest.mark.parametrize("bits", [8, 10])
def test_compare_keeps_the_left_grey(tmp_path, bits):
    clip = make_clip(tmp_path / "in.mkv", times=steady(3), pix_fmt="yuv420p" if bits == 8 else "yuv420p10le")
    run(clip, tmp_path / "out.mkv", compare=True, **FFV1)
    with av.open(str(tmp_path / "out.mkv")) as film:
        for frame in film.decode(video=0):
            u = np.frombuffer(frame.planes[1], np.uint8 if bits == 8 else np.uint16).reshape(24, -1)[:, :32]
            grey = 1 << (bits - 1)
            assert (u[:, :16] == grey).all() and (u[:, 16:] != grey).all()


def test_bits_of_the_encoder(tmp_path):
    """More bits than an encoder has are rounded, and said; fewer are widened without loss."""
    clip = make_clip(tmp_path / "in.mkv", pix_fmt="yuv420p12le", times=steady(3))
    summary = run(clip, tmp_path / "out.mp4", codec="libx264")
    assert summary.notes == ["luma goes from 12 to 10 bits (libx264)"]
    clip = make_clip(tmp_path / "eight.mkv", times=steady(3))
    run(clip, tmp_path / "ten.mkv", pix_fmt="yuv444p10le", **FFV1)
    for (_, before), (_, after) in zip(luma_planes(clip), luma_planes(tmp_path / "ten.mkv"), strict=True):
        np.testing.assert_array_equal(before.astype(np.uint16) << 2, after)


def test_memory_is_bounded_by_the_queues(tmp_path):
    """Never more frames on their way than the two queues, the threads and the colorizer's own hold together."""
    clip = make_clip(tmp_path / "in.mkv", times=steady(120), audio=None)
    most = 0

    def watch(status):
        nonlocal most
        most = max(most, status.read - status.written)
        assert all(items <= limit == QUEUE for items, limit in status.queues)

    run(clip, tmp_path / "out.mkv", watch=watch, **FFV1)
    assert 0 < most <= 2 * QUEUE + 4 + 3


def test_stats(tmp_path):
    clip = make_clip(tmp_path / "in.mkv")
    stats = json.loads(json.dumps(run(clip, tmp_path / "out.mkv", **FFV1).stats))
    assert stats["frames"] == 30 and stats["resumed"] == 0 and stats["last_run"]["peak_memory_bytes"] > 1e6
    assert set(stats["fps_by_stage"]) == {"read", "colour", "write"} and min(stats["fps_by_stage"].values()) > 0
    assert set(stats["guessed"]) == {"matrix", "transfer", "range"}
    assert stats["encoder"]["codec"] == "ffv1" and stats["encoder"]["pixels"] == "yuv420p"


def test_stats_count_all_runs(tmp_path):
    """Each frame once: not those of the segment that is made anew."""

    class Seeing(StopAt):
        def __init__(self, yuv, at):
            super().__init__(yuv, at, fail)
            self.stats = SimpleNamespace(network=0, cuts=0, seconds={"field": 0.0})

        def push(self, luma):
            self.stats.network += 1
            self.stats.seconds["field"] += 1.0
            return super().push(luma)

    clip, out = make_clip(tmp_path / "in.mkv", times=steady(60)), tmp_path / "out.mkv"
    for at in (20, 45):
        with pytest.raises(RuntimeError, match="burnt"):
            run(clip, out, make=lambda yuv, at=at: Seeing(yuv, at), resume=at > 20, **FFV1)
    stats = json.loads(json.dumps(run(clip, out, make=lambda yuv: Seeing(yuv, -1), resume=True, **FFV1).stats))
    assert (stats["frames"], stats["network_runs"], stats["runs"]) == (60, 60, 3)
    assert stats["colour_seconds_by_step"] == {"field": 60.0}
    assert stats["resumed"] == 36 and stats["last_run"]["frames"] == 24
    assert stats["seconds"] > stats["last_run"]["seconds"] and set(stats["fps_by_stage"]) == {"read", "colour", "write"}
    assert stats["fps"] == pytest.approx(60 / stats["seconds"], rel=1e-2)


@pytest.mark.parametrize("transfer", [1, 16, 18])
def test_transfers_that_colours_are_not_made_for_are_named(tmp_path, transfer):
    clip = make_clip(tmp_path / "in.mkv", tags=(1, 9, 9, transfer))
    notes = run(clip, tmp_path / "out.mkv", **FFV1).notes
    assert any("BT.709's transfer" in note for note in notes) == (transfer != 1)


# --- stopped, killed, resumed -----------------------------------------------------------------------------------------


class StopAt(Counting):
    """Stops the film, or fails, at a frame."""

    def __init__(self, yuv, at, what):
        super().__init__(yuv)
        self.at, self.what = at, what

    def push(self, luma):
        if self.count == self.at:
            self.what()
        return super().push(luma)


def fail():
    raise RuntimeError("the network burnt")


@pytest.mark.parametrize("codec", ["ffv1", "libx264"])
def test_resumed_film_is_that_of_one_run(tmp_path, codec):
    # x264 gives other bits each time for pictures as small as 64×48: its macroblock tree reads past their edge
    clip = make_clip(tmp_path / "in.mkv", times=uneven(60), audio="flac", size=(128, 96))
    run(clip, tmp_path / "whole.mkv", codec=codec, segment=0.5)
    out = tmp_path / "out.mkv"
    with pytest.raises(RuntimeError, match="burnt"):
        run(clip, out, make=lambda yuv: StopAt(yuv, 37, fail), codec=codec, segment=0.5)
    assert not out.exists()
    with pytest.raises(VideoError, match=r"holds \d+ finished frames .* --resume .* --overwrite"):
        run(clip, out, codec=codec, segment=0.5)
    with pytest.raises(VideoError, match=r"not as they were: options.segment \(0.5 then, 0.7 now\)"):
        run(clip, out, codec=codec, segment=0.7, resume=True)
    with pytest.raises(VideoError, match=r"not as they were: colour.weights"):
        run(clip, out, codec=codec, segment=0.5, resume=True, identity={"weights": "others"})
    summary = run(clip, out, codec=codec, segment=0.5, resume=True)
    assert 20 < summary.resumed < 37 and summary.frames == 60
    assert frame_hashes(out) == frame_hashes(tmp_path / "whole.mkv")
    assert packets_of(out, "video") == packets_of(tmp_path / "whole.mkv", "video")
    assert packets_of(out, "audio") == packets_of(clip, "audio")
    assert not (tmp_path / "out.mkv.parts").exists()


def test_stopped_film_plays_and_goes_on(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", times=steady(120), audio="flac")
    run(clip, tmp_path / "whole.mkv", **FFV1)
    out, stop = tmp_path / "out.mkv", threading.Event()
    summary = run(clip, out, stop=stop, make=lambda yuv: StopAt(yuv, 40, stop.set), **FFV1)
    assert summary.stopped and 40 <= summary.frames < 80
    part, whole = frame_hashes(out), frame_hashes(tmp_path / "whole.mkv")
    assert part == whole[: summary.frames]
    sound = packets_of(out, "audio")
    assert 0 < len(sound) < len(packets_of(clip, "audio")) and sound == packets_of(clip, "audio")[: len(sound)]
    with av.open(str(out)) as film:
        last = max(p.dts * p.time_base for p in film.demux(audio=0) if p.size)
    assert float(last) < summary.frames / 24
    resumed = run(clip, out, resume=True, **FFV1)
    assert 0 < resumed.resumed <= summary.frames and resumed.resumed % 12 == 0, (
        "the segment it was stopped in is redone"
    )
    assert frame_hashes(out) == whole and packets_of(out, "audio") == packets_of(clip, "audio")


def test_stopped_before_the_first_frame(tmp_path):
    stop = threading.Event()
    stop.set()
    summary = run(make_clip(tmp_path / "in.mkv"), tmp_path / "out.mkv", stop=stop, **FFV1)
    assert summary.stopped and summary.frames == 0
    assert [p.name for p in tmp_path.iterdir()] == ["in.mkv"]


def test_joining_is_watched_and_can_be_broken_off(tmp_path):
    clip, out, seen = make_clip(tmp_path / "in.mkv", times=steady(60), audio="flac"), tmp_path / "out.mkv", []
    run(clip, tmp_path / "whole.mkv", **FFV1)

    def watch(status):
        if status.joined is not None:
            seen.append((status.joined, status.written))
            if status.joined == 20:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(clip, out, watch=watch, **FFV1)
    assert seen[0] == (0, 60) and sorted(set(seen)) == [(i, 60) for i in range(21)] and not out.exists()
    assert not list((tmp_path / "out.mkv.parts").glob("joined*"))
    again = []
    assert run(clip, out, resume=True, watch=lambda status: again.append(status.joined), **FFV1).resumed == 60
    assert again[-1] == 60 and frame_hashes(out) == frame_hashes(tmp_path / "whole.mkv")
    assert packets_of(out, "audio") == packets_of(clip, "audio")


def test_killed_film_loses_no_finished_segment(tmp_path):
    """kill -9 in the middle, a second one while segments are joined, and half a manifest beside."""
    clip = make_clip(tmp_path / "in.mkv", times=steady(96), audio="flac")
    run(clip, tmp_path / "whole.mkv", **FFV1)
    out = tmp_path / "out.mkv"
    code = """
import os, signal, sys
from video.clips import Counting
from fastcolor.video import film, segments
class Killed(Counting):
    def push(self, luma):
        if self.count == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().push(luma)
if sys.argv[4] == "join":
    real = segments.finish_film
    def die(*a):
        os.kill(os.getpid(), signal.SIGKILL)
    segments.finish_film = die
film.colorize_film(sys.argv[1], sys.argv[2], Killed, film.FilmOptions(codec="ffv1", segment=0.5),
                   resume=os.path.exists(sys.argv[2] + ".parts"))
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for at, how in (("50", "run"), ("-1", "join")):
        done = subprocess.run([sys.executable, "-c", code, str(clip), str(out), at, how], env=env, timeout=120)
        assert done.returncode == -signal.SIGKILL and not out.exists()
        finished = json.loads((tmp_path / "out.mkv.parts" / "film.json").read_text())["parts"]
        assert sum(p["frames"] for p in finished) >= (36 if how == "run" else 96)
    (tmp_path / "out.mkv.parts" / ".film-half.json").write_text('{"parts": [')
    summary = run(clip, out, resume=True, **FFV1)
    assert summary.resumed == 96
    assert frame_hashes(out) == frame_hashes(tmp_path / "whole.mkv")
    assert not (tmp_path / "out.mkv.parts").exists()


def test_film_with_broken_timestamps_is_resumed(tmp_path):
    """Raw MPEG-4 has no timestamps to seek by: frames are counted instead."""
    with av.open(str(tmp_path / "in.m4v"), "w", format="m4v") as raw:
        stream = raw.add_stream("mpeg4", rate=24, time_base=Fraction(1, 24))
        stream.width, stream.height = 64, 48
        for i in range(60):
            frame = av.VideoFrame(64, 48, "yuv420p")
            for plane in frame.planes:
                np.frombuffer(plane, np.uint8)[:] = i + 30
            frame.pts = i
            raw.mux(stream.encode(frame))
        raw.mux(stream.encode(None))
    run(tmp_path / "in.m4v", tmp_path / "whole.mkv", **FFV1)
    out = tmp_path / "out.mkv"
    with pytest.raises(RuntimeError, match="burnt"):
        run(tmp_path / "in.m4v", out, make=lambda yuv: StopAt(yuv, 37, fail), **FFV1)
    assert run(tmp_path / "in.m4v", out, resume=True, **FFV1).resumed > 10
    assert frame_hashes(out) == frame_hashes(tmp_path / "whole.mkv") and len(frame_hashes(out)) == 60


# --- pipes and images -------------------------------------------------------------------------------------------------

PIPED = """
import sys
from video.clips import Counting
from fastcolor.video.film import FilmOptions, colorize_film, peak_memory
colorize_film(sys.argv[1], sys.argv[2], Counting, FilmOptions(codec="ffv1", segment=0.5))
"""


def piped(source, target, **pipes):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run([sys.executable, "-c", PIPED, source, target], env=env, timeout=120, check=True, **pipes)


def test_pipes(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", times=uneven(30), audio="flac", chapters=True)
    run(clip, tmp_path / "whole.mkv", **FFV1)
    with open(clip, "rb") as given, open(tmp_path / "got.mkv", "wb") as got:
        cat = subprocess.Popen(["cat"], stdin=given, stdout=subprocess.PIPE)  # a pipe that cannot be sought in
        piped("-", "-", stdin=cat.stdout, stdout=got)
        cat.stdout.close()
        assert cat.wait() == 0
    with open(clip, "rb") as given:
        piped("-", str(tmp_path / "file.mkv"), stdin=given)
    for name in ("got.mkv", "file.mkv"):
        assert frame_hashes(tmp_path / name) == frame_hashes(tmp_path / "whole.mkv"), name
        assert packets_of(tmp_path / name, "audio") == packets_of(clip, "audio")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.mkv", "got.mkv", "in.mkv", "whole.mkv"]


class Gentle(Counting):
    """Chroma near grey, so that no colour leaves RGB."""

    def flush(self):
        middle = 1 << (self.yuv.bits - 1)
        return [tuple((c.to(torch.int32) // 8 + middle).to(c.dtype) for c in planes) for planes in super().flush()]


@pytest.mark.parametrize("bits", [8, 16])
def test_images_in_and_out(tmp_path, bits):
    """Grey PNGs to colour PNGs of the same depth, whose luma is the grey they came from."""
    (tmp_path / "in").mkdir()
    pages = [pattern(i, 33, 21, bits) for i in range(5)]
    for i, page in enumerate(pages):
        write_picture(tmp_path / f"in/{i + 7:04d}.png", Picture(Path("a"), [page], [None]), [page[..., None]])
    summary = run(tmp_path / "in/%04d.png", tmp_path / "out/%03d.png", make=Gentle)
    assert summary.frames == 5 and sorted(p.name for p in (tmp_path / "out").iterdir())[0] == "001.png"
    for i, page in enumerate(pages):
        rgb = read_picture(tmp_path / f"out/{i + 1:03d}.png").pages[0]
        assert rgb.dtype == page.dtype and rgb.shape == (21, 33, 3)
        assert np.ptp(rgb.astype(int), axis=2).max() > 0
        inside = ((rgb > 0) & (rgb < 2**bits - 1)).all(2)  # a colour that was clipped has another luma
        luma = rgb @ np.array([0.299, 0.587, 0.114])
        assert inside.mean() > 0.2 and np.abs(luma - page)[inside].max() <= 0.51
    film = run(tmp_path / "in/%04d.png", tmp_path / "out.mkv", rate=Fraction(12), **FFV1)
    assert film.frames == 5
    for i, (t, luma) in enumerate(luma_planes(tmp_path / "out.mkv")):
        assert float(t) == pytest.approx(i / 12, abs=5e-4)
        np.testing.assert_array_equal(luma, pages[i])
    with pytest.raises(VideoError, match="there are 5 such images; --overwrite"):
        run(tmp_path / "in/%04d.png", tmp_path / "out/%03d.png")


def test_images_are_not_written_over_themselves(tmp_path):
    run(make_clip(tmp_path / "in.mkv", times=steady(3)), tmp_path / "%03d.png")
    before = [(p.name, p.read_bytes()) for p in sorted(tmp_path.glob("*.png"))]
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(VideoError, match=r"%03d\.png: are the images of the film itself"):
        run(tmp_path / "%03d.png", tmp_path / "link" / "%03d.png", overwrite=True)
    assert [(p.name, p.read_bytes()) for p in sorted(tmp_path.glob("*.png"))] == before
    with pytest.raises(VideoError, match=r"%03d\.png: are the images of the film itself"):
        run(tmp_path / "002.png", tmp_path / "%03d.png", overwrite=True)
    assert run(tmp_path / "%03d.png", tmp_path / "%d.png").frames == 3  # other names


def test_images_of_before_that_stay_are_named(tmp_path):
    left = f"2 images were there before and are not of this film, from {tmp_path}/4.png on"
    for frames, notes in ((5, []), (3, [left])):
        clip = make_clip(tmp_path / f"{frames}.mkv", times=steady(frames))
        assert run(clip, tmp_path / "%d.png", overwrite=True).notes == notes


def test_pipe_with_a_name(tmp_path):
    """A shell's <(...): nothing of it is read twice."""
    clip = make_clip(tmp_path / "in.mkv", times=steady(30))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VideoError, match="pipe cannot be read a second time"):
        run(tmp_path / "pipe", tmp_path / "out.mkv", resume=True)
    giver = subprocess.Popen(["cp", "--", str(clip), str(tmp_path / "pipe")])
    summary = run(tmp_path / "pipe", tmp_path / "out.mkv", start=0.5, codec="ffv1")
    assert giver.wait(timeout=60) == 0 and summary.frames == 18
    assert [bool((a == b).all()) for (_, a), (_, b) in zip(luma_planes(clip)[12:], luma_planes(tmp_path / "out.mkv"),
                                                          strict=True)] == [True] * 18  # fmt: skip


def test_film_to_images(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", pix_fmt="yuv420p10le", times=steady(3))
    run(clip, tmp_path / "out/%d.tif")
    assert read_picture(tmp_path / "out/2.tif").pages[0].dtype == np.uint16
    run(clip, tmp_path / "jpg/%d.jpg")
    assert read_picture(tmp_path / "jpg/3.jpg").pages[0].shape == (48, 64, 3)


def test_gap_in_a_sequence(tmp_path):
    for i in (1, 2, 4):
        page = pattern(i, 8, 8, 8)[..., None]
        write_picture(tmp_path / f"{i}.png", Picture(Path("a"), [page], [None]), [page])
    with pytest.raises(VideoError, match=r"3\.png: is missing in the sequence, which goes on with 4\.png"):
        run(tmp_path / "%d.png", tmp_path / "out.mkv")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_is_no_film(tmp_path):
    (tmp_path / "a.txt").write_text("Not a film.\n" * 50)
    (tmp_path / "b.mp4").write_text("Not a film.\n" * 50)
    (tmp_path / "empty.mkv").write_bytes(b"")
    with av.open(str(tmp_path / "sound.mka"), "w", format="matroska") as out:
        stream = out.add_stream("flac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), "s16", "mono")
        frame.sample_rate = 48000
        out.mux([*stream.encode(frame), *stream.encode(None)])
    clip = make_clip(tmp_path / "in.mkv", times=steady(3))
    for name, message in {
        "a.txt": "is text, not a film",
        "b.mp4": "cannot be read as a film",
        "empty.mkv": "cannot be read as a film",
        "sound.mka": "has no video in it, only audio",
        "missing.mkv": "no such file",
        ".": "is a folder",
        "%03d.png": "no such images",
    }.items():
        with pytest.raises(VideoError, match=message):
            run(tmp_path / name, tmp_path / "out.mkv")
    with pytest.raises(VideoError, match="has no frames in the part asked for"):
        run(clip, tmp_path / "out.mkv", start=100.0)
    with pytest.raises(VideoError, match="is the film itself"):
        run(clip, clip, overwrite=True)
    with pytest.raises(VideoError, match="is there already; --overwrite"):
        run(clip, tmp_path / "sound.mka")
    with pytest.raises(VideoError, match="nothing to resume"):
        run(clip, tmp_path / "out.mkv", resume=True)
    with pytest.raises(VideoError, match=r"out\.xyz: FFmpeg knows no container with the suffix \.xyz"):
        run(clip, tmp_path / "out.xyz")
    assert not any(p.name.startswith("out") for p in tmp_path.iterdir())


def test_codecs_that_cannot_be(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", times=steady(3))
    for options, message in (
        ({"codec": "libnothing"}, "--codec libnothing: this FFmpeg has no such video encoder; there are libx264, "),
        ({"codec": "flac"}, "no such video encoder"),
        ({"codec": "ffv1", "crf": 20.0}, "--crf 20.0: ffv1 has no such option"),
        ({"preset": "quick"}, "--codec libx264: cannot be opened here for 64×48 yuv420p with crf=18 preset=quick"),
        ({"pix_fmt": "yuv420p12"}, "--pix-fmt yuv420p12: libx264 takes yuv420p, "),
        ({"codec": "prores_ks"}, "mp4 cannot hold prores_ks; .mkv holds any"),
    ):
        with pytest.raises(VideoError, match=re.escape(message)):
            run(clip, tmp_path / "out.mp4", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["in.mkv"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("out.mov", {"codec": "libsvtav1"}, "mov cannot hold libsvtav1"),  # which its header alone says
        ("out.ogv", {}, "ogv cannot hold libx264"),
        ("out.ts", {"codec": "ffv1"}, "mpegts has no name for ffv1"),
        ("out.mkv", {"format": "concat"}, "--format concat: this FFmpeg writes no such container"),
        ("out.mkv", {"format": "hls"}, "--format hls: makes no file by itself"),
    ],
)
def test_containers_that_cannot_be(tmp_path, name, options, message):
    """They are refused before any work."""
    clip = make_clip(tmp_path / "in.mkv", times=steady(3))
    with pytest.raises(VideoError, match=re.escape(message)):
        run(clip, tmp_path / name, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["in.mkv"]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_truncated_film(tmp_path, suffix):
    codec, options = ("libx264", {"movflags": "faststart"}) if suffix == ".mp4" else ("ffv1", None)
    clip = make_clip(tmp_path / f"in{suffix}", times=steady(96), audio="flac", codec=codec)
    if options:
        with av.open(str(clip)) as source, av.open(str(tmp_path / "fast.mp4"), "w", options=options) as out:
            streams = {s.index: out.add_stream_from_template(s, opaque=True) for s in source.streams}
            for packet in source.demux():
                if packet.size:
                    packet.stream = streams[packet.stream.index]
                    out.mux(packet)
        clip = tmp_path / "fast.mp4"
    data = clip.read_bytes()
    clip.write_bytes(data[: len(data) * 6 // 10])
    summary = run(clip, tmp_path / f"out{suffix}", codec="libx264" if options else "ffv1")
    assert re.match(r".*: is cut off: ends at 0:00:0[12]\.\d, [12]\.\d s before the end", summary.broken_off)
    assert 30 < summary.frames < 70 and len(luma_planes(tmp_path / f"out{suffix}")) == summary.frames
    assert not summary.stopped and not (tmp_path / f"out{suffix}.parts").exists()
    if suffix == ".mp4":  # the same by the film's own stream, where the others are not read
        assert "is cut off: ends at" in run(clip, tmp_path / "images/%d.png").broken_off


class Failing:
    """A container that cannot be read any further after some packets."""

    def __init__(self, container, packets):
        self.container, self.packets = container, packets

    def __getattr__(self, name):
        return getattr(self.container, name)

    def demux(self, *streams):
        yield from islice(self.container.demux(*streams), self.packets)
        raise av.error.OSError(errno.EIO, "Input/output error")


def test_failed_reading_keeps_finished_segments(tmp_path, monkeypatch):
    """What is there plays, and a later run goes on: the disk failed, not the film."""
    clip, out = make_clip(tmp_path / "in.mkv", times=steady(96), audio="flac"), tmp_path / "out.mkv"
    run(clip, tmp_path / "whole.mkv", **FFV1)
    whole, opened = frame_hashes(tmp_path / "whole.mkv"), Reader._open
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "_open", lambda reader: Failing(opened(reader), 53))
        summary = run(clip, out, **FFV1)
    assert summary.broken_off.endswith("in.mkv: ends at 0:00:02.2: reading failed there: Input/output error")
    assert not summary.stopped and frame_hashes(out) == whole[: summary.frames] and summary.frames == 53
    again = run(clip, out, resume=True, **FFV1)
    assert (again.resumed, again.frames, again.broken_off) == (48, 96, None)
    assert frame_hashes(out) == whole and packets_of(out, "audio") == packets_of(clip, "audio")
    assert not (tmp_path / "out.mkv.parts").exists()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc")
def test_end_of_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(VideoError, match=r"mem: cannot be read to its end \(Input/output error\)"):
        fingerprint("/proc/self/mem")  # its first page never is


def test_failed_reading_of_sound_loses_nothing(tmp_path, monkeypatch):
    clip, out = make_clip(tmp_path / "in.mkv", audio="flac"), tmp_path / "out.mkv"

    def failing(copier, packet):
        raise av.error.OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(VideoError, match="other streams failed .*--resume joins them"):
        patch.setattr("fastcolor.video.writer.Copier.copy", failing)
        run(clip, out, **FFV1)
    assert not out.exists()
    assert run(clip, out, resume=True, **FFV1).resumed == 30
    assert packets_of(out, "audio") == packets_of(clip, "audio")


def test_film_that_goes_away_loses_nothing(tmp_path):
    clip, out, away = make_clip(tmp_path / "in.mkv", audio="flac"), tmp_path / "out.mkv", tmp_path / "away.mkv"
    with pytest.raises(VideoError, match=r"in\.mkv: reading of its other streams failed \(No such file or directory\)"):
        run(clip, out, watch=lambda status: status.joined == 0 and clip.rename(away), **FFV1)
    away.rename(clip)
    assert run(clip, out, resume=True, **FFV1).resumed == 30 and packets_of(out, "audio") == packets_of(clip, "audio")


def test_film_whose_sound_goes_on_is_whole(tmp_path):
    """Also where the sound is left out, so that nothing is read as long as the header says."""
    clip = make_clip(tmp_path / "in.mkv", times=steady(30), audio="pcm_s16le", sound_longer=5.0)
    for target, options in (("out.mkv", FFV1), ("out.webm", {"codec": "libvpx-vp9"}), ("images/%d.png", {})):
        assert run(clip, tmp_path / target, **options).broken_off is None
    with av.open(str(tmp_path / "out.mkv")) as film:
        assert film.duration / av.time_base > 6


def test_size_changes_midway(tmp_path, monkeypatch):
    pieces = [make_clip(tmp_path / f"{i}.ts", codec="mpeg2video", size=size, audio=None,
                        times=steady(48)[24 * i : 24 * i + 24])
              for i, size in enumerate([(64, 48), (96, 64)])]  # fmt: skip
    both = tmp_path / "in.ts"
    both.write_bytes(b"".join(p.read_bytes() for p in pieces))
    summary = run(both, tmp_path / "out.mkv", **FFV1)
    assert "the picture changes from 64×48, 8 bits to 96×64, 8 bits" in summary.broken_off
    assert len(luma_planes(tmp_path / "out.mkv")) == summary.frames > 20
    woven = run(both, tmp_path / "out.mkv", overwrite=True, deinterlace=True, **FFV1)
    assert "the picture changes from 64×48, 8 bits to 96×64, 8 bits" in woven.broken_off
    assert woven.frames == summary.frames
    # also where only the joining is left to be done
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="burnt"):
        patch.setattr("fastcolor.video.film.join", lambda *_: fail())
        run(both, tmp_path / "later.mkv", **FFV1)
    later = run(both, tmp_path / "later.mkv", resume=True, **FFV1)
    assert "the picture changes from" in later.broken_off and later.frames == summary.frames
    # the advice holds, also in a part of the film
    for begin in (None, 0.25):
        told = run(both, tmp_path / "out.mkv", start=begin, overwrite=True, **FFV1).broken_off
        rest = run(both, tmp_path / "rest.mkv", start=float(told.split("--start ")[1]), overwrite=True, **FFV1)
        assert rest.broken_off is None and rest.frames == 24


def test_full_disk_keeps_finished_segments(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", times=steady(96), audio="flac")
    run(clip, tmp_path / "whole.mkv", **FFV1)
    code = """
import resource, sys
from video.clips import Counting
from fastcolor.video import film, segments
from fastcolor.video.errors import VideoError
add = segments.Parts.add
def full(self, *given):
    add(self, *given)
    if len(self.parts) == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
segments.Parts.add = full
try:
    film.colorize_film(sys.argv[1], sys.argv[2], Counting, film.FilmOptions(codec="ffv1", segment=0.5))
except VideoError as error:
    sys.exit(f"error: {error}")
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    out = tmp_path / "out.mkv"
    done = subprocess.run([sys.executable, "-c", code, str(clip), str(out)], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and re.match(
        r"error: .*out.mkv: cannot be written \(File too large\); 24 finished frames are kept in .*out.mkv.parts, --r",
        done.stderr,
    ), done.stderr
    assert run(clip, out, resume=True, **FFV1).resumed == 24
    assert frame_hashes(out) == frame_hashes(tmp_path / "whole.mkv")


def test_output_that_cannot_be_written(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", times=steady(3))
    (tmp_path / "file").write_text("")
    with pytest.raises(VideoError, match=r"file/sub: cannot be made"):
        run(clip, tmp_path / "file" / "sub" / "out.mkv")
    (tmp_path / "folder.mkv").mkdir()
    with pytest.raises(VideoError, match="is a folder"):
        run(clip, tmp_path / "folder.mkv")
    os.mkfifo(tmp_path / "pipe.mkv")
    with pytest.raises(VideoError, match="is no ordinary file"):
        run(clip, tmp_path / "pipe.mkv", overwrite=True)
    (tmp_path / "out.mkv.parts").write_text("")
    with pytest.raises(VideoError, match=r"out\.mkv\.parts: cannot be written \(Not a directory\)"):
        run(clip, tmp_path / "out.mkv", overwrite=True)
    (tmp_path / "out.mkv.parts").unlink()
    (tmp_path / "out.mkv.parts").mkdir()
    (tmp_path / "out.mkv.parts" / "mine.txt").write_text("")
    with pytest.raises(VideoError, match=r"is there with mine\.txt, which is not of a run; it is in the way"):
        run(clip, tmp_path / "out.mkv", overwrite=True)
    assert (tmp_path / "out.mkv.parts" / "mine.txt").exists()


def test_killed_at_the_very_beginning(tmp_path):
    """What is left of a run that had nothing finished is no obstacle."""
    clip = make_clip(tmp_path / "in.mkv", times=steady(3))
    (tmp_path / "out.mkv.parts").mkdir()
    (tmp_path / "out.mkv.parts" / ".film-abc.json").write_text("{")
    (tmp_path / "out.mkv.parts" / "000000.unfinished").write_text("")
    (tmp_path / "out.mkv.parts" / "film.json").write_text("[]")
    assert run(clip, tmp_path / "out.mkv", **FFV1).frames == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mkv", "out.mkv"]


def test_finished_segments_that_cannot_be_gone_on_from_are_kept(tmp_path):
    """Of another version, say: they go by --overwrite alone."""
    clip, out = make_clip(tmp_path / "in.mkv", times=steady(30)), tmp_path / "out.mkv"
    with pytest.raises(RuntimeError, match="burnt"):
        run(clip, out, make=lambda yuv: StopAt(yuv, 25, fail), **FFV1)
    manifest = tmp_path / "out.mkv.parts" / "film.json"
    kept = sorted(p.name for p in manifest.parent.iterdir())
    for text, why in (('{"version": 1}', "it is of version 1, this fastcolor knows 2"), ("[]", "it is damaged")):
        manifest.write_text(text)
        for resume in (False, True):
            with pytest.raises(VideoError, match=rf"film\.json: cannot be resumed from \({why}\); --overwrite starts"):
                run(clip, out, resume=resume, **FFV1)
        assert sorted(p.name for p in manifest.parent.iterdir()) == kept
    assert run(clip, out, overwrite=True, **FFV1).frames == 30 and not manifest.parent.exists()


def test_system_without_locks_is_said(tmp_path, monkeypatch):
    """As Windows is."""
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    clip, out = make_clip(tmp_path / "in.mkv", times=steady(3)), tmp_path / "out.mkv"
    notes = run(clip, out, **FFV1).notes
    assert peak_memory() is None
    assert notes == [f"this system has no locks of files: nothing keeps a second run out of {out}.parts"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mkv", "out.mkv"]


def test_two_runs_at_once(tmp_path):
    clip, out = make_clip(tmp_path / "in.mkv", times=steady(30)), tmp_path / "out.mkv"

    def again(yuv):
        for options in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(VideoError, match=rf"out\.mkv\.parts: process {os.getpid()} on .* is at work there"):
                run(clip, out, **options, **FFV1)
        return Counting(yuv)

    assert run(clip, out, make=again, **FFV1).frames == len(luma_planes(out)) == 30


def test_streams_that_the_container_cannot_hold(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", times=steady(12), audio="pcm_s16le")
    summary = run(clip, tmp_path / "out.mp4", format=None)
    with av.open(str(tmp_path / "out.mp4")) as film:
        copied = len(film.streams.audio)
    assert copied == 1 or summary.notes[0].startswith("stream 1 (audio, pcm_s16le) is left out: mp4 cannot hold it")
    summary = run(clip, tmp_path / "out.webm", codec="libvpx-vp9")
    assert summary.notes[0].startswith("stream 1 (audio, pcm_s16le) is left out: webm cannot hold it as it is")
    assert summary.frames == len(luma_planes(tmp_path / "out.webm")) == 12


def test_subtitles(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", subtitle=True)
    assert run(clip, tmp_path / "out.mkv", **FFV1).notes == []
    with av.open(str(tmp_path / "out.mkv")) as film:
        stream = film.streams.subtitles[0]
        read = [(bytes(p), p.pts * p.time_base, p.duration * p.time_base) for p in film.demux(stream) if p.size]
        assert stream.language == "ger"
    assert read == [(b"Line 0", Fraction(1, 5), Fraction(3, 10)), (b"Line 1", Fraction(7, 10), Fraction(3, 10))]
    summary = run(clip, tmp_path / "out.mp4")
    assert len(summary.notes) == 1 and summary.notes[0].startswith("stream 2 (subtitle, ")
    assert "is left out: mp4 cannot hold it as it is" in summary.notes[0]


def test_what_a_container_would_lose_is_said(tmp_path):
    times = {"steady": steady(12), "uneven": uneven(12)}
    for name, given in times.items():
        clip = make_clip(tmp_path / f"{name}.mp4", times=given, audio="flac")
        notes = run(clip, tmp_path / f"{name}.avi").notes
        assert any("avi has one frame rate for all" in note for note in notes) == (name == "uneven")
    assert run(clip, tmp_path / "out.ts").notes == ["stream 1 (audio, flac) is left out: mpegts has no name for it"]
    with av.open(str(tmp_path / "out.ts")) as film:
        assert [s.type for s in film.streams] == ["video"]


def test_cover_belongs_to_every_part(tmp_path):
    clip, covered = make_clip(tmp_path / "in.mkv", audio=None), tmp_path / "covered.mp4"
    with av.open(str(clip)) as source, av.open(str(covered), "w") as out:
        film = out.add_stream_from_template(source.streams.video[0], opaque=True)
        cover = out.add_stream("png")
        cover.width, cover.height, cover.pix_fmt = 16, 16, "gray"
        cover.disposition = Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((16, 16), np.uint8), "gray")
        for packet in [*cover.encode(picture), *cover.encode(None)]:
            out.mux(packet)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = film
                out.mux(packet)

    def pictures(path):
        with av.open(str(path)) as film:
            packets = [p for p in film.demux() if p.stream.disposition & Disposition.attached_pic]
            return [bytes(p) for p in packets if p.size]

    assert len(pictures(covered)) == 1
    for i, start in enumerate((None, 0.5)):
        run(covered, tmp_path / f"{i}.mp4", codec="ffv1", start=start)
        assert pictures(tmp_path / f"{i}.mp4") == pictures(covered)


def test_sample_aspect_that_cannot_be_kept_is_said(tmp_path):
    clip = make_clip(tmp_path / "in.mov", aspect=Fraction(16, 15), codec="libx264", times=steady(3), audio=None)
    summary = run(clip, tmp_path / "out.mkv", **FFV1)
    assert summary.notes[0].startswith("samples of 16:15 are not noted: ffv1 in matroska cannot have it from here")
    assert run(clip, tmp_path / "out.mov", codec="prores_ks").notes == []
    with av.open(str(tmp_path / "out.mov")) as film:
        assert film.streams.video[0].sample_aspect_ratio == Fraction(16, 15)


def test_film_that_turns_interlaced(tmp_path):
    """Titles before it are not: it ends there, and goes on with one of the options."""
    both, out = tmp_path / "in.ts", tmp_path / "out.mkv"
    pieces = [make_clip(tmp_path / f"{i}.ts", codec="mpeg2video", size=(64, 64), audio=None, interlaced=i == 1,
                        times=steady(72)[36 * i : 36 * i + 36]) for i in range(2)]  # fmt: skip
    both.write_bytes(b"".join(p.read_bytes() for p in pieces))
    with pytest.raises(VideoError, match="is interlaced; --deinterlace makes frames"):
        run(both, out, start=2.0, **FFV1)
    for _ in range(2):  # going on without an answer changes nothing
        summary = run(both, out, resume=out.exists(), **FFV1)
        assert summary.broken_off.endswith(
            "in.ts: ends at 0:00:01.5: is interlaced from there on; --deinterlace makes frames of its fields, "
            "--no-deinterlace takes the frames as they are"
        )
        assert summary.frames == len(luma_planes(out)) == 36 and not summary.stopped
    shutil.copytree(tmp_path / "out.mkv.parts", tmp_path / "woven.mkv.parts")
    kept = run(both, out, resume=True, deinterlace=False, **FFV1)
    woven = run(both, tmp_path / "woven.mkv", resume=True, deinterlace=True, **FFV1)
    assert kept.broken_off is None and woven.broken_off is None and kept.resumed == woven.resumed == 24
    before, as_is, made = (luma_planes(p) for p in (both, out, tmp_path / "woven.mkv"))
    assert len(as_is) == len(made) == len(before) == 72
    same = [[bool((a == b).all()) for (_, a), (_, b) in zip(before, x, strict=True)] for x in (as_is, made)]
    assert all(same[0]) and same[1] == [i < 24 for i in range(72)]


def test_long_film_that_turns_interlaced_is_refused_before_the_work(tmp_path):
    """Where it is looked into; a part that ends before is coloured."""
    both = tmp_path / "in.ts"
    pieces = [make_clip(tmp_path / f"{i}.ts", codec="mpeg2video", size=(32, 32), audio=None, interlaced=i == 1,
                        times=steady(1200)[480 * i : 480 + 720 * i]) for i in range(2)]  # fmt: skip
    both.write_bytes(b"".join(p.read_bytes() for p in pieces))
    with Reader(str(both), end=20.0) as reader:
        assert reader.info.frames == 480
    with pytest.raises(VideoError, match=r"is interlaced at 0:00:2\d\.\d, though not in its first frame; --dei"):
        Reader(str(both))
    for answer in (True, False):
        Reader(str(both), deinterlace=answer).close()


def test_interlaced(tmp_path):
    clip = make_clip(tmp_path / "in.mpg", codec="mpeg2video", interlaced=True, audio=None, size=(64, 64))
    with pytest.raises(VideoError, match="is interlaced; --deinterlace makes frames"):
        run(clip, tmp_path / "out.mkv", **FFV1)
    kept = run(clip, tmp_path / "kept.mkv", deinterlace=False, **FFV1)
    woven = run(clip, tmp_path / "woven.mkv", deinterlace=True, **FFV1)
    before, as_is, made = (luma_planes(p) for p in (clip, tmp_path / "kept.mkv", tmp_path / "woven.mkv"))
    assert kept.frames == woven.frames == len(before) == len(made)
    start = before[0][0]
    for (t, luma), (t2, luma2), (t3, luma3) in zip(before, as_is, made, strict=True):
        assert float(t2) == float(t3) and abs(float(t - start) - float(t2 - as_is[0][0])) < 2e-3
        np.testing.assert_array_equal(luma, luma2)
        assert (luma != luma3).any()
