"""How calm a film's colours are, and what that costs: every frame by itself beside the ways through time, with
keyframes, with and without motion.

`python -m benchmarks.flicker [CLIP] [--photo FILE] [--weights FILE] [--vividness 0..1] [--frames N] [--films F,...]
[--only METHOD;...] [--json FILE] [--slices FOLDER] [--row Y]`

Three films, each made grey, coloured and compared with itself: a clip, a window that pans over a photo, and a photo
that stands still under noise. A figure of calm means nothing by itself, since grey is the calmest: all are given
beside the truth's own, with PSNR and colourfulness. `--slices` draws one row of pixels through time, for each method.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import fastcolor
from fastcolor.evaluation.films import ALONE, film_frames
from fastcolor.evaluation.video import FilmFigures, true_frames
from fastcolor.model.colorizer import BUNDLED, Colorizer
from fastcolor.video import motion
from fastcolor.video.colorizer import VideoColorizer, VideoOptions
from fastcolor.video.reader import Reader

METHODS = {
    "alone": ALONE,
    "frame before in the field": VideoOptions(temporal=0, keyframes=1, bond=10),
    "scores kept": VideoOptions(keyframes=1),
    "scores kept, no motion": VideoOptions(keyframes=1, motion=False),
    "keyframes, nothing kept": VideoOptions(temporal=0),
    "keyframes (default)": VideoOptions(),
    "keyframes, no motion": VideoOptions(motion=False),
    "keyframes, frame before too": VideoOptions(bond=1),
}
FIGURES = ("flicker", "cdc", "step", "largest_step")
TINY = 1e-5  # of the truth's own; where it has none, figures are given as they are, in brackets


# --- films ------------------------------------------------------------------------------------------------------------


def clip(path: Path, frames: int) -> list[Tensor]:
    """[3, H, W] in [0, 1] each."""
    with Reader(str(path), rgb=True) as reader:
        return list(islice(film_frames(reader), frames))


def generated(height: int = 288, width: int = 512) -> Tensor:
    """A picture with edges, texture and colours, where no photo is given: [3, H, W] in [0, 1]."""
    rng = torch.Generator().manual_seed(4)
    picture = torch.zeros(3, height, width)
    for side in (4, 16, 64):
        blobs = torch.rand(1, 3, height // side + 2, width // side + 2, generator=rng)
        picture += F.interpolate(blobs, (height, width), mode="bicubic")[0].clamp(0, 1) * side
    picture[:, : height // 2] += torch.tensor([-10.0, 5.0, 30.0])[:, None, None]  # a sky
    return (picture / 84).clamp(0, 1)


def photo(path: Path | None) -> Tensor:
    """[3, H, W] in [0, 1], its short side 288."""
    if path is None:
        return generated()
    from fastcolor.imaging.files import read_picture

    pixels = torch.from_numpy(np.ascontiguousarray(read_picture(path).pages[0])).permute(2, 0, 1)[None].float()
    scale = 288 / min(pixels.shape[2:])
    return F.interpolate(pixels, scale_factor=scale, mode="bicubic", antialias=True)[0].div(255).clamp(0, 1)


def pan(picture: Tensor, frames: int, speed: float = 1.7) -> list[Tensor]:
    """A window of two thirds that goes to and fro over the picture, `speed` pixels a frame."""
    height, width = (side * 2 // 3 for side in picture.shape[1:])
    room = picture.shape[2] - width - 2
    found = []
    for t in range(frames):
        x = abs((speed * t + room) % (2 * room) - room)
        places = (
            motion.positions(height, width, 1.0, torch.device("cpu")) + torch.tensor([x, height / 4])[:, None, None]
        )
        found.append(motion.read_at(picture[None], places)[0])
    return found


def noisy(picture: Tensor, frames: int, sigma: float = 3.0) -> list[Tensor]:
    """The picture standing still under noise of its lightness, `sigma` in L: the true colours do not change."""
    rng = torch.Generator().manual_seed(1)
    lab = fastcolor.rgb_to_lab(picture[None])
    found = []
    for _ in range(frames):
        L = (lab[:, :1] + sigma * torch.randn(lab[:, :1].shape, generator=rng)).clamp(0, 100)
        found.append(fastcolor.lab_to_rgb(torch.cat((L, lab[:, 1:]), 1), gamut="preserve_lightness")[0].clamp(0, 1))
    return found


# --- figures ----------------------------------------------------------------------------------------------------------


def moving(L: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Motion [1, 2, h, w] from each frame [T, 1, h, w] to the one before, and where it can be trusted [1, 1, h, w].

    OpenCV's, so that no method is judged by its own eyes.
    """
    import cv2

    seek = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    planes = [(x[0] * 2.55).round().byte().numpy() for x in L]
    flows = [torch.from_numpy(seek.calc(b, a, None)).permute(2, 0, 1)[None] for a, b in pairwise(planes)]
    seen = [(motion.warp(a[None], f) - b[None]).abs() < 2 for a, b, f in zip(L[:-1], L[1:], flows, strict=True)]
    return flows, seen


