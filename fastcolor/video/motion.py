"""Where the things of a frame were in the frame before: dense motion from lightness, small and quick.

A full search on a coarse grid finds large motion; Lucas and Kanade 1981, coarse to fine with box windows, brings it to
parts of a pixel. All on pictures of some ten thousand pixels, in plain PyTorch, on any device, without a wait.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcolor.model.network import pool_to

CELL = 2  # pixels of the finest picture, along each side, that share one motion
_COARSEST = 12  # the short side at which the pyramid ends, pixels
_REACH = 3  # of the full search, in pixels of the coarsest picture
_NOISE = 2.0  # L units: gradients below it do not move anything
_STEPS = 2  # of Lucas-Kanade on each level
_WINDOW = 3  # cells
_ZERO = 1.1  # standing still is taken where its difference is at most so much larger
_NOISY = 0.35  # and by so much of the noise: reading between pixels halves its variance


def pyramid(L: Tensor) -> list[Tensor]:
    """[B, 1, H, W] and its halves, finest first, each less its local mean: light that comes and goes is no motion."""
    levels = [L]
    while min(levels[-1].shape[-2:]) >= 2 * _COARSEST:
        levels.append(pool_to(levels[-1], 2))
    return [x - box(x, 9) for x in levels]


def flow(now: list[Tensor], before: list[Tensor]) -> Tensor:
    """Motion between two pyramids: [B, 2, ⌈H/2⌉, ⌈W/2⌉], (x, y) in cells of 2 pixels, so that now(p) looks like
    before(p + flow(p))."""
    motion = _search(now[-1], before[-1]) / CELL
    for level in range(len(now) - 1, -1, -1):
        here, there = now[level], before[level]
        if level < len(now) - 1:
            motion = 2 * read_at(motion, positions(*_cells(here), 0.5, here.device))
        for _ in range(_STEPS):
            motion = _step(here, there, motion)
    return _still(now[0], before[0], motion)


def _cells(x: Tensor) -> tuple[int, int]:
    return -(-x.shape[-2] // CELL), -(-x.shape[-1] // CELL)


def _fine(motion: Tensor, like: Tensor) -> Tensor:
    """Motion of cells as that of pixels."""
    return CELL * read_at(motion, positions(*like.shape[-2:], 1 / CELL, like.device))


def _search(now: Tensor, before: Tensor) -> Tensor:
    """The shift of least mean difference around each cell, of all within reach, in pixels."""
    height, width = now.shape[-2:]
    reach = [(dy, dx) for dy in range(-_REACH, _REACH + 1) for dx in range(-_REACH, _REACH + 1)]
    wide = F.pad(before, (_REACH,) * 4, mode="replicate")
    shifted = torch.cat(
        [wide[..., _REACH + dy : _REACH + dy + height, _REACH + dx : _REACH + dx + width] for dy, dx in reach], 1
    )
    cost = box(pool_to((shifted - now).abs(), CELL), 3)  # [B, 49, h, w]
    # a step away has to be worth it: flat places stay where they are
    far = table(tuple(float(dy * dy + dx * dx) ** 0.5 for dy, dx in reach), now.device)
    best = (cost + 0.05 * far[None, :, None, None]).argmin(1)  # [B, h, w]
    shifts = table(tuple((float(dx), float(dy)) for dy, dx in reach), now.device)
    return shifts[best].movedim(-1, 1)


def _step(now: Tensor, before: Tensor, motion: Tensor) -> Tensor:
    """One Gauss-Newton step of the motion of each cell's window."""
    moved = warp(before, _fine(motion, now))
    wide = F.pad(moved, (1, 1, 1, 1), mode="replicate")
    gx = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2
    gy = (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2
    gt = moved - now
    products = torch.cat((gx * gx, gx * gy, gy * gy, gx * gt, gy * gt), 1)
    xx, xy, yy, xt, yt = box(pool_to(products, CELL), _WINDOW).unbind(1)
    xx, yy = xx + _NOISE**2 / 4, yy + _NOISE**2 / 4
    det = xx * yy - xy * xy
    step = torch.stack(((xy * yt - yy * xt) / det, (xy * xt - xx * yt) / det), 1).clamp(-1, 1)
    return box(motion + step / CELL, 3)


def _still(now: Tensor, before: Tensor, motion: Tensor) -> Tensor:
    """Zero where that explains the picture about as well: what stands still must not creep."""
    differences = torch.cat((warp(before, _fine(motion, now)) - now, before - now), 1).abs()
    moving, standing = box(pool_to(differences, CELL), 3).split(1, 1)
    noise = moving.flatten(1).median(1).values[:, None, None, None]  # what motion does not explain of most places
    return torch.where(standing <= _ZERO * moving + _NOISY * noise + 0.1, 0, motion)


def box(x: Tensor, size: int) -> Tensor:
    """Means over size×size windows, smaller at the edge. As two matrix products: pooling is not vectorised."""
    return _band(x.shape[-2], size, x.device) @ (x @ _band(x.shape[-1], size, x.device).T)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _band(n: int, size: int, device: torch.device) -> Tensor:
    i = torch.arange(n)
    band = ((i[:, None] - i).abs() <= size // 2).float()
    return (band / band.sum(1, keepdim=True)).to(device)


def warp(x: Tensor, motion: Tensor) -> Tensor:
    """x [B, C, H, W] read at p + motion(p), bilinear; beyond the edge stands the edge."""
    return read_at(x, positions(*motion.shape[-2:], 1.0, motion.device) + motion)


def read_at(x: Tensor, places: Tensor) -> Tensor:
    """x [B, C, H, W] at places [B, 2, h, w], (x, y) in pixels."""
    size = table((2.0 / x.shape[-1], 2.0 / x.shape[-2]), x.device)
    grid = (places.movedim(1, -1) + 0.5) * size - 1
    return F.grid_sample(
        x, grid.expand(x.shape[0], -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False
    )


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def positions(height: int, width: int, scale: float, device: torch.device) -> Tensor:
    """(x, y) of every pixel on a picture that is `scale` times as large, [1, 2, H, W]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((torch.stack((x, y))[None] + 0.5) * scale - 0.5).float().to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def table(numbers: tuple, device: torch.device) -> Tensor:
    """Plain numbers on a device, kept there: a copy makes the host wait, and cannot be captured in a graph."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)
