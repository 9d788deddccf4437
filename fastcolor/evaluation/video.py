"""How steady the colours of a film are. Lower is steadier, and nothing flickers less than grey: so each figure is given
beside the truth's own, and beside colourfulness."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

DISTANCES = (1, 2, 4)  # frames between the two that are compared (TCVC)


def flicker_sums(ab: Tensor, L: Tensor, still: float = 1.0, reach: int = 1) -> tuple[Tensor, Tensor]:
    """What `flicker` divides: the sum of the chroma steps and the count of still pixels, both float64 scalars.

    Sums add up: of clips, and of pieces of one film that share a frame (0..99, 99..198, ...).

    Args, Raises:
        as of `flicker`.
    """
    if ab.ndim != 4 or ab.shape[1] != 2 or list(L.shape) != [ab.shape[0], 1, *ab.shape[2:]]:
        raise ValueError(
            f"ab must have shape [T, 2, H, W] and L [T, 1, H, W], got {list(ab.shape)} and {list(L.shape)}"
        )
    if not still > 0 or reach < 0:
        raise ValueError(f"still must be above 0 and reach at least 0, got {still} and {reach}")
    total = torch.zeros(2, dtype=torch.float64)
    side = 2 * reach + 1
    for t in range(1, len(ab)):  # a pair at a time: a film in float64 would not fit
        moved = (L[t].double() - L[t - 1].double()).abs()[None]  # [1, 1, H, W]
        # max_pool2d pads with -inf: outside the picture nothing moves
        at = (F.max_pool2d(moved, side, 1, reach) < still)[0, 0]
        step = (ab[t].double() - ab[t - 1].double()).norm(dim=0)
        total += torch.stack((step[at].sum(), at.sum().double())).cpu()
    return total[0], total[1]


def flicker(ab: Tensor, L: Tensor, still: float = 1.0, reach: int = 1) -> Tensor:
    """How much colour changes from frame to frame where lightness does not: the mean of |ab_t − ab_t−1|, in Lab units a
    frame, over the pixels of all neighbouring frames whose surroundings are still.

    A pixel is still where |L_t − L_t−1| < `still` in the whole window of 2 reach + 1 pixels a side around it (as far as
    the window lies inside the picture): one pixel alone may keep its lightness by chance while something moves past.
    Stillness is that of L alone, so that a colouring and the truth are compared at the same pixels; their ratio is
    flicker(ab, L) / flicker(truth, L). The truth's own is not 0: sensors and codecs add noise.

    Args:
        ab: [T, 2, H, W] in ab units, the frames in order.
        L: [T, 1, H, W] in [0, 100], the lightness that was coloured.
        still: Lab units; lightness that changes less has not changed.
        reach: of the window, pixels.

    Returns:
        a float64 scalar, 0 for grey; nan where no pixel is still or T < 2.

    Raises:
        ValueError: other shapes, or options out of range.
    """
    total, count = flicker_sums(ab, L, still, reach)
    return total / count


def color_histograms(rgb: Tensor | Iterable[Tensor]) -> Tensor:
    """Shares of the 256 levels in each frame and channel: frames [3, H, W] uint8 -> [T, 3, 256] float64."""
    rows = []
    for i, frame in enumerate(rgb):
        if frame.dtype != torch.uint8 or frame.ndim != 3 or frame.shape[0] != 3 or frame.numel() == 0:
            raise ValueError(f"frame {i} must be uint8 [3, H, W], got {frame.dtype} {list(frame.shape)}")
        counts = torch.stack([torch.bincount(plane.flatten().int(), minlength=256) for plane in frame])
        rows.append(counts.double().cpu() / frame[0].numel())
    return torch.stack(rows) if rows else torch.zeros(0, 3, 256, dtype=torch.float64)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q), natural logarithm: [..., K] -> [...], from 0 to ln 2."""
    m = (p + q) / 2
    # xlogy is 0 at 0, and where m is 0 so are p and q
    parts = [torch.special.xlogy(x, x / m.where(m > 0, 1)) for x in (p, q)]
    return (parts[0] + parts[1]).sum(-1) / 2


def color_distribution_consistency(
    rgb: Tensor | Iterable[Tensor], distances: Sequence[int] = DISTANCES, histograms: Tensor | None = None
) -> Tensor:
    """CDC, as TCVC defines it (Liu et al., arXiv 2110.04562): how far the distributions of R, G and B move in time.

    For each channel and distance d, the Jensen-Shannon divergence (natural logarithm) between the 256-bin histograms of
    frames i and i + d, its mean over i; then the mean over distances and channels. It knows no place, and most of it is
    lightness, for grey as for colour: give its ratio to the truth's, with colourfulness and `flicker` beside it.

    Args:
        rgb: [T, 3, H, W] uint8, or any iterable of frames [3, H, W] uint8; only histograms are kept of it.
        distances: d, in frames.
        histograms: those of `color_histograms`, if they are at hand; `rgb` is not read then.

    Returns:
        a float64 scalar, from 0 to ln 2.

    Raises:
        ValueError: frames of another type or shape, or fewer than the largest distance needs.
    """
    shares = color_histograms(rgb) if histograms is None else histograms
    if len(shares) <= max(distances):
        most = max(distances)
        raise ValueError(f"a distance of {most} needs at least {most + 1} frames, got {len(shares)}")
    apart = [jensen_shannon(shares[:-d], shares[d:]).mean(0) for d in distances]  # each [3]
    return torch.stack(apart).mean()
