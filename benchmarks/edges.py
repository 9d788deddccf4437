"""Does chroma stay inside its edges, and lightness what it was? Joint bilateral upsampling beside nearest, bilinear and
bicubic, on a chart of slanted edges and on photographs; and the change of lightness in coloured pictures.

`python -m benchmarks.edges FOLDER [--lightness] [--json FILE] [--picture FILE]`

The chroma of the truth is shrunk to a quarter by area means, as a perfect network would give it, and brought back.
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fastcolor.evaluation.metrics import psnr
from fastcolor.imaging.files import read_picture
from fastcolor.imaging.find import find_images
from fastcolor.model.colorizer import Colorizer
from fastcolor.ops.lab import lab_to_rgb, rgb_to_lab
from fastcolor.ops.render import render
from fastcolor.reference.lab import lab_to_linear
from fastcolor.reference.render import nearest_low, upsample_chroma
from fastcolor.training.loop import save_grid

from . import timing
from .quality import planar

STRIDE = 4
SIGMA_LIGHT = inspect.signature(render).parameters["sigma_light"].default
METHODS = ("nearest", "bilinear", "bicubic", "ours")
CONTRASTS = (5, 10, 20, 40)  # of lightness, across the edge of the chart
NEAR = 6  # pixels: what counts as at the edge
STEEPEST = 0.05  # share of a photograph's pixels that counts as its edges, by the gradient of lightness


def chart(contrast: float, size: int = 128) -> tuple[Tensor, Tensor]:
    """A slanted edge between a red and a blue of different lightness: Lab [1, 3, H, W], distance from it [H, W]."""
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    distance = (x - size / 2) * 0.97 - (
        y - size / 2
    ) * 0.243  # every position of the edge between low-resolution pixels
    left = (distance < 0)[None]
    lab = torch.where(left, torch.tensor([50.0, 40, 20])[:, None, None], torch.tensor([50.0, 10, -40])[:, None, None])
    lab[0] += torch.where(left[0], -contrast / 2, contrast / 2)
    return lab[None], distance


def upsampled(lab: Tensor) -> dict[str, Tensor]:
    """The chroma of Lab [1, 3, H, W], shrunk by area means, as each method brings it back: [1, 2, H, W]."""
    low = F.avg_pool2d(lab, STRIDE, ceil_mode=True, count_include_pad=False)
    L, size = lab[:, :1], lab.shape[2:]
    cover = [n * STRIDE for n in low.shape[2:]]  # of the grid; it ends behind the picture
    results = {}
    for name in METHODS[:-1]:
        corners = {} if name == "nearest" else {"align_corners": False}
        results[name] = F.interpolate(low[:, 1:], cover, mode=name, **corners)[..., : size[0], : size[1]]
    places = [nearest_low(n, 1 / STRIDE, 1, 0.5, lab.device) for n in size]
    results["ours"] = upsample_chroma(low[:, 1:], low[:, :1], L, *places, SIGMA_LIGHT)
    return results


def chart_rows() -> list[dict]:
    rows = []
    for contrast in CONTRASTS:
        lab, distance = chart(contrast)
        near, step = distance.abs() < NEAR, torch.tensor([30.0, 60.0]).norm()
        for name, ab in upsampled(lab).items():
            error = (ab - lab[:, 1:]).norm(dim=1)[0] / step
            rows.append({"picture": f"chart, ΔL {contrast}", "method": name, "bleeding": error[near].mean().item()})
    return rows


def photo_rows(name: str, rgb: Tensor) -> list[dict]:
    """rgb: [3, H, W] uint8."""
    lab = rgb_to_lab(rgb)[None]
    L, rows = lab[0, 0], []
    slope = torch.zeros_like(L)
    slope[1:-1, 1:-1] = torch.hypot(L[2:, 1:-1] - L[:-2, 1:-1], L[1:-1, 2:] - L[1:-1, :-2])
    edges = slope >= slope.flatten().kthvalue(int(slope.numel() * (1 - STEEPEST))).values
    for method, ab in upsampled(lab).items():
        error = (ab - lab[:, 1:]).norm(dim=1)[0]
        color = lab_to_rgb(torch.cat((lab[:, :1], ab), 1), dtype=torch.uint8, gamut="preserve_lightness")
        rows.append({
            "picture": name, "method": method, "edge_error": error[edges].mean().item(), "error": error.mean().item(),
            "psnr": psnr(color, rgb[None]).item(),
        })  # fmt: skip
    return rows


@torch.inference_mode()
def lightness(files: list[Path]) -> list[dict]:
    """The largest and mean |ΔL*| between grey pictures and their coloured selves in 8 bits, of colours that were inside
    sRGB and of those that were brought in.
    """
    colorizer = Colorizer.from_pretrained()
    worst, total, count = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for file in track(files, "lightness"):
        rgb = planar(read_picture(file, max_pages=1).pages[0])
        grey = lab_to_rgb(torch.cat((rgb_to_lab(rgb)[:1], torch.zeros(2, *rgb.shape[1:]))), dtype=torch.uint8)
        L = rgb_to_lab(grey, dtype=torch.float64)[:1]
        color = colorizer.colorize(grey)
        change = (rgb_to_lab(color, dtype=torch.float64)[:1] - L).abs()[0]
        size = colorizer.network_size(*rgb.shape[1:])
        small = F.interpolate(L.float()[None], size, mode="bilinear", antialias=True)
        ab, guide = colorizer.predict(small)
        stride = colorizer.network.stride
        places = [nearest_low(n, s / n / stride, 1, 0.5, L.device) for n, s in zip(L.shape[1:], size, strict=True)]
        wished = upsample_chroma(ab, guide, L.float()[None], *places, SIGMA_LIGHT)[0]
        linear = torch.stack(lab_to_linear(L[0].float(), *wished))
        inside = ((linear >= -1e-6) & (linear <= 1 + 1e-6)).all(0)
        for kind, mask in ((True, inside), (False, ~inside)):
            if mask.any():
                worst[kind] = max(worst[kind], change[mask].max().item())
                total[kind] += change[mask].sum().item()
                count[kind] += int(mask.sum())
    return [
        {"colours": "in gamut" if kind else "brought into gamut", "pixels": count[kind], "largest": worst[kind],
         "mean": total[kind] / max(1, count[kind])}
        for kind in (True, False)
    ]  # fmt: skip


def picture(pictures: list[Tensor], crop: int = 64, zoom: int = 3) -> Tensor:
    """Rows of crops [3, H, W] uint8: the truth, then each method. Each of `pictures` is Lab [1, 3, H, W]."""
    lines = []
    for lab in pictures:
        top, left = (max(0, (n - crop) // 2) for n in lab.shape[2:])
        cells = []
        for ab in (lab[:, 1:], *upsampled(lab).values()):
            full = torch.cat((lab[:, :1], ab), 1)[..., top : top + crop, left : left + crop]
            cell = lab_to_rgb(full, dtype=torch.uint8, gamut="preserve_lightness")[0]
            cell = cell.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
            cells.append(F.pad(cell, (2, 2, 2, 2), value=255))
        lines.append(torch.cat(cells, 2))
    return torch.cat(lines, 1)


def show(rows: list[dict], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key)
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edges", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="photographs; three of them are used, all for --lightness")
    parser.add_argument("--photos", default="3,12,27", help="which of them, in order of name")
    parser.add_argument("--lightness", action="store_true", help="colour all of them, and compare their lightness")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="truth, nearest, bilinear, bicubic, ours, from left to right")
    options = parser.parse_args()
    files = sorted(find_images(options.folder))
    chosen = [files[int(i)] for i in options.photos.split(",")]
    photos = {f.name: planar(read_picture(f, max_pages=1).pages[0]) for f in chosen}
    charts, pairs = chart_rows(), [row for name, rgb in photos.items() for row in photo_rows(name, rgb)]
    show(charts, f"chroma error within {NEAR} pixels of the edge, as a share of the step")
    show(pairs, f"ab error at the steepest {STEEPEST:.0%} and everywhere, PSNR in dB")
    result = {**timing.machine("cpu"), "charts": charts, "photos": pairs}
    if options.lightness:
        result["lightness"] = lightness(files)
        show(result["lightness"], f"|ΔL*| after rounding to 8 bits, {len(files)} pictures")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if options.picture:
        lines = [chart(contrast)[0] for contrast in (5, 20)]
        save_grid(options.picture, picture(lines + [rgb_to_lab(rgb)[None] for rgb in photos.values()]))


if __name__ == "__main__":
    main()
