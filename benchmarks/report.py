"""The page of figures and its plots, made from results files alone: what no file says is "not measured".

`python -m benchmarks report [FOLDER] [--page docs/performance.md] [--readme]`

Ratios are printed as wide as they were seen: over reruns of a suite, or the quartiles of its one run (results.py).
`--readme` rewrites the block of README.md between `<!-- table: performance -->` and `<!-- end of table -->`, or prints
it where there is none.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fastcolor._files import atomic_path
from fastcolor._version import __version__

from . import spread, work
from .results import FOLDER, RERUNS, Run, Span, find, load, ratio, significant, timed
from .timing import NOT_MEASURED

ROOT = FOLDER.parent.parent
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- table: performance -->\n).*?(<!-- end of table -->)", re.DOTALL)
SUITES = (
    "lab", "loss", "mean_field", "render", "annealed_mean", "network", "image", "training", "video", "scaling",
)  # fmt: skip


@dataclass(frozen=True)
class Results:
    """All files of one version: the main run of each suite and machine, and its reruns."""

    runs: list[Run]
    again: list[Run]
    counts: list[dict] = field(default_factory=list)  # of benchmarks/instructions.py

    @classmethod
    def load(cls, folder: Path) -> Results:
        counts = [json.loads(path.read_text()) for path in sorted(folder.glob("instructions--*.json"))]
        return cls(load(folder), load_reruns(folder), counts)

    def of(self, suite: str, device: str) -> list[Run]:
        """The runs of a suite: of the machine with the newest first."""
        found = [r for r in self.runs if (r.suite, r.device) == (suite, device)]
        return sorted(found, key=lambda r: (r.data["date"], r.machine), reverse=True)

    def same(self, run: Run) -> list[Run]:
        """A run and its reruns on the same machine."""
        alike = [r for r in self.again if (r.suite, r.machine, r.device) == (run.suite, run.machine, run.device)]
        return [run, *alike]

    def devices(self, device: str) -> list[Run]:
        return [r for r in self.runs if r.device == device]


def load_reruns(folder: Path) -> list[Run]:
    """`reruns/<anything>/<suite>--<machine>--<device>.json`, a folder for each rerun."""
    return [run for path in sorted((folder / RERUNS).glob("*")) if path.is_dir() for run in load(path)]


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One line of the design's table: how many times a peer's time over ours, both in one run."""

    what: str
    suite: str
    title: str
    ours: str
    peer: str
    times: float
    key: str = "time"  # or "peak_MB": memory instead


_FLOAT_LAB, _TO_BYTES = r"^rgb_to_lab, 1920×1080, uint8 → float32", r"^lab_to_rgb, 1920×1080, float32 → uint8"
_FIELD = r"^mean_field, 313 labels, 480×270, 5 sweeps"
_RENDER = r"^render, 1920×1080, colours of a photograph"
_INTERLEAVED = r"fastcolor cpp, interleaved"
_LOSS = r"^loss and gradient, 16×64×64 pixels, K = 313, torch.{}, labels last"
CPU_TARGETS = [
    Target("rgb_to_lab, 1080p, over OpenCV float32", "lab", _FLOAT_LAB, _INTERLEAVED, "OpenCV float32", 3),
    Target("rgb_to_lab, 1080p, over kornia", "lab", _FLOAT_LAB, _INTERLEAVED, "kornia", 15),
    Target("rgb_to_lab, 1080p, over scikit-image", "lab", _FLOAT_LAB, _INTERLEAVED, "scikit-image", 30),
    Target("lab_to_rgb, 1080p, over OpenCV float32", "lab", _TO_BYTES, _INTERLEAVED, "OpenCV float32", 2),
    Target("lab_to_rgb, 1080p, over kornia", "lab", _TO_BYTES, _INTERLEAVED, "kornia", 15),
    Target("mean_field, 480×270, marginals, over pydensecrf", "mean_field", _FIELD, "cpp, R=3, float32, planes",
           "pydensecrf, Potts", 40),
    Target("mean_field, 480×270, to ab, over pydensecrf", "mean_field", _FIELD, "cpp, R=3, float32, labels last, to ab",
           "pydensecrf, Potts", 40),
    *(Target(f"color_cross_entropy, {kind}, over unfused PyTorch", "loss", _LOSS.format(kind), "fastcolor",
             "our reference, PyTorch eager", 5) for kind in ("float32", "bfloat16")),
    *(Target(f"color_cross_entropy, {kind}, memory, over dense soft targets", "loss", _LOSS.format(kind), "fastcolor",
             "dense soft targets, F.cross_entropy", 4, "peak_MB") for kind in ("float32", "bfloat16")),
    Target("render, 1080p, clipped, over bilinear and OpenCV", "render", _RENDER, "fastcolor cpp, clipped",
           "bilinear and OpenCV float32, clipped", 3),
    Target("render, 1080p, lightness kept, over bilinear and OpenCV (which clips)", "render", _RENDER,
           "fastcolor cpp, lightness kept", "bilinear and OpenCV float32, clipped", 3),
    Target("network and everything, 256×256, over an eccv16-shaped network's notebook", "image",
           r"^image, 256×256, JPEG", "fastcolor", "notebook pipeline, eccv16-shaped", 8),
    Target("training, 256×256, over scikit-image in the loader and eager float32", "training", r"256×256",
           r"fastcolor.*", r"reference pipeline.*", 3),
]  # fmt: skip

