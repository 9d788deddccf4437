from __future__ import annotations

import json
import os
import shutil

import av
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


@pytest.fixture(autouse=True)
def empty_hub(tmp_path_factory, monkeypatch):
    """Whatever this machine has downloaded before."""
    folder = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_checkpoint(path, Checkpoint(ColorNetwork().eval(), torch.rand(313), {"size": 64}))
    return path


def film(path, count=6):
    """A picture that creeps, lossless."""
    pixels = np.random.default_rng(3).integers(0, 255, (4, 9, 3)).astype(np.uint8)
    wide = pyvips.Image.new_from_array(pixels).resize(8).numpy()
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 56, "bgr0"
        for t in range(count):
            frame = np.ascontiguousarray(wide[:, t // 2 : t // 2 + 56])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        out.mux(stream.encode(None))
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
        "grey (ab = 0)", "training mean colour", "nearest bin (oracle)", "LPIPS: not computed: no weights of AlexNet",
        "left out: 1 unreadable", "bad.jpg: not a readable image", "3 pictures, short side 32 to 32",
    ):  # fmt: skip
        assert words in result.output
    record = json.loads((tmp_path / "x" / "a.json").read_text())
    assert [r["vividness"] for r in record["rows"]] == [None, None, 0, 1, None]
    assert record["protocol"]["models"][0]["sha256"] and record["protocol"]["versions"]["torch"] == torch.__version__
    assert record["not_computed"]["fid"].startswith("not computed: ") and record["rows"][0]["lpips"] is None
    # the table shows what the file holds
    for r in record["rows"]:
        assert f"{r['psnr']:.2f}" in result.output and f"{r['auc']:.1%}" in result.output
    page = (tmp_path / "a.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("<img") == 3 * 3 * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "x"]  # no temporary file is left


def test_films(tmp_path, weights):
    """A film by its name: the table shows what the file holds, and the page has its pictures."""
    result = run(weights, film(tmp_path / "a.mkv"), "--vividness", "0,0.5", "--json", tmp_path / "a.json", "--html",
                 tmp_path / "a.html", "--temporal", "0.5")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "--lpips" not in result.output
    assert "a.mkv: 6 frames, 0.2 s, 56×32" in result.output and "AuC" not in result.output
    record = json.loads((tmp_path / "a.json").read_text())
    assert set(record) == {"films"} and record["films"]["protocol"]["video_options"]["temporal"] == 0.5
    names = [r["name"] for r in record["films"]["rows"]]
    assert names[-2:] == ["model, each frame alone", "truth"]
    for r in record["films"]["rows"]:
        assert r["name"] in result.output and f"{r['flicker']:.3f}" in result.output
        assert f"{r['cdc']:.2e}" in result.output and f"{r['cdc_ratio']:.2f}" in result.output
    assert (tmp_path / "a.html").read_text().count("<img") == 3 * 4 + 3
    result = run(weights, tmp_path / "a.mkv", "--vividness", "0", "--lpips", weights)
    assert result.exit_code == 0 and "--lpips: is not used" in result.output


def test_photos_and_films(tmp_path, weights, photos):
    """Of a folder that holds both, both; a film that is none does not stop the rest."""
    folder = tmp_path / "data"
    shutil.copytree(photos, folder)
    film(folder / "a.mkv")
    (folder / "bad.mp4").write_text("no film")
    result = run(weights, folder, "--vividness", "0", "--seconds", "0.1", "--json", tmp_path / "a.json", "--html",
                 tmp_path / "a.html")  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("3 pictures, short side 32", "a.mkv: 3 frames", "films left out: 1 unreadable",
                  "bad.mp4: cannot be read as a film", "bad.jpg: not a readable image"):  # fmt: skip
        assert words in result.output
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["protocol"]["pictures"] == 3 and record["films"]["films"][0]["name"] == "a.mkv"
    page = (tmp_path / "a.html").read_text()
    assert "Worst by PSNR" in page and "<h2>Films</h2>" in page
    (folder / "a.mkv").unlink()
    result = run(weights, folder, "--vividness", "0")
    assert result.exit_code == 0 and "no films: " in result.output and "3 pictures" in result.output
    film(folder / "a.mkv")
    for i in range(3):
        (folder / f"{i}.png").unlink()
    result = run(weights, folder, "--vividness", "0")
    assert result.exit_code == 0 and "no photos: " in result.output and "a.mkv: 6 frames" in result.output


def test_lpips(tmp_path, weights, photos):
    pytest.importorskip("torchmetrics")
    from fastcolor.evaluation.perceptual import AlexNet

    torch.save(AlexNet().state_dict(), tmp_path / "alexnet.pth")
    result = run(weights, photos, "--vividness", "0", "--lpips", tmp_path / "alexnet.pth", "--no-fid", "--json",
                 tmp_path / "a.json", "--html", tmp_path / "a.html")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "LPIPS" in result.output and "FID: not computed: not wanted" in result.output
    record = json.loads((tmp_path / "a.json").read_text())
    about = record["protocol"]["lpips"]
    assert about["file"] == "alexnet.pth" and about["pictures"] == 3 and set(record["not_computed"]) == {"fid"}
    for r in record["rows"]:
        assert r["lpips"] > 0 and f"{r['lpips']:.3f}" in result.output
    assert "<th>LPIPS</th>" in (tmp_path / "a.html").read_text()
    result = run(weights, photos, "--lpips", photos / "bad.jpg")
    assert result.exit_code == 1 and "bad.jpg: not a file of weights" in result.output.replace("\n", "")


@pytest.mark.parametrize("arguments, words", [
    (("--vividness", "0,2"), "must be numbers between 0 and 1 with commas between them, like 0,0.5,1; got '0,2'"),
    (("--vividness", "nan"), "got 'nan'"),
    (("--device", "abacus"), "abacus"),
    (("--seconds", "inf"), "inf is not a number"),
    (("--start", "soon"), "'soon' is no time"),
])  # fmt: skip
def test_bad_options(weights, photos, arguments, words):
    result = run(weights, photos, *arguments)
    assert result.exit_code in (1, 2) and words in result.output and "Traceback" not in result.output


def test_bad_paths(tmp_path, weights, photos):
    os.mkfifo(tmp_path / "pipe")
    for arguments, words in (
        ((weights,), "the photos or films come last"),
        ((weights, tmp_path / "none.mp4"), "none.mp4: no such file or folder, expected photos or films"),
        ((weights, tmp_path / "%04d.png"), "%04d.png: no such images"),
        ((tmp_path / "none.safetensors", photos), "none.safetensors: no such weights file"),
        ((weights, tmp_path), "no images in it"),
        ((weights, photos, "--json", tmp_path), "is a folder, expected a file name"),
        ((weights, photos, "--html", tmp_path / "pipe"), "pipe: is no ordinary file, expected a file name"),
        ((weights, photos / "bad.jpg"), "bad.jpg: is a file, expected a folder of images"),
        ((weights, __file__), "test_eval.py: cannot be read as a film"),
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
