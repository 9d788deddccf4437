"""Mean field of a pairwise random field over colour labels, in plain PyTorch: the definition, in any floating type.

    E(y) = − Σ_i u_i(y_i) − ½ Σ_i Σ_{j in N(i)} w_ij s(y_i, y_j)
    w_ij = weight · exp(−|p_i − p_j|² / 2 sigma_space² − (g_i − g_j)² / 2 sigma_light²)
    q_i(l) ← softmax_l(u_i(l) + Σ_{j in N(i)} w_ij Σ_l' s(l, l') q_j(l'))

With s = A Bᵀ only F = Bᵀ q, R numbers a pixel instead of K, travel between pixels. The field for colours, its label
similarity and its coordinate ascent: Melas-Kyriazi and Han 2017. The guided pair weights: Krähenbühl and Koltun 2011
(arXiv 1210.5644), equation 3. Damping: Baqué et al. 2016 (arXiv 1511.06103).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcolor.bins import ColorBins

JOINT_BINS = ColorBins("joint")
STEPS = {0: 10.0, 1: 3.0, 2: 3.0}  # similarity at a distance of so many bins; 0 beyond

Similarity = str | Tensor | tuple[Tensor, Tensor]
Scalar = float | Tensor


class LabelFactors(NamedTuple):
    """s(l, l') = Σ_r a[l, r] b[l', r], up to terms without l (the softmax cancels them) and up to `error`."""

    a: Tensor  # [K, R]
    b: Tensor  # [K, R]
    error: float  # the largest |s − A Bᵀ| of all label pairs


def working(tensor: Tensor) -> Tensor:
    """Arithmetic is float64 for float64, else float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def resolve_bins(bins: ColorBins | None, labels: int) -> ColorBins | None:
    """The 313 joint bins stand for None where K = 313; other label counts then have no colours."""
    return JOINT_BINS if bins is None and labels == JOINT_BINS.count else bins


def label_axes(bins: ColorBins | None, labels: int) -> list[slice]:
    """The places in K that are distributions of their own: one for joint bins and for none, two for separable ones."""
    return [slice(0, labels)] if bins is None else [place for place, _ in bins.groups()]


def softmax(scores: Tensor, axes: list[slice]) -> Tensor:
    return torch.cat([scores[:, place].softmax(1) for place in axes], dim=1)


# ---- label similarity ------------------------------------------------------------------------------------------------


