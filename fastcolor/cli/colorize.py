"""`fastcolor colorize`: files, folders and globs through one pipeline of readers, the network and writers."""

from __future__ import annotations

import glob
import logging
import os
import queue
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fastcolor.cli._options import Device, Mrf, Quiet, Saturation, Size, Temperature, Vividness, Weights
from fastcolor.imaging.files import Picture, decoded_size, read_picture, write_picture
from fastcolor.imaging.vips import SUFFIXES, ImageError, libvips

if TYPE_CHECKING:
    import numpy as np

    from fastcolor.model.colorizer import Colorizer

IN_FLIGHT = 1 << 30  # bytes of pixels, sources and results, that are held at a time; one larger file goes alone
_PICTURES = 256  # and files held at a time
_BATCH_PIXELS = 1 << 26  # of one batch: its lightness and its results stand in the device's memory together
# and of what the network sees: logits and field take about 2 kB a pixel, so a batch stays within some 2 GB
_BATCH_NETWORK_PIXELS = 1 << 20
_LINE_EVERY = 10.0  # seconds between lines of progress where there is no terminal

_VIDEO = {".mp4", ".m4v", ".mkv", ".mov", ".avi", ".webm", ".mpg", ".mpeg"}
_VIDEO |= {".mts", ".m2ts", ".wmv", ".flv", ".mxf", ".ts"}
_OTHER_IMAGES = {".gif", ".bmp", ".jp2", ".heic", ".heif", ".avif", ".jxl", ".psd", ".pdf", ".dng", ".exr", ".svg"}
_FORMATS = ", ".join(sorted(SUFFIXES))


# --- which files, and where to ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One file to read, and the one to write."""

    source: Path
    target: Path


@dataclass
class Plan:
    """What is to be done, how many outputs are there already, and a line for each input that cannot be."""

    tasks: list[Task] = field(default_factory=list)
    skipped: int = 0
    problems: list[str] = field(default_factory=list)


