from __future__ import annotations

import numpy as np
import pytest
import torch

pyvips = pytest.importorskip("pyvips")


def landscape(seed, height=48, width=64):
    """Blue above, green below, with a border that moves and some grain: colour follows from lightness."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    sky = y < height * random.uniform(0.35, 0.65) + 4 * np.sin(x / 7 + seed)
    pixels = np.where(sky[..., None], (120, 160, 230), (60, 120, 40)) + random.normal(0, 6, (height, width, 1))
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of threads may differ in the last bit; one thread's do not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def photos(tmp_path):
    """Twelve small landscapes in nested folders."""
    folder = tmp_path / "photos"
    for i in range(12):
        place = folder / ("a" if i % 2 else "b/c")
        place.mkdir(parents=True, exist_ok=True)
        suffix = (".png", ".jpg", ".webp")[i % 3]
        pyvips.Image.new_from_array(landscape(i)).write_to_file(str(place / f"{i:02d}{suffix}"))
    return folder


@pytest.fixture
def scenes(tmp_path):
    """train/ with six and val/ with two landscapes of each of two classes, one of them two folders deep."""
    folder = tmp_path / "scenes"
    for place, seeds in (("train", range(6)), ("val", range(6, 8))):
        for name, order in (("coast", 1), ("a/airfield", -1)):
            (folder / place / name).mkdir(parents=True)
            for i in seeds:
                image = pyvips.Image.new_from_array(landscape(i)[:, :, ::order].copy())
                image.write_to_file(str(folder / place / name / f"{i}.png"))
    return folder
