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
    """The lightness histograms of pictures [B, 1, h, w], as shares: [B, 33], each pixel shared by its two steps."""
    place = guide.flatten(1) * (_BINS / 100)
    low = place.floor().clamp(0, _BINS - 1)
    share = (place - low).clamp(0, 1)
    counts = torch.zeros(len(guide), _BINS + 1, device=guide.device)
    counts.scatter_add_(1, low.long(), 1 - share)
    counts.scatter_add_(1, low.long() + 1, share)
    return counts / place.shape[1]


def features(guide: Tensor, moved: Tensor) -> Tensor:
    """How the lightness of frames [B, 1, h, w] differs from that of the frames before, brought to their places by
    motion.

    Returns:
        [B, 4]: how far apart the histograms are (the mover's distance, in L), the pictures' correlation, their mean
        difference in L, and the contrast of the new one: its deviation in L.
    """
    apart = (signature(guide) - signature(moved)).cumsum(1).abs().sum(1) * (100 / _BINS)
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (guide, moved))
    spread = (a.square().mean(1) * b.square().mean(1)).sqrt().clamp_min(1e-6)
    difference = (guide - moved).abs().flatten(1).mean(1)
    return torch.stack((apart, (a * b).mean(1) / spread, difference, a.square().mean(1).sqrt()), 1)


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
