"""`fastcolor bench`: the benchmarks have a command line of their own, which this hands everything to."""

from __future__ import annotations

import typer


def bench(context: typer.Context) -> None:
    """Time fastcolor beside reference implementations: `fastcolor bench --help`."""
    try:
        from fastcolor.benchmarks.suites import main
    except ImportError as error:
        typer.echo(f"error: the benchmarks cannot be imported: {error}", err=True)
        raise typer.Exit(1) from None
    raise typer.Exit(main(context.args, "fastcolor bench"))
