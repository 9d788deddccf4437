"""How far reruns of a suite lie apart: what a claim must not be narrower than.

`python -m benchmarks spread FILE FILE...`

Files of one suite on one machine. For each row: its median in every run, the spread between runs (the slowest over the
fastest), the spread within runs (interquartile range over the median, of the widest), and how the best peer stands.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from . import work
from .results import Run, Span, read, span_of, timed


def compare(runs: list[Run]) -> list[dict]:
    """One line for each row that all runs have timed: medians, spreads, and the ratio of the best peer over ours."""
    tables = [{(r["title"], r["candidate"]): r for r in timed(run.rows)} for run in runs]
    lines = []
    for key in tables[0]:
        if not all(key in table for table in tables):
            continue
        rows = [table[key] for table in tables]
        medians = [r["median_us"] for r in rows]
        lines.append({
            "title": key[0],
            "candidate": key[1],
            "medians_us": medians,
            "between": max(medians) / min(medians) - 1,
            "within": max(r["iqr_us"] / r["median_us"] for r in rows),
            "peer_takes": best_peer(tables, *key) if rows[0]["ours"] else None,
        })  # fmt: skip
    return lines


def best_peer(tables: list[dict], title: str, candidate: str) -> Span | None:
    """Over the runs: the time of the peer that was the fastest in the first, over ours."""
    others = [r for (t, _), r in tables[0].items() if t == title and not r["ours"] and not work.is_limit(r)]
    peer = min(others, key=lambda r: r["median_us"], default=None)
    if peer is None:
        return None
    pairs = [(table[title, candidate], table.get((title, peer["candidate"]))) for table in tables]
    return span_of([(a, b) for a, b in pairs if b])


def summary(lines: list[dict]) -> tuple[float, float]:
    """The median and the largest spread between runs."""
    spreads = [line["between"] for line in lines]
    return (statistics.median(spreads), max(spreads)) if spreads else (0.0, 0.0)


def show(lines: list[dict], runs: list[Run]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    for title in dict.fromkeys(line["title"] for line in lines):
        table = Table(title=title, title_justify="left")
        for i, heading in enumerate(("", "medians µs", "between runs", "within a run", "best peer takes")):
            table.add_column(heading, justify="right" if i else "left")
        for line in lines:
            if line["title"] == title:
                medians = "  ".join(f"{m:,.1f}" for m in line["medians_us"])
                peer = "" if line["peer_takes"] is None else line["peer_takes"].times
                table.add_row(line["candidate"], medians, f"{line['between']:.0%}", f"{line['within']:.0%}", peer)
        console.print(table)
    middle, most = summary(lines)
    console.print(f"{len(runs)} runs, {len(lines)} rows: between runs {middle:.0%} in the median, {most:.0%} at most")


def main(arguments: list[str] | None = None, program: str = "python -m benchmarks spread") -> int:
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="two or more, of one suite and machine")
    files = parser.parse_args(arguments).files
    if len(files) < 2:
        parser.error("a spread takes two files or more")
    try:
        runs = [read(path) for path in files]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for path, run in zip(files, runs, strict=True):
        if (run.suite, run.machine, run.device) != (runs[0].suite, runs[0].machine, runs[0].device):
            first = f"{runs[0].suite} on {runs[0].machine}, {runs[0].device}"
            parser.error(f"{path} is of {run.suite} on {run.machine}, {run.device}, but {files[0]} is of {first}")
    show(compare(runs), runs)
    return 0
