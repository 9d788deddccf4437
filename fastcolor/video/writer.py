"""Films out: encoders, and streams copied from the input as they are."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.format import Flags as FormatFlags
from av.stream import Disposition
from torch import Tensor

from fastcolor.video.errors import VideoError
from fastcolor.video.reader import STREAM, FilmInfo, Reader, may_pass, url
from fastcolor.video.tags import PixelFormat, choose_format


@dataclass(frozen=True)
class _Defaults:
    """Of an encoder: which of its options `--crf` and `--preset` are, what they are by themselves, and others."""

    crf: tuple[str, str] | None = None
    preset: tuple[str, str] | None = None
    options: dict[str, str] = field(default_factory=dict)


_NVENC = _Defaults(("cq", "21"), ("preset", "p5"), {"rc": "vbr"})
CODECS = {
    "libx264": _Defaults(("crf", "18"), ("preset", "veryfast")),
    "libx265": _Defaults(("crf", "20"), ("preset", "fast"), {"x265-params": "log-level=error"}),
    "libsvtav1": _Defaults(("crf", "28"), ("preset", "9")),
    "ffv1": _Defaults(options={"level": "3", "g": "1", "slicecrc": "1"}),
    "prores_ks": _Defaults(preset=("profile", "hq"), options={"vendor": "apl0"}),
    "h264_nvenc": _NVENC,
    "hevc_nvenc": _NVENC,
    "av1_nvenc": _NVENC,
}


# FFmpeg writes any codec into MPEG-TS, but those that it has no name for there cannot be read again, by nobody
_NAMED_IN_TS = {
    "mpeg1video", "mpeg2video", "mpeg4", "h264", "hevc", "vvc", "cavs", "avs2", "avs3", "dirac", "vc1", "jpeg2000",
    "mp1", "mp2", "mp3", "aac", "aac_latm", "ac3", "eac3", "dts", "truehd", "opus", "s302m",
    "dvb_subtitle", "dvb_teletext", "hdmv_pgs_subtitle", "arib_caption",
}  # fmt: skip


def is_named(codec: av.Codec, form: str) -> bool:
    """Whether a codec that FFmpeg writes into a container can be read from it."""
    return form != "mpegts" or codec.canonical_name in _NAMED_IN_TS


@dataclass(frozen=True)
class Encoding:
    """How frames become a stream."""

    codec: str
    options: dict[str, str]
    pixels: PixelFormat
    info: FilmInfo
    threads: int = 0


def choose_encoding(
    info: FilmInfo,
    codec: str = "libx264",
    crf: float | None = None,
    preset: str | None = None,
    pix_fmt: str | None = None,
    threads: int = 0,
) -> Encoding:
    """Checks that the encoder is there and takes what is asked for, by opening it.

    Raises:
        VideoError: it does not; the message says what there is.
    """
    try:
        known = av.Codec(codec, "w")
    except (av.codec.codec.UnknownCodecError, ValueError):
        known = None
    if known is None or known.type != "video":
        there = ", ".join(name for name in CODECS if name in av.codecs_available)
        raise VideoError(f"--codec {codec}: this FFmpeg has no such video encoder; there are {there}")
    defaults = CODECS.get(codec) or _defaults_of(codec)
    options = dict(defaults.options)
    for name, asked, choice in (("crf", crf, defaults.crf), ("preset", preset, defaults.preset)):
        if choice is None:
            if asked is not None:
                raise VideoError(f"--{name} {asked}: {codec} has no such option")
            continue
        value = choice[1] if asked is None else f"{asked:g}" if isinstance(asked, float) else asked
        if value:
            options[choice[0]] = value
    if codec == "libx264" and info.steady:
        options["x264-params"] = "force-cfr=1"  # else the stream names the ticks of the time base as its frame rate
    encoding = Encoding(codec, options, choose_format(known, info.bits, pix_fmt), info, threads)
    os.environ.setdefault("SVT_LOG", "1")  # errors alone: it would talk into the progress
    try:
        _configure(av.CodecContext.create(codec, "w"), encoding).open()
    except (av.FFmpegError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        asked = " ".join(f"{k}={v}" for k, v in options.items())
        size = f"{info.width}×{info.height} {encoding.pixels.name}"
        others = ", ".join(name for name in CODECS if name != codec and name in av.codecs_available)
        raise VideoError(
            f"--codec {codec}: cannot be opened here for {size} with {asked or 'no options'} ({reason}); "
            f"of this FFmpeg's encoders there are also {others}"
        ) from error
    return encoding


def _defaults_of(codec: str) -> _Defaults:
    """Of an encoder that is not in the table: what it calls by the names of our options, left at its own defaults."""
    names = {o.name for o in av.CodecContext.create(codec, "w").supported_options.private}
    return _Defaults(*((name, "") if name in names else None for name in ("crf", "preset")))


def _configure(context: av.VideoCodecContext, encoding: Encoding) -> av.VideoCodecContext:
    info = encoding.info
    context.width, context.height = info.width, info.height
    context.pix_fmt = encoding.pixels.name
    context.time_base, context.framerate = info.time_base, info.rate
    if info.aspect:
        context.sample_aspect_ratio = info.aspect
    context.thread_count = encoding.threads
    context.thread_type = "AUTO"
    context.options = dict(encoding.options)
    tag(context, encoding)
    return context


def tag(thing: av.VideoCodecContext | av.VideoFrame, encoding: Encoding) -> None:
    """Writes the colour tags to a codec context or a frame."""
    colours = encoding.info.colours
    thing.color_range, thing.colorspace = colours.range, colours.matrix
    thing.color_primaries, thing.color_trc = colours.primaries, colours.transfer


def add_film(container: av.container.OutputContainer, encoding: Encoding) -> av.VideoStream:
    """The stream of the frames in a container, with an encoder."""
    info = encoding.info
    stream = container.add_stream(encoding.codec, rate=info.rate, time_base=info.time_base)
    _configure(stream.codec_context, encoding)
    finish_film(stream, info)
    return stream


def finish_film(stream: av.VideoStream, info: FilmInfo) -> None:
    """What a stream has beside its codec."""
    stream.time_base = info.time_base
    if info.matrix:
        stream.set_display_matrix(info.matrix)


# --- frames -----------------------------------------------------------------------------------------------------------


def convert_bits(luma: Tensor, bits: int, to: int, full_range: bool) -> Tensor:
    """Luma samples with other bits: [H, W]. The same where they are the same; exact upwards in limited range."""
    if bits == to:
        return luma
    wide = luma.to(torch.int64)
    if full_range:
        above, top = 2**to - 1, 2**bits - 1
        wide = (wide * above + top // 2) // top
    elif to > bits:
        wide <<= to - bits
    else:
        wide = ((wide + (1 << (bits - to - 1))) >> (bits - to)).clamp_max(2**to - 1)
    return wide.to(torch.uint8 if to == 8 else torch.uint16)


def make_frame(luma: Tensor, u: Tensor, v: Tensor, pts: int, encoding: Encoding) -> av.VideoFrame:
    """A frame of the planes: luma [H, W], chroma of the encoding's subsampling, all with its bits."""
    height, width = luma.shape
    frame = av.VideoFrame(width, height, encoding.pixels.planar)
    dtype = np.uint8 if encoding.pixels.bits == 8 else np.uint16
    for plane, samples in zip(frame.planes, (luma, u, v), strict=True):
        rows = np.frombuffer(plane, dtype).reshape(plane.height, -1)
        rows[:, : plane.width] = samples.numpy()
    frame.pts, frame.time_base = pts, encoding.info.time_base
    tag(frame, encoding)
    return frame


