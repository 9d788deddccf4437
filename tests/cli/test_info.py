from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

import fastcolor
from fastcolor.cli import app
from fastcolor.ops import _backend

RUNNER = CliRunner()


def test_info_names_what_would_run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = RUNNER.invoke(app, ["info"]).output
    for name in ("fastcolor", "torch", "pyvips", "SIMD", "threads", *_backend.OFFERS):
        assert name in text
    if _backend.missing("cpp") is None:
        assert re.search(r"rgb_to_lab\W+cpu\W+cpp\W+the fastest on cpu", text)
        assert re.search(r"color_cross_entropy\W+cpu\W+cpp", text)
        assert re.search(r"render\W+cpu\W+cpp", text)


def test_info_follows_a_wish(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with fastcolor.use_backend("reference"):
        assert re.search(r"rgb_to_lab\W+cpu\W+reference\W+asked for", RUNNER.invoke(app, ["info"]).output)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "--help"], ["colorize", "--help"]], ids=str)
def test_help(arguments):
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 0 and result.output.strip()


def test_every_training_option_is_a_flag(monkeypatch):
    from dataclasses import fields

    from fastcolor.training.config import TrainConfig

    monkeypatch.setenv("COLUMNS", "200")
    text = re.sub(r"\x1b\[[0-9;]*m", "", RUNNER.invoke(app, ["train", "--help"]).output)
    for field in fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text and field.metadata["help"]
