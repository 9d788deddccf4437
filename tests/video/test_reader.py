from __future__ import annotations

from fractions import Fraction
from itertools import islice

import av
import numpy as np
import pytest
import torch
from video.clips import make_clip, pattern, steady, uneven

from fastcolor.video.errors import VideoError
from fastcolor.video.reader import (
    Picture,
    Reader,
    is_sequence,
    numbered_files,
    read_luma,
    read_rgb,
    rotation_matrix,
)
from fastcolor.video.sequence import yuv_to_rgb
from fastcolor.video.tags import Colours, choose_format, pixel_format, read_colours
from fastcolor.video.writer import convert_bits

LIMITED = Colours(1, False, 1, 1)


def frame_of(luma: np.ndarray, name: str) -> av.VideoFrame:
    frame = av.VideoFrame(luma.shape[1], luma.shape[0], name)
    for plane in frame.planes:
        rows = np.frombuffer(plane, luma.dtype).reshape(plane.height, -1)
        rows[:] = 100
    np.frombuffer(frame.planes[0], luma.dtype).reshape(luma.shape[0], -1)[:, : luma.shape[1]] = luma
    return frame


@pytest.mark.parametrize(
    ("name", "planar", "bits"),
    [
        ("nv12", "yuv420p", 8), ("p010le", "yuv420p10le", 10), ("yuyv422", "yuv422p", 8), ("uyvy422", "yuv422p", 8),
        ("yuv420p10be", "yuv420p10le", 10), ("gray16be", "gray16le", 16), ("yuva420p", "yuv420p", 8),
        ("yuvj420p", "yuvj420p", 8), ("yuv410p", "yuv410p", 8), ("gray9le", "gray9le", 9),
        ("p010be", "yuv420p10le", 10),
    ],
)  # fmt: skip
def test_luma_is_as_decoded(name, planar, bits):
    luma = pattern(3, 70, 46, 8)
    luma = luma if bits == 8 else (luma.astype(np.uint16) << (bits - 8)) + 1
    frame = frame_of(luma, planar)
    frame = frame if name == planar else frame.reformat(format=name)
    assert frame.format.name == name
    read = read_luma(frame, LIMITED)
    assert read.dtype == (torch.uint8 if bits == 8 else torch.uint16)
    np.testing.assert_array_equal(read.numpy(), luma)


@pytest.mark.parametrize(("name", "bits"), [("rgb24", 8), ("gbrp", 8), ("bgra", 8), ("rgb48le", 16), ("gbrp10le", 10)])
def test_luma_of_rgb(name, bits):
    top = 2**bits - 1
    rgb = np.random.default_rng(0).integers(0, top, (22, 34, 3), endpoint=True)
    rgb[0, 0], rgb[0, 1] = 0, top
    rgb = rgb.astype(np.uint8 if bits == 8 else np.uint16)
    frame = av.VideoFrame.from_ndarray(rgb, "rgb24" if bits == 8 else name)
    luma = read_luma(frame.reformat(format=name), Colours(9, False, 9, 1)).double().numpy()
    exact = (rgb / top) @ np.array([0.2627, 0.6780, 0.0593]) * (219 << (bits - 8)) + (16 << (bits - 8))
    assert np.abs(luma - exact).max() <= 0.51
    assert list(luma[0, :2]) == [16 << (bits - 8), 235 << (bits - 8)]


def test_padded_rows_and_grey_with_alpha():
    grey = np.random.default_rng(0).integers(0, 256, (5, 7, 2), dtype=np.uint8)
    frame = av.VideoFrame(7, 5, "ya8")
    rows = np.frombuffer(frame.planes[0], np.uint8).reshape(5, -1)
    assert rows.shape[1] > 14, "no padding: nothing is tested"
    rows[:, :14] = grey.reshape(5, 14)
    np.testing.assert_array_equal(read_luma(frame, LIMITED).numpy(), grey[..., 0])


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts", ".avi"])
def test_goes_on_after_any_frame(tmp_path, suffix):
    """The same frames as in one go, with B-frames and keyframes that are seconds apart."""
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    options = {"g": "60", "bf": "2"} | ({} if suffix == ".avi" else {"preset": "fast", "x264-params": "open-gop=1"})
    clip = make_clip(
        tmp_path / f"in{suffix}", times=steady(200), codec=codec, options=options, size=(128, 96), audio=None,
        tick=Fraction(1, 24) if suffix == ".avi" else None,
    )  # fmt: skip
    with Reader(str(clip)) as reader:
        whole = [(p.pts, p.duration, p.luma.clone()) for p in reader.frames()]
        assert len(whole) == 200
        for after in (1, 100, 163, 198):
            rest = list(reader.frames(after=whole[after][0]))
            assert [(p.pts, p.duration) for p in rest] == [(t, d) for t, d, _ in whole[after + 1 :]]
            assert all(torch.equal(p.luma, luma) for p, (_, _, luma) in zip(rest, whole[after + 1 :], strict=True))
        counted = list(reader.frames(skip=150))
        assert [p.pts for p in counted] == [t for t, _, _ in whole[150:]]


