"""Models beside baselines on a folder of photos: every photo is made grey, coloured and compared with itself."""

from __future__ import annotations

import hashlib
import heapq
import math
import platform
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcolor.bins import ColorBins
from fastcolor.evaluation.metrics import (
    CONFIDENCE_BINS,
    ab_accuracy,
    auc,
    balance_weights,
    bin_cross_entropy,
    calibration_error,
    colorfulness,
    delta_e_2000,
    mean_color,
    psnr,
    reliability,
    ssim,
    target_entropy,
)
from fastcolor.evaluation.perceptual import FEW, Fid, Perceptual
from fastcolor.imaging.vips import ImageError, libvips, reason
from fastcolor.model.checkpoint import CheckpointError, load_checkpoint
from fastcolor.model.colorizer import BUNDLED, ColorizeOptions, Colorizer, vividness_unary
from fastcolor.model.network import pool_to
from fastcolor.ops.lab import lab_to_rgb, rgb_to_lab
from fastcolor.ops.mean_field import annealed_mean, mean_field
from fastcolor.ops.render import render
from fastcolor.training.data import Problems, find_photos
from fastcolor.training.sources import fingerprint, read_pixels, shrunk

GREY, MEAN, ORACLE = "grey (ab = 0)", "training mean colour", "nearest bin (oracle)"
_JOINT = ColorBins("joint")
_SMALLEST = 11  # pixels a side: SSIM's window
_PACKAGES = ("fastcolor", "torch", "numpy", "pyvips", "pyvips-binary", "av")
_BEST = 6  # pictures shown of the best, and of the worst
_CHANCE = 12  # pictures shown that chance chose
_THUMBNAIL = 320  # longest side of pictures in the report, pixels


class EvaluationError(ValueError):
    """Nothing to evaluate, or not in this way. The message says what."""


# --- what is compared -------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """One set of weights, and the degrees of vividness it is read at (of a regression head there is one)."""

    name: str
    path: Path
    colorizer: Colorizer
    vividness: list[float]

    @property
    def shown(self) -> float:
        """The vividness of pictures and curves: of those that are read the one nearest to the default."""
        return min(self.vividness, key=lambda v: abs(v - ColorizeOptions.vividness))


def load_models(
    weights: Sequence[Path],
    vividness: Sequence[float],
    device: str = "auto",
    size: int | None = None,
    mrf: bool | None = True,
) -> list[Model]:
    """Weights of `fastcolor train`, or the bundled ones where the list is empty, ready to be compared.

    Args:
        mrf: whether the mean field makes colours agree; None compares with and without.

    Raises:
        CheckpointError, DeviceError: as `Colorizer.load`. EvaluationError: vividness where a checkpoint has no prior.
    """
    models = []
    paths = list(weights) or [BUNDLED]
    for path, name in zip(paths, short_names(paths), strict=True):
        colorizer = Colorizer.load(path, device, size=size, mrf=mrf is not False, vividness=0)
        levels = list(dict.fromkeys(vividness))
        if colorizer.bins is None:
            levels = [0.0]
        elif colorizer.checkpoint.prior is None and any(levels):
            raise EvaluationError(
                f"{path}: has no colour statistics of its training set, which vividness needs; --vividness 0 does not"
            )
        models.append(Model(name, path, colorizer, levels))
        if mrf is None and colorizer.bins is not None:
            models.append(Model(f"{name}, no field", path, colorizer.with_options(mrf=False), levels))
    return models


