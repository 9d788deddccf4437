from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastcolor.bins import ColorBins
from fastcolor.model import export
from fastcolor.model.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from fastcolor.model.colorizer import Colorizer
from fastcolor.model.export import ColorGraph, ExportError, export_onnx, export_safetensors, made_up_lightness
from fastcolor.model.network import ColorNetwork, NetworkConfig


def checkpoint(head="distribution", kind="joint", mrf=None):
    torch.manual_seed(0)
    network = ColorNetwork(NetworkConfig(head, ColorBins(kind))).eval()
    last = network.head if head == "distribution" else network.head[-1]
    torch.nn.init.normal_(last.weight, std=0.3 if head == "distribution" else 0.02)
    prior = torch.rand(network.config.bins.count) if head == "distribution" else None
    return Checkpoint(network, prior, {"size": 64}, mrf or {})


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, checkpoint())
    return path


@pytest.mark.parametrize("kind, mrf", [
    ("joint", {}),
    ("separable", {}),
    ("separable", {"radius": 1, "neighborhood": "cross", "similarity": "steps", "start": "uniform"}),
    ("joint", {"similarity": "gaussian", "gamma": 20.0, "damping": 0.3, "sweeps": 2, "radius": 2}),
    ("joint", {"similarity": "potts", "weight": 0.5, "sweeps": 1, "sigma_light": 8.0}),
], ids=str)  # fmt: skip
def test_graph_is_the_colorizer(kind, mrf):
    colorizer = Colorizer(checkpoint(kind=kind, mrf=mrf), "cpu", vividness=0.7, temperature=0.5, saturation=1.2)
    L = made_up_lightness(2, 40, 56)
    with torch.no_grad():
        ab = ColorGraph(colorizer).eval()(L)
    expected = colorizer.predict(L)[0]
    assert expected.std() > 3  # there is something to get wrong
    assert (ab - expected).abs().max() < 2e-3


def test_graph_without_field_and_of_regression():
    L = made_up_lightness(1, 32, 40)
    for colorizer in (
        Colorizer(checkpoint(), "cpu", vividness=0, mrf=False),
        Colorizer(checkpoint("regression"), "cpu", vividness=0),
    ):
        with torch.no_grad():
            assert (ColorGraph(colorizer).eval()(L) - colorizer.predict(L)[0]).abs().max() < 1e-3


def test_sweeps_can_be_chosen():
    colorizer = Colorizer(checkpoint(), "cpu")
    L = made_up_lightness(1, 32, 40)
    with torch.no_grad():
        none, own = (ColorGraph(colorizer, n).eval()(L) for n in (0, None))
    plain = colorizer.with_options(mrf=False).predict(L)[0]
    assert (none - plain).abs().max() < 1e-3 < (own - plain).abs().max()


def test_schedules_without_a_graph():
    with pytest.raises(ExportError, match="schedule 'checkerboard'; only 'parallel' has a graph"):
        ColorGraph(Colorizer(checkpoint(mrf={"schedule": "checkerboard"}), "cpu"))


@pytest.mark.parametrize("dtype, most", [("fp32", 0.0), ("fp16", 0.2), ("bf16", 2.0)])
def test_safetensors(tmp_path, weights, dtype, most):
    out = tmp_path / "out" / "small.safetensors"
    moved = export_safetensors(weights, out, dtype)
    assert moved <= most and (moved > 0) == (dtype != "fp32")
    before, after = load_checkpoint(weights), load_checkpoint(out)
    assert after.notes == before.notes and torch.equal(after.prior, before.prior)
    assert (out.stat().st_size < 0.6 * weights.stat().st_size) == (dtype != "fp32")


def test_onnx_says_what_is_missing(tmp_path, weights, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"ONNX needs onnx: pip install 'fastcolor\[onnx\]'"):
        export_onnx(weights, tmp_path / "a.onnx")


def onnxruntime():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def test_onnx_of_every_size(tmp_path, weights):
    runtime = onnxruntime()
    out = tmp_path / "a.onnx"
    error = export_onnx(weights, out, sweeps=2, vividness=0.3)
    assert error < 5e-3
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (entry,), (result,) = session.get_inputs(), session.get_outputs()
    assert entry.name == "L" and result.name == "ab" and entry.shape[1] == 1 and result.shape[1] == 2
    colorizer = Colorizer.load(weights, "cpu", vividness=0.3)
    colorizer.field["sweeps"] = 2
    for shape in ((1, 32, 32), (3, 104, 40)):  # none of those it was checked with
        L = made_up_lightness(*shape)
        (ab,) = session.run(None, {"L": L.numpy()})
        assert (torch.from_numpy(ab) - colorizer.predict(L)[0]).abs().max() < 5e-3


def test_onnx_that_is_off_is_not_written(tmp_path, weights, monkeypatch):
    onnxruntime()
    program = SimpleNamespace(save=lambda path, **_: Path(path).write_text("a graph"))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)
    monkeypatch.setattr(export, "compare", lambda *_: 0.06)
    with pytest.raises(ExportError, match="off by 0.06 Lab units, more than 0.05: not written"):
        export_onnx(weights, tmp_path / "out" / "a.onnx", size=(32, 40), mrf=False)
    assert not list((tmp_path / "out").iterdir())


def test_onnx_sizes_and_weights(tmp_path, weights):
    onnxruntime()
    for size in ((33, 40), (24, 40)):
        with pytest.raises(ExportError, match=f"multiples of 8 from 32 on, got {size[0]}×{size[1]}"):
            export_onnx(weights, tmp_path / "a.onnx", size=size)
    with pytest.raises(CheckpointError, match="no such weights file"):
        export_onnx(tmp_path / "none.safetensors", tmp_path / "a.onnx")
