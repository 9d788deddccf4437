"""`fastcolor video` as its users meet it."""

from __future__ import annotations

import importlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner
from video.clips import Counting, frame_hashes, luma_planes, make_clip, packets_of, steady

from fastcolor.bins import ColorBins
from fastcolor.cli import app
from fastcolor.model.checkpoint import Checkpoint, save_checkpoint
from fastcolor.model.network import ColorNetwork, NetworkConfig

command = importlib.import_module("fastcolor.cli.video")  # the package has the function under this name
runner = CliRunner()


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def made(monkeypatch):
    """The colorizer is one that counts; gives the options that it was made with."""
    seen = {}

    class Stub(Counting):
        def __init__(self, colorizer, yuv, options, control):
            seen.update(colour=colorizer.options, video=options, yuv=yuv, control=control)
            super().__init__(yuv)

    def load(weights, device, options, ops):
        options = SimpleNamespace(**{"vividness": 0.5, **options})
        return SimpleNamespace(options=options, bins=ColorBins(), checkpoint=SimpleNamespace(prior=None))

    monkeypatch.setattr(command, "_load", load)
    monkeypatch.setattr("fastcolor.video.colorizer.VideoColorizer", Stub)
    return seen


def run(*args):
    return runner.invoke(app, ["video", *map(str, args)])


def test_name_options_and_summary(made):
    make_clip(Path("in.mkv"))
    Path("cuts.txt").write_text("[12,\n 3 3]\n")
    Path("palette.txt").write_text("#ff0000\n#00ff00\n")
    hint = {"x": 0.5, "y": 0.5, "ab": [10, 20], "frames": [2, 9]}
    Path("hints.json").write_text(json.dumps({"hints": [hint]}))
    result = run(
        "in.mkv", "--codec", "ffv1", "--temporal", 0.25, "--keyframes", 7, "--no-motion", "--cuts", "cuts.txt",
        "--palette", "palette.txt", "--hints", "hints.json", "--strength", 0.75,
        "--vividness", 0.25, "--start", "0:00.5", "--stats", "sub/stats.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("colorized 18 frames in ")
    assert len(luma_planes(Path("in-color.mkv"))) == 18
    how = made["video"]
    assert (how.temporal, how.keyframes, how.motion, how.cuts) == (0.25, 7, False, (3, 12))
    assert made["colour"].vividness == 0.25 and made["yuv"].matrix == "bt601"
    assert json.loads(Path("sub/stats.json").read_text())["frames"] == 18
    control = made["control"]
    assert control.strength == 0.75 and len(control.palette) == 2 and control.hints[0].first == 2
    names = ["cuts.txt", "hints.json", "in-color.mkv", "in.mkv", "palette.txt", "sub"]
    assert sorted(p.name for p in Path().iterdir()) == names


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["none.mkv"], 1, "error: none.mkv: no such file"),
        (["in.mkv", "--start", "1:2:3:4"], 2, "is no time"),
        (["in.mkv", "--start", "5", "--end", "4"], 2, "end must come after start"),
        (["in.mkv", "--keyframes", "0"], 2, "neither 'auto' nor a number"),
        (["in.mkv", "--fps", "0"], 2, "is no frame rate"),
        (["in.mkv", "--cuts", "none.txt"], 2, "--cuts none.txt: cannot be read"),
        (["in.mkv", "--cuts", "in.txt"], 2, "'b' is not the number of a frame"),
        (["in.mkv", "--codec", "h266"], 1, "no such video encoder; there are libx264"),
        (["in.mkv", "--hints", "in.txt"], 2, "in.txt"),
        (["in.mkv", "--reference", "none.png"], 2, "none.png: no such file"),
        (["-"], 2, "--out: is needed for -"),
        (["in.txt", "-o", "a.mp4"], 1, "error: in.txt: cannot be read as a film"),
        (["in.mkv", "--stats", "../here/in.mkv"], 2, "--stats ../here/in.mkv: is the film"),
        (["in.mkv", "-o", "a.mkv", "--stats", "a.mkv"], 2, "--stats a.mkv: is the film"),
        (["in.mkv", "-o", f"{300 * 'a'}.mkv"], 1, "aaa.mkv: File name too long"),
        ([f"{300 * 'a'}.mkv", "-o", "a.mkv"], 1, "aaa.mkv: File name too long"),
    ],
)
def test_refusals(made, args, code, message):
    make_clip(Path("in.mkv"), times=steady(3))
    Path("in.txt").write_text("1 b 3")
    result = run(*args)
    assert result.exit_code == code and message in " ".join(result.output.split()), result.output
    assert sorted(p.name for p in Path().iterdir()) == ["in.mkv", "in.txt"]


