from __future__ import annotations

import pytest
import torch

from fastcolor.bins import ColorBins
from fastcolor.model.network import ColorNetwork, NetworkConfig, count_parameters, pool_to

CONFIGS = {
    "joint": NetworkConfig(),
    "separable": NetworkConfig(bins=ColorBins("separable")),
    "regression": NetworkConfig(head="regression"),
    "no fusion": NetworkConfig(fusion=False),
    "classes": NetworkConfig(classes=("beach", "forest")),
    "skip": NetworkConfig(skip=True),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(32, 40), (33, 17), (1, 1), (1, 50)])
def test_any_size(name, size):
    network = ColorNetwork(CONFIGS[name]).eval()
    with torch.no_grad():
        output, scores = network.forward_with_classes(torch.rand(2, 1, *size) * 100)
    channels = {"joint": 313, "separable": 50, "regression": 2}.get(name, 313)
    assert output.shape == (2, channels, *(-(-s // network.stride) for s in size))
    assert output.isfinite().all()
    assert (scores is not None) == (name == "classes") and (scores is None or scores.shape == (2, 2))


def test_size_of_the_default():
    assert count_parameters(ColorNetwork()) == pytest.approx(11.5e6, rel=0.01)


def test_global_features_reach_every_position():
    """Changing one far corner changes the colours of the other, through the fusion only."""
    for fusion in (True, False):
        torch.manual_seed(0)
        network = ColorNetwork(NetworkConfig(fusion=fusion)).eval()
        x = torch.rand(1, 1, 256, 256) * 100
        y = x.clone()
        y[..., :32, :32] = 100 - y[..., :32, :32]
        with torch.no_grad():
            moved = (network(x) - network(y))[..., -4:, -4:].abs().max().item()
        assert (moved > 0) == fusion


def test_every_parameter_learns():
    network = ColorNetwork(NetworkConfig(classes=("a", "b"), skip=True))
    torch.nn.init.normal_(network.head.weight)
    output, scores = network.forward_with_classes(torch.rand(2, 1, 64, 64) * 100)
    (output.square().mean() + scores.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_skip_starts_as_the_network_without_it():
    plain, skipping = ColorNetwork().eval(), ColorNetwork(NetworkConfig(skip=True)).eval()
    missing, unexpected = skipping.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["skip.weight"] and not unexpected
    L = torch.rand(1, 1, 32, 32) * 100
    with torch.no_grad():
        assert torch.equal(skipping(L), plain(L))
        skipping.skip.weight.normal_()
        assert not torch.equal(skipping(L), plain(L))


def test_older_configurations_have_no_skip():
    state = NetworkConfig(skip=True).to_dict()
    assert NetworkConfig.from_dict(state).skip
    del state["skip"]
    assert not NetworkConfig.from_dict(state).skip


def test_pooling_to_the_grid_of_the_output():
    x = torch.arange(30.0).reshape(1, 1, 5, 6)
    pooled = pool_to(x, 4)
    assert pooled.shape == (1, 1, 2, 2)
    assert pooled[0, 0, 1, 1] == x[..., 4:, 4:].mean() and pooled[0, 0, 0, 0] == x[..., :4, :4].mean()


def test_errors():
    with pytest.raises(ValueError, match="head must be one of distribution, regression; got 'gan'"):
        NetworkConfig(head="gan")
    with pytest.raises(ValueError, match=r"L must have shape \[B, 1, H, W\], got \[1, 3, 8, 8\]"):
        ColorNetwork()(torch.rand(1, 3, 8, 8))
