"""`fastcolor eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastcolor.cli._options import Device, Mrf


def evaluate(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="[WEIGHTS]... DATA",
            help="Weights to compare (the bundled ones by default), then the folder of photos, of tars, or a pack.",
            show_default=False,
        ),
    ],
    vividness: Annotated[
        str, typer.Option(metavar="A,B,...", help="Degrees of vividness, each a row of the table.")
    ] = "0,0.25,0.5,0.75,1",
    size: Annotated[
        int | None, typer.Option(min=16, max=4096, help="Short side that networks see; the checkpoint's by default.")
    ] = None,
    mrf: Mrf = True,
    mrf_both: Annotated[bool, typer.Option("--mrf-both", help="With and without, beside each other.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pictures.")] = None,
    side: Annotated[
        int | None, typer.Option(min=11, help="Shrink larger pictures to this short side first; none by default.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures and the protocol.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report with curves and pictures, one file.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Pictures of like size that share a batch.")] = 8,
    device: Device = "auto",
) -> None:
    """Measure how near models come to the true colors.

    Every photo is made grey, colored, and compared with itself: PSNR, SSIM, CIEDE2000, colorfulness, AuC (Zhang et
    al. 2016), cross-entropy and calibration of the label distribution. Grey, the training set's mean color and the
    nearest-bin oracle stand beside the models. Photos that cannot be read or have no color are left out and named.
    docs/metrics.md defines every figure.
    """
    import torch

    from fastcolor._files import atomic_path
    from fastcolor.cli.train import ProgressReporter
    from fastcolor.evaluation.compare import EvaluationError, load_models
    from fastcolor.evaluation.compare import evaluate as run
    from fastcolor.evaluation.report import html
    from fastcolor.model.checkpoint import CheckpointError
    from fastcolor.model.device import DeviceError
    from fastcolor.ops._backend import BackendError
    from fastcolor.training.data import DataError

    *weights, data = inputs
    levels = _levels(vividness)
    for name, path in (("--json", json_file), ("--html", html_file)):
        if path is not None and path.is_dir():
            _refuse(f"{name} {path}: is a folder, expected a file name")
    if data.suffix == ".safetensors":
        _refuse(f"{data}: weights; the folder of photos comes last: fastcolor eval [WEIGHTS]... DATA")
    with ProgressReporter() as reporter:
        try:
            models = load_models(weights, levels, device, size, None if mrf_both else mrf)
            found = run(
                models, data, limit=limit, side=side, batch_size=batch_size, pictures=html_file is not None,
                stage=reporter.stage, advance=reporter.advance, say=reporter.say,
            )  # fmt: skip
            reporter.progress.stop()
            for path, text in (
                (json_file, lambda: json.dumps(found.record, indent=1, ensure_ascii=False) + "\n"),
                (html_file, lambda: html(found)),
            ):
                if path is not None:
                    with atomic_path(path) as temporary:
                        temporary.write_text(text(), encoding="utf-8")
        except (EvaluationError, DataError, CheckpointError, DeviceError, BackendError, ImportError, OSError) as error:
            reporter.progress.stop()
            _refuse(str(error), 1)
        except torch.OutOfMemoryError as error:
            reporter.progress.stop()
            what = str(error).splitlines()[0]
            _refuse(f"{what}; try --batch-size {max(1, batch_size // 2)}, or --side to shrink large pictures", 1)
        except KeyboardInterrupt:
            reporter.progress.stop()
            typer.echo("stopped: nothing was written", err=True)
            raise typer.Exit(130) from None
    _show(found.record)
    for path in filter(None, (json_file, html_file)):
        typer.echo(f"written: {path}")


def _levels(text: str) -> list[float]:
    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or not all(0 <= v <= 1 for v in levels):  # nan too
        _refuse(f"--vividness must be numbers between 0 and 1 with commas between them, like 0,0.5,1; got {text!r}")
    return levels


def _show(record: dict) -> None:
    """The table, and what it is of."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from fastcolor.evaluation.compare import GREY

    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else form.format(value)

    protocol = record["protocol"]
    sides = protocol["short_side"]
    title = f"{protocol['pictures']} pictures, short side {sides['least']} to {sides['most']}, 8 bits, whole"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("vivid", "PSNR dB", "above grey", "SSIM", "ΔE2000", "colour", "AuC", "rebalanced", "cross-ent.",
                    "ECE"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for r in record["rows"]:
        gain = "" if r["name"] == GREY else f"{r['psnr_gain']:+.2f}"
        if gain and r["psnr_gain_error"] is not None:
            gain += f" ± {r['psnr_gain_error']:.2f}"
        table.add_row(
            r["name"], "" if r["vividness"] is None else f"{r['vividness']:g}", f"{r['psnr']:.2f}", gain,
            f"{r['ssim']:.3f}", f"{r['delta_e_2000']:.2f}", shown(r["colorfulness_ratio"], "{:.0%}"),
            f"{r['auc']:.1%}", shown(r["auc_rebalanced"], "{:.1%}"), shown(r["bin_cross_entropy"], "{:.2f}"),
            shown(r["calibration_error"], "{:.3f}"), style="dim" if r["baseline"] else None,
        )  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a log has no width
    console.print(table)
    for name, why in record["not_computed"].items():
        console.print(f"{name.upper()}: {why}", highlight=False)
    counts = record["left_out"]["counts"]
    if counts:
        console.print(f"left out: {', '.join(f'{n} {kind}' for kind, n in counts.items())}", highlight=False)


def _refuse(message: str, code: int = 2) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