def short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart; without the suffix where that is enough."""
    for parts in range(1, max(len(p.parts) for p in paths) + 1):
        names = ["/".join(p.with_suffix("").parts[-parts:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{p} ({i + 1})" for i, p in enumerate(paths)]  # the same file twice


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One way of colouring: what it is, and sums over the pictures so far."""

    name: str
    baseline: bool
    vividness: float | None = None
    mrf: bool | None = None  # whether the mean field worked on it
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    delta_e: list[float] = field(default_factory=list)
    color: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)  # of pictures that are large enough
    fid: Fid | None = None  # shared by all rows
    entropy: list[float] = field(default_factory=list)  # cross-entropy with the truth's labels, of the network
    entropy_field: list[float] = field(default_factory=list)  # and of the field's marginals
    right: Tensor = field(default_factory=lambda: torch.zeros(151, dtype=torch.float64))
    balanced: Tensor = field(default_factory=lambda: torch.zeros(151, dtype=torch.float64))
    weight: float = 0.0
    sure: Tensor | None = None  # `reliability` of the network's distribution
    sure_field: Tensor | None = None  # and of the field's marginals

    def add(self, rgb: Tensor, truth: Truth) -> None:
        """rgb: [3, H, W] uint8."""
        found = rgb_to_lab(rgb)
        # the truth itself counts as 100 dB, so that the mean stays finite
        self.psnr.append(psnr(rgb, truth.rgb).clamp_max(100).item())
        self.ssim.append(ssim(rgb, truth.rgb).item())
        self.delta_e.append(delta_e_2000(found, truth.lab).mean().item())
        self.color.append(colorfulness(rgb).item())
        if truth.distance is not None:
            self.lpips.append(truth.distance(rgb))
        if self.fid is not None:
            self.fid.add(id(self), rgb)
        self.right += ab_accuracy(found[1:], truth.lab[1:]).cpu()
        if truth.balance is not None:
            self.balanced += (ab_accuracy(found[1:], truth.lab[1:], truth.balance) * truth.balance_sum).cpu()
            self.weight += truth.balance_sum

    def add_distributions(self, network: Tensor | None, smoothed: Tensor | None, ab: Tensor, bins: ColorBins) -> None:
        """Probabilities [B, K, h, w] before and after the mean field, and the true ab [B, 2, h, w] on their grid."""
        if network is not None:
            self.entropy += bin_cross_entropy(network, ab, bins).tolist()
            found = reliability(network, ab, bins)
            self.sure = found if self.sure is None else self.sure + found
        if smoothed is not None:
            self.entropy_field += bin_cross_entropy(smoothed, ab, bins).tolist()
            found = reliability(smoothed, ab, bins)
            self.sure_field = found if self.sure_field is None else self.sure_field + found

    def figures(self, grey: Row, true_color: float) -> dict:
        """What the sums come to; None where something was not computed."""
        gain = np.array(self.psnr) - np.array(grey.psnr)
        count = len(self.psnr)
        balanced = self.balanced / self.weight if self.weight else None
        return {
            "name": self.name,
            "baseline": self.baseline,
            "vividness": self.vividness,
            "field": self.mrf,
            "psnr": float(np.mean(self.psnr)),
            "psnr_gain": float(gain.mean()),
            "psnr_gain_error": float(gain.std(ddof=1) / math.sqrt(count)) if count > 1 else None,
            "ssim": float(np.mean(self.ssim)),
            "delta_e_2000": float(np.mean(self.delta_e)),
            "lpips": float(np.mean(self.lpips)) if self.lpips else None,
            "fid": None if self.fid is None else self.fid.value(id(self)),
            "colorfulness": float(np.mean(self.color)),
            "colorfulness_ratio": float(np.mean(self.color) / true_color) if true_color else None,
            "auc": auc(self.right / count).item(),
            "auc_rebalanced": None if balanced is None else auc(balanced).item(),
            "bin_cross_entropy": float(np.mean(self.entropy)) if self.entropy else None,
            "bin_cross_entropy_field": float(np.mean(self.entropy_field)) if self.entropy_field else None,
            "calibration_error": None if self.sure is None else calibration_error(self.sure).item(),
            "calibration_error_field": None if self.sure_field is None else calibration_error(self.sure_field).item(),
            "ab_accuracy": (self.right / count).tolist(),
            "ab_accuracy_rebalanced": None if balanced is None else balanced.tolist(),
            "reliability": None if self.sure is None else self.sure.tolist(),
            "reliability_field": None if self.sure_field is None else self.sure_field.tolist(),
        }


