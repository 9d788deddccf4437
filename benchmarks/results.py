"""Results files: reading and checking them, finding rows, and ratios with the spread that they have."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .timing import NOT_MEASURED

FOLDER = Path(__file__).parent / "results"
NAME = re.compile(r"(?P<suite>[a-z_]+)--(?P<machine>[a-z0-9.-]+)--(?P<device>cpu|cuda)\.json")
RERUNS = "reruns"  # folder beside the files: the same suites once more, on the same machine


@dataclass(frozen=True)
class Run:
    """One results file."""

    suite: str
    machine: str
    device: str
    data: dict

    @property
    def rows(self) -> list[dict]:
        return self.data["rows"]

    @property
    def hardware(self) -> str:
        return self.data.get("gpu") or self.data["cpu"]


def read(path: Path) -> Run:
    """Raises ValueError where the file is none of a suite, or breaks the rules of `problems`."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    wrong = problems(data)
    if wrong:
        raise ValueError(f"{path}: {wrong[0]}")
    return Run(data["suite"], data["machine"], data["device"], data)


def load(folder: Path) -> list[Run]:
    """The files of a folder with a suite's name, in order of it."""
    return [read(path) for path in sorted(folder.glob("*.json")) if NAME.fullmatch(path.name)]


# --- what a file must hold --------------------------------------------------------------------------------------------

_NUMBER = (int, float)
_TOP = {  # key: (type, needed)
    "suite": (str, True),
    "device": (str, True),
    "machine": (str, True),
    "cpu": (str, True),
    "simd": (str, True),
    "cores": (int, True),
    "threads": (int, True),
    "load": (list, True),
    "system": (str, True),
    "python": (str, True),
    "versions": (dict, True),
    "commit": (str, True),
    "date": (str, True),
    "rows": (list, True),
    "quick": (bool, False),
    "seconds": (_NUMBER, False),
    "limits": (dict, False),
    "networks": (dict, False),
    "pytest": (dict, False),
    "gpu": (str, False),
    "gpu_memory_GB": (int, False),
    "cuda": (str, False),
    "driver": (str, False),
}
_ROW = {"title": str, "candidate": str, "ours": bool}
_TIMED = ("iqr_us", "samples")


def problems(data: object) -> list[str]:
    """What is wrong with the content of a results file; empty where all is well."""
    if not isinstance(data, dict):
        return ["must be an object"]
    found = []
    for key, (kind, needed) in _TOP.items():
        if key not in data:
            if needed:
                found.append(f"lacks {key!r}")
        elif not isinstance(data[key], kind) or (isinstance(data[key], bool) and kind is not bool):
            found.append(f"{key!r} has the wrong type: {data[key]!r}")
    if found:
        return found
    if data["device"] not in ("cpu", "cuda"):
        found.append(f"'device' must be cpu or cuda, got {data['device']!r}")
    if data["device"] == "cuda" and "gpu" not in data:
        found.append("of a GPU, but lacks its name, 'gpu'")
    if len(data["load"]) != 3 or not all(isinstance(x, _NUMBER) for x in data["load"]):
        found.append(f"'load' must be three numbers, got {data['load']!r}")
    if not data["threads"] >= 1:
        found.append(f"'threads' must be at least 1, got {data['threads']}")
    for i, row in enumerate(data["rows"]):
        found += [f"row {i}: {text}" for text in row_problems(row)]
    return found


