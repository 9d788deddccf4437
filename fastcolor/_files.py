"""Writing files so that a reader sees the old one or the whole new one, never a half; one writer to a folder."""

from __future__ import annotations

import errno
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# It can only be read by setting it, for all threads: once, before there are others.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


def is_special(path: Path) -> bool:
    """Whether something is there that is neither a file nor a folder: /dev/null, /dev/stdout, a pipe."""
    return path.exists() and not (path.is_file() or path.is_dir())


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name in the folder of `path`; renames it to `path` at the end, or removes it on any error.

    The suffix stays, since writers choose the format by it. The folder is made where it is missing.

    Raises:
        OSError: it cannot be written, or the path is that of a device or a pipe.
    """
    path = Path(path)
    if is_special(path):
        raise OSError(f"{path}: is no ordinary file, and is not replaced by one")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:80]}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_UMASK)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


class FolderInUse(RuntimeError):
    """Another process holds the folder. The message names both."""


class FolderLock:
    """Keeps a second process out of a folder, by a lock on a file in it that goes with the process, however that ends.

    A file of its own and open for writing: NFS locks neither folders nor files that are only read.

    Args:
        folder: may be missing until it is held.
        name: of the file, which says who holds the folder, and is removed with the lock.
    """

    def __init__(self, folder: str | Path, name: str = "run.lock"):
        self.path, self._held = Path(folder) / name, None

    def hold(self) -> str:
        """Takes the lock, or has it already. Empty, or why there is none: Windows and some file systems know none.

        Raises:
            FolderInUse: another one has it. OSError: the folder cannot be written to.
        """
        if self._held is not None:
            return ""
        try:
            import fcntl
        except ImportError:  # Windows
            return "this system has no locks of files"
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                try:
                    if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                        raise FolderInUse(f"{self.path.parent}: {self._holder(handle)} is at work there") from None
                finally:
                    os.close(handle)
                return f"the file system has no locks ({error.strerror})"
            with suppress(OSError):
                if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                    break
            os.close(handle)  # of a file that the one before has just removed
        self._held = handle
        since = time.strftime("%Y-%m-%d %H:%M:%S%z")
        text = json.dumps({"process": os.getpid(), "machine": platform.node(), "since": since})
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode() + b"\n", 0)
        return ""

    @staticmethod
    def _holder(handle: int) -> str:
        try:
            told = json.loads(os.pread(handle, 1000, 0))
            return f"process {told['process']} on {told['machine']}, since {told['since']},"
        except (OSError, ValueError, TypeError, KeyError):  # it has not said so yet
            return "another process"

    def release(self) -> None:
        if self._held is not None:
            with suppress(OSError):
                self.path.unlink()  # while it is held: nobody else can have it under this name
            os.close(self._held)
            self._held = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_) -> None:
        self.release()
