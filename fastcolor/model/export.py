"""A trained model for other programs: one safetensors file, or an ONNX graph from lightness to ab."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcolor._files import atomic_path
from fastcolor.model.checkpoint import load_checkpoint, save_checkpoint
from fastcolor.model.colorizer import Colorizer, vividness_unary
from fastcolor.reference.mean_field import (
    annealed_mean,
    gaussian,
    interaction,
    label_axes,
    offsets,
    project,
    softmax,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BOUND = 0.05  # Lab units that ONNX may differ from PyTorch; a level of 8-bit sRGB is about 0.4
_OPSET = 18
STEP = 8  # sides of the input are multiples of it: the network's own padding is no part of the graph
_TRIED = ((2, 64, 96), (1, 88, 56))  # batch, height, width: what a graph for all sizes is checked with


class ExportError(RuntimeError):
    """What was written does not compute what the model does, or cannot be written."""


class ColorGraph(nn.Module):
    """L [B, 1, H, W] in [0, 100] -> ab [B, 2, H/s, W/s]: network, vividness, the field's sweeps one after the other,
    and the annealed mean, as `Colorizer.predict` with the same options. H and W are multiples of 8; s = 4, with a
    regression head 2. Plain PyTorch of few operations: an exporter follows it, and other programs have them all.

    Args:
        colorizer: the model and its options.
        sweeps: of the field; None takes the model's own.

    Raises:
        ExportError: the model's field updates in a way that has no graph.
    """

    def __init__(self, colorizer: Colorizer, sweeps: int | None = None):
        super().__init__()
        self.network, self.bins, self.options = colorizer.network, colorizer.bins, colorizer.options
        self.field = {**colorizer.field, **({} if sweeps is None else {"sweeps": sweeps})}
        if self.bins is None:
            return
        self.unary: Tensor | None
        self.register_buffer("unary", vividness_unary(colorizer.checkpoint, self.options.vividness))
        if self.field["schedule"] != "parallel":
            raise ExportError(f"the model's field has schedule {self.field['schedule']!r}; only 'parallel' has a graph")
        reach = self.field["radius"]
        self.around = offsets(self.field["neighborhood"], reach, 1, 2 * reach + 1, 2 * reach + 1)
        # a convolution with one 1 a channel moves the picture; hundreds of slices instead take minutes to export
        shift = torch.zeros(len(self.around), 1, 2 * reach + 1, 2 * reach + 1)
        for k, (dy, dx) in enumerate(self.around):
            shift[k, 0, reach + dy, reach + dx] = 1
        self.register_buffer("shift", shift)
        near = torch.tensor(self.around, dtype=torch.float32).norm(dim=1)
        self.register_buffer("near", gaussian(near, self.field["sigma_space"])[None, :, None, None])
        a_t, b = interaction(
            self.field["similarity"], self.bins.count, self.bins, self.field["gamma"], None, torch.zeros(())
        )
        self.register_buffer("a_t", a_t)
        self.register_buffer("b", b)

    def forward(self, L: Tensor) -> Tensor:
        output = self.network(L)
        if self.bins is None:
            return output * self.options.saturation
        u = output if self.unary is None else output + self.unary
        if not self.options.mrf:
            ab = annealed_mean(u, self.options.temperature, self.bins, logits=True)
        else:
            scores = self._sweeps(u, F.avg_pool2d(L, self.network.stride))
            ab = annealed_mean(scores, self.options.temperature, self.bins, logits=True)
        return ab * self.options.saturation

    def _sweeps(self, u: Tensor, guide: Tensor) -> Tensor:
        """Scores [B, K, h, w] after all sweeps, of which the softmax are the marginals of `mean_field`."""
        field = self.field
        axes = label_axes(self.bins, self.bins.count)
        light = gaussian(guide - self._neighbors(guide)[:, 0], field["sigma_light"])  # [B, n, h, w]
        weights = (field["weight"] * self.near * light)[:, None]
        t = u if field["start"] == "softmax" else torch.zeros_like(u)
        for _ in range(field["sweeps"]):
            features = project(self.b, softmax(t, axes))  # [B, R, h, w]
            gathered = (weights * self._neighbors(features)).sum(2)
            new = u + project(self.a_t, gathered)
            t = (1 - field["damping"]) * new + field["damping"] * t if field["damping"] else new
        return t

    def _neighbors(self, x: Tensor) -> Tensor:
        """[B, R, h, w] -> [B, R, n, h, w]: x_j at i for each of the n offsets, zero outside."""
        channels = x.shape[1]
        moved = F.conv2d(x, self.shift.repeat(channels, 1, 1, 1), padding=self.field["radius"], groups=channels)
        return moved.unflatten(1, (channels, len(self.around)))


def export_safetensors(weights: Path, out: Path, dtype: str = "fp32") -> float:
    """Writes a checkpoint anew, with weights of another type: `fastcolor colorize --weights OUT` takes it.

    Returns:
        how far the colours of a test picture move by it, the largest |Δab| in Lab units.

    Raises:
        CheckpointError: `weights` cannot be read. OSError: `out` cannot be written.
    """
    checkpoint = load_checkpoint(weights)
    save_checkpoint(out, checkpoint, DTYPES[dtype])
    L = made_up_lightness(1, 128, 160)
    vividness = 0.0 if checkpoint.prior is None or checkpoint.network.config.head == "regression" else 0.5
    before, after = (Colorizer(c, "cpu", vividness=vividness).predict(L)[0] for c in (checkpoint, load_checkpoint(out)))
    return (before - after).abs().max().item()


def export_onnx(
    weights: Path,
    out: Path,
    size: tuple[int, int] | None = None,
    sweeps: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    **options,
) -> float:
    """Writes `ColorGraph` as ONNX: input "L" float32 [B, 1, H, W] in [0, 100], output "ab" float32, in ab units.

    B is free; H and W are free multiples of 8 from 32 on, unless `size` (H, W) fixes them. onnxruntime runs the file
    and is compared with the Colorizer before it gets its name.

    Args:
        sweeps: of the field; None takes the model's own.
        say: told what was checked.
        **options: of `ColorizeOptions`, but for size.

    Returns:
        the largest |Δab| found, in Lab units.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing. CheckpointError: `weights` cannot be read, or has no
        colour statistics where vividness is asked for. ExportError: off by more than `BOUND`, or a size that cannot be.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError as error:
            raise ImportError(f"ONNX needs {name}: pip install 'fastcolor[onnx]' ({error})") from error
    if size is not None and (min(size) < 4 * STEP or size[0] % STEP or size[1] % STEP):
        raise ExportError(f"height and width must be multiples of {STEP} from {4 * STEP} on, got {size[0]}×{size[1]}")
    checkpoint = load_checkpoint(weights)
    if checkpoint.network.config.head == "regression":
        options |= {"vividness": 0.0, "mrf": False}
    colorizer = Colorizer(checkpoint, "cpu", **options)
    graph = ColorGraph(colorizer, sweeps).eval()
    shapes = _TRIED if size is None else ((2, *size), (1, *size))
    dynamic = {0: torch.export.Dim("batch", min=1, max=1 << 12)}
    if size is None:
        dynamic |= {d: STEP * torch.export.Dim(n, min=4, max=1 << 10) for d, n in ((2, "rows"), (3, "columns"))}
    with atomic_path(out) as temporary:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                graph, (made_up_lightness(*shapes[0]),), None, input_names=["L"], output_names=["ab"],
                dynamic_shapes={"L": dynamic}, dynamo=True, opset_version=_OPSET, verbose=False,
            )  # fmt: skip
        program.save(str(temporary), external_data=False)
        colorizer.field["sweeps"] = graph.field["sweeps"]
        error = 0.0
        for shape in shapes:
            error = max(error, compare(temporary, colorizer, shape))
            say(f"checked with onnxruntime on L {[shape[0], 1, *shape[1:]]}")
        if not error <= BOUND:
            raise ExportError(f"{out}: onnxruntime is off by {error:.3g} Lab units, more than {BOUND}: not written")
    return error


def compare(path: Path, colorizer: Colorizer, shape: tuple[int, int, int]) -> float:
    """The largest |Δab| between onnxruntime and the Colorizer on a made-up picture of [batch, height, width]."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    L = made_up_lightness(*shape)
    (found,) = session.run(["ab"], {"L": L.numpy()})
    expected = colorizer.predict(L)[0]
    if list(found.shape) != list(expected.shape):
        raise ExportError(f"{path}: onnxruntime gives shape {list(found.shape)}, expected {list(expected.shape)}")
    return (torch.from_numpy(found) - expected).abs().nan_to_num(torch.inf).max().item()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's words on what else it might have exported."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def made_up_lightness(batch: int, height: int, width: int) -> Tensor:
    """Made-up pictures [B, 1, H, W]: ramps, plains and grain, the same each time."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    waves = torch.stack([torch.sin((3 + i) * x + 2 * y) * torch.cos((2 + i) * y) for i in range(batch)])
    steps = 20 * ((4 * x).floor() + (3 * y).floor() > 2)
    grain = 2 * torch.randn(batch, height, width, generator=generator)
    return (45 + 30 * waves + steps + grain).clamp(0, 100)[:, None]
