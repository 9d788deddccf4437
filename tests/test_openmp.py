from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastcolor._openmp import set_policy


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["python", "-m", "fastcolor", "video", "a.mp4"], "PASSIVE"),
        (["python", "-u", "-m", "fastcolor", "video", "a.mp4"], "PASSIVE"),
        (["python3", "/usr/bin/fastcolor", "video", "a.mp4"], "PASSIVE"),
        (["python", "-m", "fastcolor", "train", "video"], None),
        (["python", "-m", "pytest"], None),
        (["python"], None),
    ],
)
def test_threads_sleep_under_video_alone(command, expected):
    environment = {}
    set_policy(command, environment, {})
    assert environment.get("OMP_WAIT_POLICY") == expected


def test_what_is_chosen_or_too_late_stays():
    command = ["python", "-m", "fastcolor", "video"]
    environment = {"OMP_WAIT_POLICY": "ACTIVE"}
    set_policy(command, environment, {})
    assert environment == {"OMP_WAIT_POLICY": "ACTIVE"}
    environment = {}
    set_policy(command, environment, {"torch": None})
    assert environment == {}


def test_it_is_set_before_torch_is_loaded():
    code = (
        "import sys; sys.orig_argv = ['', '-m', 'fastcolor', 'video']; import fastcolor, os; "
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "PASSIVE\n", done.stderr
