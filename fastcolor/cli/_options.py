"""Command-line options that several commands share, and those made from the fields of a dataclass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, get_type_hints

import typer
from typer.core import TyperCommand


def _finite(value: float | None) -> float | None:
    """nan passes the range checks of the command line."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number")
    return value


# --- of all commands that colorize ------------------------------------------------------------------------------------

Weights = Annotated[Path | None, typer.Option(help="Weights of `fastcolor train` instead of the bundled ones.")]
Size = Annotated[
    int | None, typer.Option(min=16, max=4096, help="Short side that the network sees; the checkpoint's by default.")
]
Temperature = Annotated[
    float, typer.Option(min=0.01, max=10, callback=_finite, help="Of the annealed mean: 1 is the mean, 0.01 the mode.")
]
Vividness = Annotated[
    float | None, typer.Option(min=0, max=1, callback=_finite, help="0 takes the safest colors, 1 the most vivid.")
]
Saturation = Annotated[float, typer.Option(min=0, max=10, callback=_finite, help="Factor on chroma.")]
Mrf = Annotated[bool, typer.Option("--mrf/--no-mrf", help="Make colors agree within regions.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]


# --- of a dataclass ---------------------------------------------------------------------------------------------------


def options_from(config: type) -> Callable[[Callable], Callable]:
    """Gives a command one option for each field of a dataclass; the command gets them as one `config` argument.

    Help texts and panels come from the fields' metadata, types and defaults from the fields themselves.
    """

    def decorate(command: Callable) -> Callable:
        hints = get_type_hints(config)
        own = [p for n, p in inspect.signature(command, eval_str=True).parameters.items() if n != "config"]
        made = [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=f.default,
                annotation=Annotated[
                    hints[f.name],
                    typer.Option(help=f.metadata.get("help", ""), rich_help_panel=f.metadata.get("panel")),
                ],
            )
            for f in fields(config)
        ]

        def run(**values):
            chosen = {f.name: values.pop(f.name) for f in fields(config)}
            return command(**values, config=config(**chosen))

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(own + made)
        return run

    return decorate


def command_with_optional_value(name: str, values: Sequence[str], alone: str) -> type[TyperCommand]:
    """A command whose option `name` may stand without a value, which then is `alone`: typer knows no such option.

    Args:
        values: words that are taken as the option's value where they follow it.
    """

    class Command(TyperCommand):
        def parse_args(self, ctx, args: list[str]) -> list[str]:
            given, at = list(args), 0
            while at < len(given) and given[at] != "--":
                if given[at] == name:
                    follows = given[at + 1] if at + 1 < len(given) else None
                    given[at : at + (2 if follows in values else 1)] = [
                        f"{name}={follows if follows in values else alone}"
                    ]
                at += 1
            return super().parse_args(ctx, given)

    return Command
