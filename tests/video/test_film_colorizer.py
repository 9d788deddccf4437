from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from films import luma, tiny

import fastcolor
from fastcolor.ops.render import luma_to_lightness, render_uv
from fastcolor.video.colorizer import VideoColorizer, VideoOptions
from fastcolor.video.control import Control, Hint
from fastcolor.yuv import YuvFormat


@pytest.fixture(scope="module")
def colorizer():
    return tiny(64)


def film(frames=10, **options):
    """A pan to the right, two pixels a frame."""
    return [luma(x=2 * t, **options) for t in range(frames)]


def colored(colorizer, frames, format=None, control=None, **options):
    video = VideoColorizer(colorizer, format, VideoOptions(**options), control)
    planes = [plane for frame in frames for plane in video.push(frame)] + video.flush()
    return planes, video


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q))  # noqa: B905


def apart(a, b):
    return max((x.int() - y.int()).abs().max().item() for p, q in zip(a, b, strict=True) for x, y in zip(p, q))  # noqa: B905


def alone(colorizer, plane, format):
    """One frame by itself, with what the package has for pictures."""
    L = luma_to_lightness(plane[None, None], format.bits, format.full_range)
    size = colorizer.network_size(*plane.shape)
    ab, guide = colorizer.predict(torch.nn.functional.interpolate(L, size, mode="bilinear", antialias=True))
    scale = tuple(n / full / colorizer.network.stride for n, full in zip(size, plane.shape, strict=True))
    u, v = render_uv(ab, guide, plane[None, None], format, scale=scale)
    return u[0, 0], v[0, 0]


@pytest.mark.parametrize(
    "head, bins", [("distribution", "joint"), ("distribution", "separable"), ("regression", "joint")]
)
def test_temporal_0_is_each_frame_alone(head, bins):
    colorizer = tiny(head=head, bins=bins)
    frames = film(5)
    planes, video = colored(colorizer, frames, temporal=0, keyframes=1, lookahead=1)
    assert equal(planes, [alone(colorizer, frame, YuvFormat()) for frame in frames])
    assert video.stats.network == 5


@pytest.mark.parametrize(
    "format",
    [
        YuvFormat(bits=10),
        YuvFormat("444", full_range=True),
        YuvFormat("422", bits=10, matrix="bt2020", primaries="bt2020"),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(48, 64), (37, 51)], ids=str)
def test_formats_and_odd_sizes(colorizer, format, size):
    frames = [luma(x=2 * t, height=size[0], width=size[1], bits=format.bits) for t in range(4)]
    planes, _ = colored(colorizer, frames, format)
    for u, v in planes:
        assert u.shape == v.shape == format.chroma_size(*size) and u.dtype == v.dtype == format.dtype
    u, _ = planes[0]
    assert u.int().max() - u.int().min() > 3 * 2 ** (format.bits - 8)  # there is colour
    first, _ = colored(colorizer, frames, format, temporal=0, keyframes=1, lookahead=1)
    assert equal(first[:1], [alone(colorizer, frames[0], format)])


def test_rows_may_lie_apart(colorizer):
    frames = film(3)
    wide = [torch.nn.functional.pad(frame, (0, 13))[:, : frame.shape[1]] for frame in frames]
    assert not wide[0].is_contiguous()
    assert equal(colored(colorizer, wide)[0], colored(colorizer, frames)[0])


@pytest.mark.parametrize("keyframes", ["auto", 1, 4])
@pytest.mark.parametrize("temporal", [0.0, 0.85, 1.0])
def test_still_picture_has_constant_colours(colorizer, keyframes, temporal):
    planes, video = colored(colorizer, [luma()] * 14, keyframes=keyframes, temporal=temporal)
    assert apart(planes[1:], planes[:-1]) <= 1, "more than rounding"
    assert video.stats.cuts == 0


def test_keyframes_1_sees_every_frame(colorizer):
    _, video = colored(colorizer, film(7), keyframes=1)
    assert video.stats.keyframes == list(range(7)) and video.stats.network == 7


def test_keyframes_n(colorizer):
    _, video = colored(colorizer, film(10), keyframes=4, lookahead=3)
    assert video.stats.keyframes == [0, 4, 8]


def test_auto_comes_where_the_picture_changes(colorizer):
    still = colored(colorizer, [luma()] * 11)[1].stats
    changing = colored(colorizer, [(luma().int() * (10 - t) + luma(2).int() * t).div(10).byte() for t in range(11)])[
        1
    ].stats
    assert still.network == 1 and changing.network > 1
    assert changing.cuts == 0


def test_no_pop_at_keyframes(colorizer):
    """Where nothing moves, a keyframe that sees things differently takes over little by little."""
    one, other = luma().int(), luma().int()
    other[:, 48:] = (other[:, 48:] + 60).clamp_max(235)  # the network's view changes, also on the left
    frames = [one.byte()] * 4 + [other.byte()] * 12
    steps = {}
    for temporal in (0.0, 0.9):
        planes, _ = colored(colorizer, frames, YuvFormat(bits=8), temporal=temporal, keyframes=4, cuts=())
        left = torch.stack([u[:, :16].float() for u, _ in planes])
        steps[temporal] = (left[1:] - left[:-1]).abs().mean((1, 2)).max().item()
    assert steps[0.0] > 3 * steps[0.9] > 0, steps


