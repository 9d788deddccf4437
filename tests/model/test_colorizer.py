from __future__ import annotations

import numpy as np
import pytest
import torch

import fastcolor
from fastcolor.bins import ColorBins
from fastcolor.model.checkpoint import Checkpoint, CheckpointError
from fastcolor.model.colorizer import BUNDLED, Colorizer
from fastcolor.model.network import ColorNetwork, NetworkConfig
from fastcolor.reference import lab as reference


def checkpoint(head="distribution", bins="joint", prior=True):
    """A network that was never trained but has opinions: its colours vary over the picture."""
    torch.manual_seed(3)
    network = ColorNetwork(NetworkConfig(head=head, bins=ColorBins(bins))).eval()
    last = network.head if head == "distribution" else network.head[-1]
    torch.nn.init.normal_(last.weight, std=0.2 if head == "distribution" else 0.02)
    p = torch.rand(network.config.bins.count) if prior else None
    return Checkpoint(network, p, {"size": 48})


@pytest.fixture(scope="module")
def colorizer():
    return Colorizer(checkpoint(), "cpu")


def picture(height=37, width=61, dtype=np.uint8):
    """A smooth grey picture with an edge and some grain."""
    y, x = np.mgrid[:height, :width]
    grey = 0.3 + 0.3 * y / height + 0.25 * (x > width // 2) + np.random.default_rng(0).normal(0, 0.01, (height, width))
    grey = grey.clip(0, 1)
    return grey.astype(dtype) if np.issubdtype(dtype, np.floating) else (grey * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize("head", ["distribution", "regression"])
@pytest.mark.parametrize("bins", ["joint", "separable"])
def test_heads(head, bins):
    rgb = Colorizer(checkpoint(head, bins), "cpu").colorize(picture())
    assert rgb.shape == (37, 61, 3) and rgb.dtype == np.uint8
    assert np.ptp(rgb.astype(int), axis=2).max() > 3  # there is colour


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, np.float16])
def test_lightness_stays(colorizer, dtype):
    grey = picture(dtype=dtype)
    rgb = colorizer.colorize(grey)
    assert rgb.dtype == dtype and rgb.shape == (*grey.shape, 3)
    scale = 1 if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
    before, after = (torch.from_numpy(np.ascontiguousarray(v / scale)).double() for v in (grey, rgb))
    L = reference.rgb_to_lab(before.expand(3, -1, -1))[0]
    moved = (reference.rgb_to_lab(after, channels_last=True)[..., 0] - L).abs().max()
    assert moved <= {np.uint8: 0.5, np.float16: 0.2}.get(dtype, 0.01)


def test_same_kind_back(colorizer):
    grey = picture()
    expected = colorizer.colorize(grey)
    assert np.array_equal(colorizer.colorize(grey[..., None]), expected)
    assert np.array_equal(colorizer.colorize(np.repeat(grey[..., None], 3, 2)), expected)
    tensor = torch.from_numpy(grey)
    assert torch.equal(colorizer.colorize(tensor).permute(1, 2, 0), torch.from_numpy(expected))
    assert colorizer.colorize(tensor[None]).shape == (3, 37, 61)
    batch = colorizer.colorize(torch.stack([tensor, tensor.flip(1)])[:, None])
    assert batch.shape == (2, 3, 37, 61) and batch.dtype == torch.uint8
    assert (batch[0].int() - torch.from_numpy(expected).permute(2, 0, 1).int()).abs().max() <= 1
    assert colorizer.colorize(torch.zeros(0, 1, 8, 8)).shape == (0, 3, 8, 8)
    assert colorizer.colorize(grey[::-1, ::2]).shape == (37, 31, 3)  # a view with other strides
    assert colorizer.colorize(grey.astype(">u2")).shape == (37, 61, 3)


def test_colour_input_is_made_grey_first(colorizer):
    color = np.random.default_rng(1).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    L = reference.rgb_to_lab(torch.from_numpy(color), channels_last=True, dtype=torch.float64)[..., 0]
    after = torch.from_numpy(colorizer.colorize(color))
    assert (reference.rgb_to_lab(after, channels_last=True, dtype=torch.float64)[..., 0] - L).abs().max() <= 0.5


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (300, 2), (2, 1000), (17, 16), (129, 255)])
def test_any_size_and_aspect(colorizer, size):
    assert colorizer.colorize(np.full(size, 128, np.uint8)).shape == (*size, 3)


def test_network_size_keeps_the_aspect(colorizer):
    assert colorizer.size == 48  # what the checkpoint was made for
    assert colorizer.network_size(480, 960) == (48, 96)
    assert colorizer.network_size(10, 20) == (48, 96)  # small pictures are enlarged
    assert colorizer.network_size(100, 100_000) == (1, 384)  # a strip is bounded, not stretched
    assert colorizer.with_options(size=64).network_size(100, 50) == (128, 64)


