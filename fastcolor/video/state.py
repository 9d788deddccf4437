"""What is carried from frame to frame: the network's scores of the last keyframe, and where they have moved to."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcolor.video.motion import positions, read_at


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
    scores: Tensor | None = None  # [2, h·w, C] at the keyframe's places: before it, and of it
    shown: Tensor | None = None  # [1, 2, h, w] ab of the frame before
    guide: Tensor | None = None  # [1, 1, h, w] of the frame before
    hints: list[int] = field(default_factory=list)  # those of the frame before


def gather(scores: Tensor, shares: Tensor, places: Tensor, trust: Tensor | None = None) -> Tensor:
    """Scores [2, h·w, C], mixed by shares [2] and read at places [1, 2, h, w], bilinear, times trust [1, 1, h, w]:
    [h·w, C]."""
    height, width = places.shape[-2:]
    x, y = places[0].flatten(1).unbind(0)  # [h·w]
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    x0, y0 = x.floor().clamp_max(max(0, width - 2)), y.floor().clamp_max(max(0, height - 2))
    fx, fy = x - x0, y - y0
    right, below = int(width > 1), width * int(height > 1)
    first = (y0 * width + x0).long()
    index = torch.stack((first, first + right, first + below, first + right + below), 1)  # [h·w, 4]
    weight = torch.stack(((1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx), 1)
    if trust is not None:
        weight = weight * trust.flatten()[:, None]
    index = torch.cat((index, index + height * width), 1)  # [h·w, 8]
    weight = torch.cat((weight * shares[0], weight * shares[1]), 1)
    # a sum of rows: ten times as fast as reading C planes at places between pixels
    return F.embedding_bag(index, scores.flatten(0, 1), mode="sum", per_sample_weights=weight)


def trusted(guide: Tensor, key_guide: Tensor, places: Tensor) -> Tensor:
    """How far pixels can take the scores of their places in the keyframe, 0 to 1, [1, 1, h, w]: less where the
    lightness is another, or the place outside the picture."""
    key = read_at(key_guide, places)
    # light that changes everywhere, as in a fade, changes no colour: the best line is taken away
    here, there = guide - guide.mean(), key - key.mean()
    slope = (here * there).mean() / (there.square().mean() + 1)
    residual = here - slope.clamp(0.7, 1.4) * there
    residual = residual - residual.median()
    size = places.new_tensor(places.shape[:1:-1])[None, :, None, None]
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
