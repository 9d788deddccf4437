"""Choice of backend: explicit wishes raise, automatic choices fall back and say so once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

import fastcolor
from fastcolor.ops import _backend

CPU = torch.device("cpu")


@pytest.fixture
def without_cpp(monkeypatch):
    """As after an installation without a compiler."""
    monkeypatch.setattr(_backend, "native", lambda module: "No module named 'fastcolor._cpu'")
    _backend._missing.cache_clear()
    _backend.say_once.cache_clear()
    yield
    _backend._missing.cache_clear()


def test_unknown_name():
    with pytest.raises(
        fastcolor.BackendError, match="no backend is called 'simd'; there are cuda, triton, cpp, reference"
    ):
        with fastcolor.use_backend("simd"):
            pass


def test_absent_backend_says_what_is_missing(without_cpp):
    with pytest.raises(fastcolor.BackendError, match=r"not built .*reinstall with a C\+\+17 compiler"):
        with fastcolor.use_backend("cpp"):
            pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_cuda_without_a_device():
    with pytest.raises(fastcolor.BackendError, match="needs a CUDA device"):
        with fastcolor.use_backend("cuda"):
            pass


def test_unlike_devices_have_their_own_choice(monkeypatch):
    """One GPU that is too old for the CUDA kernels keeps none from the other, in whichever order they stand."""
    old, new = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=old: (7, 5) if device == old else (9, 0))
    monkeypatch.setattr(_backend, "native", lambda module: object())
    monkeypatch.setitem(_backend.OFFERS, "quick", ("cuda", "reference"))
    caches = (_backend._missing, _backend._choose, _backend.say_once)
    try:
        for cache in caches:
            cache.cache_clear()
        assert _backend.choose("quick", new).name == "cuda"
        choice = _backend.choose("quick", old)
        assert choice.name == "reference" and "8.0 and above, cuda:0 has 7.5" in choice.why
        with fastcolor.use_backend("cuda"):
            assert _backend.choose("quick", new).name == "cuda"
            with pytest.raises(fastcolor.BackendError, match="cuda:0 has 7.5"):
                _backend.choose("quick", old)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        _backend._missing.cache_clear()
        assert "8.0 and above" in _backend.missing("cuda")
    finally:
        for cache in caches:
            cache.cache_clear()


def test_fallback_works_and_is_said_once(without_cpp, caplog):
    rgb = torch.rand(3, 4, 4)
    with caplog.at_level(logging.WARNING, "fastcolor"):
        first, second = fastcolor.rgb_to_lab(rgb), fastcolor.rgb_to_lab(rgb)
    assert torch.equal(first, second)
    assert len(caplog.records) == 1
    assert "runs on the reference backend: the C++ kernels are not built" in caplog.text


def test_operation_without_the_backend(monkeypatch):
    monkeypatch.setitem(_backend.OFFERS, "slow", ("reference",))
    with fastcolor.use_backend("cpp"):
        with pytest.raises(fastcolor.BackendError, match="slow has no backend 'cpp'; it has reference"):
            _backend.choose("slow", CPU)
    with fastcolor.use_backend("cpp", "reference"):
        assert _backend.choose("slow", CPU).name == "reference"
        assert _backend.choose("rgb_to_lab", CPU).name == "cpp"


def test_nesting_and_errors_restore():
    with fastcolor.use_backend("reference"):
        with pytest.raises(ZeroDivisionError), fastcolor.use_backend("auto"):
            assert _backend.forced() == ()
            raise ZeroDivisionError
        assert _backend.forced() == ("reference",)
    assert _backend.forced() == ()


@pytest.mark.parametrize(
    ("value", "expected"),
    [("reference", ("reference",)), ("auto", ()), ("", ()), ("Cpp, Reference", ("cpp", "reference"))],
)
def test_environment(monkeypatch, value, expected):
    monkeypatch.setenv("FASTCOLOR_BACKEND", value)
    assert _backend._from_environment() == expected


def test_a_typing_error_in_the_environment(tmp_path):
    """Named where an operation runs, and no obstacle to anything else."""
    environment = {**os.environ, "FASTCOLOR_BACKEND": "fast"}
    code = "import torch, fastcolor; print('imported'); fastcolor.rgb_to_lab(torch.zeros(3, 1, 1))"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout == "imported\n" and run.returncode == 1
    assert "FASTCOLOR_BACKEND: no backend is called 'fast'; there are cuda, triton, cpp, reference" in run.stderr


@pytest.mark.parametrize(
    "value, expected",
    [
        ("baseline", "baseline\n"),
        ("Auto", None),
        ("sse", "BackendError: FASTCOLOR_SIMD must be auto, avx512, avx2 or baseline, got 'sse'"),
    ],
)
def test_instruction_set_of_the_environment(value, expected):
    if _backend.missing("cpp"):
        pytest.skip("no C++ kernels")
    code = (
        "import torch, fastcolor; from fastcolor.ops import _backend; fastcolor.rgb_to_lab(torch.zeros(3, 1, 1)); "
        "print(_backend.native('_cpu').simd_level())"
    )
    environment = {**os.environ, "FASTCOLOR_SIMD": value}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if value == "sse":
        assert run.returncode == 1 and expected in run.stderr
    else:
        assert run.returncode == 0 and run.stdout in ([expected] if expected else ["AVX-512\n", "AVX2\n", "baseline\n"])
