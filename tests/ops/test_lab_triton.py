"""The Triton kernels of RGB ↔ Lab without a GPU: in the interpreter (TRITON_INTERPRET=1), and compiled for one."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import largest_error
from test_lab import check_every_byte, every_byte, in_order, some_lab, some_rgb  # noqa: F401, a fixture

import fastcolor
from fastcolor.ops import _backend
from fastcolor.reference import lab as reference

triton = pytest.importorskip("triton", reason="triton is not installed")

interpreted = pytest.mark.skipif(not _backend.interpreting(), reason="runs under TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(_backend.interpreting(), reason="nothing is compiled under TRITON_INTERPRET=1")

# one pixel, one row past a block of 1024, odd, two images, empty
SHAPES = [(3, 1, 1), (2, 3, 1, 1031), (1, 3, 33, 65), (2, 2, 3, 7, 13), (0, 3, 4, 4), (3, 0, 5)]
LAYOUTS = ["planar", "interleaved", "strided"]
GAMUTS = ["clip", "preserve_lightness"]


@pytest.fixture
def on_triton():
    with fastcolor.use_backend("triton"):
        yield


# --- interpreter: arithmetic, masks and addresses; memory that a kernel does not write is nan, see conftest.py ------


@interpreted
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_matches_float64(on_triton, shape, layout, channels_last):
    rgb, lab = in_order(some_rgb(shape), layout), in_order(some_lab(shape), layout)
    if channels_last:
        rgb, lab = rgb.movedim(-3, -1), lab.movedim(-3, -1)
    to_lab = fastcolor.rgb_to_lab(rgb, channels_last=channels_last)
    assert to_lab.is_contiguous()
    assert largest_error(to_lab, reference.rgb_to_lab(rgb.double(), channels_last)) <= 1e-3
    for gamut, bound in zip(GAMUTS, (1e-5, 5e-4), strict=True):  # bisection leaves 2^-16 of the chroma
        to_rgb = fastcolor.lab_to_rgb(lab, channels_last=channels_last, gamut=gamut)
        assert to_rgb.is_contiguous()
        assert largest_error(to_rgb, reference.lab_to_rgb(lab.double(), channels_last, gamut=gamut)) <= bound


@interpreted
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_integers(on_triton, dtype, channels_last):
    top = reference.LEVELS[dtype]
    levels = torch.randint(0, top + 1, (2, 31, 37, 3) if channels_last else (2, 3, 31, 37), dtype=torch.int32)
    levels.flatten()[:4] = torch.tensor([0, top, 1, top - 1])
    rgb = levels.to(dtype)
    lab = fastcolor.rgb_to_lab(rgb, channels_last=channels_last)
    assert largest_error(lab, reference.rgb_to_lab(rgb, channels_last, dtype=torch.float64)) <= 1e-3
    back = fastcolor.lab_to_rgb(lab, channels_last=channels_last, dtype=dtype)
    off = (back.to(torch.int32) - levels).abs()
    assert off.max() <= (0 if dtype == torch.uint8 else 1) and (off > 0).float().mean() <= 1e-3
    kept = fastcolor.lab_to_rgb(lab, channels_last=channels_last, dtype=dtype, gamut="preserve_lightness")
    assert (kept.to(torch.int32) - levels).abs().max() <= 1 + top // 60000


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(on_triton, dtype):
    rgb, lab = some_rgb((3, 16, 17), dtype), some_lab((3, 16, 17), dtype)
    to_lab, to_rgb = fastcolor.rgb_to_lab(rgb), fastcolor.lab_to_rgb(lab)
    assert to_lab.dtype == to_rgb.dtype == dtype
    eps = torch.finfo(dtype).eps  # a whole one: the interpreter cuts bfloat16 off where the GPU rounds
    exact = reference.rgb_to_lab(rgb.double())
    assert ((to_lab.double() - exact).abs() <= 1e-3 + exact.abs() * eps).all()
    assert largest_error(to_rgb, reference.lab_to_rgb(lab.double())) <= 1e-5 + eps


@interpreted
@pytest.mark.parametrize("gamut", GAMUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_match_float64(on_triton, gamut, layout, channels_last):
    rgb, lab = some_rgb((2, 3, 17, 19)), some_lab((2, 3, 17, 19))
    lab[0, 1:, 0, :5] = 0  # greys
    for convert, exactly, x, options in (
        (fastcolor.rgb_to_lab, reference.rgb_to_lab, rgb, {}),
        (fastcolor.lab_to_rgb, reference.lab_to_rgb, lab, {"gamut": gamut}),
    ):
        x, upstream = in_order(x, layout), torch.randn(x.shape)
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


@interpreted
@pytest.mark.slow
def test_all_byte_colours(on_triton, every_byte, monkeypatch):  # noqa: F811
    """In large blocks: the interpreter's time is that of its programs.

    TRITON_INTERPRET=1 python -m pytest -m slow tests/ops/test_lab_triton.py
    """
    from fastcolor.kernels.triton import lab

    monkeypatch.setattr(lab, "BLOCK", 1 << 18)
    check_every_byte(every_byte, ["clip"])
    check_every_byte(every_byte[4:5], ["preserve_lightness"])


@interpreted
def test_nan(on_triton):
    lab = torch.tensor([float("nan"), 0.0, 0.0]).reshape(3, 1, 1)
    for gamut in GAMUTS:
        assert fastcolor.lab_to_rgb(lab, gamut=gamut).isnan().all()
        assert (fastcolor.lab_to_rgb(lab, dtype=torch.uint8, gamut=gamut) == 0).all()
    assert fastcolor.rgb_to_lab(torch.full((3, 1, 1), float("nan"))).isnan().all()


@interpreted
def test_opcheck(on_triton):
    rgb = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    lab = some_lab((2, 3, 4, 5))
    ops = torch.ops.fastcolor
    torch.library.opcheck(ops.rgb_to_lab.default, (rgb, False, torch.float32))
    torch.library.opcheck(ops.rgb_to_lab_backward.default, (lab, rgb, False))
    torch.library.opcheck(ops.lab_to_rgb.default, (lab, False, torch.uint8, True))
    torch.library.opcheck(ops.lab_to_rgb_backward.default, (rgb, lab, False, True))


# --- ahead of time: a kernel that no longer compiles fails here, without a GPU --------------------------------------

FLOATS = ("fp32", "fp16", "bf16")
LAYOUT_PAIRS = list(itertools.product((False, True), repeat=2))
SCALE = {"u8": 1 / 255, "u16": 1 / 65535}
LARGEST = {"u8": 255, "u16": 65535}


def signatures():
    """Every kernel with the types and layouts it is launched with: (name, pointers, constants)."""
    for source, result in [("u8", "fp32"), ("u16", "fp32"), *zip(FLOATS, FLOATS, strict=True)]:
        for inside, out in LAYOUT_PAIRS if source in ("u8", "fp32") else LAYOUT_PAIRS[:1]:
            constants = {"SCALE": SCALE.get(source, 1.0), "IN_INTERLEAVED": inside, "OUT_INTERLEAVED": out}
            yield "rgb_to_lab_kernel", (source, result), constants
    for source, result in [("fp32", "u8"), ("fp32", "u16"), *zip(FLOATS, FLOATS, strict=True)]:
        for inside, out in LAYOUT_PAIRS if result == "u8" else LAYOUT_PAIRS[:1]:
            for preserve in (False, True):
                constants = {"LARGEST": LARGEST.get(result, 0), "PRESERVE": preserve}
                constants |= {"IN_INTERLEAVED": inside, "OUT_INTERLEAVED": out}
                yield "lab_to_rgb_kernel", (source, result), constants
    for dtype in FLOATS:
        for layout in (False, True) if dtype == "fp32" else (False,):
            constants = {"IN_INTERLEAVED": layout, "GRAD_INTERLEAVED": False, "OUT_INTERLEAVED": layout}
            yield "rgb_to_lab_backward_kernel", (dtype,) * 3, constants
            for preserve in (False, True):
                yield "lab_to_rgb_backward_kernel", (dtype,) * 3, {"PRESERVE": preserve, **constants}


@compiled
@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("name", sorted({name for name, _, _ in signatures()}))
def test_compiles_ahead_of_time(name, arch):
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 3):
        pytest.skip("triton < 3.3 takes signatures in another form")
    from fastcolor.kernels.triton import lab
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(lab, name)
    for _, pointers, constants in (signature for signature in signatures() if signature[0] == name):
        types = [*(f"*{p}" for p in pointers), "i32", "i32"] + ["constexpr"] * (len(constants) + 1)
        signature = dict(zip(kernel.arg_names, types, strict=True))
        # as at run time: addresses and sizes of ordinary images are multiples of 16
        aligned = {(i,): [["tt.divisibility", 16]] for i in [*range(len(pointers)), len(pointers) + 1]}
        source = ASTSource(kernel, signature, {**constants, "BLOCK": lab.BLOCK}, aligned)
        options = {"num_warps": lab.WARPS, "enable_fp_fusion": True}
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        assert binary.asm["cubin"]
        ptx = binary.asm["ptx"]
        if pointers[0] == "fp32" and not constants["IN_INTERLEAVED"]:
            assert ptx.count("ld.global.v4") == 3 * (len(pointers) - 1)  # 16 bytes a thread and access
        if pointers[-1] == "fp32" and not constants["OUT_INTERLEAVED"]:
            assert ptx.count("st.global.v4") == 3
