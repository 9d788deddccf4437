"""A whole film: a thread that reads, one that colours, one that writes."""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import av
import torch
from av.format import Flags as FormatFlags
from torch import Tensor

from fastcolor.video.errors import VideoError
from fastcolor.video.pipe import NobodyReads, Pipe
from fastcolor.video.pipeline import Channel, Pipeline
from fastcolor.video.reader import STREAM, Picture, Reader, clock, is_pipe, is_sequence, numbered_files
from fastcolor.video.segments import Parts, SegmentWriter, fingerprint, join, parts_folder
from fastcolor.video.sequence import ImageWriter, image_pixels
from fastcolor.video.writer import (
    Copier,
    Encoding,
    add_film,
    choose_encoding,
    convert_bits,
    copy_tags,
    describe,
    format_of,
    is_named,
    make_frame,
)
from fastcolor.yuv import YuvFormat

HDR = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}  # transfers, numbered as in ITU-T H.273
QUEUE = 8  # pictures that wait between two threads
# Matroska has the shape of samples from the muxer's own field, which PyAV does not set; these streams carry it
ASPECT_INSIDE = {"libx264", "libx265", "h264_nvenc", "hevc_nvenc", "mpeg4", "mpeg2video"}


class ColorsFrames(Protocol):
    """What a film needs of `VideoColorizer`."""

    def push(self, luma: Tensor) -> list[tuple[Tensor, Tensor]]: ...
    def flush(self) -> list[tuple[Tensor, Tensor]]: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


