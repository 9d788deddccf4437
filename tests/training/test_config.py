from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest

from fastcolor.training.config import ConfigError, TrainConfig, read_options
from fastcolor.training.degrade import Film


def test_reads_toml_and_the_config_of_a_run(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('data = "photos"\nbatch-size = 8\nlr = 1\nskip = true\nresume = "auto"\nhead = "regression"\n')
    options = read_options(path)
    assert options == {
        "data": "photos", "batch_size": 8, "lr": 1.0, "skip": True, "resume": "auto", "head": "regression"
    }  # fmt: skip
    assert isinstance(options["lr"], float)
    config = replace(TrainConfig(), size=128, grain=0.5)
    (tmp_path / "config.json").write_text(json.dumps({"data": "x", **asdict(config)}))
    assert read_options(tmp_path / "config.json") == {"data": "x", **asdict(config)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize = 8", r"run.toml: unknown option 'batchsize'; did you mean 'batch_size'\?"),
        ("qqqq = 8", "unknown option 'qqqq'; there are accumulate, .* workers"),
        (f"lr = {10**400}", "lr must be a number, got 1000"),
        ("lr = 'fast'", "lr must be a number, got 'fast'"),
        ("epochs = 1.5", "epochs must be a whole number, got 1.5"),
        ("epochs = true", "epochs must be a whole number, got True"),
        ("skip = 1", "skip must be true or false, got 1"),
        ("head = 1", "head must be text in quotes, got 1"),
        ("[degrade]\nshare = 1", "degrade must be a number"),
        ("lr = ", "run.toml: not a readable TOML file"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path, text, message):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_options(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="none.toml: No such file"):
        read_options(tmp_path / "none.toml")


def test_film_has_the_options_by_name():
    assert TrainConfig().film == Film(share=0.0)
    config = TrainConfig(degrade=0.25, orthochromatic=0.1, blur=0.2, grain=0.3, fading=0.4, scratches=0.5, jpeg=0.6)
    assert config.film == Film(0.25, orthochromatic=0.1, blur=0.2, grain=0.3, fading=0.4, scratches=0.5, jpeg=0.6)


def test_differences_know_what_may_change():
    before = asdict(TrainConfig())
    assert TrainConfig(epochs=3, out="x", workers=2, resume=True, save_every=1).differences(before) == []
    assert TrainConfig(skip=True).differences(before) == ["skip was False, is True"]
    del before["skip"]  # older runs lack newer options
    assert TrainConfig().differences(before) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ema": 1.0}, "ema must be at least 0 and below 1, got 1.0"),
        ({"clip": -1.0}, "clip must be at least 0"),
        ({"clip": float("nan")}, "clip must be a finite number, got nan"),
        ({"save_every": float("inf")}, "save_every must be a finite number, got inf"),
        ({"lr": 10**400}, "lr must be a finite number, got 1000"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": -1e-3}, "lr must be positive, got -0.001"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"beta1": 1.0}, "beta1 must be at least 0 and below 1, got 1.0"),
        ({"beta2": -0.1}, "beta2 must be at least 0 and below 1, got -0.1"),
        ({"seed": 2**70}, "seed must be at most 9223372036854775807, got 1180591620717411303424"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"size": 1 << 20}, "size must be at most 16384"),
        ({"workers": 5000}, "workers must be at most 1024"),
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"fusion": 1}, "fusion must be true or false, got 1"),
        ({"device": None}, "device must be text in quotes, got None"),
        ({"out": ""}, "out must be the name of a folder, got ''"),
        ({"crop": 0.0}, "crop must be above 0 and at most 1"),
        ({"val_share": 1.0}, "val_share must be between 0 and 1"),
        ({"degrade": 1.5}, "degrade must be between 0 and 1"),
        ({"accumulate": 64}, "accumulate must be at most batch_size, 32, got 64"),
        ({"task": "classify", "classes": "none"}, "classes must be auto or folders"),
        ({"resume": "maybe"}, "resume must be one of no, yes, auto"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16"),
    ],
)
def test_options_out_of_range(change, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**change).check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0, -2, 2**70])
def test_no_field_takes_everything(value):
    """Each number has a least one, and each whole one a greatest: what no training can be is no surprise later on."""
    for f in fields(TrainConfig):
        kind = type(f.default)
        if kind in (int, float) and not (kind is float and value == 2**70):
            with pytest.raises(ConfigError, match=f"{f.name} must be"):
                replace(TrainConfig(), **{f.name: value}).check()


def test_whole_numbers_and_the_largest_seed_are_taken():
    TrainConfig(lr=1, save_every=0, seed=2**63 - 1).check()
