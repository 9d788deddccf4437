from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastcolor.evaluation import perceptual
from fastcolor.evaluation.perceptual import AlexNet, Fid, Lpips, WeightsError, find_perceptual

WIDTHS = (64, 192, 384, 256, 256)


def features(seed=0):
    torch.manual_seed(seed)
    return {**AlexNet().state_dict(), "classifier.1.weight": torch.zeros(2, 2)}


def linear(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1, generator=rng) for i, n in enumerate(WIDTHS)}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub folder of its own."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def pictures(count=2, height=75, width=64):
    rng = torch.Generator().manual_seed(5)
    return [2 * torch.rand(count, 3, height, width, generator=rng) - 1 for _ in range(2)]


def test_lpips_is_torchmetrics(monkeypatch):
    """Theirs on our network in torchvision's place, with the channels' weights that they carry."""
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    fake = ModuleType("torchvision")
    fake.models = SimpleNamespace(alexnet=lambda weights: network)
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    monkeypatch.setattr(theirs, "_TORCHVISION_AVAILABLE", True)
    torch.manual_seed(1)
    network = AlexNet()
    path = perceptual._in_package("torchmetrics", perceptual._LINEAR["torchmetrics"])
    assert path is not None
    ours = Lpips(network.state_dict(), perceptual._state(path))
    metric = theirs._LPIPS(net="alex", pnet_rand=True)  # loads its own channels' weights
    a, b = pictures()
    expected = metric(a, b).flatten()
    assert torch.allclose(ours(a, b), expected, rtol=1e-4) and expected.min() > 1e-3
    assert ours(a, a).abs().max() == 0


def test_lpips_is_the_formula():
    """Equation 1 in NumPy's float64, on the features of a network of our own."""
    model = Lpips(features(), linear())
    a, b = pictures(1)
    shift = np.array([-0.030, -0.088, -0.188])[:, None, None]
    scale = np.array([0.458, 0.448, 0.450])[:, None, None]
    layers = []
    for picture in (a, b):
        scaled = torch.from_numpy((picture.double().numpy() - shift) / scale).float()
        layers.append([f.double().numpy()[0] for f in model.network(scaled)])
    expected = 0
    for (x, y), weights in zip(zip(*layers, strict=True), linear().values(), strict=True):
        x, y = (z / (np.sqrt((z**2).sum(0)) + 1e-10) for z in (x, y))
        expected += np.einsum("chw,c->hw", (x - y) ** 2, weights.double().numpy()[0, :, 0, 0]).mean()
    assert model(a, b).item() == pytest.approx(expected, rel=1e-4)


def test_distance_of_bytes():
    """A picture in bytes, its features kept or not; none where AlexNet's pooling has nothing left."""
    model = Lpips(features(), linear())
    a, b = (torch.randint(0, 256, (3, 31, 40), dtype=torch.uint8) for _ in range(2))
    expected = model(*(x[None].float() / 127.5 - 1 for x in (b, a))).item()
    assert model.against(a)(b) == pytest.approx(expected) and model.against(a)(a) == 0
    assert model.against(a[:, :30]) is None
    kept = perceptual._KEPT
    try:
        perceptual._KEPT = 1
        assert model.against(a)(b) == pytest.approx(expected)
    finally:
        perceptual._KEPT = kept


def test_found_in_the_hub_or_by_name(hub, tmp_path):
    pytest.importorskip("torchmetrics")
    found = find_perceptual()
    assert found.lpips is None and "no weights of AlexNet (alexnet-owt-*.pth) in " in found.missing["lpips"]
    assert "no weights of Inception" in found.missing["fid"] and found.about == {}
    torch.save(features(), tmp_path / "mine.pth")
    named = find_perceptual(tmp_path / "mine.pth")
    torch.save(features(), hub / "alexnet-owt-7be5be79.pth")
    found = find_perceptual(fid=False)
    assert found.missing == {"fid": "not computed: not wanted"} and found.about["lpips"]["channels"] == "torchmetrics"
    assert found.about["lpips"]["file"] == "alexnet-owt-7be5be79.pth" and named.about["lpips"]["file"] == "mine.pth"
    a, b = pictures()
    assert torch.equal(found.lpips(a, b), named.lpips(a, b))


