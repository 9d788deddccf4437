"""How near a model's colours come to the truth: PSNR against colourfulness, over vividness, with and without the field.

`python -m benchmarks.quality FOLDER [--weights FILE] [--size N] [--limit N] [--vividness 0,0.5,1] [--sheet FILE]`

Whole pictures, at their own size, 8 bits: each is made grey, coloured and compared with itself. One point is never the
result: a greyer picture always has the better PSNR, so both figures stand side by side, and grey beside them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastcolor
from fastcolor.evaluation.metrics import colorfulness, psnr
from fastcolor.imaging.files import read_picture
from fastcolor.imaging.find import find_images
from fastcolor.model.colorizer import BUNDLED, Colorizer


def planar(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] to [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def grey(truth: Tensor) -> Tensor:
    lab = fastcolor.rgb_to_lab(truth)
    lab[1:] = 0
    return fastcolor.lab_to_rgb(lab, dtype=torch.uint8)


def scores(results: list[Tensor], truths: list[Tensor]) -> tuple[float, float]:
    """Mean PSNR in dB, and mean colourfulness as a share of the truth's."""
    quality = np.mean([psnr(r, t).item() for r, t in zip(results, truths, strict=True)])
    share = np.mean([colorfulness(r).item() for r in results]) / np.mean([colorfulness(t).item() for t in truths])
    return float(quality), float(share)


def roughness(results: list[Tensor], truths: list[Tensor], flat: float = 2.0) -> float:
    """Mean chroma step between neighbours, in Lab units, where the lightness step of the truth is below `flat`."""
    total = count = 0.0
    for result, truth in zip(results, truths, strict=True):
        L, ab = fastcolor.rgb_to_lab(truth)[:1], fastcolor.rgb_to_lab(result)[1:]
        for dim in (1, 2):
            step = ab.diff(dim=dim).norm(dim=0)
            at = L.diff(dim=dim)[0].abs() < flat
            total, count = total + step[at].sum().item(), count + at.sum().item()
    return total / max(1, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, default=BUNDLED)
    parser.add_argument("--size", type=int)
    parser.add_argument("--limit", type=int, help="only the first N pictures")
    parser.add_argument("--vividness", default="0,0.25,0.5,0.75,1")
    parser.add_argument("--sheet", type=Path, help="writes grey, ours and truth of the first twelve side by side")
    options = parser.parse_args()

    truths = [planar(read_picture(f).pages[0]) for f in find_images(options.folder)[: options.limit]]
    colorizer = Colorizer.load(options.weights, size=options.size)
    table = Table("", "field", "PSNR dB", "colourfulness", "roughness")
    table.title = f"{len(truths)} pictures, network at a short side of {colorizer.size}"
    table.add_row("grey (ab = 0)", "", *figures([grey(t) for t in truths], truths))
    for vividness in map(float, options.vividness.split(",")):
        for mrf in (False, True):
            one = colorizer.with_options(vividness=vividness, mrf=mrf)
            results = [one.colorize(t) for t in truths]
            table.add_row(f"vividness {vividness:g}", "yes" if mrf else "no", *figures(results, truths))
    table.add_row("truth", "", *figures(truths, truths))
    Console().print(table)
    if options.sheet:
        write_sheet(options.sheet, colorizer, truths[:12])


def figures(results: list[Tensor], truths: list[Tensor]) -> list[str]:
    quality, share = scores(results, truths)
    return [f"{quality:.2f}", f"{share:.0%}", f"{roughness(results, truths):.2f}"]


def write_sheet(path: Path, colorizer: Colorizer, truths: list[Tensor]) -> None:
    """Rows of grey, ours, truth; two to a line, each 192 pixels high."""
    from fastcolor.imaging.vips import libvips

    def image(pixels: Tensor):
        return libvips().Image.new_from_array(pixels.permute(1, 2, 0).contiguous().numpy(), interpretation="srgb")

    rows = []
    for truth in truths:
        row = image(torch.cat((grey(truth), colorizer.colorize(truth), truth), dim=2))
        rows.append(row.resize(192 / row.height))
    libvips().Image.arrayjoin(rows, across=2, shim=4).write_to_file(str(path))


if __name__ == "__main__":
    main()
