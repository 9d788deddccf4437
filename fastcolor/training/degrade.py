"""Old film for training: what a lens, an emulsion, a century and a scanner do to a picture, done to the lightness that
the network sees. The colours to be learned stay as they are.

Every number is drawn from the seed of its image and a counter, by a hash: the same image of the same epoch is degraded
alike on any device, in any batch and after any interruption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcolor.reference import lab as reference

_LUMINANCE = reference.RGB_TO_XYZ[1]
_ORTHOCHROMATIC = (0.03, 0.47, 0.50)  # blind to red, most awake in blue
_BLUR, _GRAIN, _FADE, _GAMMA, _SCRATCH, _QUALITY = 1.5, 8.0, 25.0, 0.5, 45.0, 80.0  # at strength 1: pixels, L, JPEG
_TAPS = 4  # on each side of a blurred pixel
_SCRATCHES, _SPECKS = 3, 6  # at most, an image

# ITU-T T.81, table K.1: quantization of luminance
_JPEG = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


@dataclass(frozen=True)
class Film:
    """How much of each there is, in [0, 1]; 0 leaves it out. Of the degraded images, each effect is on half.

    share: of the images that are degraded at all.
    orthochromatic: response of early emulsions, which see no red.
    blur: of lens and focus. grain: of the emulsion. fading: contrast and tones that are lost.
    scratches: and dust. jpeg: compression of the scan.
    """

    share: float = 0.5
    orthochromatic: float = 1.0
    blur: float = 1.0
    grain: float = 1.0
    fading: float = 1.0
    scratches: float = 1.0
    jpeg: float = 1.0

    def __post_init__(self):
        for f in fields(self):
            if not 0 <= getattr(self, f.name) <= 1:
                raise ValueError(f"{f.name} must be between 0 and 1, got {getattr(self, f.name)}")


@torch.no_grad()
def degrade(
    rgb: Tensor,  # [B, H, W, 3] uint8
    L: Tensor,  # [B, 1, H, W]
    seeds: Tensor,  # [B] int64
    film: Film,
) -> Tensor:
    """The lightness that an old print of the picture would have.

    Args:
        rgb: [B, H, W, 3] uint8, the colours that the emulsion sees.
        L: [B, 1, H, W] float32, their lightness in [0, 100].
        seeds: [B] int64, on the device of the others; equal seeds give equal damage.
        film: how much.

    Returns:
        L [B, 1, H, W] in [0, 100]; images that stay whole have exactly the L that came.
    """
    if film.share == 0 or L.numel() == 0:
        return L
    draws = uniform(seeds[:, None], torch.arange(64, device=L.device))  # [B, 64]
    hit = draws[:, 0] < film.share

    def amount(strength: float, n: int) -> Tensor:
        """[B]: 0 for half of the images, else even between 0 and `strength`."""
        return torch.where(hit, strength * (2 * draws[:, n] - 1).clamp_min(0), 0.0)

    old = L[:, 0].float()
    if film.orthochromatic:
        old = _orthochromatic(rgb, old, amount(film.orthochromatic, 1))
    if film.blur:
        old = _blur(old, amount(film.blur, 2) * _BLUR)
    if film.grain:
        old = _grain(old, amount(film.grain, 3) * _GRAIN, draws[:, 4], seeds)
    if film.fading:
        old = _fade(old, amount(film.fading, 5), draws[:, 6:9])
    if film.scratches:
        old = _scratch(old, amount(film.scratches, 9), draws[:, 16:])
    if film.jpeg:
        old = _jpeg(old, amount(film.jpeg, 10) * _QUALITY)
    return torch.where(hit[:, None, None], old.clamp(0, 100), L[:, 0]).to(L.dtype)[:, None]


def hashed(seeds: Tensor, counters: Tensor) -> Tensor:
    """32 unrelated bits for each (seed, counter), int64 in [0, 2^32): the finalizer of MurmurHash3, twice."""

    def mix(h: Tensor) -> Tensor:
        h = h & 0xFFFFFFFF
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF  # the product may wrap; its low 32 bits do not care
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return h ^ (h >> 16)

    return mix(mix(seeds ^ (seeds >> 32)) + counters * 0x9E3779B9)


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """float32 in [0, 1), one for each (seed, counter)."""
    return (hashed(seeds, counters) >> 8).float() * 2.0**-24


def _orthochromatic(rgb: Tensor, L: Tensor, share: Tensor) -> Tensor:
    """L of a film whose sensitivity lies between the eye's (share 0) and an orthochromatic one's (1)."""
    linear = reference.srgb_to_linear(torch.arange(256, dtype=torch.float32) / 255).to(L.device)[rgb.long()]
    eye, film = (torch.tensor(x, device=L.device) for x in (_LUMINANCE, _ORTHOCHROMATIC))
    weights = torch.lerp(eye, film, share[:, None])  # [B, 3]
    seen = 116 * reference.lab_f((linear * weights[:, None, None]).sum(-1)) - 16
    return torch.where(share[:, None, None] > 0, seen.clamp(0, 100), L)


def _blur(L: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian of a sigma [B] in pixels, edges repeated."""
    steps = torch.arange(-_TAPS, _TAPS + 1, device=L.device)
    taps = torch.exp(-0.5 * (steps / sigma[:, None].clamp_min(1e-3)) ** 2)
    taps = (taps / taps.sum(1, keepdim=True))[:, :, None, None]  # [B, 9, 1, 1]
    height, width = L.shape[1:]
    wide = F.pad(L[:, None], (_TAPS, _TAPS, 0, 0), mode="replicate")[:, 0]
    L = sum(taps[:, k] * wide[:, :, k : k + width] for k in range(2 * _TAPS + 1))
    tall = F.pad(L[:, None], (0, 0, _TAPS, _TAPS), mode="replicate")[:, 0]
    return sum(taps[:, k] * tall[:, k : k + height] for k in range(2 * _TAPS + 1))