def make_plan(inputs: Sequence[str], out: Path | None, overwrite: bool) -> Plan:
    """Finds the images and names their outputs. Nothing is written."""
    plan = Plan()
    found: dict[Path, Task] = {}  # by the source's real path: a file named twice is one file

    def add(source: Path, target: Path) -> None:
        found.setdefault(_real(source), Task(source, target))

    single = len(inputs) == 1 and Path(inputs[0]).is_file()
    out_file = out if single and out is not None and out.suffix.lower() in SUFFIXES and not out.is_dir() else None
    for text in inputs:
        path = Path(text)
        try:
            if path.is_dir():
                for source, target in _folder(path, out):
                    add(source, target)
            elif path.exists():
                _check_suffix(path)
                add(path, out_file or _target(path, out))
            elif glob.has_magic(text):
                for source, target in _expand(text, out):
                    add(source, target)
            else:
                raise ImageError(f"{path}: no such file or folder")
        except ImageError as error:
            plan.problems.append(str(error))

    taken: dict[Path, Path] = {}
    if out is None:
        # photo-color.jpg is the output of photo.jpg, not one more photo, when `*.jpg` is given a second time
        outputs = {_real(task.target) for task in found.values()}
        found = {real: task for real, task in found.items() if real not in outputs}
    for task in found.values():
        target = _real(task.target)
        if target in found:
            plan.problems.append(f"{task.source}: its output {task.target} is one of the inputs; give another --out")
        elif target in taken:
            plan.problems.append(f"{task.source}: its output {task.target} is that of {taken[target]} too")
        else:
            taken[target] = task.source
            if not overwrite and task.target.exists():
                plan.skipped += 1
            else:
                plan.tasks.append(task)
    return plan


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _check_suffix(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in _VIDEO:
        raise ImageError(f"{path}: is a video; `fastcolor colorize` is for images ({_FORMATS})")
    if suffix not in SUFFIXES:
        raise ImageError(f"{path}: {suffix or 'a file without suffix'} is not supported ({_FORMATS} are)")


def _target(source: Path, out: Path | None) -> Path:
    return out / source.name if out is not None else source.with_name(f"{source.stem}-color{source.suffix}")


def _folder(folder: Path, out: Path | None) -> Iterable[tuple[Path, Path]]:
    from fastcolor.imaging.find import find_images

    named = Path(os.path.normpath(folder.absolute()))  # "." and ".." have no name of their own
    target = out if out is not None else named.with_name(f"{named.name}-color")
    if _real(target) == _real(folder):
        raise ImageError(f"{folder}: its outputs would replace the images in it; give another --out")
    files = find_images(folder)
    if out is not None and _real(folder) in _real(out).parents:
        # an output folder inside the input holds results of the last run
        files = [f for f in files if _real(out) not in _real(f).parents]
    if not files:
        raise ImageError(f"{folder}: no images in it ({_FORMATS})")
    return [(file, target / file.relative_to(folder)) for file in files]


def _expand(pattern: str, out: Path | None) -> Iterable[tuple[Path, Path]]:
    pairs: list[tuple[Path, Path]] = []
    for name in sorted(glob.glob(pattern, recursive=True)):
        path = Path(name)
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            pairs.append((path, _target(path, out)))
    if not pairs:
        raise ImageError(f"{pattern}: no images match it ({_FORMATS})")
    return pairs


def check_writable(tasks: Sequence[Task]) -> tuple[list[Task], dict[Path, tuple[str, int]]]:
    """The tasks whose output folders can be written to, and (reason, number of tasks) for each folder that cannot.

    Found out before hours of work. Folders are made here.
    """
    refused: dict[Path, str] = {}
    checked = set()
    for folder in {task.target.parent: None for task in tasks}:
        # the same answer holds for the folders below one that was refused
        if any(parent in refused for parent in folder.parents):
            refused[folder] = ""
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                checked.add(folder)
        except OSError as error:
            refused[folder] = error.strerror or str(error)
    problems: dict[Path, tuple[str, int]] = {}
    counts = Counter(task.target.parent for task in tasks)
    for folder, why in refused.items():
        top = next((p for p in reversed(folder.parents) if p in refused), folder)
        text, count = problems.get(top, (refused[top] or why, 0))
        problems[top] = (text, count + counts[folder])
    return [task for task in tasks if task.target.parent in checked], problems


# --- the pipeline -----------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The run was interrupted."""


class Budget:
    """Bytes that may be held at a time. Who asks for more waits, except that one alone always gets its wish.

    `starving` is called, without the lock, each time someone starts to wait.
    """

    def __init__(self, limit: int, starving: Callable[[], None]):
        self.limit, self.used, self.waiting = limit, 0, 0
        self._starving = starving
        self._closed = False
        self._changed = threading.Condition()

    def acquire(self, amount: int) -> None:
        """Raises Stopped when the budget was closed."""
        with self._changed:
            if self._fits(amount):
                self.used += amount
                return
            self.waiting += 1
        self._starving()
        with self._changed:
            self._changed.wait_for(lambda: self._fits(amount))
            self.waiting -= 1
            self.used += amount

    def _fits(self, amount: int) -> bool:
        if self._closed:
            raise Stopped
        return not self.used or self.used + amount <= self.limit

    def release(self, amount: int) -> None:
        with self._changed:
            self.used -= amount
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass(eq=False)
class _Job:
    """A file on its way: read, colored page by page, written."""

    task: Task
    cost: int
    picture: Picture
    results: list[np.ndarray | None]
    failed: bool = False


class Pipeline:
    """Reads, colors and writes many files: threads at both ends, the network in between on the calling thread.

    Pages wait in groups of one network size until a group is full. A reader that waits for memory has the fullest group
    sent off as it is, so that something gets finished and frees its share.

    Args:
        done: called with (task, None), or (task, reason) for a file that failed; on the calling thread.
    """

    def __init__(
        self,
        colorizer: Colorizer,
        done: Callable[[Task, str | None], None],
        *,
        jobs: int = 4,
        batch_size: int = 8,
        in_flight: int = IN_FLIGHT,
    ):
        self.colorizer, self.done, self.jobs, self.batch_size = colorizer, done, jobs, batch_size
        # ("read", a job or None), ("finished", None), ("starving", None)
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        # apart from the events: progress must not wait behind hundreds of files that are read already
        self._finished: queue.SimpleQueue = queue.SimpleQueue()
        self._left = 0
        self.budget = Budget(in_flight, lambda: self._events.put(("starving", None)))
        self._least = max(1, in_flight // _PICTURES)
        self._groups: dict[tuple[int, int], list[tuple[_Job, int]]] = {}
        self._writers: ThreadPoolExecutor | None = None

    def run(self, tasks: Sequence[Task]) -> None:
        """Works through all tasks. Ctrl-C (any exception): files being written are finished, the rest is left."""
        to_read, self._left = len(tasks), len(tasks)
        rest = iter(tasks)
        lock = threading.Lock()

        def read_all() -> None:
            while True:
                with lock:
                    task = next(rest, None)
                if task is None:
                    return
                try:
                    self._events.put(("read", self._read(task)))
                except Stopped:
                    return

        readers = ThreadPoolExecutor(self.jobs, "read")
        self._writers = ThreadPoolExecutor(self.jobs, "write")
        try:
            for _ in range(min(self.jobs, len(tasks))):
                readers.submit(read_all)
            while self._left:
                kind, result = self._events.get()
                if kind == "read":
                    to_read -= 1
                    self._add(result)
                self._report()
                while self._groups and (not to_read or (self.budget.waiting and self._events.empty())):
                    self._flush(max(self._groups, key=lambda size: len(self._groups[size])))
                    if to_read:
                        break
        finally:
            self.budget.close()
            readers.shutdown(wait=True)
            self._writers.shutdown(wait=True, cancel_futures=True)
            self._report()  # what was finished meanwhile

    def _report(self) -> None:
        while not self._finished.empty():
            self._left -= 1
            self.done(*self._finished.get())

    def _read(self, task: Task) -> _Job | None:
        cost = 0
        try:
            # three more channels: the result
            amount = max(decoded_size(task.source, channels=3), self._least)
            self.budget.acquire(amount)
            cost = amount
            picture = read_picture(task.source)
            return _Job(task, cost, picture, [None] * len(picture.pages))
        except Stopped:
            raise
        except ImageError as error:
            why = str(error)
        except Exception as error:  # whatever one file does, the others go on
            why = f"{task.source}: {type(error).__name__}: {error}"
        if cost:
            self.budget.release(cost)
        self._finished.put((task, why))
        return None

    def _add(self, job: _Job | None) -> None:
        if job is None:  # it could not be read
            return
        for number, page in enumerate(job.picture.pages):
            size = self.colorizer.network_size(*page.shape[:2])
            group = self._groups.setdefault(size, [])
            group.append((job, number))
            pixels = sum(j.picture.pages[i].shape[0] * j.picture.pages[i].shape[1] for j, i in group)
            seen = (len(group) + 1) * size[0] * size[1]  # with one picture more
            if len(group) >= self.batch_size or pixels >= _BATCH_PIXELS or seen > _BATCH_NETWORK_PIXELS:
                self._flush(size)

    def _flush(self, size: tuple[int, int]) -> None:
        """Colors one group, and hands the files that are complete to the writers."""
        self._report()
        items = [(job, number) for job, number in self._groups.pop(size) if not job.failed]
        if not items:
            return
        pages = [job.picture.pages[number] for job, number in items]
        colored = self._colorize(pages)
        if isinstance(colored, Exception) and len(items) > 1:
            # one bad picture must not take the others down; where all of them pass, the batch was too large
            colored = [self._colorize([page]) for page in pages]
            if not any(isinstance(result, Exception) for result in colored):
                self.batch_size = max(1, len(items) // 2)
            colored = [result if isinstance(result, Exception) else result[0] for result in colored]
        elif isinstance(colored, Exception):
            colored = [colored]
        for (job, number), result in zip(items, colored, strict=True):
            if job.failed:
                continue
            if isinstance(result, Exception):
                job.failed = True
                message = str(result).strip().splitlines() or [""]
                self._finish(job, f"{job.task.source}: {message[0] or type(result).__name__}")
                continue
            job.results[number] = result
            if all(r is not None for r in job.results):
                self._writers.submit(self._write, job)

    def _colorize(self, pages: list[np.ndarray]) -> list[np.ndarray] | Exception:
        try:
            return self.colorizer.colorize_batch(pages)
        except Exception as error:
            return error.with_traceback(None)  # its frames would hold the memory that a second try needs

    def _write(self, job: _Job) -> None:
        try:
            write_picture(job.task.target, job.picture, job.results)
            self._finish(job, None)
        except ImageError as error:
            self._finish(job, str(error))
        except Exception as error:
            self._finish(job, f"{job.task.target}: {type(error).__name__}: {error}")

    def _finish(self, job: _Job, why: str | None) -> None:
        self.budget.release(job.cost)
        self._finished.put((job.task, why))
        self._events.put(("finished", None))


# --- what the user sees -----------------------------------------------------------------------------------------------


class Reporter:
    """Progress on a terminal as a bar, elsewhere as a line now and then; errors on stderr, one line each."""

    def __init__(self, quiet: bool):
        from rich.console import Console

        self.quiet = quiet
        self.console = Console(stderr=True)
        self.counts = Counter()
        self.total = 0
        self._bar: Any = None
        self._started = self._last_line = time.monotonic()

    def error(self, message: str, count: int = 1) -> None:
        self.counts["failed"] += count
        self.say(f"error: {message}")

    def say(self, text: str) -> None:
        if self._bar is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def start(self, total: int) -> None:
        self.total = total
        self._started = self._last_line = time.monotonic()
        if self.quiet or not self.console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._bar.add_task("", total=total, rate="")
        self._bar.start()

    def done(self, task: Task, why: str | None) -> None:
        if why is None:
            self.counts["colorized"] += 1
        else:
            self.error(why)
        now = time.monotonic()
        finished = self.counts["colorized"] + self.counts["failed"]
        if self._bar is not None:
            speed = self._bar.tasks[0].speed
            self._bar.update(self._bar.task_ids[0], advance=1, rate=f"{speed:.1f} files/s" if speed else "")
        elif not self.quiet and now - self._last_line >= _LINE_EVERY and finished < self.total:
            self._last_line = now
            rate = finished / (now - self._started)
            left = time.strftime("%H:%M:%S", time.gmtime((self.total - finished) / rate))
            self.say(f"{finished} of {self.total} files, {rate:.2g} files/s, {left} left")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Log(logging.Handler):
    """Warnings, such as of metadata that a format cannot hold, beside the progress bar."""

    def __init__(self, reporter: Reporter):
        super().__init__(logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.say(f"{record.levelname.lower()}: {record.getMessage()}")


# --- the command ------------------------------------------------------------------------------------------------------


def colorize(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Images, folders (with all below), or patterns in quotes.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the results, or a file name for one image."),
    ] = None,
    weights: Weights = None,
    size: Size = None,
    temperature: Temperature = 0.38,
    vividness: Vividness = None,
    saturation: Saturation = 1.0,
    mrf: Mrf = True,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write outputs anew that are there already.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads that read, and that write; 4 at most by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Images of like size that share a batch.")] = 8,
    quiet: Quiet = False,
) -> None:
    """Colorize photographs: JPEG, PNG, TIFF, WebP.

    Depth, alpha, pages, EXIF, IPTC, XMP and resolution stay; the result is sRGB.
    Without --out, photo.jpg becomes photo-color.jpg beside it, and a folder
    becomes folder-color. Outputs that are there already are skipped: the same
    command again goes on where it was interrupted.
    """
    started = time.monotonic()
    if out is not None and not out.is_dir():
        if out.exists() and not (len(inputs) == 1 and out.suffix.lower() in SUFFIXES and Path(inputs[0]).is_file()):
            _refuse(f"--out {out}: is a file, expected a folder for the results")
        single = len(inputs) == 1 and (Path(inputs[0]).is_file() or not Path(inputs[0]).exists())
        if out.suffix.lower() in SUFFIXES and (not single or glob.has_magic(inputs[0])) and not out.exists():
            _refuse(f"--out {out}: names one image, but there may be several results; give a folder")
        if out.suffix.lower() in _OTHER_IMAGES | _VIDEO:
            _refuse(f"--out {out}: {out.suffix} cannot be written ({_FORMATS} can)")
    reporter = Reporter(quiet)
    log = _Log(reporter)
    package_log = logging.getLogger("fastcolor")
    package_log.addHandler(log)
    plan = Plan()
    try:
        plan = make_plan(inputs, out, overwrite)
        for problem in plan.problems:
            reporter.error(problem)
        tasks, refused = check_writable(plan.tasks)
        for folder, (why, count) in refused.items():
            reporter.error(f"{folder}: cannot be written to ({why})", count)
        if tasks:
            options = {"temperature": temperature, "saturation": saturation, "mrf": mrf}
            options |= {name: value for name, value in (("size", size), ("vividness", vividness)) if value is not None}
            colorizer = _load(weights, device, options)
            # the threads are ours: libvips' own, as many for each file as there are cores, would only fight over them
            libvips().concurrency_set(1)
            reporter.start(len(tasks))
            workers = jobs or min(4, os.cpu_count() or 1)
            Pipeline(colorizer, reporter.done, jobs=workers, batch_size=batch_size).run(tasks)
    except KeyboardInterrupt:
        reporter.stop()
        colorized = reporter.counts["colorized"]
        then = "with --overwrite the same command starts over" if overwrite else "the same command goes on from there"
        reporter.say(f"interrupted: colorized {colorized}, {len(plan.tasks) - colorized} left; {then}")
        raise typer.Exit(130) from None
    finally:
        reporter.stop()
        package_log.removeHandler(log)
    if not quiet:
        took = time.monotonic() - started
        colorized, failed = reporter.counts["colorized"], reporter.counts["failed"]
        typer.echo(
            f"colorized {colorized}, skipped {plan.skipped}, failed {failed} "
            f"in {took:.1f} s ({colorized / max(took, 1e-9):.1f} images/s)"
        )
    if reporter.counts["failed"]:
        raise typer.Exit(1)


def _load(
    weights: Path | None,
    device: str,
    options: dict[str, Any],
    ops: tuple[str, ...] = ("rgb_to_lab", "mean_field", "render", "lab_to_rgb"),
) -> Colorizer:
    from fastcolor.model.checkpoint import CheckpointError
    from fastcolor.model.colorizer import Colorizer
    from fastcolor.model.device import DeviceError
    from fastcolor.ops._backend import BackendError, choose

    try:
        libvips()
        load = Colorizer.from_pretrained if weights is None else partial(Colorizer.load, weights)
        colorizer = load(device, **options)
        for op in ops:  # before any file, not once for each
            choose(op, colorizer.device)
        return colorizer
    except (CheckpointError, DeviceError, BackendError, ImportError) as error:
        _refuse(str(error))


def _refuse(message: str) -> NoReturn:
    """Ends the command before any work: what was asked for cannot be."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)