@dataclass(frozen=True)
class FilmOptions:
    """How a film is read and written.

    codec, crf, preset, pix_fmt: of the encoder; None takes what suits it (`writer.CODECS`).
    format: container, by the suffix of the output where it is None.
    start, end: seconds of the part that is coloured.
    deinterlace: as of `Reader`.
    rate: frames per second of an image sequence.
    compare: the left half stays grey.
    threads: of decoder and encoder each; 0 leaves it to FFmpeg.
    segment: seconds of film after which what was made is safe.
    """

    codec: str = "libx264"
    crf: float | None = None
    preset: str | None = None
    pix_fmt: str | None = None
    format: str | None = None
    start: float | None = None
    end: float | None = None
    deinterlace: bool | None = None
    rate: Fraction | None = None
    compare: bool = False
    threads: int = 0
    segment: float = 10.0

    def __post_init__(self):
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ValueError(f"end must come after start, got {self.end} and {self.start}")
        for name in ("start", "end"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not self.segment > 0:
            raise ValueError(f"segment must be positive, got {self.segment}")


@dataclass
class Status:
    """How far a run is. Whoever watches it reads alone."""

    expected: int = 0  # frames of the whole film, 0 where nothing is known
    resumed: int = 0  # that were there already
    read: int = 0
    written: int = 0  # given to the encoder, those that were there included
    queues: tuple[tuple[int, int], tuple[int, int]] = ((0, QUEUE), (0, QUEUE))  # (items, limit) before and after
    joined: int | None = None  # frames, once all are written and segments are put together


@dataclass
class Summary:
    """What a run did; `stats` is for the JSON file."""

    frames: int = 0
    resumed: int = 0
    seconds: float = 0.0
    stopped: bool = False  # by `stop`, before the end of the film
    broken_off: str | None = None  # what kept the film from its end
    notes: list[str] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Coloured:
    picture: Picture
    luma: Tensor
    u: Tensor
    v: Tensor


@dataclass
class _Cut:
    """The end of a segment. `state` is the colorizer's; `whole` is False where the film was stopped in it; `done` is
    `_Film._done` by then."""

    state: bytes
    whole: bool
    moved: int
    done: dict[str, float]


def colorize_film(
    source: str,
    target: str,
    make: Callable[[YuvFormat], ColorsFrames],
    options: FilmOptions | None = None,
    *,
    identity: dict[str, Any] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    stop: threading.Event | None = None,
    watch: Callable[[Status], None] | None = None,
) -> Summary:
    """Colours a film: a file, a numbered image sequence, or a stream.

    The luma planes go into the output as they came out of the decoder, with new U and V. What is made is kept in
    segments beside the output until it is joined (`fastcolor.video.segments`); pipes are written as they come.

    Args:
        source, target: file names, patterns such as frames/%06d.png, or "-" for standard input and output.
        make: makes the colorizer for the format of the output.
        identity: what tells the colorizer and its options from others, as JSON takes it; a film is resumed with the
            same alone.
        overwrite: replace an output that is there.
        resume: go on with the segments of an earlier run.
        stop: when set, the film ends with the frame that is being read, and plays.
        watch: called now and then on the calling thread.

    Raises:
        VideoError: the film cannot be read or written as asked. Finished segments are kept.
    """
    options = options or FilmOptions()
    film = _Film(source, target, make, options, identity or {}, stop or threading.Event(), watch)
    try:
        return film.run(overwrite, resume)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise VideoError(f"{error.filename or target}: {error.strerror or error}") from error


class _Film:
    def __init__(self, source, target, make, options: FilmOptions, identity, stop: threading.Event, watch):
        self.source, self.target, self.make, self.options = source, target, make, options
        self.identity, self.stop, self.watch = identity, stop, watch
        self.images = is_sequence(target)
        # what cannot be read twice, or not be joined, goes straight to its place
        self.segmented = not self.images and target != STREAM and not is_pipe(source) and "://" not in source
        self.status, self.summary, self.pipeline = Status(), Summary(), Pipeline()
        self.read_out = False  # whether the reader came to its end, that of the film or before
        self.busy = {"colour": 0.0, "write": 0.0}  # seconds
        self.before: dict[str, float] = {}  # `_done` of earlier runs, up to where this one goes on

    def run(self, overwrite: bool, resume: bool) -> Summary:
        self.started = time.monotonic()
        options, summary = self.options, self.summary
        form = "image2" if self.images else format_of(self.target, options.format)
        self._check_target(overwrite, resume)
        with Reader(
            self.source,
            start=options.start,
            end=options.end,
            deinterlace=options.deinterlace,
            rate=options.rate,
            threads=options.threads,
            copies=not self.segmented and not self.images,
        ) as reader:
            info = reader.info
            if self.images:
                encoding = Encoding("", {}, image_pixels(self.target, info.bits), info, options.threads)
            else:
                encoding = choose_encoding(
                    info, options.codec, options.crf, options.preset, options.pix_fmt, options.threads
                )
                self._check_container(form, encoding)
            if encoding.pixels.bits < info.bits:
                summary.notes.append(f"luma goes from {info.bits} to {encoding.pixels.bits} bits ({options.codec})")
            if (hdr := HDR.get(info.colours.transfer)) is not None:
                summary.notes.append(f"the film is {hdr}: colours are made as for BT.709's transfer")
            if info.aspect not in (None, 1) and form in ("matroska", "webm") and encoding.codec not in ASPECT_INSIDE:
                summary.notes.append(
                    f"samples of {info.aspect.numerator}:{info.aspect.denominator} are not noted: {encoding.codec} in "
                    f"{form} cannot have it from here; .mov and .mp4 can, and libx264 and libx265"
                )
            self.reader, self.encoding = reader, encoding
            copier = None if self.images else Copier(reader, form)
            self.status.expected = info.frames
            parts = None
            if self.segmented:
                parts = Parts(Path(self.target), self._recipe(), resume=resume, overwrite=overwrite)
                self.status.resumed = self.status.written = summary.resumed = parts.frames
                self.before = parts.parts[-1].done if parts.parts else {}
                if parts.unlocked:
                    summary.notes.append(f"{parts.unlocked}: nothing keeps a second run out of {parts.folder}")
                sink = _Segments(parts, encoding)
            elif self.images:
                sink = _Images(self.target, encoding)
            else:
                sink = _Stream(self.target, form, reader, encoding, copier, self._over)
            try:
                if parts is None or not parts.complete:
                    self._work(sink, parts)
                if parts is not None:
                    self._join(parts, form, copier)
            except NobodyReads as error:
                if not self.stop.is_set():
                    raise VideoError(self._failed(error, parts)) from error
                summary.stopped = True
                summary.notes.append("standard output: nobody reads it, its end is missing")
            except (OSError, av.FFmpegError) as error:  # a full disk, mostly
                raise VideoError(self._failed(error, parts)) from error
            finally:
                if not self.pipeline.busy("write"):  # nothing may be closed under it
                    sink.discard()
                if parts is not None:
                    parts.release()
            self._account(reader, copier, parts)
        summary.frames = self.status.written
        summary.seconds = time.monotonic() - self.started
        self._stats(summary)
        return summary

    def _check_target(self, overwrite: bool, resume: bool) -> None:
        target = Path(self.target)
        if self.target == STREAM or self.images:
            if resume:
                raise VideoError("--resume: needs an output file; streams and images are written as they come")
            if self.images:
                there = numbered_files(self.target)
                if there and not overwrite:
                    raise VideoError(f"{self.target}: there are {len(there)} such images; --overwrite replaces them")
                films = numbered_files(self.source).values() if is_sequence(self.source) else [Path(self.source)]
                if {f.resolve() for f in there.values()} & {f.resolve() for f in films}:
                    raise VideoError(f"{self.target}: are the images of the film itself; give another --out")
                _make_folder(target.parent)
            return
        if resume and not self.segmented:
            raise VideoError(f"--resume: {self.source} cannot be read a second time")
        if target.is_dir():
            raise VideoError(f"{target}: is a folder, expected the name of a film")
        if target.exists() and not target.is_file():  # it would be replaced, with --overwrite
            raise VideoError(f"{target}: is no ordinary file; for a pipe there is --out -")
        if self.source != STREAM and target.exists() and Path(self.source).exists() and target.samefile(self.source):
            raise VideoError(f"{target}: is the film itself; give another --out")
        if target.exists() and not overwrite and not (resume and parts_folder(target).is_dir()):
            raise VideoError(f"{target}: is there already; --overwrite replaces it")
        _make_folder(target.parent)

    def _check_container(self, form: str, encoding: Encoding) -> None:
        trial = av.open(io.BytesIO(), "w", format=form)
        try:
            add_film(trial, encoding)
            trial.start_encoding()  # some say so in their header alone
        except (av.FFmpegError, ValueError, OSError) as error:
            raise VideoError(f"{self.target}: {form} cannot hold {encoding.codec}; .mkv holds any") from error
        finally:
            with suppress(av.FFmpegError, OSError):  # nothing was written into it
                trial.close()
        if not is_named(av.Codec(encoding.codec, "w"), form):
            raise VideoError(f"{self.target}: {form} has no name for {encoding.codec}; .mkv holds any")
        flags, fixed = trial.format.flags, trial.format.name in ("avi", "asf")
        if not encoding.info.steady and (fixed or flags & FormatFlags.no_timestamps.value):
            self.summary.notes.append(f"{form} has one frame rate for all: timestamps of a variable one are not kept")

    def _recipe(self) -> dict[str, Any]:
        options = asdict(self.options)
        for name in ("threads", "format", "rate"):
            del options[name]
        options["rate"] = str(self.options.rate)
        options["pix_fmt"], options["encoder"] = self.encoding.pixels.name, self.encoding.options
        source = self.source
        if is_sequence(source):
            files = list(numbered_files(source).values())
            film = {"images": len(files), "first": fingerprint(files[0]), "last": fingerprint(files[-1])}
        else:
            film = fingerprint(source)
        return {"film": film, "options": options, "colour": self.identity}

    # --- the pipeline -------------------------------------------------------------------------------------------------

    def _work(self, sink, parts: Parts | None) -> None:
        pipeline = self.pipeline
        read: Channel[Picture | av.Packet] = Channel(pipeline, QUEUE)
        coloured: Channel[_Coloured | _Cut | av.Packet] = Channel(pipeline, QUEUE)
        self.channels = read, coloured
        info, pixels = self.reader.info, self.encoding.pixels
        colorizer = self.make(info.colours.yuv(pixels.subsampling, pixels.bits))
        self.colorizer = colorizer
        after, skip = None, 0
        if parts is not None and parts.parts:
            colorizer.load_state_dict(torch.load(io.BytesIO(parts.state()), weights_only=True))
            after, skip = parts.parts[-1].last, parts.frames if parts.moved else 0

        def reading() -> None:
            items = self.reader.frames(after, skip)
            for item in items:
                if self.stop.is_set():
                    break
                self.status.read += isinstance(item, Picture)
                read.put(item)
            else:
                self.read_out = True
            read.put(None)

        def writing() -> None:
            for item in coloured.items():
                since = time.perf_counter()
                if isinstance(item, _Cut):
                    sink.cut(item)
                elif isinstance(item, av.Packet):
                    sink.copy(item)
                else:
                    sink.write(item)
                    self.status.written += 1
                self.busy["write"] += time.perf_counter() - since
            sink.finish()  # here, as it may have to wait: the main thread sees signals

        pipeline.start("read", reading)
        pipeline.start("write", writing)
        try:
            self._colour(colorizer, read, coloured)
        except BaseException as error:
            pipeline.fail(error)
        try:
            self.reader.free = pipeline.finish(self.stop)
        except BaseException:
            self.reader.free = not pipeline.busy("read")
            raise
        self.summary.stopped = not self.read_out
        if parts is not None and self._whole():
            parts.complete, parts.why = True, self.reader.ended.why
            parts.save()

    def _over(self) -> bool:
        """Whether the run was stopped, or has failed."""
        return self.stop.is_set() or self.pipeline.error is not None

    def _whole(self) -> bool:
        """Whether all that can be had of the film was read: no later run would find more."""
        return self.read_out and not self.reader.ended.passing

    def _colour(self, colorizer: ColorsFrames, read: Channel, coloured: Channel) -> None:
        options, info, pixels = self.options, self.reader.info, self.encoding.pixels
        waiting: deque[tuple[Picture, Tensor]] = deque()
        began = None  # timestamp of the segment's first frame

        def hand_on(work: Callable[[], list[tuple[Tensor, Tensor]]]) -> None:
            since = time.perf_counter()
            planes = work()
            self.busy["colour"] += time.perf_counter() - since
            for u, v in planes:
                picture, luma = waiting.popleft()
                if options.compare:
                    for plane in (u, v):
                        # by way of numpy: torch refuses to change what was made in inference mode
                        plane.numpy()[:, : plane.shape[1] // 2] = 1 << (pixels.bits - 1)
                coloured.put(_Coloured(picture, luma, u, v))

        def cut(whole: bool) -> None:
            hand_on(colorizer.flush)
            state = io.BytesIO()
            torch.save(colorizer.state_dict(), state)
            coloured.put(_Cut(state.getvalue(), whole, self.reader.ended.moved, self._done()))

        for item in read.items(self.stop):
            if isinstance(item, av.Packet):
                coloured.put(item)
                continue
            if began is not None and (item.pts - began) * info.time_base >= options.segment:
                cut(True)
                began = None
            began = item.pts if began is None else began
            luma = convert_bits(item.luma, info.bits, pixels.bits, info.colours.full_range)
            waiting.append((item, luma))
            hand_on(partial(colorizer.push, luma))
            self.status.queues = (len(read), read.limit), (len(coloured), coloured.limit)
            if self.watch:
                self.watch(self.status)
        if began is not None:
            cut(self._whole())
        coloured.put(None)

    def _join(self, parts: Parts, form: str, copier: Copier) -> None:
        if not parts.parts:
            parts.remove()
            if self.summary.stopped:
                return
            why = f" ({self.reader.ended.why})" if self.reader.ended.why else ""
            raise VideoError(f"{self.source}: has no frames{why}")
        whole = parts.complete

        def watch(frames: int) -> None:
            self.status.joined = frames
            if self.watch:
                self.watch(self.status)

        watch(0)
        join(parts, form, self.reader, self.encoding, copier, whole, watch)
        if whole:
            parts.remove()

    def _failed(self, error: OSError | av.FFmpegError, parts: Parts | None) -> str:
        if self.target == STREAM and isinstance(error, BrokenPipeError):
            return f"standard output: was closed by who read it, after {self.status.written} frames"
        reason = error.strerror or str(error)
        kept = ""
        if parts is not None and parts.parts:
            kept = f"; {parts.frames} finished frames are kept in {parts.folder}, --resume goes on with them"
        label = "standard output" if self.target == STREAM else self.target
        return f"{label}: cannot be written ({reason}){kept}"

    # --- what happened ------------------------------------------------------------------------------------------------

    def _account(self, reader: Reader, copier: Copier | None, parts: Parts | None) -> None:
        summary, ended = self.summary, reader.ended
        guessed = [g for g in reader.info.colours.guessed if g != "primaries"]
        if copier is not None:
            summary.notes += copier.left_out
            if copier.moved:
                summary.notes.append(f"{copier.moved} packets of other streams had timestamps that did not rise")
        if ended.moved:
            summary.notes.append(f"{ended.moved} frames had no timestamp of their own, and got one")
        if ended.damaged:
            summary.notes.append(f"{ended.damaged} damaged packets were met")
        if self.images and (left := [f for n, f in numbered_files(self.target).items() if n > self.status.written]):
            summary.notes.append(f"{len(left)} images were there before and are not of this film, from {left[0]} on")
        summary.stats["guessed"] = guessed
        if summary.stopped:
            return
        at = ended.at if not parts or not parts.parts else float(parts.parts[-1].end * reader.info.time_base)
        why = ended.why or (parts.why if parts is not None else None)
        if why:
            summary.broken_off = f"{reader.label}: ends at {clock(at)}: {why}"
            return
        missing = reader.missing(at, copier.end if copier is not None and not copier.left_out else None)
        if missing:
            early = f"{missing:.1f} s before the end that its header gives"
            summary.broken_off = f"{reader.label}: is cut off: ends at {clock(at)}, {early}"

    def _done(self) -> dict[str, float]:
        """Seconds and counts of the film, in this run and in earlier ones, without what they threw away."""
        stats = getattr(getattr(self, "colorizer", None), "stats", None)
        now = {"runs": 1, "seconds": time.monotonic() - self.started}
        now |= {f"stage {k}": s for k, s in {"read": self.reader.seconds, **self.busy}.items()}
        if stats is not None:
            now |= {"network_runs": stats.network, "cuts": stats.cuts}
            now |= {f"step {k}": s for k, s in stats.seconds.items()}
        return {k: self.before.get(k, 0) + now.get(k, 0) for k in {**self.before, **now}}

    def _stats(self, summary: Summary) -> None:
        """All runs of the film together, but for what is named after the last. fps by stage: frames over the seconds
        that the stage worked."""
        done, made = self._done(), summary.frames - summary.resumed

        def parts_of(kind: str) -> dict[str, float]:
            return {k.removeprefix(kind): round(s, 3) for k, s in done.items() if k.startswith(kind)}

        stages = parts_of("stage ")
        waits = {}
        if hasattr(self, "channels"):
            read, coloured = self.channels
            waits = {
                "reader for room": read.waited_to_put,
                "colorizer for frames": read.waited_to_get,
                "colorizer for room": coloured.waited_to_put,
                "writer for frames": coloured.waited_to_get,
            }
        summary.stats |= {
            "frames": summary.frames,
            "resumed": summary.resumed,
            "runs": done["runs"],
            "seconds": round(done["seconds"], 3),
            "fps": round(summary.frames / max(done["seconds"], 1e-9), 3),
            "fps_by_stage": {k: round(summary.frames / s, 3) for k, s in stages.items() if s > 0},
            "seconds_by_stage": stages,
            "last_run": {
                "frames": made,
                "seconds": round(summary.seconds, 3),
                "seconds_waited": {k: round(s, 3) for k, s in waits.items()},
                "peak_memory_bytes": peak_memory(),
            },
            "stopped": summary.stopped,
            "broken_off": summary.broken_off,
            "notes": summary.notes,
            "encoder": {"codec": self.encoding.codec, "pixels": self.encoding.pixels.name, **self.encoding.options},
        }
        if "network_runs" in done:
            summary.stats |= {k: done[k] for k in ("network_runs", "cuts")}
            summary.stats["colour_seconds_by_step"] = parts_of("step ")


def peak_memory() -> int | None:
    """Bytes of this process that were in memory together, at most; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VideoError(f"{folder}: cannot be made ({error.strerror or error})") from error
    if not os.access(folder, os.W_OK):
        raise VideoError(f"{folder}: cannot be written to")


# --- where frames go --------------------------------------------------------------------------------------------------


class _Segments:
    """Into segments, which are joined at the end."""

    def __init__(self, parts: Parts, encoding: Encoding):
        self.parts, self.encoding = parts, encoding
        self._now: SegmentWriter | None = None

    def write(self, item: _Coloured) -> None:
        if self._now is None:
            self._now = SegmentWriter(self.parts.folder, len(self.parts.parts), self.encoding)
        picture = item.picture
        self._now.write(make_frame(item.luma, item.u, item.v, picture.pts, self.encoding), picture.duration)

    def cut(self, item: _Cut) -> None:
        self.parts.add(self._now.finish(item.whole, item.done), item.state, item.moved)
        self._now = None

    def copy(self, packet: av.Packet) -> None:
        raise AssertionError("the other streams are copied when the segments are joined")

    def finish(self) -> None:
        pass

    def discard(self) -> None:
        if self._now is not None:
            self._now.discard()


class _Stream:
    """Into a container at once: a pipe, or a file from a pipe."""

    def __init__(
        self, target: str, form: str, reader: Reader, encoding: Encoding, copier: Copier, over: Callable[[], bool]
    ):
        self.target, self.encoding, self.copier = target, encoding, copier
        self._temporary, self._pipe = (None, Pipe(1, over)) if target == STREAM else (_beside(Path(target)), None)
        self._container = av.open(self._pipe or f"file:{self._temporary}", "w", format=form)
        self._stream = add_film(self._container, encoding)
        copy_tags(self._stream, reader)
        copier.add_to(self._container)
        describe(self._container, reader)
        self._durations: dict[int, int] = {}

    def write(self, item: _Coloured) -> None:
        picture = item.picture
        self._durations[picture.pts] = picture.duration
        self._mux(self._stream.encode(make_frame(item.luma, item.u, item.v, picture.pts, self.encoding)))

    def _mux(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            packet.duration = self._durations.pop(packet.pts, packet.duration)
            self._container.mux_one(packet)

    def copy(self, packet: av.Packet) -> None:
        made = self.copier.copy(packet)
        if made is not None:
            self._container.mux_one(made)

    def cut(self, item: _Cut) -> None:
        pass

    def finish(self) -> None:
        self._mux(self._stream.encode(None))
        self._container.close()
        if self._temporary is not None:
            os.replace(self._temporary, self.target)
            self._temporary = None

    def discard(self) -> None:
        if self._pipe is not None:  # closing writes, where it was not done yet
            self._pipe.broken = self._pipe.broken or OSError(errno.EPIPE, "the run is over")
        with suppress(av.FFmpegError, OSError):
            self._container.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.stem[:80]}-{os.getpid()}{target.suffix}")


class _Images:
    """Into numbered files."""

    def __init__(self, target: str, encoding: Encoding):
        self._writer = ImageWriter(target, 1, encoding)

    def write(self, item: _Coloured) -> None:
        self._writer.write(item.luma, item.u, item.v, item.picture.pts)

    def cut(self, item: _Cut) -> None:
        pass

    def copy(self, packet: av.Packet) -> None:
        pass

    def finish(self) -> None:
        self._writer.finish()

    def discard(self) -> None:
        pass
