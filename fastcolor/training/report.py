"""Where a run tells how it goes, and where it is told to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Reporter(Protocol):
    """Where a run tells how it goes; the command line shows it as bars and lines."""

    def stage(self, text: str, total: int) -> None: ...
    def advance(self, count: int = 1, **values: float) -> None: ...
    def say(self, text: str) -> None: ...


class Silent:
    """A reporter that shows nothing."""

    def stage(self, text: str, total: int) -> None: ...
    def advance(self, count: int = 1, **values: float) -> None: ...
    def say(self, text: str) -> None: ...


class Stop:
    """Whether SIGINT (Ctrl-C) or SIGTERM has come: the step under way is finished. A second one stops at once, unless
    it comes right after the first: torchrun passes a Ctrl-C on to processes that have had it already."""

    _SAME = 1.0  # seconds

    def __init__(self, team: bool = False):
        self.asked, self.team, self._when = False, team, 0.0

    def __call__(self, number: int, frame) -> None:
        if self.asked and not self.team and time.monotonic() - self._when > self._SAME:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._when = True, time.monotonic()


@contextmanager
def stop_on_signals(team: bool = False) -> Iterator[Stop]:
    """SIGINT and SIGTERM ask the `Stop` from here on; a `team` waits for its other processes, however often asked."""
    stop, before = Stop(team), {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread: signals are the caller's to handle
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