def test_clock_that_goes_back_after_a_resume(tmp_path):
    """Frames are then stamped as in one go, and none is lost."""
    clip = make_clip(tmp_path / "in.nut", times=steady(40), audio=None)
    with Reader(str(clip)) as reader:
        decoded = reader._decoded

        def back():
            for i, frame in enumerate(decoded()):
                frame.pts -= (i >= 30) * round(0.75 / reader.stream.time_base)
                yield frame

        reader._decoded = back
        whole = [p.pts for p in reader.frames(after=-1)]
        assert len(whole) == 40 and reader.ended.moved > 0
        assert [p.pts for p in reader.frames(after=whole[25])] == whole[26:]


def test_what_the_decoder_holds_comes_before_a_failure(tmp_path, monkeypatch):
    clip = make_clip(tmp_path / "in.mkv", times=steady(40), codec="libx264", options={"bf": "3", "g": "40"}, audio=None)

    class Failing:
        """A container that cannot be read any further after 30 packets."""

        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def demux(self, *streams):
            yield from islice(self.container.demux(*streams), 30)
            raise av.error.OSError(5, "Input/output error")

    opened = Reader._open
    monkeypatch.setattr(Reader, "_open", lambda reader: Failing(opened(reader)))
    with Reader(str(clip)) as reader:
        assert len(list(reader.frames())) == 30
        assert reader.ended.why == "reading failed there: Input/output error"


