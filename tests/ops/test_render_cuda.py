"""The CUDA kernels of the rendering, built for the CPU by tests/cuda_emulator, under the tests of test_render.py and
test_yuv.py. What only a GPU can show is in test_render_gpu.py.
"""

from __future__ import annotations

import ctypes

import pytest
from emulator import CChannels, Emulator, build, in_place_of_cuda, needs_compiler
from test_render import (  # noqa: F401, they are collected here too
    formats,
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
from test_yuv import test_opencv_decodes_our_planes, test_what_a_player_decodes  # noqa: F401

pytestmark = [needs_compiler, pytest.mark.usefixtures("backend")]


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


class Render(Emulator):
    """What fastcolor._cuda has for the rendering."""

    def RenderProblem(self, *values) -> CProblem:
        *first, rows_at, rows_beyond, columns_at, columns_beyond, sharpness, floor = values
        return CProblem(*first, CPlaces(rows_at, rows_beyond), CPlaces(columns_at, columns_beyond), sharpness, floor)

    def render(self, scene, L, light, rgb, preserve_lightness, stream) -> None:
        planes = ctypes.byref(CChannels(*rgb))
        arguments = ctypes.byref(scene), ctypes.c_void_p(L), light, planes, ctypes.c_bool(preserve_lightness)
        assert self.library.run_render(*arguments) == 0

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
    return build("render", tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def backend(request, library, monkeypatch):
    with in_place_of_cuda(Render(library, request.node.name), monkeypatch) as backend:
        yield backend


@pytest.fixture
def simd():
    """No instruction sets here."""
