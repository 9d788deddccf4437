"""Which backend runs an operation: a wish that fails raises, an automatic choice falls back and says so once."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from fastcolor.kernels.triton import interpreting

log = logging.getLogger("fastcolor")

BACKENDS = ("cuda", "triton", "cpp", "reference")  # fastest first, where several run on a device
_ENVIRONMENT = "FASTCOLOR_BACKEND"
_SIMD = "FASTCOLOR_SIMD"  # instruction set of the C++ kernels

# Not thread-local: a plain module variable is what torch.compile can guard on, and the colorizer's threads share it.
_forced: tuple[str, ...] = ()
# A typing error in the environment is raised where an operation runs: it must not stop `import` or `fastcolor --help`.
_environment_error: str | None = None


class BackendError(RuntimeError):
    """A backend was asked for that is not there, or that does not have the operation."""


@dataclass(frozen=True)
class Choice:
    """The backend that runs an operation, and why."""

    name: str
    why: str


def _check(names: tuple[str, ...], source: str) -> tuple[str, ...]:
    unknown = [n for n in names if n not in BACKENDS]
    if unknown:
        raise BackendError(f"{source}: no backend is called {unknown[0]!r}; there are {', '.join(BACKENDS)}")
    return names


def _from_environment() -> tuple[str, ...]:
    names = tuple(n.strip() for n in os.environ.get(_ENVIRONMENT, "auto").lower().split(",") if n.strip())
    return () if names in ((), ("auto",)) else _check(names, _ENVIRONMENT)


def forced() -> tuple[str, ...]:
    """The backends asked for by `use_backend` or the environment, in order of preference; empty for auto."""
    return _forced


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Runs the operations inside on one backend: "cpp", "triton", "cuda" or "reference"; "auto" chooses as usual.

    Several names are tried in that order for each operation, so that `use_backend("cpp", "reference")` runs operations
    without a C++ kernel on the reference. Holds for the whole process, also for other threads.

    Raises:
        BackendError: a name is unknown, or none of them is there; the message says what is missing.
    """
    global _forced
    wished = () if names in ((), ("auto",)) else _check(names, "use_backend")
    reasons = [missing(n) for n in wished]
    if wished and all(reasons):
        raise BackendError("; ".join(reasons))
    before, _forced = _forced, wished
    try:
        yield
    finally:
        _forced = before


@cache
def native(module: str):
    """The compiled module `_cpu` or `_cuda`, or the reason why it is not there, as a string."""
    try:
        loaded = importlib.import_module(f"fastcolor.{module}")
    except ImportError as error:
        return str(error)
    if module == "_cpu" and os.environ.get(_SIMD):
        try:
            loaded.use_simd(os.environ[_SIMD].lower())
        except ValueError as error:
            global _environment_error
            _environment_error = f"{_SIMD} {error}"
    return loaded


def missing(name: str) -> str | None:
    """Why a backend cannot run here, with the way to get it; None where it can."""
    return None if name == "reference" else _missing(name)


@cache
def _missing(name: str) -> str | None:
    if name == "cpp":
        module = native("_cpu")
        return (
            f"the C++ kernels are not built ({module}); reinstall with a C++17 compiler"
            if isinstance(module, str)
            else None
        )
    if name in ("triton", "cuda") and not torch.cuda.is_available() and not (name == "triton" and interpreting()):
        return f"backend {name!r} needs a CUDA device, and torch sees none"
    if name == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton is not installed ({error}); pip install 'fastcolor[triton]'"
    if name == "cuda":
        old = [_too_old(name, torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
        if all(old):  # of unlike devices, `runs_on` tells one from another
            return old[0]
        module = native("_cuda")
        return (
            f"the CUDA kernels are not built ({module}); reinstall where nvcc is" if isinstance(module, str) else None
        )
    return None


def runs_on(name: str, device: torch.device) -> str | None:
    """Why a backend that is there does not take tensors of a device; None where it does."""
    return _elsewhere(name, device) or _too_old(name, device)


def _elsewhere(name: str, device: torch.device) -> str | None:
    takes = {"cpp": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "cpu") if interpreting() else ("cuda",)}
    if name == "reference" or device.type in takes[name]:
        return None
    return f"backend {name!r} takes tensors on {' or '.join(takes[name])}, got one on {device}"


def _too_old(name: str, device: torch.device) -> str | None:
    if name != "cuda" or device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    return f"the CUDA kernels are for compute capability 8.0 and above, {device} has {major}.{minor}"


OFFERS: dict[str, tuple[str, ...]] = {}  # operation -> the backends that have it, fastest first


def offer(op: str, *backends: str) -> None:
    """Declares which backends have an operation, fastest first; the reference is always the last."""
    OFFERS[op] = (*backends, "reference")


def choose(op: str, device: torch.device) -> Choice:
    """The backend for an operation on a device.

    Args:
        op: its public name.
        device: where its tensors are.

    Raises:
        BackendError: every backend that was asked for is absent, on another device, or lacks the operation.
    """
    return _choose(op, device, _forced)


@cache  # on small pictures the search would take as long as the kernel
def _choose(op: str, device: torch.device, wished: tuple[str, ...]) -> Choice:
    native("_cpu")  # looks at FASTCOLOR_SIMD
    if _environment_error is not None:
        raise BackendError(_environment_error)
    offers = OFFERS[op]
    reasons = []
    for name in wished or offers:
        if name not in offers:
            reasons.append(
                f"{op} has no backend {name!r}; it has {', '.join(offers)} (ask for '{name},reference' to run the rest)"
            )
            continue
        elsewhere = _elsewhere(name, device)
        if not wished and (elsewhere or (name == "triton" and device.type == "cpu")):
            continue  # not meant for this device (the Triton interpreter runs only where it is asked for)
        why_not = missing(name) or elsewhere or _too_old(name, device)
        if why_not is not None:
            reasons.append(why_not)
        elif wished:
            return Choice(name, "asked for")
        elif name != "reference":
            return Choice(name, f"the fastest on {device.type}")
        elif reasons:
            say_once(op, device.type, "; ".join(reasons))
            return Choice(name, "; ".join(reasons))
        else:
            return Choice(name, f"the only one on {device.type}")
    raise BackendError("; ".join(reasons))


FLOAT64 = "float64 is computed on the reference"  # as documented: no fallback that the log has to tell of


def left_to_reference(op: str, device: torch.device, why: str) -> None:
    """The reference takes what kernels do not: an error where others were asked for, a word in the log where none was.

    Raises:
        BackendError: backends were asked for, and the reference is not among them.
    """
    wished = forced()
    if wished and "reference" not in wished:
        raise BackendError(f"{op} cannot run on backend {wished[0]!r}: {why} (ask for '{wished[0]},reference')")
    if not wished and why != FLOAT64 and not torch.compiler.is_compiling():
        say_once(op, device.type, why)


@contextmanager
def stream(device: torch.device) -> Iterator[int]:
    """The current stream of a CUDA device, which is the current device inside."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


@cache
def say_once(op: str, device: str, why: str) -> None:
    """Logs a fallback the first time that it happens."""
    log.warning("%s on %s runs on the reference backend: %s", op, device, why)


try:
    _forced = _from_environment()
except BackendError as error:
    _environment_error = str(error)
