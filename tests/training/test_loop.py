from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import resource
import signal
from dataclasses import replace
from itertools import islice

import pytest
import pyvips
import torch

from fastcolor.imaging.find import find_images
from fastcolor.model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastcolor.model.colorizer import Colorizer
from fastcolor.model.field import FIELD, LEARNED, field_options
from fastcolor.model.network import pool_to
from fastcolor.ops.cross_entropy import color_cross_entropy
from fastcolor.reference import mean_field as reference
from fastcolor.training import color, memory
from fastcolor.training.average import Average
from fastcolor.training.color import ColorTask, split_lab
from fastcolor.training.config import TrainConfig
from fastcolor.training.data import Batch, DataError
from fastcolor.training.distributed import Team
from fastcolor.training.loop import train
from fastcolor.training.plan import dry_run
from fastcolor.training.report import Silent, Stop
from fastcolor.training.run import Run
from fastcolor.training.state import TrainingError

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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bins": "separable", "skip": True, "fusion": False},
        {"head": "regression", "ema": 0.0},
        {"precision": "bf16", "degrade": 0.5},
        {"rebalance": 0.5, "accumulate": 3},
    ],
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
    (tmp_path / "file").write_text("")
    for change, message in (
        ({"out": str(tmp_path / "file")}, "out must be a folder, .*file is a file"),
        ({"seed": 2**70}, "seed must be at most 9223372036854775807"),
        ({"head": "gan"}, "head must be one of distribution, regression; got 'gan'"),
        ({"size": 8}, "size must be at least 64, got 8"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"rebalance": 2.0}, "rebalance must be between 0 and 1, got 2.0"),
        ({"crop": 0.0}, "crop must be above 0"),
        ({"val_share": 1.0}, "val_share must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            train(photos, replace(TINY, **{"out": out, **change}))
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
    del state["average"], state["scaler"], state["classes"], state["config"]["ema"], state["config"]["classes"]
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


def killed(photos, config, step):
    """In a process of its own, which kills itself after a number of steps: nothing is caught, nothing cleaned up."""
    torch.set_num_threads(1)
    train(photos, config, Recorder(step, signal.SIGKILL))


def test_a_kill_in_the_middle_of_an_epoch_is_made_good(photos, tmp_path):
    """The state of some step before is on disk; from there the run ends as the uninterrupted one, bit for bit."""
    config = replace(TINY, epochs=2, save_every=1e-9, degrade=0.5, accumulate=2, clip=0.5, out=str(tmp_path / "parts"))
    whole = train(photos, replace(config, save_every=0, out=str(tmp_path / "whole")))
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(photos, config, 5))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (1, 1)  # the kill came before step 2 was saved
    (tmp_path / "parts" / ".state-abc.pt").touch()  # as of a kill in a write
    again = Recorder()
    parts = train(photos, replace(config, resume="auto"), again)
    assert parts.finished and len(again.losses) == 2
    for ours, theirs in zip(parts.history, whole.history, strict=True):
        assert {**ours, "images_per_second": 0} == {**theirs, "images_per_second": 0}
    ours, theirs = (torch.load(tmp_path / n / "state.pt", weights_only=True) for n in ("parts", "whole"))
    for part in ("network", "average"):
        assert all(torch.equal(ours[part][k], theirs[part][k]) for k in theirs[part])
    assert not (tmp_path / "parts" / ".state-abc.pt").exists()


def test_a_kill_between_the_state_and_the_model_is_made_good(photos, tmp_path, monkeypatch):
    config = replace(TINY, epochs=1, out=str(tmp_path / "run"))

    def full(run):
        raise OSError("no space left")

    with monkeypatch.context() as change:
        change.setattr(Run, "save_model", full)
        with pytest.raises(OSError, match="no space left"):
            train(photos, config)
    assert (tmp_path / "run" / "state.pt").exists() and not (tmp_path / "run" / "model.safetensors").exists()
    result = train(photos, replace(config, resume="yes"))
    assert result.finished and load_checkpoint(result.model).notes["epochs"] == 1
    assert [json.loads(line) for line in (result.out / "history.jsonl").read_text().splitlines()] == result.history
    before = result.model.stat().st_mtime_ns
    assert train(photos, replace(config, resume="yes")).model.stat().st_mtime_ns == before  # all is there


