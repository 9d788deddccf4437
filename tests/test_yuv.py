"""Formats of video planes, and the chroma planes made for them: against published matrices, OpenCV and what a player
would decode.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import largest_error

import fastcolor
from fastcolor import YuvFormat
from fastcolor.reference import lab
from fastcolor.reference import render as reference
from fastcolor.yuv import LOCATIONS, MATRICES, _to_xyz

FORMATS = [
    YuvFormat("444", bits, matrix, full_range)
    for bits, matrix, full_range in itertools.product((8, 10, 16), MATRICES, (False, True))
]


def planes(rgb, yuv):
    """R', G', B' [1, 3, H, W] in [0, 1] to the integers of 4:4:4 planes, by the equations of BT.709-6, 3.2 to 3.4."""
    red, green, blue = yuv.luma_weights
    r, g, b = rgb.double().unbind(1)
    y = red * r + green * g + blue * b
    middle = 1 << (yuv.bits - 1)
    values = (
        y * yuv.luma_span + yuv.black,
        (b - y) / (2 - 2 * blue) * yuv.chroma_span + middle,
        (r - y) / (2 - 2 * red) * yuv.chroma_span + middle,
    )
    return [(v + 0.5).floor().clamp(0, 2**yuv.bits - 1).int().to(yuv.dtype)[:, None] for v in values]


def test_published_numbers():
    ten = YuvFormat(bits=10)
    assert (ten.black, ten.black + ten.luma_span, ten.chroma_span) == (64, 940, 896)  # BT.709-6, 4.6
    # BT.2087-0, 2.1: linear BT.709 to linear BT.2020
    expected = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    matrix = _to_xyz("bt2020").inverse() @ _to_xyz("bt709")
    assert largest_error(matrix, torch.tensor(expected)) < 5e-5
    assert YuvFormat("420").chroma_size(5, 7) == (3, 4) and YuvFormat("422").chroma_size(5, 7) == (5, 4)


def test_opencv():
    cv2 = pytest.importorskip("cv2")
    yuv = YuvFormat("444", 8, "bt601", True)
    rgb = torch.randint(0, 256, (1, 3, 64, 65), dtype=torch.uint8)
    image = rgb[0].permute(1, 2, 0).contiguous().numpy()
    y, u, v = planes(rgb / 255, yuv)
    theirs = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb).astype(np.int64)  # Y, Cr, Cb; full range of BT.601
    for ours, channel in ((y, 0), (v, 1), (u, 2)):
        assert np.abs(ours[0, 0].numpy().astype(np.int64) - theirs[..., channel]).max() <= 1
    back = (reference.yuv_to_rgb(y, u, v, yuv) * 255).round().clamp(0, 255)
    decoded = cv2.cvtColor(np.ascontiguousarray(theirs.astype(np.uint8)), cv2.COLOR_YCrCb2RGB)
    assert np.abs(back[0].permute(1, 2, 0).numpy() - decoded).max() <= 3


def test_opencv_decodes_our_planes():
    """4:2:0 of limited BT.601, as OpenCV reads a frame of video: flat areas come out with the colour asked for."""
    cv2 = pytest.importorskip("cv2")
    yuv = YuvFormat("420", 8, "bt601")
    wished = torch.tensor([[30.0, 20.0], [-20.0, 25.0], [10.0, -35.0], [0.0, 0.0]])
    for ab, level in itertools.product(wished, (70, 120, 180)):
        luma = torch.full((1, 1, 16, 16), level, dtype=torch.uint8)
        guide = fastcolor.luma_to_lightness(luma, full_range=False)[..., ::4, ::4]
        u, v = fastcolor.render_uv(ab.reshape(1, 2, 1, 1).expand(1, 2, 4, 4), guide, luma, yuv)
        frame = torch.cat([p.reshape(-1, 16) for p in (luma, u, v)]).numpy()
        rgb = torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_YUV2RGB_I420))
        found = lab.rgb_to_lab(rgb, channels_last=True, dtype=torch.float64)[8, 8]
        assert (found[1:] - ab).abs().max() < 2.5, (ab, level)  # a level of Cb or Cr is up to 2 in a or b


@pytest.mark.parametrize("yuv", FORMATS, ids=lambda f: f"{f.bits}-{f.matrix}-{'full' if f.full_range else 'limited'}")
def test_what_a_player_decodes(yuv):
    """Colours that exist at their luma come back with their a and b, and nothing leaves [0, 1] but by rounding."""
    rgb = torch.rand(1, 3, 24, 25, dtype=torch.float64) * 0.5 + 0.25
    color = lab.rgb_to_lab(rgb)
    luma = planes(rgb, yuv)[0]
    before = luma.clone()
    ab = color[:, 1:].float()
    u, v = fastcolor.render_uv(ab, fastcolor.luma_to_lightness(luma, yuv.bits, yuv.full_range), luma, yuv, scale=(1, 1))
    assert torch.equal(luma.int(), before.int())
    decoded = reference.yuv_to_rgb(luma, u, v, yuv)
    error = (lab.rgb_to_lab(decoded)[:, 1:] - color[:, 1:]).abs()
    assert error.mean() < (0.6 if yuv.bits == 8 else 0.3)
    wild = torch.randn(1, 2, 24, 25) * 90
    u, v = fastcolor.render_uv(wild, torch.rand(1, 1, 24, 25) * 100, luma, yuv, scale=(1, 1))
    decoded = reference.yuv_to_rgb(luma, u, v, yuv)
    assert decoded.min() > -2 / 2**yuv.bits and decoded.max() < 1 + 2 / 2**yuv.bits


