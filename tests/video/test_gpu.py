from __future__ import annotations

import pytest
import torch
from films import luma, tiny

from fastcolor.model.colorizer import Colorizer
from fastcolor.video.colorizer import VideoColorizer, VideoOptions
from fastcolor.video.gpu import Ferry, Graphed
from fastcolor.video.state import evidence_of, still

CPU = torch.device("cpu")


def test_on_a_cpu_nothing_is_in_between():
    plane = luma()
    ferry = Ferry(CPU)
    assert ferry.to_device(plane) is plane
    planes, arrived = ferry.to_host((plane, plane))
    assert planes[0] is plane and arrived is None
    calls = []
    graphed = Graphed(lambda x: calls.append(1) or x + 1)
    assert all(torch.equal(graphed(torch.full((2,), float(i))), torch.full((2,), i + 1.0)) for i in range(4))
    assert len(calls) == 4


class Late:
    """An event that says when it was waited for."""

    def __init__(self, waited, number):
        self.waited, self.number = waited, number

    def synchronize(self):
        self.waited.append(self.number)


def test_results_under_way_come_with_the_next_batch():
    """What a GPU does to the order, with events that are none."""
    video, waited = VideoColorizer(tiny(), options=VideoOptions(lookahead=2)), []
    numbers = iter(range(100))
    video._ferry.to_host = lambda planes: (planes, Late(waited, next(numbers)))
    counts = [len(video.push(luma(x=2 * t))) for t in range(6)]
    assert counts == [0, 0, 0, 2, 0, 2] and waited == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="2 frames are held back"):
        video.state_dict()
    assert len(video.flush()) == 2 and waited == list(range(6))
    video.state_dict()
    now = VideoColorizer(tiny(), options=VideoOptions(low_latency=True))
    now._ferry.to_host = lambda planes: (planes, Late(waited, -1))
    assert [len(now.push(luma())) for _ in range(3)] == [1, 1, 1]


# --- for real ---------------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def planes_of(device, frames, **options):
    there = tiny(64)
    video = VideoColorizer(Colorizer(there.checkpoint, device), options=VideoOptions(**options))
    return [plane for frame in frames for plane in video.push(frame)] + video.flush(), video


@gpu
@needs_cuda
@pytest.mark.parametrize("options", [{"lookahead": 4}, {"low_latency": True}, {"keyframes": 5}, {"bond": 1.0}], ids=str)
@pytest.mark.parametrize("resident", [False, True])
def test_gpu_is_the_cpu(options, resident):
    frames = [luma(x=2 * t) for t in range(14)] + [luma(7)] * 5
    expected, there = planes_of("cpu", frames, **options)
    got, video = planes_of("cuda", [f.cuda() for f in frames] if resident else frames, **options)
    assert len(got) == len(expected) and video.stats.keyframes == there.stats.keyframes
    for pair, right in zip(got, expected, strict=True):
        for plane, x in zip(pair, right, strict=True):
            assert plane.device.type == ("cuda" if resident else "cpu")
            assert (plane.cpu().int() - x.int()).abs().float().mean() < 1  # convolutions in TF32


@gpu
@needs_cuda
def test_graph_is_the_function(caplog):
    _, video = planes_of("cuda", [luma(x=2 * t) for t in range(3)])
    inputs = [
        video._evidence.scores, video._shares(3), video._track.places + 0.3, video._track.guide,
        torch.rand_like(video._track.guide),
    ]  # fmt: skip
    graphed = Graphed(video._carry)
    with torch.inference_mode():
        for _ in range(3):
            inputs = [x.clone() for x in inputs]
            inputs[3] += 1
            assert torch.allclose(graphed(*inputs), video._carry(*inputs), atol=1e-3)
    assert graphed._graph is not None, caplog.text
    guide = inputs[3][..., :4, :5].clone()
    rows = torch.rand(20, inputs[0].shape[1], device="cuda")
    smaller = [evidence_of(rows, rows + 1, guide), inputs[1], still(guide), guide, torch.rand_like(guide)]
    with torch.inference_mode():  # another film: captured anew
        assert torch.allclose(graphed(*smaller), video._carry(*smaller), atol=1e-3)