def test_an_epoch_that_ends_between_two_looks_keeps_its_loss(photos, tmp_path, monkeypatch):
    """As on a GPU, where the loss is looked at every few steps, when the workers are gone after a signal."""
    run = Run(photos, replace(TINY, out=str(tmp_path / "run")), Silent())
    run.loader = list(run.loader)[:2]
    monkeypatch.setattr(run, "_look", lambda stop: False)
    assert not run.train_epoch(Stop())
    assert run.progress.step == 2 and run.progress.loss_sum / run.progress.images > 1


def test_resume_auto_starts_where_nothing_is(photos, tmp_path):
    assert train(photos, replace(TINY, epochs=1, out=str(tmp_path / "run"), resume="auto")).finished
    starts = json.loads((tmp_path / "run" / "run.json").read_text())
    train(photos, replace(TINY, epochs=2, out=str(tmp_path / "run"), resume="auto"))
    starts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [s["epoch"] for s in starts] == [0, 1] and starts[0]["torch"] == torch.__version__
    assert starts[0]["fingerprint"] == starts[1]["fingerprint"] and starts[0]["seed"] == 0


def test_colours_are_measured_all_over_the_list(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("fastcolor.training.run._PRIOR_IMAGES", 4)
    run = Run(scenes, replace(TINY, out=str(tmp_path / "run")), Silent(), dry=True)
    names = [p.removeprefix(f"{scenes}/train/") for p in run.prior_loader.dataset.files]
    assert names == ["a/airfield/0.png", "a/airfield/3.png", "coast/0.png", "coast/3.png"]


def test_validation_gives_means_as_they_are(photos, tmp_path, monkeypatch):
    run = Run(photos, replace(TINY, out=str(tmp_path / "run")), Silent())
    measured = iter((150.0, 250.0, 350.0))
    monkeypatch.setattr(
        type(run.task), "measure", lambda task, batch: ({"x": torch.full((len(batch.rgb),), next(measured))}, None)
    )
    batches = [Batch(torch.zeros(n, 64, 64, 3), [], torch.zeros(n), torch.zeros(n)) for n in (3, 1, 4)]
    monkeypatch.setattr(run, "_batches", lambda loader, stop: batches)
    assert run.validate(Stop()) == ({"x": (3 * 150 + 250 + 4 * 350) / 8}, None)


def test_all_processes_follow_the_configuration_of_the_first(photos, tmp_path):
    class Follower(Team):
        def share(self, make):
            found = make()
            return replace(found, batch_size=3) if isinstance(found, TrainConfig) else found

    run = Run(photos, replace(TINY, out=str(tmp_path / "run")), Silent(), Follower(), dry=True)
    assert run.config.batch_size == 3 and run.batches.batch_size == 3


def keep_statistics(run):
    """Training mode, but batch normalization keeps to its running statistics: images do not mix."""
    run.task.train()
    for module in run.task.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()


@pytest.mark.parametrize("options", [{}, {"mrf_sweeps": 1}, {"head": "regression"}], ids=str)
def test_pieces_give_the_gradient_of_the_batch(photos, tmp_path, options, monkeypatch):
    """But for batch normalization, which sees a piece at a time: here it keeps to its running statistics. In float64,
    where rounding, which goes another way with every size of a batch, hides nothing.
    """
    split = color.split_lab
    monkeypatch.setattr(color, "split_lab", lambda *inputs: tuple(x.double() for x in split(*inputs)))
    gradients = []
    for pieces in (1, 3):
        run = Run(photos, replace(TINY, accumulate=pieces, ema=0.0, out=str(tmp_path / "run"), **options), Silent())
        run.task.double()
        run._sum = run._sum.double()
        keep_statistics(run)
        counts = run.batches.counts(0)
        assert len(counts) == pieces and sum(counts) == 4
        run._step(list(islice(run.loader, pieces)), counts)
        gradients.append((run._sum.item() / 4, {n: p.grad for n, p in run.task.named_parameters()}))
    assert gradients[1][0] == pytest.approx(gradients[0][0], rel=1e-6)
    for name, whole in gradients[0][1].items():
        assert whole.dtype == torch.float64
        assert torch.allclose(gradients[1][1][name], whole, rtol=1e-6, atol=1e-9 * whole.abs().max().item()), name


@pytest.mark.parametrize("options", [{}, {"bins": "separable", "mrf_sweeps": 1}, {"head": "regression"}], ids=str)
def test_float16_gradients_do_not_vanish(photos, tmp_path, options):
    """Scaled before the backward, they are those of float32 afterwards, as far as 11 bits go."""
    gradients = []
    for precision in ("fp32", "fp16"):
        run = Run(photos, replace(TINY, precision=precision, out=str(tmp_path / "run"), **options), Silent())
        run._sum = run._sum.double()
        keep_statistics(run)
        run.config.clip = 1e9  # clips nothing, but takes the scale away
        batch, scale = next(iter(run.loader)), None
        while scale is None or run.scaler.get_scale() < scale:  # too large a scale is halved, and the step left out
            scale = run.scaler.get_scale()
            run._step([batch], run.batches.counts(0))
        gradients.append({n: p.grad for n, p in run.network.named_parameters()})
    assert run.scaler.get_scale() >= 256
    for name, exact in gradients[0].items():
        error = (gradients[1][name] - exact).norm() / exact.norm()
        assert error < 0.1, f"{name}: {error}"


def test_the_average_is_what_is_validated_and_saved(photos, tmp_path):
    run = Run(photos, replace(TINY, ema=0.5, out=str(tmp_path / "run")), Silent())
    before = {n: p.clone() for n, p in run.network.named_parameters()}
    run.train_epoch(Stop())
    weights = {n: p.detach() for n, p in run.network.named_parameters()}
    average = dict(run.judged.network.named_parameters())
    name = "color1.0.weight"
    assert not torch.equal(average[name], weights[name]) and not torch.equal(average[name], before[name])
    run.save_model()
    saved = load_checkpoint(tmp_path / "run" / "model.safetensors").network.state_dict()
    assert torch.equal(saved[name], average[name])
    # of three updates w1, w2, w3 with decays 1/20, 2/21, 3/22, by hand
    other = Average(torch.nn.Linear(1, 1, bias=False), 0.5)
    other.module.weight.fill_(1.0)
    module = torch.nn.Linear(1, 1, bias=False)
    expected = 1.0
    for n, value in enumerate((2.0, 3.0, 5.0)):
        torch.nn.init.constant_(module.weight, value)
        other.update(module, n)
        decay = (1 / 20, 2 / 21, 3 / 22)[n]
        expected = decay * expected + (1 - decay) * value
    assert other.module.weight.item() == pytest.approx(expected)


def test_out_of_memory_says_what_would_fit(photos, tmp_path, monkeypatch):
    run = Run(photos, replace(TINY, batch_size=8, out=str(tmp_path / "run")), Silent())
    need = memory.step_need(run.task.train(), 64, run.device)
    assert need.image > 64 * 64 * 64 / 4  # one of the many planes of features that are kept
    forward = type(run.task).forward

    def limited(task, rgb, seeds, labels):
        if len(rgb) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(task, rgb, seeds, labels)

    monkeypatch.setattr(type(run.task), "forward", limited)
    later = memory.weights_bytes(run.task, 3)
    for fits, message in (
        (5, "out of memory with 8 crops of 64 pixels at once on cpu; about [56] fit: try --batch-size [56], or for the "
            "same steps --accumulate 2"),
        (0, "not even one fits: try a smaller --size"),
    ):  # fmt: skip
        free = later + (need.of(fits) / 0.9 + 0.6 * need.image if fits else 0)
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        with pytest.raises(TrainingError, match=message):
            train(photos, run.config)
    assert not (tmp_path / "run" / "state.pt").exists()


def test_one_training_in_a_folder(photos, tmp_path):
    """Whether the folder was there before or not; a failure lets go of it."""
    out = tmp_path / "run"
    config = replace(TINY, epochs=1, out=str(out), resume="auto")
    told = []

    class Second(Recorder):
        def advance(self, count=1, **values):
            if "loss" in values and not told:
                with pytest.raises(TrainingError) as caught:
                    train(photos, config)
                told.append(str(caught.value))

    assert train(photos, config, Second()).finished
    assert re.fullmatch(rf"{out}: process {os.getpid()} on .* is at work there; wait for it, or choose .*", told[0])
    assert not (out / "run.lock").exists()
    with pytest.raises(TrainingError, match="cannot resume with other options"):
        train(photos, replace(config, skip=True))
    assert train(photos, replace(config, epochs=2)).finished


def test_a_run_that_came_and_went_meanwhile(photos, tmp_path):
    """Of two that start in no folder at all, one may be through before the other one has read its photos."""
    config = replace(TINY, epochs=1, out=str(tmp_path / "run"), resume="auto")

    class Slow(Silent):
        def stage(self, text, total):
            if text == "measuring colours":
                train(photos, config)

    with pytest.raises(TrainingError, match="another run has been there since this one started"):
        train(photos, config, Slow())


def test_out_of_memory_in_validation(photos, tmp_path, monkeypatch):
    """Fewer at once have the same means; where not even one fits there is a word, and the epoch is not lost."""
    config = replace(TINY, epochs=1, out=str(tmp_path / "run"))
    whole = train(photos, replace(config, out=str(tmp_path / "whole"))).history
    measure, seen, most = ColorTask.measure, [], 2

    def limited(task, batch):
        seen.append(len(batch.rgb))
        if len(batch.rgb) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return measure(task, batch)

    monkeypatch.setattr(ColorTask, "measure", limited)
    recorder = Recorder()
    (entry,) = train(photos, config, recorder).history
    said = [line for line in recorder.lines if "out of memory" in line]
    assert said == ["out of memory with 3 crops of 64 pixels at once in validation: goes on with 1"]
    assert seen == [3, 1, 1, 1]
    for name in ("loss", "val_loss", "val_psnr", "val_colorfulness"):
        assert entry[name] == pytest.approx(whole[0][name], rel=1e-5)
    grids = [pyvips.Image.new_from_file(str(tmp_path / x / "samples/epoch_0001.png")) for x in ("whole", "run")]
    assert grids[0].height == grids[1].height and (grids[0] - grids[1]).abs().max() <= 1
    most, config = 0, replace(config, out=str(tmp_path / "none"))
    with pytest.raises(TrainingError, match="out of memory with 1 crops of 64 .* --resume where there is more memory"):
        train(photos, config)
    monkeypatch.undo()
    assert train(photos, replace(config, resume=True)).history[0]["val_loss"] == whole[0]["val_loss"]


def test_dry_run_writes_nothing(photos, tmp_path):
    recorder = Recorder()
    (photos / "broken.jpg").write_text("no image")
    dry_run(photos, replace(TINY, mrf_sweeps=2, out=str(tmp_path / "run")), recorder)
    text = "\n".join(recorder.lines)
    assert "distribution over 313 labels, fusion, field of 2 sweeps" in text and "9 to train on, 3 to check" in text
    assert "left out: 1 unreadable" in text and "steps: 3 an epoch, 9 in all" in text
    assert re.search(r"memory: about \d+ MB on cpu: .* 4 crops of 64 pixels at once \d+ MB \(\d+ MB each\)", text)
    assert not (tmp_path / "run").exists()


def test_dry_run_where_there_is_a_run(photos, tmp_path):
    config, recorder = replace(TINY, out=str(tmp_path / "run")), Recorder()
    dry_run(photos, replace(config, resume="yes"), recorder)
    assert "holds no run: --resume alone is refused" in recorder.lines[-1] and not (tmp_path / "run").exists()
    train(photos, config, Recorder(stop_after=5))
    before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    for change, message in (
        ({}, "a run, 1 epochs and 2 steps of the next one done: without --resume a start is refused and nothing is"),
        ({"skip": True}, "a run, 1 epochs and 2 steps"),
        ({"resume": "auto"}, "holds a run: it would go on with epoch 2, step 3"),
        ({"resume": "yes", "epochs": 1}, "holds a run: all its epochs are done"),
    ):
        recorder = Recorder()
        dry_run(photos, replace(config, **change), recorder)
        assert message in recorder.lines[-1] and any("memory: about" in line for line in recorder.lines)
    with pytest.raises(TrainingError, match="cannot resume with other options: skip"):
        dry_run(photos, replace(config, resume="auto", skip=True), Recorder())
    assert {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()} == before


def test_three_photos_are_enough_and_grey_ones_are_not(photos, tmp_path):
    files = find_images(photos)
    for path in files[3:]:
        path.unlink()
    result = train(photos, replace(TINY, epochs=1, out=str(tmp_path / "run")))
    assert result.finished and math.isfinite(result.history[0]["val_loss"])
    for path in files[:3]:
        path.unlink()
        pyvips.Image.black(40, 40).write_to_file(str(path.with_suffix(".png")))
    with pytest.raises(DataError, match="too few usable colour images, 0 to train on .*greyscale"):
        train(photos, replace(TINY, out=str(tmp_path / "second")))


def test_grey_files_stored_as_colour(photos, tmp_path):
    """Their headers say nothing, so it is their pixels that stop the run, with the reason."""
    for path in find_images(photos):
        path.unlink()
        grey = pyvips.Image.black(40, 40).cast("uchar")
        grey.bandjoin([grey, grey]).copy(interpretation="srgb").write_to_file(str(path.with_suffix(".png")))
    with pytest.raises(DataError, match="9 files in a row could not be used; the first: greyscale"):
        train(photos, replace(TINY, out=str(tmp_path / "run")))


def test_many_problems_are_counted_and_listed(photos, tmp_path):
    png = next(f for f in find_images(photos) if f.suffix == ".png").read_bytes()
    for i in range(8):
        (photos / f"half{i}.png").write_bytes(png[: len(png) // 2])  # its header is whole
    recorder = Recorder()
    result = train(photos, replace(TINY, epochs=1, out=str(tmp_path / "run")), recorder)
    text = "\n".join(recorder.lines)
    assert result.finished and text.count("left out: ") == 5 and "left out so far: " in text
    listed = (tmp_path / "run" / "left_out.txt").read_text().splitlines()
    assert len(listed) == len(result.problems.reasons) > 5 and all("half" in line for line in listed)


def test_resume_with_another_architecture(photos, tmp_path):
    config = replace(TINY, epochs=1, out=str(tmp_path / "run"))
    train(photos, config)
    with pytest.raises(TrainingError, match="cannot resume with other options: bins was 'joint', .*; skip was False"):
        train(photos, replace(config, resume=True, skip=True, bins="separable"))


def test_weights_that_are_no_numbers_are_not_saved(photos, tmp_path):
    run = Run(photos, replace(TINY, out=str(tmp_path / "run")), Silent())
    run.save_state()
    before = (tmp_path / "run" / "state.pt").read_bytes()
    run.network.color1[0].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(TrainingError, match="weights are not finite .*try a lower --lr"):
        run.save_state()
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


def test_compiled_training_is_the_same(photos, tmp_path, monkeypatch):
    """Traced and taken apart into forward and backward as for any backend, but run by PyTorch: no compiler to wait for.
    The last batch of an epoch, one image of nine, is not compiled."""
    plain = train(photos, replace(TINY, epochs=1, out=str(tmp_path / "plain"))).history
    compile, calls = torch.compile, []

    def traced(function, **options):
        fast = compile(function, backend="aot_eager", **options)
        return lambda x: calls.append(len(x)) or fast(x)

    monkeypatch.setattr(torch, "compile", traced)
    compiled = train(photos, replace(TINY, epochs=1, compile=True, out=str(tmp_path / "compiled"))).history
    assert calls == [4, 4]
    assert compiled[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-4)
    assert compiled[0]["val_loss"] == pytest.approx(plain[0]["val_loss"], rel=1e-3)
