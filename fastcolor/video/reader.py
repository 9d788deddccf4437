"""Films in: luma planes as they were decoded, their times, and all that belongs to the file."""

from __future__ import annotations

import errno
import math
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from av.format import Flags as FormatFlags
from torch import Tensor

from fastcolor.video.errors import VideoError
from fastcolor.video.tags import FULL, Colours, read_colours

STREAM = "-"  # the name of standard input and output
IMAGES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
_PATTERN = re.compile(r"%(0\d+)?d")
_TEXT = {"tty", "bin", "xbin", "adf", "idf"}  # FFmpeg shows text as video
_WITH_DURATION = {"mov", "mp4", "matroska", "webm", "avi", "flv", "asf", "mxf"}  # what their headers say is not a guess
_LEAD = 2.0  # seconds before the wanted frame to which is sought, so that decoder and filter are in step by then
_INTERLACED = "--deinterlace makes frames of its fields, --no-deinterlace takes the frames as they are"
_PROBED = 30.0  # seconds from which on a film is looked into for interlaced frames before it is begun
_SHORT = 1.0  # seconds that may be missing of the duration that the header gives
# Of disks, drives that were pulled out, and networks. A file that is cut off, or damaged, gives none of these.
_PASSING = {
    errno.EIO, errno.ENXIO, errno.ENODEV, errno.EACCES, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN,
    errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENOMEM,
}  # fmt: skip


@dataclass(frozen=True)
class FilmInfo:
    """What is known of a film before its frames are read."""

    name: str
    width: int
    height: int
    bits: int  # of the luma samples
    colours: Colours
    time_base: Fraction
    rate: Fraction  # frames per second, the nominal number
    steady: bool  # whether frames seem to come at that rate all along
    aspect: Fraction | None  # of a sample
    matrix: tuple[int, ...] | None  # display matrix, nine numbers as FFmpeg has them
    frames: int  # expected, 0 where nothing is known
    duration: float  # seconds of what is to be read, 0 where nothing is known
    codec: str


@dataclass(eq=False)
class Picture:
    """A frame on its way. `luma` may look into the decoder's memory: it is never written to."""

    luma: Tensor  # [H, W] uint8, or uint16 above 8 bits
    pts: int  # in the time base of the film
    duration: int
    number: int  # of the frame in this run, from 0
    rgb: Tensor | None = None  # [H, W, 3] uint8, of a reader that was asked for it


@dataclass
class End:
    """How reading ended: `why` says what kept it from the end of the film, None where it got there."""

    why: str | None = None
    passing: bool = False  # the film itself goes on there: another run may read it, maybe with other options
    at: float = 0.0  # seconds
    damaged: int = 0  # packets and frames that the decoder found damaged
    moved: int = 0  # frames whose timestamps did not rise and were moved
    notes: list[str] = field(default_factory=list)


def may_pass(error: OSError | av.FFmpegError) -> bool:
    """Whether an error in reading is not of the film, but of the disk or network that it lies on."""
    return isinstance(error, OSError) and error.errno in _PASSING


def clock(seconds: float) -> str:
    """Seconds as 1:02:03.4."""
    tenths = round(seconds * 10)
    return f"{tenths // 36000}:{tenths // 600 % 60:02}:{tenths // 10 % 60:02}.{tenths % 10}"


def is_sequence(name: str) -> bool:
    """Whether it names images by number, such as frames/%06d.png."""
    return Path(name).suffix.lower() in IMAGES and _PATTERN.search(Path(name).name) is not None


def is_pipe(name: str) -> bool:
    """Whether it can be read once: standard input, and pipes with a name, such as those of a shell's <(...)."""
    path = Path(name)
    with suppress(OSError):  # what is wrong with a name is said where it is opened
        return name == STREAM or path.is_fifo() or path.is_char_device() or path.is_socket()
    return False


def url(name: str) -> str:
    """A file name as FFmpeg takes it: with no protocol in it but its own."""
    return "pipe:0" if name == STREAM else name if "://" in name else f"file:{name}"