@pytest.mark.parametrize("location", ["left", "center", "topleft"])
@pytest.mark.parametrize("subsampling", ["420", "422"])
def test_chroma_lies_where_it_should(subsampling, location):
    """A ramp of luma: at each chroma sample it has the value of its place."""
    yuv = YuvFormat(subsampling, 16, full_range=True, chroma_location=location)
    (down, across), cosited = yuv.steps, yuv.cosited
    y = torch.arange(12.0, dtype=torch.float64)[:, None] * 100 + torch.arange(16.0, dtype=torch.float64)
    at = reference.luma_at_chroma(y[None, None], yuv)[0, 0]
    offsets = [(0 if c else 0.5) if s == 2 else 0 for s, c in zip((down, across), cosited, strict=True)]
    rows = torch.arange(at.shape[0]) * down + offsets[0]
    columns = torch.arange(at.shape[1]) * across + offsets[1]
    expected = rows[:, None] * 100 + columns
    inner = (slice(1, None), slice(1, None))  # the first samples repeat the border
    assert torch.allclose(at[inner], expected[inner].double())


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("subsampling", "location"), [(s, p) for s in ("422", "420") for p in LOCATIONS])
def test_colours_are_taken_from_where_chroma_lies(subsampling, location, backend):
    """On flat luma, a chroma sample has the colour of 4:4:4 at its place: on a luma sample, or between two."""
    ab = torch.linspace(-30, 30, 8)
    luma, guide = torch.full((1, 1, 32, 32), 30000, dtype=torch.int32).to(torch.uint16), torch.full((1, 1, 8, 8), 50.0)
    for across in (False, True):
        ramp = (ab if across else ab[:, None]).expand(1, 2, 8, 8)
        with fastcolor.use_backend(backend):
            full = fastcolor.render_uv(ramp, guide, luma, YuvFormat("444", 16, full_range=True))[0]
            yuv = YuvFormat(subsampling, 16, full_range=True, chroma_location=location)
            ours = fastcolor.render_uv(ramp, guide, luma, yuv)[0]
        line, own = (x[0, 0, :, 8].double() if not across else x[0, 0, 8].double() for x in (full, ours))
        step = yuv.steps[across]
        on_sample = {"topleft": (True, True), "left": (False, True), "center": (False, False)}[location][across]
        expected = line if step == 1 else line[::2] if on_sample else (line[::2] + line[1::2]) / 2
        inner = slice(3, -3)
        assert (line[inner].diff().abs() > 100).all()  # the ramp is there to tell one place from another
        assert (own[inner] - expected[inner]).abs().max() <= 60  # half a luma sample is 400 or more


def test_reference_planes_do_not_depend_on_autocast():
    ab, guide = torch.randn(1, 2, 4, 4) * 20, torch.full((1, 1, 4, 4), 50.0)
    luma = torch.randint(16, 236, (1, 1, 16, 16), dtype=torch.uint8)
    with fastcolor.use_backend("reference"):
        plain = fastcolor.render_uv(ab, guide, luma, YuvFormat())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(map(torch.equal, fastcolor.render_uv(ab, guide, luma, YuvFormat()), plain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subsampling": "411"}, "subsampling must be one of 444, 422, 420; got '411'"),
        ({"bits": 7}, "bits must be from 8 to 16, got 7"),
        ({"matrix": "rgb"}, "matrix must be one of bt601, bt709, bt2020; got 'rgb'"),
        ({"chroma_location": "top"}, "chroma_location must be one of left, center, topleft; got 'top'"),
    ],
)
def test_format_errors(change, message):
    with pytest.raises(ValueError, match=message):
        YuvFormat(**change)


def test_errors():
    with pytest.raises(TypeError, match="luma must be torch.uint16 for 10 bits, got torch.uint8"):
        fastcolor.luma_to_lightness(torch.zeros(3, dtype=torch.uint8), 10)
    frame = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="guide needs the size of ab"):
        fastcolor.render_uv(torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 3, 2), frame, YuvFormat())


def test_reference_compiles_whole():
    ab, guide = torch.randn(1, 2, 2, 2, dtype=torch.float64) * 20, torch.full((1, 1, 2, 2), 50.0, dtype=torch.float64)
    luma = torch.randint(16, 236, (1, 1, 8, 8), dtype=torch.uint8)
    compiled = torch.compile(lambda *x: fastcolor.render_uv(*x, YuvFormat()), backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(ab, guide, luma), fastcolor.render_uv(ab, guide, luma, YuvFormat())))