@dataclass
class Truth:
    """One picture, and what every row needs of it."""

    name: str
    rgb: Tensor  # [3, H, W] uint8
    lab: Tensor  # [3, H, W] float32
    balance: Tensor | None = None  # [H, W]
    balance_sum: float = 0.0
    distance: Callable[[Tensor], float] | None = None  # LPIPS of a colouring [3, H, W] uint8


@dataclass
class Shown:
    """A picture of the report, as JPEG: grey, one for each model at its shown vividness, truth."""

    name: str
    captions: list[str]
    pictures: list[bytes]
    psnr: list[float]  # of grey, and of the models


@dataclass
class Evaluation:
    """What an evaluation found; plain figures in `record`, pictures for the report beside them."""

    record: dict
    best: list[Shown]
    worst: list[Shown]
    chance: list[Shown]

    @property
    def rows(self) -> list[dict]:
        return self.record["rows"]


# --- pictures ---------------------------------------------------------------------------------------------------------


def _read(path: Path, side: int | None) -> np.ndarray | str:
    """[H, W, 3] uint8, or why there is none."""
    try:
        pixels = read_pixels(path, side or math.inf)
        pixels = shrunk(pixels, side) if side else pixels
        if min(pixels.shape[:2]) < _SMALLEST:
            return f"{pixels.shape[1]}×{pixels.shape[0]} pixels, expected at least {_SMALLEST} a side"
        return pixels
    except ImageError as error:
        return str(error)
    except libvips().Error as error:
        return f"broken ({reason(error)})"


def read_all(
    files: Sequence[Path], side: int | None, left_out: Callable[[str, str], object], jobs: int = 2
) -> Iterator[tuple[str, np.ndarray]]:
    """The pictures [H, W, 3] uint8 in order, some decoded ahead; `left_out` is told name and reason of the others."""
    ahead: deque = deque()
    rest = iter(files)
    pool = ThreadPoolExecutor(jobs)
    try:
        while True:
            while len(ahead) < 4 * jobs and (path := next(rest, None)) is not None:
                ahead.append((str(path), pool.submit(_read, path, side)))
            if not ahead:
                return
            path, future = ahead.popleft()
            pixels = future.result()
            if isinstance(pixels, str):
                left_out(path, pixels)
            else:
                yield path, pixels
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def jpeg(rgb: Tensor) -> bytes:
    """[3, H, W] uint8, shrunk for the report; chroma at full resolution, since it is what is looked at."""
    image = libvips().Image.new_from_array(rgb.permute(1, 2, 0).contiguous().cpu().numpy(), interpretation="srgb")
    scale = _THUMBNAIL / max(image.width, image.height)
    image = image.resize(scale) if scale < 1 else image
    return image.jpegsave_buffer(Q=88, subsample_mode="off", optimize_coding=True)


class Gallery:
    """Keeps the best and the worst pictures by the first model's PSNR, and some that chance chose."""

    def __init__(self, count: int, seed: int = 0):
        order = np.random.default_rng(seed).permutation(count)
        self.drawn = set(order[:_CHANCE].tolist())
        self.seen = 0
        self.best: list[tuple[float, int, Shown]] = []
        self.worst: list[tuple[float, int, Shown]] = []
        self.chance: list[tuple[int, Shown]] = []

    def add(self, number: int, truth: Truth, grey: Tensor, colored: list[tuple[str, Tensor]]) -> None:
        values = [psnr(rgb, truth.rgb).clamp_max(100).item() for rgb in (grey, *(rgb for _, rgb in colored))]
        score = values[1]
        good = len(self.best) < _BEST or score > self.best[0][0]
        bad = len(self.worst) < _BEST or -score > self.worst[0][0]
        if not (good or bad or number in self.drawn):
            return
        captions = ["grey", *(name for name, _ in colored), "truth"]
        pictures = [jpeg(rgb) for rgb in (grey, *(rgb for _, rgb in colored), truth.rgb)]
        shown = Shown(truth.name, captions, pictures, values)
        # the number keeps heaps from comparing pictures
        for wanted, heap, key in ((good, self.best, score), (bad, self.worst, -score)):
            if wanted:
                (heapq.heappush if len(heap) < _BEST else heapq.heappushpop)(heap, (key, number, shown))
        if number in self.drawn:
            self.chance.append((number, shown))

    def result(self) -> tuple[list[Shown], list[Shown], list[Shown]]:
        best, worst = ([s for *_, s in sorted(heap, key=lambda e: (-e[0], e[1]))] for heap in (self.best, self.worst))
        return best, worst, [s for _, s in sorted(self.chance, key=lambda e: e[0])]


