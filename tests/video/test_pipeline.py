from __future__ import annotations

import threading

import pytest

from fastcolor.video import pipeline
from fastcolor.video.pipeline import Channel, Pipeline, Stopped


def test_queue_never_holds_more_than_its_limit():
    line = Pipeline()
    channel = Channel(line, 3)
    line.start("write", lambda: [channel.put(i) for i in [*range(50), None]])
    assert list(channel.items()) == list(range(50))
    assert line.finish(threading.Event()) and 0 < channel.most <= 3


@pytest.mark.parametrize("failing", ["reader", "writer", "caller"])
def test_first_error_stops_all_and_is_raised_once(failing):
    line, stop = Pipeline(), threading.Event()
    first, second = Channel(line, 2), Channel(line, 2)

    def read():
        for i in range(10**9):
            if failing == "reader" and i == 20:
                raise OSError("the disk is gone")
            first.put(i)

    def write():
        for i in second.items():
            if failing == "writer" and i == 20:
                raise OSError("the disk is gone")

    line.start("read", read)
    line.start("write", write)
    try:
        for i in first.items():
            if failing == "caller" and i == 20:
                raise OSError("the disk is gone")
            second.put(i)
    except BaseException as error:
        line.fail(error)
    with pytest.raises(OSError, match="the disk is gone"):
        line.finish(stop)
    assert not line.busy("read") and not line.busy("write")
    with pytest.raises(Stopped):
        first.put(1)


def test_reader_that_hangs_is_left_behind_when_stopped(monkeypatch):
    monkeypatch.setattr(pipeline, "HANGS", 0.3)
    line, stop, never = Pipeline(), threading.Event(), threading.Event()
    channel = Channel(line, 2)

    def read():
        channel.put(1)
        never.wait(60)

    line.start("read", read)
    got = []
    for item in channel.items(stop):
        got.append(item)
        stop.set()
    assert got == [1]
    assert line.finish(stop) is False and line.busy("read")
    never.set()


def test_giving_up_waits_for_the_writer(monkeypatch):
    """What it writes to is closed next."""
    line, stop = Pipeline(), threading.Event()
    channel, began, written = Channel(line, 9), threading.Event(), []

    def write():
        for item in channel.items():
            began.set()
            threading.Event().wait(0.3)
            written.append(item)

    class Interrupted(threading.Thread):
        def join(self, timeout=None):
            if line.error is None:
                raise KeyboardInterrupt
            super().join(timeout)

    monkeypatch.setattr(pipeline.threading, "Thread", Interrupted)
    line.start("write", write)
    for i in range(9):
        channel.put(i)
    assert began.wait(10)
    with pytest.raises(KeyboardInterrupt):
        line.finish(stop)
    assert not line.busy("write") and len(written) < 9
