"""The page says what the files say, and nothing else."""

from __future__ import annotations

import re

import pytest
from test_results import data, write

from benchmarks import plots, report, results
from fastcolor._version import __version__

COMMITTED = results.FOLDER / __version__


@pytest.fixture
def made(tmp_path) -> report.Results:
    """One suite, run three times: a file and two reruns."""
    lab = data(ours=10, peer=31)
    for row in lab["rows"]:
        row["title"] = "rgb_to_lab, 1920×1080, uint8 → float32; error"
    names = {"ours": "fastcolor cpp, interleaved", "peer": "OpenCV float32", "gone": "kornia"}
    for row in lab["rows"]:
        row["candidate"] = names[row["candidate"]]
    write(tmp_path, lab)
    for n, peer in enumerate((34, 32)):
        lab["rows"][1]["median_us"] = float(peer)
        write(tmp_path / "reruns" / str(n), lab)
    return report.Results.load(tmp_path)


def test_targets(made):
    lines = report.cpu_targets(made)
    assert "| rgb_to_lab, 1080p, over OpenCV float32 | 3.0× | 3.1–3.4× | reached | Some CPU |" in lines
    assert "| rgb_to_lab, 1080p, over kornia | 15× | not measured |  |  |" in lines
    assert len(lines) == 2 + len(report.CPU_TARGETS) + 1


@pytest.mark.parametrize(
    ("low", "high", "word"), [(3.1, 4, "reached"), (2, 4, "within the spread"), (1, 2, "not reached")]
)
def test_verdict(low, high, word):
    assert report.verdict(results.Span(low, high), 3.0) == word


def test_gpu_cells_without_a_file_say_so(made):
    lines = report.gpu_page(made)[2:]
    assert len(lines) == len(report.GPU_KERNELS)
    assert all(line.endswith("| not measured | not measured | not measured |") for line in lines)


def test_gpu_cells_with_a_file(made):
    cuda = data("lab", ours=34.1)
    cuda |= {"device": "cuda", "gpu": "Some GPU"}
    cuda["rows"][0] |= {"title": "rgb_to_lab, 3840×2160, uint8 → float32; error", "share_of_floor": 0.85}
    line = report.gpu_page(report.Results([results.Run("lab", "some-gpu", "cuda", cuda)], []))[2]
    assert line.endswith("| Some GPU | 34 µs, ours | 85% |")
    cuda["rows"][0] |= {"title": "network, 128 of 256×256; error", "images_per_s": 20_000.0}
    lines = report.gpu_page(report.Results([results.Run("network", "some-gpu", "cuda", cuda)], []))
    assert any(line.endswith("| Some GPU | 50 µs, ours | 85% |") for line in lines), "of one picture, not of 128"


def test_page(made):
    text = report.page(made, {})
    assert "| OpenCV float32 | 31 µs | 3% | " in text and "| 3.1–3.4× |" in text
    assert "| kornia | not measured: missing |" in text
    assert "lab, Some CPU, 3 runs, 2 rows: 5% in the median, 10% at most" in text
    assert all(f"## {suite}\n\nOn a CPU: not measured." in text for suite in report.SUITES if suite != "lab")


def test_instructions(made):
    assert report.instructions(made) == ["Not measured.", ""]
    row = {"op": "rgb_to_lab", "unit": "pixel", "instructions": 24.35, "floor": 8.5, "times_floor": 2.86}
    count = {"simd": "avx2", "commit": "abc", "date": "today", "counts": [row]}
    assert "| rgb_to_lab | pixel | 24.35 | 8.50 | 2.9 |" in report.instructions(report.Results([], [], [count]))


def test_losses_are_listed(made):
    made.runs[0].rows[1]["median_us"] = 9.0
    (line,) = report.losses(made)
    assert "OpenCV float32 takes 0.90–3.4 times our best" in line


def test_losses_of_the_slowest_of_ours_and_of_a_gpu_are_listed():
    lab = data(ours=10, peer=30, iqr=0) | {"device": "cuda", "gpu": "Some GPU"}
    lab["rows"].append({**lab["rows"][0], "candidate": "ours, another way", "median_us": 40.0})
    lab["rows"].append({**lab["rows"][0], "candidate": "ours, a third", "median_us": 20.0})
    lines = report.losses(report.Results([results.Run("lab", "some-gpu", "cuda", lab)], []))
    assert lines == ["- a table, 1×1 (Some GPU): peer takes 0.75 times ours, another way."]


def test_one_call_has_no_spread(made):
    made.runs[0].rows[1] |= {"samples": 1, "iqr_us": 0.0}
    assert "| OpenCV float32 | 31 µs | one call | " in report.page(made, {})


def test_readme_block_is_replaced(made):
    table = report.readme_table(made)
    assert "| RGB → Lab, 1920×1080 | **10 µs** | OpenCV 3.1–3.4× | Some CPU, 2 threads |" in table
    text = "before\n<!-- table: performance -->\nold\n<!-- end of table -->\nafter\n"
    changed = report.with_table(text, table)
    assert changed == f"before\n<!-- table: performance -->\n{table}<!-- end of table -->\nafter\n"
    assert report.with_table(changed, table) == changed
    assert report.with_table("no block\n", table) is None


def test_readme_agrees_with_the_files():
    if not report.README.exists() or not report.BLOCK.search(text := report.README.read_text()):
        pytest.skip("README has no table of these files")
    assert report.with_table(text, report.readme_table(report.Results.load(COMMITTED))) == text


def test_the_committed_page_agrees_with_the_files():
    text = report.PAGE.read_text()
    pictures = dict(re.findall(r"^!\[(.*)\]\((.*)\)$", text, re.MULTILINE))
    assert report.page(report.Results.load(COMMITTED), pictures) == text
    assert all((report.PAGE.parent / path).stat().st_size < 250_000 for path in pictures.values())


def test_plots(made, tmp_path):
    pytest.importorskip("matplotlib")
    scaling = data("scaling")
    scaling["rows"] = [
        {**scaling["rows"][0], "op": "lab", "axis": axis, "unit": axis, "law": law, "value": v, "median_us": 2.0 * v}
        for axis, law in (("size", "linear"), ("threads", "inverse"), ("sweeps", "affine"))
        for v in (1, 2, 4)
    ]
    stale = tmp_path / "images" / "perf-shares-cpu.png"
    stale.parent.mkdir()
    stale.touch()
    drawn = plots.draw([results.Run("scaling", "some-cpu", "cpu", scaling)], stale.parent)
    assert list(drawn.values()) == ["perf-scaling-cpu.png"] and not stale.exists()
    assert (stale.parent / "perf-scaling-cpu.png").read_bytes()[:4] == b"\x89PNG"


def test_laws():
    assert plots.expected("linear", [1, 2, 4], [9.0, 9.0, 8.0]) == [2, 4, 8]
    assert plots.expected("inverse", [1, 2, 4], [8.0, 5.0, 3.0]) == [8, 4, 2]
    assert plots.expected("affine", [1, 2, 5], [3.0, 9.0, 11.0]) == [3, 5, 11]