# --- the evaluation ---------------------------------------------------------------------------------------------------


def prior_of(models: Sequence[Model], joint: bool) -> tuple[Tensor, ColorBins, str] | None:
    """Label probabilities of a training set, their label space, and the file they come from: of the first model that
    has them, or else of the bundled one."""
    for m in models:
        prior, bins = m.colorizer.checkpoint.prior, m.colorizer.network.config.bins
        if prior is not None and (not joint or bins == _JOINT):
            return prior, bins, m.path.name
    try:
        bundled = load_checkpoint(BUNDLED)
    except CheckpointError:
        return None
    if bundled.prior is None or (joint and bundled.network.config.bins != _JOINT):
        return None
    return bundled.prior, bundled.network.config.bins, BUNDLED.name


class Comparison:
    """Rows of all models and baselines, filled batch by batch."""

    def __init__(self, models: Sequence[Model], gallery: Gallery | None, perceptual: Perceptual | None = None):
        self.models, self.gallery = models, gallery
        perceptual = perceptual or Perceptual()
        self.lpips = perceptual.lpips
        self.fid = None if perceptual.inception is None else Fid(perceptual.inception)
        self.grey, self.oracle = Row(GREY, True), Row(ORACLE, True)
        self.true_color: list[float] = []
        found = prior_of(models, joint=False)
        self.prior_from = None if found is None else found[2]
        self.mean = None if found is None else Row(MEAN, True)
        self.mean_ab = None if found is None else mean_color(found[0], found[1]).float()
        self.balance = prior_of(models, joint=True)
        first = models[0].colorizer
        # the label space and grid of the baselines
        self.bins = first.bins or _JOINT
        self.prior = found[0] if found is not None and found[1] == self.bins else None
        self.rows = {(m.name, v): Row(m.name, False, v if m.colorizer.bins else None,
                                      m.colorizer.options.mrf and m.colorizer.bins is not None)
                     for m in models for v in m.vividness}  # fmt: skip
        self.unaries = {}
        for m in models:
            for v in m.vividness:
                unary = vividness_unary(m.colorizer.checkpoint, v)
                self.unaries[m.name, v] = None if unary is None else unary.to(m.colorizer.device)
        for row in self.all_rows():
            row.fid = self.fid

    def all_rows(self) -> list[Row]:
        """In the order of the table."""
        return [self.grey, *([] if self.mean is None else [self.mean]), *self.rows.values(), self.oracle]

    def key(self, height: int, width: int) -> tuple:
        """Pictures with the same key can share a batch."""
        return tuple(m.colorizer.network_size(height, width) for m in self.models)

    @torch.inference_mode()
    def add(self, batch: list[tuple[int, str, np.ndarray]]) -> None:
        """Pictures (number, name, [H, W, 3] uint8) of one key."""
        truths = [self._truth(name, pixels) for _, name, pixels in batch]
        greys = [with_color(t.lab, t.lab.new_zeros(2)) for t in truths]
        for grey, truth in zip(greys, truths, strict=True):
            self.true_color.append(colorfulness(truth.rgb).item())
            self.grey.add(grey, truth)
            if self.mean is not None:
                self.mean.add(with_color(truth.lab, self.mean_ab.to(truth.lab)), truth)
        self._add_oracle(truths)
        shown = [self._add_model(m, truths) for m in self.models]  # for each model [pictures]
        if self.gallery is not None:
            for i, (number, *_) in enumerate(batch):
                colored = [(m.name, pictures[i]) for m, pictures in zip(self.models, shown, strict=True)]
                self.gallery.add(number, truths[i], greys[i], colored)

    def _truth(self, name: str, pixels: np.ndarray) -> Truth:
        device = self.models[0].colorizer.device
        rgb = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().to(device)
        truth = Truth(name, rgb, rgb_to_lab(rgb, dtype=torch.float32))
        if self.balance is not None:
            truth.balance = balance_weights(truth.lab[1:], self.balance[1], self.balance[0])
            truth.balance_sum = truth.balance.sum().item()
        if self.lpips is not None:
            truth.distance = self.lpips.against(rgb)
        if self.fid is not None:
            self.fid.add_truth(rgb)
        return truth

    def _add_oracle(self, truths: list[Truth]) -> None:
        """The truth through all that a model's colours go through: its grid, its labels, its way back to full size."""
        colorizer = self.models[0].colorizer
        ab, guide, scales = _on_grid(colorizer, truths)
        index, _ = self.bins.nearest(ab.movedim(1, -1))  # [G, B, h, w, 1]
        parts = [c.to(ab)[index[g, ..., 0]].movedim(-1, 1) for g, (_, c) in enumerate(self.bins.groups())]
        for rgb, truth in zip(_full_size(torch.cat(parts, 1), guide, scales, truths), truths, strict=True):
            self.oracle.add(rgb, truth)
        self.oracle.entropy += target_entropy(ab, self.bins).tolist()
        if self.mean is not None and self.prior is not None:
            q = torch.cat([self.prior[place] / self.prior[place].sum() for place, _ in self.bins.groups()])
            q = q.to(ab)[None, :, None, None].expand(len(ab), -1, *ab.shape[2:])
            self.mean.entropy += bin_cross_entropy(q, ab, self.bins).tolist()

    def _add_model(self, model: Model, truths: list[Truth]) -> list[Tensor]:
        """Its pictures [3, H, W] uint8 at the shown vividness."""
        colorizer, shown = model.colorizer, []
        true_ab, guide, scales = _on_grid(colorizer, truths)
        small = _small(colorizer, truths, slice(0, 1))
        output = colorizer.network(small.contiguous(memory_format=torch.channels_last)).float()
        for v in model.vividness:
            row = self.rows[model.name, v]
            ab, network, smoothed = read_colors(colorizer, output, guide, self.unaries[model.name, v])
            pictures = _full_size(ab * colorizer.options.saturation, guide, scales, truths)
            for rgb, truth in zip(pictures, truths, strict=True):
                row.add(rgb, truth)
            row.add_distributions(network, smoothed, true_ab, colorizer.bins)
            if v == model.shown:
                shown = pictures
        return shown

    def figures(self) -> list[dict]:
        true_color = float(np.mean(self.true_color))
        return [row.figures(self.grey, true_color) for row in self.all_rows()]


