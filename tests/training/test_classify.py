from __future__ import annotations

import math
import tarfile
from dataclasses import replace

import pytest
import pyvips
import torch
from conftest import landscape
from safetensors.torch import load_file, save_file

from fastcolor.model.backbone import load_backbone
from fastcolor.model.checkpoint import CheckpointError, load_checkpoint
from fastcolor.model.colorizer import Colorizer
from fastcolor.model.resnet import ResNet18Gray
from fastcolor.training.classify import accuracy
from fastcolor.training.config import TrainConfig
from fastcolor.training.data import DataError, Problems, find_photos, gather_photos
from fastcolor.training.loop import train
from fastcolor.training.report import Silent
from fastcolor.training.run import Run
from fastcolor.training.sources import class_of, pack
from fastcolor.training.state import TrainingError

TINY = TrainConfig(size=64, epochs=1, batch_size=4, lr=1e-3, workers=0, device="cpu", val_share=0.25)


class Lines(Silent):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def gathered(data, classes="folders", grey=False, val_share=0.25):
    return gather_photos(data, val_share, 0, classes, grey, Problems())


def test_accuracy_by_hand():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4]])
    found = accuracy(scores, torch.tensor([0, 4, 5]))
    assert found["val_top1"].tolist() == [1, 0, 0] and found["val_top5"].tolist() == [1, 1, 0]
    assert accuracy(scores[:, :2], torch.tensor([0, 1, 1]))["val_top5"].tolist() == [1, 1, 1]


def test_stages(scenes, tmp_path):
    """Classes first, then colours from that backbone with the scene loss beside, as two commands would."""
    first = train(scenes, replace(TINY, task="classify", epochs=3, out=str(tmp_path / "classes")))
    assert first.model.name == "backbone.safetensors" and first.finished
    assert first.history[-1]["loss"] < first.history[0]["loss"]
    assert 0 <= first.history[-1]["val_top1"] <= first.history[-1]["val_top5"] == 1
    backbone = load_backbone(first.model)
    assert backbone.classes == ("a/airfield", "coast") and backbone.notes["options"]["task"] == "classify"
    ResNet18Gray(2).load_state_dict(load_file(first.model), strict=False)  # torchvision's names

    lines = Lines()
    options = {"backbone": str(first.model), "out": str(tmp_path / "colours")}
    run = Run(scenes, replace(TINY, **options), Silent())
    assert run.network.config.classes == backbone.classes
    for name, value in run.network.backbone.state_dict().items():
        assert name.endswith("batches_tracked") or torch.equal(value, backbone.state[name]), name
    second = train(scenes, replace(TINY, **options), lines)
    text = "\n".join(lines.lines)
    assert f"backbone from {first.model}" in text and "2 classes by folder (a/airfield, coast): scene loss" in text
    assert math.isfinite(second.history[0]["val_top1"])
    assert load_checkpoint(second.model).network.config.classes == backbone.classes
    assert Colorizer(load_checkpoint(second.model)) is not None

    # a backbone goes on from a colour network too, and to one without classes
    third = Run(scenes, replace(TINY, classes="none", backbone=str(second.model), out=str(tmp_path / "c")), Silent())
    assert third.network.backbone.fc is None
    inner = load_checkpoint(second.model).network.backbone
    assert torch.equal(third.network.backbone.layer4[1].conv2.weight, inner.layer4[1].conv2.weight)
    with pytest.raises(TrainingError, match="classes was 'auto', is 'none'"):
        train(scenes, replace(TINY, classes="none", resume=True, out=options["out"]))


def test_the_scene_loss_is_a_part_of_the_loss(scenes, tmp_path):
    run = Run(scenes, replace(TINY, class_weight=0.5, out=str(tmp_path / "run")), Silent())
    batch = next(iter(run.loader))
    run.task.eval()
    whole, _, scores = run.task.loss(batch.rgb, None, batch.labels)
    colours, _, _ = run.task.loss(batch.rgb)
    expected = colours + 0.5 * torch.nn.functional.cross_entropy(scores, batch.labels)
    assert torch.allclose(whole, expected) and not torch.allclose(whole, colours)
    assert torch.allclose(run.task(batch.rgb, batch.seeds, batch.labels), whole, rtol=1e-5)


