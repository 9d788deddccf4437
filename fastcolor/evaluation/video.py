"""How steady the colours of a film are. Lower is steadier, and nothing flickers less than grey: so each figure is given
beside the truth's own, and beside colourfulness."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcolor.evaluation.metrics import colorfulness, psnr
from fastcolor.ops.lab import rgb_to_lab

DISTANCES = (1, 2, 4)  # frames between the two that are compared (TCVC)


def still_pixels(L: Tensor, before: Tensor, still: float = 1.0, reach: int = 1) -> Tensor:
    """Where the lightness of two frames [1, H, W] is the same: [H, W] bool. `still` and `reach` as of `flicker`."""
    moved = (L.double() - before.double()).abs()[None]  # [1, 1, H, W]
    # max_pool2d pads with -inf: outside the picture nothing moves
    return (F.max_pool2d(moved, 2 * reach + 1, 1, reach) < still)[0, 0]


def chroma_step(ab: Tensor, before: Tensor, at: Tensor) -> Tensor:
    """Sum of |ab − that of the frame before|, [2, H, W] each, over the pixels `at` [H, W], and their count: [2] float64
    on the CPU."""
    step = (ab.double() - before.double()).norm(dim=0)
    return torch.stack((step[at].sum(), at.sum().double())).cpu()


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
    for t in range(1, len(ab)):  # a pair at a time: a film in float64 would not fit
        total += chroma_step(ab[t], ab[t - 1], still_pixels(L[t], L[t - 1], still, reach))
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
    sums = ConsistencySums(distances)
    for shares in color_histograms(rgb) if histograms is None else histograms:
        sums.add(shares)
    most = max(distances)
    if sums.frames <= most:
        raise ValueError(f"a distance of {most} needs at least {most + 1} frames, got {sums.frames}")
    return sums.value()


class ConsistencySums:
    """`color_distribution_consistency` of a film a frame at a time: no more histograms are kept than are compared."""

    def __init__(self, distances: Sequence[int] = DISTANCES):
        self.distances, self.frames = distances, 0
        self._total = torch.zeros(len(distances), 3, dtype=torch.float64)
        self._last: deque[Tensor] = deque(maxlen=max(distances))

    def add(self, shares: Tensor) -> None:
        """The next frame's histograms, [3, 256] float64."""
        for i, d in enumerate(self.distances):
            if d <= len(self._last):
                self._total[i] += jensen_shannon(self._last[-d], shares)
        self._last.append(shares)
        self.frames += 1

    def value(self) -> Tensor:
        """A float64 scalar; nan where there are too few frames."""
        pairs = torch.tensor([max(0, self.frames - d) for d in self.distances], dtype=torch.float64)
        return (self._total.mean(1) / pairs).mean()


# --- a film a frame at a time -----------------------------------------------------------------------------------------


@dataclass
class TrueFrame:
    """A frame as it was shot, and what every colouring of it is measured by."""

    rgb: Tensor  # [3, H, W] in [0, 1]
    lab: Tensor  # [3, H, W]
    still: Tensor | None  # [H, W] bool, where lightness is that of the frame before; None for the first


def true_frames(film: Iterable[Tensor]) -> Iterator[TrueFrame]:
    """The frames [3, H, W] in [0, 1] of a film, each with what it takes to measure its colourings."""
    before = None
    for rgb in film:
        lab = rgb_to_lab(rgb[None])[0]
        yield TrueFrame(rgb, lab, None if before is None else still_pixels(lab[:1], before))
        before = lab[:1]


class FilmFigures:
    """What one colouring of a film comes to, from sums over its frames.

    Frames are floating: rounding to 8 bits flickers by itself. CDC alone is of 8-bit frames, as it is defined.
    """

    def __init__(self):
        self.frames = 0
        self.steps: list[float] = []  # flicker of each frame after the first; nan where nothing is still
        self._psnr = self._color = 0.0
        self._chroma = torch.zeros(2, dtype=torch.float64)
        self._consistency = ConsistencySums()
        self._ab: Tensor | None = None

    def add(self, rgb: Tensor, truth: TrueFrame) -> float:
        """The next frame [3, H, W] in [0, 1]; gives its PSNR, 100 dB at most so that the mean stays finite."""
        ab = rgb_to_lab(rgb[None])[0, 1:]
        if truth.still is not None:
            step = chroma_step(ab, self._ab, truth.still)
            self._chroma += step
            self.steps.append((step[0] / step[1]).item())
        of_frame = psnr(255 * rgb, 255 * truth.rgb).clamp_max(100).item()
        self._psnr += of_frame
        self._color += colorfulness(255 * rgb).item()
        self._consistency.add(color_histograms([rgb.mul(255).round().byte()])[0])
        self._ab = ab
        self.frames += 1
        return of_frame

    def result(self) -> dict[str, float]:
        """PSNR in dB and colourfulness, means over frames; flicker and CDC. nan where there are too few frames, or no
        pixel is still."""
        return {
            "psnr": self._psnr / self.frames,
            "colorfulness": self._color / self.frames,
            "flicker": (self._chroma[0] / self._chroma[1]).item(),
            "cdc": self._consistency.value().item(),
        }