# Read off the tables by hand (0.1.0, AMD EPYC), for targets of a suite that were not surely reached: what the tables
# show, and what is only thought to be the cause. Look again when the files change.
WHERE = {
    "mean_field": "the 162 MB of marginals that a call hands back: the same field to ab, without them, is steadier. "
    "That the system's handing out of fresh memory is the cause is likely, not proven.",
    "loss": "the 82 MB of gradient in float32 that a call hands back: with a quarter of the pixels, each takes half or "
    "less. The same cause is likely, not proven.",
    "training": "forward and backward of the network are nine tenths; no crop is waited for.",
}
FRAMES = ("film, 1280×720, decoded and encoded", "video", r"1280×720", 24)  # frames per second

# The design's table for one H200: kernel, suite, title, candidate, floor there in µs, target as a share of the floor
GPU_KERNELS = [
    ("rgb_to_lab, 3840×2160, uint8 → float32", "lab", r"^rgb_to_lab, 3840×2160, uint8 → float32", "29 µs", "85 %"),
    ("lab_to_rgb, 3840×2160, float32 → uint8", "lab", r"^lab_to_rgb, 3840×2160, float32 → uint8", "29 µs", "85 %"),
    ("render to U, V, 3840×2160, 4:2:0, 8 bits", "render", r"^render to U, V, 3840×2160", "3 µs", "70 %"),
    ("color_cross_entropy, forward and backward, 64×64×64 pixels, K = 313, bfloat16", "loss",
     r"^loss and gradient, 64×64×64 .*bfloat16, labels last", "76 µs", "80 %"),
    ("mean_field, 8 sweeps, 32×64×64, K = 313, bfloat16", "mean_field",
     r"^mean_field, 313 labels, 32 of 64×64, bfloat16, 8 sweeps", "19 µs resident, 153 µs streaming",
     "2.5 reads of the logits resident, 80 % streaming"),
    ("network, 256×256, bfloat16, one picture of a batch", "network", r"^network, 128 of 256×256", "7.5 µs",
     "100 µs (10,000 images/s, everything included)"),
    ("training, 256×256", "training", r"256×256", "", "200 µs a picture (5,000 images/s)"),
    ("film, 1920×1080, frames on the GPU", "video", r"1920×1080", "", "333 µs a frame (3,000 fps)"),
]  # fmt: skip


def figure(results: Results, target: Target) -> tuple[Run | None, Span | None]:
    for run in results.of(target.suite, "cpu"):
        runs = results.same(run)
        measure = ratio if target.key == "time" else amounts
        found = measure(runs, target.title, target.ours, target.peer)
        if found:
            return run, found
    return None, None


def amounts(runs: list[Run], title: str, ours: str, peer: str, key: str = "peak_MB") -> Span | None:
    """As `ratio`, of another figure than the time."""
    pairs = [(find(r, title, ours), find(r, title, peer)) for r in runs]
    values = [b[key] / a[key] for a, b in pairs if a and b and a.get(key) and b.get(key)]
    return Span(min(values), max(values)) if values else None


def verdict(span: Span, wanted: float) -> str:
    if span.only is not None:
        return f"{'reached' if span.only >= wanted else 'not reached'} (one sample)"
    if span.low >= wanted:
        return "reached"
    return "within the spread" if span.high >= wanted else "not reached"


def frames(results: Results, title: str) -> tuple[Run | None, Span | None]:
    """The best frames per second of ours, over the runs of one machine."""
    for run in results.of(FRAMES[1], "cpu"):
        best = []
        for r in results.same(run):
            rows = [x for x in timed(r.rows) if x["ours"] and x.get("fps") and re.search(title, x["title"])]
            best += [max(x["fps"] for x in rows)] if rows else []
        if best:
            return run, Span(min(best), max(best))
    return None, None


