"""Photographs side by side: made grey, coloured, as they were.

`python -m benchmarks.sheet PHOTO... --out FILE [--weights FILE] [--vividness 0.5] [--columns 2] [--height 180]`

Each photo is shrunk to one height first, as the files that the bundled model has seen are small; it is coloured then.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import fastcolor
from fastcolor.imaging.vips import libvips
from fastcolor.model.colorizer import BUNDLED, Colorizer

_GAP = 6  # pixels between photos
_WIDEST = 1.5  # width over height that is shown; the middle of wider ones


def prepared(path: Path, height: int) -> np.ndarray:
    """[height, ≤ 1.5 height, 3] uint8 sRGB."""
    image = libvips().Image.thumbnail(str(path), 100 * height, height=height, size="down").colourspace("srgb")
    image = image.flatten(background=255) if image.hasalpha() else image
    width = min(image.width, round(_WIDEST * image.height))
    return image.crop((image.width - width) // 2, 0, width, image.height).numpy()


def grey(pixels: np.ndarray) -> np.ndarray:
    """The same lightness without colour."""
    lab = fastcolor.rgb_to_lab(torch.from_numpy(pixels.copy()), channels_last=True)
    lab[..., 1:] = 0
    return fastcolor.lab_to_rgb(lab, channels_last=True, dtype=torch.uint8).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sheet", description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=BUNDLED)
    parser.add_argument("--vividness", type=float, default=0.5)
    parser.add_argument("--columns", type=int, default=2)
    parser.add_argument("--height", type=int, default=180)
    options = parser.parse_args()

    colorizer = Colorizer.load(options.weights, vividness=options.vividness)
    cells = []
    for path in options.photos:
        truth = prepared(path, options.height)
        row = np.concatenate((grey(truth), colorizer.colorize(grey(truth)), truth), axis=1)
        cells.append(libvips().Image.new_from_array(row, interpretation="srgb"))
    sheet = libvips().Image.arrayjoin(cells, across=options.columns, shim=_GAP, background=255, halign="centre")
    sheet.write_to_file(str(options.out), **({"Q": 88} if options.out.suffix in (".jpg", ".jpeg") else {}))


if __name__ == "__main__":
    main()
