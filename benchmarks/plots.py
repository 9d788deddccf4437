"""The plots of the performance page, from results files alone: roofline, growth of costs, shares of a picture."""

from __future__ import annotations

from pathlib import Path

from fastcolor._files import atomic_path

from .results import Run, timed

DPI = 90
_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 8, "svg.hashsalt": "fastcolor"}
_COLORS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e3a018", "#6c4f9c", "#5a5a5a", "#00838f")


def newest(runs: list[Run], suite: str, device: str) -> Run | None:
    return max((r for r in runs if (r.suite, r.device) == (suite, device)), key=lambda r: r.data["date"], default=None)


def draw(runs: list[Run], folder: Path) -> dict[str, str]:
    """Draws what the files allow: caption to file name. Old plots that cannot be drawn any more are removed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made: dict[str, str] = {}
    with pyplot.rc_context(_STYLE):
        for device in ("cpu", "cuda"):
            for name, plot in (("roofline", roofline), ("scaling", scaling), ("shares", shares)):
                path = folder / f"perf-{name}-{device}.png"
                drawn = plot(runs, device, pyplot)
                if drawn is None:
                    path.unlink(missing_ok=True)
                    continue
                figure, caption = drawn
                with atomic_path(path) as temporary:
                    figure.savefig(temporary, dpi=DPI, metadata={"Software": None})
                pyplot.close(figure)
                made[caption] = path.name
    return made


# --- roofline ---------------------------------------------------------------------------------------------------------


def intensities(runs: list[Run], device: str) -> list[dict]:
    """The best of ours for each operation at its largest size: operations a byte, and operations a second."""
    best: dict[str, dict] = {}
    for suite in ("lab", "loss", "mean_field", "render", "annealed_mean", "network"):
        run = newest(runs, suite, device)
        for r in timed(run.rows) if run else []:
            if not r["ours"] or not r.get("bytes") or not r.get("operations"):
                continue
            op = r.get("op", suite)
            key = f"{op}, {r.get('arithmetic', r.get('types', ''))}".rstrip(", ")
            if op == "network":
                key = f"network, {r['arithmetic']}"
            before = best.get(key)
            larger = before is None or r["operations"] > before["operations"]
            same = before is not None and r["operations"] == before["operations"]
            if larger or (same and r["median_us"] < before["median_us"]):
                best[key] = r
    return [
        {"name": k, "x": r["operations"] / r["bytes"], "y": r["operations"] / r["median_us"] / 1e3}
        for k, r in best.items()
    ]


def roofline(runs: list[Run], device: str, pyplot):
    known = [r for r in runs if r.device == device and "limits" in r.data]
    if not known:
        return None
    latest = max(known, key=lambda r: r.data["date"])
    known = [r for r in known if r.machine == latest.machine]  # one roof for one machine
    points, limited = intensities(known, device), [r.data["limits"] for r in known]
    if not points:
        return None
    copy = max(limit["copy_GB_per_s"] for limit in limited)
    product = {k: max(limit[f"{k}_TFLOP_per_s"] for limit in limited) * 1e3 for k in ("float32", "bfloat16")}
    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    low, high = min(p["x"] for p in points) / 3, max([p["x"] for p in points] + [product["bfloat16"] / copy]) * 3
    for (kind, most), style in zip(product.items(), ("-", "--"), strict=True):
        knee = most / copy
        axes.plot([low, knee, high], [low * copy, most, most], style, color="#777777", linewidth=1)
        axes.annotate(f"{kind} matrix product, {most:,.0f} GFLOP/s", (high, most), ha="right", va="bottom", fontsize=7)
    axes.annotate(f"copy, {copy:.0f} GB/s", (low * 1.1, low * copy * 1.5), fontsize=7, rotation=30)
    for i, p in enumerate(sorted(points, key=lambda p: p["x"])):  # many lie close together: a legend, not labels
        marker = "osD^v"[i // len(_COLORS) % 5]
        axes.plot(p["x"], p["y"], marker, color=_COLORS[i % len(_COLORS)], markersize=6, label=p["name"])
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="operations a byte (by the definition)")
    axes.set_ylabel("GFLOP/s")
    what = "the best of ours for each operation at its largest size"
    return figure, f"Roofline: {what}, below what {latest.hardware} can do"


# --- growth -----------------------------------------------------------------------------------------------------------


def expected(law: str, values: list[float], times: list[float]) -> list[float]:
    """The times that a law foretells, through what was measured: at the largest value, for "inverse" (threads) at the
    first, for "affine" at both ends.
    """
    first, last = (values[0], times[0]), (values[-1], times[-1])
    if law == "inverse":
        return [first[1] * first[0] / v for v in values]
    if law == "linear" or last[0] == first[0]:
        return [last[1] * v / last[0] for v in values]
    step = (last[1] - first[1]) / (last[0] - first[0])
    return [first[1] + step * (v - first[0]) for v in values]


def scaling(runs: list[Run], device: str, pyplot):
    run = newest(runs, "scaling", device)
    if run is None or not timed(run.rows):
        return None
    names = list(dict.fromkeys(r["axis"] for r in timed(run.rows)))
    across = min(3, len(names))
    figure, grid = pyplot.subplots(
        -(-len(names) // across), across, figsize=(3.3 * across, 2.9 * -(-len(names) // across)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names, strict=False):
        rows = [r for r in timed(run.rows) if r["axis"] == name]
        for i, op in enumerate(dict.fromkeys(r["op"] for r in rows)):
            curve = sorted((r for r in rows if r["op"] == op), key=lambda r: r["value"])
            values, times = [r["value"] for r in curve], [r["median_us"] / 1e3 for r in curve]
            color = _COLORS[i % len(_COLORS)]
            axes.plot(values, times, "o-", color=color, markersize=3, linewidth=1, label=op)
            axes.plot(values, expected(curve[0]["law"], values, times), ":", color=color, linewidth=1)
        log = rows[0]["law"] != "affine"
        axes.set(xlabel=rows[0]["unit"], ylabel="ms", title=f"{name}, expected {rows[0]['law']}")
        if log:
            axes.set(xscale="log", yscale="log")
            if rows[0]["law"] == "inverse":
                axes.set_xticks(sorted({r["value"] for r in rows}), labels=sorted({r["value"] for r in rows}))
                axes.minorticks_off()
        else:
            axes.set_ylim(bottom=0)
        axes.margins(y=0.25)  # for the legend
        axes.legend(fontsize=6, frameon=False, loc="best")
    law = "dotted: the law, through the largest value, for threads through one thread, an affine one through both ends"
    return figure, f"How costs grow on {run.hardware} ({law})"


# --- shares -----------------------------------------------------------------------------------------------------------


def shares(runs: list[Run], device: str, pyplot):
    run = newest(runs, "image", device)
    rows = [r for r in timed(run.rows) if "share" in r] if run else []
    if not rows:
        return None
    sizes, stages = (list(dict.fromkeys(r[key] for r in rows)) for key in ("size", "candidate"))
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.5 * len(sizes)), layout="constrained")
    for y, size in enumerate(sizes):
        left = 0.0
        for i, stage in enumerate(stages):
            share = next((r["share"] for r in rows if (r["size"], r["candidate"]) == (size, stage)), 0.0)
            axes.barh(y, share, left=left, color=_COLORS[i % len(_COLORS)], label=stage if y == 0 else None)
            if share > 0.06:
                axes.text(left + share / 2, y, f"{share:.0%}", ha="center", va="center", color="white", fontsize=7)
            left += share
    axes.set_yticks(range(len(sizes)), [s.replace("x", "×") for s in sizes])
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.legend(ncol=len(stages), fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure, f"Where the time of a picture goes, JPEG to JPEG, {run.hardware}"
