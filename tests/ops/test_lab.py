"""RGB ↔ Lab: every backend on the CPU against the float64 reference, and the reference against scikit-image."""

from __future__ import annotations

import ctypes
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from helpers import available, every_simd, largest_error

import fastcolor
from fastcolor.ops import _backend
from fastcolor.reference import lab as reference

BACKENDS = available("cpp", "reference")
SHAPES = [(3, 1, 1), (2, 3, 7, 13), (1, 3, 33, 65), (2, 2, 3, 1, 1031), (0, 3, 4, 4), (3, 0, 5)]
both = pytest.mark.parametrize("backend", BACKENDS, ids=str)
cpp = pytest.mark.skipif(_backend.missing("cpp") is not None, reason=str(_backend.missing("cpp")))


def some_rgb(shape, dtype=torch.float32):
    """Over all of sRGB, with black, white, both knees, and a little outside."""
    rgb = torch.rand(shape, dtype=torch.float64) * 1.1 - 0.05
    special = torch.tensor([0.0, 1.0, 0.04045, 0.0404501, 1e-9, 0.1, 0.2068965])
    rgb.flatten()[: len(special)] = special[: rgb.numel()]
    return rgb.to(dtype)


def some_lab(shape, dtype=torch.float32, spread=40.0):
    """Mostly inside sRGB, a third outside."""
    L = torch.rand(shape, dtype=torch.float64) * 100
    ab = torch.randn(shape, dtype=torch.float64) * spread
    at = torch.arange(3).reshape(3, 1, 1)
    return torch.where(at == 0, L, ab).to(dtype)


def all_bytes():
    """The 16,777,216 8-bit colours, [3, 4096, 4096]."""
    v = torch.arange(256, dtype=torch.uint8)
    return torch.stack(torch.meshgrid(v, v, v, indexing="ij")).reshape(3, 4096, 4096)


def in_order(planar, layout):
    """A planar-shaped tensor [..., 3, H, W] in another memory order, or seen through a view."""
    if layout == "interleaved":
        return planar.movedim(-3, -1).contiguous().movedim(-1, -3)
    if layout == "strided":
        wide = planar.new_empty(*planar.shape[:-1], 2 * planar.shape[-1])
        wide[..., ::2] = planar
        return wide[..., ::2]
    return planar.contiguous()


@pytest.fixture(scope="module")
def every_byte():
    """Strips of the 8-bit colours, and their Lab in float64, rounded to float32 (by 4e-6)."""
    strips = all_bytes().split(512, 1)
    return [(rgb, reference.rgb_to_lab(rgb, dtype=torch.float64).float()) for rgb in strips]


def check_every_byte(strips, gamuts=("clip", "preserve_lightness")):
    """|ΔLab| <= 1e-3 on every 8-bit colour, and all of them come back, whatever becomes of colours outside sRGB."""
    worst = 0.0
    for rgb, exact in strips:
        lab = fastcolor.rgb_to_lab(rgb)
        worst = max(worst, (lab - exact).abs().nan_to_num(torch.inf).max().item())
        for gamut in gamuts:
            assert torch.equal(fastcolor.lab_to_rgb(lab, dtype=torch.uint8, gamut=gamut), rgb)
    print(f"largest |ΔLab| {worst:.3g}")
    assert worst <= 1e-3


@every_simd
@cpp
def test_all_byte_colours(every_byte):
    with fastcolor.use_backend("cpp"):
        check_every_byte(every_byte)


def test_all_byte_colours_on_the_reference(every_byte):
    with fastcolor.use_backend("reference"):
        check_every_byte(every_byte, ["clip"])
        check_every_byte(every_byte[4:5], ["preserve_lightness"])  # its bisection takes 20 times as long