def read_colors(
    colorizer: Colorizer, output: Tensor, guide: Tensor, unary: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """ab [B, 2, h, w] of the network's output as `Colorizer.predict` reads it (saturation apart), the distribution
    [B, K, h, w] of the network, and that after the mean field; None where there is none."""
    if colorizer.bins is None:
        return output, None, None
    logits = output if unary is None else output + unary
    network = torch.cat([logits[:, place].softmax(1) for place, _ in colorizer.bins.groups()], 1)
    smoothed = mean_field(logits, guide, bins=colorizer.bins, **colorizer.field) if colorizer.options.mrf else None
    q = network if smoothed is None else smoothed
    return annealed_mean(q, colorizer.options.temperature, colorizer.bins), network, smoothed


def _small(colorizer: Colorizer, truths: list[Truth], channels: slice) -> Tensor:
    """Channels of Lab at the size that the network sees, [B, C, h, w]."""
    size = colorizer.network_size(*truths[0].lab.shape[1:])
    planes = [t.lab[None, channels] for t in truths]
    if channels.start == 0:
        planes = [torch.cat((p[:, :1].clamp(0, 100), p[:, 1:]), 1) for p in planes]
    return torch.cat([F.interpolate(p, size, mode="bilinear", antialias=True) for p in planes])


def _on_grid(colorizer: Colorizer, truths: list[Truth]) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
    """The true ab [B, 2, h, w] and the guide [B, 1, h, w] on the grid of the network's output, and its pixels to one of
    each picture."""
    lab = pool_to(_small(colorizer, truths, slice(0, 3)), colorizer.network.stride)
    size = colorizer.network_size(*truths[0].lab.shape[1:])
    stride = colorizer.network.stride
    scales = [tuple(n / full / stride for n, full in zip(size, t.lab.shape[1:], strict=True)) for t in truths]
    return lab[:, 1:].contiguous(), lab[:, :1].contiguous(), scales


def _full_size(ab: Tensor, guide: Tensor, scales: list, truths: list[Truth]) -> list[Tensor]:
    """[B, 2, h, w] to pictures [3, H, W] uint8, as the Colorizer renders them."""
    return [
        render(ab[i, None], guide[i, None], t.lab[None, :1].clamp(0, 100), scale=scale, dtype=torch.uint8)[0]
        for i, (t, scale) in enumerate(zip(truths, scales, strict=True))
    ]


def with_color(lab: Tensor, ab: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """A picture's lightness, of its Lab [3, H, W], with one colour [2] everywhere: RGB [3, H, W]."""
    plane = ab[:, None, None].expand(2, *lab.shape[1:])
    return lab_to_rgb(torch.cat((lab[:1], plane)), dtype=dtype, gamut="preserve_lightness")


def evaluate(
    models: Sequence[Model],
    data: Path,
    *,
    limit: int | None = None,
    side: int | None = None,
    batch_size: int = 8,
    pictures: bool = False,
    perceptual: Perceptual | None = None,
    stage: Callable[[str, int], None] = lambda text, total: None,
    advance: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Compares models with the truth, and with baselines, on a folder of photos, of which a few are held at a time.

    Args:
        models: of `load_models`.
        data: what training reads: a folder of images, or of tar files, or a pack. Of train/ and val/ it takes val/.
        limit: only the first so many pictures.
        side: pictures whose short side is longer are shrunk to it first; None leaves them.
        batch_size: pictures of like size that share a pass of the network.
        pictures: whether to keep some for a report.
        perceptual: of `find_perceptual`: LPIPS and FID as far as they are at hand.
        stage, advance, say: told how it goes.

    Raises:
        DataError: no such folder, or nothing in it. EvaluationError: no picture in it could be used.
    """
    train, val = find_photos(data)
    split, files = ("val", val) if val else ("all", train)
    files = files[:limit]
    problems, sizes = Problems(), []

    def name_of(path: str) -> str:
        """Without the folder, and without its place in a tar file or a pack."""
        name = path.rsplit("!", 1)[-1] if "!" in path else path
        return str(Path(name).relative_to(data)) if Path(name).is_relative_to(data) else name

    def left_out(path: str, why: str) -> None:
        problems.add(name_of(path), why)
        say(f"left out: {why if path in why else f'{path}: {why}'}")
        advance()

    comparison = Comparison(models, Gallery(len(files)) if pictures else None, perceptual)
    stage("evaluating", len(files))
    waiting: dict[tuple, list] = {}
    pixels_hash = hashlib.sha256()

    def flush(key: tuple) -> None:
        batch = waiting.pop(key)
        comparison.add(batch)
        for _ in batch:
            advance()

    for number, (path, pixels) in enumerate(read_all(files, side, left_out)):
        pixels_hash.update(f"{pixels.shape[0]}×{pixels.shape[1]}".encode())
        pixels_hash.update(np.ascontiguousarray(pixels).data)
        sizes.append(pixels.shape[:2])
        key = comparison.key(*pixels.shape[:2])
        waiting.setdefault(key, []).append((number, name_of(path), pixels))
        if len(waiting[key]) >= batch_size:
            flush(key)
        elif sum(map(len, waiting.values())) >= 4 * batch_size:  # a folder of many sizes must not fill the memory
            flush(max(waiting, key=lambda k: len(waiting[k])))
    for key in list(waiting):
        flush(key)
    if not sizes:
        first = "".join(f"; the first: {why}" for why in list(problems.reasons.values())[:1])
        raise EvaluationError(f"{data}: none of its {len(files)} pictures could be used{first}")
    about = {} if perceptual is None else dict(perceptual.about)
    if "lpips" in about:
        about["lpips"] = about["lpips"] | {"pictures": len(comparison.grey.lpips)}
    if "fid" in about:
        about["fid"] = about["fid"] | {"pictures": len(sizes)}
    record = {
        "protocol": protocol(models, comparison, data, split, files, sizes, side, pixels_hash.hexdigest()[:16]) | about,
        "left_out": {"counts": dict(problems.counts()), "files": problems.reasons},
        "not_computed": dict.fromkeys(("lpips", "fid"), "not asked for") if perceptual is None else perceptual.missing,
        "truth": {"colorfulness": float(np.mean(comparison.true_color))},
        "rows": comparison.figures(),
    }
    best, worst, chance = ([], [], []) if comparison.gallery is None else comparison.gallery.result()
    return Evaluation(record, best, worst, chance)


def fid_note(record: dict) -> str | None:
    """What is to be said beside FID, None where there is none."""
    fid = record["protocol"].get("fid")
    if fid is None:
        return None
    few = f": biased, as of any count below some {FEW}, by what depends on the model" if fid["pictures"] < FEW else ""
    return f"FID over {fid['pictures']} pictures{few} (Chong and Forsyth 2020)"


def protocol(models, comparison: Comparison, data, split, files, sizes, side, pixels: str) -> dict:
    """All that the figures depend on, in plain types."""
    short = sorted(min(s) for s in sizes)
    return {
        "pictures": len(sizes),
        "data": data.name or str(data),
        "split": split,
        "fingerprint": {"names": fingerprint(files), "pixels": pixels},
        "crop": "none: whole pictures",
        "shrunk_to_short_side": side,
        "short_side": {"least": short[0], "median": short[len(short) // 2], "most": short[-1]},
        "bits": 8,
        "color_space": "sRGB, D65; Lab of the 8-bit result is compared with Lab of the 8-bit truth",
        "lightness": "of the truth, kept; colours out of gamut are moved towards grey",
        "psnr": "of each picture over RGB, then the mean; equal pictures count as 100 dB",
        "auc": "ab error up to 0 … 150; raw: mean over pictures; rebalanced: over all pixels",
        "rebalanced_by": None if comparison.balance is None else comparison.balance[2],
        "training_mean_color": described_mean(comparison.mean_ab, comparison.prior_from),
        "bin_cross_entropy": "nats; of the network, vividness included; _field: of the mean field's marginals",
        "confidence_intervals": CONFIDENCE_BINS,
        **described(models),
    }


def described_mean(ab: Tensor | None, prior_from: str | None) -> dict | None:
    """The baseline's colour [2], and whose it is."""
    return None if ab is None else {"ab": [round(x, 4) for x in ab.tolist()], "prior_of": prior_from}


def described(models: Sequence[Model]) -> dict:
    """Models and what they ran on, in plain types."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "models": [
            {
                "name": m.name,
                "file": m.path.name,
                "sha256": hashlib.sha256(m.path.read_bytes()).hexdigest()[:16],
                "head": m.colorizer.network.config.head,
                "bins": m.colorizer.network.config.bins.kind,
                "network_short_side": m.colorizer.size,
                "shown_vividness": m.shown if m.colorizer.bins is not None else None,
                "temperature": m.colorizer.options.temperature,
                "field": m.colorizer.field if m.colorizer.options.mrf and m.colorizer.bins is not None else None,
            }
            for m in models
        ],
        "versions": {"python": platform.python_version(), **{p: installed(p) for p in _PACKAGES}},
        "device": str(models[0].colorizer.device),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