def test_what_is_wrong_is_said(hub, tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    cases = {
        "short": ({k: v for k, v in features().items() if k != "features.8.bias"}, "has no features.8.bias"),
        "other": (features() | {"features.0.weight": torch.zeros(64, 1, 11, 11)},
                  r"must have shape \[64, 3, 11, 11\], got \[64, 1, 11, 11\]"),
        "list": ([1], "expected a state dict, got list"),
    }  # fmt: skip
    for name, (state, words) in cases.items():
        torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(WeightsError, match=rf"--lpips .*{name}.pth: .*{words}"):
            find_perceptual(tmp_path / f"{name}.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(WeightsError, match=r"text.pth: not a file of weights \(torch.save did not write it"):
        find_perceptual(tmp_path / "text.pth")
    with pytest.raises(WeightsError, match="none.pth: cannot be read"):
        find_perceptual(tmp_path / "none.pth")
    # found by itself, a broken file stops nothing
    (hub / "alexnet-owt-7be5be79.pth").write_text("no weights")
    assert "not a file of weights" in find_perceptual().missing["lpips"]
    torch.save(features(), hub / "alexnet-owt-7be5be79.pth")
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    missing = find_perceptual().missing
    assert "torchmetrics and lpips carry them, and neither is installed" in missing["lpips"]
    assert "torchmetrics is not installed; torch-fidelity is not installed" in missing["fid"]


def test_inception_is_that_of_the_file(hub, monkeypatch):
    """With torch-fidelity in place, its network is given the file in the hub; one that cannot be loaded is said."""
    fid = pytest.importorskip("torchmetrics.image.fid")
    given = []

    class Network(nn.Module):
        def __init__(self, *arguments):
            super().__init__()
            given.append(arguments)
            if len(given) > 1:
                raise RuntimeError("Error(s) in loading\nmore")

    find_spec = perceptual.find_spec
    monkeypatch.setattr(perceptual, "find_spec", lambda name: find_spec("torch" if name == "torch_fidelity" else name))
    monkeypatch.setattr(fid, "NoTrainInceptionV3", Network)
    file = hub / "pt_inception-2015-12-05-6726825d.pth"
    file.write_bytes(b"")
    found = find_perceptual()
    assert isinstance(found.inception, Network) and found.inception.num_features == 2048
    assert given == [("inception-v3-compat", ["2048"], str(file))]
    assert found.about["fid"]["file"] == file.name and set(found.missing) == {"lpips"}
    missing = find_perceptual().missing["fid"]
    assert missing == "not computed: torch-fidelity cannot be used (Error(s) in loading)"


class Means(nn.Module):
    """Features of a picture [B, 3, H, W]: the means of its channels."""

    num_features = 3

    def forward(self, x):
        return x.double().mean((2, 3))


def test_fid_of_two_sets():
    """Against its formula, of features whose covariances are known; the truths are taken in once for all."""
    pytest.importorskip("torchmetrics.image.fid")
    rng = np.random.default_rng(0)
    sets = [rng.integers(0, 256, (12, 3, 4, 5), dtype=np.uint8) for _ in range(3)]
    fid = Fid(Means())
    for truth, a, b in zip(*sets, strict=True):
        fid.add_truth(torch.from_numpy(truth))
        fid.add("a", torch.from_numpy(a))
        fid.add("b", torch.from_numpy(b))
    means = [s.mean((2, 3)) for s in sets]
    for way, found in (("a", means[1]), ("b", means[2])):
        c, d = np.cov(means[0].T), np.cov(found.T)
        root = np.sqrt(np.linalg.eigvals(c @ d).real).sum()
        expected = ((means[0].mean(0) - found.mean(0)) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * root
        assert fid.value(way) == pytest.approx(expected, rel=1e-4)
    far, picture = Fid(Means()), torch.from_numpy(sets[0][0]).to("meta")
    far.add_truth(picture)
    far.add("a", picture)
    # sums of one device take nothing of another
    assert far._truth.real_features_sum.device == far._ways["a"].fake_features_sum.device == picture.device
    one = Fid(Means())
    one.add_truth(torch.from_numpy(sets[0][0]))
    one.add("a", torch.from_numpy(sets[1][0]))
    assert one.value("a") is None
