"""What a film's colours are told from outside: hints at places and frames, a palette, the colours of a reference.

All are unaries of the field, for pictures as well as for film: `Control.unary` for every pixel, `Control.hints_at` for
some.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from fastcolor.bins import ColorBins, soft_encode
from fastcolor.ops.lab import rgb_to_lab
from fastcolor.ops.mean_field import hint_unary, histogram_unary

_SMOOTH = 10.0  # ab units: how far a colour of a palette or a reference reaches
_RARE = 1e-4  # share of all labels in a histogram, so that none is forbidden
_NO_LABELS = "hints, palettes and references need a network with a distribution head, not regression"


class ControlError(ValueError):
    """A file of hints, a palette or a reference cannot be used; the message names the file and the place in it."""


@dataclass(frozen=True)
class Hint:
    """A colour at a place, in some frames.

    ab: the colour; lightness stays that of the film.
    box: left, top, right, bottom, in shares of the picture's width and height.
    round: whether the place is the ellipse in the box.
    first, last: numbers of the frames, both included; last None is the end of the film.
    strength: in units of the logits: 20 outweighs whatever the network says, 5 is a suggestion.
    follow: whether the place goes along with the picture's motion from the first frame on, until a cut.
    """

    ab: tuple[float, float]
    box: tuple[float, float, float, float]
    round: bool = True
    first: int = 0
    last: int | None = None
    strength: float = 20.0
    follow: bool = False

    def at(self, number: int) -> bool:
        return self.first <= number and (self.last is None or number <= self.last)

    def mask(self, height: int, width: int) -> Tensor:
        """Which cells of a grid over the picture it is for, bool [height, width]: at least the one in its middle."""
        left, top, right, bottom = self.box
        y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
        middle_y, middle_x = (top + bottom) / 2, (left + right) / 2
        dy, dx = (
            (y - middle_y).abs() / max((bottom - top) / 2, 1e-9),
            (x - middle_x).abs() / max((right - left) / 2, 1e-9),
        )
        mask = dy[:, None] ** 2 + dx**2 <= 1 if self.round else torch.maximum(dy[:, None], dx.expand(height, -1)) <= 1
        row, column = (min(max(int(m * n), 0), n - 1) for m, n in ((middle_y, height), (middle_x, width)))
        mask[row, column] = True
        return mask


@dataclass(frozen=True)
class Control:
    """Hints, palette and reference together; all may be left out.

    hints: see `Hint`; later ones go over earlier ones.
    palette: colours (a, b); those of the film stay near them.
    reference: [K] histogram over a network's labels, as from `reference_histogram`: the film's colours get its
        proportions.
    strength: of palette and reference, 0 (none) to 1.
    """

    hints: tuple[Hint, ...] = ()
    palette: tuple[tuple[float, float], ...] = ()
    reference: Tensor | None = None
    strength: float = 1.0

    def unary(self, bins: ColorBins | None, prior: Tensor | None, vividness: float) -> Tensor | None:
        """What is added to the network's scores at every pixel, [1, K, 1, 1]; None where that is nothing.

        Args:
            bins: labels of the network; None for regression, which has no distribution to work on.
            prior: [K] counts of the labels that the network was trained on; the reference takes their place.
            vividness: of `ColorizeOptions`; relative to the reference, where there is one.

        Raises:
            ControlError: anything with regression, or a reference of another network's labels.
        """
        if bins is None:
            if self.palette or self.hints or self.reference is not None:
                raise ControlError(_NO_LABELS)
            return None
        total = torch.zeros(bins.count, dtype=torch.float64)
        if prior is not None and vividness > 0:
            total = vividness * bins.rebalancing_weights(prior).log()
        if self.reference is not None:
            if list(self.reference.shape) != [bins.count]:
                raise ControlError(f"reference must have shape [{bins.count}], got {list(self.reference.shape)}")
            wanted = _shares(bins, self.reference)
            there = _shares(bins, torch.ones(bins.count) if prior is None else prior)
            # Bayes: the scores hold the prior of the training set, and the reference takes its place
            told = wanted.log() - there.log() + vividness * bins.rebalancing_weights(wanted).log()
            total = torch.lerp(total, told, self.strength)
        if self.palette:
            counts = torch.zeros(bins.count, dtype=torch.float64)
            index, share = soft_encode(bins, torch.tensor(self.palette, dtype=torch.float64))
            for (place, _), i, p in zip(bins.groups(), index, share, strict=True):
                counts[place].index_add_(0, i.flatten(), p.flatten())
            total = total + self.strength * histogram_unary(_shares(bins, counts, 1e-6), bins).flatten()
        return total.float()[None, :, None, None]

    def hints_at(self, number: int) -> list[int]:
        """Which of the hints are for a frame."""
        return [i for i, hint in enumerate(self.hints) if hint.at(number)]


def hints_unary(hints: Sequence[Hint], masks: Sequence[Tensor], bins: ColorBins) -> Tensor:
    """What hints add to the scores, [1, K, h, w], where their masks are, bool [h, w]."""
    height, width = masks[0].shape
    total = torch.zeros(1, bins.count, height, width, device=masks[0].device)
    for hint, mask in zip(hints, masks, strict=True):
        mask = mask[None, None]
        ab = torch.tensor(hint.ab, device=mask.device)[None, :, None, None].expand(1, 2, height, width)
        total = torch.where(mask, hint_unary(ab, mask, bins, strength=hint.strength), total)
    return total


def _shares(bins: ColorBins, counts: Tensor, rare: float = _RARE) -> Tensor:
    """A smoothed histogram [K] float64, in which no label is without a share."""
    shares = bins.smoothed_prior(counts, _SMOOTH) + rare / bins.count
    return torch.cat([shares[place] / shares[place].sum() for place, _ in bins.groups()])


# --- files ------------------------------------------------------------------------------------------------------------


def load_control(
    bins: ColorBins | None,
    hints: str | Path | None = None,
    palette: str | Path | None = None,
    reference: str | Path | None = None,
    strength: float = 1.0,
) -> Control:
    """From the files of the command line: see `read_hints`, `read_palette`, `reference_histogram`.

    Args:
        bins: labels of the network (`Colorizer.bins`).
        strength: of palette and reference, 0 to 1.

    Raises:
        ControlError: a file that cannot be read, or holds something else.
    """
    if not 0 <= strength <= 1:
        raise ControlError(f"strength must be between 0 and 1, got {strength}")
    if bins is None and (hints or palette or reference):
        raise ControlError(_NO_LABELS)
    return Control(
        read_hints(hints) if hints else (),
        read_palette(palette) if palette else (),
        reference_histogram(reference, bins) if reference else None,
        strength,
    )


def read_hints(path: str | Path) -> tuple[Hint, ...]:
    """Hints from a JSON file:

        {"size": [1920, 1080],
         "hints": [{"x": 960, "y": 540, "radius": 20, "color": "#c03028", "frames": [0, 47]},
                   {"box": [0, 0, 1920, 300], "ab": [-5, -30], "strength": 5}]}

    "size" is the width and height of the picture that x, y, radius and box count in; without it they are shares of
    width and height, 0 to 1. "color" is #rrggbb, of which the lightness is not used, or "ab"
    says a and b. "frames" are the first and the last, from 0, the last null for the end; without it, all. "radius",
    "strength" and "follow" (see `Hint`) may be left out.

    Raises:
        ControlError: naming the file, the hint and what was expected.
    """
    path = Path(path)
    content = _read_json(path)
    _check(isinstance(content, dict), path, "the file", "an object with a list of hints", content)
    _known(content, ("size", "hints"), path, "the file")
    size = content.get("size")
    _check(size is None or (_numbers(size, 2) and min(size) > 0), path, "size", "[width, height]", size)
    width, height = size or (1, 1)
    hints = content.get("hints")
    _check(isinstance(hints, list), path, "hints", "a list", hints)
    return tuple(_hint(entry, path, f"hints[{i}]", width, height) for i, entry in enumerate(hints))


def _hint(entry, path: Path, where: str, width: float, height: float) -> Hint:
    _check(isinstance(entry, dict), path, where, "an object", entry)
    _known(entry, ("x", "y", "radius", "box", "color", "ab", "frames", "strength", "follow"), path, where)
    if ("box" in entry) == ("x" in entry or "y" in entry):
        raise ControlError(f"{path}: {where} must have either x and y, or box")
    if "box" in entry:
        box = entry["box"]
        good = _numbers(box, 4) and 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
        _check(good, path, f"{where}.box", f"[left, top, right, bottom] within {width}×{height}", box)
        _check("radius" not in entry, path, f"{where}.radius", "none with a box", entry.get("radius"))
    else:
        x, y, radius = entry.get("x"), entry.get("y"), entry.get("radius", 0)
        for name, value, end in (("x", x, width), ("y", y, height), ("radius", radius, math.inf)):
            _check(
                _numbers([value], 1) and 0 <= value <= end, path, f"{where}.{name}", f"a number from 0 to {end}", value
            )
        box = (x - radius, y - radius, x + radius, y + radius)
    if ("color" in entry) == ("ab" in entry):
        raise ControlError(f"{path}: {where} must have either color or ab")
    if "color" in entry:
        ab = _color(entry["color"], path, f"{where}.color")
    else:
        good = _numbers(entry["ab"], 2) and max(map(abs, entry["ab"])) <= 128
        _check(good, path, f"{where}.ab", "[a, b], each from -128 to 128", entry["ab"])
        ab = tuple(map(float, entry["ab"]))
    frames = entry.get("frames", [0, None])
    good = isinstance(frames, list) and len(frames) == 2 and _whole(frames[0]) and frames[0] >= 0
    good = good and (frames[1] is None or (_whole(frames[1]) and frames[1] >= frames[0]))
    _check(good, path, f"{where}.frames", "[first, last], from 0", frames)
    strength = entry.get("strength", 20.0)
    _check(
        _numbers([strength], 1) and 0 <= strength <= 1000,
        path,
        f"{where}.strength",
        "a number from 0 to 1000",
        strength,
    )
    share = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    follow = entry.get("follow", False)
    _check(isinstance(follow, bool), path, f"{where}.follow", "true or false", follow)
    return Hint(ab, share, "box" not in entry, frames[0], frames[1], float(strength), follow)


def read_palette(path: str | Path) -> tuple[tuple[float, float], ...]:
    """Colours (a, b) of a file: JSON, a list of #rrggbb; or text, one #rrggbb in a line, with or without the #, what
    follows it a comment.

    Raises:
        ControlError: naming the file and the line.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        content = _read_json(path)
        _check(isinstance(content, list) and content, path, "the file", "a list of colours", content)
        return tuple(_color(color, path, f"color {i + 1}") for i, color in enumerate(content))
    colors = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if word := line.split():
            colors.append(_color(word[0], path, f"line {number}"))
    if not colors:
        raise ControlError(f"{path}: no colour in it, expected lines like #c03028")
    return tuple(colors)


