"""What each choice of the model is worth: one change at a time, trained from scratch at an equal budget, several seeds.

`python -m benchmarks.ablation PHOTOS [--out runs/ablation] [--epochs 4] [--size 96] [--seeds 2] [--only base,skip]
[--shares 0.125,0.25,0.5,1] [--json FILE] [--plot FILE]`

PHOTOS has train/ and val/ inside. Runs that are there already are taken as they are, so a stopped comparison goes on.
PSNR is compared at equal colourfulness, along the curve over vividness: a greyer picture always has a better PSNR.
With --shares it is the amount of data that changes: the first so many of the training photos, as many steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastcolor.evaluation.compare import evaluate, load_models
from fastcolor.training.config import TrainConfig
from fastcolor.training.loop import train

from . import timing
from .quality import at_equal_color

VIVIDNESS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEVELS = (0.6, 0.75, 0.9)  # of colourfulness, as a share of the truth's
BASE = "base: joint labels, λ = 0, fusion, no skip, no average"
VARIANTS: dict[str, tuple[str, dict]] = {  # key: (what is changed, options of TrainConfig)
    "base": (BASE, {}),
    "ema": ("average of the weights, 0.99", {"ema": 0.99}),
    "skip": ("skip connection from layer1", {"skip": True}),
    "no-fusion": ("no global features", {"fusion": False}),
    "rebalance": ("rebalanced, λ = 0.5", {"rebalance": 0.5}),
    "separable": ("separable labels, 25 + 25", {"bins": "separable"}),
    "regression": ("regression", {"head": "regression"}),
    "field": ("field in the loop, 5 sweeps", {"mrf_sweeps": 5}),
}


class Lines:
    """A reporter of training that prints what is worth a line."""

    def __init__(self, name: str):
        self.name = name

    def stage(self, text: str, total: int) -> None: ...
    def advance(self, count: int = 1, **values: float) -> None: ...
    def say(self, text: str) -> None:
        print(f"{self.name}: {text}", flush=True)


def part_of(photos: Path, out: Path, share: float) -> Path:
    """A folder with links to the first photos of train/, which are in random order, and to all of val/."""
    folder = out / f"photos-{share:g}"
    names = sorted(p for p in (photos / "train").iterdir() if p.suffix.lower() in (".webp", ".jpg", ".jpeg", ".png"))
    links = {folder / "train" / p.name: p for p in names[: round(share * len(names))]}
    for link, target in {folder / "val": photos / "val", **links}.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(target.resolve())
    return folder


def trained(data: Path, config: TrainConfig) -> Path:
    """The weights of a run, which is done, gone on with, or begun."""
    weights, done = Path(config.out) / "model.safetensors", Path(config.out) / "done"
    wanted = json.dumps(asdict(config), sort_keys=True)
    if done.exists() and done.read_text() != wanted:
        raise SystemExit(f"{config.out}: was trained with other options; give another --out")
    if not done.exists():
        result = train(data, replace(config, resume="auto"), Lines(Path(config.out).name))
        if not result.finished:
            raise KeyboardInterrupt
        done.write_text(wanted)
    return weights


def figures(weights: Path, photos: Path, mrf: bool) -> list[dict]:
    """The curve of one run over vividness, by `fastcolor eval`; of a regression one point."""
    models = load_models([weights], VIVIDNESS, mrf=mrf)
    rows = evaluate(models, photos, batch_size=8).rows
    keep = ("vividness", "psnr", "psnr_gain", "colorfulness_ratio", "auc", "auc_rebalanced", "bin_cross_entropy")
    return [{k: r[k] for k in keep} for r in rows if not r["baseline"]]


def summary(curves: list[list[dict]]) -> dict:
    """Gains over grey at each level of colourfulness: of each seed, None outside its curve; the range of the curves."""
    named = [[{**p, "colorfulness": p["colorfulness_ratio"]} for p in curve] for curve in curves]
    return {
        "gain": {f"{level:g}": [at_equal_color(c, "psnr_gain", level) for c in named] for level in LEVELS},
        "colorfulness": [[min(p["colorfulness"] for p in c), max(p["colorfulness"] for p in c)] for c in named],
        "first": [{k: c[0][k] for k in ("psnr_gain", "colorfulness_ratio", "auc", "auc_rebalanced")} for c in curves],
    }


def shown(values: list[float | None], form: str = "{:+.2f}") -> str:
    """Mean of the seeds, and half their range."""
    there = [v for v in values if v is not None]
    if len(there) < len(values) or not there:
        return "–"
    half = (max(there) - min(there)) / 2
    return form.format(statistics.mean(there)) + (f" ±{half:.2f}" if len(there) > 1 else "")


def show(rows: list[dict]) -> None:
    for mrf in sorted({row["field"] for row in rows}):
        title = f"PSNR above grey, dB, {'with' if mrf else 'without'} the field; mean and half the range of the seeds"
        table = Table(
            "", *(f"at {level:.0%}" for level in LEVELS), "vividness 0", "at colourfulness", "AuC", title=title
        )
        for row in (r for r in rows if r["field"] == mrf):
            first = row["first"]
            table.add_row(
                row["name"], *(shown(row["gain"][f"{level:g}"]) for level in LEVELS),
                shown([f["psnr_gain"] for f in first]), shown([f["colorfulness_ratio"] for f in first], "{:.2f}"),
                shown([100 * f["auc"] for f in first], "{:.2f}"),
            )  # fmt: skip
        Console(width=160).print(table)


def plot(path: Path, rows: list[dict]) -> None:
    """PSNR above grey over colourfulness, a line for each variant and seed; the field where it was trained with it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5.5), constrained_layout=True)
    for number, row in enumerate(r for r in rows if r["field"] == (r["key"] == "field")):
        for seed, curve in enumerate(row["curves"]):
            points = sorted((p["colorfulness_ratio"], p["psnr_gain"]) for p in curve)
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) > 1 else "*", color=f"C{number}",
                      alpha=1 - 0.5 * bool(seed), label=None if seed else row["name"])  # fmt: skip
    axis.axhline(0, color="grey", linestyle=":", label="grey (ab = 0)")
    axis.set_ylim(bottom=-1.5)
    axis.set_xlabel("colourfulness, share of the truth's")
    axis.set_ylabel("PSNR above grey, dB")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default=",".join(VARIANTS), help="keys of the variants, by comma")
    parser.add_argument("--shares", default="", help="of the training photos, by comma: the curve over data instead")
    parser.add_argument("--threads", type=int, default=timing.threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="draws the curves (Matplotlib)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = TrainConfig(
        size=options.size, epochs=options.epochs, batch_size=16, precision="bf16", workers=0, ema=0.0, classes="none"
    )
    if options.shares:
        shares = [float(s) for s in options.shares.split(",")]
        cases = {
            f"share-{s:g}": (f"{s:.1%} of the photos", part_of(options.photos, options.out, s),
                             {"epochs": round(options.epochs / s)})
            for s in shares
        }  # fmt: skip
    else:
        cases = {k: (VARIANTS[k][0], options.photos, VARIANTS[k][1]) for k in options.only.split(",")}
    runs: dict[str, list[Path]] = {key: [] for key in cases}
    for seed in range(options.seeds):  # a comparison that is stopped has whole seeds
        for key, (_, data, changes) in cases.items():
            out = options.out / f"{key}-{seed}"
            runs[key].append(trained(data, replace(base, **changes, seed=seed, out=str(out))))
    rows = []
    for key, (name, _, changes) in cases.items():
        for mrf in (False, True):
            if mrf and (options.shares or changes.get("head") == "regression"):
                continue  # with more data the field does not change; a regression has no distribution
            curves = [figures(w, options.photos, mrf) for w in runs[key]]
            rows.append({"key": key, "name": name, "field": mrf, **summary(curves), "curves": curves})
            print(f"{key}, {'with' if mrf else 'without'} the field: evaluated", flush=True)
    show(rows)
    if options.json:
        record = {"suite": "ablation", **timing.machine("cpu"), "training": asdict(base), "seeds": options.seeds}
        record["training"] = {k: v for k, v in record["training"].items() if k not in ("out", "device", "resume")}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**record, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    if options.plot:
        plot(options.plot, rows)


if __name__ == "__main__":
    main()