def test_batch_is_the_same_as_one_by_one(colorizer):
    images = [picture(96, 144), picture(48, 72), picture(96, 144, np.uint16), picture(192, 288, np.float32)]
    together = colorizer.colorize_batch(images)
    for image, rgb in zip(images, together, strict=True):
        alone = colorizer.colorize(image)
        assert rgb.dtype == alone.dtype == image.dtype
        scale = 1 if image.dtype == np.float32 else np.iinfo(image.dtype).max
        assert np.abs(rgb / scale - alone / scale).max() < 0.01
    with pytest.raises(ValueError, match="one network size"):
        colorizer.colorize_batch([picture(), picture(80, 20)])


def test_options_do_what_they_say(colorizer):
    def chroma(**options):
        rgb = torch.from_numpy(colorizer.with_options(**options).colorize(picture()))
        ab = reference.rgb_to_lab(rgb, channels_last=True, dtype=torch.float64)[..., 1:]
        return ab.norm(dim=-1).mean().item()

    assert chroma(saturation=0) < 1
    assert chroma(saturation=0.5) < chroma() < chroma(saturation=1.5)
    plain = colorizer.colorize(picture())
    for change in ({"temperature": 1.0}, {"vividness": 0.0}, {"mrf": False}, {"size": 96}):
        assert not np.array_equal(colorizer.with_options(**change).colorize(picture()), plain)


def test_vividness_prefers_rare_colours():
    """The weight of each label grows as its prior falls, and α scales it."""
    given = checkpoint()
    half, full = (Colorizer(given, "cpu", vividness=v) for v in (0.5, 1.0))
    assert torch.allclose(2 * half._unary, full._unary)
    expected = given.network.config.bins.rebalancing_weights(given.prior).log().float()
    assert torch.allclose(full._unary.flatten(), expected)
    with pytest.raises(CheckpointError, match="use vividness=0"):
        Colorizer(checkpoint(prior=False), "cpu")
    assert Colorizer(checkpoint(prior=False), "cpu", vividness=0).colorize(picture()).shape == (37, 61, 3)


def test_field_makes_flat_regions_agree(colorizer):
    grey = np.full((96, 96), 120, np.uint8)
    grey[:, 48:] = 180
    logits_noise = np.random.default_rng(0).normal(0, 6, (96, 96))
    noisy = (grey + logits_noise).clip(0, 255).astype(np.uint8)

    def roughness(mrf):
        ab, _ = colorizer.with_options(mrf=mrf).predict(reference_lightness(noisy))
        return (ab[..., 1:] - ab[..., :-1]).abs().mean().item()

    assert roughness(True) < roughness(False)


def reference_lightness(grey):
    return reference.rgb_to_lab(torch.from_numpy(grey).expand(1, 3, -1, -1))[:, :1]


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 4, 4), np.uint8), ValueError, r"\[H, W, 1\] or \[H, W, 3\], got \[4, 4, 4\]"),
        (np.zeros(4, np.uint8), ValueError, r"got \[4\]"),
        (np.zeros((0, 4), np.uint8), ValueError, "at least one pixel, got 0×4"),
        (np.full((4, 4), np.nan), ValueError, "image has nan in it"),
        (np.full((4, 4), 255.0), ValueError, r"must lie in \[0, 1\] where it is floating, got 255"),
        (np.zeros((4, 4), np.int64), TypeError, "must be uint8, uint16 or floating, got torch.int64"),
        (torch.zeros(2, 4, 4), ValueError, r"got \[2, 4, 4\]"),
        ([[1, 2]], TypeError, "must be a path, a numpy array or a tensor, got list"),
    ],
)
def test_bad_input(colorizer, image, error, message):
    with pytest.raises(error, match=message):
        colorizer.colorize(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 3}, "size must be between 16 and 4096"),
        ({"temperature": 0.0}, "temperature must be between"),
        ({"vividness": 1.5}, "vividness must be between 0 and 1, got 1.5"),
        ({"saturation": -1.0}, "saturation must be between"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Colorizer(checkpoint(), "cpu", **options)


def test_bundled_weights_colour_a_path(tmp_path):
    """from_pretrained works offline, from a path, and gives colour."""
    pyvips = pytest.importorskip("pyvips")
    pyvips.Image.new_from_array(picture(128, 160)).write_to_file(str(tmp_path / "grey.png"))
    rgb = fastcolor.Colorizer.from_pretrained("cpu").colorize(tmp_path / "grey.png")
    assert rgb.shape == (128, 160, 3) and np.ptp(rgb.astype(int), axis=2).max() > 3
    assert BUNDLED.stat().st_size < 25e6


@pytest.mark.parametrize("head", ["distribution", "regression"])
def test_predict_in_two_steps(head):
    colorizer = Colorizer(checkpoint(head), "cpu", saturation=1.5)
    L = 100 * torch.rand(2, 1, 24, 32)
    ab, guide = colorizer.predict(L)
    scores, same = colorizer.scores(L)
    assert torch.equal(guide, same) and torch.equal(ab, 1.5 * colorizer.colors(scores, guide))


def test_scores_take_another_unary():
    plain, vivid = (Colorizer(checkpoint(), "cpu", vividness=v) for v in (0.0, 0.5))
    L, unary = 100 * torch.rand(1, 1, 24, 32), torch.rand(1, 313, 1, 1)
    assert torch.equal(vivid.scores(L, unary)[0], plain.scores(L)[0] + unary)
    assert not torch.equal(vivid.scores(L)[0], plain.scores(L)[0])
