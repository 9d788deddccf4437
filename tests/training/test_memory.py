from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastcolor.training import memory


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux alone tells what is available")
def test_memory_of_cached_files_is_free(monkeypatch):
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    found = {name.rstrip(":"): int(value) * 1024 for name, value, *_ in lines}
    monkeypatch.setattr(memory, "group_free", lambda: None)
    free = memory.free_bytes(torch.device("cpu"))
    assert free == pytest.approx(found["MemAvailable"], rel=0.1)
    assert free <= found["MemTotal"]


def group(folder, limit, usage, **stat):
    """The files of a control group: names and values of version 2, or of version 1 in a folder of that name."""
    first = "memory" in folder.parts
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(f"{limit}\n")
    (folder / ("memory.usage_in_bytes" if first else "memory.current")).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))


def process_in(root, text):
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(text)


def test_limits_of_version_2(tmp_path):
    assert memory.group_free(tmp_path) is None
    base = tmp_path / "sys/fs/cgroup"
    process_in(tmp_path, "0::/job/step\n")
    group(base / "job/step", "max", 500)
    assert memory.group_free(tmp_path) is None
    group(base / "job", 1000, 700, active_file=50, inactive_file=100, anon=550)  # a limit holds for all below
    assert memory.group_free(tmp_path) == 450
    group(base / "job/step", 600, 500, active_file=0, inactive_file=20, anon=480)
    assert memory.group_free(tmp_path) == 120
    process_in(tmp_path, "0::/\n")  # a container that sees no further
    group(base, 2000, 1500, anon=1500)
    assert memory.group_free(tmp_path) == 500


def test_limits_of_version_1(tmp_path):
    base = tmp_path / "sys/fs/cgroup/memory"
    process_in(tmp_path, "5:cpu,cpuacct:/other\n4:memory:/slurm/uid_1/job_2\n0::/\n")
    (tmp_path / "sys/fs/cgroup/unified").mkdir(parents=True)
    # as a container sees it: the path is the host's, the limit stands at the root of what it sees
    group(base, 1000, 900, active_file=1, total_active_file=30, total_inactive_file=40)
    assert memory.group_free(tmp_path) == 170
    group(base / "slurm/uid_1/job_2", 800, 790)
    assert memory.group_free(tmp_path) == 10
    group(base / "slurm", 100, 120)
    assert memory.group_free(tmp_path) == 0


def test_a_group_has_less_than_its_machine(monkeypatch):
    monkeypatch.setattr(memory, "group_free", lambda: 12345)
    assert memory.free_bytes(torch.device("cpu")) == 12345


def test_what_fits():
    need = memory.Need(fixed=100, image=10)
    assert need.of(3) == 130
    assert need.fits(200) == 8  # a tenth of what is free stays so
    assert need.fits(50) == 0
