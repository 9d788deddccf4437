"""Short films made for the tests."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from fastcolor.yuv import YuvFormat

TICK = Fraction(1, 12000)


def steady(count: int, rate: int = 24) -> list[int]:
    return [round(i / (rate * TICK)) for i in range(count)]


def uneven(count: int) -> list[int]:
    """Timestamps of a variable frame rate."""
    steps = [400, 500, 1000, 300, 2000, 500]
    return [sum(steps[i % len(steps)] for i in range(n)) for n in range(count)]


def pattern(i: int, width: int, height: int, bits: int) -> np.ndarray:
    """Luma of frame i: a moving ramp with noise, other in every frame."""
    rng = np.random.default_rng(i)
    ramp = (np.arange(width) * 2 + i * 3) % 200 + np.arange(height)[:, None] % 17
    values = ramp + rng.integers(0, 20, (height, width)) + 16
    return (values << (bits - 8)).astype(np.uint8 if bits == 8 else np.uint16)


def make_clip(
    path: Path,
    *,
    times: list[int] | None = None,
    codec: str = "ffv1",
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (64, 48),
    audio: str | None = "flac",
    chapters: bool = False,
    matrix: tuple[int, ...] | None = None,
    rotation: int | None = None,
    aspect: Fraction | None = None,
    tags: tuple[int, int, int, int] | None = None,  # range, matrix, primaries, transfer
    options: dict[str, str] | None = None,
    interlaced: bool = False,
    sound_longer: float = 0.0,  # seconds
    subtitle: bool = False,
    tick: Fraction | None = None,
) -> Path:
    """A film of `pattern` with noise in its chroma planes, and a tone beside it."""
    times = steady(30) if times is None else times
    width, height = size
    bits = 10 if "10" in pix_fmt else 12 if "12" in pix_fmt else 16 if "16" in pix_fmt else 8
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "A film"
        stream = out.add_stream(codec, rate=24, options=options or {},
                                time_base=tick or (Fraction(1, 24) if codec == "mpeg2video" else TICK))  # fmt: skip
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        if interlaced:
            stream.codec_context.flags |= 1 << 18 | 1 << 29  # interlaced DCT and motion estimation
        stream.metadata["language"] = "fra"
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if tags:
            context = stream.codec_context
            context.color_range, context.colorspace, context.color_primaries, context.color_trc = tags
        if rotation is not None:
            stream.set_display_rotation(rotation)
        sound = None
        if audio:
            sound = out.add_stream(audio, rate=48000, layout="mono")
            sound.metadata["language"] = "deu"
        words = out.add_mux_stream("subrip", time_base=Fraction(1, 1000)) if subtitle else None
        if chapters:
            tick = Fraction(1, 1000)
            entries = [(0, 500, "one"), (500, 1250, "two")]
            out.set_chapters(
                [
                    {"id": i, "start": a, "end": b, "time_base": tick, "metadata": {"title": t}}
                    for i, (a, b, t) in enumerate(entries)
                ]
            )
        packets = []
        rng = np.random.default_rng(7)
        for i, pts in enumerate(times):
            frame = av.VideoFrame(width, height, pix_fmt)
            luma = pattern(i, width, height, bits)
            for plane in frame.planes:
                rows = np.frombuffer(plane, luma.dtype).reshape(plane.height, -1)
                rows[:] = rng.integers(16 << (bits - 8), 200 << (bits - 8), rows.shape)
            rows = np.frombuffer(frame.planes[0], luma.dtype).reshape(height, -1)
            rows[:, :width] = luma
            frame.pts, frame.time_base = pts, TICK
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if sound is not None:
            sound_format = sound.codec_context.format.name
            length = float(times[-1] * TICK) + 0.05 + sound_longer
            wave = (np.sin(np.arange(int(48000 * length)) / 20) * 8000).astype(np.int16)[None]
            resample = av.AudioResampler(format=sound_format, layout="mono", rate=48000,
                                         frame_size=sound.codec_context.frame_size or 1024)  # fmt: skip
            frame = av.AudioFrame.from_ndarray(wave, "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
            for piece in [*resample.resample(frame), *resample.resample(None)]:
                packets += sound.encode(piece)
            packets += sound.encode(None)
        if words is not None:
            words.metadata["language"] = "ger"
            for i in range(2):
                packet = av.Packet(f"Line {i}".encode())
                packet.stream, packet.time_base = words, Fraction(1, 1000)
                packet.pts = packet.dts = 200 + 500 * i
                packet.duration = 300
                packets.append(packet)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            out.mux(packet)
    return path


def luma_planes(path: Path) -> list[tuple[Fraction, np.ndarray]]:
    """(seconds, luma) of all frames, read without fastcolor."""
    read = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            plane = frame.planes[0]
            dtype = np.uint8 if frame.format.components[0].bits == 8 else np.uint16
            rows = np.frombuffer(plane, dtype).reshape(plane.height, -1)[:, : plane.width]
            read.append((frame.pts * frame.time_base, rows.copy()))
    return read


def packets_of(path: Path, kind: str) -> list[bytes]:
    with av.open(str(path)) as container:
        stream = next(s for s in container.streams if s.type == kind)
        return [bytes(p) for p in container.demux(stream) if p.size]


def frame_hashes(path: Path) -> list[tuple]:
    """Timestamp and all samples of every frame, as hashes."""
    read = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            planes = []
            for plane in frame.planes:
                item = 1 if frame.format.components[0].bits == 8 else 2
                rows = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width * item]
                planes.append(hash(rows.tobytes()))
            read.append((frame.pts * frame.time_base, *planes))
    return read


class Counting:
    """A colorizer whose chroma tells how many frames came before, and that holds frames back, as the real one does."""

    def __init__(self, yuv: YuvFormat, hold: int = 4):
        self.yuv, self.hold, self.count, self.held = yuv, hold, 0, []

    @torch.inference_mode()
    def push(self, luma: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        assert luma.dtype == self.yuv.dtype
        size = self.yuv.chroma_size(*luma.shape)
        low = 16 << (self.yuv.bits - 8)
        u = torch.full(size, low + self.count % 100, dtype=torch.int32)
        v = torch.full(size, low + int(luma.to(torch.int32).sum()) % 100, dtype=torch.int32)
        self.count += 1
        self.held.append((u.to(self.yuv.dtype), v.to(self.yuv.dtype)))
        if len(self.held) >= self.hold:
            return self.flush()
        return []

    def flush(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        ready, self.held = self.held, []
        return ready

    def state_dict(self) -> dict:
        assert not self.held
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
