"""What a row says follows from what was measured."""

from __future__ import annotations

import json

import pytest

from benchmarks import results, timing, work
from benchmarks.timing import Candidate, Timing


def rows() -> list[dict]:
    times = {"plain copy": 10.0, "ours, a": 40.0, "ours, b": 20.0, "peer": 50.0, "slow peer": 90.0}
    candidates = [Candidate(n, lambda i: None, ours=n.startswith("ours")) for n in times]
    candidates.append(Candidate("gone", None, "not installed"))
    made = {n: Timing(t * 1e-6, 1e-6, 5) for n, t in times.items()}
    return timing.compare([timing.row(c, made.get(c.name), 1000, 8000, title="t") for c in candidates])


def by_name(found: list[dict]) -> dict[str, dict]:
    return {r["candidate"]: r for r in found}


def test_compare():
    found = by_name(rows())
    assert found["ours, a"]["share_of_copy"] == 0.25
    assert (found["ours, a"]["best_peer"], found["ours, a"]["best_peer_takes"]) == ("peer", 1.25)
    assert found["slow peer"]["ours_is_faster_by"] == 4.5 and "best_peer" not in found["slow peer"]
    gone = {"title": "t", "candidate": "gone", "ours": False, "error": None}
    assert found["gone"] == {**gone, "median_us": "not measured", "why": "not installed"}


def test_floors():
    limits = {"copy_GB_per_s": 1.0, "float32_TFLOP_per_s": 0.001, "bfloat16_TFLOP_per_s": 0.002}
    found = by_name(work.floors(rows(), limits))
    # 8000 operations at a GFLOP/s are 8 µs; the table's copy of 1000 bytes took 10, though the run's would take 1
    assert found["ours, a"]["floor_us"] == 10.0 and found["ours, a"]["bound"] == "memory"
    assert found["ours, a"]["share_of_floor"] == 0.25
    assert "share_of_floor" not in found["plain copy"] and "share_of_floor" not in found["gone"]
    alone = [{**found["ours, b"], "arithmetic": "bfloat16", "operations": 80_000}]
    (row,) = work.floors(alone, limits)
    assert row["bound"] == "arithmetic" and row["floor_us"] == 40.0 and row["share_of_floor"] == 2.0


class Clock:
    """Time that passes only where a test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_a_slow_candidate_gets_fewer_samples(monkeypatch):
    clock, order = Clock(), []
    monkeypatch.setattr(timing, "time", clock)

    def taking(name: str, seconds: float):
        def run(i: int) -> None:
            clock.now += seconds
            order.append(name)

        return Candidate(name, run)

    candidates = [taking("fast", 0.01), taking("slow", 0.02), taking("slower", 1.0), taking("short", 0.001)]
    times = timing.measure(candidates, "cpu", rounds=8, budget=0.1)
    assert {n: t.samples for n, t in times.items()} == {"fast": 8, "slow": 5, "slower": 3, "short": 8}
    assert times["slow"].median == pytest.approx(0.02) and times["short"].median == pytest.approx(0.001)
    assert "slower" in order[-8:]  # its samples are spread: the last round has one
    assert order.count("short") == 2 + 8 * 5  # short calls are timed in groups of 5 ms


def test_limits_are_positive_and_files_pass_the_check(tmp_path):
    limits = work.limits("cpu", seconds=0.0, copied=1 << 12, side=16)
    assert set(limits) == {"copy_GB_per_s", "float32_TFLOP_per_s", "bfloat16_TFLOP_per_s"} and min(limits.values()) >= 0
    options = timing.parse(
        timing.parser("lab", "Doc.", "", ""), ["--json", str(tmp_path), "--quick", "--commit", "abc"]
    )
    assert timing.finish("lab", options, timing.machine("cpu", "abc"), rows()) == 0
    (path,) = tmp_path.iterdir()
    assert results.NAME.fullmatch(path.name) and results.read(path).suite == "lab"
    assert json.loads(path.read_text())["quick"] is True


def test_exit_code_of_a_wrong_result(capsys):
    options = timing.parse(timing.parser("lab", "Doc.", "", ""), [])
    wrong = timing.row(Candidate("ours", None, "off by 3, more than 1", ours=True), None, 0, title="t")
    assert timing.finish("lab", options, {}, [wrong]) == 1


@pytest.mark.parametrize("size", ["64", "64x", "axb"])
def test_size_must_be_two_numbers(size, capsys):
    with pytest.raises(SystemExit):
        timing.parse(timing.parser("lab", "Doc.", "", ""), ["--size", size])
    assert f"480x270, got {size}" in capsys.readouterr().err
