"""`fastcolor train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastcolor.cli._options import options_from
from fastcolor.training.config import TrainConfig


class ProgressReporter:
    """Shows a run as one progress bar for each stage, and lines between them."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.task = None

    def __enter__(self) -> ProgressReporter:
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def stage(self, text: str, total: int) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(text, total=total, rate="", values="")

    def advance(self, count: int = 1, **values: float) -> None:
        task = self.progress.tasks[-1]
        rate = f"{task.speed:.1f} images/s" if task.speed else ""
        shown = " ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.progress.update(self.task, advance=count, rate=rate, values=shown)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


@options_from(TrainConfig)
def train(
    data: Annotated[Path, typer.Argument(help="Folder of images, nested or not, or with train/ and val/ inside.")],
    config: TrainConfig,
) -> None:
    """Train a model on a folder of photos.

    The run folder (--out) gets model.safetensors for `fastcolor colorize --weights`, state.pt for --resume, a grid of
    samples each epoch (grey, prediction, truth), history.jsonl and TensorBoard events. Ctrl-C saves; --resume goes on
    exactly there.
    """
    from fastcolor.training.loop import train as run

    with ProgressReporter() as reporter:
        try:
            result = run(data, config, reporter)
        except (ValueError, RuntimeError, OSError) as error:
            reporter.progress.stop()
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from (error if not isinstance(error, ValueError) else None)
    if not result.finished:
        raise typer.Exit(130)
    weights = result.out / "model.safetensors"
    typer.echo(f"{weights} is ready: fastcolor colorize PHOTO --weights {weights}")