@pytest.mark.parametrize(
    ("name", "audio", "codec", "suffix"),
    [
        ("in.mpg", "mp2", "libx264", ".mkv"), ("in.vob", "ac3", "libx264", ".mp4"),
        ("in.m2ts", "ac3", "libx265", ".mp4"), ("in.m2ts", "ac3", "ffv1", ".mkv"),
        ("in.ts", "ac3", "prores_ks", ".mov"), ("in.MOV", "ac3", "prores_ks", ".MOV"),
        ("in.MOV", "ac3", "ffv1", ".mkv"), ("in.mp4", "ac3", "prores_ks", ".mov"),
    ],
)  # fmt: skip
def test_output_beside_films_of_other_containers(made, name, audio, codec, suffix):
    make_clip(Path(name), times=steady(12), codec="mpeg2video", audio=audio)
    result = run(name, "--codec", codec)
    out = f"in-color{suffix}"
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in Path().iterdir()) == sorted([name, out]) and len(luma_planes(Path(out))) == 12
    assert (f"writing {out}: " in result.stderr) == (Path(name).suffix != suffix) and "left out" not in result.stderr
    assert packets_of(Path(out), "audio") == packets_of(Path(name), "audio")


def test_time_formats():
    assert [command._seconds(t) for t in ("90", "1:30", "0:01:30.5", None)] == [90, 90, 90.5, None]
    assert command._rate("24000/1001") == Fraction(24000, 1001)
    with pytest.raises(typer.BadParameter):
        command._seconds("-3")


def test_terminal_gets_no_film(made, monkeypatch):
    make_clip(Path("in.mkv"), times=steady(3))
    monkeypatch.setattr(command.os, "isatty", lambda number: number == 1)
    result = run("in.mkv", "-o", "-")
    assert result.exit_code == 2 and "--out -: standard output is a terminal" in result.output


@pytest.mark.parametrize(("name", "args"), [("in", ["-", "-o", "out.mkv"]), ("out", ["in.mkv", "-o", "-"])])
def test_closed_stream_is_refused(made, monkeypatch, name, args):
    make_clip(Path("in.mkv"), times=steady(3))
    monkeypatch.setattr(sys, f"__std{name}__", None)
    result = run(*args)
    assert result.exit_code == 2 and f"-: standard {name}put is closed" in result.output
    assert [p.name for p in Path().iterdir()] == ["in.mkv"]


@pytest.mark.parametrize(("frames", "text"), [(0, ""), (10, ", 00:00:05 left"), (360_000, ", 50:00:00 left")])
def test_time_left(frames, text):
    assert command.Reporter._left(frames, 2.0) == text


def test_truncated_film_exits_with_1(made):
    clip = make_clip(Path("in.mkv"), times=steady(96))
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    result = run(clip, "-o", "out.mkv", "--codec", "ffv1", "--stats", "s.json")
    assert result.exit_code == 1
    assert (
        "error: in.mkv: is cut off: ends at 0:00:0" in result.output and "what there is was colorized" in result.output
    )
    assert len(luma_planes(Path("out.mkv"))) == json.loads(Path("s.json").read_text())["frames"] > 30


def test_lines_of_progress_without_terminal(made, monkeypatch):
    monkeypatch.setattr(command, "_LINE_EVERY", 0.0)
    make_clip(Path("in.mkv"), times=steady(30))
    result = run("in.mkv", "-o", "out.mkv", "--codec", "ffv1")
    lines = result.stderr.splitlines()
    assert any("of 30 frames, " in line and " fps" in line and " waiting " in line for line in lines), lines
    assert any(re.fullmatch(r"joining the segments, \d+ of 30 frames, 00:00:0\d left", line) for line in lines), lines
    assert run("in.mkv", "-o", "out.mkv", "--codec", "ffv1", "--overwrite", "-q").output == ""


STUBBED = """
import importlib, os, sys
from types import SimpleNamespace
from video.clips import Counting
from fastcolor.bins import ColorBins
from fastcolor.cli import main
from fastcolor.video import colorizer
command = importlib.import_module("fastcolor.cli.video")
command._PATIENCE = float(os.environ["PATIENCE"])
command._load = lambda *_: SimpleNamespace(
    options=SimpleNamespace(vividness=0.5), bins=ColorBins(), checkpoint=SimpleNamespace(prior=None))
colorizer.VideoColorizer = lambda network, yuv, *_: Counting(yuv)
sys.argv[1:1] = ["video", "--codec", "ffv1"]
main()
"""


