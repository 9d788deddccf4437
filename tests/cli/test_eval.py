from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pyvips = pytest.importorskip("pyvips")

from fastcolor.cli import app  # noqa: E402
from fastcolor.model.checkpoint import Checkpoint, save_checkpoint  # noqa: E402
from fastcolor.model.network import ColorNetwork  # noqa: E402


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_checkpoint(path, Checkpoint(ColorNetwork().eval(), torch.rand(313), {"size": 64}))
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (4, 5, 3)).astype(np.uint8)
        pyvips.Image.new_from_array(pixels).resize(8).write_to_file(str(folder / f"{i}.png"))
    (folder / "bad.jpg").write_text("no image")
    return folder


def test_table_json_and_page(tmp_path, weights, photos):
    result = run(weights, photos, "--json", tmp_path / "x" / "a.json", "--html", tmp_path / "a.html",
                 "--vividness", "0,1")  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in (
        "grey (ab = 0)", "training mean colour", "nearest bin (oracle)", "LPIPS: not computed: no weights",
        "left out: 1 unreadable", "bad.jpg: not a readable image", "3 pictures, short side 32 to 32",
    ):  # fmt: skip
        assert words in result.output
    record = json.loads((tmp_path / "x" / "a.json").read_text())
    assert [r["vividness"] for r in record["rows"]] == [None, None, 0, 1, None]
    assert record["protocol"]["models"][0]["sha256"] and record["protocol"]["versions"]["torch"] == torch.__version__
    assert record["not_computed"]["fid"] == "not computed: no weights at hand"
    # the table shows what the file holds
    for r in record["rows"]:
        assert f"{r['psnr']:.2f}" in result.output and f"{r['auc']:.1%}" in result.output
    page = (tmp_path / "a.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("<img") == 3 * 3 * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "x"]  # no temporary file is left


@pytest.mark.parametrize("arguments, words", [
    (("--vividness", "0,2"), "must be numbers between 0 and 1 with commas between them, like 0,0.5,1; got '0,2'"),
    (("--vividness", "nan"), "got 'nan'"),
    (("--device", "abacus"), "abacus"),
])  # fmt: skip
def test_bad_options(weights, photos, arguments, words):
    result = run(weights, photos, *arguments)
    assert result.exit_code in (1, 2) and words in result.output and "Traceback" not in result.output


def test_bad_paths(tmp_path, weights, photos):
    for arguments, words in (
        ((weights,), "the folder of photos comes last"),
        ((weights, tmp_path / "none"), "none: no such folder"),
        ((tmp_path / "none.safetensors", photos), "none.safetensors: no such weights file"),
        ((weights, tmp_path), "no images in it"),
        ((weights, photos, "--json", tmp_path), "is a folder, expected a file name"),
    ):
        result = run(*arguments)
        assert result.exit_code in (1, 2) and words in result.output.replace("\n", ""), result.output


def test_interrupted(tmp_path, weights, photos, monkeypatch):
    from fastcolor.evaluation import compare as evaluation

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.Comparison, "add", interrupt)
    result = run(weights, photos, "--json", tmp_path / "a.json")
    assert result.exit_code == 130 and "stopped: nothing was written" in result.output
    assert not list(tmp_path.iterdir())
