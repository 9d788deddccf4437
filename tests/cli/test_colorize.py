"""`fastcolor colorize` from the outside, with a network that paints everything green; one test has a real one."""

from __future__ import annotations

import importlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

pyvips = pytest.importorskip("pyvips")

from fastcolor.imaging.files import Picture, read_picture, write_picture  # noqa: E402

command = importlib.import_module("fastcolor.cli.colorize")  # the package has the function under this name

app = typer.Typer()
app.command()(command.colorize)


class Green:
    """Stands in for the Colorizer: luminance goes to green. Notes the sizes of its batches."""

    def __init__(self):
        self.batches: list[list[tuple[int, int]]] = []
        self.options: dict = {}

    def network_size(self, height, width):
        return (16, round(16 * width / height))

    def colorize_batch(self, images):
        assert len({self.network_size(*i.shape[:2]) for i in images}) == 1
        self.batches.append([i.shape[:2] for i in images])
        colored = [np.zeros((*i.shape[:2], 3), i.dtype) for i in images]
        for new, old in zip(colored, images, strict=True):
            new[..., 1] = old[..., 0]
        return colored


@pytest.fixture
def green(monkeypatch):
    stub = Green()

    def load(weights, device, options):
        stub.options = {"weights": weights, "device": device, **options}
        return stub

    monkeypatch.setattr(command, "_load", load)
    return stub


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def photo(path, height=16, width=24, level=120, channels=1, dtype=np.uint8):
    path = Path(path)
    pixels = np.full((height, width, channels), level, dtype)
    write_picture(path, Picture(path, [pixels], [None]), [pixels])
    return path


def is_green(path):
    page = read_picture(path).pages[0].astype(int)
    return page.shape[2] == 3 and page[..., 1].min() > 100 and page[..., ::2].max() < 30


def tree(folder="."):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


# --- names ------------------------------------------------------------------------------------------------------------


def test_one_file(green):
    photo("a.jpg")
    result = run("a.jpg")
    assert is_green("a-color.jpg") and tree() == ["a-color.jpg", "a.jpg"]
    assert result.stdout.startswith("colorized 1, skipped 0, failed 0 in ") and "images/s" in result.stdout
    run("a.jpg", "-o", "made/new.png")
    assert is_green("made/new.png")
    run("a.jpg", "-o", "folder")
    assert is_green("folder/a.jpg")


def test_a_folder_is_mirrored(green):
    for name in ("in/a.png", "in/deep/er/b.TIF", "in/deep/c.webp", "in/.hidden/d.png", "in/.e.png"):
        photo(name)
    Path("in/notes.txt").write_text("not an image")
    run("in")
    assert tree("in-color") == ["a.png", "deep/c.webp", "deep/er/b.TIF"]
    run("in", "-o", "in/results")
    # an output folder inside the input is no input
    assert "colorized 0, skipped 3" in run("in", "-o", "in/results").stdout
    assert tree("in/results") == tree("in-color") and all(is_green(p) for p in Path("in/results").rglob("*.*"))


def test_globs_are_expanded_here_too(green):
    for name in ("in/a.png", "in/b.png", "in/b.jpg", "in/x/c.png", "in/[odd].png"):
        photo(name)
    run("in/*.png", "-o", "flat")
    assert tree("flat") == ["[odd].png", "a.png", "b.png"]
    run("in/**/*.png", "-o", "all")
    assert tree("all") == ["[odd].png", "a.png", "b.png", "c.png"]
    run("in/[odd].png", "-o", "odd")  # a file of that name goes before the pattern
    assert tree("odd") == ["[odd].png"]
    assert "*.webp: no images match it" in run("in/*.webp", code=1).stderr


def test_what_is_there_is_skipped_unless_overwritten(green):
    for name in "abc":
        photo(f"in/{name}.png")
    Path("in-color").mkdir()
    Path("in-color/b.png").write_bytes(b"older")
    assert "colorized 2, skipped 1, failed 0" in run("in").stdout
    assert Path("in-color/b.png").read_bytes() == b"older"
    assert "colorized 0, skipped 3, failed 0" in run("in").stdout
    assert "colorized 3, skipped 0, failed 0" in run("in", "--overwrite").stdout
    assert is_green("in-color/b.png")


def test_outputs_beside_their_inputs_are_no_inputs_the_second_time(green):
    photo("a.png"), photo("b.png")
    run("*.png")
    assert "colorized 0, skipped 2, failed 0" in run("*.png").stdout
    assert tree() == ["a-color.png", "a.png", "b-color.png", "b.png"]


