from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from films import luma, tiny

import fastcolor
from fastcolor.bins import ColorBins
from fastcolor.video.colorizer import VideoColorizer, VideoOptions
from fastcolor.video.control import (
    Control,
    ControlError,
    Hint,
    hints_unary,
    load_control,
    read_hints,
    read_palette,
    reference_histogram,
)

JOINT = ColorBins()
RED = (53.24, 80.09, 67.20)  # Lab of #ff0000


def write(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- hints ------------------------------------------------------------------------------------------------------------


def test_hints(tmp_path):
    path = write(tmp_path, "h.json", {
        "size": [200, 100],
        "hints": [
            {"x": 50, "y": 50, "radius": 10, "color": "#ff0000", "frames": [3, 9]},
            {"box": [0, 0, 200, 50], "ab": [-5, -30.5], "strength": 5, "follow": True},
            {"x": 0, "y": 100, "color": "ff0000", "frames": [4, None]},
        ],
    })  # fmt: skip
    point, box, corner = read_hints(path)
    assert point.ab == pytest.approx(RED[1:], abs=0.01) and point.round and point.strength == 20
    assert point.box == pytest.approx((0.2, 0.4, 0.3, 0.6)) and [point.at(n) for n in (2, 3, 9, 10)] == [0, 1, 1, 0]
    assert box == Hint((-5.0, -30.5), (0, 0, 1, 0.5), False, 0, None, 5.0, True)
    assert corner.at(10**6) and not corner.at(3) and corner.mask(4, 5).nonzero().tolist() == [[3, 0]]


def test_hints_without_a_size_are_shares(tmp_path):
    (hint,) = read_hints(write(tmp_path, "h.json", {"hints": [{"x": 0.5, "y": 0.25, "radius": 0.1, "ab": [1, 2]}]}))
    assert hint.box == pytest.approx((0.4, 0.15, 0.6, 0.35))


def test_mask():
    inside = Hint((0, 0), (0.25, 0.25, 0.75, 0.75)).mask(8, 8)
    assert inside[3:5, 3:5].all() and not inside[2, 2] and not inside[:2].any()  # an ellipse
    assert Hint((0, 0), (0.25, 0.25, 0.75, 0.75), round=False).mask(8, 8).sum() == 16
    assert Hint((0, 0), (0.3, 0.3, 0.3, 0.3)).mask(8, 8).sum() == 1  # at least one cell


def test_hints_unary_is_that_of_the_package():
    hints = [Hint((60.0, 40.0), (0, 0, 0.5, 1), round=False), Hint((-30.0, 10.0), (0, 0, 1, 0.25), False, strength=5.0)]
    unary = hints_unary(hints, [hint.mask(4, 6) for hint in hints], JOINT)
    assert unary.shape == (1, 313, 4, 6)
    assert unary[0, :, 3, 0].argmax() == JOINT.nearest(torch.tensor([60.0, 40.0]))[0].item()
    assert unary[0, :, 0, 0].max() == pytest.approx(5)  # the later one goes over the earlier one
    assert unary[0, :, 3, 5].abs().max() == 0


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON: .* line 1"),
        ([], "the file must be an object"),
        ({"hint": []}, "the file has 'hint', known are size, hints"),
        ({"hints": 3}, "hints must be a list, got 3"),
        ({"size": [0, 2], "hints": []}, r"size must be \[width, height\], got \[0, 2\]"),
        ({"hints": ["red"]}, r'hints\[0\] must be an object, got "red"'),
        ({"hints": [{"ab": [0, 0]}]}, r"hints\[0\] must have either x and y, or box"),
        ({"hints": [{"x": 0.5, "ab": [0, 0]}]}, r"hints\[0\]\.y must be a number from 0 to 1, got null"),
        ({"hints": [{"x": 1.5, "y": 0, "ab": [0, 0]}]}, r"hints\[0\]\.x must be a number from 0 to 1, got 1.5"),
        ({"hints": [{"x": True, "y": 0, "ab": [0, 0]}]}, r"hints\[0\]\.x must be a number"),
        ({"hints": [{"box": [0.5, 0, 0.5, 1], "ab": [0, 0]}]}, r"hints\[0\]\.box must be \[left, top, right, bottom\]"),
        ({"hints": [{"x": 0, "y": 0}]}, r"hints\[0\] must have either color or ab"),
        ({"hints": [{"x": 0, "y": 0, "color": "red"}]}, r"hints\[0\]\.color must be a colour like #c03028, got"),
        ({"hints": [{"x": 0, "y": 0, "ab": [0, 300]}]}, r"hints\[0\]\.ab must be \[a, b\], each from -128 to 128"),
        ({"hints": [{"x": 0, "y": 0, "ab": [0, 0], "frames": [5, 4]}]}, r"hints\[0\]\.frames must be \[first, last\]"),
        ({"hints": [{"x": 0, "y": 0, "ab": [0, 0], "frames": 5}]}, r"hints\[0\]\.frames must be \[first, last\]"),
        ({"hints": [{"x": 0, "y": 0, "ab": [0, 0]}, {"x": 0, "y": 0, "ab": [0, 0], "strength": -1}]}, r"hints\[1\]\.s"),
        ({"hints": [{"x": 0, "y": 0, "ab": [0, 0], "follow": 1}]}, r"hints\[0\]\.follow must be true or false, got 1"),
        ({"hints": [{"x": 0, "y": 0, "ab": [0, 0], "frame": 5}]}, r"hints\[0\] has 'frame', known are x, y"),
    ],
)  # fmt: skip
def test_bad_hints(tmp_path, content, message):
    path = write(tmp_path, "hints.json", content)
    with pytest.raises(ControlError, match=message) as error:
        read_hints(path)
    assert str(error.value).startswith(str(path))


