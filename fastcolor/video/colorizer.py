"""Frames of a film in, their chroma out, with a state through time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcolor.model.colorizer import Colorizer
from fastcolor.ops.render import luma_to_lightness, render_uv
from fastcolor.yuv import YuvFormat


@dataclass(frozen=True)
class VideoOptions:
    """How a film is coloured.

    temporal: strength of the bond to the frame before, 0 (every frame by itself) to 1.
    keyframes: the network runs at every n-th frame and at cuts; "auto" where the picture changed enough.
    motion: whether what comes from the frame before is moved along with the picture.
    cuts: numbers of the frames that start a scene, from 0; None finds them.
    lookahead: frames that may be held back, so that the network sees several keyframes at a time.
    low_latency: every frame comes out as soon as it went in.
    """

    temporal: float = 0.5
    keyframes: str | int = "auto"
    motion: bool = True
    cuts: tuple[int, ...] | None = None
    lookahead: int = 16
    low_latency: bool = False

    def __post_init__(self):
        if not 0 <= self.temporal <= 1:
            raise ValueError(f"temporal must be between 0 and 1, got {self.temporal}")
        if self.keyframes != "auto" and not (isinstance(self.keyframes, int) and self.keyframes >= 1):
            raise ValueError(f"keyframes must be 'auto' or a number >= 1, got {self.keyframes!r}")
        if self.lookahead < 0:
            raise ValueError(f"lookahead must be >= 0, got {self.lookahead}")


@dataclass
class VideoStats:
    """Counts, and seconds by stage."""

    frames: int = 0
    network: int = 0
    cuts: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("network", "field", "motion", "render"), 0.0)
    )


class VideoColorizer:
    """Colours a film frame by frame.

    Args:
        colorizer: the network and its options.
        format: of the frames' planes; `colorize` needs none.
        options: see `VideoOptions`.
        control: hints, palette and reference of the film; see `fastcolor.video.control.load_control`.
    """

    def __init__(
        self,
        colorizer: Colorizer,
        format: YuvFormat | None = None,
        options: VideoOptions | None = None,
        control=None,
    ):
        self.colorizer, self.format, self.options = colorizer, format or YuvFormat(), options or VideoOptions()
        self.control = control
        self.stats = VideoStats()

    @torch.inference_mode()
    def push(self, luma: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The next frame's luma [H, W] -> (U, V) of the frames that are ready, in order."""
        planes = luma.to(self.colorizer.device)[None, None]
        L = luma_to_lightness(planes, self.format.bits, self.format.full_range)
        size = self.colorizer.network_size(*luma.shape)
        ab, guide = self.colorizer.predict(F.interpolate(L, size, mode="bilinear", antialias=True))
        scale = tuple(n / full / self.colorizer.network.stride for n, full in zip(size, luma.shape, strict=True))
        u, v = render_uv(ab, guide, planes, self.format, scale=scale)
        self.stats.frames += 1
        self.stats.network += 1
        return [(u[0, 0].to(luma.device), v[0, 0].to(luma.device))]

    def flush(self) -> list[tuple[Tensor, Tensor]]:
        """(U, V) of the frames held back. The state is then that after the last frame, and more may be pushed."""
        return []

    def state_dict(self) -> dict:
        """All that the frames to come depend on, after `flush`; torch.save takes it."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where the colorizer was that gave `state`, to the bit."""

    def colorize(self, frames: Iterable[np.ndarray | Tensor]) -> Iterator[np.ndarray | Tensor]:
        """Grey or RGB frames in, RGB frames of the same kind out, in order: for pipes of one's own."""
        for frame in frames:
            yield self.colorizer.colorize(frame)
