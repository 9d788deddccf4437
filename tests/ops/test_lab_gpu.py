"""RGB ↔ Lab on a CUDA device: the backends cuda and triton against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from helpers import largest_error
from test_lab import SHAPES, all_bytes, in_order, some_lab, some_rgb

import fastcolor
from fastcolor.ops import _backend
from fastcolor.reference import lab as reference

pytestmark = pytest.mark.gpu

LAYOUTS = ["planar", "interleaved", "strided"]
GAMUTS = ["clip", "preserve_lightness"]


def on(name):
    reason = _backend.missing(name) or _backend.runs_on(name, torch.device("cuda"))
    if reason is None and not torch.cuda.is_available():  # the interpreter needs no device, these tests do
        reason = f"backend {name!r} on a device: torch sees none"
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


@pytest.fixture(params=[on("cuda"), on("triton")])
def backend(request):
    with fastcolor.use_backend(request.param):
        yield request.param


def test_all_byte_colours(backend):
    """|ΔLab| <= 1e-3 against float64 on every 8-bit colour, and all of them come back: planar and interleaved."""
    rgb = all_bytes().cuda()
    lab = fastcolor.rgb_to_lab(rgb)
    worst = max(
        largest_error(lab[:, rows : rows + 512], reference.rgb_to_lab(rgb[:, rows : rows + 512], dtype=torch.float64))
        for rows in range(0, 4096, 512)
    )
    print(f"{backend}: largest |ΔLab| {worst:.3g}")
    assert worst <= 1e-3
    assert torch.equal(fastcolor.lab_to_rgb(lab, dtype=torch.uint8), rgb)
    last = rgb.movedim(0, -1).contiguous()
    lab_last = fastcolor.rgb_to_lab(last, channels_last=True)
    assert largest_error(lab_last.movedim(-1, 0), lab) <= 2e-4
    assert torch.equal(fastcolor.lab_to_rgb(lab_last, channels_last=True, dtype=torch.uint8), last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 32, 64), (3, 3, 31, 124)], ids=str)
def test_forward_matches_float64(backend, shape, layout, channels_last):
    rgb, lab = in_order(some_rgb(shape).cuda(), layout), in_order(some_lab(shape).cuda(), layout)
    if channels_last:
        rgb, lab = rgb.movedim(-3, -1), lab.movedim(-3, -1)
    to_lab = fastcolor.rgb_to_lab(rgb, channels_last=channels_last)
    assert to_lab.is_contiguous()
    assert largest_error(to_lab, reference.rgb_to_lab(rgb.double(), channels_last)) <= 1e-3
    for gamut, bound in zip(GAMUTS, (1e-5, 5e-4), strict=True):  # bisection leaves 2^-16 of the chroma
        to_rgb = fastcolor.lab_to_rgb(lab, channels_last=channels_last, gamut=gamut)
        assert to_rgb.is_contiguous()
        assert largest_error(to_rgb, reference.lab_to_rgb(lab.double(), channels_last, gamut=gamut)) <= bound


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("width", [37, 64])  # without and with vector accesses
def test_integers(backend, dtype, channels_last, width):
    top = reference.LEVELS[dtype]
    levels = torch.randint(0, top + 1, (2, 31, width, 3) if channels_last else (2, 3, 31, width), dtype=torch.int32)
    levels.flatten()[:4] = torch.tensor([0, top, 1, top - 1])
    rgb = levels.to(dtype)
    exact = reference.rgb_to_lab(rgb, channels_last, dtype=torch.float64)
    lab = fastcolor.rgb_to_lab(rgb.cuda(), channels_last=channels_last)
    assert lab.dtype == torch.float32
    assert largest_error(lab.cpu(), exact) <= 1e-3
    back = fastcolor.lab_to_rgb(lab, channels_last=channels_last, dtype=dtype).cpu()
    off = (back.to(torch.int32) - levels).abs()
    # 8 bits come back exactly; float32 Lab holds 16 bits to within one level, and nearly always exactly
    assert off.max() <= (0 if dtype == torch.uint8 else 1) and (off > 0).float().mean() <= 1e-3


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(backend, dtype, channels_last):
    rgb, lab = some_rgb((2, 3, 16, 20), dtype).cuda(), some_lab((2, 3, 16, 20), dtype).cuda()
    if channels_last:
        rgb, lab = rgb.movedim(1, -1), lab.movedim(1, -1)
    to_lab = fastcolor.rgb_to_lab(rgb, channels_last=channels_last)
    to_rgb = fastcolor.lab_to_rgb(lab, channels_last=channels_last)
    assert to_lab.dtype == to_rgb.dtype == dtype
    exact = reference.rgb_to_lab(rgb.double(), channels_last)
    eps = torch.finfo(dtype).eps
    assert ((to_lab.double() - exact).abs() <= 1e-3 + exact.abs() * eps).all()
    assert largest_error(to_rgb, reference.lab_to_rgb(lab.double(), channels_last)) <= 1e-5 + eps / 2


@pytest.mark.parametrize("gamut", GAMUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 17, 19), (2, 3, 32, 64)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_match_float64(backend, gamut, layout, shape, channels_last):
    rgb, lab = some_rgb(shape), some_lab(shape)
    lab[0, 1:, 0, :5] = 0  # greys
    for convert, exactly, x, options in (
        (fastcolor.rgb_to_lab, reference.rgb_to_lab, rgb, {}),
        (fastcolor.lab_to_rgb, reference.lab_to_rgb, lab, {"gamut": gamut}),
    ):
        x, upstream = in_order(x.cuda(), layout), torch.randn(x.shape, device="cuda")
        if channels_last:
            x, upstream = x.movedim(1, -1), upstream.movedim(1, -1)
        fast, exact = x.detach().requires_grad_(), x.double().requires_grad_()
        convert(fast, channels_last=channels_last, **options).backward(upstream)
        exactly(exact, channels_last, **options).backward(upstream.double())
        error = (fast.grad.double() - exact.grad).abs()
        # relative to the pixel's own gradient; at a kink (a knee, a gamut bound) either side is right
        channel = -1 if channels_last else 1
        scale = exact.grad.abs().amax(channel, keepdim=True) + 1e-3
        assert (error / scale > 2e-3).any(channel).float().mean() <= 0.005
        assert fast.grad.isfinite().all()


def test_address_off_by_one_sample(backend):
    """A view that starts inside a buffer is contiguous and not aligned to 16 bytes."""
    rgb = torch.randint(0, 256, (3 * 64 * 64 + 1,), dtype=torch.uint8, device="cuda")[1:].reshape(64, 64, 3)
    lab = fastcolor.rgb_to_lab(rgb, channels_last=True)
    assert largest_error(lab, reference.rgb_to_lab(rgb, True, dtype=torch.float64)) <= 1e-3
    assert torch.equal(fastcolor.lab_to_rgb(lab, channels_last=True, dtype=torch.uint8), rgb)


def test_nan(backend):
    lab = torch.tensor([float("nan"), 0.0, 0.0], device="cuda").reshape(3, 1, 1)
    for gamut in GAMUTS:
        assert fastcolor.lab_to_rgb(lab, gamut=gamut).isnan().all()
        assert (fastcolor.lab_to_rgb(lab, dtype=torch.uint8, gamut=gamut) == 0).all()
    assert fastcolor.rgb_to_lab(torch.full((3, 1, 1), float("nan"), device="cuda")).isnan().all()


def test_current_stream(backend):
    """The kernel waits for what was queued before it on its own stream, and for nothing else."""
    rgb = torch.zeros(3, 512, 512, device="cuda")
    fastcolor.rgb_to_lab(rgb)  # compiled and loaded
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fastcolor.rgb_to_lab(rgb)  # its memory is allocated: an allocation waits for the device
        torch.cuda._sleep(2_000_000_000)  # clock cycles, about a second
        rgb.fill_(1.0)
        lab = fastcolor.rgb_to_lab(rgb)
        assert not stream.query()  # asynchronous, and queued here
    stream.synchronize()
    assert largest_error(lab[0], torch.full_like(lab[0], 100)) <= 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_of_the_tensor(backend):
    rgb = torch.rand(3, 8, 9, device="cuda:1")
    with torch.cuda.device(0):
        lab = fastcolor.rgb_to_lab(rgb)
    assert lab.device == rgb.device
    assert largest_error(lab, reference.rgb_to_lab(rgb.double())) <= 1e-3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_opcheck(backend, layout, dtype):
    rgb = (torch.rand(2, 3, 4, 5, device="cuda") * 255).to(dtype).contiguous(memory_format=layout)
    lab = some_lab((2, 3, 4, 5)).cuda().contiguous(memory_format=layout)
    ops = torch.ops.fastcolor
    torch.library.opcheck(ops.rgb_to_lab.default, (rgb, False, torch.float32))
    torch.library.opcheck(ops.rgb_to_lab.default, (rgb.movedim(1, -1), True, torch.float32))
    torch.library.opcheck(ops.lab_to_rgb.default, (lab, False, dtype, True))
    torch.library.opcheck(ops.lab_to_rgb.default, (lab.movedim(1, -1), True, dtype, False))
    if dtype == torch.float32:
        torch.library.opcheck(ops.rgb_to_lab_backward.default, (lab, rgb, False))
        torch.library.opcheck(ops.lab_to_rgb_backward.default, (rgb, lab, False, True))


def test_compile_fullgraph(backend):
    rgb = torch.rand(2, 3, 8, 9, device="cuda", requires_grad=True)

    def through(x):
        return fastcolor.lab_to_rgb(fastcolor.rgb_to_lab(x) * 0.9, gamut="preserve_lightness")

    expected, result = through(rgb), torch.compile(through, fullgraph=True)(rgb)
    assert largest_error(result.detach(), expected.detach()) <= 1e-6
    upstream = torch.randn_like(result)
    ours, theirs = (torch.autograd.grad(y, rgb, upstream)[0] for y in (result, expected))
    assert largest_error(ours, theirs) <= 1e-4


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 24 << 30, reason="needs 24 GB of free device memory"
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_2_to_the_31_elements(backend, channels_last):
    pixels = (1 << 31) // 3 + 12345  # of one image: 2^31 samples and some
    rgb = torch.full((1, pixels, 3) if channels_last else (3, 1, pixels), 128, dtype=torch.uint8, device="cuda")
    rgb.view(-1)[-5:] = 7
    lab = fastcolor.rgb_to_lab(rgb, channels_last=channels_last, dtype=torch.float32)
    back = fastcolor.lab_to_rgb(lab, channels_last=channels_last, dtype=torch.uint8)
    assert torch.equal(back, rgb)


def test_auto_takes_the_fastest_that_is_there(backend):
    with fastcolor.use_backend("auto"):
        choice = _backend.choose("rgb_to_lab", torch.device("cuda"))
    assert choice.name == next(n for n in ("cuda", "triton") if _backend.missing(n) is None)