def test_inputs_are_never_overwritten(green):
    photo("in/a.png"), photo("in/b.png")
    before = Path("in/a.png").read_bytes()
    for args in (
        ("in/a.png", "-o", "in/a.png"),
        ("in", "-o", "in"),
        ("in/a.png", "-o", "in"),
        ("in/*.png", "-o", "./in/"),
    ):
        for more in ((), ("--overwrite",)):
            assert "error: " in run(*args, *more, code=1).stderr
    Path("link").symlink_to("in")
    run("in/a.png", "-o", "link", "--overwrite", code=1)
    assert Path("in/a.png").read_bytes() == before and tree() == ["in/a.png", "in/b.png"]


def test_two_inputs_of_one_name(green):
    photo("x/a.png", level=120), photo("y/a.png", level=200)
    result = run("x/a.png", "y/a.png", "-o", "out", code=1)
    assert "error: y/a.png: its output out/a.png is that of x/a.png too" in result.stderr
    assert read_picture("out/a.png").pages[0].max() == 120
    # the same file twice is one file
    assert "colorized 0, skipped 1, failed 0" in run("x/a.png", "./x/a.png", "-o", "out").stdout


# --- bad input --------------------------------------------------------------------------------------------------------


def test_one_bad_file_among_good_ones(green):
    for name in "abcd":
        photo(f"in/{name}.jpg", 64, 64)
    Path("in/empty.jpg").touch()
    Path("in/text.png").write_text("dear diary")
    whole = Path("in/a.jpg").read_bytes()
    Path("in/cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    result = run("in", "missing.jpg", "film.mp4", "-o", "out", code=1)
    assert tree("out") == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert "colorized 4, skipped 0, failed 5" in result.stdout
    lines = sorted(result.stderr.splitlines())
    for line, (name, why) in zip(
        lines,
        [
            ("film.mp4", "no such file"),
            ("in/cut.jpg", "premature end"),
            ("in/empty.jpg", "is empty"),
            ("in/text.png", "not a readable image"),
            ("missing.jpg", "no such file"),
        ],
        strict=True,
    ):
        assert line.startswith(f"error: {name}: ") and why in line


@pytest.mark.parametrize(
    ("make", "args", "why"),
    [
        (lambda: Path("film.mp4").write_bytes(b"1"), ["film.mp4"], "is a video; `fastcolor colorize` is for images"),
        (lambda: Path("a.gif").write_bytes(b"1"), ["a.gif"], ".gif is not supported (.jpe, .jpeg, .jpg"),
        (lambda: Path("in").mkdir(), ["in"], "error: in: no images in it (.jpe, .jpeg, .jpg"),
        (lambda: None, ["in"], "error: in: no such file or folder"),
    ],
    ids=["video", "gif", "empty folder", "missing"],
)
def test_inputs_that_are_none(green, make, args, why):
    make()
    result = run(*args, code=1)
    assert why in result.stderr and "colorized 0, skipped 0, failed 1" in result.stdout


def test_unwritable_output(green):
    photo("in/a.png"), photo("in/x/b.png")
    Path("file").touch()
    result = run("in", "-o", "file/out", code=1)
    assert result.stderr.splitlines() == ["error: file/out: cannot be written to (Not a directory)"]
    assert "colorized 0, skipped 0, failed 2" in result.stdout and green.batches == []
    assert "is a file, expected a folder" in run("in", "-o", "file", code=2).stderr
    assert ".gif cannot be written" in run("in/a.png", "-o", "a.gif", code=2).stderr


def test_a_full_disk(green):
    for i in range(3):
        noise = np.random.default_rng(i).integers(100, 255, (100, 100, 1), dtype=np.uint8)
        write_picture(f"in/{i}.png", Picture(Path("a"), [noise], [None]), [noise])
    photo("in/small.png")
    Path("in-color").mkdir()
    Path("in-color/0.png").write_bytes(b"older")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        result = run("in", "--overwrite", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert result.stderr.count("cannot be written (File too large)") == 3
    assert "colorized 1, skipped 0, failed 3" in result.stdout
    assert tree("in-color") == ["0.png", "small.png"] and Path("in-color/0.png").read_bytes() == b"older"


@pytest.mark.parametrize(
    "args",
    [
        ["--temperature", "0"],
        ["--temperature", "nan"],
        ["--vividness", "1.1"],
        ["--saturation", "-1"],
        ["--size", "3"],
        ["--jobs", "0"],
        ["--batch-size", "0"],
    ],
    ids=" ".join,
)
def test_options_out_of_range(green, args):
    photo("a.png")
    result = run("a.png", *args, code=2)
    assert args[0] in result.stderr and tree() == ["a.png"]


def test_weights_and_device_that_are_not_there():
    photo("a.png")
    Path("text.safetensors").write_text("nothing")
    assert "none.safetensors: no such weights file" in run("a.png", "--weights", "none.safetensors", code=2).stderr
    assert "text.safetensors: not a readable" in run("a.png", "--weights", "text.safetensors", code=2).stderr
    assert tree() == ["a.png", "text.safetensors"]


def test_options_reach_the_colorizer(green):
    photo("a.png")
    run(
        "a.png", "--size", 64, "--vividness", 0.25, "--no-mrf", "--saturation", 1.5, "--weights", "w", "--device", "cpu"
    )
    expected = {"size": 64, "vividness": 0.25, "mrf": False, "saturation": 1.5, "temperature": 0.38}
    assert green.options == {"weights": Path("w"), "device": "cpu", **expected}
    run("a.png", "--overwrite")
    assert not {"size", "vividness"} & green.options.keys()  # left to the checkpoint


def test_quiet_says_errors_only(green):
    photo("a.png")
    result = run("a.png", "missing.png", "--quiet", code=1)
    assert result.stdout == "" and result.stderr == "error: missing.png: no such file or folder\n"


# --- the pipeline -----------------------------------------------------------------------------------------------------


def test_like_sizes_share_batches(green):
    for i in range(10):
        photo(f"in/wide{i}.png", 16, 24)
        photo(f"in/tall{i}.png", 24 * (1 + i % 2), 16 * (1 + i % 2))  # two sizes, one network size
    run("in", "--batch-size", 4, "--jobs", 2)
    assert sorted(map(len, green.batches)) == [2, 2, 4, 4, 4, 4]
    assert any(len(set(batch)) == 2 for batch in green.batches)
    assert len(tree("in-color")) == 20


def test_pages_are_colored_each_and_kept(green):
    pages = [np.full((16, 24, 1), level, np.uint16) for level in (30000, 40000, 50000)]
    alpha = [np.full((16, 24), 9, np.uint16)] * 3
    write_picture("a.tif", Picture(Path("a"), pages, alpha), pages)
    run("a.tif", "--batch-size", 2)
    again = read_picture("a-color.tif")
    assert [p[..., 1].max() for p in again.pages] == [30000, 40000, 50000] and again.alpha[2].max() == 9
    assert [len(b) for b in green.batches] == [2, 1]


def test_a_bad_picture_in_a_batch_fails_alone(green, monkeypatch):
    for i in range(6):
        photo(f"in/{i}.png", level=120 + i)
    whole = green.colorize_batch

    def sometimes(images):
        if any(i[0, 0, 0] == 123 for i in images):
            raise RuntimeError("nan in the middle\nof it")
        return whole(images)

    monkeypatch.setattr(green, "colorize_batch", sometimes)
    result = run("in", "--jobs", 1, code=1)
    assert result.stderr == "error: in/3.png: nan in the middle\n"
    assert tree("in-color") == ["0.png", "1.png", "2.png", "4.png", "5.png"]


def test_batches_shrink_when_they_do_not_fit(green, monkeypatch):
    for i in range(12):
        photo(f"in/{i:02}.png")
    whole, tried = green.colorize_batch, []

    def small_ones(images):
        tried.append(len(images))
        if len(images) > 4:
            raise RuntimeError("out of memory")
        return whole(images)

    monkeypatch.setattr(green, "colorize_batch", small_ones)
    run("in", "--batch-size", 8, "--jobs", 1)
    assert tried == [8] + [1] * 8 + [4]
    assert len(tree("in-color")) == 12


@pytest.mark.parametrize("jobs", [1, 3])
def test_bytes_in_flight_are_bounded(green, jobs):
    """Groups never fill, since every file has its own shape; only the bound makes them go."""
    tasks = []
    for i in range(12):
        tasks.append(command.Task(photo(f"in/{i}.png", 20, 20 + 10 * i), Path(f"out/{i}.png")))
    Path("out").mkdir()
    limit = 3 * 4 * 20 * 130  # three of the larger ones
    done, most = [], 0
    pipeline = command.Pipeline(green, lambda task, why: done.append((task, why)), jobs=jobs, in_flight=limit)
    acquire = pipeline.budget.acquire

    def watch(amount):
        nonlocal most
        acquire(amount)
        most = max(most, pipeline.budget.used)

    pipeline.budget.acquire = watch
    finish_in_time(pipeline, tasks)
    assert sorted(str(t.target) for t, why in done if why is None) == sorted(str(t.target) for t in tasks)
    assert limit / 2 < most <= limit and pipeline.budget.used == 0


def test_a_file_larger_than_the_bound_goes_alone(green):
    tasks = [command.Task(photo(f"in/{i}.png", 20, 20 + 10 * i), Path(f"{i}.png")) for i in range(5)]
    done = []
    finish_in_time(command.Pipeline(green, lambda *x: done.append(x), jobs=3, in_flight=10), tasks)
    assert len(done) == 5 and [len(b) for b in green.batches] == [1] * 5


def finish_in_time(pipeline, tasks):
    thread = threading.Thread(target=pipeline.run, args=(tasks,), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "the pipeline hangs"


def test_large_pictures_make_small_batches(green, monkeypatch):
    monkeypatch.setattr(command, "_BATCH_PIXELS", 2 * 16 * 24)
    for i in range(6):
        photo(f"in/{i}.png")
    run("in")
    assert [len(b) for b in green.batches] == [2, 2, 2]


def test_ctrl_c_and_going_on(green, monkeypatch):
    for i in range(8):
        photo(f"in/{i}.png")
    whole = green.colorize_batch

    def interrupted(images):
        if len(green.batches) == 2:
            deadline = time.monotonic() + 10
            while len(tree("in-color")) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            raise KeyboardInterrupt
        return whole(images)

    monkeypatch.setattr(green, "colorize_batch", interrupted)
    result = run("in", "--batch-size", 2, code=130)
    assert "interrupted: colorized 4, 4 left; the same command goes on from there" in result.stderr
    assert len(tree("in-color")) == 4 and all(is_green(Path("in-color") / p) for p in tree("in-color"))
    monkeypatch.setattr(green, "colorize_batch", whole)
    assert "colorized 4, skipped 4, failed 0" in run("in").stdout


def test_lines_of_progress_without_a_terminal(green, monkeypatch):
    monkeypatch.setattr(command, "_LINE_EVERY", 0.0)
    for i in range(3):
        photo(f"in/{i}.png")
    result = run("in", "--batch-size", 1)
    assert [line.split(",")[0] for line in result.stderr.splitlines()] == ["1 of 3 files", "2 of 3 files"]


def test_dropped_alpha_is_reported(green):
    page, mask = np.full((4, 4, 1), 120, np.uint8), np.full((4, 4), 7, np.uint8)
    write_picture("a.png", Picture(Path("a"), [page], [mask]), [page])
    assert run("a.png", "-o", "a.jpg").stderr == "warning: a.jpg: JPEG has no alpha, that of a.png is left out\n"


def test_signal_from_outside_leaves_whole_files_only():
    """A real process, a real network with random weights, a real Ctrl-C."""
    torch = pytest.importorskip("torch")
    from fastcolor.model.checkpoint import Checkpoint, save_checkpoint
    from fastcolor.model.network import ColorNetwork, NetworkConfig

    torch.manual_seed(0)
    network = ColorNetwork(NetworkConfig())
    prior = torch.full((network.config.bins.count,), 1 / network.config.bins.count, dtype=torch.float64)
    save_checkpoint("tiny.safetensors", Checkpoint(network, prior, {"size": 64}))
    rng, count = np.random.default_rng(0), 80  # enough to be interrupted, however late the signal comes
    for i in range(count):
        noise = rng.integers(0, 65535, (90 + i % 2, 120, 1), dtype=np.uint16)
        write_picture(f"in/{i}.tif", Picture(Path("a"), [noise], [None]), [noise])
    code = "import typer; from fastcolor.cli.colorize import colorize; typer.run(colorize)"
    args = [sys.executable, "-c", code, "in", "--weights", "tiny.safetensors", "--size", "32", "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*args, "--batch-size", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored by who started these tests, it stays so
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and len(list(Path().glob("in-color/*.tif"))) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted: colorized" in errors, errors
    done = tree("in-color")
    assert 3 <= len(done) < count
    result = run("in", *args[4:])
    assert f"colorized {count - len(done)}, skipped {len(done)}, failed 0" in result.stdout
    for i in (0, count - 1):
        page = read_picture(f"in-color/{i}.tif").pages[0]
        assert page.dtype == np.uint16 and page.shape == (90 + i % 2, 120, 3)
        assert np.ptp(page.astype(int), axis=2).max() > 0  # colours
