"""`fastcolor train`."""

from __future__ import annotations

import os
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from fastcolor.cli._options import command_with_optional_value, options_from
from fastcolor.training.config import RESUME, ConfigError, TrainConfig, read_options

_LINE_EVERY = 30.0  # seconds between lines of progress where there is no terminal


class ProgressReporter:
    """Shows a run as one progress bar for each stage, and lines between them."""

    def __init__(self, quiet: bool = False):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(quiet=quiet)
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


TrainCommand = command_with_optional_value("--resume", RESUME, "yes")


@options_from(TrainConfig)
def train(
    context: typer.Context,
    config: TrainConfig,
    data: Annotated[
        Path | None, typer.Argument(help="Folder of images, nested or not, or with train/ and val/ inside.")
    ] = None,
    options: Annotated[
        Path | None,
        typer.Option("--config", help="Options by name in a .toml file, or a run's config.json; flags come before it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what model, data and memory would be, and write nothing.")
    ] = False,
) -> None:
    """Train a model on a folder of photos.

    The run folder (--out) gets model.safetensors for `fastcolor colorize --weights`, state.pt for --resume, a grid of
    samples each epoch (grey, prediction, truth), history.jsonl and TensorBoard events. Ctrl-C saves; --resume goes on
    exactly there. Several GPUs: torchrun --no-python --nproc-per-node 4 fastcolor train ...
    """
    import torch

    from fastcolor.model.checkpoint import CheckpointError
    from fastcolor.model.device import DeviceError
    from fastcolor.ops._backend import BackendError
    from fastcolor.training import loop
    from fastcolor.training.data import DataError
    from fastcolor.training.distributed import TeamError, is_lead
    from fastcolor.training.plan import dry_run as plan
    from fastcolor.training.state import STATE, TrainingError

    expected = (
        ConfigError, DataError, TrainingError, CheckpointError, DeviceError, BackendError, ImportError, OSError,
        torch.OutOfMemoryError,
    )  # fmt: skip
    lead = is_lead()
    with ProgressReporter(quiet=not lead) as reporter:
        try:
            config, data = _merged(config, context, options, data)
            if dry_run:
                plan(data, config, reporter)
                return
            result = loop.train(data, config, reporter)
        except TeamError:
            raise typer.Exit(1) from None
        except expected as error:
            reporter.progress.stop()
            if lead:
                typer.echo(f"error: {error}", err=True)
            elif not isinstance(error, (ConfigError, CheckpointError)):  # the same in all processes
                typer.echo(f"error in process {os.environ['RANK']}: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            reporter.progress.stop()
            saved = (Path(config.out) / STATE).exists()
            typer.echo(f"stopped at once{'; --resume goes on from the last save' if saved else ''}", err=True)
            raise typer.Exit(130) from None
    if not result.finished:
        raise typer.Exit(130)
    if lead:
        use = "fastcolor train PHOTOS --backbone" if config.task == "classify" else "fastcolor colorize PHOTO --weights"
        typer.echo(f"{result.model} is ready: {use} {result.model}")


def _merged(
    config: TrainConfig, context: typer.Context, options: Path | None, data: Path | None
) -> tuple[TrainConfig, Path]:
    """The options and the data folder: flags first, then the --config file, then those of the run that is resumed."""
    given = {f.name for f in fields(config) if context.get_parameter_source(f.name).name != "DEFAULT"}
    found = {} if options is None else read_options(options)
    config = replace(config, **{k: v for k, v in found.items() if k != "data" and k not in given})
    before = Path(config.out) / "config.json"
    if config.resume in ("yes", "auto") and before.exists():
        found = {**read_options(before), **found}
        kept = {k: v for k, v in found.items() if k not in given | {"data", "out", "resume"}}
        config = replace(config, **kept)
    folder = data or found.get("data")
    if not folder:
        raise ConfigError("data is missing: name the folder of images, on the command line or in --config")
    return config, Path(folder)
