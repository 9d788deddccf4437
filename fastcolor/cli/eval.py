"""`fastcolor eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastcolor.cli._options import Device, Mrf, _finite
from fastcolor.cli.video import _seconds

_PHOTOS, _FILMS = "Photos", "Films"


def evaluate(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="[WEIGHTS]... DATA",
            help="Weights to compare (the bundled ones by default), then what to color: a folder of photos, films or "
            "both, of tars, a pack, a film, or numbered images (frames/%06d.png).",
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
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first photos, and the first films.")] = None,
    side: Annotated[
        int | None, typer.Option(min=11, help="Shrink what is larger to this short side first; nothing by default.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures and the protocol.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report with curves and pictures, one file.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Pictures of like size that share a batch.")] = 8,
    device: Device = "auto",
    lpips: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="AlexNet's weights for LPIPS (torchvision's alexnet-owt-*.pth); else those "
            "that PyTorch's hub folder holds.",
            rich_help_panel=_PHOTOS,
        ),
    ] = None,
    fid: Annotated[
        bool,
        typer.Option(
            "--fid/--no-fid",
            help="FID, where torchmetrics, torch-fidelity and Inception's weights are here.",
            rich_help_panel=_PHOTOS,
        ),
    ] = True,
    start: Annotated[
        str | None,
        typer.Option(callback=_seconds, help="Begin there: 90, 1:30, 0:01:30.5.", rich_help_panel=_FILMS),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=0,
            callback=_finite,
            help="Take only so much of each film; 0 takes all.",
            rich_help_panel=_FILMS,
        ),
    ] = 10.0,
    temporal: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            callback=_finite,
            help="How much colors follow the frame before, as of fastcolor video.",
            rich_help_panel=_FILMS,
        ),
    ] = None,
    deinterlace: Annotated[
        bool | None,
        typer.Option(
            "--deinterlace/--no-deinterlace",
            help="Make frames of fields, or take frames as they are.",
            rich_help_panel=_FILMS,
        ),
    ] = None,
) -> None:
    """Measure how near models come to the true colors.

    Every photo is made grey, colored, and compared with itself: PSNR, SSIM, CIEDE2000, colorfulness, AuC (Zhang et
    al. 2016), cross-entropy and calibration of the label distribution. Grey, the training set's mean color and the
    nearest-bin oracle stand beside the models. LPIPS and FID need weights of other networks: they are computed where
    these lie on this machine; nothing is downloaded.

    So is every film: PSNR, colorfulness, flicker (change of color where lightness stands still) and CDC (TCVC), with
    their ratios to the truth's. Grey, the mean color, each frame colored alone, and the truth stand beside.

    What cannot be read or has no color is left out and named. docs/metrics.md defines every figure.
    """  # fmt: skip
    import torch

    from fastcolor._files import atomic_path, is_special
    from fastcolor.cli.train import ProgressReporter
    from fastcolor.evaluation.compare import EvaluationError, load_models
    from fastcolor.evaluation.compare import evaluate as run
    from fastcolor.evaluation.films import FILMS, evaluate_films, find_films, has_photos
    from fastcolor.evaluation.perceptual import WeightsError, find_perceptual
    from fastcolor.evaluation.report import html
    from fastcolor.imaging.vips import SUFFIXES
    from fastcolor.model.checkpoint import CheckpointError
    from fastcolor.model.device import DeviceError
    from fastcolor.ops._backend import BackendError
    from fastcolor.training.data import DataError
    from fastcolor.video.colorizer import VideoOptions
    from fastcolor.video.reader import is_sequence

    *weights, data = inputs
    levels = _levels(vividness)
    for name, path in (("--json", json_file), ("--html", html_file)):
        if path is not None and (path.is_dir() or is_special(path)):
            what = "a folder" if path.is_dir() else "no ordinary file"
            _refuse(f"{name} {path}: is {what}, expected a file name")
    if data.suffix == ".safetensors":
        _refuse(f"{data}: weights; the photos or films come last: fastcolor eval [WEIGHTS]... DATA")
    photos = films = None
    with ProgressReporter() as reporter:
        told = {"stage": reporter.stage, "advance": reporter.advance, "say": reporter.say}
        shared = {"limit": limit, "side": side, "pictures": html_file is not None, **told}
        try:
            models = load_models(weights, levels, device, size, None if mrf_both else mrf)
            if not data.exists() and not is_sequence(str(data)):
                raise EvaluationError(f"{data}: no such file or folder, expected photos or films")
            has_films = bool(find_films(data))
            if data.is_dir() and not (has_films or has_photos(data)):
                kinds = ", ".join(sorted(SUFFIXES)), ", ".join(sorted(FILMS))
                raise EvaluationError(f"{data}: no images in it ({kinds[0]}), and no films ({kinds[1]})")
            if not has_films or has_photos(data):
                perceptual = find_perceptual(lpips, models[0].colorizer.device, fid)
                try:
                    photos = run(models, data, batch_size=batch_size, perceptual=perceptual, **shared)
                except (EvaluationError, DataError) as error:
                    if not has_films:
                        raise
                    reporter.say(f"no photos: {error}")
            elif lpips is not None:
                reporter.say("--lpips: is not used, LPIPS is a figure of photos, and there are none")
            if has_films:
                options = VideoOptions() if temporal is None else VideoOptions(temporal=temporal)
                try:
                    films = evaluate_films(
                        models,
                        data,
                        options=options,
                        start=start,
                        seconds=seconds or None,
                        deinterlace=deinterlace,
                        **shared,
                    )
                except EvaluationError as error:
                    if photos is None:
                        raise
                    reporter.say(f"no films: {error}")
            reporter.progress.stop()
            record = (photos.record if photos else {}) | ({"films": films.record} if films else {})
            for path, text in (
                (json_file, lambda: json.dumps(record, indent=1, ensure_ascii=False) + "\n"),
                (html_file, lambda: html(photos, films)),
            ):
                if path is not None:
                    with atomic_path(path) as temporary:
                        temporary.write_text(text(), encoding="utf-8")
        except (
            EvaluationError, DataError, CheckpointError, DeviceError, BackendError, WeightsError, ImportError, OSError,
        ) as error:  # fmt: skip
            reporter.progress.stop()
            _refuse(str(error), 1)
        except torch.OutOfMemoryError as error:
            reporter.progress.stop()
            what = str(error).splitlines()[0]
            _refuse(f"{what}; try --side to shrink what is large, or of photos --batch-size {batch_size // 2 or 1}", 1)
        except KeyboardInterrupt:
            reporter.progress.stop()
            typer.echo("stopped: nothing was written", err=True)
            raise typer.Exit(130) from None
    if photos:
        _show(photos.record)
    if films:
        _show_films(films.record)
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


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _gain(row: dict) -> str:
    """PSNR above grey's, with its standard error where there is one."""
    if row["psnr_gain"] is None:
        return ""
    error = row["psnr_gain_error"]
    return f"{row['psnr_gain']:+.2f}" + ("" if error is None else f" ± {error:.2f}")


