"""`fastcolor export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastcolor.cli._options import _finite

_ONNX_ALONE = ("size", "sweeps", "mrf", "vividness", "temperature")


def export(
    context: typer.Context,
    weights: Annotated[Path, typer.Argument(help="Weights of `fastcolor train`, or `bundled`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors|OUT.onnx", help="The file to write.")],
    dtype: Annotated[
        str, typer.Option(help="safetensors: type of the weights, fp32, fp16 or bf16; fp16 halves the file.")
    ] = "fp32",
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="ONNX: fix the input's size; free multiples of 8 from 32 on by default."),
    ] = None,
    sweeps: Annotated[
        int | None, typer.Option(min=0, max=50, help="ONNX: sweeps of the mean field; the model's own by default.")
    ] = None,
    mrf: Annotated[bool, typer.Option("--mrf/--no-mrf", help="ONNX: with the mean field in the graph.")] = True,
    vividness: Annotated[
        float, typer.Option(min=0, max=1, callback=_finite, help="ONNX: 0 takes the safest colors, 1 the most vivid.")
    ] = 0.5,
    temperature: Annotated[
        float, typer.Option(min=0.01, max=10, callback=_finite, help="ONNX: of the annealed mean.")
    ] = 0.38,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it is there already.")] = False,
) -> None:
    """Write a model as one safetensors file, or as an ONNX graph.

    The ONNX graph goes from lightness "L" [B, 1, H, W] (CIE L*, 0 to 100) to colors "ab" [B, 2, H/4, W/4]: the network,
    the vividness, the sweeps of the mean field one after the other, and the annealed mean. onnxruntime runs it and is
    compared with PyTorch before the file gets its name. It needs the extra "onnx".
    """
    from fastcolor.model.checkpoint import CheckpointError
    from fastcolor.model.colorizer import BUNDLED
    from fastcolor.model.export import BOUND, DTYPES, ExportError, export_onnx, export_safetensors

    if dtype not in DTYPES:
        _refuse(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}", 2)
    if out.suffix not in (".safetensors", ".onnx"):
        _refuse(f"{out}: must end in .safetensors or .onnx", 2)
    for name in ("dtype",) if out.suffix == ".onnx" else _ONNX_ALONE:
        if context.get_parameter_source(name).name != "DEFAULT":
            _refuse(f"--{name} means nothing for {out.suffix}, see fastcolor export --help", 2)
    if out.exists() and not overwrite:
        _refuse(f"{out}: exists; --overwrite replaces it", 2)
    if weights == Path("bundled") and not weights.exists():
        weights = BUNDLED
    try:
        if out.suffix == ".safetensors":
            error = export_safetensors(weights, out, dtype)
            typer.echo(f"{out}: {_size(out)}, {dtype}; colors of a test picture moved by {error:.2g} Lab units at most")
            return
        error = export_onnx(
            weights, out, _sides(size), sweeps, lambda text: typer.echo(text, err=True),
            mrf=mrf, vividness=vividness, temperature=temperature,
        )  # fmt: skip
        free = "free multiples of 8 from 32 on" if size is None else f"fixed to {size}"
        typer.echo(
            f"{out}: {_size(out)}; width and height are {free}; "
            f"off by {error:.2g} Lab units from PyTorch at most (bound {BOUND})"
        )
    except (CheckpointError, ExportError, ImportError, OSError) as error:
        _refuse(str(error), 1)
    except KeyboardInterrupt:
        typer.echo("stopped: nothing was written", err=True)
        raise typer.Exit(130) from None


def _sides(text: str | None) -> tuple[int, int] | None:
    """(height, width) of "WxH"."""
    if text is None:
        return None
    try:
        width, height = (int(n) for n in text.split("x"))
    except ValueError:
        _refuse(f"--size must look like 256x192 (width x height), got {text!r}", 2)
    return height, width


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


def _refuse(message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
