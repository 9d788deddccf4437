"""How good a colorization is. Pictures are RGB in [0, 255], [..., 3, H, W]; all arithmetic is float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcolor.bins import ColorBins, soft_encode


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


_SSIM_SIDE, _SSIM_SIGMA, _SSIM_K1, _SSIM_K2 = 11, 1.5, 0.01, 0.03


def ssim(image: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of Wang et al. 2004 (IEEE TIP 13, 600-612), its constants: a Gaussian window of 11 pixels a
    side and σ = 1.5, K1 = 0.01, K2 = 0.03, population covariances, windows that lie inside the picture; the mean over
    positions and channels. Most of it is lightness, which colouring keeps: compare with grey's.

    Args:
        image, truth: [..., 3, H, W] in [0, 255], H and W at least 11.

    Returns:
        [...] float64, 1 where they are equal.

    Raises:
        ValueError: different shapes, or smaller than the window.
    """
    if image.shape != truth.shape or image.ndim < 3:
        raise ValueError(f"image must have the shape of truth, {list(truth.shape)}, got {list(image.shape)}")
    height, width = image.shape[-2:]
    if min(height, width) < _SSIM_SIDE:
        raise ValueError(f"pictures must be at least {_SSIM_SIDE} pixels a side, got {height}×{width}")
    x, y = (p.double().reshape(-1, 1, height, width) for p in (image, truth))
    at = torch.arange(_SSIM_SIDE, dtype=torch.float64, device=x.device) - _SSIM_SIDE // 2
    row = torch.softmax(-at.square() / (2 * _SSIM_SIGMA**2), 0)  # the normalized Gaussian

    def mean(z: Tensor) -> Tensor:
        """Σ of the window: two passes, since it is separable."""
        return F.conv2d(F.conv2d(z, row.view(1, 1, -1, 1)), row.view(1, 1, 1, -1))

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x.square(), mean(y * y) - mean_y.square()
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (_SSIM_K1 * 255) ** 2, (_SSIM_K2 * 255) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similar = similar / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    return similar.mean((-3, -2, -1)).reshape(image.shape[:-2]).mean(-1)


