"""Triton kernels. Each module needs the package triton, which is optional."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def tiles(module: ModuleType, **values) -> Iterator[None]:
    """Other sizes of tiles than those at the top of a module, for launches inside: `tiles(lab, BLOCK=2048, WARPS=8)`.

    Raises:
        ValueError: the module has no such constant.
    """
    unknown = [name for name in values if not name.isupper() or name.startswith("_") or not hasattr(module, name)]
    if unknown:
        raise ValueError(f"{module.__name__} has no constant {unknown[0]!r}")
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
