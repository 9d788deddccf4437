"""A picture from file to file: decode, lightness, network, field, rendering, encode; and the share of each stage.

`python -m benchmarks.image [--size 1280x720] [--device cpu|cuda] [--json FILE] [--quick]`

Beside it "the notebook pipeline", as demonstrations do it: scikit-image's Lab in float64, the network on the CPU or
GPU, softmax and mean colour, bilinear chroma, Lab → RGB. Once with our network, and once with one of the shape of Zhang
et al. 2016 on a square of 256 pixels. All read and write the same JPEG by libvips: what differs lies between.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fastcolor
from fastcolor.imaging.files import Picture, read_picture, write_picture
from fastcolor.imaging.vips import libvips
from fastcolor.model.colorizer import BUNDLED, Colorizer
from fastcolor.model.network import pool_to
from fastcolor.ops.mean_field import mean_field_annealed

from . import timing, work
from .eccv16 import Eccv16, flops
from .ops.lab import photograph
from .timing import Candidate

SIZES = [(256, 256), (1280, 720), (3840, 2160)]
SQUARE = 256  # what the notebooks shrink a picture to
# Levels between our picture and the same steps on the reference backend, for all samples but 1 in 1,000: the field's
# float32 rounds otherwise, and half a level more or less rounds to the next
LEVEL_BOUND, EXCEPTIONS = 1.0, 1e-3
CHECKED = 1 << 20  # pixels up to which it is compared: the reference takes a second for each million
STAGES = ("decode", "lightness", "shrink", "network", "field", "render", "encode")


def staged(codec: Codec, colorizer: Colorizer) -> dict[str, float]:
    """What `Colorizer` does for one picture, step by step: seconds of each of STAGES."""
    took, device = {}, colorizer.device

    def stage(name: str, function: Callable):
        start = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took[name] = time.perf_counter() - start
        return result

    picture = stage("decode", codec.read)
    pixels = torch.from_numpy(picture.pages[0]).permute(2, 0, 1)
    L = stage("lightness", lambda: lightness(pixels, device))
    size = colorizer.network_size(*L.shape[-2:])
    small = stage("shrink", lambda: F.interpolate(L, size, mode="bilinear", antialias=True))
    output = stage("network", lambda: colorizer.network(small.contiguous(memory_format=torch.channels_last)).float())
    guide = pool_to(small, colorizer.network.stride)
    ab = stage("field", lambda: colors(output, guide, colorizer))
    rgb = stage("render", lambda: rendered(ab, guide, L, size, colorizer))
    stage("encode", lambda: codec.write(picture, rgb))
    return took


def lightness(pixels: Tensor, device: torch.device) -> Tensor:
    return fastcolor.rgb_to_lab(pixels.to(device), dtype=torch.float32)[None, :1].clamp_(0, 100)


def colors(logits: Tensor, guide: Tensor, colorizer: Colorizer) -> Tensor:
    options = colorizer.options
    weights = colorizer.bins.rebalancing_weights(colorizer.checkpoint.prior).log().float().to(logits.device)
    unary = logits + options.vividness * weights[None, :, None, None]
    return mean_field_annealed(unary, guide, temperature=options.temperature, bins=colorizer.bins, **colorizer.field)


def rendered(ab: Tensor, guide: Tensor, L: Tensor, size: tuple[int, int], colorizer: Colorizer) -> np.ndarray:
    scale = tuple(s / n / colorizer.network.stride for s, n in zip(size, L.shape[-2:], strict=True))
    return fastcolor.render(ab, guide, L, scale=scale, dtype=torch.uint8, channels_last=True)[0].cpu().numpy()


@dataclass(frozen=True)
class Codec:
    """Where a picture comes from and goes to: a JPEG file, or memory where libvips is missing."""

    name: str
    read: Callable[[], Picture]
    write: Callable[[Picture, np.ndarray], None]
    result: Callable[[], np.ndarray]  # what was written last, [H, W, 3]


def jpeg(folder: Path, rgb: np.ndarray) -> Codec:
    source, target = folder / "source.jpg", folder / "coloured.jpg"
    write_picture(source, Picture(source, [rgb], [None]), [rgb])
    return Codec(
        "JPEG to JPEG",
        lambda: read_picture(source),
        lambda picture, page: write_picture(target, picture, [page]),
        lambda: read_picture(target).pages[0],
    )


def memory(rgb: np.ndarray) -> Codec:
    kept = [rgb]  # one picture at a time
    picture = Picture(Path("memory"), [rgb], [None])
    return Codec("array to array", lambda: picture, lambda _, page: kept.__setitem__(0, page), lambda: kept[0])


def ours(codec: Codec, colorizer: Colorizer) -> Callable[[int], object]:
    def run(i: int) -> None:
        picture = codec.read()
        codec.write(picture, colorizer.colorize_batch(picture.pages)[0])

    return run


def notebook(codec: Codec, predict: Callable[[Tensor], Tensor], size: tuple[int, int]):
    """`predict`: L [1, 1, h, w] -> ab at any size."""
    from skimage.color import lab2rgb, rgb2lab

    def run(i: int) -> None:
        picture = codec.read()
        L = rgb2lab(picture.pages[0])[..., :1]
        light = torch.from_numpy(L[..., 0])[None, None].float()
        ab = predict(F.interpolate(light, size, mode="bilinear", antialias=True))
        full = F.interpolate(ab.cpu(), L.shape[:2], mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        rgb = lab2rgb(np.concatenate((L, full.double().numpy()), 2))
        codec.write(picture, (rgb * 255 + 0.5).astype(np.uint8))

    return run


def benchmark(width: int, height: int, colorizer: Colorizer, other: Eccv16, folder: Path, options) -> list[dict]:
    rgb = photograph(width, height).movedim(0, -1).contiguous().numpy()
    try:
        libvips()
        codec = jpeg(folder, rgb)
    except ImportError as error:
        print(f"files are left out: {error}")
        codec = memory(rgb)
    size, device = colorizer.network_size(height, width), colorizer.device

    def with_our_network(L: Tensor) -> Tensor:
        logits = colorizer.network(L.to(device).contiguous(memory_format=torch.channels_last)).float()
        q = (logits / colorizer.options.temperature).softmax(1)
        return torch.einsum("bkhw,kc->bchw", q, colorizer.bins.centers.to(q))

    def with_the_other(L: Tensor) -> Tensor:
        return other(L.to(device))

    builders = {
        "fastcolor": lambda: ours(codec, colorizer),
        "notebook pipeline, our network": lambda: notebook(codec, with_our_network, size),
        "notebook pipeline, eccv16-shaped": lambda: notebook(codec, with_the_other, (SQUARE, SQUARE)),
    }
    candidates, peaks = [], {}
    for name, build in builders.items():
        candidate = Candidate(name, None, ours=name == "fastcolor")
        candidates.append(candidate)
        try:
            run = build()
        except ImportError as error:
            candidate.why_not = str(error)
            continue
        if candidate.ours and width * height <= CHECKED:
            candidate.error = check(rgb, colorizer)
            if candidate.error > LEVEL_BOUND:
                candidate.why_not = f"off by {candidate.error:.2g} levels, more than {LEVEL_BOUND}"
                continue
        candidate.run = synchronized(run, device)
        peaks[name] = timing.peak_memory(lambda run=run: run(0))
    # the wall clock on any device: files are read and written on the CPU
    times = timing.measure([c for c in candidates if c.run], "cpu", rounds=3 if options.quick else 9)
    title = f"image, {width}×{height}, {codec.name}; error in 8-bit levels against the reference backend"
    context = {"op": "image", "size": f"{width}x{height}", "title": title, "oracle": "our reference backend"}
    context["error_unit"] = "levels, but for 1 sample in 1,000"
    arithmetic = operations(width, height, size, colorizer)
    rows = []
    for c in candidates:
        of_our_network = None if "eccv16" in c.name else arithmetic
        row = timing.row(c, times.get(c.name), 6 * width * height, of_our_network, **context)
        if c.name in times:
            row["MPix_per_s"] = round(width * height / times[c.name].median / 1e6, 3)
            row["peak_MB"] = None if peaks[c.name] is None else round(peaks[c.name] / 1e6, 1)
            row["note"] = f"{row['MPix_per_s']:.2f} megapixels/s, {row['peak_MB']} MB"
        rows.append(row)
    rows = timing.compare(rows)
    timing.show(rows, title)
    return rows + stages(codec, width, height, colorizer, options)


def synchronized(run: Callable[[int], object], device: torch.device) -> Callable[[int], object]:
    def waiting(i: int) -> None:
        run(i)
        torch.cuda.synchronize()

    return waiting if device.type == "cuda" else run


def operations(width: int, height: int, size: tuple[int, int], colorizer: Colorizer) -> int:
    """Of the network and of the definitions of lightness, field and rendering. Decoding and encoding are left out."""
    low = torch.zeros(1, 1, *size, device=colorizer.device)
    field, pixels = colorizer.field, -(-size[0] // 4) * -(-size[1] // 4)
    neighbors = (2 * field["radius"] + 1) ** 2 - 1
    parts = (
        flops(colorizer.network, low),
        work.rgb_to_lab(width * height),
        work.mean_field(pixels, colorizer.bins.count, 3, neighbors, field["sweeps"]),
        work.render(width * height),
    )
    return sum(parts)


def check(rgb: np.ndarray, colorizer: Colorizer) -> float:
    """Levels between our picture and that of the reference backend."""
    fast = colorizer.colorize_batch([rgb])[0].astype(int)
    with fastcolor.use_backend("reference"):
        exact = colorizer.colorize_batch([rgb])[0].astype(int)
    return float(np.quantile(np.abs(fast - exact), 1 - EXCEPTIONS))


def stages(codec: Codec, width: int, height: int, colorizer: Colorizer, options) -> list[dict]:
    """One row for each stage. That they give the picture that the colorizer gives is checked first."""
    title = f"image, {width}×{height}, stages"
    context = {"op": "image", "size": f"{width}x{height}", "title": title}
    staged(codec, colorizer)
    mine = codec.result().astype(int)
    ours(codec, colorizer)(0)
    error = float(np.abs(mine - codec.result()).max())
    if error > LEVEL_BOUND:
        why = f"off by {error:.2g} levels from the colorizer, more than {LEVEL_BOUND}"
        return [timing.row(Candidate(n, None, why, True), None, 0, **context) for n in STAGES]
    rounds = [staged(codec, colorizer) for _ in range(3 if options.quick else 9)]
    times = {name: timing.summary([took[name] for took in rounds]) for name in STAGES}
    total = statistics.median(sum(took.values()) for took in rounds)
    rows = []
    for name in STAGES:
        row = timing.row(Candidate(name, None, ours=True, error=error), times[name], 0, **context)
        row["share"] = round(times[name].median / total, 4)
        row["note"] = f"{row['share']:.0%}"
        rows.append(row)
    timing.show(rows, title)
    return rows


def main(arguments: list[str] | None = None) -> int:
    sizes = ", ".join(f"{w}x{h}" for w, h in SIZES)
    options = timing.parse(timing.parser("image", __doc__, sizes, "few samples, the smallest size"), arguments)
    record, rows = timing.machine(options.device, options.commit), []
    if not BUNDLED.exists():
        print(f"{BUNDLED} is not there: nothing to colour with")
        return 1
    colorizer = Colorizer.from_pretrained(options.device)
    torch.manual_seed(0)
    other = Eccv16().eval().to(options.device, memory_format=torch.channels_last)
    sizes = [options.size] if options.size else SIZES[: 1 if options.quick else None]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for width, height in sizes:
            rows += benchmark(width, height, colorizer, other, Path(folder), options)
    return timing.finish("image", options, record, rows)


if __name__ == "__main__":
    sys.exit(main())
