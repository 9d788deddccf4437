"""Where a run stands, as files: what resuming needs, and how the run came about."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastcolor._files import atomic_path
from fastcolor._version import __version__
from fastcolor.model.checkpoint import why_not_loaded

STATE, HISTORY, CONFIG, RECORD, LEFT_OUT = "state.pt", "history.jsonl", "config.json", "run.json", "left_out.txt"
_NAMES = {"config", "data", "network", "optimizer", "prior", "progress", "random"}  # younger ones may be missing


class TrainingError(RuntimeError):
    """A run that cannot start or go on. The message says what to try."""


@dataclass
class Progress:
    """Where a run stands: what the state file holds beside weights and optimizer."""

    epoch: int = 0  # finished epochs
    step: int = 0  # steps done in the epoch under way
    loss_sum: float = 0.0  # over the images of the epoch under way
    images: int = 0
    history: list[dict] = field(default_factory=list)  # one entry for each finished epoch


def write_state(path: Path, state: dict) -> None:
    """Writes the file whole or not at all."""
    try:
        with atomic_path(path) as temporary:
            torch.save(state, temporary)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from error


def read_state(path: Path) -> dict:
    """The state of a run, on the CPU.

    Raises:
        TrainingError: missing, broken, or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= _NAMES:
            raise ValueError("it holds something else")
    except Exception as error:  # torch.load raises many kinds on a broken file
        raise TrainingError(f"{path}: not a readable state of a run ({why_not_loaded(error)})") from error
    return state


def remove_halves(out: Path) -> None:
    """Removes what a kill in the middle of a write has left."""
    for name in (STATE, "model.safetensors", "backbone.safetensors"):
        stem, _, suffix = name.partition(".")
        for path in out.glob(f".{stem}-*.{suffix}"):
            with suppress(OSError):
                path.unlink()


def write_json(path: Path, thing: object) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(thing, indent=2) + "\n")


def record_start(out: Path, facts: dict) -> None:
    """Adds a start (the first, or one with --resume) to the list in run.json: when, with what, on what."""
    path, starts = out / RECORD, []
    with suppress(OSError, ValueError):
        starts = json.loads(path.read_text())
    write_json(path, [*(starts if isinstance(starts, list) else []), {**surroundings(), **facts}])


def surroundings() -> dict:
    """Versions and machine of this process, and the commit of fastcolor where it runs from a repository."""
    facts = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "fastcolor": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _commit() -> str | None:
    """The commit that this package is checked out at, with "+" where its files were changed; None outside of git."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie in some other repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", str(here.parents[1])) else "")
    except (OSError, subprocess.SubprocessError):
        return None