def reference_histogram(path: str | Path, bins: ColorBins, frames: int = 32) -> Tensor:
    """How often each label's colour is in a picture, or in frames spread over a film: [K] float64.

    Raises:
        ControlError: a file that is neither, or has no colour.
    """
    from fastcolor.imaging.files import ImageError, read_picture
    from fastcolor.imaging.vips import SUFFIXES

    path = Path(path)
    if not path.is_file():
        raise ControlError(f"{path}: no such file")
    counts = torch.zeros(bins.count, dtype=torch.float64)
    try:
        still = path.suffix.lower() in SUFFIXES
        pictures = [read_picture(path, max_pages=1).pages[0]] if still else _frames_of(path, frames)
    except ImageError as error:
        raise ControlError(str(error)) from error
    chroma = 0.0
    for pixels in pictures:
        if pixels.ndim == 2 or pixels.shape[2] < 3:
            continue
        rgb = torch.from_numpy(_thinned(pixels[..., :3])).permute(2, 0, 1)
        ab = rgb_to_lab(rgb, dtype=torch.float32)[1:].movedim(0, -1)
        chroma = max(chroma, float(ab.norm(dim=-1).mean()))
        counts += bins.histogram(ab)
    if chroma < 0.5:
        raise ControlError(f"{path}: a reference needs colour, this is grey")
    return counts


