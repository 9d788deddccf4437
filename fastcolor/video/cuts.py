"""Where one scene ends and the next begins."""

from __future__ import annotations

import torch
from torch import Tensor

_BINS = 32
_BLANK = 1.5  # L units: a picture of less contrast shows nothing that could belong to a scene


def signature(guide: Tensor) -> Tensor:
    """The lightness histogram of a picture [1, 1, h, w], as shares: [32], its steps smoothed over neighbours."""
    place = guide.flatten() * (_BINS / 100) - 0.5
    low = place.floor().clamp(-1, _BINS - 1)
    share = place.clamp(-1, _BINS - 1) - low
    counts = torch.zeros(_BINS + 2, device=guide.device)
    counts.index_add_(0, low.long() + 1, 1 - share)
    counts.index_add_(0, low.long() + 2, share)
    return counts[:-1] / place.numel()


def features(guide: Tensor, moved: Tensor) -> Tensor:
    """How a frame's lightness [1, 1, h, w] differs from that of the frame before, brought to its places by motion.

    Returns:
        [4]: the histograms' distance (0 equal, 1 apart), the pictures' correlation, their mean difference in L, and
        the contrast of the new one in L.
    """
    apart = (signature(guide) - signature(moved)).cumsum(0).abs().sum() * (100 / _BINS)  # the mover's distance, L units
    a, b = guide - guide.mean(), moved - moved.mean()
    spread = (a.square().mean() * b.square().mean()).sqrt().clamp_min(1e-6)
    return torch.stack((apart, (a * b).mean() / spread, (guide - moved).abs().mean(), a.square().mean().sqrt()))


def is_cut(apart: float, alike: float, difference: float, contrast: float) -> bool:
    """Whether the frame starts a scene; the arguments are `features`."""
    return difference > 4 and contrast > _BLANK and (alike < 0.5 or (alike < 0.7 and apart > 8))
