"""Standard output for PyAV, which is not waited for without end."""

from __future__ import annotations

import errno
import os
import select
import sys
import time
from collections.abc import Callable

GIVES_UP = 1.0  # seconds in which nothing was taken, once the run is over
_PIECE = getattr(select, "PIPE_BUF", 4096)  # bytes that can be written without waiting where there is room at all


class NobodyReads(OSError):
    """The run is over, and what it has written last was not read."""


class Pipe:
    """A file that PyAV writes to.

    FFmpeg's own write would wait in C for whoever should read, where neither signals nor other threads reach it.

    Args:
        number: of the open file.
        over: whether the run was stopped, or has failed.
    """

    name = "standard output"

    def __init__(self, number: int, over: Callable[[], bool]):
        self._number, self._over = number, over
        self.broken: OSError | None = None  # what every write says from then on

    def write(self, data: bytes) -> int:
        """All of it. Raises OSError, `NobodyReads` where the run is over and nothing is taken for `GIVES_UP`."""
        if self.broken is not None:
            raise self.broken
        try:
            rest = memoryview(data)
            while len(rest):
                self._wait()
                rest = rest[os.write(self._number, rest[:_PIECE]) :]
        except OSError as error:
            self.broken = error
            raise
        return len(data)

    def _wait(self) -> None:
        if sys.platform == "win32":  # where `select` knows sockets alone
            return
        late = None
        while not select.select([], [self._number], [], 0.2)[1]:
            if self._over():
                late = time.monotonic() if late is None else late
                if time.monotonic() - late > GIVES_UP:
                    raise NobodyReads(errno.ETIMEDOUT, "nobody reads it")
