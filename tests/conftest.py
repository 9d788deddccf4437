from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from fastcolor.ops import _backend

sys.path.insert(0, str(Path(__file__).parent))  # for helpers.py, from every folder of tests


def pytest_collection_modifyitems(config, items):
    """Tests that are marked slow run only where `-m` names them."""
    if "slow" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="minutes long: run with -m slow"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that nothing wrote reads as nan, or as the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fresh_choice():
    """Tests may pretend that a backend is there, or is not."""
    _backend._choose.cache_clear()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def simd(request):
    """Each instruction set of the C++ kernels in turn, as far as this machine has it."""
    native = _backend.native("_cpu")
    if isinstance(native, str):
        pytest.skip("no C++ kernels")
    try:
        native.use_simd(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.use_simd(os.environ.get("FASTCOLOR_SIMD", "auto").lower())
