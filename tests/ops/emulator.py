"""CUDA kernels on the CPU: libraries built by tests/cuda_emulator, in the place of fastcolor._cuda."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from helpers import Backend

import fastcolor
from fastcolor.ops import _backend

TESTS = Path(__file__).parents[1]
KERNELS = TESTS.parent / "kernels"
COMPILER = shutil.which("g++")

needs_compiler = pytest.mark.skipif(
    COMPILER is None or not KERNELS.exists(), reason="no g++, or the sources are not beside the tests"
)


class CChannels(ctypes.Structure):
    """Channels of kernels/common/storage.h, from the tuple that the bindings take."""

    _fields_ = [("base", ctypes.c_void_p), ("sample", ctypes.c_int), ("interleaved", ctypes.c_bool)]


def build(name: str, folder: Path) -> Path:
    """The library of kernels/cuda/NAME.cu."""
    to = folder / f"{name}.so"
    # the processor would forgive an access that is not aligned, as a GPU does not
    aligned = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    command = [
        COMPILER, *aligned,
        "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
        f"-I{TESTS / 'cuda_emulator'}", f"-I{KERNELS}", *os.environ.get("FASTCOLOR_EMULATOR_FLAGS", "").split(),
        str(TESTS / "cuda_emulator" / f"{name}.cpp"), "-o", str(to),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    return to


class Emulator:
    """A library that was built. Threads are drawn by lot, by the name of the test."""

    def __init__(self, library: Path, test: str):
        self.library = ctypes.CDLL(str(library))
        self.library.set_seed(zlib.crc32(test.encode()))


@contextmanager
def in_place_of_cuda(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The backend "cuda", on CPU tensors."""
    native = _backend.native
    monkeypatch.setattr(_backend, "native", lambda module: emulator if module == "_cuda" else native(module))
    monkeypatch.setattr(_backend, "missing", lambda name: None)
    monkeypatch.setattr(_backend, "_elsewhere", lambda name, device: None)
    monkeypatch.setattr(_backend, "stream", lambda device: nullcontext(0))
    with fastcolor.use_backend("cuda"):
        yield Backend("cuda", "cpu")
