"""A film end to end, and its stages by themselves, beside the way that peers go.

`python -m benchmarks.video [--clip FILE] [--sizes 480,720,1080] [--seconds N] [--rounds N] [--threads N]
[--preset NAME] [--keyframes auto|N] [--weights FILE] [--device cpu|cuda] [--json FILE] [--quick]
[--memory] [--long]`

Stages: decoding alone, encoding alone, ours without a codec, and end to end from file to file. The peers' way: frames
as PNGs to disk, one at a time through the same network, chroma enlarged bilinearly, OpenCV's Lab, PNGs again, and
those to the same encoder. All are timed in turn. `--memory` adds the peak memory of 10 s of film and of a minute,
`--long` of 10 s and of 10 minutes, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path

import av
import numpy as np
import torch

from fastcolor.model.colorizer import Colorizer
from fastcolor.video.colorizer import VideoColorizer, VideoOptions
from fastcolor.video.film import FilmOptions, colorize_film, peak_memory
from fastcolor.video.reader import Picture, Reader
from fastcolor.video.segments import SegmentWriter
from fastcolor.video.writer import choose_encoding, make_frame

from . import timing
from .ops.lab import photograph
from .timing import Candidate, Timing

WIDTHS = {480: 854, 720: 1280, 1080: 1920}
RATE = 24


# --- films ------------------------------------------------------------------------------------------------------------


def scene(width: int, height: int) -> Iterator[np.ndarray]:
    """Grey frames [H, W] uint8 without end: windows that pan over pictures, other noise in each, a cut every 4 s."""
    rng = np.random.default_rng(0)
    shot = 4 * RATE
    for seed in cycle(range(4)):
        large = photograph(width + 3 * shot, height + shot, seed=seed).float().mean(0).numpy()
        for i in range(shot):
            window = large[i // 2 : i // 2 + height, 3 * i : 3 * i + width]
            yield np.clip(window + rng.normal(0, 2, window.shape), 0, 255).astype(np.uint8)


def clip_frames(clip: Path, width: int, height: int) -> Iterator[np.ndarray]:
    """The frames of a clip in grey, scaled, forwards and backwards without end."""
    with av.open(str(clip)) as source:
        frames = [f.reformat(width, height, "gray").to_ndarray() for f in source.decode(video=0)]
    return cycle(frames + frames[-2:0:-1])


def make_film(path: Path, frames: Iterator[np.ndarray], count: int) -> Path:
    """Encodes grey frames as films mostly are: H.264, 8 bits 4:2:0."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "18"})
        for i, luma in enumerate(islice(frames, count)):
            height, width = luma.shape
            frame = av.VideoFrame(width, height, "yuv420p")
            for plane, samples in zip(frame.planes, (luma * (219 / 255) + 16, 128, 128), strict=True):
                np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width] = samples
            if i == 0:
                stream.width, stream.height = width, height
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def repeat_film(path: Path, source: Path, times: int) -> Path:
    """The same film several times over, by packet copy."""
    with av.open(str(path), "w") as out:
        stream, shift = None, 0
        for _ in range(times):
            with av.open(str(source)) as given:
                film = given.streams.video[0]
                if stream is None:
                    stream = out.add_stream_from_template(film, opaque=True)
                for packet in given.demux(film):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = stream
                        out.mux(packet)
                shift += film.duration
    return path


# --- what is timed ----------------------------------------------------------------------------------------------------


