"""A film in segments: files of some seconds each that a crash cannot take, and the joining of them.

Beside the output OUT lies a folder OUT.parts while it is made:

    film.json    what the film is made of and how, and the segments that are finished
    000000.nut   the encoded frames of a segment; it starts with a keyframe and refers to no other
    000000.pt    the colorizer's state after it, of the last one only
    run.lock     who is at work there

A segment counts once it stands in film.json, which is replaced as a whole.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from fastcolor._files import FolderInUse, FolderLock, atomic_path
from fastcolor.video.errors import VideoError
from fastcolor.video.reader import Reader
from fastcolor.video.writer import Copier, Encoding, add_film, copy_tags, describe, finish_film, tag

_VERSION = 2
_MANIFEST = "film.json"
_OURS = re.compile(r"film\.json|run\.lock|\.film-.*\.json|\.?\d{6}(-.*)?\.(nut|mov|pt|unfinished)|joined\..*")
_SEGMENT = re.compile(r"\d{6}\.(nut|mov)")
_ENDS = 1 << 20  # bytes from both ends of a file that its fingerprint takes in


@dataclass(frozen=True)
class Part:
    """One finished segment. Times are in the time base of the film."""

    file: str
    frames: int
    start: int
    last: int  # timestamp of the last frame
    end: int  # where the last frame ends
    reorder: int  # frames that may be decoded between a frame's place in time and its place in the file
    whole: bool = True  # False: the film was stopped or broke off in it, so that the next run makes it anew
    done: dict[str, float] = field(default_factory=dict)  # what the film took so far, in all runs: for statistics


def fingerprint(path: str) -> dict[str, Any]:
    """What tells one input file from another without reading all of it. Raises VideoError where it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    except OSError as error:
        raise VideoError(f"{path}: cannot be read to its end ({error.strerror or error})") from error
    return {"bytes": size, "ends": digest.hexdigest()}


