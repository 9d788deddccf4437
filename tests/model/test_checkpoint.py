from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from fastcolor.bins import ColorBins
from fastcolor.model.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from fastcolor.model.field import FIELD
from fastcolor.model.network import ColorNetwork, NetworkConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    network = ColorNetwork(NetworkConfig(bins=ColorBins("separable"), classes=("sea", "été"))).eval()
    save_checkpoint(path, Checkpoint(network, torch.rand(50), {"size": 128}))
    return path, network


def test_round_trip(saved):
    path, network = saved
    loaded = load_checkpoint(path)
    assert loaded.network.config == network.config and loaded.notes == {"size": 128}
    assert loaded.prior.shape == (50,) and not loaded.network.training
    x = torch.rand(1, 1, 40, 40) * 100
    assert torch.equal(loaded.network(x), network(x))
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_field(saved, tmp_path):
    path, network = saved
    assert load_checkpoint(path).mrf == {}
    save_checkpoint(tmp_path / "w.safetensors", Checkpoint(network, mrf={**FIELD, "weight": 0.3}))
    assert load_checkpoint(tmp_path / "w.safetensors").mrf == {**FIELD, "weight": 0.3}
    for wrong, message in (
        ({"wieght": 1.0}, "no option 'wieght'"),
        ({"weight": "much"}, "weight must be like 0.1"),
        ({"weight": True}, "weight must be like 0.1, got True"),
        ({"sweeps": 2.5}, "sweeps must be like 5, got 2.5"),
        ({"weight": -1.0}, "weight must be >= 0"),
        ({"schedule": "x"}, "schedule must be one of"),
        ([1], "must be a table of options"),
    ):
        save_checkpoint(tmp_path / "w.safetensors", Checkpoint(network, mrf=wrong))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "w.safetensors")


def test_half_precision_is_half_the_size(saved, tmp_path):
    path, network = saved
    save_checkpoint(tmp_path / "half.safetensors", Checkpoint(network), torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.51 * path.stat().st_size
    x = torch.rand(1, 1, 40, 40) * 100
    with torch.no_grad():
        half, full = load_checkpoint(tmp_path / "half.safetensors").network(x), network(x)
    assert (half - full).abs().max() < 0.02 * full.abs().max() + 0.01


def broken(saved, tmp_path, kind):
    path, target = saved[0], tmp_path / "w.safetensors"
    data = path.read_bytes()
    if kind == "truncated":
        target.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        target.write_bytes(b"")
    elif kind == "text":
        target.write_text("not weights at all")
    elif kind == "foreign":
        save_file({"x": torch.ones(2)}, target)
    elif kind == "pickle":
        torch.save({"x": torch.ones(2)}, target)
    elif kind == "newer":
        save_file({"x": torch.ones(2)}, target, metadata={"fastcolor": json.dumps({"format": 99})})
    elif kind == "other shape":
        header = {"format": 1, "network": NetworkConfig().to_dict(), "notes": {}}
        save_file({"x": torch.ones(2)}, target, metadata={"fastcolor": json.dumps(header)})
    elif kind in ("no notes", "unknown head", "short prior"):
        network = NetworkConfig().to_dict() | ({"head": "gan"} if kind == "unknown head" else {})
        header = {"format": 1, "network": network, "notes": {}}
        if kind == "no notes":
            del header["notes"], header["network"]
        tensors = {n: v for n, v in ColorNetwork().state_dict().items() if not n.endswith("batches_tracked")}
        save_file({**tensors, "prior": torch.ones(7)}, target, metadata={"fastcolor": json.dumps(header)})
    elif kind == "folder":
        target.mkdir()
    return target


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "not a readable fastcolor checkpoint"),
        ("empty", "not a readable fastcolor checkpoint"),
        ("text", "not a readable fastcolor checkpoint"),
        ("pickle", "not a readable fastcolor checkpoint"),
        ("foreign", "not one of fastcolor"),
        ("newer", "format 99, this fastcolor reads up to 1"),
        ("other shape", "do not fit its configuration"),
        ("no notes", "not a readable fastcolor checkpoint"),
        ("unknown head", "head must be one of"),
        ("short prior", r"its prior has shape \[7\], not \[313\]"),
        ("folder", "no such weights file"),
        ("missing", "no such weights file"),
    ],
)
def test_errors_name_the_file(saved, tmp_path, kind, message):
    target = broken(saved, tmp_path, kind)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_checkpoint(target)
    assert str(target) in str(raised.value)
