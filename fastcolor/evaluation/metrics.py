"""How good a colorization is. Pictures are RGB in [0, 255], [..., 3, H, W]; all arithmetic is float64."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, over all its pixels and channels; inf where they are equal.

    Args:
        image, truth: [..., 3, H, W] in [0, 255].

    Returns:
        [...] float64.
    """
    if image.shape != truth.shape:
        raise ValueError(f"image must have the shape of truth, {list(truth.shape)}, got {list(image.shape)}")
    # widened before the difference: uint8 would wrap around
    error = (image.double() - truth.double()).square().mean((-3, -2, -1))
    return 10 * torch.log10(255**2 / error)


def colorfulness(image: Tensor) -> Tensor:
    """Hasler and Süsstrunk 2003: √(σ_rg² + σ_yb²) + 0.3 √(μ_rg² + μ_yb²), signed rg = R − G, yb = ½(R + G) − B.

    Args:
        image: [..., 3, H, W] in [0, 255].

    Returns:
        [...] float64; 0 for grey.
    """
    r, g, b = image.double().unbind(-3)
    opponent = torch.stack((r - g, (r + g) / 2 - b), -3).flatten(-2)  # [..., 2, H·W]
    spread = opponent.var(-1, correction=0).sum(-1).sqrt()
    return spread + 0.3 * opponent.mean(-1).square().sum(-1).sqrt()


THRESHOLDS = range(151)  # of the ab error, in Lab units (Zhang et al. 2016, section 3.1)


def ab_accuracy(ab: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    """The share of pixels whose ab error is at most t, for t = 0 .. 150 (Zhang et al. 2016, arXiv 1603.08511, section
    3.1). Its mean over t is the area under the curve, "AuC": see `auc`.

    Args:
        ab, truth: [..., 2, H, W] in ab units.
        weights: [..., H, W], how much a pixel counts; inverse class probabilities give the rebalanced curve.

    Returns:
        [151] float64; nan where there is no pixel that counts.
    """
    if ab.shape != truth.shape or ab.ndim < 3 or ab.shape[-3] != 2:
        raise ValueError(f"ab and truth must have one shape [..., 2, H, W], got {list(ab.shape)}, {list(truth.shape)}")
    error = (ab.double() - truth.double()).square().sum(-3).sqrt()  # [..., H, W]
    weights = torch.ones_like(error) if weights is None else weights.double().expand_as(error)
    # the first whole t that takes a pixel in; what none of them takes falls off the end
    first = error.ceil().nan_to_num(len(THRESHOLDS)).clamp(max=len(THRESHOLDS)).long()
    counts = torch.bincount(first.flatten(), weights.flatten(), len(THRESHOLDS) + 1)[: len(THRESHOLDS)]
    return counts.cumsum(0) / weights.sum()


def auc(accuracy: Tensor) -> Tensor:
    """The area under `ab_accuracy`, as a share of the whole: trapezoids over 0 .. 150."""
    return torch.trapezoid(accuracy) / (len(THRESHOLDS) - 1)


def chroma_steps(ab: Tensor, L: Tensor, flat: float = 2.0, edge: float = 10.0) -> tuple[Tensor, Tensor]:
    """How much colour changes between neighbours where lightness does not, and where it does.

    The first is high where colours are blotched or bleed over an edge into a plain area; the second is low where a
    colour runs on over an edge as if it was not there.

    Args:
        ab: [2, H, W] in ab units. L: [1, H, W], in [0, 100].
        flat: neighbours (right and below) whose lightness differs by less are a plain area.
        edge: those whose lightness differs by more are an edge.

    Returns:
        [2] sum of the chroma steps |Δab| and count of pairs, of plain areas; the same of edges. Sums add over pictures.
    """
    found = []
    for inside in (lambda d: d < flat, lambda d: d > edge):
        total = torch.zeros(2, dtype=torch.float64)
        for dim in (-2, -1):
            step = ab.double().diff(dim=dim).norm(dim=0)
            at = inside(L.diff(dim=dim)[0].abs())
            total += torch.stack((step[at].sum(), at.sum().double())).cpu()
        found.append(total)
    return found[0], found[1]


def splotches(ab: Tensor, guide: Tensor, reach: int = 2, flat: float = 10.0, apart: float = 10.0) -> Tensor:
    """Pixels whose colour stands out of its surroundings where lightness is even: the splotches that Melas-Kyriazi and
    Han 2017 saw in the mode.

    Args:
        ab: [2, h, w] in ab units, at the resolution where labels are chosen. guide: [1, h, w] lightness.
        reach: the surroundings are a window of 2 reach + 1 pixels a side, inside the picture.
        flat: only windows count whose lightness spans less.
        apart: a pixel stands out if it is farther than this from the medians of a and of b; one bin is 10 wide.

    Returns:
        [2] float64: how many stand out, of how many.
    """
    side = 2 * reach + 1
    if min(ab.shape[-2:]) < side:
        return torch.zeros(2, dtype=torch.float64)
    windows = [x.unfold(-2, side, 1).unfold(-2, side, 1).flatten(-2) for x in (ab.double(), guide.double())]
    middle = windows[0].median(-1).values  # [2, h - 2 reach, w - 2 reach]
    even = (windows[1].amax(-1) - windows[1].amin(-1))[0] < flat
    inner = ab[:, reach : ab.shape[1] - reach, reach : ab.shape[2] - reach].double()
    out = (inner - middle).norm(dim=0) > apart
    return torch.stack(((out & even).sum(), even.sum())).double().cpu()