def test_labels_go_with_the_file_that_was_used(scenes, tmp_path):
    photos = gathered(scenes)
    assert photos.classes == ("a/airfield", "coast") and photos.train_labels == [0] * 6 + [1] * 6
    whole = photos.train[5].read_bytes()
    photos.train[5].write_bytes(whole[: len(whole) // 2])  # an airfield; the next file is a coast
    run = Run(scenes, replace(TINY, out=str(tmp_path / "run")), Silent())
    batch = run.loader.dataset.__getitems__([(None, 4), (None, 5), (0, 6)])
    assert batch.labels.tolist() == [0, 1, 1] and len(batch.failed) == 1
    assert len(set(batch.seeds.tolist())) == 3


def test_classes_are_used_when_nobody_could_mean_anything_else(scenes, photos):
    assert gathered(scenes, "auto").classes == ("a/airfield", "coast")
    assert gathered(scenes, "none").classes == () and gathered(scenes, "none").train_labels == []
    assert gathered(photos, "auto").classes == ()  # folders, but no train/ and val/
    assert gathered(photos, "folders").classes == ("a", "b/c")
    extra = scenes / "val" / "other"
    extra.mkdir()
    (scenes / "val" / "coast" / "6.png").rename(extra / "6.png")
    assert gathered(scenes, "auto").classes == ()
    with pytest.raises(DataError, match="classes in val/ that train/ has not: other"):
        gathered(scenes, "folders")
    (extra / "6.png").rename(scenes / "val" / "6.png")
    assert gathered(scenes, "auto").classes == ()
    with pytest.raises(DataError, match=r"val/6.png: lies in no folder of a class, expected CLASS/6.png"):
        gathered(scenes, "folders")


def test_classes_of_one_photo(tmp_path):
    """They cannot be held out as well; where nothing can, the error says so."""
    for name, count in (("a", 6), ("b", 6), ("rare", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pyvips.Image.new_from_array(landscape(i)).write_to_file(str(tmp_path / name / f"{i}.png"))
    for share in (0.1, 0.5, 0.9):
        found = gathered(tmp_path, val_share=share)
        assert found.classes == ("a", "b", "rare") and 2 in found.train_labels and 2 not in found.val_labels
    for name in ("a", "b"):
        for i in range(1, 6):
            (tmp_path / name / f"{i}.png").unlink()
    with pytest.raises(DataError, match="3 classes with 3 colour images: nothing is left to check with"):
        gathered(tmp_path)
    with pytest.raises(DataError, match="holds one class, 'x'; two are needed"):
        (tmp_path / "a").rename(tmp_path / "x")
        for name in ("b", "rare"):
            (tmp_path / name / "0.png").rename(tmp_path / "x" / f"{name}.png")
        gathered(tmp_path)


def test_grey_photos_have_classes_too(scenes):
    path = scenes / "train" / "coast" / "0.png"
    pyvips.Image.black(40, 40).write_to_file(str(path))
    assert path in gathered(scenes, grey=True).train and path not in gathered(scenes).train
    crops = Run(scenes, replace(TINY, task="classify", out="nowhere"), Silent()).loader.dataset
    crop, failed = crops[None, [str(path) == f for f in crops.files].index(True)]
    assert crop.shape == (64, 64, 3) and not failed


def test_classes_in_tars_and_packs(scenes, tmp_path):
    expected = gathered(scenes)
    pack({"train": expected.train, "val": expected.val}, scenes, tmp_path / "packed", 48)
    packed = gathered(tmp_path / "packed")
    assert (packed.classes, packed.train_labels) == (expected.classes, expected.train_labels)
    shards = tmp_path / "shards"
    for split, files, labels in (
        ("train", expected.train, expected.train_labels),
        ("val", expected.val, expected.val_labels),
    ):
        (shards / split).mkdir(parents=True)
        with tarfile.open(shards / split / "0.tar", "w") as tar:
            for i, (file, label) in enumerate(zip(files, labels, strict=True)):
                (tmp_path / "x.cls").write_text(str(label))
                tar.add(file, f"{i:04d}.png")
                tar.add(tmp_path / "x.cls", f"{i:04d}.cls")
    listed = gathered(shards)
    assert listed.classes == ("0", "1") and listed.train_labels == expected.train_labels
    # a pack of tar files: its names have two of these marks
    train_files, val_files = find_photos(shards)
    pack({"train": train_files, "val": val_files}, shards, tmp_path / "second", 48)
    second = gathered(tmp_path / "second")
    assert second.classes == ("0", "1") and second.train_labels == expected.train_labels
    assert class_of(scenes / "train" / "a.png", scenes / "train") == ""


def test_backbones_of_others(scenes, tmp_path):
    state = ResNet18Gray(7).state_dict()
    state["conv1.weight"] = state["conv1.weight"].repeat(1, 3, 1, 1) / 2
    torch.save({"state_dict": {f"module.{n}": v for n, v in state.items()}}, tmp_path / "places.pth.tar")
    save_file({n: v.contiguous() for n, v in state.items()}, tmp_path / "imagenet.safetensors")
    lines = Lines()
    for name in ("places.pth.tar", "imagenet.safetensors"):
        config = replace(TINY, backbone=str(tmp_path / name), out=str(tmp_path / "run"))
        run = Run(scenes, config, lines)
        assert torch.allclose(run.network.backbone.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
        assert "without its classifier" in lines.lines[-1]
    del state["layer1.0.conv1.weight"]
    torch.save(state, tmp_path / "half.pth")
    (tmp_path / "text.pth").write_text("weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": 1}, tmp_path / "other.pth")
    for name, message in (
        ("half.pth", r"half.pth: not a resnet18 state dict: missing \['layer1.0.conv1.weight'\]"),
        ("text.pth", "text.pth: not readable weights .torch.save did not write it"),
        ("list.pth", "list.pth: not readable weights"),
        ("other.pth", "other.pth: not the weights of a network"),
        ("none.pth", "none.pth: no such weights file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Run(scenes, replace(TINY, backbone=str(tmp_path / name), out=str(tmp_path / "run")), Silent())
