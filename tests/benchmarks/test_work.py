"""What the definitions ask for, where it can be counted."""

from __future__ import annotations

import torch

from benchmarks import work
from fastcolor.reference import render as reference


def test_neighbours_with_a_share():
    nearest = reference.nearest_low(200, 0.27, 1, 0.5, torch.device("cpu"))
    tents = torch.stack([tent for _, tent in reference._three(nearest, 54, torch.float64)])
    assert (tents > 0).sum(0).max() ** 2 == work.NEIGHBORS


def test_chroma_planes_cost_by_their_samples():
    assert 3 < work.render_uv(400, 400) / work.render_uv(100, 400) < 4
