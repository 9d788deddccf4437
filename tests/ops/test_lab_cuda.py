"""The CUDA kernels of RGB ↔ Lab, built for the CPU by tests/cuda_emulator. What only a GPU can show is in
test_lab_gpu.py.
"""

from __future__ import annotations

import ctypes
import itertools
from functools import partial

import pytest
import torch
from emulator import CChannels, Emulator, build, in_place_of_cuda, needs_compiler
from helpers import largest_error
from test_lab import CONVERSIONS, HALVES, SHAPES, in_order, some_input

import fastcolor
from fastcolor.reference import lab as reference

pytestmark = [needs_compiler, pytest.mark.usefixtures("cuda")]

FLOATS = [torch.float32, *HALVES]
INTEGERS = [torch.uint8, torch.uint16]


class Lab(Emulator):
    """What fastcolor._cuda has for Lab."""

    def __getattr__(self, name):
        def call(*arguments):
            *arguments, images, pixels, _ = arguments
            given = [ctypes.c_bool(x) if isinstance(x, bool) else ctypes.byref(CChannels(*x)) for x in arguments]
            assert getattr(self.library, f"run_{name}")(*given, ctypes.c_int64(images), ctypes.c_int64(pixels)) == 0

        return call


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build("lab", tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def cuda(request, library, monkeypatch):
    with in_place_of_cuda(Lab(library, request.node.name), monkeypatch) as backend:
        yield backend


def types_of(name):
    """(type of the input, of the result): every pair."""
    more = INTEGERS if name == "rgb_to_lab" else [], INTEGERS if name == "lab_to_rgb" else []
    return itertools.product(FLOATS + more[0], FLOATS + more[1])


# with and without whole tiles, of 128 and of 256 pixels; a tile that is cut off
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 16, 68), (1, 3, 31, 64)], ids=str)
@pytest.mark.parametrize("layout", ["planar", "interleaved", "strided"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_forward_matches_float64(shape, layout, channels_last):
    for name, options in CONVERSIONS:
        for source, dtype in types_of(name):
            x = in_order(some_input(name, shape, source), layout)
            x = x.movedim(-3, -1) if channels_last else x
            convert = partial(getattr(reference, name), channels_last=channels_last, **options)
            result = getattr(fastcolor, name)(x, channels_last=channels_last, dtype=dtype, **options)
            assert result.dtype == dtype and result.is_contiguous()
            if not dtype.is_floating_point:
                exact = convert(x.double(), dtype=torch.float64) * reference.LEVELS[dtype]
                assert largest_error(result, exact) <= 0.5 + (16 if dtype == torch.uint16 else 0.1)
                continue
            exact = convert(x if not source.is_floating_point else x.double(), dtype=torch.float64)
            floor = 1e-3 if name == "rgb_to_lab" else 2e-4  # of the gamut's scale
            assert largest_error(result, exact) <= max(2 * largest_error(convert(x, dtype=dtype), exact), floor)


@pytest.mark.parametrize("layout", ["planar", "interleaved", "strided"])
@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 3, 17, 19), (2, 3, 16, 68)], ids=str)
def test_gradients_match_float64(shape, layout):
    for (name, options), source, result in itertools.product(CONVERSIONS, FLOATS, FLOATS):
        x, upstream = some_input(name, shape, source), torch.randn(shape).to(result)
        fast, exact = in_order(x, layout).detach().requires_grad_(), x.double().requires_grad_()
        getattr(fastcolor, name)(fast, dtype=result, **options).backward(in_order(upstream, layout))
        getattr(reference, name)(exact, **options).backward(upstream.double())
        assert fast.grad.dtype == source
        error = (fast.grad.double() - exact.grad).abs()
        # relative to the pixel's own gradient; at a kink (a knee, a gamut bound) either side is right
        scale = exact.grad.abs().amax(-3, keepdim=True) + 1e-3
        rounding = 0 if source == torch.float32 else torch.finfo(source).eps
        assert (error / scale > 2e-3 + rounding).any(-3).float().mean() <= 0.005


def test_addresses_at_odd_places():
    """Memory that is not aligned to an access goes pixel by pixel."""
    for (name, options), dtype in itertools.product(CONVERSIONS, FLOATS):
        x = some_input(name, (2, 3, 16, 32), dtype)
        shifted = torch.cat((x.new_zeros(1), x.flatten()))[1:].reshape(x.shape)
        convert = partial(getattr(fastcolor, name), **options)
        assert torch.equal(convert(shifted), convert(x))
