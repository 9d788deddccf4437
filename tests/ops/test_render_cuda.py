"""The CUDA kernels of the rendering, built for the CPU by tests/cuda_emulator, under the tests of test_render.py and
test_yuv.py. What only a GPU can show is in test_render_gpu.py.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import zlib
from contextlib import nullcontext
from pathlib import Path

import pytest
from helpers import Backend
from test_render import (  # noqa: F401, they are collected here too
    formats,
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
from test_yuv import test_opencv_decodes_our_planes, test_what_a_player_decodes  # noqa: F401

import fastcolor
from fastcolor.ops import _backend
from fastcolor.ops import render as op

TESTS = Path(__file__).parents[1]
KERNELS = TESTS.parent / "kernels"
COMPILER = shutil.which("g++")

pytestmark = [
    pytest.mark.skipif(
        COMPILER is None or not KERNELS.exists(), reason="no g++, or the sources are not beside the tests"
    ),
    pytest.mark.usefixtures("backend"),
]


class CPlaces(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("beyond", ctypes.c_void_p)]


class CProblem(ctypes.Structure):
    """RenderProblem of kernels/cuda/render.h."""

    _fields_ = [
        ("ab", ctypes.c_void_p), ("guide", ctypes.c_void_p), ("storage", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("batch", "low_height", "low_width", "height", "width")),
        ("rows", CPlaces), ("columns", CPlaces), ("sharpness", ctypes.c_float), ("floor", ctypes.c_float),
    ]  # fmt: skip


class CYuv(ctypes.Structure):
    """YuvLayout of kernels/cuda/render.h."""

    _fields_ = [
        ("down", ctypes.c_int64), ("across", ctypes.c_int64), ("cosited_down", ctypes.c_bool),
        ("cosited_across", ctypes.c_bool), ("bits", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("black", "luma_span", "chroma_span", "red", "blue")),
        ("xyz_to_rgb", ctypes.c_void_p),
    ]  # fmt: skip


class Emulator:
    """What fastcolor._cuda has for the rendering."""

    def __init__(self, library: Path, seed: int):
        self.library = ctypes.CDLL(str(library))
        self.library.set_seed(seed)

    def RenderProblem(self, *values) -> CProblem:
        *first, rows_at, rows_beyond, columns_at, columns_beyond, sharpness, floor = values
        return CProblem(*first, CPlaces(rows_at, rows_beyond), CPlaces(columns_at, columns_beyond), sharpness, floor)

    def render(self, scene, L, light, rgb, sample, interleaved, preserve_lightness, stream) -> None:
        assert self.library.run_render(
            ctypes.byref(scene), ctypes.c_void_p(L), light, ctypes.c_void_p(rgb), sample, ctypes.c_bool(interleaved),
            ctypes.c_bool(preserve_lightness),
        ) == 0  # fmt: skip

    def render_uv(self, scene, *values) -> None:
        *yuv, luma, height, width, row, image, u, v, stream = values
        assert self.library.run_render_uv(
            ctypes.byref(scene), ctypes.byref(CYuv(*yuv)), ctypes.c_void_p(luma),
            *map(ctypes.c_int64, (height, width, row, image)), ctypes.c_void_p(u), ctypes.c_void_p(v),
        ) == 0  # fmt: skip

    def look_up(self, samples, wide, table, out, n, stream) -> None:
        addresses = [ctypes.c_void_p(x) for x in (samples, table, out)]
        assert self.library.run_look_up(addresses[0], ctypes.c_bool(wide), *addresses[1:], ctypes.c_int64(n)) == 0


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    to = tmp_path_factory.mktemp("emulator") / "render.so"
    # the processor would forgive an access that is not aligned, as a GPU does not
    aligned = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    command = [
        COMPILER, *aligned,
        "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
        f"-I{TESTS / 'cuda_emulator'}", f"-I{KERNELS}", *os.environ.get("FASTCOLOR_EMULATOR_FLAGS", "").split(),
        str(TESTS / "cuda_emulator" / "render.cpp"), "-o", str(to),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    return to


@pytest.fixture
def backend(request, library, monkeypatch):
    """The backend "cuda", on CPU tensors."""
    emulator, native = Emulator(library, zlib.crc32(request.node.name.encode())), _backend.native
    monkeypatch.setattr(_backend, "native", lambda module: emulator if module == "_cuda" else native(module))
    monkeypatch.setattr(_backend, "missing", lambda name: None)
    monkeypatch.setattr(_backend, "runs_on", lambda name, device: None)
    monkeypatch.setattr(op, "_stream", lambda device: nullcontext(0))
    with fastcolor.use_backend("cuda"):
        yield Backend("cuda", "cpu")


@pytest.fixture
def simd():
    """No instruction sets here."""