class Reader:
    """One film, opened; `frames` reads it.

    Args:
        name: a file, a numbered image sequence, an address that FFmpeg knows, or "-" for standard input.
        start, end: seconds from the beginning of the film; only frames in between are read. The film then begins at 0.
        deinterlace: True weaves fields into frames (bwdif), False takes frames as they are, None ends the film before
            the first that is interlaced (`End.why`), and refuses it where that is the first of all.
        rate: frames per second of an image sequence.
        threads: of the decoder; 0 is FFmpeg's own choice.
        copies: whether `frames` gives the packets of the other streams too, as they come.
        rgb: whether pictures have their colours too, to compare with.

    Raises:
        VideoError: it cannot be read.
    """

    def __init__(
        self,
        name: str,
        *,
        start: float | None = None,
        end: float | None = None,
        deinterlace: bool | None = None,
        rate: Fraction | None = None,
        threads: int = 0,
        copies: bool = False,
        rgb: bool = False,
    ):
        self.name, self.start, self.end = name, start, end
        self.deinterlace, self.rate, self.threads, self.copies, self.rgb = deinterlace, rate, threads, copies, rgb
        self.label = "standard input" if name == STREAM else name
        self.ended = End()
        self.seconds = 0.0  # spent in reading and decoding
        self.free = True  # False while a thread hangs in a read: then nothing may be closed
        self._first_number = _first_number(name) if is_sequence(name) else None
        self.container = self._open()
        self.stream = self._choose_stream()
        self.offset = Fraction(0)  # seconds that are taken off all timestamps
        origin = Fraction(self.container.start_time or 0, av.time_base)
        # the clocks of broadcasts and discs start anywhere
        if self.container.format.flags & FormatFlags.ts_discont.value:
            self.offset = origin
        self.begin = None
        if start is not None:
            tick = self.stream.time_base
            self.begin = origin + round(Fraction(start) / tick) * tick
            self.offset = self.begin
        self.until = None if end is None else origin + Fraction(end)
        self._items = self._read(None)
        self._head: list[Picture | av.Packet] = []
        self.info = self._look()

    # --- opening ------------------------------------------------------------------------------------------------------

    def _open(self) -> av.container.InputContainer:
        options, form = {}, None
        if self._first_number is not None:
            form = "image2"
            options = {"framerate": str(self.rate or 24), "start_number": str(self._first_number)}
        elif self.name != STREAM and "://" not in self.name:
            path = Path(self.name)
            if not path.exists():
                raise VideoError(f"{self.name}: no such file")
            if path.is_dir():
                raise VideoError(f"{self.name}: is a folder, expected a film, or a pattern such as {path / '%06d.png'}")
        try:
            container = av.open(url(self.name), format=form, options=options, metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise VideoError(f"{self.label}: cannot be read as a film ({reason})") from error
        if container.format.name in _TEXT:
            raise VideoError(f"{self.label}: is text, not a film")
        return container

    def _choose_stream(self) -> av.VideoStream:
        from av.stream import Discard, Disposition

        films = [s for s in self.container.streams.video if not s.disposition & Disposition.attached_pic]
        if not films:
            kinds = ", ".join(sorted({s.type for s in self.container.streams})) or "nothing that FFmpeg knows"
            raise VideoError(f"{self.label}: has no video in it, only {kinds}")
        if films[0].codec_context is None:
            raise VideoError(f"{self.label}: no decoder for its video in this FFmpeg")
        chosen = next((s for s in films if s.disposition & Disposition.default), films[0])
        chosen.thread_type = "AUTO"
        chosen.codec_context.thread_count = self.threads
        if not self.copies:
            for stream in self.container.streams:
                if stream is not chosen:
                    stream.discard = Discard.all
        return chosen

    def _look(self) -> FilmInfo:
        """Reads up to the first frame, which is kept."""
        self._colours: Colours | None = None
        for item in self._items:
            self._head.append(item)
            if isinstance(item, Picture):
                break
        else:
            why = f" ({self.ended.why})" if self.ended.why else ""
            part = " in the part asked for" if self.start is not None or self.end is not None else ""
            raise VideoError(f"{self.label}: has no frames{part}{why}")
        stream, luma = self.stream, self._head[-1].luma
        rate = self._rate()
        duration = self._duration()
        of_file = self._first_number is None and not is_pipe(self.name) and "://" not in self.name
        if of_file and self.deinterlace is None and duration >= _PROBED:
            self._probe(duration)
        return FilmInfo(
            name=self.label,
            width=luma.shape[1],
            height=luma.shape[0],
            bits=self._bits,
            colours=self._colours,
            time_base=stream.time_base,
            rate=rate,
            steady=self._first_number is not None or stream.average_rate == stream.base_rate == rate,
            aspect=stream.sample_aspect_ratio or None,
            matrix=self._matrix,
            frames=self._expected(rate, duration),
            duration=duration,
            codec=stream.codec_context.name,
        )

    def _probe(self, duration: float) -> None:
        """Looks for interlaced frames at some places: better here than after an hour of work. `_read` sees all."""
        with suppress(av.FFmpegError, OSError), av.open(url(self.name), metadata_errors="replace") as film:
            stream, begin = film.streams[self.stream.index], self.begin
            begin = Fraction(film.start_time or 0, av.time_base) if begin is None else begin
            for i in range(5):
                film.seek(int((begin + Fraction(duration * (2 * i + 1) / 10)) * av.time_base))
                frame = next((f for packet in islice(film.demux(stream), 100) for f in packet.decode()), None)
                if frame is not None and frame.interlaced_frame:
                    at = "" if frame.time is None else f" at {clock(frame.time - float(self.offset))}"
                    raise VideoError(f"{self.label}: is interlaced{at}, though not in its first frame; {_INTERLACED}")

    def _rate(self) -> Fraction:
        for rate in (self.stream.guessed_rate, self.stream.average_rate, self.stream.base_rate):
            if rate and 0 < rate <= 240:  # more are the ticks of a clock
                return rate
        return Fraction(25)

    def _duration(self) -> float:
        """Seconds from the first frame that is wanted to the last."""
        whole = self._whole()
        if whole is None:
            return 0.0
        return max(0.0, (whole if self.end is None else min(whole, self.end)) - (self.start or 0))

    def _whole(self) -> float | None:
        if self.stream.duration:
            return float(self.stream.duration * self.stream.time_base)
        return self.container.duration / av.time_base if self.container.duration else None

    def _expected(self, rate: Fraction, duration: float) -> int:
        if self._first_number is not None and self.start is None and self.end is None:
            return len(numbered_files(self.name))
        if self.stream.frames and self.start is None and self.end is None:
            return self.stream.frames
        return round(duration * (self.stream.average_rate or rate))

    # --- reading ------------------------------------------------------------------------------------------------------

    def frames(self, after: int | None = None, skip: int = 0) -> Iterator[Picture | av.Packet]:
        """The frames in order, each once; with `copies` the packets of the other streams too.

        Args:
            after: the timestamp of a frame; only later ones are given. It needs a file, to be opened again.
            skip: instead of `after`, how many frames to leave out, where timestamps tell nothing (`End.moved`).
        """
        if after is not None or skip:
            self._items.close()
            self._reopen()
            self.ended = End()
            head, items = [], self._read(None if skip else after, skip)
        else:
            head, items = self._head, self._items
        self._head = []
        yield from head
        del head[:]  # the frames in it are big
        yield from items

    def _read(self, after: int | None, skip: int = 0, seek: bool = True) -> Iterator[Picture | av.Packet]:
        """Decodes, filters, and stamps. A film that breaks off, or changes its size, ends there: `ended` says why."""
        number, last, step = 0, None, 1
        tick, shift = self.stream.time_base, None
        sought = seek and self._seek(after)
        for frame in self._decoded():
            if isinstance(frame, av.Packet):
                yield frame
                continue
            since = time.perf_counter()
            shift = round(self.offset / tick) if shift is None else shift
            pts = _in_ticks(frame, tick)
            if sought and (pts is None or pts - shift > (0 if after is None else after)):
                self._reopen()  # the seek led too far: from the beginning then
                yield from self._read(after, skip, seek=False)
                return
            sought = False
            duration = round(frame.duration * frame.time_base / tick) if frame.duration and frame.time_base else 0
            if pts is None:
                pts = (last + step) if last is not None else 0
                self.ended.moved += 1
            else:
                pts -= shift
            if self.begin is not None and pts < 0:
                continue
            if self.until is not None and (pts + shift) * tick >= self.until:
                return
            if after is not None:
                if pts <= after:
                    continue
                last, after = after, None  # from here on as in one run: clocks may go back
            if last is not None and pts <= last:
                pts, self.ended.moved = last + 1, self.ended.moved + 1
            if not duration:
                duration = max(1, round(1 / (self._rate() * tick)))
            if self._colours is None:
                self._learn(frame)
            kind = (frame.width, frame.height, _luma_bits(frame))
            if kind != self._kind:
                self.ended.why = (
                    f"the picture changes from {_kind(self._kind)} to {_kind(kind)}, and a film has one size here; "
                    f"colour the rest by itself with --start {self._start_of((pts + shift) * tick)}"
                )
                self.ended.at = float(pts * tick)
                return
            last, step, number = pts, duration, number + 1
            if number <= skip:
                continue
            if frame.interlaced_frame and self.deinterlace is None:  # titles may have come before, which are not
                self.ended.why, self.ended.passing = f"is interlaced from there on; {_INTERLACED}", True
                return
            rgb = read_rgb(frame, self._colours) if self.rgb else None
            picture = Picture(read_luma(frame, self._colours), pts, duration, number - 1, rgb)
            self.ended.at = float((pts + duration) * tick)
            self.seconds += time.perf_counter() - since
            yield picture

    def _start_of(self, at: Fraction) -> str:
        """A time on the film's own clock as `start` counts it, not later than it."""
        return f"{math.floor((at - Fraction(self.container.start_time or 0, av.time_base)) * 1000) / 1000:.3f}"

    def _learn(self, frame: av.VideoFrame) -> None:
        """What the first frame says of all."""
        if frame.interlaced_frame and self.deinterlace is None:
            raise VideoError(f"{self.label}: is interlaced; {_INTERLACED}")
        self._colours = read_colours(frame, self.stream.codec_context.name)
        self._bits = _luma_bits(frame)
        self._kind = (frame.width, frame.height, self._bits)
        self._matrix = display_matrix(frame)

    def _decoded(self) -> Iterator[av.VideoFrame | av.Packet]:
        """Frames as decoded, deinterlaced where wanted."""
        weave = Deinterlacer() if self.deinterlace else None
        for item in self._demuxed():
            if weave is None or isinstance(item, av.Packet):
                yield item
            else:
                yield from weave(item)
        if weave is not None:
            yield from weave(None)

    def _demuxed(self) -> Iterator[av.VideoFrame | av.Packet]:
        stream = self.stream
        packets = iter(self.container.demux(None if self.copies else stream))
        while True:
            since = time.perf_counter()
            try:
                packet = next(packets)
            except StopIteration:
                break
            except (av.FFmpegError, OSError) as error:
                self.ended.why = f"reading failed there: {getattr(error, 'strerror', None) or error}"
                self.ended.passing = may_pass(error)
                with suppress(av.FFmpegError):
                    yield from stream.codec_context.decode(None)  # what the decoder holds back
                return
            if packet.stream.index != stream.index:
                if packet.size:
                    yield packet
                continue
            try:
                self.ended.damaged += packet.is_corrupt
                decoded = packet.decode()
            except av.error.InvalidDataError:
                self.ended.damaged += 1
                decoded = []
            except (av.FFmpegError, OSError) as error:
                self.ended.why = f"decoding failed there: {getattr(error, 'strerror', None) or error}"
                return
            finally:
                self.seconds += time.perf_counter() - since
            yield from decoded

    def _seek(self, after: int | None) -> bool:
        """Brings the container to a keyframe well before the first wanted frame. False: it is at the beginning."""
        target = self.begin if after is None else after * self.stream.time_base + self.offset
        origin = Fraction(self.container.start_time or 0, av.time_base)
        if target is None or is_pipe(self.name) or target - Fraction(_LEAD) <= origin:
            return False
        try:
            self.container.seek(int((target - Fraction(_LEAD)) * av.time_base), backward=True)
            return True
        except (av.FFmpegError, OSError):
            self._reopen()  # it cannot be sought in: from the beginning then
            return False

    def _reopen(self) -> None:
        self.container.close()
        self.container = self._open()
        self.stream = self._choose_stream()

    def missing(self, film_end: float, others_end: float | None) -> float:
        """Seconds between what was read and the end that the file's header gives; 0 where it gives none.

        Args:
            film_end: seconds where the last frame ends.
            others_end: where the last packet of all other streams ends; None where not all were read, so that only
                what the header says of the film's own stream counts.
        """
        known = set(self.container.format.name.split(",")) & _WITH_DURATION
        if not known or self.end is not None:
            return 0.0
        if others_end is None:
            length = self._own_duration()
            start = self.stream.start_time * self.stream.time_base if self.stream.start_time else 0
            reached = film_end
        else:
            length = self.container.duration and self.container.duration / av.time_base
            start, reached = (self.container.start_time or 0) / av.time_base, max(film_end, others_end)
        if not length:
            return 0.0
        missing = float(start) + length - float(self.offset) - reached
        return missing if missing > max(_SHORT, 2 / float(self.info.rate)) else 0.0

    def _own_duration(self) -> float | None:
        if self.stream.duration:
            return float(self.stream.duration * self.stream.time_base)
        match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", self.stream.metadata.get("DURATION", ""))  # Matroska
        return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else None

    def close(self) -> None:
        self.container.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_) -> None:
        if self.free:
            self._items.close()
            self.close()


