from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from fastcolor.cli import app
from fastcolor.model import export
from fastcolor.model.checkpoint import Checkpoint, save_checkpoint
from fastcolor.model.network import ColorNetwork, NetworkConfig


def run(*arguments):
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    return result.exit_code, result.output.replace("\n", "")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_checkpoint(path, Checkpoint(ColorNetwork(NetworkConfig("regression")).eval(), None, {"size": 64}))
    return path


def test_safetensors(tmp_path, weights):
    out = tmp_path / "half.safetensors"
    code, output = run(weights, out, "--dtype", "fp16")
    assert code == 0 and "23." in output and "fp16; colors of a test picture moved by" in output
    assert run(weights, out) == (2, f"error: {out}: exists; --overwrite replaces it")
    assert run(weights, out, "--overwrite")[0] == 0


def test_onnx(tmp_path, weights, monkeypatch):
    """What is asked for arrives; tests/model/test_export_graph.py has the graph itself."""
    out, asked = tmp_path / "a.onnx", {}

    def write(weights, out, size, sweeps, say, **options):
        asked.update(size=size, sweeps=sweeps, **options)
        out.write_bytes(bytes(3_000_000))
        return 1.5e-3

    monkeypatch.setattr(export, "export_onnx", write)
    code, output = run(weights, out, "--size", "40x32", "--sweeps", "3", "--vividness", "0.2", "--no-mrf")
    assert asked == {"size": (32, 40), "sweeps": 3, "vividness": 0.2, "mrf": False, "temperature": 0.38}
    assert code == 0 and "3.0 MB; width and height are fixed to 40x32; off by 0.0015 Lab units" in output


@pytest.mark.parametrize("arguments, words", [
    (("a.pt",), "a.pt: must end in .safetensors or .onnx"),
    (("a.safetensors", "--dtype", "int4"), "--dtype must be one of fp32, fp16, bf16; got 'int4'"),
    (("a.onnx", "--dtype", "fp16"), "--dtype means nothing for .onnx"),
    (("a.safetensors", "--vividness", "0.2"), "--vividness means nothing for .safetensors"),
    (("a.onnx", "--vividness", "nan"), "Invalid value for '--vividness'"),
    (("a.onnx", "--size", "big"), "--size must look like 256x192 (width x height), got 'big'"),
])  # fmt: skip
def test_bad_options(weights, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, output = run(weights, *arguments)
    assert code == 2 and words in output and not list(tmp_path.iterdir())


def test_no_weights(tmp_path):
    code, output = run(tmp_path / "none", tmp_path / "a.safetensors")
    assert code == 1 and "none: no such weights file" in output