def steps(ab: Tensor, flows: list[Tensor], seen: list[Tensor]) -> list[float]:
    """Mean |ab − that of the frame before, along the motion| of each frame after the first, [T, 2, h, w]."""
    result = []
    for a, b, f, s in zip(ab[:-1], ab[1:], flows, seen, strict=True):
        change = (motion.warp(a[None], f) - b[None]).norm(dim=1, keepdim=True)
        result.append(float(change[s].mean()))
    return result


def colored(film: list[Tensor], colorizer: Colorizer, options: VideoOptions) -> tuple[list[Tensor], dict]:
    video = VideoColorizer(colorizer, options=options)
    started = time.perf_counter()
    frames = list(video.colorize(film))
    took = time.perf_counter() - started
    stats = video.stats
    return frames, {
        "options": asdict(options),
        "network_runs_per_frame": stats.network / stats.frames,
        "cuts": stats.cuts,
        "ms_per_frame": took / stats.frames * 1e3,  # RGB in, RGB out: not what a film costs
        "ms_by_stage": {name: s / stats.frames * 1e3 for name, s in stats.seconds.items()},
        "keyframes": video.stats.keyframes,
    }


def measured(film: list[Tensor], methods: dict[str, VideoOptions], colorizer: Colorizer) -> tuple[dict, dict]:
    """Figures and frames of each method, the truth's own first. Floating frames: rounding to 8 bits flickers too."""
    truth = list(true_frames(film))
    half = F.avg_pool2d(torch.stack([frame.lab for frame in truth]), 2)
    flows, seen = moving(half[:, :1])
    frames, figures = {"truth": film}, {}
    for name, options in {"truth": None, **methods}.items():
        extra = {}
        if options is not None:
            frames[name], extra = colored(film, colorizer, options)
        sums = FilmFigures()
        for rgb, true in zip(frames[name], truth, strict=True):
            sums.add(rgb, true)
        found = sums.result()
        ab = torch.cat([fastcolor.rgb_to_lab(frame[None])[:, 1:] for frame in frames[name]])
        change = steps(F.avg_pool2d(ab, 2), flows, seen)
        at_keys = [c for t, c in enumerate(change, 1) if t in extra.get("keyframes", ())]
        elsewhere = [c for t, c in enumerate(change, 1) if t not in extra.get("keyframes", ())]
        figures[name] = {
            "flicker": found["flicker"],
            "cdc": found["cdc"],
            "step": float(np.mean(change)),
            "largest_step": float(np.max(change)),
            "step_at_keyframes": float(np.mean(at_keys)) if at_keys and elsewhere else None,
            "step_elsewhere": float(np.mean(elsewhere)) if at_keys and elsewhere else None,
            "psnr": None if options is None else found["psnr"],
            "colorfulness": found["colorfulness"],
            **extra,
        }
    return figures, frames


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_slices(path: Path, frames: dict[str, list[Tensor]], row: int | None, title: str) -> None:
    """One row of pixels through time, downwards: as it is, its chroma at one lightness, the change of its chroma."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height, width = next(iter(frames.values()))[0].shape[1:]
    row = height // 2 if row is None else min(row, height - 1)
    figure, axes = plt.subplots(len(frames), 3, figsize=(11, 1.2 * len(frames)), squeeze=False)
    for (name, of_method), of_row in zip(frames.items(), axes, strict=True):
        pixels = torch.stack([frame[:, row] for frame in of_method], 1)  # [3, T, W]
        lab = fastcolor.rgb_to_lab(pixels[None])
        flat = torch.cat((torch.full_like(lab[:, :1], 65), lab[:, 1:] * 1.5), 1)
        change = (lab[0, 1:, 1:] - lab[0, 1:, :-1]).norm(dim=0).expand(3, -1, -1) / 2
        shown = pixels, fastcolor.lab_to_rgb(flat)[0], change
        for axis, x in zip(of_row, shown, strict=True):
            axis.imshow(x.clamp(0, 1).permute(1, 2, 0).numpy(), aspect="auto", interpolation="antialiased")
            axis.set_xticks([])
            axis.set_yticks([])
        of_row[0].set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=8)
    titles = f"{title}: row {row} through time, downwards", "its chroma × 1.5 at L = 65", "change of ab: white is 2"
    for axis, text in zip(axes[0], titles, strict=True):
        axis.set_title(text, fontsize=8)
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_frames(path: Path, frames: dict[str, list[Tensor]], at: list[int]) -> None:
    """Some frames of each method: a row for each method."""
    import pyvips

    rows = [torch.cat([F.avg_pool2d(255 * of[t], 2) for t in at if t < len(of)], 2) for of in frames.values()]
    sheet = torch.cat(rows, 1).round().byte().permute(1, 2, 0).contiguous().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    pyvips.Image.new_from_array(sheet).write_to_file(str(path))


def show(console: Console, film: str, figures: dict) -> None:
    table = Table(title=film, title_justify="left")
    columns = "flicker", "CDC", "step", "largest step", "at keyframes", "colour", "PSNR", "network", "ms"
    for column in ("÷ truth:", *columns):
        table.add_column(column, justify="left" if column == "÷ truth:" else "right")
    truth = figures["truth"]
    for name, row in figures.items():
        if name == "truth":
            continue
        ratio = [f"{row[x] / truth[x]:.2f}" if truth[x] > TINY else f"({row[x]:.3f})" for x in FIGURES]
        pop = f"{row['step_at_keyframes'] / row['step_elsewhere']:.2f}" if row["step_at_keyframes"] else ""
        table.add_row(
            name, *ratio, pop,
            f"{row['colorfulness'] / truth['colorfulness']:.2f}", f"{row['psnr']:.2f}",
            f"{row['network_runs_per_frame']:.3f}", f"{row['ms_per_frame']:.1f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"truth: flicker {truth['flicker']:.3f}, CDC {truth['cdc']:.2e}, step {truth['step']:.3f}, "
        f"largest {truth['largest_step']:.2f}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("clip", nargs="?", type=Path, help="a colour film")
    parser.add_argument("--photo", type=Path, help="for the pan and the still scene; else one is generated")
    parser.add_argument("--weights", type=Path, default=BUNDLED)
    parser.add_argument("--vividness", type=float, default=0.5)
    parser.add_argument("--frames", type=int, default=96)
    parser.add_argument("--films", default="clip,pan,still", help="which of them, with commas")
    parser.add_argument("--only", help=f"methods with semicolons, of: {'; '.join(METHODS)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--slices", type=Path, help="a folder")
    parser.add_argument("--row", type=int, help="of the slices; the middle if left out")
    arguments = parser.parse_args()
    methods = METHODS
    if arguments.only:
        names = [name.strip() for name in arguments.only.split(";")]
        if unknown := [name for name in names if name not in METHODS]:
            parser.error(f"no such method: {unknown[0]!r}; there are {'; '.join(METHODS)}")
        methods = {name: METHODS[name] for name in names}
    if arguments.frames < 5:
        parser.error(f"--frames must be at least 5, got {arguments.frames}")
    colorizer = Colorizer.load(arguments.weights, "cpu", vividness=arguments.vividness)
    films = {
        "clip": lambda: clip(arguments.clip, arguments.frames) if arguments.clip else None,
        "pan": lambda: pan(photo(arguments.photo), arguments.frames),
        "still": lambda: noisy(photo(arguments.photo), arguments.frames),
    }
    console, results = Console(width=120), {}
    for name in arguments.films.split(","):
        if name not in films:
            parser.error(f"no such film: {name!r}; there are {', '.join(films)}")
        film = films[name]()
        if film is None:
            continue
        figures, frames = measured(film, methods, colorizer)
        results[name] = {"frames": len(film), "size": list(film[0].shape[1:]), "methods": figures}
        show(console, f"{name}: {len(film)} frames, {film[0].shape[2]}×{film[0].shape[1]}", figures)
        if arguments.slices:
            draw_slices(arguments.slices / f"{name}.png", frames, arguments.row, name)
            draw_frames(arguments.slices / f"{name}_frames.png", frames, [0, 12, 24, 36, 48, 60])
    if arguments.json:
        about = {
            "fastcolor": fastcolor.__version__, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(), "network_size": colorizer.size,
            "vividness": arguments.vividness,
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"about": about, "films": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
