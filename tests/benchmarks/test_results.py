"""Every committed results file keeps the rules, and a broken one is told what is wrong."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import results, spread
from benchmarks.timing import NOT_MEASURED

FILES = sorted(p for p in results.FOLDER.rglob("*.json") if results.NAME.fullmatch(p.name))
PLAIN = {"edges.json"}  # of colours, not of time: their own pages say what is in them
OTHERS = ("ablation", "quality-", "eval", "flicker", "instructions--")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(results.FOLDER)))
def test_committed_files(path):
    run = results.read(path)
    named = results.NAME.fullmatch(path.name)
    assert (run.suite, run.machine, run.device) == (named["suite"], named["machine"], named["device"])
    assert not run.data.get("quick"), "made with --quick: it shows that all runs, not how fast"
    assert run.rows or "pytest" in run.data


def test_every_file_is_of_a_suite_or_known():
    known = {p.name for p in FILES} | PLAIN
    unknown = [p.name for p in results.FOLDER.rglob("*.json") if p.name not in known and not p.name.startswith(OTHERS)]
    assert FILES and not unknown


def data(
    suite: str = "lab", ours: float = 10.0, peer: float = 30.0, iqr: float = 1.0, date: str = "2026-01-01 00:00 UTC"
) -> dict:
    def row(name: str, median: float, **more) -> dict:
        return {
            "title": "a table, 1×1", "candidate": name, "ours": name == "ours", "error": None, "median_us": median,
            "iqr_us": iqr, "samples": 5, **more,
        }  # fmt: skip

    return {
        "suite": suite, "device": "cpu", "machine": "some-cpu", "cpu": "Some CPU", "simd": "AVX2", "cores": 2,
        "threads": 2, "load": [0.1, 0.2, 0.3], "system": "Linux", "python": "3.11", "versions": {}, "commit": "abc",
        "date": "2026-01-01 00:00 UTC",
        "rows": [
            row("ours", ours, bytes=1000, GB_per_s=round(1000 / ours / 1e3, 3)),
            row("peer", peer),
            {"title": "a table, 1×1", "candidate": "gone", "ours": False, "median_us": NOT_MEASURED, "why": "missing"},
        ],
    }  # fmt: skip


def write(folder, made: dict):
    path = folder / f"{made['suite']}--{made['machine']}--{made['device']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made))
    return path


def test_a_sound_file_has_no_problems():
    assert results.problems(data()) == []


BREAKS = {
    "lacks 'commit'": lambda d: d.pop("commit"),
    "'threads' has the wrong type": lambda d: d.update(threads="2"),
    "'load' must be three numbers": lambda d: d.update(load=[1.0]),
    "'device' must be cpu or cuda": lambda d: d.update(device="tpu"),
    "lacks its name, 'gpu'": lambda d: d.update(device="cuda"),
    "row 0: lacks 'title'": lambda d: d["rows"][0].pop("title"),
    "row 0: 'median_us' must be a time": lambda d: d["rows"][0].update(median_us=-1.0),
    "row 1: 'iqr_us' must be a number": lambda d: d["rows"][1].update(iqr_us=None),
    "row 0: 'GB_per_s' is 7": lambda d: d["rows"][0].update(GB_per_s=7.0),
    "row 0: 'TFLOP_per_s' is 0.0008": lambda d: d["rows"][0].update(operations=1000, TFLOP_per_s=0.0008),
    "row 0: 'GB_per_s' and 'bytes' must be numbers": lambda d: d["rows"][0].pop("bytes"),
    "row 1: must be an object": lambda d: d["rows"].__setitem__(1, "row"),
    "row 2: not measured, and does not say why": lambda d: d["rows"][2].pop("why"),
    "row 2: not measured, yet has 'samples'": lambda d: d["rows"][2].update(samples=3),
}


@pytest.mark.parametrize("message", BREAKS)
def test_broken_files(message):
    broken = copy.deepcopy(data())
    BREAKS[message](broken)
    assert any(message in p for p in results.problems(broken))


def test_reading_names_the_file(tmp_path):
    path = tmp_path / "lab--some-cpu--cpu.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"lab--some-cpu--cpu.json: not a JSON file"):
        results.read(path)


def test_ratio_of_one_run_is_as_wide_as_its_quartiles():
    run = results.Run("lab", "m", "cpu", data(ours=10, peer=30, iqr=2))
    assert str(results.ratio([run], "a table", "ours", "peer")) == "2.6–3.4"  # 29 / 11, 31 / 9
    assert results.ratio([run], "a table", "ours", "gone") is None


@pytest.mark.parametrize("single", ["ours", "peer"])
def test_ratio_of_one_sample_says_so(single):
    """Quartiles of a single call are no spread."""
    one = data(ours=10, peer=30, iqr=2)
    next(r for r in one["rows"] if r["candidate"] == single).update(samples=1, iqr_us=0.0)
    assert results.ratio([results.Run("lab", "m", "cpu", one)], "a table", "ours", "peer").times == "3.0× (one sample)"
    three = results.Run("lab", "m", "cpu", data(ours=10, peer=30, iqr=2))
    assert results.ratio([three], "a table", "ours", "peer").times == "2.6–3.4×"


def test_ratio_of_reruns_is_as_wide_as_they_are():
    runs = [results.Run("lab", "m", "cpu", data(ours=o, peer=p)) for o, p in ((10, 31), (10, 34), (20, 64))]
    assert str(results.ratio(runs, "a table", "ours", "peer")) == "3.1–3.4"


DIGITS = {0.014: "0.014", 0.5: "0.50", 3.14: "3.1", 9.97: "10", 41.3: "41", 123.4: "123", 9876.0: "9,880"}


@pytest.mark.parametrize(("value", "text"), DIGITS.items())
def test_two_digits_are_claimed(value, text):
    assert results.significant(value) == text


def test_spread(tmp_path, capsys):
    first, second = write(tmp_path / "a", data(ours=10)), write(tmp_path / "b", data(ours=12, peer=33))
    assert spread.main([str(first), str(second)]) == 0
    said = capsys.readouterr().out
    assert "20%" in said and "2.8–3.0×" in said and "2 rows: between runs 15% in the median, 20% at most" in said


def test_spread_takes_runs_of_one_suite(tmp_path, capsys):
    files = [write(tmp_path / s, data(s)) for s in ("lab", "loss")]
    with pytest.raises(SystemExit):
        spread.main([str(f) for f in files])
    assert "is of loss on some-cpu, cpu, but" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        spread.main([str(files[0])])