def _table(title: str, headings: tuple[str, ...]):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _console():
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 140  # a log has no width
    return console


def _show(record: dict) -> None:
    """The table of photos, and what it is of."""
    from fastcolor.evaluation.compare import GREY, fid_note

    protocol = record["protocol"]
    sides = protocol["short_side"]
    more = [name for name in ("lpips", "fid") if name in protocol]
    table = _table(
        f"{protocol['pictures']} pictures, short side {sides['least']} to {sides['most']}, 8 bits, whole",
        ("vivid", "PSNR dB", "above grey", "SSIM", "ΔE2000", "colour", "AuC", "rebalanced", "cross-ent.", "ECE",
         *map(str.upper, more)),
    )  # fmt: skip
    for r in record["rows"]:
        table.add_row(
            r["name"], "" if r["vividness"] is None else f"{r['vividness']:g}", f"{r['psnr']:.2f}",
            "" if r["name"] == GREY else _gain(r), f"{r['ssim']:.3f}", f"{r['delta_e_2000']:.2f}",
            _shown(r["colorfulness_ratio"], "{:.0%}"), f"{r['auc']:.1%}", _shown(r["auc_rebalanced"], "{:.1%}"),
            _shown(r["bin_cross_entropy"], "{:.2f}"), _shown(r["calibration_error"], "{:.3f}"),
            *(_shown(r[name], "{:.3f}" if name == "lpips" else "{:.2f}") for name in more),
            style="dim" if r["baseline"] else None,
        )  # fmt: skip
    console = _console()
    console.print(table)
    if note := fid_note(record):
        console.print(note, highlight=False)
    for name, why in record["not_computed"].items():
        console.print(f"{name.upper()}: {why}", highlight=False)
    _show_left_out(console, record)


def _show_films(record: dict) -> None:
    """The table of films, and what it is of."""
    from fastcolor.evaluation.compare import GREY

    protocol, films = record["protocol"], record["films"]
    if len(films) == 1:
        (film,) = films
        title = f"{film['name']}: {film['frames']} frames, {film['seconds']:.1f} s, {film['width']}×{film['height']}"
    else:
        title = f"{len(films)} films, {protocol['frames']} frames; means over films"
    table = _table(title, ("vivid", "PSNR dB", "above grey", "colour", "flicker", "÷ truth", "CDC", "÷ truth"))
    for r in record["rows"]:
        table.add_row(
            r["name"], "" if r["vividness"] is None else f"{r['vividness']:g}", _shown(r["psnr"], "{:.2f}"),
            "" if r["name"] == GREY else _gain(r), _shown(r["colorfulness_ratio"], "{:.0%}"),
            _shown(r["flicker"], "{:.3f}"), _shown(r["flicker_ratio"], "{:.2f}"), _shown(r["cdc"], "{:.2e}"),
            _shown(r["cdc_ratio"], "{:.2f}"), style="dim" if r["baseline"] else None,
        )  # fmt: skip
    console = _console()
    console.print(table)
    console.print("flicker: Lab units a frame where lightness stands still; grey has none, so compare at like colour")
    for film in films:
        if film["ended_early"]:
            console.print(f"{film['name']}: only {film['frames']} frames, {film['ended_early']}", highlight=False)
    _show_left_out(console, record, "films ")


def _show_left_out(console, record: dict, what: str = "") -> None:
    counts = record["left_out"]["counts"]
    if counts:
        console.print(f"{what}left out: {', '.join(f'{n} {kind}' for kind, n in counts.items())}", highlight=False)


def _refuse(message: str, code: int = 2) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
