"""Models beside baselines on films: every film is made grey, coloured and compared with itself."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from fastcolor.evaluation.compare import (
    GREY,
    MEAN,
    EvaluationError,
    Model,
    Shown,
    described,
    described_mean,
    jpeg,
    prior_of,
    with_color,
)
from fastcolor.evaluation.metrics import mean_color
from fastcolor.evaluation.video import DISTANCES, FilmFigures, TrueFrame, true_frames
from fastcolor.imaging.find import find_images
from fastcolor.imaging.vips import SUFFIXES
from fastcolor.model.colorizer import Colorizer
from fastcolor.ops.lab import lab_to_rgb, rgb_to_lab
from fastcolor.training.data import Problems
from fastcolor.training.sources import GREY as NO_COLOR
from fastcolor.training.sources import PACK, find_tars, fingerprint, is_grey, shrunk
from fastcolor.video.colorizer import VideoColorizer, VideoOptions
from fastcolor.video.errors import VideoError
from fastcolor.video.reader import Picture, Reader, is_sequence

FILMS = frozenset(
    {
        ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".mts", ".m2ts",
        ".mxf", ".ogv", ".wmv", ".flv", ".3gp", ".dv", ".y4m",
    }
)  # fmt: skip
TRUTH = "truth"
ALONE_WORDS = "each frame alone"
ALONE = VideoOptions(temporal=0, keyframes=1)  # each frame by itself
SECONDS = 10.0  # of each film, where nothing else is asked for
_BLOCK = 4  # frames that are held at a time, in floats: one of 4K is 100 MB
_TINY = 1e-5  # a truth that has no more than that of something has none: no ratio then
_STILLS = 3  # frames of each film that are shown
_SLICED = 240  # frames whose middle row is shown, one under the other
FIGURES = ("psnr", "colorfulness", "flicker", "cdc")


@dataclass
class Way:
    """One way of colouring a film; without a model it is a baseline."""

    name: str
    model: Model | None = None
    vividness: float | None = None
    options: VideoOptions | None = None

    @property
    def alone(self) -> bool:
        return self.options == replace(ALONE, lookahead=_BLOCK)

    def colorizer(self) -> VideoColorizer:
        of_model: Colorizer = self.model.colorizer
        if of_model.bins is not None:
            of_model = of_model.with_options(vividness=self.vividness)
        return VideoColorizer(of_model, options=self.options)

    def row(self, found: dict, more: dict | None = None) -> dict:
        """What it is, and what it comes to."""
        colorizer = None if self.model is None else self.model.colorizer
        chooses = colorizer is not None and colorizer.bins is not None  # a regression has no dial, and no field
        return {
            "name": self.name,
            "baseline": self.model is None,
            "each_frame_alone": self.alone,
            "vividness": self.vividness if chooses else None,
            "field": None if colorizer is None else chooses and colorizer.options.mrf,
            **found,
            **(more or {}),
        }


def ways(models: Sequence[Model], options: VideoOptions, mean: bool) -> list[Way]:
    """All that is compared, the truth last. A block is worked on at a time, which does not change colours."""
    found = [Way(GREY), *([Way(MEAN)] if mean else [])]
    for m in models:
        found += [Way(m.name, m, v, replace(options, lookahead=_BLOCK)) for v in m.vividness]
        found.append(Way(f"{m.name}, {ALONE_WORDS}", m, m.shown, replace(ALONE, lookahead=_BLOCK)))
    return [*found, Way(TRUTH)]


# --- finding and reading ----------------------------------------------------------------------------------------------


def find_films(data: Path) -> list[Path]:
    """Films of a folder by their suffix, those of val/ where it has train/ and val/; or the one film that `data` is: a
    file, or numbered images such as frames/%06d.png."""
    if is_sequence(str(data)) or (data.is_file() and data.suffix.lower() not in SUFFIXES | {".tar"}):
        return [data]
    apart = (data / "train").is_dir() and (data / "val").is_dir()
    return find_images(data / "val" if apart else data, FILMS)


def has_photos(data: Path) -> bool:
    """Whether a folder is one of photos, in files, tars or a pack, for `compare.evaluate`."""
    tars = any(find_tars(folder) for folder in (data, data / "train", data / "val"))
    return tars or (data.is_dir() and ((data / PACK).exists() or bool(find_images(data))))


def film_frames(reader: Reader, side: int | None = None, seen: Callable[[np.ndarray], object] | None = None):
    """The frames of a reader that was asked for RGB, shrunk to a short side of `side`: [3, H, W] in [0, 1] each.

    Args:
        seen: is given each frame as it was read, [H, W, 3] uint8.
    """
    for picture in reader.frames():
        if isinstance(picture, Picture):
            pixels = picture.rgb.numpy()
            if seen is not None:
                seen(pixels)
            pixels = torch.from_numpy(shrunk(pixels, side)) if side else picture.rgb
            yield pixels.permute(2, 0, 1).contiguous().float() / 255


def _has_color(path: Path, **options) -> bool:
    """Whether one of its frames has any: most often the first."""
    with Reader(str(path), rgb=True, **options) as reader:
        return any(not is_grey(p.rgb.numpy()) for p in reader.frames() if isinstance(p, Picture))


# --- figures ----------------------------------------------------------------------------------------------------------


def _with_ratios(found: dict, grey: dict, truth: dict) -> dict:
    """Figures beside grey's and the truth's; None for nan."""
    result = {name: found[name] if math.isfinite(found[name]) else None for name in FIGURES}
    result["psnr_gain"] = found["psnr"] - grey["psnr"]
    for name in FIGURES[1:]:
        ratio = found[name] / truth[name] if truth[name] > _TINY else math.nan
        result[f"{name}_ratio"] = ratio if math.isfinite(ratio) else None
    return result


def _mean_figures(films: list[list[dict]]) -> list[dict]:
    """Of each way [ways] the means over films [films][ways], each film alike; a figure that a film does not have
    (nothing stood still in it) is missing in all ways, and left out of all means."""
    means = []
    for of_way in zip(*films, strict=True):
        values = {name: [f[name] for f in of_way if not math.isnan(f[name])] for name in FIGURES}
        means.append({name: float(np.mean(v)) if v else math.nan for name, v in values.items()})
    return means


# --- pictures ---------------------------------------------------------------------------------------------------------


@dataclass
class FilmShown:
    """Pictures of one film for the report."""

    name: str
    stills: list[Shown]
    captions: list[str]  # of the slices
    slices: list[bytes]  # JPEG: the chroma of the middle row through time, downwards, at one lightness


@dataclass
class _Album:
    """Gathers them; `shown` are indices of ways."""

    ways: list[Way]
    shown: list[int]
    at: set[int]  # numbers of frames
    stills: list[tuple[int, int, bytes, float]] = field(default_factory=list)  # number, way, JPEG, PSNR
    rows: dict[int, list[Tensor]] = field(default_factory=dict)  # of each way, [2, W] of ab

    def add(self, number: int, way: int, rgb: Tensor, psnr: float) -> None:
        if way not in self.shown:
            return
        if number in self.at:
            self.stills.append((number, way, jpeg(rgb.mul(255).round().byte()), psnr))
        if number < _SLICED and self.ways[way].name != GREY:
            row = rgb[:, rgb.shape[1] // 2, None]
            self.rows.setdefault(way, []).append(rgb_to_lab(row[None])[0, 1:, 0].cpu())

    def result(self, name: str, rate: float) -> FilmShown:
        stills = []
        for number in sorted({n for n, *_ in self.stills}):
            of_frame = sorted((way, picture, psnr) for n, way, picture, psnr in self.stills if n == number)
            captions = [self._caption(way) for way, *_ in of_frame]
            values = [psnr for *_, psnr in of_frame][:-1]  # the truth is last
            title = f"{name}, frame {number} ({number / rate:.1f} s)"
            stills.append(Shown(title, captions, [p for _, p, _ in of_frame], values))
        slices = []
        for way in sorted(self.rows):
            ab = torch.stack(self.rows[way], 1)  # [2, T, W]
            flat = torch.cat((torch.full_like(ab[:1], 65), 1.5 * ab))
            tall = max(1, round(160 / ab.shape[1]))  # pixels of a frame, so that a short film is seen
            picture = lab_to_rgb(flat[None], gamut="preserve_lightness")[0].clamp(0, 1).mul(255).round().byte()
            slices.append(jpeg(picture.repeat_interleave(tall, 1)))
        return FilmShown(name, stills, [self._caption(way) for way in sorted(self.rows)], slices)

    def _caption(self, way: int) -> str:
        return "grey" if self.ways[way].name == GREY else self.ways[way].name


def _stills_of(expected: int) -> set[int]:
    """Numbers of frames over the length of a film; the first where no length is known."""
    return {(2 * k + 1) * expected // (2 * _STILLS) for k in range(_STILLS)}


# --- the evaluation ---------------------------------------------------------------------------------------------------


@dataclass
class FilmEvaluation:
    """What an evaluation of films found; plain figures in `record`, pictures for the report beside them."""

    record: dict
    shown: list[FilmShown]

    @property
    def rows(self) -> list[dict]:
        return self.record["rows"]


@dataclass
class _Found:
    """One film."""

    figures: list[dict]  # of each way
    record: dict
    shown: FilmShown | None


class _Films:
    """The evaluation of one film after the other."""

    def __init__(self, models, options: VideoOptions, reading: dict, side, pictures, advance):
        self.models, self.reading, self.side = models, reading, side
        self.pictures, self.advance = pictures, advance
        found = prior_of(models, joint=False)
        self.mean_ab = None if found is None else mean_color(found[0], found[1]).float()
        self.prior_from = None if found is None else found[2]
        self.ways = ways(models, options, self.mean_ab is not None)
        self.shown = [
            i for i, w in enumerate(self.ways)
            if w.name in (GREY, TRUTH) or (w.model is not None and (w.alone or w.vividness == w.model.shown))
        ]  # fmt: skip
        device = models[0].colorizer.device
        self.device = device if device.type == "cuda" else torch.device("cpu")  # figures are float64
        self.pixels = hashlib.sha256()

    @torch.inference_mode()
    def film(self, path: Path, name: str, stage: Callable[[int], None]) -> _Found:
        """Raises VideoError where it cannot be read, or compared."""
        if not _has_color(path, **self.reading):
            raise VideoError(NO_COLOR)
        with Reader(str(path), rgb=True, **self.reading) as reader:
            info = reader.info
            stage(info.frames)
            album = _Album(self.ways, self.shown, _stills_of(info.frames)) if self.pictures else None
            sums = [FilmFigures() for _ in self.ways]
            colorizers = [w.colorizer() if w.model is not None else None for w in self.ways]
            number, size = 0, (0, 0)
            frames = true_frames(f.to(self.device) for f in film_frames(reader, self.side, self._seen))
            while block := list(islice(frames, _BLOCK)):
                for way, colorizer in enumerate(colorizers):
                    for i, rgb in enumerate(self._colored(way, colorizer, block)):
                        value = sums[way].add(rgb, block[i])
                        if album is not None:
                            album.add(number + i, way, rgb, value)
                number, size = number + len(block), tuple(block[0].rgb.shape[1:])
                for _ in block:
                    self.advance()
            if number < 2:
                raise VideoError(f"has {number} frame, expected at least 2")
            seconds, why = reader.ended.at, reader.ended.why
        figures = [s.result() for s in sums]
        grey, truth = figures[0], figures[-1]
        rows = []
        for way, found, s, colorizer in zip(self.ways, figures, sums, colorizers, strict=True):
            more = {} if colorizer is None else {
                "network_runs_per_frame": colorizer.stats.network / number, "cuts": colorizer.stats.cuts
            }  # fmt: skip
            steps = [round(x, 5) if math.isfinite(x) else None for x in s.steps]
            rows.append(way.row(_with_ratios(found, grey, truth), more | {"flicker_of_frames": steps}))
        rows[-1]["psnr"] = rows[-1]["psnr_gain"] = None  # of the truth to itself
        record = {
            "name": name, "frames": number, "seconds": round(seconds, 3), "height": size[0], "width": size[1],
            "frames_per_second": round(float(info.rate), 4), "bits": info.bits, "codec": info.codec,
            "ended_early": why, "rows": rows,
        }  # fmt: skip
        return _Found(figures, record, None if album is None else album.result(name, float(info.rate)))

    def _colored(self, way: int, colorizer: VideoColorizer | None, block: list[TrueFrame]) -> Iterator[Tensor]:
        """The frames of a block, [3, H, W] in [0, 1]. A colorizer goes on where it was after the block before."""
        if colorizer is not None:
            return colorizer.colorize(frame.rgb for frame in block)
        if self.ways[way].name == TRUTH:
            return (frame.rgb for frame in block)
        ab = torch.zeros(2) if self.ways[way].name == GREY else self.mean_ab
        return (with_color(frame.lab, ab.to(frame.lab), frame.rgb.dtype) for frame in block)

    def _seen(self, pixels: np.ndarray) -> None:
        self.pixels.update(f"{pixels.shape[0]}×{pixels.shape[1]}".encode())
        self.pixels.update(np.ascontiguousarray(pixels).data)


def evaluate_films(
    models: Sequence[Model],
    data: Path,
    *,
    options: VideoOptions | None = None,
    start: float | None = None,
    seconds: float | None = SECONDS,
    limit: int | None = None,
    side: int | None = None,
    deinterlace: bool | None = None,
    pictures: bool = False,
    stage: Callable[[str, int], None] = lambda text, total: None,
    advance: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> FilmEvaluation:
    """Compares models with the truth, and with baselines, on films, of which a few frames are held at a time.

    Args:
        models: of `compare.load_models`.
        data: a film, numbered images such as frames/%06d.png, or a folder of films; of train/ and val/ it takes val/.
        options: how films are coloured; the defaults of `fastcolor video` where they are left out.
        start, seconds: where in each film to begin, and how much of it to take; None begins at 0, and takes all.
        limit: only the first so many films.
        side: films whose short side is longer are shrunk to it first; None leaves them.
        deinterlace: as of `Reader`.
        pictures: whether to keep some for a report.
        stage, advance, say: told how it goes.

    Raises:
        EvaluationError: no film in it could be used; the message says why the first could not.
    """
    files = find_films(data)[:limit]
    if not files:
        raise EvaluationError(f"{data}: no films in it ({', '.join(sorted(FILMS))})")
    options = options or VideoOptions()
    end = None if seconds is None else (start or 0) + seconds
    work = _Films(models, options, {"start": start, "end": end, "deinterlace": deinterlace}, side, pictures, advance)
    problems, found = Problems(), []
    for i, path in enumerate(files):
        name = path.relative_to(data).as_posix() if path != data else path.name
        label = name if len(files) == 1 else f"{name} ({i + 1} of {len(files)})"
        try:
            film = work.film(path, name, lambda total, label=label: stage(label, total))
        except (VideoError, av.FFmpegError, OSError) as error:
            why = str(error).removeprefix(f"{path}: ")
            problems.add(name, why)
            say(f"left out: {path}: {why}")
            continue
        if film.record["ended_early"]:
            say(f"{path}: only {film.record['frames']} frames, {film.record['ended_early']}")
        found.append(film)
    if not found:
        first = next(iter(problems.reasons.items()))
        many = "" if files == [data] else f"none of its {len(files)} films could be used; the first: {first[0]}: "
        raise EvaluationError(f"{data}: {many}{first[1]}")
    means = _mean_figures([f.figures for f in found])
    rows = [way.row(_with_ratios(mean, means[0], means[-1])) for way, mean in zip(work.ways, means, strict=True)]
    for i, row in enumerate(rows):
        gains = np.array([f.figures[i]["psnr"] - f.figures[0]["psnr"] for f in found])
        row["psnr_gain_error"] = float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else None
    rows[-1]["psnr"] = rows[-1]["psnr_gain"] = rows[-1]["psnr_gain_error"] = None
    record = {
        "protocol": _protocol(work, data, files, found, options, (start or 0, seconds), side),
        "left_out": {"counts": dict(problems.counts()), "files": problems.reasons},
        "rows": rows,
        "films": [f.record for f in found],
    }
    return FilmEvaluation(record, [f.shown for f in found if f.shown is not None])


def _protocol(work: _Films, data: Path, files: list[Path], found: list[_Found], options, part, side) -> dict:
    """All that the figures depend on, in plain types."""
    how = {k: v for k, v in asdict(options).items() if k not in ("lookahead", "low_latency")}
    return {
        "films": len(found),
        "frames": sum(f.record["frames"] for f in found),
        "data": data.name or str(data),
        "start_of_each": part[0],
        "seconds_of_each_at_most": part[1],
        "fingerprint": {"names": fingerprint(files), "pixels": work.pixels.hexdigest()[:16]},
        "shrunk_to_short_side": side,
        "color_space": "decoded frames by their matrix and range to 8-bit sRGB; results floating, not encoded",
        "lightness": "of the truth, kept; colours out of gamut are moved towards grey",
        "psnr": "of each frame over RGB, then the mean over frames, then over films; equal frames count as 100 dB",
        "flicker": "mean |ab − that of the frame before| where lightness is still: |ΔL| < 1 in 3×3 pixels",
        "cdc": f"TCVC (arXiv 2110.04562), 8 bits, natural logarithm, distances {', '.join(map(str, DISTANCES))}",
        "video_options": how,
        "training_mean_color": described_mean(work.mean_ab, work.prior_from),
        **described(work.models),
    }
