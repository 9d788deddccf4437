"""`fastcolor pack`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer


def pack(
    data: Annotated[
        Path, typer.Argument(help="Folder of images and of WebDataset tar files, or with train/ and val/ inside.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the pack; give it to `fastcolor train` as DATA.")],
    size: Annotated[int, typer.Option(help="Short side to keep, pixels: 9/8 of the training crops, or more.")] = 288,
    shard_size: Annotated[int, typer.Option(min=1, help="Megabytes of a shard, about.")] = 1024,
    jobs: Annotated[int, typer.Option(min=0, help="Threads that decode; 0 for all processors.")] = 0,
) -> None:
    """Decode photos once, so that no epoch of a training needs to.

    Writes raw pixels that training maps into memory: 3 bytes a pixel, 249 KB for 288 × 288. Photos that cannot be read
    are left out and counted; those without colour are kept and marked, for `--task classify`. Ctrl-C stops after the
    photos under way; the same command goes on.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fastcolor.training.data import DataError, find_photos
    from fastcolor.training.sources import PackError
    from fastcolor.training.sources import pack as run

    stop = False

    def ask_to_stop(*_) -> None:
        nonlocal stop
        stop = True

    try:
        train, val = find_photos(data)
        splits = {"train": train, "val": val} if val else {"all": train}
        columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("packing", total=len(train) + len(val), rate="")

            def advance() -> None:
                speed = progress.tasks[0].speed
                progress.update(task, advance=1, rate=f"{speed:.0f} images/s" if speed else "")

            before = [(s, signal.signal(s, ask_to_stop)) for s in (signal.SIGINT, signal.SIGTERM)]
            try:
                result = run(splits, data, out, size, shard_size << 20, jobs, advance, lambda: stop)
            finally:
                for number, handler in before:
                    signal.signal(number, handler)
    except (DataError, PackError, ImportError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    for name, why in list(result.left_out.items())[:5]:
        typer.echo(f"left out {name}: {why}", err=True)
    if result.left_out:
        typer.echo(f"left out {len(result.left_out)} of {len(result.left_out) + result.photos} photos", err=True)
    if not result.finished:
        typer.echo(f"stopped; the same command goes on after {result.photos} photos", err=True)
        raise typer.Exit(130)
    grey = f", {result.grey} of them without colour" if result.grey else ""
    typer.echo(f"{out}: {result.photos} photos{grey}; fastcolor train {out}")
