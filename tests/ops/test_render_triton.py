"""The Triton kernels of the rendering without a GPU: under the tests of test_render.py in the interpreter
(TRITON_INTERPRET=1), and compiled for a GPU.
"""

from __future__ import annotations

import pytest
from helpers import Backend
from test_render import (  # noqa: F401, they are collected here too
    test_chroma_planes_match_float64,
    test_compile_fullgraph,
    test_every_luma,
    test_luma_rows_that_lie_apart,
    test_matches_float64,
    test_nan,
    test_nan_in_guide_or_chroma,
    test_opcheck,
    test_other_inputs,
    test_types_of_numbers,
)

import fastcolor
from fastcolor.ops import _backend

triton = pytest.importorskip("triton", reason="triton is not installed")

compiled = pytest.mark.skipif(_backend.interpreting(), reason="nothing is compiled under TRITON_INTERPRET=1")


@pytest.fixture
def backend():
    if not _backend.interpreting():
        pytest.skip("runs under TRITON_INTERPRET=1")
    with fastcolor.use_backend("triton"):
        yield Backend("triton", "cpu")


@pytest.fixture
def formats():
    """To the kernels a matrix and a range are numbers: a few of them, with every location twice."""
    ranges, locations = (False, True), ("left", "center", "topleft")
    matrices = (("bt601", "bt709"), ("bt709", "bt709"), ("bt2020", "bt2020"))
    return [
        (matrix, full_range, primaries, locations[(i + full_range) % 3])
        for i, (matrix, primaries) in enumerate(matrices)
        for full_range in ranges
    ]


@pytest.fixture
def simd():
    """No instruction sets here."""


# --- ahead of time: a kernel that no longer compiles fails here, without a GPU --------------------------------------

TABLES = ("i32", "fp32", "i32", "fp32")
LARGEST = {"u8": 255, "u16": 65535}


def signatures():
    """Every kernel with the types that it is launched with: (name, pointers, integers, floats, constants)."""
    for low, light, result in (
        ("fp32", "fp32", "u8"), ("fp32", "fp32", "u16"), ("fp32", "fp32", "fp32"), ("fp16", "fp16", "fp16"),
        ("bf16", "bf16", "bf16"),
    ):  # fmt: skip
        for preserve in (False, True) if result == "u8" else (True,):
            for interleaved in (False, True) if result in ("u8", "fp32") else (False,):
                constants = {"LARGEST": LARGEST.get(result, 0), "PRESERVE": preserve, "INTERLEAVED": interleaved}
                yield "render_kernel", (low, low, light, result, *TABLES), 7, 2, constants
    for sample, down, before_down, across, before_across in (
        ("u8", 2, 0, 2, 1), ("u8", 2, 0, 2, 0), ("u16", 2, 1, 2, 1), ("u16", 1, 0, 2, 1), ("u16", 1, 0, 1, 0),
    ):  # fmt: skip
        constants = {"DOWN": down, "BEFORE_DOWN": before_down, "ACROSS": across, "BEFORE_ACROSS": before_across}
        yield "render_uv_kernel", ("fp32", "fp32", sample, sample, sample, *TABLES), 10, 19, constants
    for sample in ("u8", "u16"):
        yield "look_up_kernel", (sample, "fp32", "fp32"), 1, 0, {}


def compile_for(arch, name, pointers, integers, floats, constants, ones=False):
    """`ones`: every size is 1, which Triton takes for a constant."""
    from fastcolor.kernels.triton import render
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(render, name)
    types = [*(f"*{p}" for p in pointers), *["constexpr" if ones else "i32"] * integers, *["fp32"] * floats]
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants), strict=True))
    constants = {**constants, **(dict.fromkeys(kernel.arg_names[len(pointers) :][:integers], 1) if ones else {})}
    # as at run time: addresses and sizes of ordinary pictures are multiples of 16
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(signature.items())
        if kind[0] == "*" or (kind == "i32" and argument in ("width", "pixels", "luma_row", "luma_image", "n"))
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm


@compiled
@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("name", sorted({signature[0] for signature in signatures()}))
def test_compiles_ahead_of_time(name, arch):
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 3):
        pytest.skip("triton < 3.3 takes signatures in another form")
    from fastcolor.kernels.triton import render

    of_name = [s for s in signatures() if s[0] == name]
    for _, pointers, *counts, constants in of_name:
        tile = {"BLOCK": render.LOOK_UP} if name == "look_up_kernel" else {"COLUMNS": 512, "BLOCK": render.BLOCK}
        asm = compile_for(arch, name, pointers, *counts, {**constants, **tile})
        assert asm["cubin"]
        if name == "render_kernel":
            wide = 2 + (pointers[2] == "fp32")  # the two tables of columns, and L
            assert asm["ptx"].count("ld.global.v4") == wide  # 16 bytes a thread and access
            if pointers[3] == "fp32" and not constants["INTERLEAVED"]:
                assert asm["ptx"].count("st.global.v4") == 3
        if name == "look_up_kernel":
            assert asm["ptx"].count("st.global.v4") == 2  # eight samples of a thread
    _, pointers, *counts, constants = of_name[0]
    for columns in render.COLUMNS[:2]:
        tile = {"BLOCK": render.LOOK_UP} if name == "look_up_kernel" else {"COLUMNS": columns, "BLOCK": render.BLOCK}
        for ones in (False, True):
            assert compile_for(arch, name, pointers, *counts, {**constants, **tile}, ones)["cubin"]
