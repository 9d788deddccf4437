from __future__ import annotations

import pytest
import torch

from fastcolor.model.resnet import ResNet18Gray, pad_to_multiple


def torchvision_shapes(channels=3, classes=1000):
    """Names and shapes of torchvision's resnet18, written out from the layer table of He et al. 2015."""
    shapes = {"conv1.weight": (64, channels, 7, 7)}

    def norm(name, n):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (n,)
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("bn1", 64)
    widths = {1: (64, 64), 2: (64, 128), 3: (128, 256), 4: (256, 512)}
    for layer, (inputs, outputs) in widths.items():
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            first = inputs if block == 0 else outputs
            shapes[f"{name}.conv1.weight"] = (outputs, first, 3, 3)
            norm(f"{name}.bn1", outputs)
            shapes[f"{name}.conv2.weight"] = (outputs, outputs, 3, 3)
            norm(f"{name}.bn2", outputs)
            if block == 0 and layer > 1:
                shapes[f"{name}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                norm(f"{name}.downsample.1", outputs)
    shapes["fc.weight"], shapes["fc.bias"] = (classes, 512), (classes,)
    return shapes


def torchvision_state(**options):
    return {n: torch.randn(s) if s else torch.tensor(1) for n, s in torchvision_shapes(**options).items()}


def test_names_and_shapes_are_torchvisions():
    ours = {n: tuple(v.shape) for n, v in ResNet18Gray(1000).state_dict().items()}
    assert ours == torchvision_shapes(channels=1)
    assert len(torchvision_shapes()) == 122  # as torchvision's own file has


def test_loads_rgb_weights_summed():
    state = torchvision_state()
    network = ResNet18Gray()
    assert network.load_torchvision(state) == ["fc.weight", "fc.bias"]
    assert torch.equal(network.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(network.layer3[0].downsample[0].weight, state["layer3.0.downsample.0.weight"])
    grey = torch.rand(1, 1, 32, 32)
    expected = torch.nn.functional.conv2d(grey.expand(-1, 3, -1, -1), state["conv1.weight"], stride=2, padding=3)
    assert torch.allclose(network.conv1(grey), expected, atol=1e-3)


def test_loads_grey_weights_of_ddp_with_classes():
    state = {f"module.{n}": v for n, v in torchvision_state(channels=1, classes=7).items()}
    network = ResNet18Gray(7)
    assert network.load_torchvision(state) == []
    assert torch.equal(network.fc.weight, state["module.fc.weight"])
    assert ResNet18Gray(5).load_torchvision(state) == ["fc.weight", "fc.bias"]


def test_refuses_what_is_no_resnet18():
    state = torchvision_state()
    del state["layer1.0.conv1.weight"]
    with pytest.raises(ValueError, match="missing .'layer1.0.conv1.weight'"):
        ResNet18Gray().load_torchvision(state)
    with pytest.raises(ValueError, match="unknown .'head.weight'"):
        ResNet18Gray().load_torchvision({**torchvision_state(), "head.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"layer4.1.bn2.bias must have shape \[512\], got \[3\]"):
        ResNet18Gray().load_torchvision({**torchvision_state(), "layer4.1.bn2.bias": torch.ones(3)})


def test_levels():
    network = ResNet18Gray(10).eval()
    x = torch.rand(2, 1, 64, 96)
    mid = network.mid_level(x)
    assert mid.shape == (2, 128, 8, 12) and network.global_level(mid).shape == (2, 512)
    assert network(x).shape == (2, 10) and ResNet18Gray()(x).shape == (2, 512)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3), (8, 16), (23, 9)])
def test_padding(size):
    x = torch.rand(1, 2, *size)
    padded = pad_to_multiple(x, 8)
    assert padded.shape[2] % 8 == padded.shape[3] % 8 == 0
    assert torch.equal(padded[..., : size[0], : size[1]], x)
    assert padded.isfinite().all() and padded.max() <= x.max()