def test_packets_of_other_streams_come_along(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", times=uneven(20), audio="flac")
    with Reader(str(clip), copies=True) as reader:
        items = list(reader.frames())
    assert sum(isinstance(i, Picture) for i in items) == 20
    assert any(isinstance(i, av.Packet) for i in items)


def test_what_is_known_before_reading(tmp_path):
    clip = make_clip(tmp_path / "in.mp4", codec="libx264", times=steady(30), rotation=180, aspect=Fraction(16, 15))
    with Reader(str(clip)) as reader:
        info = reader.info
    assert (info.width, info.height, info.bits, info.rate, info.steady) == (64, 48, 8, 24, True)
    assert info.frames == 30 and info.duration == pytest.approx(1.25) and info.aspect == Fraction(16, 15)
    assert info.matrix[0] < 0 and len(info.matrix) == 9
    clip = make_clip(tmp_path / "uneven.mp4", codec="libx264", times=uneven(30))
    with Reader(str(clip)) as reader:
        assert not reader.info.steady


def test_tags():
    frame = av.VideoFrame(64, 48, "yuv420p")
    frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc = 9, 2, 9, 16
    colours = read_colours(frame, "hevc")
    assert colours == Colours(9, True, 9, 16, ()) and colours.range == 2
    yuv = colours.yuv("420", 10)
    assert (yuv.matrix, yuv.primaries, yuv.full_range, yuv.bits) == ("bt2020", "bt2020", True, 10)
    frame.color_primaries = 5
    assert read_colours(frame, "hevc").primaries == 1
    assert not read_colours(av.VideoFrame(64, 48, "rgb24"), "png").full_range


def test_pixel_formats():
    assert pixel_format("yuv420p10le").bits == 10 and pixel_format("p010le").planar == "yuv420p10le"
    assert pixel_format("rgb24") is None and pixel_format("yuva420p") is None and pixel_format("yuv420p10be") is None
    choose = {("libx264", 8): "yuv420p", ("libx264", 10): "yuv420p10le", ("libx264", 12): "yuv420p10le",
              ("ffv1", 9): "yuv420p9le", ("ffv1", 12): "yuv420p12le", ("prores_ks", 8): "yuv422p10le",
              ("libsvtav1", 16): "yuv420p10le"}  # fmt: skip
    for (codec, bits), expected in choose.items():
        assert choose_format(av.Codec(codec, "w"), bits, None).name == expected
    assert choose_format(av.Codec("libx264", "w"), 8, "yuv444p10").name == "yuv444p10le"
    with pytest.raises(VideoError, match="libx264 takes yuv420p, "):
        choose_format(av.Codec("libx264", "w"), 8, "yuv420p16le")


@pytest.mark.parametrize("full", [False, True])
def test_bits_of_luma(full):
    every = torch.arange(256, dtype=torch.uint8)[None]
    wide = convert_bits(every, 8, 10, full)
    assert wide.dtype == torch.uint16
    assert torch.equal(convert_bits(wide, 10, 8, full), every)
    expected = every.double() * (1023 / 255) if full else every.double() * 4
    assert (wide.double() - expected).abs().max() <= 0.5
    assert convert_bits(every, 8, 8, full) is every


def test_names_of_sequences(tmp_path):
    assert is_sequence("frames/%06d.png") and is_sequence("a%d.JPG")
    assert not is_sequence("100%.mp4") and not is_sequence("a%03d.mp4") and not is_sequence("a.png")
    for name in ("a009.png", "a010.png", "a1000.png", "a11.png", "b010.png", "a01x.png"):
        (tmp_path / name).touch()
    assert list(numbered_files(str(tmp_path / "a%03d.png"))) == [9, 10, 1000]
    assert list(numbered_files(str(tmp_path / "a%d.png"))) == [11, 1000]


@pytest.mark.parametrize(("matrix", "full"), [(1, False), (6, False), (9, False), (5, True)])
def test_rgb_is_that_of_the_matrix(matrix, full):
    colours = Colours(matrix, full, 1, 1)
    rng = np.random.default_rng(0)
    planes = [rng.integers(*span, (24, 32)).astype(np.uint8) for span in ((16, 235), (100, 156), (100, 156))]
    frame = av.VideoFrame(32, 24, "yuv444p")
    for plane, values in zip(frame.planes, planes, strict=True):
        np.frombuffer(plane, np.uint8).reshape(24, -1)[:, :32] = values
    expected = yuv_to_rgb(*map(torch.from_numpy, planes), colours.yuv("444", 8))
    found = read_rgb(frame, colours)
    assert found.shape == (24, 32, 3) and found.dtype == torch.uint8
    assert (found.int() - expected.int()).abs().max() <= 1


def test_rgb_of_rgb_is_as_decoded():
    rgb = np.random.default_rng(0).integers(0, 256, (22, 34, 3), dtype=np.uint8)
    for name in ("rgb24", "gbrp", "bgra"):
        frame = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format=name)
        np.testing.assert_array_equal(read_rgb(frame, LIMITED).numpy(), rgb)


def test_pictures_have_rgb_where_asked(tmp_path):
    film = make_clip(tmp_path / "a.mkv", times=steady(3), audio=None)
    for wanted in (True, False):
        with Reader(str(film), rgb=wanted) as reader:
            pictures = list(reader.frames())
            assert [None if p.rgb is None else tuple(p.rgb.shape) for p in pictures] == [
                (48, 64, 3) if wanted else None
            ] * 3


@pytest.mark.parametrize("degrees", [90, -90, 180, 30])
def test_rotation_is_ffmpegs(tmp_path, degrees):
    clip = make_clip(tmp_path / "in.mp4", codec="libx264", times=steady(2), rotation=degrees, audio=None)
    with Reader(str(clip)) as reader:
        assert np.abs(np.subtract(reader.info.matrix, rotation_matrix(degrees))).max() <= 1


def test_images_with_exif(tmp_path):
    """Their frames carry a kind of data beside the picture that PyAV may not know."""
    pyvips = pytest.importorskip("pyvips")
    for i in range(2):
        image = pyvips.Image.new_from_array(np.full((16, 20, 3), 40 * i, np.uint8))
        image.write_to_file(str(tmp_path / f"{i}.png"))  # with the resolution as EXIF
    with Reader(str(tmp_path / "%d.png")) as reader:
        assert reader.info.matrix is None and len(list(reader.frames())) == 2
