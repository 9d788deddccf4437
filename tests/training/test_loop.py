from __future__ import annotations

import json
import math
import os
import resource
import signal
from dataclasses import replace

import pytest
import torch

from fastcolor.imaging.find import find_images
from fastcolor.model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastcolor.model.colorizer import Colorizer
from fastcolor.model.field import FIELD, LEARNED, field_options
from fastcolor.model.network import pool_to
from fastcolor.ops.cross_entropy import color_cross_entropy
from fastcolor.reference import mean_field as reference
from fastcolor.training.config import TrainConfig
from fastcolor.training.data import DataError
from fastcolor.training.loop import Run, Silent, TrainingError, split_lab, train

TINY = TrainConfig(size=64, epochs=3, batch_size=4, lr=2e-3, workers=0, device="cpu", val_share=0.25)


class Recorder(Silent):
    """Keeps what a run says, and interrupts it after a number of training steps."""

    def __init__(self, stop_after=None, number=signal.SIGINT):
        self.lines, self.losses, self.stop_after, self.number = [], [], stop_after, number

    def advance(self, count=1, **values):
        if "loss" in values:
            self.losses.append(values["loss"])
            if len(self.losses) == self.stop_after:
                os.kill(os.getpid(), self.number)

    def say(self, text):
        self.lines.append(text)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of threads may differ in the last bit; one thread's do not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "options",
    [{}, {"bins": "separable"}, {"head": "regression"}, {"precision": "bf16"}, {"rebalance": 0.5}],
    ids=str,
)
def test_learns_and_leaves_its_files(photos, tmp_path, options):
    config = replace(TINY, out=str(tmp_path / "run"), **options)
    result = train(photos, config)
    assert result.finished and len(result.history) == 3
    assert result.history[-1]["loss"] < 0.95 * result.history[0]["loss"]
    entry = result.history[-1]
    assert all(math.isfinite(v) for v in entry.values()) and entry["val_psnr_grey"] < 40
    names = {p.name for p in result.out.iterdir()}
    assert {"config.json", "history.jsonl", "model.safetensors", "samples", "state.pt"} <= names
    assert any(n.startswith("events.out.tfevents") for n in names)
    assert len(list((result.out / "samples").glob("*.png"))) == 3
    lines = [json.loads(line) for line in (result.out / "history.jsonl").read_text().splitlines()]
    assert lines == result.history
    checkpoint = load_checkpoint(result.out / "model.safetensors")
    assert checkpoint.network.config.head == config.head
    if config.head == "distribution":
        axes = len(checkpoint.network.config.bins.groups())
        assert checkpoint.prior.sum().item() == pytest.approx(axes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop_after", [1, 5, 6])  # in the first epoch, in the second, at an epoch's very end
def test_resumes_exactly(photos, tmp_path, stop_after, number):
    """An interrupted and resumed run ends with the losses and the weights of an uninterrupted one, bit for bit."""
    whole = train(photos, replace(TINY, epochs=2, out=str(tmp_path / "whole")))
    config = replace(TINY, epochs=2, out=str(tmp_path / "parts"))
    recorder = Recorder(stop_after, number)
    first = train(photos, config, recorder)
    assert len(recorder.losses) == stop_after and not first.finished
    assert "--resume goes on from here" in recorder.lines[-1]
    second = train(photos, replace(config, resume=True))
    assert second.finished
    for ours, theirs in zip(second.history, whole.history, strict=True):
        assert {**ours, "images_per_second": 0} == {**theirs, "images_per_second": 0}
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True)["network"] for name in ("whole", "parts")]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_interrupted_validation_is_resumed(photos, tmp_path):
    """A signal in validation leaves it out; the resumed run starts with it, and trains no step twice."""

    class InValidation(Recorder):
        name = ""

        def stage(self, text, total):
            self.name = text

        def advance(self, count=1, **values):
            super().advance(count, **values)
            if self.name == "validation":
                os.kill(os.getpid(), signal.SIGTERM)

    whole = train(photos, replace(TINY, epochs=1, out=str(tmp_path / "whole")))
    config = replace(TINY, epochs=1, out=str(tmp_path / "parts"))
    recorder = InValidation()
    assert not train(photos, config, recorder).finished
    assert "--resume goes on from here" in recorder.lines[-1]
    again = Recorder()
    second = train(photos, replace(config, resume=True), again)
    assert second.finished and again.losses == []
    assert {**second.history[0], "images_per_second": 0} == {**whole.history[0], "images_per_second": 0}


