"""`fastcolor video`: one film, from a file or pipe to another."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcolor._version import __version__
from fastcolor.cli._options import Device, Mrf, Quiet, Saturation, Size, Temperature, Vividness, Weights, _finite
from fastcolor.cli.colorize import _load, _refuse

if TYPE_CHECKING:
    from fastcolor.video.film import Status, Summary

_LINE_EVERY = 10.0  # seconds between lines of progress where there is no terminal
_PATIENCE = 10.0  # seconds for a run that was given up to end by itself
_OVER = 0  # is no signal
_STREAM = "-"


# --- what the user sees -----------------------------------------------------------------------------------------------


class Reporter:
    """Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, quiet: bool):
        from rich.console import Console

        self.quiet = quiet
        self.console = Console(stderr=True)
        self._bar: Any = None
        self._started = self._last = time.monotonic()
        self._joining: float | None = None  # since when

    def say(self, text: str) -> None:
        if self._bar is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def start(self) -> None:
        self._started = self._last = time.monotonic()
        if self.quiet or not self.console.is_terminal:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            BarColumn(), TextColumn("{task.fields[text]}"), console=self.console, transient=True, refresh_per_second=4
        )
        self._bar.add_task("", total=None, text="")
        self._bar.start()

    def watch(self, status: Status) -> None:
        now = time.monotonic()
        if self._bar is not None:
            if now - self._last >= 0.2:
                self._last = now
                total, done = status.expected or None, status.written
                if status.joined is not None:
                    total, done = status.written, status.joined
                self._bar.update(0, total=total, completed=done, text=self._text(status))
        elif not self.quiet and now - self._last >= _LINE_EVERY:
            self._last = now
            self.say(self._text(status))

    def _text(self, status: Status) -> str:
        now = time.monotonic()
        if status.joined is not None:
            self._joining = now if self._joining is None else self._joining
            rate = status.joined / max(now - self._joining, 1e-9)
            left = self._left(status.written - status.joined, rate)
            return f"joining the segments, {status.joined} of {status.written} frames{left}"
        rate = (status.written - status.resumed) / max(now - self._started, 1e-9)
        (before, limit), (after, _) = status.queues
        left = self._left(status.expected - status.written, rate)
        of = f" of {status.expected}" if status.expected else ""
        return f"{status.written}{of} frames, {rate:.1f} fps{left}, waiting {before} and {after} of {limit}"

    @staticmethod
    def _left(frames: int, rate: float) -> str:
        if frames <= 0 or rate <= 0:
            return ""
        seconds = round(frames / rate)  # of days, where a film is long
        return f", {seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


# --- options ----------------------------------------------------------------------------------------------------------


def _seconds(text: str | float | None) -> float | None:
    """90, 1:30 or 0:01:30.5 to seconds."""
    if text is None or isinstance(text, float):
        return text
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d+)?", text):
        raise typer.BadParameter(f"{text!r} is no time; 90, 1:30 or 0:01:30.5 are")
    return float(sum(Fraction(part) * 60**i for i, part in enumerate(reversed(text.split(":")))))


def _keyframes(text: str | int) -> str | int:
    if text == "auto" or (isinstance(text, int) and text > 0):
        return text
    if not (str(text).isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"{text!r} is neither 'auto' nor a number of frames")
    return int(text)


def _rate(text: str | Fraction | None) -> Fraction | None:
    if text is None or isinstance(text, Fraction):
        return text
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise typer.BadParameter(f"{text!r} is no frame rate; 24, 25 or 24000/1001 are")
    return rate


