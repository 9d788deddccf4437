"""`fastcolor train`."""

from __future__ import annotations

import json
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from fastcolor.cli._options import options_from
from fastcolor.training.config import TrainConfig

_LINE_EVERY = 30.0  # seconds between lines of progress where there is no terminal


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
        self.task, self.last_line, self.name = None, time.monotonic(), ""

    def __enter__(self) -> ProgressReporter:
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def stage(self, text: str, total: int) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.name = text
        self.task = self.progress.add_task(text, total=total, rate="", values="")

    def advance(self, count: int = 1, **values: float) -> None:
        task = self.progress.tasks[-1]
        rate = f"{task.speed:.1f} images/s" if task.speed else ""
        shown = " ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.progress.update(self.task, advance=count, rate=rate, values=shown)
        if not self.console.is_terminal and time.monotonic() - self.last_line >= _LINE_EVERY:
            self.last_line = time.monotonic()
            left = "" if task.time_remaining is None else f"{task.time_remaining:.0f} s left"
            self.say(
                ", ".join(filter(None, (f"{self.name}: {task.completed:.0f} of {task.total:.0f}", rate, shown, left)))
            )

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


@options_from(TrainConfig)
def train(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="Folder of images, nested or not, or with train/ and val/ inside.")],
    config: TrainConfig,
) -> None:
    """Train a model on a folder of photos.

    The run folder (--out) gets model.safetensors for `fastcolor colorize --weights`, state.pt for --resume, a grid of
    samples each epoch (grey, prediction, truth), history.jsonl and TensorBoard events. Ctrl-C saves; --resume goes on
    exactly there.
    """
    import torch

    from fastcolor.model.checkpoint import CheckpointError
    from fastcolor.model.device import DeviceError
    from fastcolor.ops._backend import BackendError
    from fastcolor.training.config import ConfigError
    from fastcolor.training.data import DataError
    from fastcolor.training.loop import TrainingError
    from fastcolor.training.loop import train as run

    expected = (
        ConfigError, DataError, TrainingError, CheckpointError, DeviceError, BackendError, ImportError, OSError,
        torch.OutOfMemoryError,
    )  # fmt: skip
    with ProgressReporter() as reporter:
        try:
            result = run(data, _as_before(config, context) if config.resume else config, reporter)
        except expected as error:
            reporter.progress.stop()
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            reporter.progress.stop()
            typer.echo("stopped before the first step", err=True)
            raise typer.Exit(130) from None
    if not result.finished:
        raise typer.Exit(130)
    weights = result.out / "model.safetensors"
    typer.echo(f"{weights} is ready: fastcolor colorize PHOTO --weights {weights}")


def _as_before(config: TrainConfig, context: typer.Context) -> TrainConfig:
    """The options that --out was started with, but for those given now."""
    path = Path(config.out) / "config.json"
    if not path.exists():
        return config  # the run itself says what is missing
    try:
        before = json.loads(path.read_text())
    except ValueError:
        return config
    given = {f.name for f in fields(config) if context.get_parameter_source(f.name).name != "DEFAULT"}
    kept = {f.name: before[f.name] for f in fields(config) if f.name in before and f.name not in given}
    return replace(config, **kept)
