"""The rendering on a CUDA device: the backends cuda and triton under the tests of test_render.py, and what needs a
device.
"""

from __future__ import annotations

import pytest
import torch
from helpers import Backend, largest_error
from test_lab_gpu import on
from test_render import (  # noqa: F401, they are collected here too
    exactly,
    formats,
    scene,
    test_chroma_planes_match_float64,
    test_compile_fullgraph,
    test_every_luma,
    test_luma_rows_that_lie_apart,
    test_matches_float64,
    test_nan,
    test_opcheck,
    test_other_inputs,
    test_types_of_numbers,
)

import fastcolor
from fastcolor.ops import _backend

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[on("cuda"), on("triton")])
def backend(request):
    with fastcolor.use_backend(request.param):
        yield Backend(request.param, "cuda")


@pytest.fixture
def simd():
    """No instruction sets here."""


@pytest.mark.parametrize("width", [640, 645])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("gamut", ["clip", "preserve_lightness"])
def test_a_picture(backend, gamut, channels_last, width):
    """Many blocks, and blocks that loop. Bisection may find another border of sRGB where a line crosses several."""
    inputs = scene((120, 160), (480, width), batch=16, device="cuda")
    options = {"gamut": gamut, "channels_last": channels_last}
    off = (fastcolor.render(*inputs, **options).double() - exactly(*inputs, **options) * 255).abs()
    assert (off > (0.51 if gamut == "clip" else 0.76)).double().mean() <= 1e-5


def test_current_stream(backend):
    """The kernels wait for what was queued before them on their own stream, and the host waits for nothing."""
    ab, guide, L = scene((32, 32), (512, 512), batch=1, device="cuda")
    luma = torch.full((1, 1, 512, 512), 100, dtype=torch.uint8, device="cuda")
    expected = fastcolor.render(ab, guide, torch.full_like(L, 50.0))  # compiled, and tables made
    planes = fastcolor.render_uv(ab, guide, luma, fastcolor.YuvFormat())
    fastcolor.luma_to_lightness(luma)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fastcolor.render(ab, guide, L), fastcolor.luma_to_lightness(luma)  # memory is there: an allocation waits
        fastcolor.render_uv(ab, guide, luma, fastcolor.YuvFormat())
        torch.cuda._sleep(2_000_000_000)  # clock cycles, about a second
        L.fill_(50.0)
        rgb = fastcolor.render(ab, guide, L)
        again = fastcolor.render_uv(ab, guide, luma, fastcolor.YuvFormat())
        fastcolor.luma_to_lightness(luma)
        assert not stream.query()  # asynchronous, and queued here
    stream.synchronize()
    assert torch.equal(rgb, expected)
    assert all(torch.equal(a, b) for a, b in zip(again, planes, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_of_the_tensor(backend):
    inputs = scene((3, 4), (9, 16), device="cuda:1")
    with torch.cuda.device(0):
        rgb = fastcolor.render(*inputs, dtype=torch.float32, gamut="clip")
    assert rgb.device == inputs[0].device
    assert largest_error(rgb, exactly(*inputs)) <= 2e-5


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 16 << 30, reason="needs 16 GB of free device memory"
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_2_to_the_31_samples(backend, channels_last):
    ab = torch.zeros(1, 2, 8, 8, device="cuda")
    L = torch.full((1, 1, 32768, 22000), 50.0, dtype=torch.float16, device="cuda")  # 3 × 0.72e9 samples of the result
    L[..., -1, -5:] = 100.0
    rgb = fastcolor.render(ab, ab[:, :1], L, channels_last=channels_last)
    last = rgb if channels_last else rgb.movedim(1, -1)
    assert (last[0, -1, -5:] == 255).all() and (last[0, -1, -9:-5] == 119).all()  # L = 50 is level 119
    assert (last[0, :, 0] == 119).all()


def test_auto_takes_the_fastest_that_is_there(backend):
    with fastcolor.use_backend("auto"):
        for name in ("render", "render_uv", "luma_to_lightness"):
            choice = _backend.choose(name, torch.device("cuda"))
            assert choice.name == next(n for n in ("cuda", "triton") if _backend.missing(n) is None)