def test_hints_that_are_no_file(tmp_path):
    with pytest.raises(ControlError, match="none.json: No such file"):
        read_hints(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ControlError, match="b.json: not a text file"):
        read_hints(tmp_path / "b.json")


# --- palette ----------------------------------------------------------------------------------------------------------


def test_palette(tmp_path):
    text = write(tmp_path, "p.txt", "#ff0000 the coat\n\n0000ff\n")
    listed = write(tmp_path, "p.json", ["#ff0000", "#0000ff"])
    assert read_palette(text) == read_palette(listed) and len(read_palette(text)) == 2
    assert read_palette(text)[0] == pytest.approx(RED[1:], abs=0.01)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", "#ff0000\nblue\n", 'line 2 must be a colour like #c03028, got "blue"'),
        ("p.txt", "\n", "no colour in it"),
        ("p.json", ["#ff0000", 3], "color 2 must be a colour like"),
        ("p.json", [], "the file must be a list of colours"),
    ],
)
def test_bad_palette(tmp_path, name, content, message):
    with pytest.raises(ControlError, match=message):
        read_palette(write(tmp_path, name, content))


def colors_of(planes):
    u, v = (torch.stack([p[i] for p in planes]).float() - 128 for i in (0, 1))
    return u, v


def colored(control, colorizer=None, frames=3):
    video = VideoColorizer(colorizer or tiny(), options=VideoOptions(lookahead=1), control=control)
    return [plane for _ in range(frames) for plane in video.push(luma())]


@pytest.mark.parametrize("bins", ["joint", "separable"])
def test_palette_keeps_colours_near(bins):
    u, v = colors_of(colored(Control(palette=((40.0, 30.0),)), tiny(bins=bins)))
    assert (v > 5).float().mean() > 0.95 and (u < 0).float().mean() > 0.9  # orange
    u, v = colors_of(colored(Control(palette=((0.0, 0.0),)), tiny(bins=bins)))
    assert max(u.abs().mean(), v.abs().mean()) < 4  # grey


def test_strength_0_is_nothing():
    counts = torch.zeros(313)
    counts[5] = 1
    for control in (Control(palette=((40.0, 30.0),), strength=0.0), Control(reference=counts, strength=0.0), Control()):
        assert all(
            torch.equal(a, b)
            for p, q in zip(colored(control), colored(None), strict=True)
            for a, b in zip(p, q, strict=True)
        )


# --- reference --------------------------------------------------------------------------------------------------------


