from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastcolor.training import memory


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux alone tells what is available")
def test_memory_of_cached_files_is_free():
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    found = {name.rstrip(":"): int(value) * 1024 for name, value, *_ in lines}
    free = memory.free_bytes(torch.device("cpu"))
    assert free == pytest.approx(found["MemAvailable"], rel=0.1)
    assert free <= found["MemTotal"]


def test_what_fits():
    need = memory.Need(fixed=100, image=10)
    assert need.of(3) == 130
    assert need.fits(200) == 8  # a tenth of what is free stays so
    assert need.fits(50) == 0
