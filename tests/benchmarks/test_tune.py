"""Settings of the Triton kernels are tried inside their context, and are as before after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
from fastcolor.kernels.triton import tiles

from benchmarks.tune import KERNELS, settings


def test_tiles_are_restored():
    module = ModuleType("kernels")
    module.BLOCK, module._HIDDEN = 8, 1
    with pytest.raises(KeyError), tiles(module, BLOCK=16):
        assert module.BLOCK == 16
        raise KeyError
    assert module.BLOCK == 8
    for name in ("MISSING", "_HIDDEN", "__name__"):
        with pytest.raises(ValueError, match=f"no constant '{name}'"), tiles(module, **{name: 1}):
            pass


@pytest.mark.parametrize("name", KERNELS)
def test_every_setting_is_one_of_the_kernels(name):
    kernels = pytest.importorskip(f"fastcolor.kernels.triton.{KERNELS[name].module}", exc_type=ImportError)
    now, *others = settings(KERNELS[name], kernels, False)
    assert all(getattr(kernels, n) == v for n, v in now.items()) and now not in others
    assert len(others) + 1 == len({tuple(s.values()) for s in (now, *others)})


def test_dry_run_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.tune", "--quick", "rgb_to_lab", "render_uv", "color_cross_entropy"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTCOLOR_BACKEND": "auto"}
    ran = subprocess.run([*command, "--json", tmp_path], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads(next(tmp_path.glob("tune--*--cpu.json")).read_text())["rows"]
    assert len(rows) == 6 and sum(r["note"] == "as it is set" for r in rows) == 3
    assert all(r["median_us"] > 0 for r in rows)


def test_without_a_gpu_it_says_what_is_missing():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.tune", "--device", "cpu"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2 and "TRITON_INTERPRET=1" in ran.stderr