class Parts:
    """The segments of one output.

    Args:
        target: the output file.
        recipe: all that the frames depend on, as JSON takes it; a run goes on only with the same, but for
            "deinterlace" of its "options" where that was None.

    Raises:
        VideoError: `resume` with nothing to go on from, or another recipe; segments there without `resume` or
            `overwrite`; a folder that cannot be written, or in which another run is at work until its `release`.
    """

    def __init__(self, target: Path, recipe: dict[str, Any], *, resume: bool, overwrite: bool):
        self.target, self.recipe = target, json.loads(json.dumps(recipe))
        self.folder = parts_folder(target)
        self.parts: list[Part] = []
        self.complete = False
        self.why: str | None = None  # it is complete, though the film could not be read to its end
        self.moved = 0
        self._lock = FolderLock(self.folder)
        try:
            if resume and not (self.folder / _MANIFEST).exists():
                raise VideoError(f"{target}: nothing to resume, there is no {self.folder / _MANIFEST}")
            self._look_for_others()
            self.folder.mkdir(parents=True, exist_ok=True)
            # before film.json is read: another run may be about to replace it. Empty, or why there is none
            self.unlocked = self._lock.hold()
            self._begin(resume, overwrite)
            self._clean()
            self.save()
        except FolderInUse as error:
            raise VideoError(f"{error}; wait for it, or choose another --out") from None
        except OSError as error:
            self.release()
            raise VideoError(f"{self.folder}: cannot be written ({error.strerror or error})") from error
        except BaseException:
            self.release()
            raise

    def _look_for_others(self) -> None:
        foreign = (f.name for f in self.folder.iterdir() if not _OURS.fullmatch(f.name)) if self.folder.exists() else ()
        if name := next(iter(foreign), None):
            raise VideoError(f"{self.folder}: is there with {name}, which is not of a run; it is in the way")

    def _begin(self, resume: bool, overwrite: bool) -> None:
        """Takes over what is there, or sees that it may go."""
        if overwrite and not resume or not (self.folder / _MANIFEST).exists():
            return
        if not resume and not any(_SEGMENT.fullmatch(f.name) for f in self.folder.iterdir()):
            return
        found = self._load()
        if resume:
            self._take_over(found)
        elif found["parts"]:
            frames = sum(p["frames"] for p in found["parts"])
            raise VideoError(
                f"{self.folder}: holds {frames} finished frames of an earlier run; --resume goes on with them, "
                "--overwrite starts over"
            )

    def release(self) -> None:
        self._lock.release()

    def _load(self) -> dict[str, Any]:
        manifest = self.folder / _MANIFEST
        try:
            found = json.loads(manifest.read_text())
            if found["version"] == _VERSION:
                return found
            why = f"it is of version {found['version']}, this fastcolor knows {_VERSION}"
        except (OSError, ValueError, TypeError, KeyError) as error:  # finished segments are not thrown away
            why = getattr(error, "strerror", None) or "it is damaged"
        raise VideoError(f"{manifest}: cannot be resumed from ({why}); --overwrite starts over")

    def _take_over(self, found: dict[str, Any]) -> None:
        before = found["recipe"]
        options = before.get("options", {})
        if (
            options.get("deinterlace", True) is None
        ):  # then none of the frames there was interlaced: any answer suits them
            options["deinterlace"] = self.recipe["options"]["deinterlace"]
        if before != self.recipe:
            changed = sorted(_differences(before, self.recipe))
            raise VideoError(f"{self.target}: cannot be resumed, these are not as they were: {', '.join(changed)}")
        for entry in found["parts"]:
            part = Part(**entry)
            if not part.whole or not (self.folder / part.file).is_file():
                break
            self.parts.append(part)
        self.complete = found["complete"] and len(self.parts) == len(found["parts"])
        self.why = found["why"] if self.complete else None
        self.moved = found["moved"]
        if self.parts and not self.complete and not self._state_file().is_file():
            raise VideoError(f"{self._state_file()}: is missing; --overwrite starts over")

    def _clean(self) -> None:
        """Removes what no finished segment needs."""
        needed = {p.file for p in self.parts} | {_MANIFEST, self._lock.path.name}
        if self.parts:
            needed.add(self._state_file().name)
        for file in self.folder.iterdir():
            if file.name not in needed and _OURS.fullmatch(file.name):
                file.unlink()

    def _state_file(self) -> Path:
        return (self.folder / self.parts[-1].file).with_suffix(".pt")

    def save(self) -> None:
        """Writes film.json."""
        record = {
            "version": _VERSION,
            "recipe": self.recipe,
            "complete": self.complete,
            "why": self.why,
            "moved": self.moved,
            "parts": [asdict(p) for p in self.parts],
        }
        with atomic_path(self.folder / _MANIFEST) as temporary:
            temporary.write_text(json.dumps(record, indent=1))

    @property
    def frames(self) -> int:
        return sum(p.frames for p in self.parts)

    def state(self) -> bytes | None:
        """The colorizer's state after the last finished segment."""
        return self._state_file().read_bytes() if self.parts else None

    def add(self, part: Part, state: bytes, moved: int) -> None:
        """Counts a segment whose file is there."""
        before = self._state_file() if self.parts else None
        self.parts.append(part)
        self.moved = moved
        with atomic_path(self._state_file()) as temporary:
            temporary.write_bytes(state)
        self.save()
        if before is not None and part.whole:  # else the next run starts from the state before
            before.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the folder: the output is there."""
        self.parts = []
        (self.folder / _MANIFEST).unlink(missing_ok=True)  # first: half a folder must not look like a run
        self._clean()
        self.release()  # its file lies there too
        with suppress(OSError):  # somebody's file in it
            self.folder.rmdir()


def parts_folder(target: Path) -> Path:
    return target.with_name(f"{target.name}.parts")


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name} ({before} then, {now} now)"


# --- one segment ------------------------------------------------------------------------------------------------------


def segment_format(codec: str) -> str:
    """A container that keeps any timestamp of the codec's frames: NUT, or QuickTime for what NUT does not know."""
    return "mov" if codec.startswith("prores") else "nut"


class SegmentWriter:
    """Encodes the frames of one segment into a file, which gets its name when it is whole."""

    def __init__(self, folder: Path, index: int, encoding: Encoding):
        form = segment_format(encoding.codec)
        self.path = folder / f"{index:06d}.{form}"
        self._temporary = folder / f"{index:06d}.unfinished"
        self.frames, self.start, self.last, self.end, self.reorder = 0, None, 0, 0, 0
        self._container = av.open(f"file:{self._temporary}", "w", format=form)
        self._stream = add_film(self._container, encoding)
        self._seen: list[int] = []

    def write(self, frame: av.VideoFrame, duration: int) -> None:
        if self.start is None:
            self.start = frame.pts
        self.frames, self.last, self.end = self.frames + 1, frame.pts, frame.pts + duration
        self._mux(self._stream.encode(frame))

    def _mux(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            self.reorder = max(self.reorder, len(self._seen) - bisect.bisect(self._seen, packet.pts))
            bisect.insort(self._seen, packet.pts)
            self._container.mux_one(packet)

    def finish(self, whole: bool, done: dict[str, float] | None = None) -> Part:
        self._mux(self._stream.encode(None))
        self._container.close()
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._temporary, self.path)
        return Part(self.path.name, self.frames, self.start, self.last, self.end, self.reorder, whole, done or {})

    def discard(self) -> None:
        with suppress(av.FFmpegError, OSError):
            self._container.close()
        self._temporary.unlink(missing_ok=True)


# --- joining ----------------------------------------------------------------------------------------------------------