@pytest.mark.parametrize(
    "options", [{"lookahead": 1}, {"lookahead": 3}, {"lookahead": 64}, {"low_latency": True}], ids=str
)
@pytest.mark.parametrize("count", [0, 1, 7])
def test_every_frame_comes_out_in_order(colorizer, options, count):
    frames = film(count)
    video = VideoColorizer(colorizer, options=VideoOptions(**options))
    held, ready = 0, []
    for frame in frames:
        now = video.push(frame)
        held += 1 - len(now)
        ready += now
        assert held < options.get("lookahead", 1)
    ready += video.flush()
    assert len(ready) == count and video.flush() == [] and video.stats.frames == count
    plain, _ = colored(colorizer, frames, lookahead=1)
    assert count == 0 or apart(ready, plain) <= 1  # batches round differently


@pytest.mark.parametrize("keyframes", ["auto", 3])
def test_goes_on_exactly(colorizer, keyframes):
    frames = film(6) + [luma(7)] * 2 + film(4)
    options = VideoOptions(keyframes=keyframes, lookahead=4)
    whole = VideoColorizer(colorizer, options=options)
    first = VideoColorizer(colorizer, options=options)
    expected, got = [], []
    for frame in frames[:7]:
        expected += whole.push(frame)
        got += first.push(frame)
    expected += whole.flush()
    got += first.flush()
    kept = io.BytesIO()
    torch.save(first.state_dict(), kept)
    second = VideoColorizer(tiny(64), options=options)
    second.load_state_dict(torch.load(io.BytesIO(kept.getvalue()), weights_only=True))
    for frame in frames[7:]:
        expected += whole.push(frame)
        got += second.push(frame)
    assert equal(got + second.flush(), expected + whole.flush())
    assert first.stats.cuts + second.stats.cuts == whole.stats.cuts == 2


