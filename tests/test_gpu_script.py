"""benchmarks/gpu.sh without a GPU: its dry run goes through every step but the build."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import suites

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"

LONG = ("training", "video")  # start processes and encoders of their own
SHORT = [name for name in suites.names() if name not in LONG]

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the benchmarks are not beside the tests")


def dry_run(folder: Path, python: str = sys.executable, *options: str) -> subprocess.CompletedProcess:
    command = ["bash", SCRIPT, "--dry-run", "--no-build", *options, folder]
    return subprocess.run(command, env={**os.environ, "PYTHON": python}, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_dry_run_of_the_long_suites(tmp_path):
    ran = dry_run(tmp_path / "results", sys.executable, "--seconds", "900", "--suites", " ".join(LONG))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert all(f"passed  benchmark {name}" in ran.stdout for name in LONG)


def test_dry_run(tmp_path):
    ran = dry_run(tmp_path / "results", sys.executable, "--suites", " ".join(SHORT))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "passed  pytest -m gpu" in ran.stdout and "passed  benchmark lab" in ran.stdout
    assert all(f"passed  benchmark {name}" in ran.stdout for name in SHORT)
    files = {path.name.partition("--")[0]: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert set(files) == {*SHORT, "tests"}
    assert files["tests"]["pytest"]["failures"] == 0
    rows = files["lab"]["rows"]
    assert {r["op"] for r in rows} == {"rgb_to_lab", "lab_to_rgb"}
    copies = [r for r in rows if r["candidate"] == "plain copy"]
    assert copies and all(r["median_us"] > 0 and r["GB_per_s"] > 0 for r in copies)
    # the figures that nobody measured say so, and why
    left_out = [r for r in rows if r["median_us"] == "not measured"]
    assert left_out and all(r["why"] for r in left_out)
    assert os.uname().nodename not in json.dumps(files) or len(os.uname().nodename) < 4


def test_goes_on_after_a_failure(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in "-m pytest "*) exit 1 ;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    ran = dry_run(tmp_path / "results", str(python), "--suites", "lab")
    assert ran.returncode == 1 and "benchmark loss" not in ran.stdout
    assert "FAILED  pytest -m gpu" in ran.stdout and "passed  benchmark lab" in ran.stdout
    assert len(list((tmp_path / "results").glob("lab--*--cpu.json"))) == 1


@pytest.mark.skipif(shutil.which("timeout") is None, reason="no timeout")
def test_what_hangs_is_stopped_and_the_next_step_runs(tmp_path):
    """The build (a sleep here) is stopped, then the tests, each by the time that is left of the whole or its own."""
    python, script = tmp_path / "python", tmp_path / "benchmarks" / "gpu.sh"
    hangs = '"-m pip "*cmake.define*|"-m pytest "*) sleep 60 & wait ;; "-m pip "*) exit ;; *) exit 1 ;;'
    python.write_text(f'#!/bin/sh\ncase "$*" in {hangs} esac\n')
    python.chmod(0o755)
    shutil.copytree(SCRIPT.parent, script.parent, ignore=shutil.ignore_patterns("results", "__pycache__"))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("# mark.gpu")
    (tmp_path / "pyproject.toml").write_text('version = "0"\n')
    script.write_text(script.read_text().replace("within 300", "within 1").replace("within 240", "within 2"))
    command = ["bash", script, "--dry-run", tmp_path / "results"]
    ran = subprocess.run(command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True, timeout=50)
    assert ran.returncode == 1
    lines = [re.sub(r"\d+ s", "N s", line) for line in ran.stdout.splitlines()]
    assert "STOPPED  build, FASTCOLOR_CUDA=OFF, N s: it ran out of its time" in lines, ran.stdout + ran.stderr
    assert "passed  install without C++ and CUDA kernels, N s" in lines
    assert "FAILED  backends are there, N s" in lines
    assert "STOPPED  pytest -m gpu, N s: it ran out of its time" in lines


@pytest.mark.skipif(shutil.which("timeout") is None, reason="no timeout")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_the_step_under_way(tmp_path, number, code):
    python, begun = tmp_path / "python", tmp_path / "begun"
    python.write_text(f'#!/bin/sh\necho $$ > "{begun}.new"; mv "{begun}.new" "{begun}"; exec sleep 60\n')
    python.chmod(0o755)
    process = subprocess.Popen(
        ["bash", SCRIPT, "--dry-run", tmp_path / "results"], env={**os.environ, "PYTHON": str(python)},
        stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=40)[0]  # the step holds it open
    assert process.returncode == code and output.startswith("== build") and output.count("==") == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)


def test_a_suite_whose_package_is_missing_is_left_out(tmp_path):
    python = tmp_path / "python"
    cases = '"-m pytest "*) exit ;; "-c import av") exit 1 ;;'
    python.write_text(f'#!/bin/sh\ncase "$*" in {cases} esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    ran = dry_run(tmp_path / "results", str(python), "--suites", "video")
    assert ran.returncode == 0 and "LEFT OUT  benchmark video: av is missing" in ran.stdout
    assert not list((tmp_path / "results").iterdir())


def test_nothing_begins_when_the_time_is_over(tmp_path):
    ran = dry_run(tmp_path / "results", sys.executable, "--seconds", "0")
    assert ran.returncode == 1 and "LEFT OUT  benchmark lab, after 0 s" in ran.stdout
    assert "passed" not in ran.stdout and not list((tmp_path / "results").iterdir())


def test_unknown_option_shows_the_usage(tmp_path):
    ran = subprocess.run(["bash", SCRIPT, "--dry"], capture_output=True, text=True)
    assert ran.returncode == 2 and "--dry-run" in ran.stderr and "set -u" not in ran.stderr
