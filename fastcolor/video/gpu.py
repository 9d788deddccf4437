"""Frames to a GPU and back beside its work, and work of fixed shapes as one launch. On a CPU all of it is a plain call.

Only planes of samples cross the bus: luma one way, chroma the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


class Ferry:
    """Copies on streams of their own, through pinned memory."""

    def __init__(self, device: torch.device):
        self.device = device
        on_gpu = device.type == "cuda"
        self._up, self._down = (torch.cuda.Stream(device) if on_gpu else None for _ in range(2))

    def to_device(self, plane: Tensor) -> Tensor:
        """Work that is queued from now on can use it."""
        if self._up is None or plane.device.type == "cuda":
            return plane.to(self.device)
        with torch.cuda.stream(self._up):
            # the allocator keeps pinned memory from being used again until the copy is done
            there = plane.contiguous().pin_memory().to(self.device, non_blocking=True)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._up)
        there.record_stream(now)
        return there

    def to_host(self, planes: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], torch.cuda.Event | None]:
        """Planes on the host, and the event after which they are there: None where they are already."""
        if self._down is None:
            return tuple(x.cpu() for x in planes), None
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._down):
            here = tuple(
                torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in planes
            )
            arrived.record()
        for x in planes:
            x.record_stream(self._down)
        return here, arrived


class Graphed:
    """A function of tensors, which depends on nothing else. On a GPU it is captured once for each set of shapes and
    then replayed: a frame's many small kernels cost one launch."""

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self._shapes, self._graph = None, None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if inputs[0].device.type != "cuda":
            return self.function(*inputs)
        shapes = [(x.shape, x.dtype, x.stride()) for x in inputs]
        if shapes != self._shapes:
            self._shapes = shapes
            self._capture(inputs)
        if self._graph is None:
            return self.function(*inputs)
        for kept, x in zip(self._inputs, inputs, strict=True):
            kept.copy_(x)
        self._graph.replay()
        return self._output.clone()

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [x.clone() for x in inputs]
        self._graph = None
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(inputs[0].device)
        aside.wait_stream(torch.cuda.current_stream(inputs[0].device))
        with torch.cuda.stream(aside):  # tables are made, and libraries started, before the capture
            for _ in range(2):
                self.function(*self._inputs)
        torch.cuda.current_stream(inputs[0].device).wait_stream(aside)
        try:
            with torch.cuda.graph(graph):
                self._output = self.function(*self._inputs)
        except RuntimeError as error:
            _log.warning("frames are launched kernel by kernel: no CUDA graph could be captured (%s)", error)
            return
        self._graph = graph
