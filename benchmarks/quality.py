"""How near a model's colours come to the truth: the mean field beside what is read from the network alone.

`python -m benchmarks.quality FOLDER [--weights FILE] [--vividness 0,0.25,0.5,0.75,1] [--field radius=2,weight=0.05]
[--json FILE] [--plot FILE] [--sheet FILE]`

Whole pictures, at their own size, 8 bits: each is made grey, coloured and compared with itself. One point is never the
result: a greyer picture always has the better PSNR. So every way of reading colours is a curve over vividness, and they
are compared where their colourfulness is equal.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import fastcolor
from fastcolor.bins import ColorBins
from fastcolor.evaluation.metrics import ab_accuracy, auc, chroma_steps, colorfulness, psnr, splotches
from fastcolor.imaging.files import read_picture
from fastcolor.imaging.find import find_images
from fastcolor.model.colorizer import BUNDLED, Colorizer
from fastcolor.model.network import pool_to
from fastcolor.ops.mean_field import PRESETS, annealed_mean, mean_field, mode, probability_unary
from fastcolor.ops.render import render

from . import timing

SEPARABLE = PRESETS["melas_kyriazi_2017"]["bins"]
LEVELS = (0.5, 0.6, 0.75, 0.9, 1.0)  # of colourfulness, as a share of the truth's, where curves are compared
Method = Callable[[Tensor, Tensor], Tensor]  # (logits [1, K, h, w], guide [1, 1, h, w]) -> ab [1, 2, h, w]


@dataclass
class Picture:
    truth: Tensor  # [3, H, W] uint8
    lab: Tensor  # [3, H, W]
    size: tuple[int, int]  # that the network sees
    logits: Tensor  # [1, K, h, w] bfloat16
    guide: Tensor  # [1, 1, h, w]


def planar(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] to [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


@torch.inference_mode()
def prepared(files: list[Path], colorizer: Colorizer) -> list[Picture]:
    """Everything that no choice of a method changes; the network runs once."""
    pictures = []
    for file in files:
        truth = planar(read_picture(file).pages[0])
        lab = fastcolor.rgb_to_lab(truth)
        size = colorizer.network_size(*truth.shape[1:])
        small = F.interpolate(lab[None, :1], size, mode="bilinear", antialias=True)
        logits = colorizer.network(small.contiguous(memory_format=torch.channels_last))
        pictures.append(Picture(truth, lab, size, logits.bfloat16(), pool_to(small, colorizer.network.stride)))
    return pictures


# --- ways of reading colours from scores ------------------------------------------------------------------------------


def joint_to_separable(logits: Tensor, bins: ColorBins) -> Tensor:
    """log of the distributions of a and of b in a joint one, on the 25 + 25 bins of `SEPARABLE` (one grid)."""
    q = logits.float().softmax(1)
    parts = []
    for axis, (place, centers) in enumerate(SEPARABLE.groups()):
        belongs = (bins.centers[:, axis : axis + 1] == centers[:, 0]).to(q)  # [K, 25]
        parts.append(torch.einsum("bkhw,kl->blhw", q, belongs))
        assert place.stop - place.start == belongs.shape[1]
    return torch.cat(parts, 1).clamp_min(1e-30).log()


def methods(colorizer: Colorizer, variants: list[dict]) -> dict[str, Method]:
    bins, temperature = colorizer.bins, colorizer.options.temperature
    preset = PRESETS["melas_kyriazi_2017"]

    def alone(t: float) -> Method:
        return lambda u, guide: annealed_mean(u.float().softmax(1), t, bins)

    def paper(u: Tensor, guide: Tensor) -> Tensor:
        # its unary is 10 p, not log p
        separable = probability_unary(joint_to_separable(u, bins), 10.0, SEPARABLE)
        return mode(mean_field(separable, guide, **preset), SEPARABLE)

    def field(options: dict, read: Method) -> Method:
        return lambda u, guide: read(mean_field(u.float(), guide, bins=bins, **options), guide)

    def annealed(q: Tensor, guide: Tensor) -> Tensor:
        return annealed_mean(q, temperature, bins)

    result: dict[str, Method] = {
        "mean": alone(1.0),
        f"annealed, T = {temperature:g}": alone(temperature),
        "mode": lambda u, guide: mode(u.float(), bins),
        "Melas-Kyriazi and Han 2017": paper,
        "field (default)": field(colorizer.field, annealed),
        "field, mode": field(colorizer.field, lambda q, guide: mode(q, bins)),
    }
    for variant in variants:
        options = dict(variant)
        t = options.pop("temperature", temperature)
        name = ", ".join(f"{k}={v}" for k, v in variant.items())
        result[f"field {name}"] = field({**colorizer.field, **options}, lambda q, guide, t=t: annealed_mean(q, t, bins))
    return result


# --- figures ----------------------------------------------------------------------------------------------------------


class Scores:
    """Sums over pictures, and the figures made of them."""

    def __init__(self, balance: Tensor, bins: ColorBins):
        self.balance, self.bins = balance, bins  # [K] weights of the labels in the rebalanced AuC
        self.psnr, self.color, self.true_color, self.right, self.rebalanced = [], [], [], [], []
        self.flat, self.edge, self.spots = (torch.zeros(2, dtype=torch.float64) for _ in range(3))

    def add(self, rgb: Tensor, picture: Picture, small: Tensor | None) -> None:
        """rgb [3, H, W] uint8; small: its colours where they were chosen, [2, h, w]."""
        truth, L, ab = picture.truth, picture.lab[:1], picture.lab[1:]
        found = fastcolor.rgb_to_lab(rgb)[1:]
        self.psnr.append(psnr(rgb, truth).clamp_max(100).item())  # the truth itself: inf
        self.color.append(colorfulness(rgb).item())
        self.true_color.append(colorfulness(truth).item())
        weights = self.balance[self.bins.nearest(ab.movedim(0, -1))[0][0, ..., 0]]  # [H, W]
        self.right.append(ab_accuracy(found, ab))
        self.rebalanced.append((ab_accuracy(found, ab, weights) * weights.sum(), weights.sum()))
        flat, edge = chroma_steps(found, L)
        self.flat, self.edge = self.flat + flat, self.edge + edge
        if small is not None:
            self.spots = self.spots + splotches(small, picture.guide[0])

    def figures(self) -> dict[str, float]:
        flat, edge = (float(x[0] / x[1]) for x in (self.flat, self.edge))
        rebalanced = sum(a for a, _ in self.rebalanced) / sum(w for _, w in self.rebalanced)
        return {
            "psnr": float(np.mean(self.psnr)),
            "colorfulness": float(np.mean(self.color) / np.mean(self.true_color)),
            "auc": float(auc(torch.stack(self.right).mean(0))),
            "auc_rebalanced": float(auc(rebalanced)),
            "flat_step": flat,
            "edge_step": edge,
            "bleeding": flat / edge if edge else float("nan"),
            "splotches": float(self.spots[0] / self.spots[1]) if self.spots[1] else float("nan"),
        }


def rgb_of(ab: Tensor, picture: Picture, stride: int) -> Tensor:
    """Full-size RGB [3, H, W] uint8, as the colorizer makes it."""
    L = picture.lab[None, :1].clamp(0, 100)
    scale = tuple(n / full / stride for n, full in zip(picture.size, L.shape[-2:], strict=True))
    return render(ab, picture.guide, L, scale=scale, dtype=torch.uint8)[0]


@torch.inference_mode()
def measure(
    pictures: list[Picture], colorizer: Colorizer, chosen: dict[str, Method], vividness: list[float]
) -> Iterator[dict]:
    """One row for each method and vividness; first those of grey and of the truth."""
    bins, stride, prior = colorizer.bins, colorizer.network.stride, colorizer.checkpoint.prior
    balance = bins.rebalancing_weights(prior, 0.0)
    log_weights = bins.rebalancing_weights(prior).log().float()[None, :, None, None]
    for name in ("grey (ab = 0)", "truth"):
        scores = Scores(balance, bins)
        for p in pictures:
            grey = torch.cat((p.lab[:1], torch.zeros_like(p.lab[1:])))
            scores.add(p.truth if name == "truth" else fastcolor.lab_to_rgb(grey, dtype=torch.uint8), p, None)
        yield {"method": name, "vividness": None, **scores.figures()}
    for alpha in vividness:
        for name, method in chosen.items():
            scores = Scores(balance, bins)
            for p in track(pictures, f"vividness {alpha:g}: {name}", transient=True):
                ab = method(p.logits.float() + alpha * log_weights, p.guide)
                scores.add(rgb_of(ab, p, stride), p, ab[0])
            yield {"method": name, "vividness": alpha, **scores.figures()}


def at_equal_color(rows: list[dict], figure: str, level: float) -> float | None:
    """The figure of a method where its colourfulness is `level`, between its points; None outside their range."""
    points = sorted((r["colorfulness"], r[figure]) for r in rows)
    x, y = [p[0] for p in points], [p[1] for p in points]
    return float(np.interp(level, x, y)) if len(points) > 1 and x[0] <= level <= x[-1] else None


# --- reports ----------------------------------------------------------------------------------------------------------


def show(rows: list[dict], title: str) -> None:
    console = Console(width=160)
    table = Table("", "vividness", "PSNR dB", "colourfulness", "AuC", "rebalanced", "flat step", "edge step",
                  "bleeding", "splotches", title=title)  # fmt: skip
    for r in rows:
        table.add_row(r["method"], "" if r["vividness"] is None else f"{r['vividness']:g}", f"{r['psnr']:.2f}",
                      f"{r['colorfulness']:.0%}", f"{r['auc']:.1%}", f"{r['auc_rebalanced']:.1%}",
                      f"{r['flat_step']:.2f}", f"{r['edge_step']:.2f}", f"{r['bleeding']:.3f}",
                      f"{r['splotches']:.2%}")  # fmt: skip
    console.print(table)
    names = list(dict.fromkeys(r["method"] for r in rows if r["vividness"] is not None))
    for figure, form in (("psnr", "{:.2f}"), ("auc", "{:.1%}"), ("auc_rebalanced", "{:.1%}"), ("bleeding", "{:.3f}"),
                         ("splotches", "{:.2%}")):  # fmt: skip
        table = Table("", *(f"{level:.0%}" for level in LEVELS), title=f"{figure} at equal colourfulness")
        for name in names:
            own = [r for r in rows if r["method"] == name]
            values = [at_equal_color(own, figure, level) for level in LEVELS]
            table.add_row(name, *("–" if v is None else form.format(v) for v in values))
        console.print(table)


def plot(path: Path, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    for axis, (key, label) in zip(axes, (("psnr", "PSNR, dB"), ("bleeding", "bleeding: flat step / edge step"),
                                         ("splotches", "splotches, share of pixels")), strict=True):  # fmt: skip
        for name in dict.fromkeys(r["method"] for r in rows if r["vividness"] is not None):
            points = [(r["colorfulness"], r[key]) for r in rows if r["method"] == name]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        fixed = {r["method"]: r for r in rows if r["vividness"] is None}
        if key == "psnr":
            axis.axhline(fixed["grey (ab = 0)"][key], color="grey", linestyle=":", label="grey (ab = 0)")
        elif key == "bleeding":
            axis.axhline(fixed["truth"][key], color="black", linestyle=":", label="truth")
        axis.set_xlabel("colourfulness, share of the truth's")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


@torch.inference_mode()
def write_sheet(path: Path, pictures: list[Picture], colorizer: Colorizer, chosen: dict[str, Method], alpha: float):
    """A row a picture: grey, every method, truth; 192 pixels high."""
    from fastcolor.imaging.vips import libvips

    log_weights = colorizer.bins.rebalancing_weights(colorizer.checkpoint.prior).log().float()[None, :, None, None]
    rows = []
    for p in pictures:
        grey = fastcolor.lab_to_rgb(torch.cat((p.lab[:1], torch.zeros_like(p.lab[1:]))), dtype=torch.uint8)
        u = p.logits.float() + alpha * log_weights
        shown = [rgb_of(method(u, p.guide), p, colorizer.network.stride) for method in chosen.values()]
        row = torch.cat((grey, *shown, p.truth), dim=2).permute(1, 2, 0).contiguous().numpy()
        image = libvips().Image.new_from_array(row, interpretation="srgb")
        rows.append(image.resize(192 / image.height))
    libvips().Image.arrayjoin(rows, across=1, shim=4).write_to_file(str(path))


def options_of(text: str) -> dict:
    """`radius=3,weight=0.1,similarity=gaussian` as options of the field."""
    result: dict = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        try:
            result[name.strip()] = json.loads(value)
        except ValueError:
            result[name.strip()] = value.strip()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, default=BUNDLED)
    parser.add_argument("--size", type=int, help="short side that the network sees")
    parser.add_argument("--limit", type=int, help="only the first N pictures")
    parser.add_argument("--half", choices=("even", "odd"), help="only every other picture: one half to choose by, one "
                        "to report")  # fmt: skip
    parser.add_argument("--vividness", default="0,0.25,0.5,0.75,1")
    parser.add_argument("--field", action="append", default=[], metavar="NAME=VALUE,...", type=options_of,
                        help="another field, by what differs from the default; temperature too")  # fmt: skip
    parser.add_argument("--only", help="only methods with one of these in their name, by comma")
    parser.add_argument("--json", type=Path, help="writes all figures")
    parser.add_argument("--plot", type=Path, help="draws the curves (Matplotlib)")
    parser.add_argument("--sheet", type=Path, help="writes the first eight pictures side by side")
    options = parser.parse_args()

    files = find_images(options.folder)[: options.limit]
    if options.half:
        files = files[options.half == "odd" :: 2]
    colorizer = Colorizer.load(options.weights, size=options.size)
    if colorizer.bins != ColorBins("joint"):
        parser.error(f"{options.weights}: a distribution over the 313 joint bins is needed")
    pictures = prepared(files, colorizer)
    chosen = methods(colorizer, options.field)
    if options.only:
        chosen = {n: m for n, m in chosen.items() if any(part in n for part in options.only.split(","))}
    values = [float(v) for v in options.vividness.split(",")]
    rows = list(measure(pictures, colorizer, chosen, values))
    title = f"{len(pictures)} pictures, network at a short side of {colorizer.size}"
    show(rows, title)
    if options.json:
        plain = [{k: None if v != v else v for k, v in r.items()} for r in rows]  # JSON has no nan
        record = timing.machine("cpu", None)
        record |= {"weights": options.weights.name, "half": options.half, "pictures": len(pictures)}
        record |= {"size": colorizer.size, "field": colorizer.field, "rows": plain}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot:
        plot(options.plot, rows)
    if options.sheet:
        write_sheet(options.sheet, pictures[:8], colorizer, chosen, colorizer.options.vividness)


if __name__ == "__main__":
    main()