def row_problems(row: object) -> list[str]:
    if not isinstance(row, dict):
        return ["must be an object"]
    found = [f"lacks {k!r}" for k, kind in _ROW.items() if not isinstance(row.get(k), kind)]
    if found:
        return found
    median = row.get("median_us")
    if median == NOT_MEASURED:
        if not row.get("why"):
            found.append("not measured, and does not say why")
        return found + [f"not measured, yet has {k!r}" for k in (*_TIMED, "GB_per_s", "TFLOP_per_s") if k in row]
    if not isinstance(median, _NUMBER) or not 0 < median < math.inf:
        return [f"'median_us' must be a time or {NOT_MEASURED!r}, got {median!r}"]
    found += [f"{k!r} must be a number >= 0, got {row.get(k)!r}" for k in _TIMED if not _at_least(row.get(k), 0)]
    # speeds are bytes and operations over the time, nothing else; `rounded` as timing.row rounds them
    for amount, speed, unit, rounded in (("bytes", "GB_per_s", 1e9, 1e-3), ("operations", "TFLOP_per_s", 1e12, 1e-5)):
        if speed not in row:
            continue
        if not _at_least(row.get(amount), 0) or not _at_least(row[speed], 0):
            found.append(f"{speed!r} and {amount!r} must be numbers >= 0, got {row[speed]!r} and {row.get(amount)!r}")
            continue
        exact = row[amount] / median * 1e6 / unit
        if not math.isclose(row[speed], exact, rel_tol=1e-2, abs_tol=rounded):
            found.append(f"{speed!r} is {row[speed]}, but {amount!r} over the time is {exact:.4g}")
    return found


def _at_least(value: object, least: float) -> bool:
    return isinstance(value, _NUMBER) and not isinstance(value, bool) and least <= value < math.inf


# --- rows and ratios --------------------------------------------------------------------------------------------------


def timed(rows: Iterable[dict]) -> list[dict]:
    return [r for r in rows if r["median_us"] != NOT_MEASURED]


def find(run: Run, title: str, candidate: str) -> dict | None:
    """The fastest row of the first table whose title matches, of candidates that match (regular expressions); one
    without a time if need be.
    """
    table = next((r["title"] for r in run.rows if re.search(title, r["title"])), None)
    found = [r for r in run.rows if r["title"] == table and re.fullmatch(candidate, r["candidate"])]
    return min(timed(found), key=lambda r: r["median_us"], default=found[0] if found else None)


@dataclass(frozen=True)
class Span:
    """A ratio or figure with its spread: from the lowest to the highest that was seen.

    only: the ratio itself where one of its times is of a single call, whose spread nobody knows.
    """

    low: float
    high: float
    only: float | None = None

    def __str__(self) -> str:
        low, high = significant(self.low), significant(self.high)
        return significant(self.only) if self.only is not None else low if low == high else f"{low}–{high}"

    @property
    def times(self) -> str:
        return f"{self}×" if self.only is None else f"{self}× (one sample)"


def significant(value: float) -> str:
    """Two digits, and three from a hundred: more is never claimed."""
    if value >= 100:
        return f"{value:.3g}" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}"
    if value < 0.095:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def ratio(runs: list[Run], title: str, ours: str, peer: str) -> Span | None:
    """How many times as long the peer takes: over the runs, from the lowest to the highest ratio of medians. Of one run
    alone, from the quartiles of both: what it says of its own spread.
    """
    pairs = [(find(run, title, ours), find(run, title, peer)) for run in runs]
    return span_of([(a, b) for a, b in pairs if a and b and timed([a]) and timed([b])])


def span_of(pairs: list[tuple[dict, dict]]) -> Span | None:
    """The ratio b / a of pairs (a, b) of rows, one pair of each run."""
    if not pairs:
        return None
    if len(pairs) == 1:
        a, b = pairs[0]
        ends = [(r["median_us"] - r["iqr_us"] / 2, r["median_us"] + r["iqr_us"] / 2) for r in (a, b)]
        # a spread wider than the time itself says nothing of the lower end
        fast = [max(low, r["median_us"] / 10) for (low, _), r in zip(ends, (a, b), strict=True)]
        only = b["median_us"] / a["median_us"] if 1 in (a["samples"], b["samples"]) else None
        return Span(fast[1] / ends[0][1], ends[1][1] / fast[0], only)
    ratios = [b["median_us"] / a["median_us"] for a, b in pairs]
    return Span(min(ratios), max(ratios))