def test_state_is_a_copy(colorizer):
    video = VideoColorizer(colorizer, options=VideoOptions(lookahead=1))
    video.push(luma())
    state = video.state_dict()
    before = [x.clone() for x in state["evidence"].values() if isinstance(x, torch.Tensor)]
    for frame in film(4):
        video.push(frame)
    after = [x for x in state["evidence"].values() if isinstance(x, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_cut_starts_anew(colorizer):
    a, b = [luma(1)] * 5, [luma(7)] * 4
    planes, video = colored(colorizer, a + b, lookahead=1)
    assert video.stats.cuts == 1 and 5 in video.stats.keyframes
    assert equal(planes[5:], colored(colorizer, b, lookahead=1)[0])


def test_given_cuts_override(colorizer):
    frames = [luma(1)] * 4 + [luma(7)] * 4
    _, video = colored(colorizer, frames, cuts=(2,))
    assert video.stats.cuts == 1 and video.stats.keyframes[:2] == [0, 2]
    assert colored(colorizer, frames, cuts=())[1].stats.cuts == 0
    late = VideoColorizer(colorizer, options=VideoOptions(cuts=(102,)), first=100)
    for frame in frames:
        late.push(frame)
    late.flush()
    assert late.stats.keyframes[:2] == [100, 102]


def test_motion_carries_colours(colorizer):
    """Of a pan, what was seen before keeps its colour where it goes."""
    frames = film(9)
    by_motion = colored(colorizer, frames, keyframes=100, temporal=0)[0]
    in_place = colored(colorizer, frames, keyframes=100, temporal=0, motion=False)[0]

    def error(planes):  # 16 pixels to the right is 8 chroma samples
        return (planes[8][0][:, 4:20].float() - planes[0][0][:, 12:28].float()).abs().mean()

    assert error(by_motion) < 0.5 * error(in_place)


def hint(**changes):
    return Control((Hint(**{"ab": (60.0, 40.0), "box": (0.3, 0.3, 0.6, 0.6), "first": 3, "last": 5, **changes}),))


def test_hints_are_in_their_frames_alone(colorizer):
    frames = [luma()] * 9
    plain, _ = colored(colorizer, frames)
    hinted, _ = colored(colorizer, frames, control=hint())
    for t in range(9):
        inside = t in (3, 4, 5)
        moved = apart(hinted[t : t + 1], plain[t : t + 1])
        assert moved > 20 if inside else moved <= 1, t
    v = hinted[4][1].int() - plain[4][1].int()
    assert v[9:13, 12:17].min() > 10  # red: more Cr
    assert v[:, -4:].abs().float().mean() < 1  # far from it next to nothing changes


def test_hints_count_by_the_films_frames(colorizer):
    late = VideoColorizer(colorizer, options=VideoOptions(lookahead=1), control=hint(first=7, last=7), first=5)
    plain = VideoColorizer(colorizer, options=VideoOptions(lookahead=1))
    moved = [apart(late.push(luma()), plain.push(luma())) for _ in range(5)]
    assert [t for t, x in enumerate(moved) if x > 20] == [2]


@pytest.mark.parametrize("lookahead", [1, 4])
def test_hints_follow_the_picture(colorizer, lookahead):
    """Of a pan to the right the hint goes to the left, also in a film that goes on from a state."""
    frames = film(11)
    plain, _ = colored(colorizer, frames, lookahead=lookahead)
    where = {}
    for follow in (False, True):
        control = hint(first=2, last=None, box=(0.6, 0.3, 0.8, 0.6), follow=follow)
        options = VideoOptions(lookahead=lookahead)
        first, second = (VideoColorizer(colorizer, options=options, control=control) for _ in range(2))
        planes = [p for frame in frames[:5] for p in first.push(frame)] + first.flush()
        second.load_state_dict(first.state_dict())
        planes += [p for frame in frames[5:] for p in second.push(frame)] + second.flush()
        assert apart(planes[:2], plain[:2]) <= 1
        gain = (planes[10][1].float() - plain[10][1].float()).clamp_min(0)  # more Cr: red
        where[follow] = float((gain * torch.arange(32.0)).sum() / gain.sum())
    assert where[False] == pytest.approx(22.4, abs=2)
    assert where[True] == pytest.approx(22.4 - 8, abs=2.5)  # 16 pixels in eight frames are 8 chroma samples


def test_saturation_is_no_state(colorizer):
    """The field works on what was meant, not on what was shown."""
    pale, _ = colored(colorizer.with_options(saturation=0.0), film(5))
    assert all((plane == 128).all() for frame in pale for plane in frame)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_colorize_is_an_iterator(colorizer):
    frames = [frame.numpy() for frame in film(5)]
    asked = []

    def source():
        for frame in frames:
            asked.append(1)
            yield frame

    for t, rgb in enumerate(VideoColorizer(colorizer, options=VideoOptions(low_latency=True)).colorize(source())):
        assert len(asked) == t + 1
        assert rgb.shape == (48, 64, 3) and rgb.dtype == np.uint8
    assert t == 4


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32, torch.uint8, torch.float32])
def test_colorize_keeps_the_kind(colorizer, kind):
    frames = film(3)
    if kind in (np.uint8, np.uint16, np.float32):
        scale = {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[kind]
        frames = [(frame.numpy().astype(float) * scale).astype(kind) for frame in frames]
        frames = [frames[0], frames[1][..., None], np.stack([frames[2]] * 3, 2)]
        result = list(VideoColorizer(colorizer).colorize(frames))
        assert all(isinstance(rgb, np.ndarray) and rgb.shape == (48, 64, 3) and rgb.dtype == kind for rgb in result)
    else:
        frames = [frame if kind == torch.uint8 else frame / 255 for frame in frames]
        frames = [frames[0], frames[1][None], frames[2].expand(3, -1, -1)]
        result = list(VideoColorizer(colorizer).colorize(frames))
        assert all(isinstance(rgb, torch.Tensor) and rgb.shape == (3, 48, 64) and rgb.dtype == kind for rgb in result)


def test_colorize_alone_is_the_picture(colorizer):
    frames = [frame.numpy() for frame in film(3)]
    options = VideoOptions(temporal=0, keyframes=1, lookahead=1)
    for frame, rgb in zip(frames, VideoColorizer(colorizer, options=options).colorize(frames), strict=True):
        assert np.array_equal(rgb, colorizer.colorize(frame))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, word",
    [
        ({"temporal": 1.5}, "temporal"),
        ({"keyframes": 0}, "keyframes"),
        ({"keyframes": "often"}, "keyframes"),
        ({"keyframes": True}, "keyframes"),
        ({"lookahead": 0}, "lookahead"),
        ({"cuts": (-1,)}, "cuts"),
    ],
)
def test_options(options, word):
    with pytest.raises(ValueError, match=word):
        VideoOptions(**options)


def test_errors(colorizer):
    video = VideoColorizer(colorizer)
    with pytest.raises(TypeError, match="uint8 for 8 bits, got torch.uint16"):
        video.push(luma(bits=10))
    with pytest.raises(ValueError, match=r"\[H, W\], got \[1, 48, 64\]"):
        video.push(luma()[None])
    video.push(luma())
    with pytest.raises(ValueError, match="64×48 came before, now 62×48"):
        video.push(luma(width=62))
    with pytest.raises(RuntimeError, match="1 frames are held back"):
        video.state_dict()
    assert len(video.flush()) == 1  # an error changes nothing
    with pytest.raises(ValueError, match="state"):
        video.load_state_dict({})
    with pytest.raises(TypeError, match="numpy array or a tensor, got str"):
        list(video.colorize(["frame.png"]))
    with pytest.raises(ValueError, match=r"got \[2, 3, 4, 5\]"):
        list(video.colorize([torch.zeros(2, 3, 4, 5)]))
    with pytest.raises(ValueError, match="nan"):
        list(VideoColorizer(colorizer).colorize([np.full((8, 8), np.nan, np.float32)]))


def test_public_names():
    assert fastcolor.VideoColorizer is VideoColorizer and fastcolor.VideoOptions is VideoOptions