def _grain(L: Tensor, sigma: Tensor, coarse: Tensor, seeds: Tensor) -> Tensor:
    """Noise of a standard deviation [B] in L, most in the middle tones; `coarse` [B] in [0, 1] makes it lumpy."""
    places = torch.arange(64, 64 + L[0].numel(), device=L.device).view(1, *L.shape[1:])
    bits = hashed(seeds[:, None, None], places)
    # four bytes: mean 510, variance 4 (256² − 1) / 12
    noise = sum((bits >> shift) & 255 for shift in (0, 8, 16, 24)).float().sub_(510).mul_(1 / math.sqrt(21845))
    lumps = F.avg_pool2d(F.pad(noise[:, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[:, 0] * 3
    t = (L / 100).clamp(0, 1)
    strength = sigma[:, None, None] * (0.3 + 0.7 * (4 * t * (1 - t)).sqrt())
    return L + strength * torch.lerp(noise, lumps, coarse[:, None, None])


def _fade(L: Tensor, amount: Tensor, draws: Tensor) -> Tensor:
    """Blacks rise, whites sink, middle tones shift."""
    amount = amount[:, None, None]
    black, white, bend = (draws[:, n, None, None] for n in range(3))
    gamma = torch.exp(amount * _GAMMA * (2 * bend - 1))
    low, high = amount * _FADE * black, 100 - amount * _FADE * white
    return low + (high - low) * (L / 100).clamp(0, 1) ** gamma


def _scratch(L: Tensor, amount: Tensor, draws: Tensor) -> Tensor:
    """Nearly upright lines along the film and specks of dust, bright or dark."""
    height, width = L.shape[1:]
    y = torch.arange(height, device=L.device)[None, :, None] + 0.5
    x = torch.arange(width, device=L.device)[None, None, :] + 0.5

    def draw(n: int) -> Tensor:
        return draws[:, n, None, None]

    at = 0
    for _ in range(_SCRATCHES):
        there, place, lean, thick, middle, length, bright = (draw(at + k) for k in range(7))
        at += 7
        off = x - place * width - (lean - 0.5) * 0.1 * (y - height / 2)
        line = torch.exp(-((off / (0.4 + 0.8 * thick)) ** 2))
        along = ((y - middle * height).abs() <= (0.15 + length) * height).float()
        L = L + (2 * bright - 1) * _SCRATCH * line * along * (there < amount[:, None, None])
    for _ in range(_SPECKS):
        there, across, down, size = (draw(at + k) for k in range(4))
        at += 4
        distance = ((x - across * width) ** 2 + (y - down * height) ** 2).sqrt()
        speck = (1.5 + 2.5 * size**4 - distance).clamp(0, 1)
        sign = torch.where(size < 0.5, 1.0, -1.0)
        L = L + sign * _SCRATCH * speck * (there < amount[:, None, None])
    return L.clamp(0, 100)


def _jpeg(L: Tensor, loss: Tensor) -> Tensor:
    """What quantization leaves of the 8×8 cosine coefficients, at a JPEG quality of 100 − loss [B]; 0 leaves all."""
    quality = 100 - loss
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[:, None, None]
    table = ((torch.tensor(_JPEG, device=L.device) * scale + 50) / 100).floor().clamp(1, 255)[:, None, None]
    k = torch.arange(8, device=L.device)
    cosines = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) * torch.where(k == 0, math.sqrt(0.125), 0.5)[:, None]
    batch, height, width = L.shape
    padded = F.pad(L[:, None], (0, -width % 8, 0, -height % 8), mode="replicate")[:, 0] * 2.55 - 128
    blocks = padded.unfold(1, 8, 8).unfold(2, 8, 8)  # [B, H / 8, W / 8, 8, 8]
    kept = torch.round(cosines @ blocks @ cosines.T / table) * table
    back = (cosines.T @ kept @ cosines).transpose(2, 3).reshape(padded.shape)[:, :height, :width]
    return torch.where(loss[:, None, None] > 0, (back + 128) / 2.55, L)
