"""color_cross_entropy in C++ against the float64 reference, which test_cross_entropy.py holds against a naive loop."""

from __future__ import annotations

import pytest
import torch
from helpers import every_simd
from torch.utils.data import DataLoader

import fastcolor
from fastcolor import ColorBins, color_cross_entropy
from fastcolor.ops import _backend
from fastcolor.reference import cross_entropy as reference

pytestmark = pytest.mark.skipif(_backend.missing("cpp") is not None, reason="no C++ kernels")
SMALL = ColorBins(centers=[[0, 0], [10, 0.5], [3.25, 7]])
SPACES = {"joint": ColorBins(), "separable": ColorBins("separable"), "three": SMALL}
SHAPES = [(1, 1, 1), (2, 1, 67), (1, 13, 11), (2, 8, 16)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_cpp():
    with fastcolor.use_backend("cpp"):
        yield


def problem(bins, shape, dtype=torch.float32, last=False, scale=3.0):
    batch, height, width = shape
    u = (torch.randn(batch, bins.count, height, width) * scale).to(dtype)
    if last:
        u = torch.empty(batch, height, width, bins.count, dtype=dtype).movedim(-1, 1).copy_(u)
    return u, torch.randn(batch, 2, height, width) * 45


def both(u, ab, factor=1.0, **options):
    """Loss and gradient of ours, and of the reference in float64."""
    options = {"bins": SPACES["joint"], **options}
    ours, exact = u.detach().requires_grad_(), u.double().requires_grad_()
    loss = color_cross_entropy(ours, ab, **options)
    (loss * factor).sum().backward()
    expected = reference.color_cross_entropy(exact, ab.double(), **options)
    (expected * factor).sum().backward()
    assert loss.dtype == torch.float32 and ours.grad.dtype == u.dtype
    return loss, ours.grad, expected, exact.grad


def assert_close(loss, grad, expected, exact, largest=1.0):
    """Losses to float32's rounding; gradients, whose parts are up to `largest`, rounded once to their type."""
    assert ((loss - expected).abs() <= 2e-6 * (5 + expected.abs())).all()
    eps = torch.finfo(grad.dtype).eps if grad.dtype != torch.float32 else 0
    tiny = torch.finfo(grad.dtype).smallest_normal * eps
    assert ((grad - exact).abs() <= 2e-6 * largest + exact.abs() * eps / 2 + tiny).all()


@every_simd
@pytest.mark.parametrize("last", [False, True], ids=["planes", "labels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SPACES)
def test_matches_float64(kind, dtype, last):
    bins = SPACES[kind]
    for shape in SHAPES:
        u, ab = problem(bins, shape, dtype, last)
        weights, ignore = torch.rand(bins.count) + 0.5, torch.rand(shape) < 0.3
        for reduction in ("mean", "sum", "none"):
            options = {"bins": bins, "weights": weights, "ignore": ignore, "reduction": reduction}
            if ignore.all() and reduction == "mean":
                continue
            assert_close(*both(u, ab, **options), largest=1.5)
        found = both(u, ab, torch.rand(shape) + 0.5, bins=bins, reduction="none", neighbors=3, sigma=8.0)
        assert_close(*found, largest=1.5)
        assert u.is_contiguous() or found[1].movedim(1, -1).is_contiguous()  # in the order of the logits


@every_simd
@pytest.mark.parametrize("last", [False, True])
def test_without_a_gradient(last):
    u, ab = problem(SPACES["joint"], (2, 7, 11), last=last)
    kept = both(u, ab, reduction="none")[0]
    assert torch.equal(color_cross_entropy(u, ab, reduction="none"), kept)


@every_simd
@pytest.mark.parametrize("last", [False, True])
def test_extreme_logits(last):
    u, ab = problem(SPACES["joint"], (1, 9, 9), last=last, scale=1e4)
    assert_close(*both(u, ab, reduction="none"))
    u[:, ::3] = -torch.inf
    loss, grad, expected, exact = both(u, ab, reduction="none")
    assert torch.equal(loss.isinf(), expected.isinf()) and torch.equal(loss.isnan(), expected.isnan())
    assert (grad - exact).abs().max() <= 2e-6


@every_simd
@pytest.mark.parametrize("last", [False, True])
def test_nan_stays_where_it_is(last):
    u, ab = problem(SPACES["joint"], (1, 9, 9), last=last)
    u[0, 312, 2, 3] = torch.nan  # in the last vector
    u[0, 5, 4, 4] = torch.nan
    ab[0, 0, 7, 7] = torch.nan
    u[0, :, 8, 8] = torch.nan
    ignore = torch.zeros(1, 9, 9, dtype=torch.bool)
    ignore[0, 8, 8] = True
    bad = torch.zeros(1, 9, 9, dtype=torch.bool)
    bad[0, [2, 4, 7], [3, 4, 7]] = True
    u.requires_grad_()
    loss = color_cross_entropy(u, ab, ignore=ignore, reduction="none")
    loss.sum().backward()
    assert torch.equal(loss.isnan(), bad) and torch.equal(u.grad.isnan().any(1), bad)
    assert (u.grad[0, :, 8, 8] == 0).all() and loss[0, 8, 8] == 0


def test_nothing_to_count():
    for shape in ((0, 3, 3), (2, 0, 3)):
        u, ab = problem(SPACES["joint"], shape)
        assert color_cross_entropy(u, ab, reduction="sum") == 0 and color_cross_entropy(u, ab).isnan()
        assert color_cross_entropy(u, ab, reduction="none").shape == shape
    u, ab = problem(SPACES["joint"], (1, 2, 2))
    loss, grad, expected, exact = both(u, ab, ignore=torch.ones(1, 2, 2, dtype=torch.bool))
    assert loss.isnan() and expected.isnan() and (grad == 0).all()


def test_scaled_float16_gradients_do_not_vanish():
    """A gradient scaler's factor comes after the division by the pixels."""
    u, ab = problem(SPACES["joint"], (1, 128, 128))
    ignore = torch.zeros(1, 128, 128, dtype=torch.bool)
    ignore[:, :9] = True
    for mask in (None, ignore):
        loss, grad, expected, exact = both(u.half(), ab, 65536.0, ignore=mask)
        assert (loss - expected).abs() <= 1e-5
        assert (grad - exact).norm() <= 1e-3 * exact.norm()
        assert ((grad == 0) & (exact.abs() > 1e-6)).sum() == 0


@pytest.mark.parametrize("last", [False, True])
def test_threads_do_not_change_a_bit(last):
    u, ab = problem(SPACES["joint"], (3, 17, 19), last=last)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        x = u.clone().requires_grad_()
        loss = color_cross_entropy(x, ab)
        loss.backward()
        results.append((loss, x.grad))
    torch.set_num_threads(before)
    assert all(torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1]) for loss, grad in results)


@pytest.mark.parametrize("kind", SPACES)
def test_a_flat_target(kind):
    u, ab = problem(SPACES[kind], (1, 3, 5))
    assert_close(*both(u, ab, bins=SPACES[kind], sigma=torch.inf, reduction="none"))


def test_other_strides_and_factors():
    u, ab = problem(SPACES["joint"], (2, 6, 5))
    turned = u.transpose(2, 3).contiguous().transpose(2, 3)
    for factor in (1.0, -2.5, 0.0):
        found = both(turned, ab.transpose(2, 3).contiguous().transpose(2, 3), factor)
        assert_close(*found, largest=2.5)


def test_a_kept_graph_can_be_gone_through_again():
    u, ab = problem(SPACES["joint"], (1, 4, 4))
    u.requires_grad_()
    loss = color_cross_entropy(u, ab)
    (first,) = torch.autograd.grad(loss * 3, u, retain_graph=True)
    (second,) = torch.autograd.grad(loss, u, retain_graph=True)
    (third,) = torch.autograd.grad(loss, u)
    assert torch.allclose(first, 3 * second) and torch.equal(second, third)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(layout, reduction):
    u, ab = problem(SMALL, (2, 4, 5))
    u = u.contiguous(memory_format=layout)
    ops = torch.ops.fastcolor
    fixed = ("joint", [0.0, 0.0, 10.0, 0.5, 3.25, 7.0], 2, 0.02)
    weights, ignore = torch.rand(3), torch.rand(2, 4, 5) < 0.5
    torch.library.opcheck(ops.color_cross_entropy.default, (u, ab, weights, ignore, *fixed, reduction, True))
    upstream = torch.rand(2, 4, 5)
    torch.library.opcheck(ops.color_cross_entropy_backward.default, (upstream, u, ab, None, None, *fixed))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(reduction):
    u, ab = problem(SPACES["joint"], (1, 4, 4))

    def run(x):
        return color_cross_entropy(x, ab, reduction=reduction).sum() * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, y = u.clone().requires_grad_(), u.clone().requires_grad_()
    run(x).backward()
    compiled(y).backward()
    assert torch.equal(x.grad, y.grad)


def test_what_kernels_do_not_take():
    u, ab = problem(SPACES["joint"], (1, 2, 2))
    with pytest.raises(fastcolor.BackendError, match="float64 is computed on the reference"):
        color_cross_entropy(u.double(), ab)
    with pytest.raises(fastcolor.BackendError, match="kernels take up to 16 neighbors, got 17"):
        color_cross_entropy(u, ab, neighbors=17)


class _Losses:
    def __len__(self):
        return 2

    def __getitem__(self, i):
        u, ab = problem(SPACES["joint"], (1, 8, 16))
        return color_cross_entropy(u, ab)


def test_in_a_forked_worker():
    u, ab = problem(SPACES["joint"], (2, 16, 16))
    color_cross_entropy(u, ab)  # with threads, before the fork
    loader = DataLoader(_Losses(), num_workers=1, multiprocessing_context="fork", timeout=60)
    assert all(x.isfinite().all() for x in loader)


@every_simd
@pytest.mark.parametrize("last", [False, True], ids=["planes", "labels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_gradients(dtype, last):
    """From 4 MB on they are written past the caches: the same bits as in small pieces, at any address."""
    rows = 60 if dtype == torch.float32 else 120
    u, ab = problem(SPACES["joint"], (1, rows, 64), dtype, last)  # whole blocks of 64 pixels, whose sums do not move
    assert u.numel() * u.element_size() > 1 << 22

    def gradient(part):
        x = u[:, :, part].detach()
        x = x.contiguous(memory_format=torch.channels_last) if last else x.contiguous()
        x.requires_grad_()
        color_cross_entropy(x, ab[:, :, part].contiguous(), bins=SPACES["joint"], reduction="sum").backward()
        return x.grad

    whole, step = gradient(slice(None)), rows // 4
    pieces = torch.cat([gradient(slice(i, i + step)) for i in range(0, rows, step)], 2)
    assert torch.equal(whole, pieces)


def test_gradient_where_torch_does_not_tell_whether_a_graph_is_kept(monkeypatch):
    u, ab = problem(SPACES["joint"], (1, 2, 3))
    u.requires_grad_()
    (expected,) = torch.autograd.grad(color_cross_entropy(u, ab) * 3, u)
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    loss = color_cross_entropy(u, ab) * 3
    for kept in (True, False):
        (grad,) = torch.autograd.grad(loss, u, retain_graph=kept)
        assert torch.equal(grad, expected)
