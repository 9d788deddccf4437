from __future__ import annotations

from dataclasses import replace

import torch

from fastcolor.training.color import ColorTask, split_lab
from fastcolor.training.config import TrainConfig
from fastcolor.training.data import Batch


def crops(count=6, size=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def test_film_changes_what_is_seen_and_nothing_else():
    rgb, seeds = crops(), torch.arange(6) * 12345
    task = ColorTask(TrainConfig(size=64, degrade=1.0), ())
    L, ab = split_lab(rgb, 4)
    seen, target = task.train()._seen(rgb, seeds)
    assert torch.equal(target, ab) and not torch.equal(seen, L) and seen.min() >= 0 and seen.max() <= 100
    assert torch.equal(task._seen(rgb, seeds)[0], seen)  # by the seeds alone
    assert not torch.equal(task._seen(rgb, seeds + 1)[0], seen)
    assert torch.equal(task.eval()._seen(rgb, seeds)[0], L)  # what is validated is whole
    plain = ColorTask(replace(task.config, degrade=0.0), ()).train()
    assert torch.equal(plain._seen(rgb, seeds)[0], L)


def test_what_is_measured():
    """Grey that is right counts as 100 dB; nothing else has a bound."""
    plain = torch.full((1, 64, 64, 3), 128, dtype=torch.uint8)
    vivid = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    vivid[:, :32, :, 0], vivid[:, 32:, :, 2] = 255, 255
    task = ColorTask(TrainConfig(), ()).eval()
    values, _ = task.measure(Batch(torch.cat((plain, vivid)), [], torch.zeros(2), torch.zeros(2)))
    assert values["val_psnr_grey"][0] == 100 and values["val_psnr_grey"][1] < 20
    assert values["val_colorfulness_truth"][0] == 0 and values["val_colorfulness_truth"][1] > 200


def test_without_fusion_the_deep_layers_are_left_alone():
    task = ColorTask(TrainConfig(fusion=False), ())
    task(crops(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)).backward()
    for name, parameter in task.named_parameters():
        deep = "layer3" in name or "layer4" in name
        assert parameter.requires_grad != deep and (parameter.grad is None) == deep, name
    # with scenes they are needed again
    assert all(p.requires_grad for p in ColorTask(TrainConfig(fusion=False), ("a", "b")).parameters())