# --- streams that are copied ------------------------------------------------------------------------------------------


class Copier:
    """The other streams of a film, taken over packet by packet.

    Args:
        reader: of the film; `packets` wants it to be read with `copies`, or a container of its own.
        form: name of the output's container format.
    """

    def __init__(self, reader: Reader, form: str):
        self.reader = reader
        self.left_out: list[str] = []  # a line for each stream that the container cannot hold
        self.moved = 0  # packets whose timestamps did not rise
        self.end = 0.0  # seconds where the last packet ends
        # by number: the reader may open its file anew
        self._chosen = [
            s.index
            for s in reader.container.streams
            if s.index != reader.stream.index and not self._is_made(s, form) and self._fits(s, form)
        ]
        self._streams: dict[int, av.stream.Stream] = {}
        self._last: dict[int, int] = {}

    def _is_made(self, stream: av.stream.Stream, form: str) -> bool:
        """Whether the muxer makes it by itself: QuickTime's streams of chapter titles and of the time code."""
        if stream.type != "data":
            return False
        titles = stream.name == "bin_data" and self.reader.container.chapters()
        return bool(titles) or ("timecode" in stream.metadata and form in ("mov", "mp4"))

    def _fits(self, stream: av.stream.Stream, form: str) -> bool:
        name = getattr(stream, "name", None) or (stream.codec_context.name if stream.codec_context else None)
        label = f"stream {stream.index} ({stream.type}{f', {name}' if name else ''})"
        if stream.codec_context and not is_named(stream.codec_context.codec, form):
            self.left_out.append(f"{label} is left out: {form} has no name for it")
            return False
        try:
            trial = av.open(io.BytesIO(), "w", format=form)
            _add_copy(trial, stream)
            trial.start_encoding()
        except (av.FFmpegError, ValueError, OSError, TypeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self.left_out.append(f"{label} is left out: {form} cannot hold it as it is ({reason})")
            return False
        with suppress(av.FFmpegError, OSError):  # nothing was written into it
            trial.close()
        return True

    def add_to(self, container: av.container.OutputContainer) -> None:
        streams = self.reader.container.streams
        self._streams = {i: _add_copy(container, streams[i]) for i in self._chosen}

    def copy(self, packet: av.Packet) -> av.Packet | None:
        """A packet of the input as one of the output; None where it is not wanted there."""
        stream = self._streams.get(packet.stream.index)
        if stream is None:
            return None
        if packet.pts is None and packet.dts is None:
            if not stream.disposition & Disposition.attached_pic:
                return None
            packet.pts = packet.dts = 0  # a cover has no time, and belongs to every part of the film
            packet.stream = stream
            return packet
        tick, reader = packet.time_base, self.reader
        at = (packet.pts if packet.pts is not None else packet.dts) * tick
        if (reader.begin is not None and at < reader.begin) or (reader.until is not None and at >= reader.until):
            return None
        shift = round(reader.offset / tick)
        packet.dts = (packet.dts if packet.dts is not None else packet.pts) - shift
        packet.pts = packet.dts if packet.pts is None else packet.pts - shift
        last = self._last.get(stream.index)
        if last is not None and packet.dts <= last and stream.type != "subtitle":
            packet.dts = last + 1
            packet.pts = max(packet.pts, packet.dts)
            self.moved += 1
        self._last[stream.index] = packet.dts
        self.end = max(self.end, float((packet.pts + (packet.duration or 0)) * tick))
        packet.stream = stream
        return packet

    def packets(self, until: float | None) -> Iterable[av.Packet]:
        """All that are wanted, read from the file anew; up to `until` seconds.

        Raises:
            VideoError: the film cannot be opened; or reading failed though it goes on there, where `until` is None.
        """
        if not self._chosen:
            return
        try:
            container = av.open(url(self.reader.name), metadata_errors="replace")
        except (av.FFmpegError, OSError) as error:
            raise self._unread(error) from error
        with container:
            wanted = [container.streams[i] for i in self._chosen if container.streams[i].type != "attachment"]
            if not wanted:
                return
            try:
                for packet in container.demux(wanted):
                    made = self.copy(packet) if packet.size else None
                    if made is None or (until is not None and float(made.dts * made.time_base) >= until):
                        continue
                    yield made
            except (av.FFmpegError, OSError) as error:
                if until is None and may_pass(error):
                    raise self._unread(error) from error
                return  # a damaged end: the frames before it are there as well

    def _unread(self, error: Exception) -> VideoError:
        reason = getattr(error, "strerror", None) or error
        return VideoError(
            f"{self.reader.label}: reading of its other streams failed ({reason}); the frames are kept, "
            "--resume joins them"
        )


def _add_copy(container: av.container.OutputContainer, template: av.stream.Stream) -> av.stream.Stream:
    stream = container.add_stream_from_template(template, opaque=True)
    stream.metadata.update(template.metadata)
    stream.disposition = template.disposition
    return stream


_OF_THE_CONTAINER = {"major_brand", "minor_version", "compatible_brands", "encoder", "duration"}


def describe(container: av.container.OutputContainer, reader: Reader) -> None:
    """Takes over metadata and chapters; chapters are moved and cut as the film is."""
    source = reader.container
    container.metadata.update({k: v for k, v in source.metadata.items() if k.lower() not in _OF_THE_CONTAINER})
    chapters = []
    for chapter in source.chapters():
        tick = chapter["time_base"]
        start, end = (chapter[k] * tick - reader.offset for k in ("start", "end"))
        if reader.until is not None:
            end = min(end, reader.until - reader.offset)
        start = max(start, Fraction(0))
        if end > start:
            chapters.append({**chapter, "start": round(start / tick), "end": round(end / tick)})
    if chapters:
        container.set_chapters(chapters)


def copy_tags(stream: av.VideoStream, reader: Reader) -> None:
    """Language, title and the like of the film's own stream."""
    dropped = ("encoder", "duration", "number_of", "_statistics", "bps", "handler_name", "vendor_id")
    kept = {k: v for k, v in reader.stream.metadata.items() if not k.lower().startswith(dropped)}
    stream.metadata.update(kept)
    stream.disposition = reader.stream.disposition


_USUAL = {".mp4", ".m4v", ".mov", ".mkv"}
_PLAYED_IN_MP4 = {"h264", "hevc", "av1", "aac", "mp3", "ac3", "eac3", "alac", "opus", "mov_text"}


def usual_suffix(name: str, codec: str) -> str:
    """The suffix of an output beside a film, for an encoder: the film's own where that is .mp4, .m4v, .mov or .mkv, and
    usual for the encoder.

    Else .mp4 where players know the encoder's stream and all that are copied in it, else .mkv (ProRes: .mov). Program
    streams, AVI and the like take H.264 without its timestamps, or not at all.
    """
    suffix = Path(name).suffix
    try:
        made = av.Codec(codec, "w").canonical_name
        if suffix.lower() in (_USUAL if made in _PLAYED_IN_MP4 else {".mkv", ".mov"} if made == "prores" else {".mkv"}):
            return suffix
        with av.open(url(name), metadata_errors="replace") as film:
            streams = [s for s in film.streams if s.type in ("audio", "subtitle", "attachment")]
            copied = {getattr(s.codec_context, "name", None) and s.codec_context.codec.canonical_name for s in streams}
    except (av.FFmpegError, OSError, ValueError):
        return ".mkv"  # what is wrong with it is said later
    return ".mov" if made == "prores" else ".mp4" if {made, *copied} <= _PLAYED_IN_MP4 else ".mkv"


def format_of(target: str, asked: str | None = None) -> str:
    """The container format of an output, by its suffix; Matroska in a pipe.

    Raises:
        VideoError: FFmpeg knows none of that suffix, or it holds no film.
    """
    if asked is not None:
        try:
            form = av.ContainerFormat(asked, "w")
        except ValueError as error:
            raise VideoError(f"--format {asked}: this FFmpeg writes no such container") from error
        if form.flags & FormatFlags.no_file.value:
            raise VideoError(f"--format {asked}: makes no file by itself")
        return asked
    if target == STREAM:
        return "matroska"
    try:
        form = av.open(f"file:{Path(target).name}", "w").format
    except (ValueError, av.FFmpegError) as error:
        raise VideoError(
            f"{target}: FFmpeg knows no container with the suffix {Path(target).suffix or '(none)'}; "
            ".mp4, .mkv and .mov are usual"
        ) from error
    return form.name