def _thinned(pixels):
    """Every n-th row and column of [H, W, 3]: 40,000 pixels say enough, and large frames fill the memory."""
    step = max(1, math.isqrt(pixels.shape[0] * pixels.shape[1] // 40_000))
    return pixels[::step, ::step].copy()


def _frames_of(path: Path, count: int):
    """Frames [h, w, 3] uint8 of a film, thinned and spread over it."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ControlError(f"{path}: neither a picture nor a film")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            span = container.duration or 0  # µs
            if span == 0:
                given = islice(container.decode(stream), count)
                frames = [_thinned(frame.to_ndarray(format="rgb24")) for frame in given]
            else:
                frames = []
                for i in range(count):
                    container.seek(
                        container.start_time + span * i // count if container.start_time else span * i // count
                    )
                    frame = next(container.decode(stream), None)
                    if frame is not None:
                        frames.append(_thinned(frame.to_ndarray(format="rgb24")))
    except (av.FFmpegError, OSError) as error:
        raise ControlError(f"{path}: neither a picture nor a film ({error})") from error
    if not frames:
        raise ControlError(f"{path}: no frame can be read")
    return frames


# --- checks -----------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ControlError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ControlError(f"{path}: not a text file") from error


def _read_json(path: Path):
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ControlError(f"{path}: not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error


def _check(good, path: Path, where: str, expected: str, got) -> None:
    if not good:
        raise ControlError(f"{path}: {where} must be {expected}, got {json.dumps(got)[:80]}")


def _known(entry: dict, names: tuple[str, ...], path: Path, where: str) -> None:
    for name in entry:
        if name not in names:
            raise ControlError(f"{path}: {where} has {name!r}, known are {', '.join(names)}")


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(values, count: int) -> bool:
    numbers = isinstance(values, list) and len(values) == count
    return numbers and all((_whole(v) or isinstance(v, float)) and math.isfinite(v) for v in values)


def _color(text, path: Path, where: str) -> tuple[float, float]:
    good = isinstance(text, str) and re.fullmatch(r"#?[0-9a-fA-F]{6}", text)
    _check(good, path, where, "a colour like #c03028", text)
    value = int(text.lstrip("#"), 16)
    rgb = torch.tensor([value >> 16, value >> 8 & 255, value & 255], dtype=torch.uint8)
    return tuple(rgb_to_lab(rgb[:, None, None], dtype=torch.float32)[1:, 0, 0].tolist())