def join(
    parts: Parts,
    form: str,
    reader: Reader,
    encoding: Encoding,
    copier: Copier,
    whole: bool,
    watch: Callable[[int], None] = lambda frames: None,
) -> None:
    """Makes the output of the segments and the other streams of the film, packet by packet, nothing encoded again.

    Args:
        whole: False cuts the other streams where the frames end: the film was stopped, or broke off, there.
        watch: called with the number of frames that are joined, after each packet. What it raises ends the joining,
            which begins anew the next time; the segments stay.

    Raises:
        VideoError: a segment is not as it was written. OSError: the output cannot be written.
    """
    joined = parts.folder / f"joined{parts.target.suffix}"
    info = encoding.info
    first = parts.folder / parts.parts[0].file
    with av.open(f"file:{first}", format=segment_format(encoding.codec)) as template:
        container = av.open(f"file:{joined}", "w", format=form)
        try:
            stream = container.add_stream_from_template(template.streams.video[0], opaque=True)
            context = stream.codec_context
            context.framerate = info.rate
            if info.aspect:
                context.sample_aspect_ratio = info.aspect
            context.reorder_depth = max(p.reorder for p in parts.parts)
            if name := _tag_of(encoding, form):
                context.codec_tag = name
            tag(context, encoding)
            finish_film(stream, info)
            copy_tags(stream, reader)
            copier.add_to(container)
            describe(container, reader)
            end = float(parts.parts[-1].end * info.time_base)
            others = copier.packets(None if whole else end)
            frames = 0
            for packet in heapq.merge(_film_packets(parts, stream, info), others, key=_time):
                frames += packet.stream is stream
                container.mux_one(packet)
                watch(frames)
        except BaseException:
            with suppress(av.FFmpegError, OSError):
                container.close()
            joined.unlink(missing_ok=True)
            raise
        container.close()
    with open(joined, "rb") as file:
        os.fsync(file.fileno())
    os.replace(joined, parts.target)


def _tag_of(encoding: Encoding, form: str) -> str | None:
    """Names of codecs in MP4 and QuickTime that players insist on."""
    if form not in ("mp4", "mov", "ipod"):
        return None
    if encoding.codec.startswith("prores"):
        profiles = {"proxy": "apco", "lt": "apcs", "standard": "apcn", "hq": "apch", "4444": "ap4h", "4444xq": "ap4x"}
        return profiles.get(encoding.options.get("profile", ""))
    return "hvc1" if encoding.codec in ("libx265", "hevc_nvenc") else None


def _time(packet: av.Packet) -> Fraction:
    return packet.dts * packet.time_base


def _film_packets(parts: Parts, stream: av.VideoStream, info) -> Iterator[av.Packet]:
    """The packets of all segments with their timestamps in the film.

    Encoders start a segment's decoding times some frames before its first frame, where those of the segment before
    still run. So they are made anew: the i-th packet is decoded at the time of frame i − d, d the deepest reordering.
    """
    depth = max(p.reorder for p in parts.parts)
    step = max(1, round(1 / (info.rate * info.time_base)))
    start = parts.parts[0].start
    ahead: list[int] = []
    count = 0
    for part in parts.parts:
        times, form = _times(parts.folder / part.file, part, info.time_base)
        shown = sorted(times)
        if len(shown) != part.frames or shown[-1] != part.last:
            raise VideoError(
                f"{parts.folder / part.file}: holds {len(shown)} frames to {shown[-1] if shown else None}, "
                f"expected {part.frames} to {part.last}; --overwrite starts over"
            )
        durations = dict(zip(shown, (b - a for a, b in zip(shown, [*shown[1:], part.end], strict=True)), strict=True))
        with av.open(f"file:{parts.folder / part.file}", format=form) as source:
            packets = (p for p in source.demux(video=0) if p.size)
            for packet, pts in zip(packets, times, strict=True):
                heapq.heappush(ahead, pts)
                dts = start - (depth - count) * step if count < depth else heapq.heappop(ahead)
                count += 1
                packet.stream, packet.time_base = stream, info.time_base
                packet.pts, packet.dts, packet.duration = pts, dts, durations[pts]
                yield packet


def _times(path: Path, part: Part, tick: Fraction) -> tuple[list[int], str]:
    """Timestamps in the film of a segment's packets, in the order of the file."""
    form = path.suffix[1:]
    try:
        with av.open(f"file:{path}", format=form) as source:
            stream = source.streams.video[0]
            read = [p.pts for p in source.demux(stream) if p.size]
            ratio = stream.time_base / tick
    except (av.FFmpegError, OSError, IndexError) as error:
        raise VideoError(f"{path}: cannot be read again ({error}); --overwrite starts over") from error
    return [part.start + round((pts - read[0]) * ratio) for pts in read], form
