"""Counting instructions: what callgrind leaves is read, and a machine without it is told so."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import instructions
from fastcolor.ops import _backend


def test_totals_are_read(tmp_path):
    path = tmp_path / "callgrind.1"
    path.write_text("events: Ir\nsummary: 0\n\nfn=(1)\n1 5\n\ntotals: 554482\n")
    assert instructions.total(path) == 554482
    with pytest.raises(RuntimeError, match=r"no count in callgrind\.2"):
        instructions.total(tmp_path / "callgrind.2")


def test_differences_over_units(monkeypatch, tmp_path):
    """Twice the pixels and 24 instructions more for each of them: whatever a call costs besides falls out."""
    counted = instructions.operations(False)["rgb_to_lab, planes"]
    fewer, more = (counted.units(size) for size in counted.sizes)

    class Ran:
        returncode = 0

    def run(command, **_):
        out = next(c for c in command if c.startswith("--callgrind-out-file=")).partition("=")[2]
        for i, units in enumerate((fewer, more)):
            instructions.Path(f"{out}.{i + 1}").write_text(f"totals: {700_000 + 24 * units}\n")
        return Ran

    monkeypatch.setattr(instructions.subprocess, "run", run)
    assert instructions.count(["rgb_to_lab, planes"], "avx2", False) == {"rgb_to_lab, planes": 24}


def test_floors_are_positive_and_every_operation_runs():
    if _backend.missing("cpp"):
        pytest.skip("no C++ kernels")
    for name, counted in instructions.operations(True).items():
        assert counted.floor > 1, name
        assert counted.units(counted.sizes[1]) > counted.units(counted.sizes[0]), name
        counted.build(counted.sizes[0])()


def test_without_valgrind(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(SystemExit):
        instructions.main([])
    assert "valgrind is not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_under_callgrind():
    if reason := instructions.absent():
        pytest.skip(reason)
    (found,) = instructions.count(["lab_to_rgb, planes"], "avx2", False).values()
    assert 5 < found < 100