def display_matrix(frame: av.VideoFrame) -> tuple[int, ...] | None:
    """The nine numbers that turn a frame upright, as FFmpeg has them."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
        return None if matrix is None else tuple(np.frombuffer(matrix, np.int32)[:9].tolist())
    except ValueError:  # beside it lies what this PyAV has no name for, such as the EXIF data of an image
        return rotation_matrix(frame.rotation) if frame.rotation else None


def rotation_matrix(degrees: float) -> tuple[int, ...]:
    """FFmpeg's display matrix of a rotation, counter-clockwise: 16.16 fixed point, the last number 2.30."""
    cosine, sine = (round(f(math.radians(degrees)) * 65536) for f in (math.cos, math.sin))
    return cosine, -sine, 0, sine, cosine, 0, 0, 0, 1 << 30


def _kind(kind: tuple[int, int, int]) -> str:
    return f"{kind[0]}×{kind[1]}, {kind[2]} bits"


def _in_ticks(frame: av.VideoFrame, tick: Fraction) -> int | None:
    pts = frame.pts if frame.pts is not None else frame.dts
    if pts is None:
        return None
    return pts if frame.time_base == tick or not frame.time_base else round(pts * frame.time_base / tick)


class Deinterlacer:
    """FFmpeg's bwdif, one frame out for each frame in."""

    def __init__(self):
        self._graph: av.filter.Graph | None = None
        self._kind: tuple | None = None

    def __call__(self, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
        kind = self._kind if frame is None else (frame.width, frame.height, frame.format.name)
        if self._graph is not None and kind != self._kind:  # a graph is for one kind of frames: it would cut them
            yield from self(None)
            self._graph = None
        self._kind = kind
        if self._graph is None:
            if frame is None:
                return
            self._graph = graph = av.filter.Graph()
            graph.link_nodes(
                graph.add_buffer(
                    width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
                ),
                graph.add("bwdif", "mode=send_frame:deint=all"),
                graph.add("buffersink"),
            ).configure()
        self._graph.vpush(frame)
        while True:
            try:
                yield self._graph.vpull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return


# --- image sequences --------------------------------------------------------------------------------------------------


def numbered_files(pattern: str) -> dict[int, Path]:
    """The files of an image sequence by number, in order."""
    path = Path(pattern)
    before, digits, after = _split(path.name)
    width = int(digits[1:]) if digits else 1
    form = re.compile(re.escape(before) + f"(\\d{{{width},}})" + re.escape(after))
    found = {}
    folder = path.parent
    for file in folder.iterdir() if folder.is_dir() else ():
        match = form.fullmatch(file.name)
        if match and (match[1][0] != "0" or len(match[1]) == width):
            found[int(match[1])] = file
    return dict(sorted(found.items()))


def _split(name: str) -> tuple[str, str | None, str]:
    match = _PATTERN.search(name)
    return name[: match.start()], match[1], name[match.end() :]


def _first_number(pattern: str) -> int:
    files = numbered_files(pattern)
    if not files:
        raise VideoError(f"{pattern}: no such images")
    first = next(iter(files))
    for number, expected in zip(files, range(first, first + len(files)), strict=True):
        if number != expected:
            missing = Path(pattern).parent / (Path(pattern).name % expected)
            raise VideoError(f"{missing}: is missing in the sequence, which goes on with {files[number].name}")
    return first


# --- luma -------------------------------------------------------------------------------------------------------------

_HIGH_BITS = {"p010": 6, "p210": 6, "p410": 6, "p012": 4, "p212": 4, "p412": 4}  # samples are shifted up
_OTHER = {"monow": "gray", "monob": "gray", "pal8": "rgb24", "grayf32le": "gray16le", "grayf32be": "gray16le"}


def _luma_bits(frame: av.VideoFrame) -> int:
    """Bits of the luma that `read_luma` gives."""
    name = frame.format.name
    if name in _OTHER:
        return 16 if name.startswith("grayf") else 8
    bits = max(c.bits for c in frame.format.components if not c.is_alpha)
    return min(16, max(8, bits))


def read_luma(frame: av.VideoFrame, colours: Colours) -> Tensor:
    """The luma plane of a frame, [H, W], as decoded; of RGB, what it is by the matrix and range of `colours`.

    uint8 for 8 bits, else uint16. It looks into the frame's memory where it can.
    """
    name, form = frame.format.name, frame.format
    if name in _OTHER:
        frame = frame.reformat(format=_OTHER[name])
        name, form = frame.format.name, frame.format
    if form.is_rgb or form.is_bayer:
        return _luma_of_rgb(frame, colours)
    bits = form.components[0].bits
    if name.startswith(("ya8", "ya16")):
        return torch.from_numpy(_as_native(_plane(frame, 0, bits, 2)[:, :, 0]))
    if not form.is_planar and len(form.components) > 1:  # packed: 4:2:2 in one plane, and the like
        frame = frame.reformat(format="yuv444p" + ("" if bits == 8 else f"{bits}le"))
    plane = _as_native(_plane(frame, 0, bits))
    shift = _HIGH_BITS.get(name[:4])
    return torch.from_numpy(plane >> shift if shift else plane)


def read_rgb(frame: av.VideoFrame, colours: Colours) -> Tensor:
    """The picture of a frame as its tags say, [H, W, 3] uint8: R'G'B' by the matrix and range of `colours`."""
    if not frame.format.is_rgb:
        frame = frame.reformat(
            format="rgb24", src_colorspace=colours.matrix, src_color_range=colours.range, dst_color_range=FULL
        )
    return torch.from_numpy(frame.to_ndarray(format="rgb24"))


def _plane(frame: av.VideoFrame, index: int, bits: int, channels: int = 1) -> np.ndarray:
    """A view of a plane, [H, W] or [H, W, channels], without the padding of its rows."""
    plane = frame.planes[index]
    dtype = np.dtype(np.uint8 if bits <= 8 else (">u2" if frame.format.name.endswith("be") else "<u2"))
    rows = np.frombuffer(plane, dtype).reshape(plane.height, -1)
    if plane.line_size < 0:
        rows = rows[::-1]
    rows = rows[:, : plane.width * channels]
    return rows if channels == 1 else rows.reshape(plane.height, plane.width, channels)


def _as_native(plane: np.ndarray) -> np.ndarray:
    """In this machine's byte order, without negative strides: what torch takes."""
    if plane.dtype.newbyteorder("=") != plane.dtype or any(s < 0 for s in plane.strides):
        return np.ascontiguousarray(plane, plane.dtype.newbyteorder("="))
    return plane


def _luma_of_rgb(frame: av.VideoFrame, colours: Colours) -> Tensor:
    bits = _luma_bits(frame)
    # with as many bits as it has: FFmpeg widens samples by a shift, after which white is no longer white
    planar = frame.reformat(format="gbrp" if bits == 8 else f"gbrp{bits}le")
    green, blue, red = (torch.from_numpy(_plane(planar, i, bits)).float() for i in range(3))
    yuv = colours.yuv("444", bits)
    weights = yuv.luma_weights
    luma = (weights[0] * red + weights[1] * green + weights[2] * blue) * (yuv.luma_span / (2**bits - 1)) + yuv.black
    return luma.round_().to(yuv.dtype)
