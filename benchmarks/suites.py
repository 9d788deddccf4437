"""Runs benchmark suites one by one, each in a process of its own, and keeps what each measured as soon as it is done.

`python -m benchmarks [SUITE...] [--quick] [--json FOLDER] [--device cpu|cuda] [--threads N] [--resume]`
`python -m benchmarks report | spread ...`: the page and plots made from the files, and how far reruns lie apart.

A process each: one that crashes or runs out of memory takes no other with it, peaks of memory are its own, and no
compiled graph or warm cache of one suite meets the next.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import timing


@dataclass(frozen=True)
class Suite:
    """A module with a `main` that takes the options of `timing.parser`; it writes its own results file."""

    module: str  # below this package
    about: str
    seconds: tuple[int, int]  # expected on two cores, whole and --quick: only for the time left
    options: tuple[str, ...] = ()  # that keep it short among the others; by itself it does all it can


SUITES = {
    "lab": Suite("ops.lab", "RGB ↔ Lab: OpenCV, kornia, scikit-image, torch.compile", (45, 6)),
    "loss": Suite("ops.loss", "colour cross-entropy and gradient: dense soft targets, torch.compile", (60, 8)),
    "mean_field": Suite("ops.mean_field", "the field over 313 labels: pydensecrf, windowed PyTorch", (150, 8)),
    "render": Suite("ops.render", "chroma upsampling and Lab → RGB or U, V: OpenCV, kornia", (60, 6)),
    "annealed_mean": Suite("ops.annealed_mean", "logits to colours: unfused PyTorch, torch.compile", (30, 6)),
    "network": Suite("network", "the colour network: an eccv16-shaped network, torch.compile", (90, 8)),
    "image": Suite("image", "a picture from file to file, and its stages: the notebook pipeline", (60, 10)),
    "training": Suite(
        "training",
        "training, 256×256: scikit-image in the loader, eager float32",
        (170, 12),
        ("--size", "256x256", "--rounds", "2"),
    ),
    "video": Suite(
        "video",
        "a film of 720p from file to file: PNGs one at a time",
        (100, 12),
        ("--sizes", "720", "--seconds", "3", "--rounds", "2"),
    ),
    "scaling": Suite("scaling", "size, batch, threads, labels, sweeps and window, one at a time", (90, 10)),
}


def available(suite: Suite) -> bool:
    """Whether its file is there."""
    return importlib.util.find_spec(f"{__package__}.{suite.module}") is not None


def names() -> list[str]:
    """Of the suites that are there, in the order in which they run."""
    return [name for name, suite in SUITES.items() if available(suite)]


@dataclass(frozen=True)
class Outcome:
    suite: str
    state: str  # passed, FAILED, skipped, stopped
    seconds: float
    why: str = ""

    def __str__(self) -> str:
        return f"{self.state:8} {self.suite}, {self.seconds:.0f} s" + (f": {self.why}" if self.why else "")


def finished(folder: Path, name: str, device: str, wanted: dict) -> Path | None:
    """The file that a suite has left in a folder, if it was made by the same code with the same options."""
    path = folder / f"{name}--{timing.machine_name(device)}--{device}.json"
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return path if all(result.get(key) == value for key, value in wanted.items()) else None


def run_suite(name: str, arguments: list[str]) -> Outcome:
    """Runs one suite in a process of its own; its tables go to this process's output."""
    start = time.perf_counter()
    command = [sys.executable, "-m", f"{__package__}.{SUITES[name].module}", *arguments]
    try:
        code = subprocess.run(command).returncode
    except KeyboardInterrupt:  # the suite has had it too
        return Outcome(name, "stopped", time.perf_counter() - start)
    took = time.perf_counter() - start
    if code == 0:
        return Outcome(name, "passed", took)
    return Outcome(name, "FAILED", took, f"signal {-code}" if code < 0 else f"exit code {code}")


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def run(chosen: list[str], options: argparse.Namespace) -> int:
    """Runs the suites in turn. 0: all passed; 1: one failed; 130: stopped by Ctrl-C, or by a termination."""
    # as Ctrl-C, which the suite's process has too: it must not be left behind
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    commit = options.commit or timing.checkout()
    arguments = ["--device", options.device, "--threads", str(options.threads), "--commit", commit]
    arguments += ["--quick"] if options.quick else []
    arguments += ["--json", str(options.json)] if options.json else []
    wanted = {"commit": commit, "threads": options.threads, "quick": options.quick}
    expected = {name: SUITES[name].seconds[options.quick] for name in chosen}
    outcomes: list[Outcome] = []
    pace = 1.0  # how this machine compares with what is expected
    for k, name in enumerate(chosen):
        left = pace * sum(expected[n] for n in chosen[k:])
        print(f"== {name}, {k + 1} of {len(chosen)}; about {duration(left)} left", flush=True)
        if options.resume and options.json and (path := finished(options.json, name, options.device, wanted)):
            outcomes.append(Outcome(name, "skipped", 0.0, f"{path.name} is of this commit"))
            continue
        own = () if options.quick else SUITES[name].options
        outcomes.append(outcome := run_suite(name, [*arguments, *own]))
        if outcome.state == "stopped":
            break
        timed = [o for o in outcomes if o.state == "passed"]
        if timed:
            pace = sum(o.seconds for o in timed) / sum(expected[o.suite] for o in timed)
    print("\n".join(["== outcome", *map(str, outcomes)]))
    if outcomes and outcomes[-1].state == "stopped":
        print(f"left: {', '.join(chosen[len(outcomes) - 1 :])}; --resume leaves out what is done")
        return 130
    return int(any(o.state == "FAILED" for o in outcomes))


