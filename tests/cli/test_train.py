"""From a folder of photos to a coloured picture, through the command line alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import pyvips
from typer.testing import CliRunner

from fastcolor.cli import app

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def fastcolor(*arguments, **options):
    command = [sys.executable, "-m", "fastcolor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight small landscapes: blue above, green below, in bright and dark."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    folder.mkdir()
    for i in range(8):
        random = np.random.default_rng(i)
        sky = np.arange(72)[:, None] < random.integers(25, 45) + np.zeros((1, 96), int)
        pixels = np.where(sky[..., None], (120, 160, 235), (60, 120, 30)) + random.normal(0, 5, (72, 96, 1))
        pyvips.Image.new_from_array(pixels.clip(0, 255).astype(np.uint8)).write_to_file(str(folder / f"{i}.png"))
    (folder / "broken.jpg").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    done = fastcolor(
        "train", photos, "--out", out, "--size", 64, "--epochs", 6, "--batch-size", 4, "--lr", 0.003,
        "--device", "cpu", "--workers", 1,
    )  # fmt: skip
    return out, done


def test_loss_falls_and_files_are_named(trained):
    out, done = trained
    assert done.returncode == 0, done.stderr
    losses = [float(v) for v in re.findall(r"epoch \d+: loss ([\d.]+)", done.stdout)]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    assert "left out: 1 unreadable" in done.stdout and "broken.jpg" in done.stdout
    assert "images/s" in done.stdout and "model.safetensors is ready" in done.stdout


def test_the_checkpoint_colours_a_picture(trained, tmp_path):
    out, _ = trained
    grey = np.where(np.arange(72)[:, None] < 30, 160, 100) + np.zeros((1, 96), int)
    pyvips.Image.new_from_array(grey.astype(np.uint8)).write_to_file(str(tmp_path / "grey.png"))
    done = fastcolor("colorize", tmp_path / "grey.png", "--weights", out / "model.safetensors", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    color = pyvips.Image.new_from_file(str(tmp_path / "grey-color.png")).numpy()
    assert color.shape == (72, 96, 3) and np.ptp(color.astype(int), axis=2).max() > 3


def test_a_second_run_needs_resume(trained, photos):
    out, _ = trained
    done = fastcolor("train", photos, "--out", out, "--device", "cpu")
    assert done.returncode == 1 and "error: " in done.stderr and "--resume goes on with it" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_saves_and_resume_finishes(photos, tmp_path):
    options = ["--out", tmp_path / "run", "--size", 64, "--batch-size", 1, "--device", "cpu", "--workers", 0]
    command = [sys.executable, "-m", "fastcolor", "train", photos, *options, "--epochs", 40]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "history.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "--resume goes on from here" in output and "Traceback" not in output
    before = (tmp_path / "run" / "history.jsonl").read_text()
    epochs = len(before.splitlines()) + 1
    # fewer epochs than asked first: the run is over once the one under way is. The other options are remembered
    done = fastcolor("train", photos, "--out", tmp_path / "run", "--epochs", epochs, "--resume")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "history.jsonl").read_text().startswith(before)


def test_sigterm_to_the_whole_group_saves(photos, tmp_path):
    """As batch systems send it, to the workers too."""
    command = [sys.executable, "-m", "fastcolor", "train", photos, "--out", tmp_path / "run", "--size", 64,
               "--batch-size", 1, "--device", "cpu", "--workers", 2, "--epochs", 1000]  # fmt: skip
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "history.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "--resume goes on from here" in output and "Traceback" not in output


def test_flags_come_before_the_file_and_the_file_before_what_was(photos, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        f'data = "{photos}"\nout = "{tmp_path / "run"}"\nsize = 64\nbatch-size = 4\ndevice = "cpu"\nworkers = 0\n'
        "epochs = 5\nlr = 0.002\nseed = 7\n"
    )
    run = CliRunner()
    done = run.invoke(app, ["train", "--config", str(config), "--epochs", "1", "--resume", "auto"])
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["epochs"], kept["lr"], kept["seed"], kept["ema"]) == (1, 0.002, 7, 0.999)
    assert kept["data"] == str(photos)
    # the run knows its options and its photos; an option that decides its course may not change
    done = run.invoke(app, ["train", "--out", str(tmp_path / "run"), "--resume", "--epochs", "2"])
    assert done.exit_code == 0, done.output
    done = run.invoke(app, ["train", "--resume", "auto", "--out", str(tmp_path / "run"), "--skip"])
    assert done.exit_code == 1 and "skip was False, is True" in done.output
    config.write_text("batchsize = 4\n")
    done = run.invoke(app, ["train", str(photos), "--config", str(config)])
    assert done.exit_code == 1 and "run.toml: unknown option 'batchsize'; did you mean 'batch_size'?" in done.output
    # a run's own configuration is a file of options too
    options = ["--config", str(tmp_path / "run" / "config.json"), "--out", str(tmp_path / "new"), "--dry-run"]
    done = run.invoke(app, ["train", *options])
    assert done.exit_code == 0 and "steps: 2 an epoch, 4 in all" in done.output, done.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["photos", "--resume"], "yes"),
        (["--resume", "photos"], "yes"),
        (["photos", "--resume", "auto"], "auto"),
        (["--resume=auto", "photos"], "auto"),
        (["--resume", "no", "photos"], "no"),
        (["photos"], "no"),
    ],
    ids=str,
)
def test_resume_with_and_without_a_word(monkeypatch, given, expected):
    from fastcolor.training import loop

    def started(data, config, reporter):
        assert str(data) == "photos" and config.resume == expected
        raise OSError("this far")

    monkeypatch.setattr(loop, "train", started)
    done = CliRunner().invoke(app, ["train", *given, "--out", "nowhere"])
    assert "error: this far" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere"], "no such folder"),
        (["train", "."], "no images"),
        (["train"], "data is missing"),
        (["train", ".", "--head", "gan"], "head must be one of distribution, regression"),
        (["train", ".", "--lr", "nan"], "lr must be a finite number, got nan"),
        (["train", ".", "--device", "cuda:77"], "device 'cuda:77' cannot be used"),
    ],
    ids=str,
)
def test_errors_are_one_line(tmp_path, arguments, message):
    done = fastcolor(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())
