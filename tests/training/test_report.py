from __future__ import annotations

import signal
import time

import pytest

from fastcolor.training.report import Stop, stop_on_signals


def test_a_second_wish_stops_at_once_but_not_an_echo_of_the_first():
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # torchrun's, after the terminal's own
        assert stop.asked
        stop._when = time.monotonic() - 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_team_waits_for_its_members():
    stop = Stop(team=True)
    stop(signal.SIGTERM, None)
    stop._when = time.monotonic() - 5
    stop(signal.SIGTERM, None)
    assert stop.asked
