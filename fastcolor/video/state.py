"""What is carried from frame to frame: the network's scores of the last keyframe, and where they have moved to."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcolor.video.motion import positions, read_at, table

# What is new in the picture, and has no scores yet, takes them from a grid over places and lightness.
_GRID = (3, 4, 10)  # cells down, across, and of lightness
_NEAR = (0.15, 0.15, 0.05)  # how far a cell looks: shares of the height, of the width, of the lightness


@dataclass
class Track:
    """What the frames' lightness says: h×w is the size of the guide."""

    number: int = 0  # of the next frame
    age: int = 0  # frames since the keyframe
    waiting: int = 0  # frames in a row that were worth a keyframe
    pyramid: list[Tensor] | None = None  # of the frame before
    guide: Tensor | None = None  # [1, 1, h, w] of the frame before
    seen: Tensor | None = None  # [1, 1, h, w] guide of the last frame that was not blank
    blank: bool = False  # the frame before was
    key_guide: Tensor | None = None  # [1, 1, h, w] of the keyframe
    places: Tensor | None = None  # [1, 2, h, w] where the frame before has its pixels in the keyframe


@dataclass
class Evidence:
    """What the network said: C labels, or 2 colours of regression."""

    age: int = 0
    scores: Tensor | None = None  # [2 h·w + cells, C] at the keyframe's places: before it, and of it; and of the grid
    shown: Tensor | None = None  # [1, 2, h, w] ab of the frame before
    guide: Tensor | None = None  # [1, 1, h, w] of the frame before
    hints: list[int] = field(default_factory=list)  # those of the frame before
    # [1, 3, h, w] each: places in the hint's first frame, and the guide of that frame
    origins: list[Tensor] = field(default_factory=list)


def evidence_of(old: Tensor, new: Tensor, guide: Tensor) -> Tensor:
    """`Evidence.scores` of what was there before a keyframe and of what the network said of it, [h·w, C] each, and the
    keyframe's guide [1, 1, h, w].

    The rows of the grid are means over the keyframe, weighted by nearness in place and in lightness: what things of
    such a lightness look like around there.
    """
    height, width = guide.shape[-2:]
    here = torch.stack((*_shares_of(height, width, guide.device), guide.flatten() / 100))  # [3, h·w], 0 to 1
    cells = torch.cartesian_prod(*((torch.arange(n, device=guide.device) + 0.5) / n for n in _GRID)).T  # [3, cells]
    sigma = table(_NEAR, guide.device)[:, None]
    away = torch.cdist((cells / sigma).T, (here / sigma).T).square()  # [cells, h·w]
    return torch.cat((old, new, (-0.5 * away).softmax(1) @ new))


def gather(
    scores: Tensor, shares: Tensor, places: Tensor, guide: Tensor | None = None, trust: Tensor | None = None
) -> Tensor:
    """What is believed of a frame, [h·w, C].

    Args:
        scores: of `Evidence`.
        shares: [2] of what was there before the keyframe, and of the keyframe.
        places: [1, 2, h, w] in the keyframe; read between pixels, bilinear.
        guide, trust: [1, 1, h, w]; where the trust in the places is not 1, the grid has the rest.
    """
    height, width = places.shape[-2:]
    count = height * width
    index, weight = _corners(places[0].flatten(1).flip(0), (height, width))
    if trust is not None:
        weight = weight * trust.flatten()[:, None]
    index = [index, index + count]
    weight = [weight * shares[0], weight * shares[1]]
    if trust is not None:
        here = torch.stack((*_shares_of(height, width, guide.device), guide.flatten() / 100))
        cells, nearness = _corners(here * table(_GRID, guide.device)[:, None] - 0.5, _GRID)
        index.append(cells + 2 * count)
        weight.append(nearness * (1 - trust.flatten()[:, None]))
    # a sum of rows: ten times as fast as reading C planes at places between pixels
    return F.embedding_bag(torch.cat(index, 1), scores, mode="sum", per_sample_weights=torch.cat(weight, 1))


def _corners(at: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The cells around points [D, n] of a grid of D sides, as numbers in row-major order, and their multilinear
    weights: [n, 2^D] each."""
    index, weight = at.new_zeros(at.shape[1], 1, dtype=torch.long), at.new_ones(at.shape[1], 1)
    for x, size in zip(at, sizes, strict=True):
        x = x.clamp(0, size - 1)
        low = x.floor().clamp_max(max(0, size - 2))
        part = (x - low)[:, None]
        low = (index * size) + low.long()[:, None]
        index = torch.cat((low, low + int(size > 1)), 1)
        weight = torch.cat((weight * (1 - part), weight * part), 1)
    return index, weight


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _shares_of(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """y and x of every pixel, [h·w] each, from 0 to 1."""
    y, x = positions(height, width, 1.0, device)[0].flip(0).flatten(1)
    return (y + 0.5) / height, (x + 0.5) / width


def trusted(guide: Tensor, key_guide: Tensor, places: Tensor) -> Tensor:
    """How far pixels can take the scores of their places in the keyframe, 0 to 1, [1, 1, h, w]: less where the
    lightness is another, or the place outside the picture."""
    key = read_at(key_guide, places)
    # light that changes everywhere, as in a fade, changes no colour: the best line is taken away
    here, there = guide - guide.mean(), key - key.mean()
    slope = (here * there).mean() / (there.square().mean() + 1)
    residual = here - slope.clamp(0.7, 1.4) * there
    residual = residual - residual.median()
    size = table(tuple(places.shape[:1:-1]), places.device)[None, :, None, None]
    outside = torch.maximum(-places, places - size + 1).clamp_min(0).amax(1, keepdim=True)
    return torch.exp(-0.5 * ((residual.abs() - 3).clamp_min(0) / 6).square() - 0.5 * outside.square())


def still(like: Tensor) -> Tensor:
    """Places of a picture in itself, for a guide [1, 1, h, w]."""
    return positions(*like.shape[-2:], 1.0, like.device)


def to_dict(state: Track | Evidence) -> dict:
    """Plain containers, tensors copied to the CPU."""

    def plain(x):
        if isinstance(x, Tensor):
            return x.detach().cpu().clone()
        return [plain(y) for y in x] if isinstance(x, list) else x

    return {f.name: plain(getattr(state, f.name)) for f in fields(state)}


def from_dict(kind: type, values: dict, device: torch.device):
    def there(x):
        if isinstance(x, Tensor):
            return x.to(device, copy=True)
        return [there(y) for y in x] if isinstance(x, list) else x

    names = {f.name for f in fields(kind)}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"state of a film must have {', '.join(sorted(names))}")
    return kind(**{name: there(x) for name, x in values.items()})