def read_cuts(path: Path) -> tuple[int, ...]:
    """Numbers of the frames that start a scene: a JSON list, or numbers with blanks, commas or line ends between."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        _refuse(f"--cuts {path}: cannot be read ({getattr(error, 'strerror', None) or error})")
    words = re.split(r"[\s,]+", text.strip().strip("[]").strip())
    if any(not word.isdecimal() for word in words if word):
        wrong = next(word for word in words if word and not word.isdecimal())
        _refuse(f"--cuts {path}: {wrong!r} is not the number of a frame")
    return tuple(sorted({int(word) for word in words if word}))


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def _signals(stop: threading.Event, reporter: Reporter) -> Iterator[None]:
    """The first Ctrl-C ends the film where it is; the second gives up, and so does SIGTERM.

    Python sees signals in its main thread alone, and never while that hangs in a read of FFmpeg's: what is then to be
    done does a thread, which hears of them from the system's own handler.
    """

    def interrupted(number: int, _) -> None:
        if number == signal.SIGTERM:
            raise _Terminated
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        reporter.say("interrupted: finishing the file; once more to give up")

    # Windows cannot wait for pipes: there Ctrl-C gives up at once
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    heard, told = os.pipe()

    def watch() -> None:
        number, until, given_up = 0, math.inf, False
        while time.monotonic() < until:
            if stop.is_set() and not given_up:
                until = math.inf  # the first Ctrl-C was heard
            if not select.select([heard], [], [], 0.5 if number else None)[0]:
                continue
            came = os.read(heard, 1)[0]
            if came == _OVER:
                os.close(heard)
                return
            if came in (signal.SIGINT, signal.SIGTERM):
                given_up = given_up or number != 0 or came == signal.SIGTERM
                # the main thread may be at work, and hear of the first Ctrl-C late
                number, until = came, time.monotonic() + (_PATIENCE if given_up else 3 * _PATIENCE)
        os.write(2, b"interrupted: something hangs, and is left\n")
        os._exit(128 + number)

    os.set_blocking(told, False)
    before = [(number, signal.signal(number, interrupted)) for number in (signal.SIGINT, signal.SIGTERM)]
    wakeup = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before:
            signal.signal(number, handler)
        os.write(told, bytes([_OVER]))
        os.close(told)


def _identity(files: dict[str, Path | None], options: dict[str, Any], video: Any) -> dict[str, Any]:
    """What the colours depend on; files by what is in them."""
    digests = {}
    for name, path in files.items():
        if path is not None:
            digest = hashlib.blake2b(digest_size=16)
            with open(path, "rb") as file:
                while piece := file.read(1 << 20):  # a reference may be a whole film
                    digest.update(piece)
            digests[name] = digest.hexdigest()
    return {"fastcolor": __version__, **digests, **options, **asdict(video)}


# --- the command ------------------------------------------------------------------------------------------------------


def video(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="A film, numbered images (frames/%06d.png), or - for stdin.")
    ],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Film, numbered images, or - for stdout.", show_default=False)
    ] = None,
    codec: Annotated[
        str, typer.Option(help="Encoder: libx264, libx265, libsvtav1, ffv1, prores_ks, hevc_nvenc, ...")
    ] = "libx264",
    crf: Annotated[
        float | None, typer.Option(min=0, max=255, callback=_finite, help="Quality of the encoder; less is better.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Of the encoder; the profile of prores_ks.")] = None,
    pix_fmt: Annotated[
        str | None, typer.Option("--pix-fmt", help="Pixel format; 4:2:0 with the bits of the input by default.")
    ] = None,
    form: Annotated[str | None, typer.Option("--format", help="Container, where the suffix says nothing.")] = None,
    start: Annotated[str | None, typer.Option(callback=_seconds, help="Begin there: 90, 1:30, 0:01:30.5.")] = None,
    end: Annotated[str | None, typer.Option(callback=_seconds, help="End there.")] = None,
    deinterlace: Annotated[
        bool | None,
        typer.Option(
            "--deinterlace/--no-deinterlace",
            help="Make frames of fields, or take frames as they are; else interlaced ones are refused.",
        ),
    ] = None,
    fps: Annotated[
        str | None, typer.Option(callback=_rate, help="Frames per second of numbered images; 24 by default.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Keep the left half grey.")] = False,
    temporal: Annotated[
        float | None, typer.Option(min=0, max=1, callback=_finite, help="How much colors follow the frame before.")
    ] = None,
    keyframes: Annotated[
        str, typer.Option(callback=_keyframes, help="The network sees every n-th frame; auto: where it changed.")
    ] = "auto",
    motion: Annotated[bool, typer.Option("--motion/--no-motion", help="Move colors along with the picture.")] = True,
    cuts: Annotated[
        Path | None, typer.Option(help="File with the numbers of frames that start a scene; found by default.")
    ] = None,
    hints: Annotated[Path | None, typer.Option(help="JSON file of colors at places, in frames.")] = None,
    palette: Annotated[Path | None, typer.Option(help="File of colors, #rrggbb in a line, that are kept to.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Picture or film whose proportions of colors are taken over.")
    ] = None,
    strength: Annotated[float, typer.Option(min=0, max=1, callback=_finite, help="Of palette and reference.")] = 1.0,
    weights: Weights = None,
    size: Size = None,
    temperature: Temperature = 0.38,
    vividness: Vividness = None,
    saturation: Saturation = 1.0,
    mrf: Mrf = True,
    device: Device = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads of network, decoder and encoder each.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the finished segments of a run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")] = False,
    stats: Annotated[Path | None, typer.Option(help="File for a summary in JSON.")] = None,
    quiet: Quiet = False,
) -> None:
    """Colorize a film.

    The luma planes stay as they are; audio, subtitles, chapters, timestamps
    and rotation are copied. Without --out, film.mp4 becomes film-color.mp4
    beside it; .mov and .mkv stay such too, and others (.mpg, .vob, .m2ts,
    .avi, ...) become .mp4 where players know all streams in it, else .mkv.
    Every ten seconds of film are safe once they are made: after a
    crash or Ctrl-C, the same command with --resume goes on.
    """
    from fastcolor.model.colorizer import BUNDLED
    from fastcolor.video.colorizer import VideoColorizer, VideoOptions
    from fastcolor.video.control import ControlError, load_control
    from fastcolor.video.errors import VideoError
    from fastcolor.video.film import FilmOptions, colorize_film, parts_folder
    from fastcolor.video.reader import is_pipe

    if out is None:
        if is_pipe(source) or "://" in source or "%" in source:
            _refuse(f"--out: is needed for {source}")
        from fastcolor.video.writer import usual_suffix

        path = Path(source)
        out = str(path.with_name(f"{path.stem}-color{usual_suffix(source, codec)}"))
        if not quiet and Path(out).suffix != path.suffix:
            typer.echo(f"writing {out}: {path.suffix or 'no suffix'} does not hold it well", err=True)
    for given, name, stream in ((source, "input", sys.__stdin__), (out, "output", sys.__stdout__)):
        if given == _STREAM and stream is None:  # another file has its number by now
            _refuse(f"{given}: standard {name} is closed")
    if out == _STREAM and os.isatty(1):
        _refuse("--out -: standard output is a terminal, which shows no films; give it a pipe or file")
    if stats is not None and any(stats.resolve() == Path(film).resolve() for film in (source, out)):
        _refuse(f"--stats {stats}: is the film; give another name")
    reporter = Reporter(quiet)
    stop = threading.Event()
    try:
        chosen: dict[str, Any] = {"keyframes": keyframes, "motion": motion}
        if temporal is not None:
            chosen["temporal"] = temporal
        if cuts is not None:
            chosen["cuts"] = read_cuts(cuts)
        how = VideoOptions(**chosen)
        options = FilmOptions(
            codec=codec, crf=crf, preset=preset, pix_fmt=pix_fmt, format=form, start=start, end=end,
            deinterlace=deinterlace, rate=fps, compare=compare, threads=threads or 0,
        )  # fmt: skip
    except ValueError as error:
        _refuse(str(error))
    colour = {"temperature": temperature, "saturation": saturation, "mrf": mrf}
    colour |= {name: value for name, value in (("size", size), ("vividness", vividness)) if value is not None}
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    colorizer = _load(weights, device, colour, ("luma_to_lightness", "mean_field", "render_uv"))
    try:
        control = load_control(colorizer.bins, hints, palette, reference, strength)
        # says what does not fit the network
        control.unary(colorizer.bins, colorizer.checkpoint.prior, colorizer.options.vividness)
    except ControlError as error:
        _refuse(str(error))
    files = {"weights": weights or BUNDLED, "hints": hints, "palette": palette, "reference": reference}
    try:
        reporter.start()
        with _signals(stop, reporter):
            summary = colorize_film(
                source,
                out,
                lambda yuv: VideoColorizer(colorizer, yuv, how, control),
                options,
                identity=_identity(files, colour | {"strength": strength}, how),
                overwrite=overwrite,
                resume=resume,
                stop=stop,
                watch=reporter.watch,
            )
    except VideoError as error:
        reporter.stop()
        reporter.say(f"error: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        reporter.stop()
        kept = parts_folder(Path(out))
        what = "terminated" if isinstance(error, _Terminated) else "interrupted"
        reporter.say(what + (f": finished segments are in {kept}, --resume goes on" if kept.is_dir() else ""))
        raise typer.Exit(143 if isinstance(error, _Terminated) else 130) from None
    finally:
        reporter.stop()
    _conclude(summary, out, stats, reporter)


def _conclude(summary: Summary, out: str, stats: Path | None, reporter: Reporter) -> None:
    from fastcolor._files import atomic_path
    from fastcolor.video.film import parts_folder

    failed = False
    if stats is not None:
        try:
            with atomic_path(stats) as temporary:
                temporary.write_text(json.dumps(summary.stats, indent=1) + "\n")
        except OSError as error:
            reporter.say(f"error: {stats}: cannot be written ({error.strerror or error})")
            failed = True
    for note in () if reporter.quiet else summary.notes:
        reporter.say(f"warning: {note}")
    made = summary.frames - summary.resumed
    if summary.stopped:
        then = "; --resume goes on from there" if parts_folder(Path(out)).is_dir() else ""
        what = f"{out} ends after {summary.frames} frames" if summary.frames else "nothing was written"
        reporter.say(f"interrupted: {what}{then}")
        raise typer.Exit(130)
    if summary.broken_off:
        then = "; finished segments are kept, --resume goes on" if parts_folder(Path(out)).is_dir() else ""
        reporter.say(f"error: {summary.broken_off}; what there is was colorized{then}")
    if not reporter.quiet:
        before = f", {summary.resumed} of them in earlier runs" if summary.resumed else ""
        rate = made / max(summary.seconds, 1e-9)
        typer.echo(
            f"colorized {summary.frames} frames{before} in {summary.seconds:.1f} s ({rate:.1f} fps)",
            err=out == _STREAM,
        )
    if summary.broken_off or failed:
        raise typer.Exit(1)