def similarity_matrix(
    similarity: Similarity,
    labels: int,
    bins: ColorBins | None = None,
    gamma: float = 10.0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """s as a [K, K] matrix. The named ones are 0 between the two axes of separable bins."""
    if isinstance(similarity, tuple):
        a, b = (m.to(device, dtype) for m in similarity)
        return a @ b.T
    if isinstance(similarity, Tensor):
        return similarity.to(device, dtype)
    if similarity == "potts":
        return torch.eye(labels, dtype=dtype, device=device)
    blocks = []
    for _, centers in resolve_bins(bins, labels).groups():
        c = centers.to(device, dtype)  # [K_g, D]
        if similarity == "steps":
            rank = c[:, 0].argsort().argsort()
            apart = (rank[:, None] - rank).abs()
            blocks.append(sum(value * (apart == distance).to(dtype) for distance, value in STEPS.items()))
            continue
        quadratic = (c[:, None] - c).square().sum(-1) / (-2 * gamma**2)
        blocks.append(quadratic if similarity == "quadratic" else quadratic.exp())
    return torch.block_diag(*blocks)


def quadratic_factors(bins: ColorBins, gamma: float, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    """−|c − c'|² / 2γ² without its term in c' alone: B = [1, c], A = [−|c|², 2 c] / 2γ². R = 3, separable 2 + 2."""
    left, right = [], []
    for _, centers in bins.groups():
        c = centers.to(device, dtype)  # [K_g, D]
        left.append(torch.cat([-c.square().sum(1, keepdim=True), 2 * c], dim=1) / (2 * gamma**2))
        right.append(torch.cat([torch.ones_like(c[:, :1]), c], dim=1))
    return torch.block_diag(*left), torch.block_diag(*right)


def truncated(matrix: Tensor, tolerance: float | None, rank: int | None) -> LabelFactors | None:
    """The eigenvectors of the largest |eigenvalues|, as few as keep every entry within `tolerance`, at most `rank`.

    None where all K would be needed. The basis is a constant to autograd: eigenvectors of equal eigenvalues have no
    derivative, and s V Vᵀ passes the gradient of s on without one.
    """
    exact = matrix.detach().double()
    values, vectors = torch.linalg.eigh((exact + exact.T) / 2)
    order = values.abs().argsort(descending=True)
    values, vectors = values[order], vectors[:, order]
    residual, kept, error = exact.clone(), 0, math.inf
    most = len(exact) if rank is None else min(rank, len(exact))
    while error > (tolerance or 0.0) and kept < most:  # at least once: an empty basis is no pair
        residual -= values[kept] * torch.outer(vectors[:, kept], vectors[:, kept])
        error = residual.abs().max().item()
        kept += 1
    if kept == len(exact):
        return None
    basis = vectors[:, :kept].to(matrix.dtype)
    return LabelFactors(matrix @ basis, basis, error)


def label_factors(
    similarity: Similarity,
    labels: int,
    bins: ColorBins | None = None,
    gamma: float = 10.0,
    tolerance: float | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> LabelFactors:
    """A and B of s = A Bᵀ, [K, R] each. See `fastcolor.label_factors`."""
    if isinstance(similarity, tuple):
        return LabelFactors(*(m.to(device, dtype) for m in similarity), 0.0)
    if isinstance(similarity, str) and similarity == "quadratic":
        return LabelFactors(*quadratic_factors(resolve_bins(bins, labels), gamma, dtype, device), 0.0)
    # decomposed in float64, so that the reported error is the truncation's own
    matrix = similarity_matrix(similarity, labels, bins, gamma, torch.float64, device)
    found = None if tolerance is None and rank is None else truncated(matrix, tolerance, rank)
    a, b, error = found or LabelFactors(matrix, torch.eye(labels, dtype=matrix.dtype, device=matrix.device), 0.0)
    return LabelFactors(a.to(dtype), b.to(dtype), error)


def project(matrix: Tensor | None, q: Tensor) -> Tensor:
    """Σ_l matrix[l, r] q[:, l]: [B, K, H, W] -> [B, R, H, W]; None is the identity."""
    return q if matrix is None else torch.einsum("lr,blhw->brhw", matrix, q)


def interaction(
    similarity: Similarity, labels: int, bins: ColorBins | None, gamma: float, tolerance: float | None, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Aᵀ [R, K] and B [K, R] for `project`; None where it is the identity, which needs no product."""
    if isinstance(similarity, str) and similarity == "potts":
        return None, None
    low_rank = isinstance(similarity, tuple) or (isinstance(similarity, str) and similarity == "quadratic")
    if tolerance is None and not low_rank:
        return similarity_matrix(similarity, labels, bins, gamma, like.dtype, like.device).T, None
    factors = label_factors(similarity, labels, bins, gamma, tolerance, dtype=like.dtype, device=like.device)
    return factors.a.T, factors.b


def are_colors(q: Tensor, labels: int, similarity: Similarity) -> bool:
    """Whether `previous` holds mean colours, not marginals: "quadratic" asks for no more of them."""
    return q.ndim == 4 and q.shape[1] == 2 != labels and isinstance(similarity, str) and similarity == "quadratic"


def features_before(q: Tensor, b: Tensor | None, labels: int, bins: ColorBins | None, similarity: Similarity) -> Tensor:
    """F = Bᵀ q of the frame before, from its marginals [B, K, H, W] or its mean colours [B, 2, H, W]."""
    if not are_colors(q, labels, similarity):
        return project(b, q)
    one = torch.ones_like(q[:, :1])
    return torch.cat([one, q] if bins.kind == "joint" else [one, q[:, :1], one, q[:, 1:]], 1)


# ---- the stencil -----------------------------------------------------------------------------------------------------


def offsets(neighborhood: str, radius: int, dilation: int, height: int, width: int) -> list[tuple[int, int]]:
    """The (dy, dx) of N(i) in pixels, without those that leave the image from everywhere."""
    steps_y = [d * dilation for d in range(-radius, radius + 1) if abs(d) * dilation < height]
    steps_x = [d * dilation for d in range(-radius, radius + 1) if abs(d) * dilation < width]
    window = [(dy, dx) for dy in steps_y for dx in steps_x if (dy, dx) != (0, 0)]
    return window if neighborhood == "square" else [(dy, dx) for dy, dx in window if dy == 0 or dx == 0]


def shifted(x: Tensor, around: list[tuple[int, int]]) -> Iterator[Tensor]:
    """For each offset, the image moved so that x_j stands where i was; zero where j is outside."""
    margin_y, margin_x = (max([0, *(abs(offset[axis]) for offset in around)]) for axis in (0, 1))
    wide = F.pad(x, (margin_x, margin_x, margin_y, margin_y))
    for dy, dx in around:
        yield wide.narrow(2, margin_y + dy, x.shape[2]).narrow(3, margin_x + dx, x.shape[3])


def gaussian(difference: Tensor, sigma: Scalar) -> Tensor:
    # divided before squaring: a tiny or infinite sigma must not turn 0 into 0 / 0
    return torch.exp(-0.5 * (difference / sigma).square())


def pair_weights(
    guide: Tensor,  # [B, 1, H, W]
    around: list[tuple[int, int]],
    weight: Scalar,
    sigma_space: Scalar,
    sigma_light: Scalar,
) -> list[Tensor]:
    """w_ij of each offset, [B, 1, H, W]; without meaning where j is outside, where F is 0."""
    planes = []
    for (dy, dx), other in zip(around, shifted(guide, around), strict=True):
        distance = guide.new_full((), math.hypot(dy, dx))
        planes.append(weight * gaussian(distance, sigma_space) * gaussian(guide - other, sigma_light))
    return planes


def gathered(features: Tensor, around: list[tuple[int, int]], weights: list[Tensor]) -> Tensor:
    """G_i = Σ_j w_ij F_j, [B, R, H, W]."""
    total = torch.zeros_like(features)
    for w, other in zip(weights, shifted(features, around), strict=True):
        total = total + w * other
    return total


# ---- the field -------------------------------------------------------------------------------------------------------


def mean_field(
    logits: Tensor,  # [B, K, H, W]
    guide: Tensor,  # [B, 1, H, W]
    *,
    similarity: Similarity = "quadratic",
    gamma: float = 10.0,
    bins: ColorBins | None = None,
    radius: int = 2,
    dilation: int = 1,
    neighborhood: str = "square",
    sigma_space: Scalar = 3.0,
    sigma_light: Scalar = 10.0,
    weight: Scalar = 1.0,
    sweeps: int = 5,
    schedule: str = "parallel",
    damping: float = 0.0,
    start: str = "softmax",
    previous: tuple[Tensor, Tensor] | None = None,  # [B, K or 2, H, W], [B, 1, H, W]
    weight_time: Scalar = 1.0,
    sigma_time: Scalar = 10.0,
    tolerance: float | None = None,
) -> Tensor:
    """Marginals [B, K, H, W]. See `fastcolor.mean_field`."""
    u = working(logits)
    g = guide.to(u)
    labels, height, width = u.shape[1:]
    axes = label_axes(resolve_bins(bins, labels), labels)
    around = offsets(neighborhood, radius, dilation, height, width)
    weights = pair_weights(g, around, weight, sigma_space, sigma_light)

    a_t, b = interaction(similarity, labels, bins, gamma, tolerance, u)
    t_start = u if start == "softmax" else torch.zeros_like(u)
    if previous is not None:  # one more neighbour at the same pixel, held fixed
        q_before, g_before = (x.to(u) for x in previous)
        features = features_before(q_before, b, labels, resolve_bins(bins, labels), similarity)
        u = u + project(a_t, weight_time * gaussian(g - g_before, sigma_time) * features)

    boards = [None]
    if schedule == "checkerboard":
        y, x = (torch.arange(n, device=u.device) for n in (height, width))
        black = (y[:, None] + x) % 2 == 0
        boards = [black, ~black]

    t, q = t_start, softmax(t_start, axes)
    for _ in range(sweeps):
        for board in boards:
            new = u + project(a_t, gathered(project(b, q), around, weights))
            if damping:  # on the scores, so that q is damped geometrically
                new = (1 - damping) * new + damping * t
            t = new if board is None else torch.where(board, new, t)
            q = softmax(t, axes)
    return q.to(logits.dtype)


def elbo(
    marginals: Tensor,  # [B, K, H, W]
    logits: Tensor,  # [B, K, H, W]
    guide: Tensor,  # [B, 1, H, W]
    *,
    similarity: Similarity = "quadratic",
    gamma: float = 10.0,
    bins: ColorBins | None = None,
    radius: int = 2,
    dilation: int = 1,
    neighborhood: str = "square",
    sigma_space: Scalar = 3.0,
    sigma_light: Scalar = 10.0,
    weight: Scalar = 1.0,
    previous: tuple[Tensor, Tensor] | None = None,
    weight_time: Scalar = 1.0,
    sigma_time: Scalar = 10.0,
) -> Tensor:
    """The evidence lower bound of each image, [B]: E_q[Σ u + ½ ΣΣ w s] + entropy of q, the previous frame included.

    It takes the true s, with the terms that the softmax cancels. Under `schedule="checkerboard"` with
    `neighborhood="cross"` and `radius=dilation=1` no two neighbours change at once: each half-update is the exact
    maximum over its pixels, and for a symmetric s, positive or not, the bound never falls.
    """
    u = working(logits)
    q, g = marginals.to(u), guide.to(u)
    labels, height, width = u.shape[1:]
    around = offsets(neighborhood, radius, dilation, height, width)
    s = similarity_matrix(similarity, labels, bins, gamma, u.dtype, u.device)
    weights = pair_weights(g, around, weight, sigma_space, sigma_light)
    score = u.masked_fill(q == 0, 0) + 0.5 * project(s.T, gathered(q, around, weights))
    if previous is not None:
        q_before, g_before = (x.to(u) for x in previous)
        score = score + project(s.T, weight_time * gaussian(g - g_before, sigma_time) * q_before)
    return (q * score).sum((1, 2, 3)) + entropy(q).sum((1, 2, 3))


# ---- what is read from the marginals ---------------------------------------------------------------------------------


def finite_log(q: Tensor) -> tuple[Tensor, Tensor]:
    """log q, but 0 where q is below the normal numbers; and where that is. In the backward 1 / q overflows."""
    there = ~(q < torch.finfo(q.dtype).tiny)
    return torch.where(there, q, 1).log(), ~there


def entropy(marginals: Tensor) -> Tensor:
    """[B, K, H, W] -> [B, 1, H, W]. See `fastcolor.entropy`."""
    q = working(marginals)
    return -(q * finite_log(q)[0]).sum(1, keepdim=True)


def expected_colors(q: Tensor, bins: ColorBins) -> Tensor:
    """Σ c q over each axis: [B, K, H, W] -> ab [B, 2, H, W]."""
    parts = [project(centers.to(q), q[:, place]) for place, centers in bins.groups()]  # [B, D, H, W]
    return torch.cat(parts, dim=1)


def annealed_mean(
    marginals: Tensor, temperature: Scalar, bins: ColorBins | None = None, logits: bool = False
) -> Tensor:
    """ab [B, 2, H, W]. See `fastcolor.annealed_mean`."""
    bins = resolve_bins(bins, marginals.shape[1])
    if logits:
        scores = working(marginals) / temperature
    else:
        log_q, absent = finite_log(working(marginals))
        scores = (log_q / temperature).masked_fill(absent, -torch.inf)
    return expected_colors(softmax(scores, label_axes(bins, bins.count)), bins)


def mode(marginals: Tensor, bins: ColorBins | None = None) -> Tensor:
    """ab [B, 2, H, W]. See `fastcolor.mode`."""
    q = working(marginals)
    parts = []
    for place, centers in resolve_bins(bins, q.shape[1]).groups():
        parts.append(centers.to(q)[q[:, place].argmax(1)].movedim(-1, 1))  # [B, D, H, W]
    return torch.cat(parts, dim=1)


# ---- unaries ---------------------------------------------------------------------------------------------------------


def probability_unary(logits: Tensor, scale: float = 10.0, bins: ColorBins | None = None) -> Tensor:
    """scale · softmax(logits), [B, K, H, W]. See `fastcolor.probability_unary`."""
    axes = label_axes(resolve_bins(bins, logits.shape[1]), logits.shape[1])
    return (scale * softmax(working(logits), axes)).to(logits.dtype)


def histogram_unary(histogram: Tensor, bins: ColorBins | None = None) -> Tensor:
    """log h of each axis, [K] -> [1, K, 1, 1]. See `fastcolor.histogram_unary`."""
    h = working(histogram)
    axes = label_axes(resolve_bins(bins, len(h)), len(h))
    return torch.cat([(h[place] / h[place].sum()).log() for place in axes])[None, :, None, None]


def hint_unary(
    ab: Tensor,  # [B, 2, H, W]
    mask: Tensor,  # [B, 1, H, W] bool
    bins: ColorBins | None = None,
    strength: float = 20.0,
    neighbors: int = 5,
    sigma: float = 5.0,
) -> Tensor:
    """[B, K, H, W]. See `fastcolor.hint_unary`."""
    bins = JOINT_BINS if bins is None else bins
    ab = working(ab)
    chosen = mask[:, 0]  # [B, H, W]
    index, squared = bins.nearest(ab.movedim(1, -1)[chosen], neighbors)  # [G, n, m]
    gain = (strength - (squared - squared[..., :1]) / (2 * sigma**2)).clamp_min(0)
    unary = ab.new_zeros(*chosen.shape, bins.count)
    rows = ab.new_zeros(index.shape[1], bins.count)
    for g, (place, _) in enumerate(bins.groups()):
        rows = rows.scatter(1, index[g] + place.start, gain[g])
    unary[chosen] = rows
    return unary.movedim(-1, 1)