def signalled():  # SIGINT ignored by who started these tests stays so
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stubbed(*args, patience=30.0, **pipes):
    env = {**os.environ, "PATIENCE": str(patience), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    return subprocess.Popen([sys.executable, "-c", STUBBED, *args], env=env, stderr=subprocess.PIPE,
                            preexec_fn=signalled, **pipes)  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_pipe_that_nobody_reads_does_not_hold_the_exit(number, code):
    make_clip(Path("in.mkv"), times=steady(100), size=(320, 240))  # more than a pipe and all queues hold
    reading, writing = os.pipe()
    process = stubbed("in.mkv", "-o", "-", stdout=writing)
    os.close(writing)
    begun = os.read(reading, 100)
    assert begun[:4] == bytes.fromhex("1a45dfa3")
    time.sleep(1.0)  # the pipe fills up
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1].decode()
    os.close(reading)
    assert process.returncode == code and "Traceback" not in errors, errors
    if number == signal.SIGINT:
        assert "warning: standard output: nobody reads it, its end is missing" in errors
        assert "interrupted: - ends after" in errors
    else:
        assert errors.splitlines()[-1] == "terminated"


def test_closed_pipe_is_an_error():
    make_clip(Path("in.mkv"), times=steady(100), size=(320, 240))
    process = stubbed("in.mkv", "-o", "-", stdout=subprocess.PIPE)
    process.stdout.read(100)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(timeout=60) == 1
    assert "error: standard output: was closed by who read it, after " in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_input_that_sends_nothing_does_not_hold_the_exit(number):
    """The main thread then hangs in FFmpeg, and hears of no signal."""
    reading, writing = os.pipe()
    process = stubbed("-", "-o", "out.mkv", "--format", "matroska", patience=0.5, stdin=reading)
    os.write(writing, b"\x1a\x45")
    deadline = time.monotonic() + 60
    while select.select([reading], [], [], 0)[0] and time.monotonic() < deadline:
        time.sleep(0.05)  # what is there was read: it waits for more
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1].decode()
    os.close(writing)
    os.close(reading)
    assert process.returncode == 128 + number and "something hangs, and is left" in errors


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_ctrl_c_ends_the_loop_of_a_shell():
    """As a terminal sends it: to all that run there. A shell goes on after a command that was not ended by it."""
    make_clip(Path("in.mkv"), times=steady(3))
    loop = 'for i in 1 2; do "$0" -c "$1" - -o $i.mkv --format matroska; done; echo went on'
    reading, writing = os.pipe()
    env = {**os.environ, "PATIENCE": "30", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(["bash", "-c", loop, sys.executable, STUBBED], env=env, stdin=reading, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=signalled)  # fmt: skip
    os.close(reading)
    film = Path("in.mkv").read_bytes()
    os.write(writing, film)
    deadline = time.monotonic() + 60
    while not list(Path().glob(".1-*.mkv")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    os.close(writing)
    assert process.returncode == -signal.SIGINT and output == "", errors
    assert errors.count("interrupted: 1.mkv ends after") == 1, errors


def test_real_network_ctrl_c_and_resume():
    """A real process with a real network of random weights: Ctrl-C ends the film so that it plays, --resume goes on."""
    torch.manual_seed(0)
    network = ColorNetwork(NetworkConfig())
    prior = torch.full((network.config.bins.count,), 1 / network.config.bins.count, dtype=torch.float64)
    save_checkpoint("tiny.safetensors", Checkpoint(network, prior, {"size": 64}))
    count, segment = 280, 40  # 70 s at 4 frames per second
    make_clip(Path("in.mkv"), times=steady(count, 4), codec="ffv1", audio="flac")
    args = [sys.executable, "-m", "fastcolor", "video", "in.mkv", "-o", "out.mkv", "--codec", "ffv1", "--size", "32",
            "--weights", "tiny.safetensors", "--device", "cpu", "--threads", "1"]  # fmt: skip

    def start(*more):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*args, *more], stderr=subprocess.PIPE, text=True, env=env, preexec_fn=signalled)

    process = start()
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not list(Path("out.mkv.parts").glob("0*.nut")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == -signal.SIGINT and "interrupted: out.mkv ends after" in errors, errors
    part = frame_hashes(Path("out.mkv"))
    assert segment <= len(part) < count
    process = start("--resume")
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    whole = frame_hashes(Path("out.mkv"))
    assert len(whole) == count and packets_of(Path("out.mkv"), "audio") == packets_of(Path("in.mkv"), "audio")
    assert whole[:segment] == part[:segment] and not Path("out.mkv.parts").exists()
    for (t, a), (t2, b) in zip(luma_planes(Path("in.mkv")), luma_planes(Path("out.mkv")), strict=True):
        assert t == t2 and (a == b).all()
