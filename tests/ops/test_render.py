"""Joint bilateral chroma upsampling against a naive loop, and what it is for: edges, alignment, lightness."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import available, every_simd, largest_error

import fastcolor
from fastcolor.ops import _backend
from fastcolor.reference import lab
from fastcolor.reference import render as reference
from fastcolor.reference.render import FLOOR, nearest_low


def upsample_chroma(ab, guide, L, scale, sigma):
    places = (nearest_low(n, s, 1, 0.5, L.device) for n, s in zip(L.shape[2:], scale, strict=True))
    return reference.upsample_chroma(ab, guide, L, *places, sigma)


def naive(ab, guide, L, scale, sigma):
    """From the formula, a pixel and a neighbour at a time."""
    _, h, w = ab.shape
    H, W = L.shape
    result = torch.zeros(2, H, W, dtype=torch.float64)
    for y in range(H):
        for x in range(W):
            v, u = (y + 0.5) * scale[0] - 0.5, (x + 0.5) * scale[1] - 0.5
            total = 0.0
            for i in range(round(v) - 1, round(v) + 2):
                for j in range(round(u) - 1, round(u) + 2):
                    k, m = min(max(i, 0), h - 1), min(max(j, 0), w - 1)
                    near = math.exp(-((guide[k, m] - L[y, x]).item() ** 2) / (2 * sigma**2)) + FLOOR
                    weight = near * max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j))
                    result[:, y, x] += weight * ab[:, k, m]
                    total += weight
            result[:, y, x] /= total
    return result


@pytest.mark.parametrize(
    ("low", "full", "scale"),
    [
        ((3, 4), (12, 16), (0.25, 0.25)),
        ((1, 1), (5, 3), (0.2, 0.3)),
        ((5, 7), (13, 9), (0.37, 0.71)),
        ((4, 4), (3, 3), (1.5, 1.3)),
    ],
)
def test_matches_the_naive_loop(low, full, scale):
    ab = torch.randn(1, 2, *low, dtype=torch.float64) * 30
    guide, L = (torch.rand(1, 1, *s, dtype=torch.float64) * 100 for s in (low, full))
    ours = upsample_chroma(ab, guide, L, scale, 10.0)
    assert torch.allclose(ours[0], naive(ab[0], guide[0, 0], L[0, 0], scale, 10.0), rtol=1e-9)


def test_strips_are_seamless(monkeypatch):
    ab, guide, L = torch.randn(2, 2, 9, 11) * 20, torch.rand(2, 1, 9, 11) * 100, torch.rand(2, 1, 41, 47) * 100
    with fastcolor.use_backend("reference"):
        whole = fastcolor.render(ab, guide, L, dtype=torch.float32)
        monkeypatch.setattr("fastcolor.reference.render._STRIP", 47 * 3)
        assert torch.allclose(fastcolor.render(ab, guide, L, dtype=torch.float32), whole, atol=1e-6)


def test_chroma_stops_at_a_lightness_edge():
    """Red left and blue right of an edge that lies between low-resolution centres: far less bleeds than bilinear
    lets.
    """
    L = torch.full((1, 1, 32, 32), 40.0)
    L[..., 18:] = 80.0
    ab = torch.zeros(1, 2, 8, 8)
    ab[:, 0, :, :5], ab[:, 0, :, 5:] = 30.0, -30.0
    ab[:, 0, :, 4] = 0.0  # the mixed block
    guide = torch.nn.functional.avg_pool2d(L, 4)
    ours = upsample_chroma(ab, guide, L, (0.25, 0.25), 8.0)
    bilinear = torch.nn.functional.interpolate(ab, (32, 32), mode="bilinear")
    truth = torch.where(L == 40, 30.0, -30.0)
    assert (ours[:, :1] - truth).abs().mean() < 0.6 * (bilinear[:, :1] - truth).abs().mean()


def test_a_flat_picture_is_not_shifted():
    """Symmetric colours stay symmetric: the grids are aligned by pixel centres."""
    ramp = torch.linspace(-30, 30, 8).expand(1, 2, 8, 8)
    up = upsample_chroma(ramp, torch.full((1, 1, 8, 8), 50.0), torch.full((1, 1, 32, 32), 50.0), (0.25, 0.25), 8.0)
    assert torch.allclose(up, -up.flip(3), atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32], ids=str)
def test_outputs_keep_lightness(channels_last, dtype):
    L = torch.rand(2, 1, 21, 18) * 100
    rgb = fastcolor.render(
        torch.randn(2, 2, 6, 5) * 80, torch.rand(2, 1, 6, 5) * 100, L, dtype=dtype, channels_last=channels_last
    )
    assert rgb.dtype == dtype and rgb.shape == ((2, 21, 18, 3) if channels_last else (2, 3, 21, 18))
    back = lab.rgb_to_lab(rgb, channels_last, dtype=torch.float64)
    back = back[..., :1].permute(0, 3, 1, 2) if channels_last else back[:, :1]
    assert (back - L).abs().max() <= (0.75 if dtype == torch.uint8 else 0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ab": torch.zeros(1, 3, 2, 2)}, r"ab must be floating of shape \[B, 2, h, w\]"),
        ({"guide": torch.zeros(1, 1, 3, 2)}, "guide needs the size of ab"),
        ({"L": torch.zeros(2, 1, 8, 8)}, "all three the same batch"),
        ({"sigma_light": -1.0}, "sigma_light must be positive, got -1.0"),
    ],
)
def test_errors(change, message):
    arguments = {
        "ab": torch.zeros(1, 2, 2, 2),
        "guide": torch.zeros(1, 1, 2, 2),
        "L": torch.zeros(1, 1, 8, 8),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        fastcolor.render(arguments.pop("ab"), arguments.pop("guide"), arguments.pop("L"), **arguments)


# --- the kernels against float64 --------------------------------------------------------------------------------------

cpp = pytest.mark.skipif(_backend.missing("cpp") is not None, reason=str(_backend.missing("cpp")))
# (low, full): one pixel, one row, primes, wider than a run of 1024, shrinking, rows of whole quads
SIZES = [((1, 1), (1, 1)), ((1, 5), (1, 17)), ((7, 5), (29, 19)), ((3, 300), (5, 1201)), ((9, 8), (5, 4)),
         ((4, 33), (6, 132))]  # fmt: skip


@pytest.fixture(params=available("cpp", "reference"), ids=str)
def backend(request):
    """What runs the tests that ask for it; test_render_*.py run them on others."""
    with fastcolor.use_backend(request.param.name):
        yield request.param


def scene(low, full, batch=2, spread=25.0, device="cpu"):
    ab = torch.randn(batch, 2, *low) * spread
    return [x.to(device) for x in (ab, torch.rand(batch, 1, *low) * 100, torch.rand(batch, 1, *full) * 100)]


def exactly(ab, guide, L, dtype=torch.float64, scale=None, gamut="clip", channels_last=False):
    scale = scale or tuple(a / b for a, b in zip(ab.shape[2:], L.shape[2:], strict=True))
    return reference.render(ab.double(), guide.double(), L.double(), scale, 3.0, dtype, gamut, channels_last)


@every_simd
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("low", "full"), SIZES, ids=str)
def test_matches_float64(backend, low, full, channels_last):
    inputs = scene(low, full, device=backend.device)
    for gamut, bound in (("clip", 2e-5), ("preserve_lightness", 1e-3)):
        options = {"gamut": gamut, "channels_last": channels_last}
        rgb = fastcolor.render(*inputs, dtype=torch.float32, **options)
        exact = exactly(*inputs, **options)
        assert largest_error(rgb, exact) <= bound
        for dtype, top in ((torch.uint8, 255), (torch.uint16, 65535)):
            levels = fastcolor.render(*inputs, dtype=dtype, **options).double()
            assert largest_error(levels, exact * top) <= 0.5 + 2 * bound * top


@every_simd
def test_other_inputs(backend):
    """Strides, 16 bits, a scale that reaches over the border, an empty batch, and extreme colours."""
    ab, guide, L = scene((6, 7), (23, 27), device=backend.device)
    expected = fastcolor.render(ab, guide, L, dtype=torch.float32)
    strided = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (ab, guide)]
    turned = L.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(fastcolor.render(*strided, turned, dtype=torch.float32), expected)
    halves = [x.half() for x in (ab, guide)]
    assert largest_error(fastcolor.render(*halves, L, dtype=torch.float32), expected) < 0.02
    wide = fastcolor.render(ab, guide, L, dtype=torch.float32, gamut="clip", scale=(0.31, 0.22))
    assert largest_error(wide, exactly(ab, guide, L, scale=(0.31, 0.22))) <= 2e-5
    assert fastcolor.render(ab[:0], guide[:0], L[:0]).shape == (0, 3, 23, 27)
    assert fastcolor.render(ab, guide, L[..., :0]).shape == (2, 3, 23, 0)
    far = fastcolor.render(ab * 1e4, guide * 1e3, L, dtype=torch.float32)
    assert far.isfinite().all() and far.min() >= 0 and far.max() <= 1


@pytest.mark.parametrize("width", [27, 44])
def test_types_of_numbers(backend, width):
    """Inputs are read as what they are, and 16 bits are the rounded result: also at an odd address."""
    exact_inputs = scene((6, 11), (13, width), device=backend.device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ab, guide, L = (x.to(dtype) for x in exact_inputs)
        expected = fastcolor.render(ab.float(), guide.float(), L.float(), dtype=torch.float32, gamut="clip")
        for planes in ((ab, guide, L), (ab, guide, L.float()), (ab.float(), guide, L)):
            rgb = fastcolor.render(*planes, dtype=torch.float32, gamut="clip")
            assert largest_error(rgb, expected) <= 1e-6
        odd = torch.cat((L.new_zeros(1), L.flatten()))[1:].reshape(L.shape)
        assert largest_error(fastcolor.render(ab, guide, odd, dtype=torch.float32, gamut="clip"), expected) <= 1e-6
        eps = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        for channels_last in (False, True):
            rgb = fastcolor.render(ab, guide, L, dtype=dtype, gamut="clip", channels_last=channels_last)
            assert rgb.dtype == dtype and rgb.is_contiguous()
            planar = rgb.movedim(-1, 1) if channels_last else rgb
            assert largest_error(planar.float(), expected) <= eps


def test_nan(backend):
    ab, guide, L = scene((3, 5), (6, 32), device=backend.device)
    L[:, :, 2, 3:9] = torch.nan
    for gamut in ("clip", "preserve_lightness"):
        rgb = fastcolor.render(ab, guide, L, dtype=torch.float32, gamut=gamut)
        assert torch.equal(rgb.isnan(), L.isnan().expand_as(rgb))
        levels = fastcolor.render(ab, guide, L, gamut=gamut)
        assert (levels[rgb.isnan()] == 0).all()
    luma = torch.randint(16, 236, (2, 1, 6, 32), dtype=torch.uint8).to(backend.device)
    for plane in fastcolor.render_uv(ab * torch.nan, guide, luma, fastcolor.YuvFormat()):
        assert (plane == 128).all()


@every_simd
def test_nan_in_guide_or_chroma(backend):
    """Pixels that have a share of it are nan, others as they were; in planes, the former are neutral."""
    ab, guide, L = scene((5, 6), (20, 24), batch=1, device=backend.device)
    luma = torch.randint(16, 236, (1, 1, 20, 24), dtype=torch.uint8).to(backend.device)
    plain = fastcolor.render(ab, guide, L, dtype=torch.float32)
    of_frame = fastcolor.render_uv(ab, guide, luma, fastcolor.YuvFormat("444"))
    for broken in (0, 1):
        inputs = [ab.clone(), guide.clone(), L]
        inputs[broken][0, 0, 2, 3] = torch.nan
        touched = torch.zeros(20, 24, dtype=torch.bool, device=backend.device)
        touched[6:14, 10:18] = True  # two pixels of the low-resolution grid wide, less than which no tent is
        assert torch.equal(exactly(*inputs).isnan(), touched.expand(1, 3, -1, -1))
        rgb = fastcolor.render(*inputs, dtype=torch.float32)
        assert torch.equal(rgb.isnan(), touched.expand_as(rgb))
        assert torch.equal(rgb[..., ~touched], plain[..., ~touched])
        assert (fastcolor.render(*inputs)[..., touched] == 0).all()
        for plane, before in zip(fastcolor.render_uv(*inputs[:2], luma, fastcolor.YuvFormat("444")), of_frame):  # noqa: B905
            assert (plane[..., touched] == 128).all() and torch.equal(plane[..., ~touched], before[..., ~touched])


@pytest.fixture
def formats():
    """(matrix, range, primaries, location)"""
    return [
        (matrix, full_range, primaries, location)
        for matrix, primaries in (("bt601", "bt709"), ("bt709", "bt709"), ("bt2020", "bt2020"))
        for full_range in (False, True)
        for location in ("left", "center", "topleft")
    ]


@every_simd
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_chroma_planes_match_float64(backend, formats, subsampling, bits):
    """Every place of chroma, matrix and range: within one level, and nearly always the same."""
    ab, guide, _ = scene((5, 6), (1, 1), spread=40.0, device=backend.device)
    yuv = [fastcolor.YuvFormat(subsampling, bits, *fields) for fields in formats]
    same = total = 0
    for form in yuv:
        for size in ((1, 1), (18, 23), (5, 40)):
            luma = torch.randint(0, 2**bits, (2, 1, *size), dtype=torch.int32).to(form.dtype).to(backend.device)
            ours = fastcolor.render_uv(ab, guide, luma, form)
            scale = tuple(a / b for a, b in zip(ab.shape[2:], size, strict=True))
            exact = reference.render_uv(ab.double(), guide.double(), luma, scale, 3.0, form)
            for plane, expected in zip(ours, exact, strict=True):
                assert plane.dtype == form.dtype and plane.shape == expected.shape
                off = (plane.int() - expected.int()).abs()
                assert off.max() <= 1
                same, total = same + (off == 0).sum().item(), total + off.numel()
    assert same >= 0.99 * total


def assert_planes(ab, guide, luma, form, scale=None, same=0.99):
    """Of a backend against float64: within one level up to 12 bits, and nearly all the same; float32 has 16 of 65,536
    levels in its rounding where the luma is looked for near black.
    """
    ours = fastcolor.render_uv(ab, guide, luma, form, scale=scale)
    scale = scale or tuple(a / b for a, b in zip(ab.shape[2:], luma.shape[2:], strict=True))
    exact = reference.render_uv(ab.double(), guide.double(), luma, scale, 3.0, form)
    for plane, expected in zip(ours, exact, strict=True):
        off = (plane.int() - expected.int()).abs()
        assert off.max() <= (16 if form.bits == 16 else 1), (form, off.max())
        assert (off == 0).float().mean() >= (0.7 if form.bits == 16 else same)
    return ours


@every_simd
@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_wide_and_deep_planes(backend, subsampling):
    """Rows of several runs of 1024 samples; 12 and 16 bits."""
    ab, guide, _ = scene((3, 90), (1, 1), batch=1, device=backend.device)
    for bits, width in ((8, 2083), (10, 1100), (12, 2083), (16, 2500)):
        form = fastcolor.YuvFormat(subsampling, bits, full_range=bits == 12)
        luma = torch.randint(0, 2**bits, (1, 1, 5, width), dtype=torch.int32).to(form.dtype).to(backend.device)
        assert_planes(ab, guide, luma, form)


@every_simd
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_planes_at_gamut_corners(backend, formats, subsampling, bits):
    """Flat patches: the corners of sRGB at their own luma and at all others, and greys, whose planes are neutral."""
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).double()  # [8, 3] R'G'B'
    colors = lab.rgb_to_lab(corners[:, None], channels_last=True)[:, 0].float()  # [8, 3]
    for matrix, full_range, primaries, location in formats:
        form = fastcolor.YuvFormat(subsampling, bits, matrix, full_range, primaries, location)
        weights = torch.tensor(form.luma_weights, dtype=torch.float64)
        levels = torch.cat(((corners @ weights), torch.linspace(0, 1, 9, dtype=torch.float64)))  # [17]
        luma = (levels * form.luma_span + form.black + 0.5).int().clamp(0, 2**bits - 1)
        luma = luma[:, None].expand(-1, 8).repeat_interleave(4, 0).repeat_interleave(4, 1)[None, None]
        luma = luma.to(form.dtype).to(backend.device)  # [1, 1, 68, 32]: a row of patches for each luma
        ab = colors[:, 1:].T[None, :, None].expand(1, 2, 17, 8).contiguous().to(backend.device)
        guide = fastcolor.luma_to_lightness(luma, bits, full_range)[..., ::4, ::4].contiguous()
        assert_planes(ab, guide, luma, form, (0.25, 0.25), same=0.97)
        neutral = fastcolor.render_uv(ab * 0, guide, luma, form, scale=(0.25, 0.25))
        # scikit-image's matrix and white make a = b = 0 a grey to 5 digits: four levels of 16 bits
        off = max((plane.int() - (1 << (bits - 1))).abs().max().item() for plane in neutral)
        assert off <= (4 if bits == 16 else 0)


@cpp
def test_a_wish_that_cannot_be_met():
    ab, guide, L = scene((3, 3), (9, 9), batch=1)
    luma = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    with fastcolor.use_backend("cpp"):
        with pytest.raises(fastcolor.BackendError, match="render cannot run on backend 'cpp': float64"):
            fastcolor.render(ab.double(), guide, L)
        with pytest.raises(fastcolor.BackendError, match="render cannot run on backend 'cpp': float64"):
            fastcolor.render(ab, guide, L, dtype=torch.float64)
        with pytest.raises(fastcolor.BackendError, match="render_uv cannot run on backend 'cpp': float64"):
            fastcolor.render_uv(ab.double(), guide, luma, fastcolor.YuvFormat())
        wanted = ab.clone().requires_grad_()
        with pytest.raises(fastcolor.BackendError, match="gradients are computed on the reference"):
            fastcolor.render(wanted, guide, L, dtype=torch.float32)
        assert not fastcolor.render(wanted, guide, L).requires_grad  # integers have none
        with torch.no_grad():
            assert torch.equal(fastcolor.render(wanted, guide, L), fastcolor.render(ab, guide, L))
    with fastcolor.use_backend("cpp", "reference"):
        assert fastcolor.render(wanted, guide, L, dtype=torch.float32).requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=str)
def test_luma_rows_that_lie_apart(backend, dtype):
    ab, guide, _ = scene((4, 4), (1, 1), device=backend.device)
    wide = torch.randint(16, 236, (2, 1, 16, 32), dtype=torch.int32).to(dtype).to(backend.device)
    yuv = fastcolor.YuvFormat(bits=8 if dtype == torch.uint8 else 9)
    for width in (17, 23):
        luma = wide[..., :width]
        for ours, expected in zip(
            fastcolor.render_uv(ab, guide, luma, yuv), fastcolor.render_uv(ab, guide, luma.clone(), yuv), strict=True
        ):
            assert torch.equal(ours.int(), expected.int())
        halves = fastcolor.render_uv(ab.half(), guide.half(), luma, yuv)
        exact = fastcolor.render_uv(ab.half().float(), guide.half().float(), luma, yuv)
        assert all(largest_error(a, b) <= 1 for a, b in zip(halves, exact, strict=True))


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 16])
def test_every_luma(backend, bits, full_range):
    dtype = torch.uint8 if bits == 8 else torch.uint16
    luma = torch.arange(2**bits, dtype=torch.int32).to(dtype)[:, None].to(backend.device)
    exact = reference.luma_to_lightness(luma, bits, full_range, torch.float64)
    for samples, expected in ((luma, exact), (luma[1:], exact[1:])):  # the second lies at an odd address
        L = fastcolor.luma_to_lightness(samples, bits, full_range)
        assert L.shape == samples.shape and largest_error(L, expected) <= 2e-5
        assert L.max().item() == pytest.approx(100, abs=1e-4)


@every_simd
@cpp
def test_exp2_bound():
    """The bound beside exp2_of in render_body.h: 3e-7 relative above -126, over four million points."""
    x = torch.linspace(-130, 0, 1 << 22)
    out = torch.empty_like(x)
    _backend.native("_cpu").render_exp2(x.data_ptr(), out.data_ptr(), x.numel())
    exact, normal = torch.exp2(x.double()), x > -126
    assert ((out.double() - exact).abs() / exact)[normal].max() <= 3e-7
    assert (out[~normal] <= 2.0**-125).all()


@cpp
def test_threads_do_not_change_a_bit():
    inputs, before = scene((40, 50), (160, 200)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fastcolor.render(*inputs)
        torch.set_num_threads(3)
        assert torch.equal(one, fastcolor.render(*inputs))
    finally:
        torch.set_num_threads(before)


def test_gradients_take_the_reference():
    ab, guide, L = scene((3, 3), (9, 9), batch=1)
    ab.requires_grad_()
    fastcolor.render(ab, guide, L, dtype=torch.float32).sum().backward()
    assert ab.grad.abs().sum() > 0


def test_opcheck(backend):
    inputs = scene((3, 4), (11, 13), device=backend.device)
    ab, guide, L = (x.movedim(1, -1).contiguous().movedim(-1, 1) for x in inputs)
    ops = torch.ops.fastcolor
    for dtype, last in ((torch.uint8, True), (torch.float32, False)):
        torch.library.opcheck(ops.render.default, (ab, guide, L, 0.25, 0.25, 3.0, dtype, True, last))
    luma = torch.randint(0, 256, (2, 1, 11, 13), dtype=torch.uint8).to(backend.device)
    form = ("420", 8, "bt709", False, "bt709", "left")
    torch.library.opcheck(ops.render_uv.default, (ab, guide, luma, 0.25, 0.25, 3.0, *form))
    torch.library.opcheck(ops.luma_to_lightness.default, (luma, 8, True))


def test_compile_fullgraph(backend):
    inputs = scene((3, 4), (11, 13), device=backend.device)
    compiled = torch.compile(lambda *x: fastcolor.render(*x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), fastcolor.render(*inputs))
