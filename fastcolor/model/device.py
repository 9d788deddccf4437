"""Choosing where a model runs."""

from __future__ import annotations

import torch


class DeviceError(RuntimeError):
    """A device that was asked for is not there."""


def choose_device(name: torch.device | str = "auto") -> torch.device:
    """A device by name; "auto" is CUDA where there is one, else the CPU.

    Apple's GPU is taken only where it is asked for: nothing has been tried on it.

    Raises:
        DeviceError: torch does not know it, or it cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(f"device {str(name)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