def test_reference_takes_the_place_of_the_prior():
    prior, wanted = torch.rand(313) + 0.1, torch.rand(313) + 0.1
    p, w = (JOINT.smoothed_prior(x, 10.0) + 1e-4 / 313 for x in (prior, wanted))
    ratio = (w / w.sum()).log() - (p / p.sum()).log()
    unary = Control(reference=wanted).unary(JOINT, prior, 0.0).flatten()
    assert (unary - ratio.float()).abs().max() < 1e-4
    assert Control(reference=prior).unary(JOINT, prior, 0.0).abs().max() < 1e-5  # nothing to change
    vivid = Control(reference=wanted).unary(JOINT, prior, 0.5).flatten()
    assert (vivid - unary - 0.5 * JOINT.rebalancing_weights(w).log().float()).abs().max() < 1e-4
    half = Control(reference=wanted, strength=0.5).unary(JOINT, prior, 0.0).flatten()
    assert (half - 0.5 * unary).abs().max() < 1e-5


def save(path, rgb):
    import pyvips

    pyvips.Image.new_from_array(rgb).copy(interpretation="srgb").write_to_file(str(path))
    return path


def test_reference_picture(tmp_path):
    rgb = np.zeros((20, 30, 3), np.uint8)
    rgb[:] = (255, 0, 0)
    rgb[:5] = (0, 0, 255)
    counts = reference_histogram(save(tmp_path / "r.png", rgb), JOINT)
    labels = JOINT.nearest(
        fastcolor.rgb_to_lab(torch.tensor([[255, 0, 0], [0, 0, 255]]).byte().T[..., None])[1:, :, 0].T
    )[0]
    assert (counts[labels.flatten()] / counts.sum()).tolist() == pytest.approx([0.75, 0.25])
    u, v = colors_of(colored(load_control(JOINT, reference=save(tmp_path / "red.png", rgb[5:]))))
    assert v.mean() > 20


def test_reference_film(tmp_path):
    import av

    path = tmp_path / "r.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for t in range(12):
            rgb = np.zeros((48, 64, 3), np.uint8)
            rgb[:] = (200, 30, 30) if t < 6 else (30, 30, 200)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    counts = reference_histogram(path, JOINT, frames=12)
    ab = JOINT.centers[counts > 0.2 * counts.sum()]
    assert len(ab) == 2 and (ab[:, 0] > 0).all() and (ab[:, 1] > 0).sum() == 1


def test_bad_reference(tmp_path):
    with pytest.raises(ControlError, match="none.png: no such file"):
        reference_histogram(tmp_path / "none.png", JOINT)
    with pytest.raises(ControlError, match="text.mp4: neither a picture nor a film"):
        reference_histogram(write(tmp_path, "text.mp4", "hello"), JOINT)
    with pytest.raises(ControlError, match="text.png"):
        reference_histogram(write(tmp_path, "text.png", "hello"), JOINT)
    with pytest.raises(ControlError, match="needs colour, this is grey"):
        reference_histogram(save(tmp_path / "grey.png", np.full((8, 8, 3), 90, np.uint8)), JOINT)
    with pytest.raises(ControlError, match=r"reference must have shape \[50\], got \[313\]"):
        Control(reference=torch.ones(313)).unary(ColorBins("separable"), None, 0.0)


# --- together ---------------------------------------------------------------------------------------------------------


def test_load_control(tmp_path):
    hints = write(tmp_path, "h.json", {"hints": [{"x": 0.5, "y": 0.5, "ab": [10, 10]}]})
    control = load_control(JOINT, hints=hints, palette=write(tmp_path, "p.txt", "#ff0000\n"))
    assert len(control.hints) == 1 and len(control.palette) == 1 and control.reference is None
    assert load_control(None) == Control()
    with pytest.raises(ControlError, match="distribution head"):
        load_control(None, hints=hints)
    with pytest.raises(ControlError, match="strength must be between 0 and 1, got 2"):
        load_control(JOINT, strength=2)


def test_regression_takes_no_control():
    with pytest.raises(ControlError, match="distribution head"):
        VideoColorizer(tiny(head="regression"), control=Control(palette=((0.0, 0.0),)))