def test_a_run_that_failed_early_can_start_again(photos, tmp_path):
    config = replace(TINY, epochs=1, out=str(tmp_path / "run"))
    with pytest.raises(TrainingError, match="try a lower --lr"):
        train(photos, replace(config, lr=1e30, schedule="constant", warmup=0))
    assert train(photos, config).finished


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors"])
def test_a_full_disk_names_the_file(photos, tmp_path, monkeypatch, name):
    """A write that fails for real, by the limit on the size of files: the file is named, and no half of it stays."""
    run = Run(photos, replace(TINY, out=str(tmp_path / "run")), Silent())
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with pytest.raises(OSError, match=f"{name}: cannot be written|{name}"):
            run.save_state() if name == "state.pt" else run.save_model()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "run").iterdir()) == []


def test_signals_are_given_back(photos, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    train(photos, replace(TINY, epochs=1, out=str(tmp_path / "run")), Recorder(1))
    assert signal.getsignal(signal.SIGINT) is before


def test_left_out_files_are_counted_and_named(photos, tmp_path):
    (photos / "broken.jpg").write_text("no image")
    jpeg = next(f for f in find_images(photos) if f.suffix == ".jpg" and f.name != "broken.jpg")
    jpeg.write_bytes(jpeg.read_bytes()[:600])
    recorder = Recorder()
    result = train(photos, replace(TINY, epochs=1, out=str(tmp_path / "run")), recorder)
    assert result.finished and set(result.problems.reasons) == {str(photos / "broken.jpg"), str(jpeg)}
    text = "\n".join(recorder.lines)
    assert "left out: 2 unreadable" in text and "broken.jpg" in text and jpeg.name in text


def test_existing_runs_are_safe(photos, tmp_path):
    config = replace(TINY, epochs=1, out=str(tmp_path / "run"))
    with pytest.raises(TrainingError, match="nothing to resume"):
        train(photos, replace(config, resume=True))
    train(photos, config)
    with pytest.raises(TrainingError, match="holds a run already; --resume goes on"):
        train(photos, config)
    with pytest.raises(TrainingError, match="head was 'distribution', is 'regression'"):
        train(photos, replace(config, resume=True, head="regression"))
    find_images(photos)[0].unlink()
    with pytest.raises(TrainingError, match="not those of the run"):
        train(photos, replace(config, resume=True))
    (tmp_path / "run" / "state.pt").write_bytes(b"half a file")
    with pytest.raises(TrainingError, match=r"state.pt: not a readable state"):
        train(photos, replace(config, resume=True))
    torch.save({"other": 1}, tmp_path / "run" / "state.pt")
    with pytest.raises(TrainingError, match=r"state.pt: not a readable state .*something else"):
        train(photos, replace(config, resume=True))


def test_nan_stops_with_advice(photos, tmp_path):
    run_config = replace(TINY, epochs=1, out=str(tmp_path / "run"), lr=1e30, schedule="constant", warmup=0)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at epoch 1, step \d+; try a lower --lr"):
        train(photos, run_config)


def test_bad_folders_and_options(tmp_path, photos):
    out = str(tmp_path / "run")
    with pytest.raises(DataError, match="no such folder"):
        train(tmp_path / "none", replace(TINY, out=out))
    with pytest.raises(RuntimeError, match="device 'cuda:77' cannot be used"):
        train(photos, replace(TINY, out=out, device="cuda:77"))
    for change, message in (
        ({"head": "gan"}, "head must be one of distribution, regression; got 'gan'"),
        ({"size": 8}, "size must be at least 64, got 8"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"rebalance": 2.0}, "rebalance must be between 0 and 1, got 2.0"),
        ({"crop": 0.0}, "crop must be above 0"),
        ({"val_share": 1.0}, "val_share must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            train(photos, replace(TINY, out=out, **change))
    for usable in (1, 0):
        for path in find_images(photos)[usable:]:
            path.write_text("no image")
        message = (
            f"too few usable colour images, {usable} to train on and 0 to check with; .*left out: .*not a readable"
        )
        with pytest.raises(DataError, match=message):
            train(photos, replace(TINY, out=out))
    assert not (tmp_path / "run").exists()


def test_learning_rate(photos, tmp_path):
    run = Run(photos, replace(TINY, epochs=20, warmup=5, lr=1.0, out=str(tmp_path / "run")), Silent())
    assert run.steps_per_epoch == 3
    rates = [run.learning_rate(step) for step in range(60)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[5] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 0.01


def test_trains_network_and_field_together(photos, tmp_path):
    config = replace(TINY, mrf_sweeps=2, out=str(tmp_path / "run"))
    result = train(photos, config)
    assert result.history[-1]["loss"] < 0.95 * result.history[0]["loss"]
    loaded = load_checkpoint(result.out / "model.safetensors")
    assert loaded.mrf.keys() == FIELD.keys() and loaded.mrf["sweeps"] == 2
    for name in LEARNED:
        assert loaded.mrf[name] == result.history[-1][f"field_{name}"] != FIELD[name]
    assert Colorizer(loaded).field == loaded.mrf  # what was trained is what colours

    # the loss is that of the field's marginals, and its gradient reaches all of the network
    run = Run(photos, replace(config, out=str(tmp_path / "second"), mrf_sweeps=3), Silent())
    rgb = next(iter(run.val_loader))[0]
    loss, output, _ = run.task.loss(rgb)
    assert torch.allclose(output.exp().sum(1), torch.ones(()), atol=1e-5)
    L, ab = split_lab(rgb, 4)
    options = {**field_options(run.field), "bins": run.bins}
    q = reference.mean_field(run.network(L), pool_to(L, 4), **options)
    assert torch.allclose(loss, color_cross_entropy(q.log(), ab, bins=run.bins), rtol=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in run.network.parameters())
    assert all(p.grad.abs() > 0 for p in run.field.parameters())


def test_resume_with_a_field_is_exact(photos, tmp_path):
    config = replace(TINY, mrf_sweeps=2, out=str(tmp_path / "whole"))
    whole = train(photos, config)
    config = replace(config, out=str(tmp_path / "parts"))
    assert not train(photos, config, Recorder(stop_after=4)).finished
    with pytest.raises(TrainingError, match="mrf_sweeps was 2, is 0"):
        train(photos, replace(config, resume=True, mrf_sweeps=0))
    parts = train(photos, replace(config, resume=True))
    assert parts.history[-1]["loss"] == whole.history[-1]["loss"]
    assert load_checkpoint(parts.out / "model.safetensors").mrf == load_checkpoint(whole.out / "model.safetensors").mrf


def test_resumes_runs_that_know_no_field(photos, tmp_path):
    config = replace(TINY, epochs=1, out=str(tmp_path / "run"))
    train(photos, config)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    del state["field"], state["config"]["mrf_sweeps"], state["config"]["init"]
    torch.save(state, tmp_path / "run" / "state.pt")
    with pytest.raises(TrainingError, match="mrf_sweeps was 0, is 2"):
        Run(photos, replace(config, resume=True, mrf_sweeps=2), Silent())
    assert Run(photos, replace(config, resume=True), Silent()).progress.epoch == 1


def test_starts_from_other_weights(photos, tmp_path):
    first = train(photos, replace(TINY, epochs=1, out=str(tmp_path / "first")))
    weights = str(first.out / "model.safetensors")
    run = Run(photos, replace(TINY, init=weights, out=str(tmp_path / "second")), Silent())
    loaded = load_checkpoint(weights).network.state_dict()
    assert all(torch.equal(v, loaded[n]) for n, v in run.network.state_dict().items())
    with pytest.raises(CheckpointError, match="cannot start .* head is 'distribution', not 'regression'"):
        Run(photos, replace(TINY, init=weights, head="regression", out=str(tmp_path / "third")), Silent())
    loaded = load_checkpoint(weights)
    loaded.mrf = {**FIELD, "weight": 0.25, "radius": 1}
    save_checkpoint(tmp_path / "field.safetensors", loaded)
    options = {"init": str(tmp_path / "field.safetensors"), "mrf_sweeps": 2, "out": str(tmp_path / "third")}
    run = Run(photos, replace(TINY, **options), Silent())
    expected = {**loaded.mrf, "sweeps": 2}
    for name, value in field_options(run.field).items():
        assert value == (pytest.approx(expected[name]) if name in LEARNED else expected[name])
    assert {id(p) for p in run.field.parameters()} <= {id(p) for g in run.optimizer.param_groups for p in g["params"]}
    with pytest.raises(CheckpointError, match="nowhere.safetensors: no such weights file"):
        Run(photos, replace(TINY, init="nowhere.safetensors", out=str(tmp_path / "third")), Silent())
