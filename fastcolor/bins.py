"""Label spaces: the discrete ab colours that the network predicts and the mean field works on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

# The 313 bins of Zhang et al. 2016 (arXiv 1603.08511, section 2.1) in their published order: for each a, all b in steps
# of 10 between two ends. Stored as {a: (first b, last b)}; test_bins.py checks it against the in-gamut definition.
_JOINT_ROWS = {
    -90: (50, 90), -80: (20, 90), -70: (0, 90), -60: (-20, 90), -50: (-30, 100), -40: (-40, 100), -30: (-50, 100),
    -20: (-50, 100), -10: (-60, 100), 0: (-70, 100), 10: (-80, 90), 20: (-80, 90), 30: (-90, 90), 40: (-100, 90),
    50: (-100, 80), 60: (-110, 80), 70: (-110, 80), 80: (-110, 70), 90: (-110, 70), 100: (-90, 0),
}  # fmt: skip
# Melas-Kyriazi and Han 2017: a and b apart, 25 bins each. The step of 10 covers all of the sRGB gamut (|a|, |b| < 108).
_SEPARABLE_AXIS = tuple(range(-120, 121, 10))


class ColorBins:
    """A label space over the ab plane.

    kind="joint": every label is one (a, b) colour; `centers` is [K, 2], K = 313 unless own centers are given.
    kind="separable": a and b are predicted apart; the K = 25 + 25 labels are first those of a, then those of b, and
    `centers` is [25, 2] with the two axes side by side.

    Args:
        kind: "joint" or "separable".
        centers: own bin centers in ab units, [K, 2]; the published ones if left out.

    Raises:
        ValueError: the kind is not known, or centers are not [K, 2], finite and distinct.
    """

    def __init__(self, kind: str = "joint", centers: Tensor | Sequence[Sequence[float]] | None = None):
        if kind not in ("joint", "separable"):
            raise ValueError(f"kind must be 'joint' or 'separable', got {kind!r}")
        own = centers is not None
        if centers is None:
            centers = _joint_centers() if kind == "joint" else [(v, v) for v in _SEPARABLE_AXIS]
        centers = torch.as_tensor(centers, dtype=torch.float64)
        if centers.ndim != 2 or centers.shape[1] != 2 or len(centers) == 0:
            raise ValueError(f"centers must have shape [K, 2], got {list(centers.shape)}")
        if not centers.isfinite().all():
            raise ValueError("centers must be finite")
        groups = [centers] if kind == "joint" else [centers[:, :1], centers[:, 1:]]
        if any(len(g.unique(dim=0)) != len(g) for g in groups):
            raise ValueError("centers must be distinct")
        self.kind = kind
        self.own_centers = tuple(map(tuple, centers.tolist())) if own else None  # None: the published ones
        self._tables: dict[tuple[int, str], Tensor] = {}
        self.centers = centers  # [K, 2] float64 on the CPU; ask `centers_like` for another device or type

    @property
    def count(self) -> int:
        """K, the number of logits that the network gives for this label space."""
        return len(self.centers) * (1 if self.kind == "joint" else 2)

    def __len__(self) -> int:
        return self.count

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ColorBins):
            return NotImplemented
        return self.kind == other.kind and torch.equal(self.centers, other.centers)

    def __hash__(self) -> int:
        return hash((self.kind, self.count))

    def __repr__(self) -> str:
        return f"ColorBins({self.kind!r}, {self.count} labels)"

    def centers_like(self, tensor: Tensor) -> Tensor:
        """The centers [K, 2] on the device of `tensor`, float64 for float64 and else float32."""
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return self.centers.to(tensor.device, dtype)

    def groups(self) -> list[tuple[slice, Tensor]]:
        """The independent label axes: (the labels' place in K, their centers [K_g, D]). Joint: one group with D = 2;
        separable: two groups with D = 1, a then b."""
        if self.kind == "joint":
            return [(slice(0, self.count), self.centers)]
        n = len(self.centers)
        return [(slice(0, n), self.centers[:, :1]), (slice(n, 2 * n), self.centers[:, 1:])]

    def nearest(self, ab: Tensor, neighbors: int = 1, chunk: int = 1 << 16) -> tuple[Tensor, Tensor]:
        """The nearest labels of each colour, nearest first.

        Args:
            ab: [..., 2] colours in ab units.
            neighbors: how many labels of each axis.
            chunk: colours handled at a time; bounds the memory at chunk * K distances.

        Returns:
            index [G, ..., neighbors] int64 and squared distance [G, ..., neighbors], G the number of `groups()`
            (1 joint, 2 separable). Indices count within their group.
        """
        flat = ab.reshape(-1, 2)
        flat = flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32)
        parts = []
        for axis, (_, centers) in enumerate(self.groups()):
            centers = centers.to(flat.device, flat.dtype)
            points = flat if self.kind == "joint" else flat[:, axis : axis + 1]
            k = min(neighbors, len(centers))
            looked_up = self.kind == "joint" and not torch.compiler.is_compiling()  # its way depends on the colours
            candidates = self.candidates(k, flat.device) if looked_up else None
            found = [_nearest(piece, centers, k, candidates) for piece in points.split(chunk)]
            parts.append([torch.cat(part).reshape(*ab.shape[:-1], k) for part in zip(*found, strict=True)])
        return torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])

    def candidates(self, k: int, device: torch.device) -> Tensor:
        """For each cell of a grid over the ab plane, every label that can be among the k nearest of a colour in it:
        [cells, cells, M], in ascending order, padded with K. Exact: a label is left out only where k others are nearer
        to every point of the cell."""
        key = (k, str(device))
        if key not in self._tables:
            low = CELLS_FROM + CELL * torch.arange(CELLS, dtype=torch.float64)
            corner = torch.stack(torch.meshgrid(low, low, indexing="ij"), -1).reshape(-1, 1, 2)  # [cells², 1, 2]
            below, above = corner - self.centers, self.centers - corner - CELL
            nearest = torch.maximum(below, above).clamp_min(0).square().sum(-1)  # [cells², K] to the closest point
            farthest = torch.maximum(-below, -above).square().sum(-1)  # and to the farthest
            keep = nearest <= farthest.kthvalue(k, dim=1).values[:, None] + 1e-6
            width = int(keep.sum(1).max())
            order = torch.where(keep, torch.arange(self.count), self.count).sort(1).values[:, :width]
            self._tables[key] = order.reshape(CELLS, CELLS, width).to(device)
        return self._tables[key]

    def histogram(self, ab: Tensor) -> Tensor:
        """How many of the colours [..., 2] fall into each label: [K] float64."""
        index, _ = self.nearest(ab)
        counts = [
            torch.bincount(index[g].flatten(), minlength=len(centers)) for g, (_, centers) in enumerate(self.groups())
        ]
        return torch.cat(counts).double()

    def rebalancing_weights(self, prior: Tensor, mix: float = 0.5, sigma: float = 5.0) -> Tensor:
        """Class weights of Zhang et al. 2016, section 2.2: w ∝ ((1 − mix) p̃ + mix / Q)^−1 with E_p̃[w] = 1.

        Args:
            prior: [K] non-negative counts or probabilities of the labels in the training set.
            mix: λ in [0, 1]; 1 gives uniform weights.
            sigma: width in ab units of the Gaussian that smooths the prior to p̃ (over the label space, each centre's
                kernel normalized).

        Returns:
            [K] float64 on the CPU.
        """
        if not 0 <= mix <= 1:
            raise ValueError(f"mix must be between 0 and 1, got {mix}")
        weights = []
        smoothed = self.smoothed_prior(prior, sigma)
        for place, _ in self.groups():
            p = smoothed[place]
            w = 1 / ((1 - mix) * p + mix / len(p)).clamp_min(1e-12)
            weights.append(w / (w * p).sum())
        return torch.cat(weights)

    def smoothed_prior(self, prior: Tensor, sigma: float = 5.0) -> Tensor:
        """p̃ of Zhang et al. 2016, section 2.2: the prior of each axis, normalized and spread over the label space by a
        Gaussian of `sigma` ab units, each centre's kernel normalized. [K] float64 on the CPU."""
        if prior.shape != (self.count,):
            raise ValueError(f"prior must have shape [{self.count}], got {list(prior.shape)}")
        prior = prior.detach().double().cpu()
        if not (prior.isfinite().all() and (prior >= 0).all() and prior.sum() > 0):
            raise ValueError("prior must be finite, non-negative and not all zero")
        parts = []
        for place, centers in self.groups():
            p = prior[place] / prior[place].sum()
            if sigma > 0:
                kernel = torch.exp(torch.cdist(centers, centers).square() / (-2 * sigma**2))
                p = (kernel / kernel.sum(0)) @ p  # each column spreads one label's mass: the sum stays 1
            parts.append(p)
        return torch.cat(parts)

    def to_dict(self) -> dict:
        """What `from_dict` needs, in plain types: for checkpoints."""
        own = self != ColorBins(self.kind)
        return {"kind": self.kind, "centers": self.centers.tolist() if own else None}

    @classmethod
    def from_dict(cls, state: dict) -> ColorBins:
        return cls(state["kind"], state.get("centers"))


# The cells of the nearest-label table: all of sRGB and some more. Colours beyond are compared with every label.
CELL, CELLS_FROM, CELLS = 5.0, -130.0, 52


def _nearest(points: Tensor, centers: Tensor, k: int, candidates: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k nearest of centers [K, D] to points [N, D], equal distances by ascending label: two of [N, k]."""
    if candidates is None:
        # differences, not |x|² − 2 x c + |c|²: nothing cancels
        squared, index = (points[:, None, :] - centers).square_().sum(-1).sort(dim=-1, stable=True)
        return index[:, :k], squared[:, :k]
    cell = ((points - CELLS_FROM) / CELL).floor()
    inside = ((cell >= 0) & (cell < CELLS)).all(-1)  # false for nan
    cell = torch.where(inside[:, None], cell, 0).long()
    label = candidates[cell[:, 0], cell[:, 1]]  # [N, M]
    padded = torch.cat([centers, centers.new_full((1, 2), torch.inf)])
    squared, order = (points[:, None, :] - padded[label]).square_().sum(-1).sort(dim=-1, stable=True)
    index, squared = label.gather(1, order[:, :k]), squared[:, :k]
    if not inside.all():
        far = ~inside
        index[far], squared[far] = _nearest(points[far], centers, k, None)
    return index, squared


@cache
def _joint_centers() -> tuple[tuple[int, int], ...]:
    return tuple((a, b) for a, (first, last) in _JOINT_ROWS.items() for b in range(first, last + 1, 10))


def soft_encode(bins: ColorBins, ab: Tensor, neighbors: int = 5, sigma: float = 5.0) -> tuple[Tensor, Tensor]:
    """Soft-encoding of colours: the nearest labels and their probabilities (Zhang et al. 2016, section 2.1).

    Args:
        bins: the label space. Joint bins spread a colour over its `neighbors` nearest labels with a Gaussian of
            `sigma`; separable bins are one-hot.
        ab: [..., 2].

    Returns:
        index [G, ..., n] and probability [G, ..., n], the latter summing to 1 over n.
    """
    if bins.kind == "separable":
        index, squared = bins.nearest(ab, 1)
        return index, torch.ones_like(squared)
    index, squared = bins.nearest(ab, neighbors)
    if math.isinf(sigma):
        return index, squared * 0 + 1 / squared.shape[-1]
    # softmax of the exponents: the same normalized Gaussian, without 0 / 0 far outside the gamut
    return index, torch.softmax(squared / (-2 * sigma * sigma), dim=-1)