def delta_e_2000(lab: Tensor, truth: Tensor) -> Tensor:
    """CIEDE2000 colour difference with kL = kC = kH = 1 (CIE 142:2001), in the form of Sharma, Wu and Dalal 2005 (Color
    Research and Application 30, 21-30). About 1 is the least that is seen side by side.

    Args:
        lab, truth: [..., 3, H, W] CIE L*a*b*.

    Returns:
        [..., H, W] float64.
    """
    if lab.shape != truth.shape or lab.ndim < 3 or lab.shape[-3] != 3:
        got = f"{list(lab.shape)}, {list(truth.shape)}"
        raise ValueError(f"lab and truth must have one shape [..., 3, H, W], got {got}")
    (L1, a1, b1), (L2, a2, b2) = (x.double().unbind(-3) for x in (lab, truth))

    def chroma_share(c: Tensor) -> Tensor:
        """√(c⁷ / (c⁷ + 25⁷))"""
        seventh = c**7
        return (seventh / (seventh + 25.0**7)).sqrt()

    # a is stretched near the neutral axis
    stretch = 1 + 0.5 * (1 - chroma_share((torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2))
    a1, a2 = a1 * stretch, a2 * stretch
    C1, C2 = torch.hypot(a1, b1), torch.hypot(a2, b2)
    h1, h2 = (torch.rad2deg(torch.atan2(b, a)) % 360 for a, b in ((a1, b1), (a2, b2)))  # 0 for grey
    coloured = (C1 * C2) != 0
    turn = h2 - h1
    turn = torch.where(turn > 180, turn - 360, torch.where(turn < -180, turn + 360, turn))
    turn = torch.where(coloured, turn, 0)  # a grey has no hue
    dL, dC, dH = L2 - L1, C2 - C1, 2 * (C1 * C2).sqrt() * torch.sin(torch.deg2rad(turn / 2))

    L, C, h = (L1 + L2) / 2, (C1 + C2) / 2, h1 + h2
    half = torch.where((h1 - h2).abs() <= 180, h / 2, torch.where(h < 360, h / 2 + 180, h / 2 - 180))
    h = torch.where(coloured, half, h)

    def cosine(degrees: Tensor) -> Tensor:
        return torch.cos(torch.deg2rad(degrees))

    T = 1 - 0.17 * cosine(h - 30) + 0.24 * cosine(2 * h) + 0.32 * cosine(3 * h + 6) - 0.20 * cosine(4 * h - 63)
    from_50 = (L - 50).square()
    S_L, S_C, S_H = 1 + 0.015 * from_50 / (20 + from_50).sqrt(), 1 + 0.045 * C, 1 + 0.015 * C * T
    # the two differences are not at right angles in blue
    rotation = -2 * chroma_share(C) * torch.sin(torch.deg2rad(60 * torch.exp(-((h - 275) / 25).square())))
    dL, dC, dH = dL / S_L, dC / S_C, dH / S_H
    return (dL * dL + dC * dC + dH * dH + rotation * dC * dH).clamp_min(0).sqrt()


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


def balance_weights(ab: Tensor, bins: ColorBins, prior: Tensor) -> Tensor:
    """What pixels weigh in the rebalanced AuC: the inverse of the smoothed probability of their colour in the training
    set, those of `ColorBins.rebalancing_weights` with λ = 0 (Zhang et al. 2016, section 3.1).

    Args:
        ab: [..., 2, H, W], the true colours. bins: joint ones. prior: [K] label probabilities.

    Returns:
        [..., H, W] float64.
    """
    if bins.kind != "joint":
        raise ValueError(f"the weight of a colour is that of one label, but {bins} have two for each")
    weights = bins.rebalancing_weights(prior, 0.0).to(ab.device)
    return weights[bins.nearest(ab.movedim(-3, -1))[0][0, ..., 0]]


def bin_cross_entropy(marginals: Tensor, ab: Tensor, bins: ColorBins) -> Tensor:
    """How well the distribution over labels foretells the true colours: −Σ p log q in nats, p the soft-encoding of the
    truth (5 nearest labels, σ = 5; separable: one-hot, and the sum over both axes), its mean over pixels. It is no less
    than the entropy of p (`target_entropy`), and log K for a uniform q.

    Args:
        marginals: [B, K, h, w], probabilities. ab: [B, 2, h, w], the truth on the same grid.

    Returns:
        [B] float64; q below the smallest normal float32 counts as that.
    """
    index, p = soft_encode(bins, ab.movedim(-3, -1).double())  # [G, B, h, w, n]
    total = torch.zeros(len(ab), *ab.shape[2:], dtype=torch.float64, device=ab.device)
    for g, (place, _) in enumerate(bins.groups()):
        q = marginals[:, place].gather(1, index[g].movedim(-1, 1)).double()
        total -= (p[g].movedim(-1, 1) * q.clamp_min(torch.finfo(torch.float32).tiny).log()).sum(1)
    return total.mean((1, 2))


def target_entropy(ab: Tensor, bins: ColorBins) -> Tensor:
    """The least that `bin_cross_entropy` can be for these true colours [B, 2, h, w]: [B] float64, nats."""
    p = soft_encode(bins, ab.movedim(-3, -1).double())[1]
    return -torch.special.xlogy(p, p).sum((0, -1)).mean((1, 2))


CONFIDENCE_BINS = 15


def reliability(marginals: Tensor, ab: Tensor, bins: ColorBins, count: int = CONFIDENCE_BINS) -> Tensor:
    """Whether labels come true as often as they are believed: pixels sorted by the probability of their likeliest label
    into `count` equal intervals of confidence (Guo et al. 2017, arXiv 1706.04599, section 2).

    Args:
        marginals: [B, K, h, w], probabilities. ab: [B, 2, h, w], the truth on the same grid.

    Returns:
        [3, count] float64: pixels, sum of their confidences, and how many of them have the label nearest to the truth;
        of both axes together where labels are separable. Sums add over pictures: `calibration_error` makes the figure.
    """
    found = torch.zeros(3, count, dtype=torch.float64)
    index, _ = bins.nearest(ab.movedim(-3, -1))  # [G, B, h, w, 1]
    for g, (place, _) in enumerate(bins.groups()):
        confidence, label = marginals[:, place].double().max(1)
        # half-open intervals, the last one with its end
        interval = (confidence * count).floor().long().clamp(0, count - 1).flatten()
        for row, values in enumerate((None, confidence, (label == index[g, ..., 0]).double())):
            weights = None if values is None else values.flatten()
            found[row] += torch.bincount(interval, weights, minlength=count).double().cpu()
    return found


def calibration_error(sums: Tensor) -> Tensor:
    """Expected calibration error, Σ n_b / N · |share right − mean confidence|, of `reliability` sums [3, count]."""
    return (sums[2] - sums[1]).abs().sum() / sums[0].sum()


def mean_color(prior: Tensor, bins: ColorBins) -> Tensor:
    """The mean of the labels' colours under a prior [K]: ab [2] float64. The best constant guess by squared error."""
    parts = [prior[place].double() @ centers / prior[place].double().sum() for place, centers in bins.groups()]
    return torch.cat(parts)


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
