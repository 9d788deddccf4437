from __future__ import annotations

import json
import math
import tarfile

import numpy as np
import pytest
import torch

pyvips = pytest.importorskip("pyvips")

from fastcolor.bins import ColorBins  # noqa: E402
from fastcolor.evaluation.compare import (  # noqa: E402
    GREY,
    MEAN,
    ORACLE,
    EvaluationError,
    evaluate,
    load_models,
    read_colors,
    short_names,
)
from fastcolor.evaluation.metrics import colorfulness, delta_e_2000, psnr, ssim  # noqa: E402
from fastcolor.evaluation.report import html  # noqa: E402
from fastcolor.model.checkpoint import Checkpoint, save_checkpoint  # noqa: E402
from fastcolor.model.colorizer import Colorizer, vividness_unary  # noqa: E402
from fastcolor.model.network import ColorNetwork, NetworkConfig  # noqa: E402
from fastcolor.ops.lab import rgb_to_lab  # noqa: E402
from fastcolor.training.sources import pack  # noqa: E402


def weights(folder, name="model", kind="joint", head="distribution", prior=True):
    torch.manual_seed(0)
    network = ColorNetwork(NetworkConfig(head, ColorBins(kind))).eval()
    if head == "distribution":  # surer than at its start
        torch.nn.init.normal_(network.head.weight, std=0.3)
    chance = torch.rand(network.config.bins.count) if prior else None
    path = folder / f"{name}.safetensors"
    save_checkpoint(path, Checkpoint(network, chance, {"size": 64}))
    return path


def photo(seed, height=40, width=50):
    random = np.random.default_rng(seed)
    smooth = random.uniform(0, 255, (4, 5, 3))
    image = pyvips.Image.new_from_array(smooth.astype(np.uint8)).resize(width / 5, vscale=height / 4)
    return image.copy(interpretation="srgb")