class Contest:
    """The candidates for one size of picture. Each `run` gives the seconds of one pass over the film."""

    def __init__(self, options: argparse.Namespace, folder: Path, height: int):
        self.options, self.folder = options, folder
        self.size = WIDTHS.get(height, round(height * 16 / 9 / 2) * 2), height
        self.count = round(options.seconds * RATE)
        frames = clip_frames(options.clip, *self.size) if options.clip else scene(*self.size)
        self.film = make_film(folder / f"{height}.mp4", frames, self.count)
        load = Colorizer.load if options.weights else Colorizer.from_pretrained
        given = (options.weights,) if options.weights else ()
        self.colorizer = load(*given, options.device)
        self.how = VideoOptions(keyframes=options.keyframes)
        self.stats: dict[str, object] = {}

    def reader(self) -> Reader:
        return Reader(str(self.film), threads=self.options.threads)

    def decode(self) -> int:
        with self.reader() as reader:
            return sum(1 for _ in reader.frames())

    def pictures(self) -> tuple[list[Picture], object]:
        with self.reader() as reader:
            return list(reader.frames()), reader.info

    def encode(self) -> Callable[[], int]:
        pictures, info = self.pictures()
        encoding = choose_encoding(info, preset=self.options.preset, threads=self.options.threads)
        colorizer = VideoColorizer(self.colorizer, info.colours.yuv("420", 8), self.how)
        chroma = []
        for picture in pictures[: 2 * RATE]:
            chroma += colorizer.push(picture.luma)
        chroma += colorizer.flush()

        def run() -> int:
            writer = SegmentWriter(self.folder, 0, encoding)
            for picture, (u, v) in zip(pictures, cycle(chroma)):
                writer.write(make_frame(picture.luma, u, v, picture.pts, encoding), picture.duration)
            return writer.finish(True).frames

        return run

    def colour(self) -> Callable[[], int]:
        pictures, info = self.pictures()

        def run() -> int:
            colorizer = VideoColorizer(self.colorizer, info.colours.yuv("420", 8), self.how)
            made = sum(len(colorizer.push(p.luma)) for p in pictures) + len(colorizer.flush())
            stats = colorizer.stats
            self.stats["ours, no codec"] = {
                "network_runs": stats.network,
                "ms_by_step": {k: round(1e3 * s / made, 3) for k, s in stats.seconds.items()},
            }
            return made

        return run

    def end_to_end(self) -> int:
        options = FilmOptions(preset=self.options.preset, threads=self.options.threads)
        summary = colorize_film(
            str(self.film),
            str(self.folder / "out.mp4"),
            lambda yuv: VideoColorizer(self.colorizer, yuv, self.how),
            options,
            overwrite=True,
        )
        stats = summary.stats
        stages = stats["seconds_by_stage"]
        self.stats["fastcolor video"] = {
            "network_runs": stats["network_runs"],
            "busy_of_wall": {k: round(s / stats["seconds"], 3) for k, s in stages.items()},
            "waited_of_wall": {
                k: round(s / stats["seconds"], 3) for k, s in stats["last_run"]["seconds_waited"].items()
            },
        }
        return summary.frames

    def peers(self) -> Callable[[], int]:
        import cv2

        cv2.setNumThreads(self.options.threads)
        plain = self.colorizer.with_options(mrf=False)
        folder = self.folder / "frames"
        folder.mkdir(exist_ok=True)

        def run() -> int:
            source, count = cv2.VideoCapture(str(self.film)), 0
            while True:
                there, bgr = source.read()
                if not there:
                    break
                cv2.imwrite(str(folder / f"{count:06d}.png"), cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY))
                count += 1
            for i in range(count):
                grey = cv2.imread(str(folder / f"{i:06d}.png"), cv2.IMREAD_GRAYSCALE)
                lab = cv2.cvtColor(cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR).astype(np.float32) / 255, cv2.COLOR_BGR2LAB)
                height, width = plain.network_size(*grey.shape)
                small = cv2.resize(lab[..., 0], (width, height), interpolation=cv2.INTER_AREA)
                ab, _ = plain.predict(torch.from_numpy(small)[None, None].to(plain.device))
                chroma = ab[0].permute(1, 2, 0).cpu().numpy()
                lab[..., 1:] = cv2.resize(chroma, grey.shape[::-1], interpolation=cv2.INTER_LINEAR)
                bgr = cv2.cvtColor(lab, cv2.COLOR_LAB2BGR).clip(0, 1)
                cv2.imwrite(str(folder / f"{i:06d}-color.png"), (bgr * 255 + 0.5).astype(np.uint8))
            with av.open(str(self.folder / "peers.mp4"), "w") as out:
                stream = out.add_stream(
                    "libx264", rate=RATE, options={"preset": self.options.preset or "veryfast", "crf": "18"}
                )
                stream.width, stream.height = self.size
                stream.codec_context.thread_count = self.options.threads
                for i in range(count):
                    bgr = cv2.imread(str(folder / f"{i:06d}-color.png"))
                    frame = av.VideoFrame.from_ndarray(bgr, "bgr24").reformat(format="yuv420p", dst_colorspace="ITU709")
                    frame.pts, frame.time_base = i, Fraction(1, RATE)
                    out.mux(stream.encode(frame))
                out.mux(stream.encode(None))
            return count

        return run

    def candidates(self) -> list[Candidate]:
        def guarded(run: Callable[[], int]) -> Callable[[int], int]:
            def checked(_: int) -> int:
                made = run()
                if made != self.count:  # no speed for a film that lost frames
                    raise AssertionError(f"{made} frames came out of {self.count}")
                return made

            return checked

        found = [
            Candidate("decoding alone", guarded(self.decode)),
            Candidate("encoding alone", guarded(self.encode())),
            Candidate("ours, no codec", guarded(self.colour())),
            Candidate("fastcolor video", guarded(self.end_to_end), ours=True),
        ]
        try:
            found.append(Candidate("PNGs, one at a time", guarded(self.peers())))
        except ImportError as error:
            found.append(Candidate("PNGs, one at a time", None, why_not=str(error)))
        return found


def timed(candidates: list[Candidate], rounds: int, count: int) -> tuple[dict[str, Timing], dict[str, float]]:
    """Seconds per frame, and those of all cores together; all candidates in turn, the first round does not count."""
    taken: dict[str, list[float]] = {c.name: [] for c in candidates if c.run}
    worked: dict[str, list[float]] = {name: [] for name in taken}
    for k in range(rounds + (rounds > 1)):
        for candidate in candidates:
            if candidate.run is None:
                continue
            start, before = time.perf_counter(), time.process_time()
            candidate.run(k)
            if k or rounds == 1:
                taken[candidate.name].append((time.perf_counter() - start) / count)
                worked[candidate.name].append((time.process_time() - before) / count)
    summaries = {}
    for name, samples in taken.items():
        low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
        summaries[name] = Timing(median, high - low, len(samples))
    return summaries, {name: statistics.median(samples) for name, samples in worked.items()}


