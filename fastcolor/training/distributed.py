"""Several processes as one training: torchrun starts them, a `Team` lets them talk."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class TeamError(RuntimeError):
    """The first process cannot go on, and says why itself."""


_PATIENCE = timedelta(hours=1)  # the first process may read a million headers while the others wait


@dataclass(frozen=True)
class Team:
    """The processes of one training, this one being number `rank` of `world`. Alone, every method is a no-op."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on this machine

    @property
    def lead(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def gather(self, thing: T) -> list[T]:
        """What each process has, in order of rank."""
        if self.world == 1:
            return [thing]
        found: list = [None] * self.world
        dist.all_gather_object(found, thing)
        return found

    def share(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all of them; where it raises there, the others raise TeamError."""
        if self.world == 1:
            return make()
        box: list = [None, None]
        if self.lead:
            try:
                box[0] = make()
            except Exception:
                dist.broadcast_object_list([None, True])
                raise
        dist.broadcast_object_list(box)
        if box[1]:
            raise TeamError("the first process could not go on")
        return box[0]

    def follow(self, module: nn.Module) -> None:
        """The buffers of a module, such as statistics, become those of the first process, in place."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def device(self, name: str) -> str:
        """The device of this process: of several GPUs on a machine, its own."""
        if self.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return name


ALONE = Team()


def in_team() -> bool:
    """Whether torchrun (or what sets the same variables) started several processes, this being one of them."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_lead() -> bool:
    """Whether this process speaks for its team; before there is one, by the variables of torchrun."""
    return not in_team() or os.environ["RANK"] == "0"


@contextmanager
def team() -> Iterator[Team]:
    """Joins the processes that torchrun started; `ALONE` where it did not."""
    if not in_team():
        yield ALONE
        return
    joined = not dist.is_initialized()
    if joined:
        # both: objects and numbers of the CPU go through gloo, gradients through NCCL where there are GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        if joined:
            # gloo's thread takes the GIL to let go of the last tensors; the end of the group waits for that thread and
            # has the GIL: without a moment in between they wait for each other (seen in torch 2.13)
            gc.collect()
            time.sleep(0.2)
            dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization over the images of all processes, [B, C, H, W]; B may differ between them.

    torch.nn.SyncBatchNorm, where there are no GPUs for it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float()
        sums = torch.cat((wide.sum((0, 2, 3)), wide.new_tensor([wide.numel() // wide.shape[1]])))
        sums = _Sum.apply(sums)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = wide - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1).clamp_min(1)), self.momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def share_norms(module: nn.Module, device: torch.device) -> None:
    """Batch normalizations in `module` become ones over all processes. Names, parameters and statistics stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            if device.type == "cuda":
                shared = nn.SyncBatchNorm(child.num_features, child.eps, child.momentum)
            else:
                shared = SharedBatchNorm2d(child.num_features, child.eps, child.momentum)
            for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(shared, part, getattr(child, part))
            setattr(module, name, shared)
        else:
            share_norms(child, device)
