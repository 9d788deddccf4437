from __future__ import annotations

import json
import weakref

import av
import numpy as np
import pytest
import pyvips
import torch
from evaluation.test_compare import photo, weights
from video.clips import make_clip

from fastcolor.evaluation import films
from fastcolor.evaluation.compare import GREY, MEAN, EvaluationError, load_models
from fastcolor.evaluation.films import TRUTH, evaluate_films, find_films, has_photos
from fastcolor.evaluation.metrics import colorfulness, psnr
from fastcolor.evaluation.report import html
from fastcolor.evaluation.video import color_distribution_consistency, flicker
from fastcolor.model.colorizer import Colorizer
from fastcolor.ops.lab import rgb_to_lab
from fastcolor.video.colorizer import VideoColorizer, VideoOptions


def scene(count, seed=0, height=40, width=50):
    """A window that creeps over a photo, with noise as of a codec: [T, H, W, 3] uint8."""
    wide = photo(seed, height, width + count).numpy()[..., :3].astype(float)
    noise = np.random.default_rng(seed).normal(0, 0.5, (count, height, width, 3))
    frames = np.stack([wide[:, t // 3 : t // 3 + width] for t in range(count)]) + noise
    return frames.round().clip(0, 255).astype(np.uint8)


def write_film(path, frames):
    """Lossless RGB."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=24)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for pixels in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        out.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return weights(tmp_path_factory.mktemp("run"))


@pytest.fixture
def film(tmp_path):
    return write_film(tmp_path / "scene.mkv", scene(10))


def row_of(rows, name, vividness=None):
    (row,) = (r for r in rows if r["name"] == name and (vividness is None or r["vividness"] == vividness))
    return row


def test_rows_by_other_means(model, film):
    """Every figure again, from whole films: coloured in one piece, and measured by the functions of stacks."""
    advanced = []
    found = evaluate_films(load_models([model], [0, 0.5], "cpu"), film, advance=lambda: advanced.append(1))
    names = [r["name"] for r in found.rows]
    assert names == [GREY, MEAN, "model", "model", "model, each frame alone", TRUTH] and len(advanced) == 10
    truth = torch.from_numpy(scene(10)).permute(0, 3, 1, 2).float() / 255
    lab = rgb_to_lab(truth)
    colorizer = Colorizer.load(model, "cpu", vividness=0.5)
    grey = row_of(found.rows, GREY)
    own = {
        "flicker": flicker(lab[:, 1:], lab[:, :1]).item(),
        "cdc": color_distribution_consistency((truth * 255).round().byte()).item(),
        "colorfulness": colorfulness(255 * truth).mean().item(),
    }
    assert 0.1 < own["flicker"] < 3
    for name, options in (
        ("model", VideoOptions()),
        ("model, each frame alone", VideoOptions(temporal=0, keyframes=1)),
        (TRUTH, None),
    ):
        row = row_of(found.rows, name, 0.5 if options else None)
        rgb = truth
        if options is not None:
            rgb = torch.stack(list(VideoColorizer(colorizer, options=options).colorize(truth)))
            value = psnr(255 * rgb, 255 * truth).mean().item()
            assert row["psnr"] == pytest.approx(value, abs=1e-3)
            assert row["psnr_gain"] == pytest.approx(value - grey["psnr"], abs=1e-3)
        expected = {
            "flicker": flicker(rgb_to_lab(rgb)[:, 1:], lab[:, :1]).item(),
            "cdc": color_distribution_consistency((rgb * 255).round().byte()).item(),
            "colorfulness": colorfulness(255 * rgb).mean().item(),
        }
        for key, value in expected.items():
            # batches of other sizes round otherwise, and a level of 8 bits may turn
            assert row[key] == pytest.approx(value, rel=2e-2 if key == "cdc" else 1e-3), key
            assert row[f"{key}_ratio"] == pytest.approx(value / own[key], rel=2e-2), key
    assert row_of(found.rows, TRUTH)["psnr"] is None and grey["flicker"] < 1e-3
    alone, kept = (found.record["films"][0]["rows"][i] for i in (4, 3))
    assert alone["network_runs_per_frame"] == 1 and kept["network_runs_per_frame"] == 0.1


def test_few_frames_are_held(model, film, monkeypatch):
    held, most = weakref.WeakSet(), []

    def counted(source):
        for frame in true_frames(source):
            held.add(frame.rgb)
            most.append(len(held))
            yield frame

    true_frames = films.true_frames
    monkeypatch.setattr(films, "true_frames", counted)
    evaluate_films(load_models([model], [0], "cpu"), film)
    assert len(most) == 10 and max(most) <= 2 * films._BLOCK  # a block, and the one that it takes over from


def test_folder_of_films_and_others(tmp_path, model):
    """Means over films, each alike; what cannot be used is named and stops nothing. Photos are not films."""
    folder = tmp_path / "data"
    (folder / "below").mkdir(parents=True)
    write_film(folder / "a.mkv", scene(6))
    write_film(folder / "below" / "b.mkv", scene(9, seed=1, height=32, width=60))
    write_film(folder / "grey.mkv", scene(6)[..., :1].repeat(3, -1))
    write_film(folder / "one.mkv", scene(1))
    make_clip(folder / "woven.mkv", codec="mpeg2video", interlaced=True, audio=None)
    (folder / "broken.mp4").write_bytes(b"no film")
    photo(0).write_to_file(str(folder / "photo.png"))
    said = []
    models = load_models([model], [0], "cpu")
    found = evaluate_films(models, folder, say=said.append, side=36)
    record = found.record
    assert [(f["name"], f["frames"], f["height"]) for f in record["films"]] == [
        ("a.mkv", 6, 36),
        ("below/b.mkv", 9, 32),
    ]
    left = record["left_out"]
    assert left["counts"] == {"greyscale": 1, "unreadable": 3}
    assert set(left["files"]) == {"grey.mkv", "one.mkv", "woven.mkv", "broken.mp4"}
    assert "has 1 frame, expected at least 2" in left["files"]["one.mkv"]
    assert "--deinterlace" in left["files"]["woven.mkv"] and len(said) == 4
    for i, row in enumerate(found.rows):
        parts = [f["rows"][i] for f in record["films"]]
        assert row["flicker"] == pytest.approx(np.mean([p["flicker"] for p in parts]))
        if row["psnr"] is not None:
            assert row["psnr"] == pytest.approx(np.mean([p["psnr"] for p in parts]))
            gains = [p["psnr_gain"] for p in parts]
            assert row["psnr_gain_error"] == pytest.approx(abs(gains[0] - gains[1]) / 2)
    json.dumps(record, allow_nan=False)
    assert has_photos(folder) and not has_photos(folder / "below") and find_films(folder / "below" / "b.mkv")
    assert len(evaluate_films(models, folder, limit=1).record["films"]) == 1


def test_part_of_a_film(model, tmp_path):
    film = write_film(tmp_path / "scene.mkv", scene(30))
    models = load_models([model], [0], "cpu")
    found = evaluate_films(models, film, start=0.5, seconds=0.25)
    assert found.record["films"][0]["frames"] == 6 and found.record["protocol"]["seconds_of_each_at_most"] == 0.25
    alone = evaluate_films(models, write_film(tmp_path / "part.mkv", scene(30)[12:18]))
    assert alone.rows == found.rows
    assert found.record["protocol"]["fingerprint"]["pixels"] == alone.record["protocol"]["fingerprint"]["pixels"]


def test_film_too_short_for_cdc(model, tmp_path):
    film = write_film(tmp_path / "short.mkv", scene(4))
    row = row_of(evaluate_films(load_models([model], [0], "cpu"), film).rows, "model")
    assert row["cdc"] is None and row["cdc_ratio"] is None and row["flicker"] is not None


def test_film_that_moves_all_over(model, tmp_path):
    """Where no pixel is still there is no flicker to measure; the rest is there."""
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 40, 3), np.uint8)
    found = evaluate_films(load_models([model], [0], "cpu"), write_film(tmp_path / "noise.mkv", frames), pictures=True)
    row = row_of(found.rows, "model")
    assert row["flicker"] is None and row["flicker_ratio"] is None and row["cdc"] > 0 and row["psnr"] > 5
    assert "Flicker through time" not in html(None, found)


def test_models_of_every_kind(tmp_path, film):
    """A regression has one row beside that of its frames alone; a model without the field says so."""
    (tmp_path / "r").mkdir()
    paths = [weights(tmp_path, "a"), weights(tmp_path / "r", "b", head="regression", prior=False)]
    found = evaluate_films(load_models(paths, [0, 1], "cpu", mrf=None), film, pictures=True)
    regression = row_of(found.rows, "b")
    assert regression["vividness"] is None and regression["field"] is False
    assert row_of(found.rows, "a, no field", 1)["field"] is False and row_of(found.rows, "a", 1)["field"] is True
    page = html(None, found)
    # of three frames grey, each model and its frames alone, truth; then the slices, without grey
    assert page.count("data:image/jpeg;base64,") == 3 * 8 + 7
    assert "Flicker through time" in page and "scene.mkv" in page and "http" not in page


def test_numbered_images(tmp_path, model):
    for i, pixels in enumerate(scene(6)):
        pyvips.Image.new_from_array(pixels).write_to_file(str(tmp_path / f"{i:03d}.png"))
    found = evaluate_films(load_models([model], [0], "cpu"), tmp_path / "%03d.png")
    assert found.record["films"][0]["frames"] == 6 and found.record["films"][0]["name"] == "%03d.png"


def test_nothing_to_evaluate(tmp_path, model):
    models = load_models([model], [0], "cpu")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no film")
    with pytest.raises(EvaluationError, match=r"broken.mp4: cannot be read as a film \("):
        evaluate_films(models, broken)
    with pytest.raises(EvaluationError, match="none of its 1 films could be used; the first: broken.mp4: cannot"):
        evaluate_films(models, tmp_path)
    broken.unlink()
    with pytest.raises(EvaluationError, match="no films in it"):
        evaluate_films(models, tmp_path)