def contest(options: argparse.Namespace, folder: Path, height: int) -> list[dict]:
    made = Contest(options, folder, height)
    candidates = made.candidates()
    timings, worked = timed(candidates, options.rounds, made.count)
    width, height = made.size
    rows = []
    for candidate in candidates:
        timed_here = timings.get(candidate.name)
        row = timing.row(
            candidate, timed_here, width * height * 3 // 2, title=f"{width}×{height}, a frame", frames=made.count,
            size=[width, height],
        )  # fmt: skip
        if timed_here:
            row["fps"] = round(1 / timed_here.median, 2)
            row["core_ms"] = round(1e3 * worked[candidate.name], 3)
            row |= made.stats.get(candidate.name, {})
            row["note"] = f"{row['fps']:.1f} fps, {row['core_ms']:.1f} ms of a core"
            if "busy_of_wall" in row:
                row["note"] += ", busy " + ", ".join(f"{k} {v:.0%}" for k, v in row["busy_of_wall"].items())
            if "ms_by_step" in row:
                row["note"] += ", ms: " + ", ".join(f"{k} {v:.1f}" for k, v in row["ms_by_step"].items())
        rows.append(row)
    whole = ("fastcolor video", "PNGs, one at a time")
    for row in rows:
        row["part"] = row["candidate"] not in whole
    timing.compare([r for r in rows if not r["part"]])
    timing.show(rows, rows[0]["title"])
    return rows


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace, folder: Path, height: int = 480) -> list[dict]:
    """Peak memory of a process that colours a short film, and of one that colours a long one."""
    width = WIDTHS[height]
    frames = clip_frames(options.clip, width, height) if options.clip else scene(width, height)
    seconds = 2 if options.quick else 10
    short = make_film(folder / "short.mp4", frames, seconds * RATE)
    times = 60 if options.long else 3 if options.quick else 6
    long = repeat_film(folder / "long.mp4", short, times)
    rows = []
    for film, length in ((short, seconds), (long, seconds * times)):
        command = [
            sys.executable,
            "-m",
            f"{__package__}.video",
            "--child",
            str(film),
            "--threads",
            str(options.threads),
        ]
        if options.weights:
            command += ["--weights", str(options.weights)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, fps = json.loads(done.stdout.splitlines()[-1])
        rows.append({"title": f"peak memory, {width}×{height}", "candidate": f"{length} s of film", "ours": True,
                     "median_us": timing.NOT_MEASURED, "why": "memory alone", "error": None,
                     "peak_MB": round(peak / 1e6, 1), "fps": fps, "frames": length * RATE})  # fmt: skip
        print(f"  peak memory of {length} s of {width}×{height}: {peak / 1e6:.0f} MB")
    return rows


def child(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    colorizer = Colorizer.load(options.weights) if options.weights else Colorizer.from_pretrained()
    with tempfile.TemporaryDirectory() as folder:
        summary = colorize_film(
            str(options.child),
            f"{folder}/out.mp4",
            lambda yuv: VideoColorizer(colorizer, yuv),
            FilmOptions(threads=options.threads),
        )
    print(json.dumps([peak_memory(), summary.stats["fps"]]))
    return 0


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(
        "video", __doc__, "in place of --sizes", "2 s, one pass, the smallest size: whether it works"
    )
    parser.add_argument("--clip", type=Path, help="made grey, scaled, and repeated; a synthetic scene by default")
    parser.add_argument("--sizes", default="480,720,1080", help="heights of the picture")
    parser.add_argument("--seconds", type=float, default=10.0, help="of film in a pass")
    parser.add_argument("--rounds", type=int, default=3, help="passes that count")
    parser.add_argument("--preset", help="of libx264; the command's own by default")
    parser.add_argument("--keyframes", default="auto", help="auto, or every n-th frame")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--memory", action="store_true", help="peak memory of a short and a longer film too")
    parser.add_argument("--long", action="store_true", help="peak memory of 10 s and of 10 minutes too")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = timing.parse(parser, arguments)
    if options.child:
        return child(options)
    if options.size:
        options.sizes = str(options.size[1])
    if options.quick:
        options.sizes, options.seconds, options.rounds = options.sizes.split(",")[0], min(2.0, options.seconds), 1
    options.keyframes = int(options.keyframes) if options.keyframes.isdecimal() else options.keyframes
    record = timing.machine(options.device, options.commit)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for height in options.sizes.split(","):
            rows += contest(options, Path(folder), int(height))
        if options.memory or options.long:
            rows += memory(options, Path(folder))
    return timing.finish("video", options, record, rows)


if __name__ == "__main__":
    sys.exit(main())