@pytest.mark.parametrize("gamut", ["clip", "preserve_lightness"])
@every_simd
@both
def test_integers_at_the_bounds(backend, gamut):
    """Every pair, and many triples, of the smallest and largest levels and those about the knees, in 8, 10 and 16 bits:
    what comes back is within the rounding of float32.
    """
    for bits in (8, 10, 16):
        top = 2**bits - 1
        knee = round(0.04045 * top)  # of the sRGB curve
        root = round(0.0905 * top)  # where f(Y) of a grey changes its branch
        some = [0, 1, 2, *(k + d for k in (knee, root) for d in (-1, 0, 1)), top // 2, top - 2, top - 1, top]
        levels = torch.cartesian_prod(*[torch.tensor(some)] * 3)
        more = torch.randint(0, top + 1, (4096, 3))
        levels = torch.cat((levels, more)).T.reshape(3, 1, -1)
        dtype = torch.uint8 if bits == 8 else torch.uint16
        # 10 bits are given in the upper bits of 16, repeated below, as image files widen them
        rgb = ((levels << 6 | levels >> 4) if bits == 10 else levels).to(torch.int32).to(dtype)
        with fastcolor.use_backend(backend.name):
            lab = fastcolor.rgb_to_lab(rgb)
            back = fastcolor.lab_to_rgb(lab, dtype=dtype, gamut=gamut)
            floating = fastcolor.lab_to_rgb(lab, gamut=gamut)
        assert largest_error(lab, reference.rgb_to_lab(rgb, dtype=torch.float64)) <= 1e-3
        assert (back.int() - rgb.int()).abs().max() <= (0 if bits == 8 else 1)
        assert largest_error(floating, rgb.double() / reference.LEVELS[dtype]) <= 1.5 / 65535  # near black
        if bits == 10:
            assert torch.equal((back.double() * (top / 65535)).round().long(), levels)  # exact, as 8 bits are


def test_reference_is_scikit_image():
    color = pytest.importorskip("skimage.color")
    rgb = torch.rand(64, 65, 3, dtype=torch.float64)
    rgb[0, 0], rgb[0, 1] = 0, 1
    lab = reference.rgb_to_lab(rgb, channels_last=True)
    assert largest_error(lab, torch.from_numpy(color.rgb2lab(rgb.numpy()))) < 1e-10
    back = torch.from_numpy(color.lab2rgb(lab.numpy()))
    assert largest_error(reference.lab_to_rgb(lab, channels_last=True), back) < 1e-10


# RGB and Lab of colour bars by Bruce Lindbloom's calculator (D65, sRGB), to 4 digits, from scikit-image's
# tests/color/test_colorconv.py: its constants differ from ours in the fourth, hence its own tolerance of two decimals.
COLOR_BARS = {
    (1, 1, 1): (100, 0, 0), (1, 1, 0): (97.1393, -21.5537, 94.4780), (0, 1, 1): (91.1132, -48.0875, -14.1312),
    (0, 1, 0): (87.7347, -86.1827, 83.1793), (1, 0, 1): (60.3242, 98.2343, -60.8249),
    (1, 0, 0): (53.2408, 80.0925, 67.2032), (0, 0, 1): (32.2970, 79.1875, -107.8602), (0, 0, 0): (0, 0, 0),
}  # fmt: skip
# The first row of test_unit in kornia's tests/color/test_lab.py, both ways; made with scikit-image.
KORNIA_RGB = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.69396782, 0.79009938, 0.84317145),
              (0.63581685, 0.91742945, 0.59529881), (0.09902618, 0.60044175, 0.15297393))  # fmt: skip
KORNIA_RGB_IN_LAB = ((0.0, 0.0, 0.0), (100.0, -0.002454937, 0.00465342), (79.75208576, -5.40909568, -9.49591204),
                     (86.38913217, -37.74958445, 32.9931831), (55.25164186, -55.02172792, 47.80929165))  # fmt: skip
KORNIA_LAB = ((50.21928787, 65.81327057, -69.53346252), (23.29810143, -3.69859719, -73.34986877),
              (14.98279190, 0.16971001, -11.47461891), (62.50927353, 14.86583614, 66.73863220),
              (72.78904724, -65.54960632, 70.43983459))  # fmt: skip
KORNIA_LAB_IN_RGB = ((0.63513142, 0.28210726, 0.94172458), (0.0, 0.26080003, 0.66390044),
                     (0.10660624, 0.15027717, 0.21043296), (0.79048697, 0.54540429, 0.02453515),
                     (0.26823414, 0.80323837, 0.04169043))  # fmt: skip


