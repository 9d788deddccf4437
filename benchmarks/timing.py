"""What every benchmark shares: candidates timed in turn, a record of the machine, results as JSON, tables.

`python -m benchmarks.timing FOLDER` prints the tables of the JSON files in a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from fastcolor._files import atomic_path
from fastcolor.ops import _backend

from . import work
from .work import COPY, is_limit

NOT_MEASURED = "not measured"
PICTURE = {"cpu": (1920, 1080), "cuda": (3840, 2160), "quick": (320, 180)}  # width and height if none is given
QUICK_LIMITS = {"seconds": 0.02, "copied": 1 << 24, "side": 512}
_PACKAGES = ("fastcolor", "torch", "triton", "numpy", "scikit-image", "opencv-python-headless", "kornia")


def parser(name: str, doc: str, size: str, quick: str) -> argparse.ArgumentParser:
    """The options of every suite; `name` is its module below this package or its `ops`, `size` and `quick` are help."""
    if "." not in name and importlib.util.find_spec(f"{__package__}.ops.{name}"):
        name = f"ops.{name}"
    made = argparse.ArgumentParser(prog=f"python -m {__package__}.{name}", description=doc.splitlines()[0])
    made.add_argument("--size", help=f"width x height; {size}")
    add_options(made, quick, "results file, or the folder for one with the usual name; of")
    return made


def add_options(made: argparse.ArgumentParser, quick: str, json: str) -> None:
    """Options of one suite and of all of them."""
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--json", type=Path, metavar="PATH", help=f"{json} the JSON files")
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--threads", type=int, default=threads(), help="of every CPU candidate alike")
    made.add_argument("--commit", help="to record, where there is no git")


def check_device(made: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch sees no CUDA device")
    if options.threads < 1:
        made.error(f"--threads must be at least 1, got {options.threads}")


def parse(made: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options, with `size` as (width, height) or None, and the threads set."""
    options = made.parse_args(arguments)
    check_device(made, options)
    torch.set_num_threads(options.threads)
    if options.size:
        try:
            width, height = (int(n) for n in options.size.split("x"))
        except ValueError:
            made.error(f"--size must look like 480x270, got {options.size}")
        options.size = width, height
    options.started = time.monotonic()
    return options


def finish(name: str, options: argparse.Namespace, record: dict, rows: list[dict]) -> int:
    """Writes the results where they are wanted. The exit code: 1 where one of ours was too far off to be timed."""
    if options.json:
        record = {**record, "quick": options.quick, "seconds": round(time.monotonic() - options.started, 1)}
        record["limits"] = limits = work.limits(options.device, **(QUICK_LIMITS if options.quick else {}))
        rows = work.floors(rows, limits)
        print(f"written: {write(options.json, name, options.device, record, rows).name}")
    return 1 if any(r["ours"] and r.get("why", "").startswith("off by") for r in rows) else 0


@dataclass
class Candidate:
    """One contestant: `run(i)` is its i-th call, so that it can rotate among its inputs."""

    name: str
    run: Callable[[int], object] | None  # None: cannot run here
    why_not: str = ""
    ours: bool = False
    error: float | None = None  # against the float64 oracle, in the units of the benchmark
    note: str = ""


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    iqr: float
    samples: int
    called: float | None = None  # CUDA: one call after the other from Python, launch overhead included


def summary(samples: list[float], called: float | None = None) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return Timing(median, high - low, len(samples), called)


def measure(
    candidates: list[Candidate], device: str, rounds: int = 15, calls: int = 1, budget: float = 4.0
) -> dict[str, Timing]:
    """Times all candidates in turn, round after round, so that a disturbance meets them alike.

    Args:
        candidates: those that can run.
        device: "cpu" for the wall clock, "cuda" for events.
        rounds: samples of each candidate.
        calls: on CUDA, calls in a sample; they are replayed as one graph, so that launches from Python do not count.
        budget: seconds for one candidate: a slow one is left out of some rounds, but three samples it gets.
    """
    sample = (_cuda_sampler if device == "cuda" else _cpu_sampler)(calls)
    takers = [sample(c) for c in candidates]
    taken: list[list[float]] = [[] for _ in candidates]
    shares = [min(rounds, max(3, int(budget / seconds))) for *_, seconds in takers]
    for k in range(rounds):
        for i in range(len(takers)):
            i = (i + k) % len(takers)  # nobody always follows the same neighbour
            if (k + 1) * shares[i] // rounds > k * shares[i] // rounds:
                taken[i].append(takers[i][0]())
    return {c.name: summary(t, called) for c, t, (_, called, _) in zip(candidates, taken, takers, strict=True)}


