from __future__ import annotations

import numpy as np
import pytest

pyvips = pytest.importorskip("pyvips")


def landscape(seed, height=48, width=64):
    """Blue above, green below, with a border that moves and some grain: colour follows from lightness."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    sky = y < height * random.uniform(0.35, 0.65) + 4 * np.sin(x / 7 + seed)
    pixels = np.where(sky[..., None], (120, 160, 230), (60, 120, 40)) + random.normal(0, 6, (height, width, 1))
    return pixels.clip(0, 255).astype(np.uint8)


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
