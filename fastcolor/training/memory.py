"""What a step of training takes, measured on a few crops, and how many fit."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

_FEW = 2  # images of the smaller of the two steps that are measured
_MARGIN = 0.9  # of what is free: allocators leave gaps


@dataclass(frozen=True)
class Need:
    """Bytes of a step: `fixed`, and `image` more for each image that a process has in it at once."""

    fixed: int
    image: int

    def of(self, images: int) -> int:
        return self.fixed + images * self.image

    def fits(self, free: int) -> int:
        """How many images at once go into `free` bytes."""
        return max(0, int((_MARGIN * free - self.fixed) / max(1, self.image)))


def weights_bytes(module: nn.Module, copies: int) -> int:
    """Of the parameters that are learned, `copies` times: gradients and Adam's two moments are a copy each."""
    return copies * sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def step_need(task: nn.Module, size: int, device: torch.device) -> Need:
    """What forward and backward take beyond the weights, from two small steps on crops of noise: on a GPU their peaks,
    elsewhere what is kept for the backward, which is most of it. Running statistics and gradients change.

    Raises:
        torch.OutOfMemoryError: not even the small ones fit.
    """
    less, more = (_step_bytes(task, size, images, device) for images in (_FEW, 2 * _FEW))
    image = max(1, (more - less) // _FEW)
    return Need(max(0, less - _FEW * image), image)


def _step_bytes(task: nn.Module, size: int, images: int, device: torch.device) -> int:
    random = torch.Generator().manual_seed(0)
    rgb = torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8, generator=random).to(device)
    labels = torch.zeros(images, dtype=torch.int64, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        task(rgb, labels, labels).backward()
        return torch.cuda.max_memory_allocated(device) - before
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in task.parameters()}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = task(rgb, labels, labels)
    loss.backward()
    return sum(kept.values())


def free_bytes(device: torch.device) -> int | None:
    """What this process can still have; None where nobody knows."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        known = [free for free in (_machine_free(), group_free()) if free is not None]
        return min(known, default=None)
    return None


def _machine_free() -> int | None:
    # what files are cached in counts as free on Linux: a run that has read its photos has little else
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def group_free(root: Path = Path("/")) -> int | None:
    """What the control groups of this process leave it, as containers and batch systems limit it; None without a limit.

    The least of all levels, of versions 1 and 2. What files are cached in counts as free, as it does for the machine.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    mounts = root / "sys/fs/cgroup"
    known = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            base, names = mounts / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        elif number == "0":  # version 2, beside version 1 in a folder of its own
            base, names = mounts, ("memory.max", "memory.current", "")
            base = base / "unified" if (base / "unified").is_dir() else base
        else:
            continue
        # a container may see its group as the root of the mount, under a path that only the host has
        level = Path(path.lstrip("/"))
        for place in (base / level, *(base / parent for parent in level.parents)):
            known.append(_level_free(place, *names))
    return min((free for free in known if free is not None), default=None)


def _level_free(place: Path, limit: str, usage: str, prefix: str) -> int | None:
    """Of one control group; None where it has no limit."""
    try:
        most, used = int((place / limit).read_text()), int((place / usage).read_text())
        stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max"
        return None
    cached = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("active", "inactive"))
    return max(0, most - used + cached)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the CPU's allocator, had no more."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