def _cpu_sampler(_: int, shortest: float = 5e-3):
    def prepare(candidate: Candidate):
        def timed(calls: int) -> float:
            start = time.perf_counter()
            for i in range(calls):
                candidate.run(i)
            return (time.perf_counter() - start) / calls

        timed(1)  # caches, thread pools, compilation
        once = timed(1)
        calls = max(1, round(shortest / once))  # short calls are timed in a group
        return lambda: timed(calls), None, once * calls

    return prepare


def _cuda_sampler(calls: int):
    def prepare(candidate: Candidate):
        def direct() -> None:
            for i in range(calls):
                candidate.run(i)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # graphs want their warm-up on another stream
            direct()
        torch.cuda.current_stream().wait_stream(side)
        direct()
        called = statistics.median(_events(direct) for _ in range(5)) / calls
        before = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = [candidate.run(i) for i in range(calls)]  # kept: outputs rotate too
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own stream behind
            candidate.note = f"{candidate.note} timed call by call, no graph: {str(error).splitlines()[0]}".strip()
            return lambda: _events(direct) / calls, called, called * calls
        graph.replay()
        return lambda kept=kept: _events(graph.replay) / calls, called, called * calls

    return prepare


def _events(function: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def first_line(error: Exception) -> str:
    """Why something is not measured, fit for a table."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def plain_copy(moved: int, device: str) -> Candidate:
    """As many bytes read and written together as the operation moves, into memory that is already there."""
    # drawn on the CPU: a capture that failed leaves the device's generator unusable
    source = torch.randint(0, 256, (moved // 2,), dtype=torch.uint8).to(device)
    targets = [torch.empty_like(source) for _ in range(rotation(moved, device))]
    return Candidate(COPY, lambda i: targets[i % len(targets)].copy_(source))


def rotation(moved: int, device: str) -> int:
    """How many buffers to rotate among: so many that a GPU's L2 cache holds none until its turn comes, and 64 at most.
    Data of less than a sixteenth of the cache stays in it, and its figures are those of the cache.
    """
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, -(-4 * cache // moved)))


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes that a call adds to the process at its peak; None where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed before would be reused unseen

    def field(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    try:
        reset.write_text("5")
        before = field("VmRSS")
        run()
        return max(0, field("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def peak(run: Callable[[], object], device: str) -> int | None:
    """Bytes that a call adds at its peak: to the process, or to what torch holds of the GPU's memory."""
    if device != "cuda":
        return peak_memory(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# --- the machine ------------------------------------------------------------------------------------------------------


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_name(device: str) -> str:
    """A short model name, fit for a file name: of the GPU, or the CPU."""
    if device == "cuda":
        return _slug(torch.cuda.get_device_name(0))
    return _slug(_cpu_model())


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _slug(name: str) -> str:
    name = re.sub(r"\((R|TM|r|tm)\)|@.*|\b(CPU|Processor)\b", " ", name)
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def machine(device: str, commit: str | None = None) -> dict:
    """What a figure depends on: the machine, versions, commit, load and threads. No host name."""
    record = {
        "machine": machine_name(device),
        "cpu": _cpu_model(),
        "simd": getattr(_backend.native("_cpu"), "simd_level", lambda: "no C++ kernels")(),
        "cores": threads(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in _PACKAGES},
        "commit": commit or checkout(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "gpu": properties.name,
            "gpu_memory_GB": round(properties.total_memory / 1e9),
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return record


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def checkout() -> str:
    """Of this checkout, with a word where files have changed since; "unknown" for an installed package.

    Files of results and pages made from them count as no change: else the second suite of a run would see the first's.
    """
    if _output("git", "ls-files", "timing.py") != "timing.py":  # a virtual environment in somebody's repository
        return "unknown"
    found = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", ":/", ":(top,exclude)docs", ":(exclude)results")
    return f"{found}, with changes" if changed not in ("", "unknown") else found


# --- results ----------------------------------------------------------------------------------------------------------


def row(candidate: Candidate, timing: Timing | None, moved: int, operations: int | None = None, **context) -> dict:
    """One line of a results file; a figure that was not measured says so.

    Args:
        moved: bytes that have to be read and written, 0 where the memory is not what limits.
        operations: arithmetic of the definition, by work.py.
    """
    line = {**context, "candidate": candidate.name, "ours": candidate.ours, "error": candidate.error}
    if timing is None:
        return {**line, "median_us": NOT_MEASURED, "why": candidate.why_not}
    line |= {
        "median_us": round(timing.median * 1e6, 3),
        "iqr_us": round(timing.iqr * 1e6, 3),
        "samples": timing.samples,
    }
    if moved:
        line |= {"bytes": moved, "GB_per_s": round(moved / timing.median / 1e9, 3)}
    if operations and candidate.name != COPY:
        line |= {"operations": operations, "TFLOP_per_s": round(operations / timing.median / 1e12, 5)}
    if timing.called is not None:
        line["called_us"] = round(timing.called * 1e6, 3)
    return {**line, "note": candidate.note}


def compare(rows: list[dict]) -> list[dict]:
    """Adds to the rows of one table their share of the copy's speed, our best time under the others', and how each of
    ours stands to the best of the others.
    """
    timed = [r for r in rows if r["median_us"] != NOT_MEASURED]
    copy = next((r["median_us"] for r in timed if r["candidate"] == COPY), None)
    best = min((r["median_us"] for r in timed if r["ours"]), default=None)
    peers = [r for r in timed if not r["ours"] and not is_limit(r)]
    peer = min(peers, key=lambda r: r["median_us"], default=None)
    for r in timed:
        if copy:
            r["share_of_copy"] = round(copy / r["median_us"], 3)
        if best:
            r["ours_is_faster_by"] = round(r["median_us"] / best, 2)
        if peer and r["ours"]:
            r["best_peer"] = peer["candidate"]
            r["best_peer_takes"] = round(peer["median_us"] / r["median_us"], 2)
    return rows


def write(target: Path, suite: str, device: str, record: dict, rows: list[dict]) -> Path:
    """Writes a results file: `target` itself, or `<suite>--<machine>--<device>.json` in it where it is a folder."""
    if target.suffix != ".json":
        target = target / f"{suite}--{record['machine']}--{device}.json"
    write_json(target, {"suite": suite, "device": device, **record, "rows": rows})
    return target


def write_json(target: Path, result: dict) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


_COLUMNS = {  # key: (heading, format)
    "candidate": ("", "{}"),
    "median_us": ("median µs", "{:,.1f}"),
    "iqr_us": ("IQR µs", "{:,.1f}"),
    "called_us": ("called from Python µs", "{:,.1f}"),
    "GB_per_s": ("GB/s", "{:.1f}"),
    "TFLOP_per_s": ("TFLOP/s", "{:.3f}"),
    "share_of_copy": ("of the copy", "{:.0%}"),
    "ours_is_faster_by": ("ours is faster by", "{:.2f}×"),
    "error": ("error", "{:.2g}"),
    "note": ("", "{}"),
}


def show(rows: list[dict], title: str) -> None:
    """A table of rows, with rich where it is installed."""
    keys = [k for k in _COLUMNS if any(r.get(k) not in (None, "") for r in rows)]
    timed = [r for r in rows if r["median_us"] != NOT_MEASURED]
    cells = [["" if r.get(k) is None else _COLUMNS[k][1].format(r[k]) for k in keys] for r in timed]
    headings = [_COLUMNS[k][0] for k in keys]
    left_out = [f"  {r['candidate']}: {NOT_MEASURED}, {r['why']}" for r in rows if r["median_us"] == NOT_MEASURED]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
        print(title)
        for line in (headings, *cells):
            print("  " + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))))  # noqa: B905
        print("\n".join(left_out))
        return
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for line, r in zip(cells, timed, strict=True):
        table.add_row(*line, style="bold" if r["ours"] else None)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for line in left_out:
        console.print(line, style="dim", highlight=False)


def show_file(path: Path) -> None:
    """The tables of one results file."""
    result = json.loads(path.read_text())
    print(
        f"\n{path.name}: {result.get('gpu') or result['cpu']}, {result['threads']} threads, commit {result['commit']}"
    )
    if "pytest" in result:
        print("  " + ", ".join(f"{k} {v}" for k, v in result["pytest"].items() if v not in ([], None)))
    groups: dict[str, list[dict]] = {}
    for r in result["rows"]:
        groups.setdefault(r["title"], []).append(r)
    for title, rows in groups.items():
        show(rows, title)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the tables of the results files in a folder.")
    parser.add_argument("folder", type=Path)
    for path in sorted(parser.parse_args().folder.glob("*.json")):
        show_file(path)


if __name__ == "__main__":
    main()
