from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from fastcolor.ops.lab import rgb_to_lab
from fastcolor.training import degrade as module
from fastcolor.training.degrade import Film, degrade, hashed, uniform

NOTHING = Film(**{f.name: 0.0 for f in fields(Film)})
EFFECTS = [f.name for f in fields(Film) if f.name != "share"]


def pictures(count=32, height=37, width=43):
    rgb = torch.randint(0, 256, (count, height // 6 + 1, width // 6 + 1, 3), generator=torch.Generator().manual_seed(0))
    rgb = rgb.repeat_interleave(6, 1).repeat_interleave(6, 2)[:, :height, :width].to(torch.uint8)
    return rgb, rgb_to_lab(rgb, channels_last=True).permute(0, 3, 1, 2)[:, :1].contiguous(), torch.arange(count) * 977


def test_hash_is_even_and_unrelated():
    draws = uniform(torch.arange(2000)[:, None], torch.arange(50))
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 3e-3 and abs(draws.var() - 1 / 12) < 1e-3
    assert torch.corrcoef(draws.T).fill_diagonal_(0).abs().max() < 0.1
    assert torch.corrcoef(draws[:50]).fill_diagonal_(0).abs().max() < 0.65  # of 50 numbers each
    assert hashed(torch.tensor([2**62 + 5]), torch.tensor([7])) != hashed(torch.tensor([5]), torch.tensor([7]))


def test_nothing_asked_for_changes_nothing():
    rgb, L, seeds = pictures()
    assert torch.equal(degrade(rgb, L, seeds, Film(share=0)), L)
    assert torch.equal(degrade(rgb, L, seeds, replace(NOTHING, share=1.0)), L)
    assert degrade(rgb[:0], L[:0], seeds[:0], Film()).shape == (0, 1, 37, 43)


def test_damage_depends_on_the_seed_alone():
    rgb, L, seeds = pictures()
    old = degrade(rgb, L, seeds, Film(share=0.5))
    assert old.shape == L.shape and old.min() >= 0 and old.max() <= 100 and old.isfinite().all()
    changed = (old != L).flatten(1).any(1)
    assert 5 <= changed.sum() <= 27
    assert torch.equal(changed, uniform(seeds[:, None], torch.arange(1))[:, 0] < 0.5)
    order = torch.randperm(32)
    assert torch.allclose(degrade(rgb[order], L[order], seeds[order], Film(share=0.5)), old[order], atol=1e-4)
    assert not torch.equal(degrade(rgb, L, seeds + 1, Film(share=0.5)), old)


@pytest.mark.parametrize("effect", EFFECTS)
def test_each_effect_is_on_half_of_the_images(effect):
    rgb, L, seeds = pictures(64)
    old = degrade(rgb, L, seeds, replace(NOTHING, share=1.0, **{effect: 1.0}))
    share = ((old - L).abs().flatten(1).amax(1) > 1e-3).float().mean()
    assert 0.2 < share < 0.8, f"{effect}: {share}"
    weak = degrade(rgb, L, seeds, replace(NOTHING, share=1.0, **{effect: 0.1}))
    assert (weak - L).abs().mean() < (old - L).abs().mean()


def test_orthochromatic_film_is_blind_to_red():
    rgb = torch.tensor([[200, 30, 30], [40, 40, 200], [128, 128, 128]], dtype=torch.uint8).view(1, 1, 3, 3)
    L = rgb_to_lab(rgb, channels_last=True)[..., 0]
    red, blue, grey = (module._orthochromatic(rgb, L, torch.ones(1)) - L).flatten().tolist()
    assert red < -15 and blue > 10 and abs(grey) < 0.1
    assert torch.equal(module._orthochromatic(rgb, L, torch.zeros(1)), L)


def test_jpeg_is_that_of_libvips():
    pyvips = pytest.importorskip("pyvips")
    y, x = np.mgrid[:40, :56]
    grey = (127 + 60 * np.sin(x / 3) + 50 * np.cos(y / 5 + x / 9)).round().astype(np.uint8)
    for quality in (90, 60, 30, 15):
        data = pyvips.Image.new_from_array(grey).copy(interpretation="b-w").jpegsave_buffer(Q=quality)
        expected = pyvips.Image.new_from_buffer(data, "").numpy().reshape(grey.shape).astype(float)
        loss = torch.tensor([100.0 - quality])
        ours = module._jpeg(torch.from_numpy(grey)[None].float() / 2.55, loss)[0] * 2.55
        off = np.abs(ours.clamp(0, 255).numpy() - expected)
        assert off.mean() <= 0.45  # coefficients between two integers may go either way


def test_blur_keeps_the_mean_of_a_line_and_spreads_it():
    L = torch.zeros(2, 21, 21)
    L[:, 10, 10] = 1
    blurred = module._blur(L, torch.tensor([0.0, 1.2]))
    assert torch.equal(blurred[0], L[0]) and abs(blurred[1].sum() - 1) < 1e-5
    x = torch.arange(21) - 10.0
    assert abs((blurred[1].sum(0) * x**2).sum().sqrt() - 1.2) < 0.02


def test_grain_has_the_deviation_that_was_asked_for():
    L = torch.full((2, 128, 128), 50.0)
    noise = module._grain(L, torch.tensor([4.0, 0.0]), torch.zeros(2), torch.tensor([1, 2])) - L
    assert abs(noise[0].std() - 4) < 0.1 and abs(noise[0].mean()) < 0.1 and noise[1].abs().max() == 0


def test_errors():
    with pytest.raises(ValueError, match="grain must be between 0 and 1, got 2"):
        Film(grain=2)