@every_simd
@both
def test_values_that_peers_publish(backend):
    def rows(values):
        return torch.tensor([list(v) for v in values], dtype=torch.float32)[:, None]  # [n, 1, 3]

    with fastcolor.use_backend(backend.name):
        bars = fastcolor.rgb_to_lab(rows(COLOR_BARS), channels_last=True)
        lab = fastcolor.rgb_to_lab(rows(KORNIA_RGB), channels_last=True)
        rgb = fastcolor.lab_to_rgb(rows(KORNIA_LAB), channels_last=True)
    assert largest_error(bars, rows(COLOR_BARS.values())) < 1.5e-2
    assert largest_error(lab, rows(KORNIA_RGB_IN_LAB)) < 1e-3
    assert largest_error(rgb, rows(KORNIA_LAB_IN_RGB)) < 1e-5


@every_simd
@both
@pytest.mark.parametrize("layout", ["planar", "interleaved", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_matches_float64(backend, shape, layout):
    rgb, lab = some_rgb(shape), some_lab(shape)
    with fastcolor.use_backend(backend.name):
        to_lab = fastcolor.rgb_to_lab(in_order(rgb, layout))
        to_rgb = fastcolor.lab_to_rgb(in_order(lab, layout))
    assert to_lab.is_contiguous() or backend.name == "reference"
    assert largest_error(to_lab, reference.rgb_to_lab(rgb.double())) <= 1e-3
    assert largest_error(to_rgb, reference.lab_to_rgb(lab.double())) <= 1e-5


@both
@pytest.mark.parametrize("layout", ["planar", "interleaved", "strided"])
def test_channels_last_is_the_same(backend, layout):
    rgb, lab = some_rgb((2, 3, 19, 23)), some_lab((2, 3, 19, 23))
    with fastcolor.use_backend(backend.name):
        for convert, planar in ((fastcolor.rgb_to_lab, rgb), (fastcolor.lab_to_rgb, lab)):
            last = convert(in_order(planar, layout).movedim(-3, -1), channels_last=True)
            assert largest_error(last.movedim(-1, -3), convert(planar)) <= 1e-6 * 100


@every_simd
@both
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_integers(backend, dtype, channels_last):
    top = reference.LEVELS[dtype]
    levels = torch.randint(0, top + 1, (2, 3, 31, 37))
    levels.flatten()[:4] = torch.tensor([0, top, 1, top - 1])
    rgb = levels.to(dtype)
    if channels_last:
        rgb = rgb.to(torch.int32).movedim(1, -1).contiguous().to(dtype)
    with fastcolor.use_backend(backend.name):
        lab = fastcolor.rgb_to_lab(rgb, channels_last=channels_last)
        back = fastcolor.lab_to_rgb(lab, channels_last=channels_last, dtype=dtype)
    assert lab.dtype == torch.float32 and back.dtype == dtype
    assert largest_error(lab, reference.rgb_to_lab(rgb, channels_last, dtype=torch.float64)) <= 1e-3
    # 8 bits come back exactly; float32 Lab holds 16 bits to within one level, and nearly always exactly
    off = (back.to(torch.int32) - rgb.to(torch.int32)).abs()
    assert off.max() <= (0 if dtype == torch.uint8 else 1) and (off > 0).float().mean() <= 1e-3


HALVES = [torch.float16, torch.bfloat16]
CONVERSIONS = [("rgb_to_lab", {}), ("lab_to_rgb", {"gamut": "clip"}), ("lab_to_rgb", {"gamut": "preserve_lightness"})]


def some_input(name, shape, dtype):
    """For a conversion, of any type that it takes."""
    if name == "rgb_to_lab" and not dtype.is_floating_point:
        return torch.randint(0, reference.LEVELS[dtype] + 1, shape, dtype=torch.int32).to(dtype)
    return (some_rgb if name == "rgb_to_lab" else some_lab)(shape, dtype)


@every_simd
@both
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", ["planar", "interleaved", "strided"])
def test_half_precision(backend, layout, dtype):
    """As exact as eager PyTorch in the same type, whose arithmetic is float32 too."""
    for shape, (name, options) in itertools.product(SHAPES, CONVERSIONS):
        x = some_input(name, shape, dtype)
        with fastcolor.use_backend(backend.name):
            result = getattr(fastcolor, name)(in_order(x, layout), **options)
        exact, eager = (getattr(reference, name)(y, **options) for y in (x.double(), x))
        assert result.dtype == dtype
        floor = 1e-3 if name == "rgb_to_lab" else 2e-4  # where eager errs by less by luck; the gamut's scale by 2^-16
        assert largest_error(result, exact) <= max(2 * largest_error(eager, exact), floor)


@every_simd
@cpp
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_pair_of_types(channels_last):
    """What is read is the number that is there, and what is written the float32 result, rounded."""
    floats = [torch.float32, *HALVES]
    integers = [torch.uint8, torch.uint16]
    shape = (2, 7, 13, 3) if channels_last else (2, 3, 7, 13)
    for name, options in CONVERSIONS:
        convert = partial(getattr(fastcolor, name), channels_last=channels_last, **options)
        sources, results = (integers, []) if name == "rgb_to_lab" else ([], integers)
        for source in floats + sources:
            planar = some_input(name, (2, 3, 7, 13), source)
            x = planar.movedim(1, -1).contiguous() if channels_last else planar
            assert x.shape == shape
            wide = convert(x.float() if source in HALVES else x, dtype=torch.float32)
            for dtype in floats:
                assert torch.equal(convert(x, dtype=dtype), wide.to(dtype)), (name, source, dtype)
            for dtype in results:
                levels = convert(x.float(), dtype=dtype).int()
                assert torch.equal(convert(x, dtype=dtype).int(), levels), (name, source, dtype)


@every_simd
@both
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_in_half_precision(backend, dtype):
    """Those of float32, rounded: through inputs, results and gradients of 16 bits, in any order of memory."""
    layouts = ["planar", "interleaved", "strided"]
    for shape, layout, (name, options) in itertools.product([(3, 1, 1), (2, 3, 17, 19)], layouts, CONVERSIONS):
        x = some_input(name, shape, dtype)
        with fastcolor.use_backend(backend.name):
            for result in (dtype, torch.float32):
                convert = partial(getattr(fastcolor, name), dtype=result, **options)
                upstream = torch.randn(shape).to(result)
                half = in_order(x, layout).detach().requires_grad_()
                wide = x.float().requires_grad_()
                convert(half).backward(in_order(upstream, layout))
                partial(convert, dtype=torch.float32)(wide).backward(upstream.float())
                assert half.grad.dtype == dtype
                off = (half.grad.double() - wide.grad.double()).abs()
                assert (off <= torch.finfo(dtype).eps * wide.grad.double().abs() + 1e-6).all()


@every_simd
@both
@pytest.mark.parametrize("gamut", ["clip", "preserve_lightness"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_match_float64(backend, gamut, channels_last):
    rgb, lab = some_rgb((2, 3, 17, 19)), some_lab((2, 3, 17, 19))
    lab[0, 1:, 0, :5] = 0  # greys
    lab[0, 0, 0, :3] = torch.tensor([0.0, 100.0, 50.0])
    if channels_last:
        rgb, lab = rgb.movedim(1, -1).contiguous(), lab.movedim(1, -1).contiguous()
    for convert, exactly, x, options in (
        (fastcolor.rgb_to_lab, reference.rgb_to_lab, rgb, {}),
        (fastcolor.lab_to_rgb, reference.lab_to_rgb, lab, {"gamut": gamut}),
    ):
        upstream = torch.randn_like(x)
        fast, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        with fastcolor.use_backend(backend.name):
            convert(fast, channels_last=channels_last, **options).backward(upstream)
        exactly(exact, channels_last, **options).backward(upstream.double())
        error = (fast.grad.double() - exact.grad).abs()
        # relative to the pixel's own gradient; at a kink (a knee, a gamut bound) either side is right
        scale = exact.grad.abs().amax(-1 if channels_last else 1, keepdim=True) + 1e-3
        off = (error / scale > 2e-3).any(-1 if channels_last else 1)
        assert off.float().mean() <= 0.005
        assert fast.grad.isfinite().all()


def test_gradcheck_of_the_reference():
    rgb = torch.rand(1, 3, 3, 4, dtype=torch.float64).clamp(0.06, 1).requires_grad_()
    assert torch.autograd.gradcheck(reference.rgb_to_lab, rgb)
    inside = reference.rgb_to_lab(rgb.detach().clamp(0.1, 0.9)).requires_grad_()
    assert torch.autograd.gradcheck(reference.lab_to_rgb, inside)
    assert torch.autograd.gradcheck(fastcolor.rgb_to_lab, rgb)  # float64 takes the reference


def test_gradient_of_the_gamut_scale_by_differences():
    """preserve_lightness outside sRGB: the implicit gradient against central differences."""
    lab = torch.tensor([[60.0, 90.0, 40.0], [30.0, 20.0, -110.0], [80.0, -100.0, 60.0]], dtype=torch.float64)
    lab = lab.T.reshape(3, 1, 3).clone().requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64).reshape(3, 1, 1)

    def scalar(x):
        # not rounded at the bound: a channel that touches it is cut by the clip, one way or the other
        t = reference.gamut_scale(*x.unbind(0))
        return (torch.stack(reference.lab_to_linear(x[0], t * x[1], t * x[2])) * upstream).sum()

    (gradient,) = torch.autograd.grad(scalar(lab), lab)
    step = 1e-3
    for place in np.ndindex(3, 1, 3):
        up, down = lab.detach().clone(), lab.detach().clone()
        up[place] += step
        down[place] -= step
        numeric = (scalar(up) - scalar(down)) / (2 * step)
        assert abs(gradient[place] - numeric) <= 1e-4


@every_simd
@both
def test_preserve_lightness(backend):
    """L and hue stay, chroma never grows, colours inside are not touched."""
    lab = some_lab((3, 40, 41), spread=60.0)
    lab[0].clamp_(2, 98)
    with fastcolor.use_backend(backend.name):
        rgb = fastcolor.lab_to_rgb(lab, gamut="preserve_lightness")
    back = reference.rgb_to_lab(rgb.double())
    assert largest_error(back[0], lab[0]) < 0.02
    chroma, wished = back[1:].norm(dim=0), lab[1:].double().norm(dim=0)
    assert (chroma <= wished + 0.02).all()
    cross = back[1] * lab[2] - back[2] * lab[1]
    assert (cross.abs() / wished.clamp_min(1) <= 0.02).all()  # same direction from the grey axis
    excess = torch.stack(reference.lab_to_linear(*lab.double()))
    inside = (excess >= 0).all(0) & (excess <= 1).all(0)
    assert 0.1 < inside.float().mean() < 0.9
    assert largest_error(chroma[inside], wished[inside]) < 0.01
    outside_rgb = rgb[:, ~inside]
    touches = torch.minimum(outside_rgb.amin(0), 1 - outside_rgb.amax(0))
    assert touches.max() < 2e-3  # no more is taken away than needed


@every_simd
@both
def test_nan_and_out_of_range(backend):
    lab = torch.tensor([float("nan"), 0.0, 0.0]).reshape(3, 1, 1)
    with fastcolor.use_backend(backend.name):
        assert fastcolor.lab_to_rgb(lab).isnan().all()
        assert (fastcolor.lab_to_rgb(lab, dtype=torch.uint8) == 0).all()
        assert fastcolor.rgb_to_lab(torch.full((3, 1, 1), float("nan"))).isnan().all()
        over = torch.tensor([[150.0, 0.0, 0.0], [-20.0, 0.0, 0.0]]).T.reshape(3, 1, 2)
        for gamut in ("clip", "preserve_lightness"):
            rgb = fastcolor.lab_to_rgb(over, dtype=torch.uint8, gamut=gamut)
            assert rgb[:, 0, 0].tolist() == [255] * 3 and rgb[:, 0, 1].tolist() == [0] * 3


def address(tensor):
    return tensor.data_ptr()


@every_simd
@cpp
def test_cube_root_bound():
    """The bound beside inverse_cbrt in lab_math.h: 4e-7 relative, over four million points."""
    x = torch.exp2(torch.linspace(-9, 3, 1 << 22, dtype=torch.float64)).float()
    out = torch.empty_like(x)
    _backend.native("_cpu").inverse_cbrt(address(x), address(out), x.numel())
    exact = x.double().pow(-1 / 3)
    assert ((out.double() - exact).abs() / exact).max() <= 4e-7


@every_simd
@cpp
def test_power_bound():
    """The bounds beside power and the sRGB transfer in lab_math.h, over four million points each."""
    x = torch.exp2(torch.linspace(-20, 20, 1 << 22, dtype=torch.float64)).float()
    out = torch.empty_like(x)
    for p in (2.4, 1 / 2.4, 1.4, 1 / 2.4 - 1):
        p = ctypes.c_float(p).value
        _backend.native("_cpu").power(address(x), p, address(out), x.numel())
        exact = x.double().pow(p)
        within = (p * x.double().log2()).abs() <= 12
        assert ((out.double() - exact).abs() / exact)[within].max() <= 2e-6


@every_simd
@cpp
def test_transfer_bound():
    """The bound beside the sRGB transfer in lab_math.h, over two million greys, whose other rounding is small: 2e-6 of
    the encoding, 4e-6 both ways, and 5e-6 of a slope itself.
    """
    c = torch.linspace(0, 1, 1 << 21, dtype=torch.float64).float()[None, None].expand(3, 1, -1)
    with fastcolor.use_backend("cpp"):
        lab = fastcolor.rgb_to_lab(c)
        grey = torch.cat((lab[:1], torch.zeros_like(lab[1:])))
        encoded, back = fastcolor.lab_to_rgb(grey), fastcolor.lab_to_rgb(lab)
        some = grey[..., ::4].clone().requires_grad_()  # L has the gradient of all three channels
        fastcolor.lab_to_rgb(some).sum().backward()
        levels = c[..., ::4].clone().requires_grad_()
        fastcolor.rgb_to_lab(levels)[0].sum().backward()
    linear = reference.lab_to_linear(*grey.double())
    assert largest_error(encoded, reference.linear_to_srgb(torch.stack(linear)).clamp(0, 1)) <= 2e-6
    assert largest_error(back, c) <= 4e-6
    for x, function in ((some, reference.lab_to_rgb), (levels, reference.rgb_to_lab)):
        exact = x.detach().double().requires_grad_()
        value = function(exact)
        (value if function is reference.lab_to_rgb else value[0]).sum().backward()
        # but at the knees, where either side is right, and at white, which float32 may clip
        off = (x.grad[0] - exact.grad[0]).abs() / exact.grad[0].abs().clamp_min(1e-3)
        assert (off > 1e-5).float().mean() <= 1e-5


@pytest.fixture(scope="module")
def gamut_samples():
    """2,400,000 colours, near sRGB and far outside, near black and near white, and their scales in float64."""
    n = 480_000
    generator = torch.Generator().manual_seed(1)
    L = torch.rand(5, n, generator=generator, dtype=torch.float64) * 100
    L[3], L[4] = L[3] * 0.08, 95 + L[4] * 0.05
    L[:, 0], L[:, 1] = 0, 100
    spread = torch.tensor([40.0, 120.0, 500.0, 20.0, 20.0], dtype=torch.float64)[:, None]
    a, b = torch.randn(2, 5, n, generator=generator, dtype=torch.float64) * spread
    lab = torch.stack((L, a, b)).flatten(1).float()
    return lab, torch.cat([reference.gamut_scale(*part.double()) for part in lab.split(1 << 16, 1)])


@every_simd
@cpp
def test_gamut_scale_bound(gamut_samples):
    """The bound in lab_math.h: inside, and within 2^-16 of the border, as far as float32 tells the two apart."""
    lab, exact = gamut_samples
    t = torch.empty(lab.shape[1])
    _backend.native("_cpu").gamut_scales(address(lab), address(t), t.numel())

    def excess(scale):
        L, a, b = lab.double()
        channels = torch.stack(reference.lab_to_linear(L, scale * a, scale * b))
        return torch.maximum(channels.amax(0) - 1, -channels.amin(0))

    rounding = 1e-6  # of linear light in float32
    scale, beyond = t.double(), t.double() + 2**-16
    assert (excess(scale) <= reference.GAMUT_TOLERANCE + rounding)[t > 0].all()
    assert (excess(beyond) >= reference.GAMUT_TOLERANCE - rounding)[t < 1].all()
    assert 0.5 < (t < 1).float().mean() < 0.95
    assert ((t >= 0) & (t <= 1)).all()
    # the border of the reference, but on lines that leave sRGB and enter it again; rounding shifts t at small chroma
    chroma = lab[1:].double().norm(dim=0)
    off = (scale - exact).abs()
    elsewhere = (off > 2**-15) & (off * chroma > 2e-3)
    assert elsewhere.float().mean() <= 5e-5, f"{elsewhere.sum()} of {elsewhere.numel()}"


@cpp
def test_threads_do_not_change_a_bit():
    rgb = torch.randint(0, 256, (3, 211, 307), dtype=torch.uint8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fastcolor.rgb_to_lab(rgb)
        torch.set_num_threads(3)
        assert torch.equal(one, fastcolor.rgb_to_lab(rgb))
    finally:
        torch.set_num_threads(before)


LAYOUTS = [torch.contiguous_format, torch.channels_last]  # a wrong fake passes on the first


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_opcheck(layout, dtype):
    rgb = (torch.rand(2, 3, 4, 5) * 255).to(dtype).contiguous(memory_format=layout)
    lab = some_lab((2, 3, 4, 5)).contiguous(memory_format=layout)
    ops = torch.ops.fastcolor
    torch.library.opcheck(ops.rgb_to_lab.default, (rgb, False, torch.float32))
    torch.library.opcheck(ops.rgb_to_lab.default, (rgb.movedim(1, -1), True, torch.float32))
    torch.library.opcheck(ops.lab_to_rgb.default, (lab, False, dtype, True))
    torch.library.opcheck(ops.lab_to_rgb.default, (lab.movedim(1, -1), True, dtype, False))
    if dtype == torch.float32:
        torch.library.opcheck(ops.rgb_to_lab_backward.default, (lab, rgb, False))
        torch.library.opcheck(ops.lab_to_rgb_backward.default, (rgb, lab, False, True))


@both
def test_compile_fullgraph(backend):
    rgb = torch.rand(2, 3, 8, 9, requires_grad=True)

    def through(x):
        lab = fastcolor.rgb_to_lab(x)
        return fastcolor.lab_to_rgb(lab * 0.9, gamut="preserve_lightness")

    # aot_eager: tracing, fakes and autograd for real, without a C++ compiler at work
    compiled = torch.compile(through, fullgraph=True, backend="aot_eager")
    with fastcolor.use_backend(backend.name):
        expected = through(rgb)
        result = compiled(rgb)
        assert largest_error(result.detach(), expected.detach()) <= 1e-6
        upstream = torch.randn_like(result)
        ours, theirs = (torch.autograd.grad(y, rgb, upstream)[0] for y in (result, expected))
    assert largest_error(ours, theirs) <= 1e-5


@cpp
def test_export():
    class Module(torch.nn.Module):
        def forward(self, x):
            return fastcolor.rgb_to_lab(x)

    rgb = torch.randint(0, 256, (1, 3, 8, 9), dtype=torch.uint8)
    program = torch.export.export(Module(), (rgb,))
    assert torch.equal(program.module()(rgb), fastcolor.rgb_to_lab(rgb))


def test_errors_say_what_came():
    with pytest.raises(ValueError, match=r"rgb must have shape \[\.\.\., 3, H, W\], got \[2, 4, 5\]"):
        fastcolor.rgb_to_lab(torch.rand(2, 4, 5))
    with pytest.raises(ValueError, match=r"rgb must have shape \[\.\.\., H, W, 3\], got \[3, 4, 5\]"):
        fastcolor.rgb_to_lab(torch.rand(3, 4, 5), channels_last=True)
    with pytest.raises(TypeError, match=r"rgb must be of .* got torch.int64"):
        fastcolor.rgb_to_lab(torch.zeros(3, 4, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match="rgb must be a torch.Tensor, got ndarray"):
        fastcolor.rgb_to_lab(np.zeros((3, 4, 5)))
    with pytest.raises(TypeError, match=r"lab must be of .* got torch.uint8"):
        fastcolor.lab_to_rgb(torch.zeros(3, 4, 5, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"dtype must be one of .* got torch.int32"):
        fastcolor.lab_to_rgb(torch.zeros(3, 4, 5), dtype=torch.int32)
    with pytest.raises(ValueError, match="gamut must be one of clip, preserve_lightness; got 'cut'"):
        fastcolor.lab_to_rgb(torch.zeros(3, 4, 5), gamut="cut")


@cpp
def test_a_wish_that_cannot_be_met():
    rgb = torch.rand(3, 4, 5)
    with fastcolor.use_backend("cpp"):
        for wrong in (
            lambda: fastcolor.rgb_to_lab(rgb.double()),
            lambda: fastcolor.rgb_to_lab(rgb, dtype=torch.float64),
            lambda: fastcolor.lab_to_rgb(rgb.double()),
        ):
            with pytest.raises(fastcolor.BackendError, match="cannot run on backend 'cpp': float64 is computed on the"):
                wrong()
        assert fastcolor.lab_to_rgb(rgb, dtype=torch.float64).dtype == torch.float64  # a float32 result, widened
    with fastcolor.use_backend("cpp", "reference"):
        assert fastcolor.rgb_to_lab(rgb.double()).dtype == torch.float64
