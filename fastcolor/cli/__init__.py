"""The command line: `fastcolor`, or `python -m fastcolor`. One file per command."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Annotated

import typer

from fastcolor._version import __version__
from fastcolor.cli.bench import bench
from fastcolor.cli.colorize import colorize
from fastcolor.cli.eval import evaluate
from fastcolor.cli.export import export
from fastcolor.cli.info import info
from fastcolor.cli.pack import pack
from fastcolor.cli.train import TrainCommand, train
from fastcolor.cli.video import video

app = typer.Typer(
    name="fastcolor",
    help="Colorize photographs, and train the model that does it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastcolor {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(colorize)
app.command()(video)
app.command(cls=TrainCommand)(train)
app.command()(pack)
app.command("eval")(evaluate)
app.command()(export)
app.command()(info)
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


def main() -> None:
    try:
        app(prog_name="fastcolor")
    except SystemExit as end:
        # `train` has 130 for SIGTERM too, which schedulers send
        if end.code == 130 and sys.argv[1:2] != ["train"] and os.name == "posix":
            _end_by_sigint()
        raise


def _end_by_sigint() -> None:
    """Shells call that 130 as well; but after an exit code, a loop over films would go on with the next."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or none
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
