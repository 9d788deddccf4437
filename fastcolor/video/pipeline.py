"""Threads with bounded queues between them, which stop together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
HANGS = 2.0  # seconds without a frame after which a stopped film's reader is taken to hang


class Stopped(Exception):
    """Another thread of the pipeline failed, or the run was given up."""


class Pipeline:
    """What the threads of one run share: the first error, and who waits."""

    def __init__(self):
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def fail(self, error: BaseException) -> None:
        """Stops every thread that waits, or that comes to a queue. The first error is the one that is kept."""
        with self.changed:
            if self.error is None or isinstance(self.error, Stopped):
                self.error = error
            self.changed.notify_all()

    def start(self, name: str, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except Stopped:
                pass
            except BaseException as error:
                self.fail(error)

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def busy(self, name: str) -> bool:
        """Whether a thread of that name still runs."""
        return any(t.name == name and t.is_alive() for t in self._threads)

    def finish(self, stop: threading.Event) -> bool:
        """Waits for the threads; raises the first error of any, once.

        Returns:
            Whether all have ended. A reader that hangs (in a pipe, a camera) is left behind when the run was stopped,
            or failed.
        """
        late = None
        try:
            while any(thread.is_alive() for thread in self._threads):
                for thread in self._threads:
                    thread.join(0.05)  # in pieces: a signal is seen in between
                writers = any(t.is_alive() and t.name != "read" for t in self._threads)
                if not writers and (self.error is not None or stop.is_set()):
                    late = time.monotonic() if late is None else late
                    if time.monotonic() - late > HANGS:
                        break
        except BaseException as error:  # a second Ctrl-C: nothing may be closed under a thread that writes
            self.fail(error)
            for thread in self._threads:
                thread.join(HANGS)
            raise
        if self.error is not None:
            raise self.error
        return not any(thread.is_alive() for thread in self._threads)


class Channel(Generic[T]):
    """A queue of at most `limit` items, from one thread to another."""

    def __init__(self, pipeline: Pipeline, limit: int):
        self._pipeline, self.limit = pipeline, limit
        self._items: deque[T | None] = deque()
        self.most = 0  # items that were in it together
        self.waited_to_put = self.waited_to_get = 0.0  # seconds

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T | None) -> None:
        """Waits for room. None ends the stream. Raises Stopped when the pipeline has failed."""
        changed = self._pipeline.changed
        since = time.perf_counter()
        with changed:
            self._wait(lambda: len(self._items) < self.limit)
            self._items.append(item)
            self.most = max(self.most, len(self._items))
            self.waited_to_put += time.perf_counter() - since
            changed.notify_all()

    def items(self, stop: threading.Event | None = None) -> Iterator[T]:
        """The items up to the end of the stream. Raises Stopped when the pipeline has failed.

        Args:
            stop: once it is set, a stream from which nothing comes any more has ended too.
        """
        changed = self._pipeline.changed
        while True:
            since = time.perf_counter()
            with changed:
                self._wait(lambda: bool(self._items), stop)
                item = self._items.popleft() if self._items else None
                self.waited_to_get += time.perf_counter() - since
                changed.notify_all()
            if item is None:
                return
            yield item

    def _wait(self, ready: Callable[[], bool], stop: threading.Event | None = None) -> None:
        late = None
        while self._pipeline.error is None and not ready():
            self._pipeline.changed.wait(0.2)  # in pieces: a signal is seen in between
            if stop is not None and stop.is_set():
                late = time.monotonic() if late is None else late
                if time.monotonic() - late > HANGS:
                    return
        if self._pipeline.error is not None:
            raise Stopped
