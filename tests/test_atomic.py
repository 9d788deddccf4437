from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys

import pytest

from fastcolor._files import FolderInUse, FolderLock, atomic_path


def test_writes_and_replaces(tmp_path):
    target = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with atomic_path(target) as temporary:
            assert temporary.suffix == ".txt" and temporary.parent == target.parent
            temporary.write_text(text)
        assert target.read_text() == text
    assert os.listdir(target.parent) == ["a.txt"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o400


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_pipe_is_not_replaced(tmp_path):
    """Nor a device: as root a file would take the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe: is no ordinary file"), atomic_path(tmp_path / "pipe"):
        pass
    assert os.listdir(tmp_path) == ["pipe"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


HOLDER = """
import os, sys, time
from fastcolor._files import FolderLock
lock = FolderLock(sys.argv[1])
print(repr(lock.hold()), os.getpid(), flush=True)
time.sleep(60)
"""


def test_one_process_holds_a_folder_until_it_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        why, number = process.stdout.readline().split()
        assert why == "''", "no locks on this file system: nothing is tested"
        mine = FolderLock(tmp_path)
        with pytest.raises(FolderInUse, match=rf"{tmp_path}: process {number} on .*, since 20.*, is at work there"):
            mine.hold()
    finally:
        process.kill()  # SIGKILL: nothing of it can clean up
        process.wait(30)
    assert (tmp_path / "run.lock").exists()
    with mine:
        assert mine.hold() == "" and mine.hold() == ""
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"):
            FolderLock(tmp_path).hold()
    assert not os.listdir(tmp_path)


def test_a_lock_file_that_was_just_removed_is_none(tmp_path, monkeypatch):
    """Opened before its holder removed it, locked after: another process could make a new one and lock that."""
    fcntl, first, second = pytest.importorskip("fcntl"), FolderLock(tmp_path), FolderLock(tmp_path)
    first.hold()
    flock = fcntl.flock

    def late(handle, how):
        first.release()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert second.hold() == ""
    with pytest.raises(FolderInUse):
        FolderLock(tmp_path).hold()
    second.release()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", none)
    assert FolderLock(tmp_path).hold() == "the file system has no locks (No locks available)"
