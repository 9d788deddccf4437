"""Finding image files in folders."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from fastcolor.imaging.vips import SUFFIXES


def find_images(folder: Path, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """Image files below a folder, by their suffix, in order; hidden files and folders are passed over.

    Links are followed, each folder once: a link to a folder above would give its images again and again.
    """
    found, seen = [], {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        fresh = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(place, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                fresh.append(name)
        folders[:] = fresh
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                found.append(Path(place, name))
    return found
