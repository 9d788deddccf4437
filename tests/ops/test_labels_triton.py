"""Look-ups of the nearest labels in Triton against `ColorBins`: in the interpreter, compiled for a GPU, and on one."""

from __future__ import annotations

import pytest
import torch
from test_labels import SPACES, points

import fastcolor
from fastcolor.ops import _backend
from fastcolor.ops.labels import label_histogram, nearest_labels

triton = pytest.importorskip("triton", reason="triton is not installed")

compiled = pytest.mark.skipif(_backend.interpreting(), reason="nothing is compiled under TRITON_INTERPRET=1")
ON = [
    pytest.param("cpu", marks=pytest.mark.skipif(not _backend.interpreting(), reason="runs under TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


def some_points(device):
    """Of each kind in points(), as many as the interpreter has time for."""
    ab = points() if device == "cuda" else torch.cat((points()[:200], points()[2000::13], points()[-7:]))
    return ab.to(device)


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("bins", SPACES, ids=str)
@pytest.mark.parametrize("neighbors", [1, 5])
def test_nearest_is_that_of_the_bins(bins, neighbors, device):
    ab = some_points(device)
    with fastcolor.use_backend("triton"):
        index, squared = nearest_labels(ab, bins, neighbors)
    expected, distance = bins.nearest(ab, neighbors)
    assert torch.equal(index, expected)
    assert torch.equal(squared.nan_to_num(-1), distance.nan_to_num(-1))


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("bins", SPACES, ids=str)
def test_histogram_is_that_of_the_bins(bins, device):
    ab = some_points(device)
    with fastcolor.use_backend("triton"):
        assert torch.equal(label_histogram(ab, bins), bins.histogram(ab))
        planes = ab[:40].T.reshape(1, 2, 5, 8).half().movedim(1, -1)  # 16 bits, strided
        assert torch.equal(label_histogram(planes, bins), bins.histogram(planes))
        assert label_histogram(ab[:0], bins).tolist() == [0.0] * bins.count


@compiled
@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("histogram", [False, True])
def test_compiles_ahead_of_time(histogram, arch):
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 3):
        pytest.skip("triton < 3.3 takes signatures in another form")
    from fastcolor.kernels.triton import labels as module
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = ["fp32", "fp32", "fp32", "i32", "i64", "fp32", "i64"]
    for axes, count, side, width in ((1, 313, 52, 16), (2, 25, 1, 32)):
        n = 1 if histogram or axes == 2 else 5
        constants = {
            "AXES": axes, "COUNT": count, "SIDE": side, "WIDTH": width, "N": n, "COLUMNS": triton.next_power_of_2(n),
            "HISTOGRAM": histogram, "P": module.PIXELS, "C": module.CHUNK,
        }  # fmt: skip
        types = [*(f"*{p}" for p in pointers), "i32", "fp32", "fp32", *["constexpr"] * len(constants)]
        signature = dict(zip(module.labels_kernel.arg_names, types, strict=True))
        source = ASTSource(module.labels_kernel, signature, constants)
        options = {"num_warps": module.WARPS, "enable_fp_fusion": False}
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        assert binary.asm["cubin"]
        assert ".local" not in binary.asm["ptx"]
        assert ("atom" in binary.asm["ptx"] or "red.global" in binary.asm["ptx"]) == histogram