def cpu_targets(results: Results) -> list[str]:
    lines = [
        "| on the CPU, in one run on the same threads | target | seen | | machine |",
        "| --- | --- | --- | --- | --- |",
    ]
    missed = {}
    for target in CPU_TARGETS:
        run, span = figure(results, target)
        seen = [span.times, verdict(span, target.times), run.hardware] if span else [NOT_MEASURED, "", ""]
        if seen[1] not in ("", "reached") and target.suite in WHERE:
            missed[target.suite] = f"- {target.suite}: {WHERE[target.suite]}"
        lines.append(f"| {target.what} | {significant(target.times)}× | {' | '.join(seen)} |")
    run, span = frames(results, FRAMES[2])
    seen = [f"{span} fps", verdict(span, FRAMES[3]), run.hardware] if span else [NOT_MEASURED, "", ""]
    lines.append(f"| {FRAMES[0]} | {FRAMES[3]} fps | {' | '.join(seen)} |")
    return [
        *lines,
        *(
            [
                "",
                "Where the time goes, of those not reached, or not surely (read off the tables below by hand):",
                "",
                *missed.values(),
            ]
            if missed
            else []
        ),
    ]


def gpu_page(results: Results) -> list[str]:
    """A row for each kernel and backend of the design's table, whether anybody measured it or not."""
    lines = [
        "| kernel | floor on an H200 (4.3 TB/s copy, 790 TFLOP/s bf16) | target | GPU | time | of its floor |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for what, suite, title, floor, target in GPU_KERNELS:
        rows = []
        for run in results.of(suite, "cuda"):
            table = [r for r in timed(run.rows) if r["ours"] and re.search(title, r["title"])]
            best = min(table, key=lambda r: r["median_us"], default=None)
            if best:
                share = f"{best['share_of_floor']:.0%}" if "share_of_floor" in best else NOT_MEASURED
                rows.append(f"{run.hardware} | {time_text(time_of_one(best))}, {best['candidate']} | {share}")
        for seen in rows or [f"{NOT_MEASURED} | {NOT_MEASURED} | {NOT_MEASURED}"]:
            lines.append(f"| {what} | {floor} | {target} | {seen} |")
    return lines


def time_of_one(row: dict) -> float:
    """Microseconds of a picture or a frame where a row counts them, else of a call."""
    return next((1e6 / row[speed] for speed in ("images_per_s", "fps") if row.get(speed)), row["median_us"])


# --- tables -----------------------------------------------------------------------------------------------------------


def time_text(us: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{significant(us / size)} {unit}"
    return f"{significant(us)} µs"


def tables(results: Results, run: Run) -> list[str]:
    """All tables of one file."""
    lines = []
    for title in dict.fromkeys(r["title"] for r in run.rows):
        rows = [r for r in run.rows if r["title"] == title]
        lines += [f"**{title}**", "", *table(results, run, rows), ""]
    return lines


_COLUMNS = {  # heading: cell
    "median": lambda r: time_text(r["median_us"]),
    "spread": lambda r: "one call" if r["samples"] == 1 else f"{r['iqr_us'] / r['median_us']:.0%}",
    "GB/s": lambda r: significant(r["GB_per_s"]) if "GB_per_s" in r else "",
    "GFLOP/s": lambda r: significant(r["TFLOP_per_s"] * 1e3) if r.get("TFLOP_per_s") else "",
    "of its floor": lambda r: f"{r['share_of_floor']:.0%}, {r['bound']}" if "share_of_floor" in r else "",
    "images/s": lambda r: significant(r["images_per_s"]) if "images_per_s" in r else "",
    "fps": lambda r: significant(r["fps"]) if "fps" in r else "",
    "share": lambda r: f"{r['share']:.0%}" if "share" in r else "",
    "peak MB": lambda r: significant(r["peak_MB"]) if r.get("peak_MB") else "",
    "error": lambda r: f"{r['error']:.2g}" if r.get("error") is not None else "",
}


def table(results: Results, run: Run, rows: list[dict]) -> list[str]:
    measured = timed(rows)
    cells = {name: [make(r) for r in measured] for name, make in _COLUMNS.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    best = min((r for r in measured if r["ours"]), key=lambda r: r["median_us"], default=None)
    if best and any(not r["ours"] and not work.is_limit(r) for r in measured):
        runs, title = results.same(run), re.escape(best["title"]) + "$"
        ours = re.escape(best["candidate"])
        cells["over our best"] = [
            "" if r["ours"] or work.is_limit(r) else ratio(runs, title, ours, re.escape(r["candidate"])).times
            for r in measured
        ]
    lines = [f"| | {' | '.join(cells)} |", "| --- |" + " --- |" * len(cells)]
    for i, r in enumerate(measured):
        name = f"**{r['candidate']}**" if r["ours"] else r["candidate"]
        lines.append(f"| {name} | {' | '.join(column[i] for column in cells.values())} |")
    for r in rows:
        if r["median_us"] == NOT_MEASURED:
            lines.append(f"| {r['candidate']} | {NOT_MEASURED}: {r['why']} |" + " |" * (len(cells) - 1))
    return lines


def machines(runs: Iterable[Run]) -> list[str]:
    lines = [
        "| suite | machine | threads | load before | commit | date | took |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        d = run.data
        took = f"{d['seconds']:.0f} s" if "seconds" in d else ""
        load = ", ".join(f"{x:g}" for x in d["load"])
        what = f"{run.hardware}, {d['simd']}" if run.device == "cpu" else run.hardware
        lines.append(f"| {run.suite} | {what} | {d['threads']} | {load} | {d['commit']} | {d['date']} | {took} |")
    return lines


def losses(results: Results) -> list[str]:
    """Where a peer beats the best of ours, or else the slowest, or may: the ratio's lower end is below 1."""
    lines = []
    for run in (r for suite in SUITES for device in ("cpu", "cuda") for r in results.of(suite, device)):
        for title in dict.fromkeys(r["title"] for r in run.rows):
            rows = [r for r in timed(run.rows) if r["title"] == title]
            ours = sorted((r for r in rows if r["ours"] and not work.is_limit(r)), key=lambda r: r["median_us"])
            contests = [(ours[0], "our best"), (ours[-1], ours[-1]["candidate"])] if ours else []
            for r in rows:
                if r["ours"] or work.is_limit(r):
                    continue
                for mine, name in contests:
                    pair = re.escape(mine["candidate"]), re.escape(r["candidate"])
                    span = ratio(results.same(run), re.escape(title) + "$", *pair)
                    if span and span.low < 1:
                        one = "" if span.only is None else ", in one sample"
                        what = f"{title.partition(';')[0]} ({run.hardware})"
                        lines.append(f"- {what}: {r['candidate']} takes {span} times {name}{one}.")
                        break
    return lines or ["None in these files."]


def instructions(results: Results) -> list[str]:
    lines = []
    for count in results.counts:
        lines += [
            f"Compiled for {count['simd'].upper()}, one thread, commit {count['commit']}, {count['date']}.",
            "",
            "| operation | a | instructions | argued floor | times the floor |",
            "| --- | --- | --- | --- | --- |",
        ]
        for r in count["counts"]:
            figures = f"{r['instructions']:.2f} | {r['floor']:.2f} | {r['times_floor']:.1f}"
            lines.append(f"| {r['op']} | {r['unit']} | {figures} |")
        lines.append("")
    return lines or [NOT_MEASURED.capitalize() + ".", ""]


def spreads(results: Results) -> list[str]:
    lines = []
    for run in results.runs:
        runs = results.same(run)
        if len(runs) > 1:
            compared = spread.compare(runs)
            middle, most = spread.summary(compared)
            widest = max(compared, key=lambda line: line["between"])
            lines.append(
                f"- {run.suite}, {run.hardware}, {len(runs)} runs, {len(compared)} rows: {middle:.0%} in the median, "
                f"{most:.0%} at most ({widest['candidate']}; {widest['title'].partition(';')[0]})."
            )
    return lines or ["No suite has been run twice: ratios below are as wide as the quartiles of their one run."]


# --- the page ---------------------------------------------------------------------------------------------------------


INTRODUCTION = """\
Made by `python -m benchmarks report` from the files in [benchmarks/results](../benchmarks/results/README.md), which
says what each figure is. All candidates of a table are timed in turn in one process, on the same threads and data, ours
after it was compared with float64. A ratio is printed as wide as it was seen: over reruns of the suite, or by the
quartiles of its one run; where it rests on one sample, it says so. *Of its floor*: the time that a plain copy of as
many bytes, or a matrix product of as many operations, takes in the same run, over the time; above 100 %, the data
stays in caches."""


INSTRUCTIONS = """\
Of the C++ kernels, by callgrind (`python -m benchmarks.instructions`, which argues the floors: every register full,
each number loaded and stored once, nothing spent on loops, addresses and edges). valgrind knows no AVX-512, so these
are of the AVX2 versions, 8 floats a register. What a call costs besides is not in them."""


def page(results: Results, plots: dict[str, str]) -> str:
    """`plots`: caption to path from the page; only those that could be drawn."""
    cpu, gpu = results.devices("cpu"), results.devices("cuda")
    lines = [
        "# Performance",
        "",
        *INTRODUCTION.splitlines(),
        "",
        "## Targets",
        "",
        *cpu_targets(results),
        "",
        "## Where a peer is ahead",
        "",
        *losses(results),
        "",
        "## Spread between runs",
        "",
        *spreads(results),
        "",
    ]
    if plots:
        lines += ["## Plots", ""]
        for caption, path in plots.items():
            lines += [f"![{caption}]({path})", "", f"{caption}.", ""]
    lines += ["## GPU", "", *gpu_page(results), ""]
    lines += ["## Instructions", "", *INSTRUCTIONS.splitlines(), "", *instructions(results)]
    lines += ["## The runs", "", *machines([*cpu, *gpu]), ""]
    for suite in SUITES:
        for run in [*results.of(suite, "cpu"), *results.of(suite, "cuda")]:
            lines += [f"## {suite}, {run.hardware}", "", *tables(results, run)]
        if not results.of(suite, "cpu"):
            lines += [f"## {suite}", "", f"On a CPU: {NOT_MEASURED}.", ""]
    return "\n".join(lines).rstrip() + "\n"


# --- the README's table -----------------------------------------------------------------------------------------------

# what, suite, title, ours, peers and the names they get
README_ROWS = [
    ("RGB → Lab, 1920×1080", "lab", _FLOAT_LAB, _INTERLEAVED,
     {"OpenCV float32": "OpenCV", "kornia": "kornia", "scikit-image": "scikit-image"}),
    ("Lab → RGB, 1920×1080", "lab", _TO_BYTES, _INTERLEAVED,
     {"OpenCV float32": "OpenCV", "kornia": "kornia", "scikit-image": "scikit-image"}),
    ("mean field to colours, 313 labels, 480×270, 5 sweeps", "mean_field", _FIELD,
     "cpp, R=3, float32, labels last, to ab",
     {"pydensecrf, Potts": "pydensecrf", "reference, PyTorch eager, R=3": "PyTorch"}),
    ("render, 1920×1080, lightness kept", "render", _RENDER, "fastcolor cpp, lightness kept",
     {"bilinear and OpenCV float32, clipped": "bilinear and OpenCV (clips)", "bilinear and kornia, clipped": "kornia"}),
    ("loss and gradient, 16×64×64, float32", "loss", _LOSS.format("float32"), "fastcolor",
     {"dense soft targets, F.cross_entropy": "dense targets", "our reference, PyTorch eager": "PyTorch"}),
    ("network, 256×256, float32", "network", r"^network, 1 of 256×256", "fastcolor, float32, channels_last",
     {"eccv16-shaped, float32, channels_last": "eccv16-shaped"}),
    ("a picture, JPEG to JPEG, 1280×720", "image", r"^image, 1280×720, JPEG", "fastcolor",
     {"notebook pipeline, our network": "notebook, our network",
      "notebook pipeline, eccv16-shaped": "notebook, eccv16-shaped"}),
]  # fmt: skip


def readme_table(results: Results) -> str:
    lines = ["| | fastcolor | takes longer | machine |", "| --- | --- | --- | --- |"]
    for what, suite, title, ours, peers in README_ROWS:
        cells = [NOT_MEASURED, "", ""]
        for run in results.of(suite, "cpu"):
            mine = find(run, title, ours)
            if mine and timed([mine]):
                spans = {name: ratio(results.same(run), title, ours, re.escape(c)) for c, name in peers.items()}
                shown = ", ".join(f"{name} {span.times}" for name, span in spans.items() if span)
                cells = [f"**{time_text(mine['median_us'])}**", shown, f"{run.hardware}, {run.data['threads']} threads"]
                break
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, table: str) -> str | None:
    """A README with the block's content replaced; None where it has no block."""
    return BLOCK.sub(lambda m: m[1] + table + m[2], text) if BLOCK.search(text) else None


def main(arguments: list[str] | None = None, program: str = "python -m benchmarks report") -> int:
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER / __version__, help="of the results files")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page goes; plots go to images/ beside it")
    parser.add_argument("--readme", action="store_true", help="rewrite README's table, or print it where it has none")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder of results files")
    try:
        results = Results.load(options.folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.readme:
        table = readme_table(results)
        changed = with_table(README.read_text(), table) if README.exists() else None
        if changed is None:
            print(table, end="")
            return 0
        write(README, changed)
        return 0
    from .plots import draw

    plots = draw(results.runs, options.page.parent / "images")
    write(options.page, page(results, {caption: f"images/{name}" for caption, name in plots.items()}))
    print(f"written: {options.page}, {len(plots)} plots")
    return 0


def write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)
