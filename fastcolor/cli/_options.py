"""Command-line options made from the fields of a dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, get_type_hints

import typer


def options_from(config: type) -> Callable[[Callable], Callable]:
    """Gives a command one option for each field of a dataclass; the command gets them as one `config` argument.

    Help texts come from the fields' metadata, types and defaults from the fields themselves.
    """

    def decorate(command: Callable) -> Callable:
        hints = get_type_hints(config)
        own = [p for n, p in inspect.signature(command, eval_str=True).parameters.items() if n != "config"]
        made = [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=f.default,
                annotation=Annotated[hints[f.name], typer.Option(help=f.metadata.get("help", ""))],
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