@pytest.fixture
def photos(tmp_path):
    """Five photos of two sizes, one of them below a folder; a grey one, a broken one, one that is too small."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for i in range(5):
        height = 40 if i % 2 else 56
        photo(i, height).write_to_file(str(folder / ("below" if i == 4 else ".") / f"{i}.png"))
    photo(9).colourspace("b-w").write_to_file(str(folder / "grey.png"))
    (folder / "broken.jpg").write_bytes(b"no picture")
    photo(10).resize(0.1).write_to_file(str(folder / "small.png"))
    return folder


def rows_of(found, name):
    return [r for r in found.rows if r["name"] == name]


@pytest.mark.parametrize("mrf", [True, False])
@pytest.mark.parametrize("kind", ["joint", "separable"])
@pytest.mark.parametrize("vividness", [0.0, 0.7])
def test_colors_are_the_colorizers(tmp_path, kind, mrf, vividness):
    colorizer = Colorizer.load(weights(tmp_path, kind=kind), "cpu", vividness=vividness, mrf=mrf)
    L = torch.rand(2, 1, 40, 48) * 100
    expected, guide = colorizer.predict(L)
    with torch.inference_mode():
        output = colorizer.network(L)
        ab, network, smoothed = read_colors(colorizer, output, guide, vividness_unary(colorizer.checkpoint, vividness))
    assert (ab - expected).abs().max() < 2e-3
    axes = len(colorizer.bins.groups())
    assert torch.allclose(network.sum(1), torch.full_like(network[:, 0], axes))
    assert (smoothed is None) == (not mrf)


def test_rows_by_other_means(tmp_path, photos):
    """Every figure of a model again, picture by picture through the Colorizer."""
    path = weights(tmp_path)
    said, advanced = [], []
    found = evaluate(load_models([path], [0, 0.5], "cpu"), photos, batch_size=2, say=said.append,
                     advance=lambda: advanced.append(1))  # fmt: skip
    assert [r["name"] for r in found.rows] == [GREY, MEAN, "model", "model", ORACLE]
    assert len(advanced) == 8 and found.record["protocol"]["pictures"] == 5
    left = found.record["left_out"]
    assert left["counts"] == {"greyscale": 1, "unreadable": 2} and set(left["files"]) == {
        "grey.png", "broken.jpg", "small.png"}  # fmt: skip
    assert any("small.png: 5×4 pixels, expected at least 11 a side" in line for line in said)

    colorizer = Colorizer.load(path, "cpu", vividness=0.5)
    names = ["0.png", "1.png", "2.png", "3.png", "below/4.png"]
    truths = [pyvips.Image.new_from_file(str(photos / n)).numpy() for n in names]
    pictures = [colorizer.colorize(t) for t in truths]
    pairs = [[torch.from_numpy(x).permute(2, 0, 1) for x in pair] for pair in zip(pictures, truths, strict=True)]
    (row,) = (r for r in rows_of(found, "model") if r["vividness"] == 0.5)
    # the fused field of the Colorizer may round a level otherwise
    for key, function in (
        ("psnr", psnr),
        ("ssim", ssim),
        ("delta_e_2000", lambda a, b: delta_e_2000(rgb_to_lab(a), rgb_to_lab(b)).mean()),
        ("colorfulness", lambda a, b: colorfulness(a)),
    ):
        expected = np.mean([function(*pair).item() for pair in pairs])
        assert row[key] == pytest.approx(expected, rel=1e-3), key
    true_color = np.mean([colorfulness(t).item() for _, t in pairs])
    assert found.record["truth"]["colorfulness"] == pytest.approx(true_color)
    assert row["colorfulness_ratio"] == pytest.approx(row["colorfulness"] / true_color)
    gains = [psnr(*pair).item() for pair in pairs]
    grey = rows_of(found, GREY)[0]
    assert row["psnr_gain"] == pytest.approx(np.mean(gains) - grey["psnr"], abs=2e-2)


def test_baselines_are_in_order(tmp_path, photos):
    found = evaluate(load_models([weights(tmp_path)], [0], "cpu"), photos)
    grey, mean, model, oracle = found.rows
    assert grey["psnr_gain"] == 0 and grey["colorfulness_ratio"] < 0.02
    assert oracle["psnr"] > max(grey["psnr"], model["psnr"]) + 3 and oracle["auc"] > 0.95
    assert 0.9 < oracle["colorfulness_ratio"] < 1.1
    # the prior of the weights is noise over all colours; the truth's labels are nearer to their own entropy
    assert oracle["bin_cross_entropy"] < 1.7 < mean["bin_cross_entropy"] and grey["bin_cross_entropy"] is None
    ab = found.record["protocol"]["training_mean_color"]
    assert ab["prior_of"] == "model.safetensors" and len(ab["ab"]) == 2
    assert math.isfinite(model["calibration_error"]) and model["calibration_error_field"] is not None
    assert len(model["ab_accuracy"]) == 151
    assert sum(model["reliability"][0]) == 2 * 16 * 20 + 3 * 18 * 16  # a quarter of 64×80 and of 72×64


def test_models_of_every_kind_side_by_side(tmp_path, photos):
    """Two files of one name, separable labels, and a regression: which has one row, and no distribution."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    paths = [weights(tmp_path / "a"), weights(tmp_path / "b", kind="separable"),
             weights(tmp_path / "c", head="regression", prior=False)]  # fmt: skip
    found = evaluate(load_models(paths, [0, 1], "cpu", size=48, mrf=False), photos, limit=3, pictures=True)
    names = [r["name"] for r in found.rows]
    assert names == [GREY, MEAN, "a/model", "a/model", "b/model", "b/model", "c/model", ORACLE]
    (regression,) = rows_of(found, "c/model")
    assert regression["vividness"] is None and regression["bin_cross_entropy"] is None and regression["field"] is False
    assert rows_of(found, "b/model")[0]["bin_cross_entropy"] > 0
    assert all(m["network_short_side"] == 48 and m["field"] is None for m in found.record["protocol"]["models"])
    assert found.record["protocol"]["rebalanced_by"] == "model.safetensors"
    page = html(found)
    assert page.count("data:image/jpeg;base64,") == 5 * 3 * 3  # grey, three models, truth; drawn, best, worst
    assert "without the mean field" in page and "http" not in page.replace("http://www.w3.org", "")


def test_vividness_needs_a_prior(tmp_path):
    path = weights(tmp_path, prior=False)
    with pytest.raises(EvaluationError, match="model.safetensors: has no colour statistics"):
        load_models([path], [0, 0.5])
    assert load_models([path], [0])[0].vividness == [0]


