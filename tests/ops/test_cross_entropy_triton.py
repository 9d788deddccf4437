"""The Triton kernel of the loss without a GPU: in the interpreter (TRITON_INTERPRET=1), and compiled for one."""

from __future__ import annotations

import pytest
import torch

import fastcolor
from fastcolor import ColorBins
from fastcolor.ops import _backend
from fastcolor.reference import cross_entropy as reference

triton = pytest.importorskip("triton", reason="triton is not installed")

interpreted = pytest.mark.skipif(not _backend.interpreting(), reason="runs under TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(_backend.interpreting(), reason="nothing is compiled under TRITON_INTERPRET=1")
SPACES = {
    "joint": ColorBins(),
    "separable": ColorBins("separable"),
    "three": ColorBins(centers=[[0, 0], [10, 0.5], [3.25, 7]]),
}


@pytest.fixture
def on_triton():
    with fastcolor.use_backend("triton"):
        yield


def problem(bins, shape, dtype=torch.float32, last=False):
    batch, height, width = shape
    logits = (torch.randn(batch, bins.count, height, width) * 3).to(dtype)
    logits = logits.contiguous(memory_format=torch.channels_last) if last else logits
    return logits, torch.randn(batch, 2, height, width) * 45


def both(logits, ab, factor=1.0, **options):
    """Loss and gradient of ours, and of the reference in float64."""
    ours, exact = logits.detach().requires_grad_(), logits.double().requires_grad_()
    loss = fastcolor.color_cross_entropy(ours, ab, **options)
    (loss * factor).sum().backward()
    expected = reference.color_cross_entropy(exact, ab.double(), **{"bins": SPACES["joint"], **options})
    (expected * factor).sum().backward()
    assert loss.dtype == torch.float32 and ours.grad.dtype == logits.dtype
    return loss, ours.grad, expected, exact.grad


def assert_close(loss, grad, expected, exact):
    assert ((loss - expected).abs() <= 4e-6 * (5 + expected.abs())).all()
    eps = torch.finfo(grad.dtype).eps if grad.dtype != torch.float32 else 0
    assert ((grad - exact).abs() <= 4e-6 + exact.abs() * eps + eps**2).all()


@interpreted
@pytest.mark.parametrize("last", [False, True], ids=["planes", "labels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SPACES)
def test_matches_float64(on_triton, kind, dtype, last):
    bins = SPACES[kind]
    for shape in ((1, 1, 1), (2, 3, 13)):
        logits, ab = problem(bins, shape, dtype, last)
        weights, ignore = torch.rand(bins.count) + 0.5, torch.rand(shape) < 0.3
        ignore[:, 0, 0] = False
        for reduction in ("mean", "sum"):
            options = {"bins": bins, "weights": weights, "ignore": ignore, "reduction": reduction}
            assert_close(*both(logits, ab, 3.0 if reduction == "mean" else 1.0, **options))
        assert_close(*both(logits, ab, bins=bins))
        assert_close(*both(logits, ab, torch.rand(shape) + 0.5, bins=bins, reduction="none", neighbors=3, sigma=8.0))


@interpreted
def test_hard_cases(on_triton):
    """Far colours, the borders of the table, exact ties, extreme logits, a flat target, no colour at all."""
    far = [[1e3, -4.0], [-131.0, 5], [129.9999, 130], [5, 5], [-5, 15], [-700.0, 400.0], [0, 0], [130, -130]]
    ab = torch.tensor(far).T.reshape(1, 2, 2, 4).contiguous()
    for kind, bins in SPACES.items():
        logits = problem(bins, (1, 2, 4))[0]
        assert_close(*both(logits, ab, bins=bins, reduction="none"))
        assert_close(*both(logits, ab, bins=bins, reduction="none", sigma=torch.inf))
        logits[:, ::3], logits[:, 1::3] = 1e4, -1e4
        loss, grad, expected, exact = both(logits, ab, bins=bins, reduction="none")
        assert torch.allclose(loss.double(), expected, rtol=1e-5), kind
        assert (grad - exact).abs().max() <= 1e-5
    logits, nothing = problem(SPACES["joint"], (1, 1, 2))[0], torch.tensor([[[[torch.nan, 3.0]], [[1.0, 4.0]]]])
    loss = fastcolor.color_cross_entropy(logits, nothing, reduction="none")
    assert loss.isnan().tolist() == [[[True, False]]]
    ignore = torch.tensor([[[True, False]]])
    loss, grad, expected, exact = both(logits, nothing, ignore=ignore)
    assert_close(loss, grad, expected, exact.nan_to_num(0))
    assert fastcolor.color_cross_entropy(logits[:0], nothing[:0], reduction="sum") == 0


@interpreted
def test_without_a_gradient(on_triton):
    logits, ab = problem(SPACES["joint"], (1, 2, 3))
    loss = fastcolor.color_cross_entropy(logits, ab)
    assert (loss - reference.color_cross_entropy(logits.double(), ab.double(), SPACES["joint"])).abs() <= 1e-5


@compiled
@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_compiles_ahead_of_time(dtype, arch):
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 3):
        pytest.skip("triton < 3.3 takes signatures in another form")
    from fastcolor.kernels.triton import cross_entropy as module
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = module.cross_entropy_kernel
    pointers = [dtype, "fp32", "fp32", "fp32", "i32", "fp32", "u8", "fp32", "fp32", "fp32", dtype]
    types = [*(f"*{p}" for p in pointers), "i32", "i32", "fp32", "fp32", "fp32"]
    for last in (False, True):
        for full in (False, True):
            constants = {
                "K": 313, "AXES": 1, "COUNT": 313, "SIDE": 52, "WIDTH": 16, "N": 5, "COLUMNS": 8, "LABELS_LAST": last,
                "WEIGHTED": full, "MASKED": full, "UPSTREAM": full, "GRAD": True, "P": module.PIXELS, "C": module.CHUNK,
            }  # fmt: skip
            signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
            aligned = {(i,): [["tt.divisibility", 16]] for i in [*range(len(pointers)), 12]}
            source = ASTSource(kernel, signature, constants, aligned)
            binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": module.WARPS})
            assert binary.asm["cubin"]
            assert ".local" not in binary.asm["ptx"]
