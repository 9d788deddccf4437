from __future__ import annotations

import os
import stat

import pytest

from fastcolor._files import atomic_path


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