def test_with_and_without_the_field(tmp_path, photos):
    found = evaluate(load_models([weights(tmp_path)], [0.5], "cpu", mrf=None), photos, limit=2)
    (on,), (off,) = rows_of(found, "model"), rows_of(found, "model, no field")
    assert on["field"] is True and off["field"] is False and on["colorfulness"] != off["colorfulness"]
    assert on["bin_cross_entropy"] == off["bin_cross_entropy"] and off["bin_cross_entropy_field"] is None
    alone = evaluate(load_models([weights(tmp_path)], [0.5], "cpu", mrf=False), photos, limit=2)
    assert rows_of(alone, "model")[0]["psnr"] == off["psnr"]


def test_packs_and_tars_give_the_same(tmp_path, photos):
    for name in ("grey.png", "broken.jpg", "small.png"):
        (photos / name).unlink()
    files = sorted(photos.rglob("*.png"), key=lambda p: p.name)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for file in files:
            tar.add(file, file.name)
    pack({"all": files}, photos, tmp_path / "packed", 64)
    models = load_models([weights(tmp_path)], [0], "cpu")
    found = [evaluate(models, place) for place in (photos, tmp_path / "tars", tmp_path / "packed")]
    assert len({f.record["protocol"]["fingerprint"]["pixels"] for f in found}) == 1
    assert found[0].rows == found[1].rows == found[2].rows


def test_validation_half_and_side(tmp_path):
    for place, count in (("train", 3), ("val", 2)):
        (tmp_path / "data" / place).mkdir(parents=True)
        for i in range(count):
            photo(i).write_to_file(str(tmp_path / "data" / place / f"{i}.png"))
    found = evaluate(load_models([weights(tmp_path)], [0], "cpu"), tmp_path / "data", side=20)
    protocol = found.record["protocol"]
    assert protocol["split"] == "val" and protocol["pictures"] == 2 and protocol["shrunk_to_short_side"] == 20
    assert protocol["short_side"] == {"least": 20, "median": 20, "most": 20}
    json.dumps(found.record, allow_nan=False)


def test_lpips_and_fid_beside_the_rest(tmp_path, photos):
    """Both with small networks in place of the public ones: of truths and pictures that are the table's."""
    pytest.importorskip("torchmetrics.image.fid")
    from evaluation.test_perceptual import Means, features, linear

    from fastcolor.evaluation.perceptual import Lpips, Perceptual

    lpips = Lpips(features(), linear())
    tools = Perceptual(lpips, Means(), {"lpips": {"file": "a.pth"}, "fid": {"file": "i.pth"}})
    path = weights(tmp_path)
    found = evaluate(load_models([path], [0.5], "cpu"), photos, perceptual=tools, batch_size=2)
    assert found.record["not_computed"] == {} and found.record["protocol"]["lpips"]["pictures"] == 5
    (row,) = rows_of(found, "model")
    colorizer = Colorizer.load(path, "cpu", vividness=0.5)
    distances = []
    for name in ("0.png", "1.png", "2.png", "3.png", "below/4.png"):
        truth = pyvips.Image.new_from_file(str(photos / name)).numpy()
        pair = [torch.from_numpy(x).permute(2, 0, 1)[None] / 127.5 - 1 for x in (colorizer.colorize(truth), truth)]
        distances.append(lpips(*pair).item())
    assert row["lpips"] == pytest.approx(np.mean(distances), rel=1e-2)
    oracle = rows_of(found, ORACLE)[0]
    assert oracle["lpips"] < row["lpips"] and 0 <= oracle["fid"] < row["fid"]
    note = "FID over 5 pictures: biased, as of any count below some 5000"
    page = html(found)
    assert note in page and "<th>LPIPS</th><th>FID</th>" in page
    assert evaluate(load_models([path], [0.5], "cpu"), photos, limit=1).record["not_computed"]["fid"] == "not asked for"


def test_nothing_to_evaluate(tmp_path):
    (tmp_path / "one.jpg").write_bytes(b"no picture")
    with pytest.raises(EvaluationError, match="none of its 1 pictures could be used; the first: .*one.jpg"):
        evaluate(load_models([weights(tmp_path)], [0], "cpu"), tmp_path)


def test_short_names(tmp_path):
    assert short_names([tmp_path / "a" / "m.safetensors", tmp_path / "b" / "n.safetensors"]) == ["m", "n"]
    same = tmp_path / "m.safetensors"
    assert short_names([same, same]) == [f"{same} (1)", f"{same} (2)"]
