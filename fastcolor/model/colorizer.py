"""From a grey picture to a coloured one: network, mean field and rendering in one object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcolor.model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from fastcolor.model.device import choose_device
from fastcolor.model.field import FIELD
from fastcolor.model.network import pool_to
from fastcolor.ops.lab import rgb_to_lab
from fastcolor.ops.mean_field import annealed_mean, mean_field_annealed
from fastcolor.ops.render import render

BUNDLED = Path(__file__).parent.parent / "weights" / "default.safetensors"

_LONGEST = 8  # longest side the network sees, in short sides: a strip of film must not fill the memory
_STRIP = 1 << 21  # pixels whose lightness is computed at a time


@dataclass(frozen=True)
class ColorizeOptions:
    """How pictures are coloured.

    size: short side that the network sees, pixels; None takes what the checkpoint was made for.
    temperature: of the annealed mean (Zhang et al. 2016, equation 5); 1 is the mean, towards 0 the mode.
    vividness: 0 takes the most probable colours, 1 undoes the network's preference for common (pale) ones: α in
        logits + α log w, w the rebalancing weights of the training set.
    saturation: factor on chroma, before colours outside sRGB are brought in.
    mrf: whether the mean field makes colours agree within regions. The regression head has no distribution to work on.
    """

    size: int | None = None
    temperature: float = 0.38
    vividness: float = 0.5
    saturation: float = 1.0
    mrf: bool = True

    def __post_init__(self):
        if self.size is not None and not 16 <= self.size <= 4096:
            raise ValueError(f"size must be between 16 and 4096 pixels, got {self.size}")
        for name, low, high in (("temperature", 0.01, 10), ("vividness", 0, 1), ("saturation", 0, 10)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be between {low} and {high}, got {value}")


def vividness_unary(checkpoint: Checkpoint, vividness: float) -> Tensor | None:
    """α log w, [1, K, 1, 1] float32, w the rebalancing weights of the training set; None where nothing is added.

    Raises:
        CheckpointError: the checkpoint has no prior.
    """
    config = checkpoint.network.config
    if config.head != "distribution" or vividness == 0:
        return None
    if checkpoint.prior is None:
        raise CheckpointError(
            "vividness needs the colour statistics of the training set, which the checkpoint does not have; "
            "use vividness=0"
        )
    weights = config.bins.rebalancing_weights(checkpoint.prior)
    return (vividness * weights.log()).float()[None, :, None, None]


class Colorizer:
    """Colorizes pictures with one network.

    Args:
        checkpoint: of `load_checkpoint`; `from_pretrained` and `load` are the usual ways here.
        device: "auto", "cpu", "cuda", ...
        options: fields of `ColorizeOptions`.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "auto", **options):
        self.device = choose_device(device)
        self.options = ColorizeOptions(**options)
        self.checkpoint = checkpoint
        self.network = checkpoint.network.to(self.device, memory_format=torch.channels_last).eval()
        config = self.network.config
        self.bins = config.bins if config.head == "distribution" else None
        self.size = self.options.size or int(checkpoint.notes.get("size", 256))
        self.field = {**FIELD, **checkpoint.mrf}  # as it was trained with the network, where it was
        self._unary = vividness_unary(checkpoint, self.options.vividness)
        if self._unary is not None:
            self._unary = self._unary.to(self.device)

    @classmethod
    def from_pretrained(cls, device: torch.device | str = "auto", **options) -> Colorizer:
        """With the weights that the package carries; its model card is fastcolor/weights/README.md."""
        return cls.load(BUNDLED, device, **options)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "auto", **options) -> Colorizer:
        """With weights of `fastcolor train`. Raises CheckpointError where they cannot be read."""
        return cls(load_checkpoint(path), device, **options)

    def with_options(self, **changes) -> Colorizer:
        """The same network with some options changed."""
        options = vars(replace(self.options, **changes))
        return Colorizer(self.checkpoint, self.device, **options)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that the network sees of a picture. Pictures of one network size can share a batch."""
        if height < 1 or width < 1:
            raise ValueError(f"a picture needs at least one pixel, got {height}×{width}")
        scale = min(self.size / min(height, width), _LONGEST * self.size / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    # --- pictures in, pictures out ------------------------------------------------------------------------------------

    def colorize(self, image: str | Path | np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Colours one picture; its lightness stays (of a colour picture, chroma is put aside first).

        Args:
            image: a path to a file (its first page); a numpy array [H, W], [H, W, 1] or [H, W, 3]; or a tensor [H, W],
                [1, H, W], [3, H, W] or a batch [B, 1, H, W] or [B, 3, H, W]. uint8, uint16, or floating in [0, 1].

        Returns:
            RGB of the same kind, type and device: an array [H, W, 3] (for a path too), a tensor
            [3, H, W] or [B, 3, H, W].

        Raises:
            ImageError: a file that cannot be read. TypeError, ValueError: an array of another shape, type or
            range, or with nan.
        """
        if isinstance(image, (str, Path)):
            from fastcolor.imaging.files import read_picture

            return self.colorize_batch(read_picture(image, max_pages=1).pages)[0]
        if isinstance(image, np.ndarray):
            return self.colorize_batch([image])[0]
        if not isinstance(image, Tensor):
            raise TypeError(f"image must be a path, a numpy array or a tensor, got {type(image).__name__}")
        planes = image[None] if image.ndim == 2 else image
        if planes.ndim not in (3, 4) or planes.shape[-3] not in (1, 3):
            raise ValueError(
                f"image must have shape [H, W], [1 or 3, H, W] or [B, 1 or 3, H, W], got {list(image.shape)}"
            )
        batch = planes if planes.ndim == 4 else planes[None]
        if batch.shape[0] == 0:
            return batch.new_empty(0, 3, *batch.shape[2:])
        L = torch.cat([self._lightness(picture, "image") for picture in batch])
        rgb = torch.cat(self._colorize_lightness(list(L[:, None, None].unbind(0)), image.dtype, False))
        return (rgb if planes.ndim == 4 else rgb[0]).to(image.device)

    def colorize_batch(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Colours pictures of one `network_size` together.

        Args:
            images: arrays [H, W], [H, W, 1] or [H, W, 3], each uint8, uint16 or floating in [0, 1].

        Returns:
            arrays [H, W, 3], each of the type of its input.
        """
        lights, kinds = [], []
        for image in images:
            if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
                raise ValueError(f"image must have shape [H, W], [H, W, 1] or [H, W, 3], got {list(image.shape)}")
            # from_numpy takes neither negative strides nor the byte order of other machines
            pixels = torch.from_numpy(np.ascontiguousarray(image, image.dtype.newbyteorder("=")))
            pixels = pixels[None] if image.ndim == 2 else pixels.permute(2, 0, 1)
            lights.append(self._lightness(pixels, "image")[:, None])
            kinds.append(pixels.dtype)
        colored: list[np.ndarray] = [None] * len(images)  # type: ignore[list-item]
        for kind in dict.fromkeys(kinds):
            places = [i for i, k in enumerate(kinds) if k == kind]
            for i, rgb in zip(places, self._colorize_lightness([lights[i] for i in places], kind, True), strict=True):
                colored[i] = rgb[0].cpu().numpy()
        return colored

    # --- the steps ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _lightness(self, pixels: Tensor, name: str) -> Tensor:
        """[1 or 3, H, W] of any sample type to L [1, H, W] float32 on this device, a strip at a time."""
        _, height, width = pixels.shape
        if height == 0 or width == 0:
            raise ValueError(f"{name} must have at least one pixel, got {height}×{width}")
        if pixels.dtype not in (torch.uint8, torch.uint16) and not pixels.is_floating_point():
            raise TypeError(f"{name} must be uint8, uint16 or floating, got {pixels.dtype}")
        if pixels.is_floating_point():
            low, high = pixels.min().item(), pixels.max().item()
            if math.isnan(low) or math.isnan(high):
                raise ValueError(f"{name} has nan in it")
            if low < 0 or high > 1:
                raise ValueError(f"{name} must lie in [0, 1] where it is floating, got {low:.4g} to {high:.4g}")
        L = torch.empty(1, height, width, device=self.device)
        rows = max(1, _STRIP // width)
        for top in range(0, height, rows):
            strip = pixels[:, top : top + rows].to(self.device).expand(3, -1, -1)
            L[:, top : top + rows] = rgb_to_lab(strip, dtype=torch.float32)[:1]
        return L.clamp_(0, 100)  # white is 100.0000x in the constants of the conversion

    @torch.inference_mode()
    def _colorize_lightness(self, lights: list[Tensor], dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
        """[1, 1, H, W] each, of one network size, to RGB [1, 3, H, W] or [1, H, W, 3]."""
        sizes = {self.network_size(*L.shape[-2:]) for L in lights}
        if len(sizes) != 1:
            raise ValueError(f"pictures of one batch must have one network size, got {sorted(sizes)}")
        (size,) = sizes
        # antialiased bilinear is an area mean when shrinking, and plain bilinear when enlarging
        small = torch.cat([F.interpolate(L, size, mode="bilinear", antialias=True) for L in lights])
        ab, guide = self.predict(small)
        scales = [
            (size[0] / L.shape[-2] / self.network.stride, size[1] / L.shape[-1] / self.network.stride) for L in lights
        ]
        return [
            render(ab[i, None], guide[i, None], L, scale=scale, dtype=dtype, channels_last=channels_last)
            for i, (L, scale) in enumerate(zip(lights, scales, strict=True))
        ]

    @torch.inference_mode()
    def predict(self, L: Tensor) -> tuple[Tensor, Tensor]:
        """Lightness at network size to colours: L [B, 1, h, w] in [0, 100] -> ab and guide, [B, 2 and 1, ⌈h/s⌉, ⌈w/s⌉].

        s is 4 for the distribution head, 2 for regression.
        """
        scores, guide = self.scores(L)
        return self.colors(scores, guide) * self.options.saturation, guide

    @torch.inference_mode()
    def scores(self, L: Tensor, unary: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the network says of L [B, 1, h, w], for `colors`: scores [B, K, ⌈h/4⌉, ⌈w/4⌉] of the distribution head
        (of regression: ab at ⌈h/2⌉, ⌈w/2⌉), and the guide.

        unary: what is added to the scores in place of that of the vividness, [1 or B, K, 1, 1].
        """
        output = self.network(L.contiguous(memory_format=torch.channels_last)).float()
        guide = pool_to(L, self.network.stride)
        unary = self._unary if unary is None else unary
        return output if self.bins is None or unary is None else output + unary, guide

    @torch.inference_mode()
    def colors(self, scores: Tensor, guide: Tensor, **field) -> Tensor:
        """ab [B, 2, h, w] of scores and a guide of the same size, before saturation.

        **field: options of `mean_field` beside those that came with the network: `previous`, ...
        """
        if self.bins is None:
            return scores
        temperature = self.options.temperature
        if not self.options.mrf:
            return annealed_mean(scores, temperature, self.bins, logits=True)
        return mean_field_annealed(scores, guide, temperature=temperature, bins=self.bins, **{**self.field, **field})
