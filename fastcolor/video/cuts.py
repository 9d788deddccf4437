"""Where one scene ends and the next begins.

A flash, a fade and a fast pan are no cuts; white or black frames are passed over, and what comes after them is compared
with what came before. A dissolve is none either: colours follow it through keyframes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BINS = 32
_BLANK = 1.5  # L units


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


def is_cut(apart: float, alike: float, difference: float, contrast: float, after_blank: bool = False) -> bool:
    """Whether a frame starts a scene: it is unlike the last one that showed something, which light, noise and motion
    do not make it.

    Args:
        apart, alike, difference, contrast: `features`.
        after_blank: blank frames lie between the two. A fade out of black begins with hardly any difference.
    """
    if is_blank(contrast) or not (after_blank or difference > 2.5):
        return False
    return alike < 0.5 or (alike < 0.7 and apart > 8)


def is_blank(contrast: float) -> bool:
    """Whether a frame shows nothing, as in the middle of a fade: it belongs to whatever scene, and starts none."""
    return contrast < _BLANK