def show_list() -> None:
    for name, suite in SUITES.items():
        absent = "" if available(suite) else " (not in this version)"
        whole, quick = map(duration, suite.seconds)
        print(f"{name:14} {suite.about}; about {whole}, {quick} with --quick{absent}")


def main(arguments: list[str] | None = None, program: str = "python -m benchmarks") -> int:
    """The command line of both `fastcolor bench` and `python -m benchmarks`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["report"]:
        from .report import main as report

        return report(arguments[1:], f"{program} report")
    if arguments[:1] == ["spread"]:
        from .spread import main as spread

        return spread(arguments[1:], f"{program} spread")
    parser = argparse.ArgumentParser(
        prog=program,
        description="Times fastcolor beside reference implementations. All suites, or those that are named.",
        epilog=f"`{program} report` makes page and plots from the files; `{program} spread FILE FILE` compares reruns.",
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--list", action="store_true", help="show the suites and how long each takes, and run nothing")
    parser.add_argument("--names", action="store_true", help="show the names of the suites that are there, and modules")
    parser.add_argument("--resume", action="store_true", help="leave out suites whose file of this commit is there")
    timing.add_options(parser, quick="few samples and small sizes: whether all runs, not how fast", json="folder of")
    options = parser.parse_args(arguments)
    if options.list:
        show_list()
        return 0
    if options.names:
        print("\n".join(f"{name} {__package__}.{SUITES[name].module}" for name in names()))
        return 0
    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        parser.error(f"no suite is called {unknown[0]!r}; there are {', '.join(SUITES)}")
    absent = [name for name in options.suites if not available(SUITES[name])]
    if absent:
        parser.error(f"suite {absent[0]!r} is not in this version")
    if options.resume and not options.json:
        parser.error("--resume needs --json FOLDER, where the files of the suites are")
    if options.json and options.json.suffix == ".json":
        parser.error(f"--json must be a folder, got {options.json}")
    timing.check_device(parser, options)
    return run(list(dict.fromkeys(options.suites)) or names(), options)


if __name__ == "__main__":
    sys.exit(main())
