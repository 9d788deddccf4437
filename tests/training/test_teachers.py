from __future__ import annotations

import copy
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fastcolor.bins import ColorBins
from fastcolor.model.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from fastcolor.model.field import FIELD
from fastcolor.model.network import ColorNetwork, NetworkConfig
from fastcolor.reference import cross_entropy as reference
from fastcolor.training.color import ColorTask, split_lab
from fastcolor.training.config import ConfigError, TrainConfig
from fastcolor.training.degrade import degrade
from fastcolor.training.loop import train
from fastcolor.training.plan import dry_run
from fastcolor.training.report import Silent, Stop
from fastcolor.training.run import Run
from fastcolor.training.state import TrainingError
from fastcolor.training.teachers import Teachers, soft_cross_entropy

TINY = TrainConfig(size=64, epochs=3, batch_size=4, lr=2e-3, workers=0, device="cpu", val_share=0.25)
CPU = torch.device("cpu")


class Recorder(Silent):
    """Keeps what a run says, and interrupts it after a number of training steps."""

    def __init__(self, stop_after=None):
        self.lines, self.left = [], stop_after

    def advance(self, count=1, **values):
        if "loss" in values and self.left is not None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)

    def say(self, text):
        self.lines.append(text)


def crops(count=6, size=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def teacher(path, seed, mrf=None, **options):
    """The file of a network with statistics, and with opinions: a new one's distributions are nearly uniform."""
    torch.manual_seed(seed)
    network = ColorNetwork(NetworkConfig(**options))
    with torch.no_grad():
        network.train()(split_lab(crops(), 4)[0])
        if network.config.head == "distribution":
            network.head.weight.normal_(std=3)
            network.head.bias.normal_(std=2)
    save_checkpoint(path, Checkpoint(network, mrf=mrf or {}))
    return str(path)


def keep_statistics(task):
    """Batch normalization as of a network that is used, not trained."""
    task.network.eval()
    return task


@pytest.mark.parametrize("kind", ["joint", "separable"])
def test_loss_and_gradient_by_hand(kind):
    bins = ColorBins(kind)
    torch.manual_seed(0)
    logits = torch.randn(2, bins.count, 3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.cat([torch.randn(2, c.shape[0], 3, 5, dtype=torch.float64).softmax(1) for _, c in bins.groups()], 1)
    loss = 3 * soft_cross_entropy(logits, target, bins)
    parts = [-(target[:, at] * logits[:, at].log_softmax(1)).sum(1).mean() for at, _ in bins.groups()]
    assert loss.item() == pytest.approx(3 * sum(parts).item(), rel=1e-13)
    (found,), (exact,) = torch.autograd.grad(loss, logits), torch.autograd.grad(3 * sum(parts), logits)
    assert torch.allclose(found, exact, rtol=1e-12, atol=1e-18)
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.float16, 0.001)):
        x = logits.detach().to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        each = soft_cross_entropy(x, target.float(), bins)
        assert each.dtype == torch.float32
        (grad,) = torch.autograd.grad(each * 1024, x)
        assert grad.dtype == dtype and (grad.double() / 1024 - exact / 3).abs().max() < most * exact.abs().max()


@pytest.mark.parametrize("kind", ["joint", "separable"])
def test_what_a_run_learns_from(tmp_path, kind):
    """Truth with class weights, teachers of other shapes, and scenes, in float64 from the networks' logits."""
    bins = ColorBins(kind)
    files = [teacher(tmp_path / "1", 1, bins=bins), teacher(tmp_path / "2", 2, bins=bins, fusion=False, skip=True)]
    config = TrainConfig(bins=kind, teach=0.3, rebalance=0.5, degrade=1.0, class_weight=0.1)
    task = keep_statistics(ColorTask(config, ("a", "b")).train())
    prior = torch.rand(bins.count, dtype=torch.float64)
    for place, _ in bins.groups():
        prior[place] /= prior[place].sum()
    task.set_prior(prior)
    task.teachers = Teachers(files, bins, "fp32", CPU)
    rgb, seeds, labels = crops(), torch.arange(6), torch.tensor([0, 1] * 3)
    found = task(rgb, seeds, labels).item()

    L, ab = split_lab(rgb, 4)
    seen = degrade(rgb, L, seeds, task.film)
    assert not torch.equal(seen, L)
    with torch.no_grad():
        output, scores = task.network.forward_with_classes(seen)
        theirs = [load_checkpoint(file).network(L).double() for file in files]  # they see no film
    truth = reference.color_cross_entropy(output.double(), ab.double(), bins, task.weights.double())
    soft = 0.0
    for place, _ in bins.groups():
        mean = sum(x[:, place].softmax(1) for x in theirs) / 2
        soft -= (mean * output.double()[:, place].log_softmax(1)).sum(1).mean()
    scene = F.cross_entropy(scores.double(), labels)
    assert found == pytest.approx((0.7 * truth + 0.3 * soft + 0.1 * scene).item(), rel=1e-5)
    # what is validated is compared between runs: teachers have no part in it
    loss = task.eval().loss(rgb)[0].item()
    task.teachers = None
    assert loss == task.loss(rgb)[0].item()


def test_nobody_learns_from_oneself(tmp_path):
    file = teacher(tmp_path / "me", 1)
    task = ColorTask(TrainConfig(teach=1.0, init=file), ())
    task.start(task.config)
    keep_statistics(task).network.to(memory_format=torch.channels_last)  # as of a run, and of teachers
    gradients = []
    for other in (file, teacher(tmp_path / "other", 2)):
        task.teachers = Teachers([other], task.bins, "fp32", CPU)
        kept = []
        hook = task.network.head.register_forward_hook(lambda *call, kept=kept: kept.append(call[2]))
        loss = task(crops(), torch.zeros(6), torch.zeros(6))
        (grad,) = torch.autograd.grad(loss, kept)
        gradients.append(grad.abs().max().item())
        hook.remove()
    assert gradients[0] < 1e-5 * gradients[1]


def test_teachers_stay_as_they_are(photos, tmp_path):
    """They are no part of what is learned, averaged or saved."""
    file = teacher(tmp_path / "t", 1)
    run = Run(photos, replace(TINY, accumulate=2, teachers=file, out=str(tmp_path / "run")), Silent())
    (network,) = run.task.teachers.networks
    before = copy.deepcopy(network.state_dict())
    assert any("running_mean" in name for name in before)
    plain = Run(photos, replace(TINY, out=str(tmp_path / "plain")), Silent())
    assert {n for n, _ in run.task.named_parameters()} == {n for n, _ in plain.task.named_parameters()}
    assert run.task.state_dict().keys() == plain.task.state_dict().keys()
    assert run.average.module.teachers is run.task.teachers  # not copied
    assert run.train_epoch(Stop())
    assert not network.training and all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    run.save_model()
    assert "teachers" not in load_checkpoint(run.out / "model.safetensors").notes["options"]  # no paths in it


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"precision": "bf16", "bins": "separable"}], ids=str)
def test_comes_nearer_to_its_teacher(photos, tmp_path, options):
    file = teacher(tmp_path / "t", 1, bins=ColorBins(options.get("bins", "joint")))
    config = replace(TINY, epochs=2, lr=5e-3, teachers=file, teach=1.0, out=str(tmp_path / "run"), **options)
    first, last = train(photos, config).history
    assert last["loss"] < 0.97 * first["loss"]


def test_resumes_exactly_and_knows_its_teachers(photos, tmp_path):
    files = [teacher(tmp_path / "1.safetensors", 1), teacher(tmp_path / "2.safetensors", 2, skip=True)]
    options = {"epochs": 1, "teachers": ", ".join(files), "degrade": 0.5}
    recorder = Recorder()
    whole = train(photos, replace(TINY, out=str(tmp_path / "whole"), **options), recorder)
    assert f"teachers: {files[0]}, {files[1]}; their share of the loss is 0.5" in recorder.lines
    config = replace(TINY, out=str(tmp_path / "parts"), **options)
    assert not train(photos, config, Recorder(stop_after=2)).finished  # of three steps
    resumed = replace(config, resume="yes")
    for change, message in (({"teach": 0.7}, "teach was 0.5, is 0.7"), ({"teachers": files[0]}, "teachers was ")):
        with pytest.raises(TrainingError, match=f"cannot resume with other options: {message}"):
            train(photos, replace(resumed, **change))
    shutil.move(files[1], tmp_path / "kept")
    shutil.copy(files[0], files[1])
    with pytest.raises(TrainingError, match="cannot resume, the teacher .*2.safetensors is not the one of the run"):
        train(photos, resumed)
    shutil.move(tmp_path / "kept", files[1])
    parts = train(photos, resumed)
    assert parts.finished
    for ours, theirs in zip(parts.history, whole.history, strict=True):
        assert {**ours, "images_per_second": 0} == {**theirs, "images_per_second": 0}
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True)["network"] for name in ("whole", "parts")]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_compiled_with_teachers(photos, tmp_path, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="aot_eager", **options))
    config = replace(TINY, epochs=1, teachers=teacher(tmp_path / "t", 1))
    plain, fast = (
        train(photos, replace(config, compile=on, out=str(tmp_path / f"{on}"))).history[0] for on in (False, True)
    )
    assert fast["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_dry_run_counts_their_weights(photos, tmp_path):
    file = teacher(tmp_path / "t", 1)
    size = Teachers([file, file], ColorBins(), "fp32", CPU).bytes
    assert size == 2 * sum(4 * p.numel() for p in load_checkpoint(file).network.parameters())
    said = Recorder()
    dry_run(photos, replace(TINY, teachers=f"{file},{file}", out=str(tmp_path / "run")), said)
    assert f"teachers {size / 2**20:.0f} MB, 4 crops of 64 pixels" in "\n".join(said.lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teach": 1.5}, "teach must be between 0 and 1, got 1.5"),
        ({"teachers": "a,,b"}, "teachers must be files with commas between them, got 'a,,b'"),
        ({"teachers": "a", "task": "classify"}, "teachers need task color, got classify"),
        ({"teachers": "a", "head": "regression"}, "teachers need head distribution, got regression"),
        ({"teachers": "a", "mrf_sweeps": 2}, "teachers need mrf_sweeps 0, got 2"),
    ],
)
def test_options_that_no_teacher_can_follow(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TrainConfig(), **change).check()


def test_files_that_cannot_teach(photos, tmp_path):
    own = ColorBins("joint", [[0, 0], [50, 50]])
    (tmp_path / "broken").write_text("no weights")
    for file, message in (
        (str(tmp_path / "none"), "none: no such weights file"),
        (str(tmp_path / "broken"), "broken: not a readable fastcolor checkpoint"),
        (teacher(tmp_path / "ab", 1, head="regression"), "ab: a teacher must have head .*313.*, got head regression"),
        (teacher(tmp_path / "two", 1, bins=own), "two: a teacher must have head .*313 labels.*, got .* 2 labels"),
        (teacher(tmp_path / "axes", 1, bins=ColorBins("separable")), "axes: .* got .*'separable', 50 labels"),
        (teacher(tmp_path / "field", 1, mrf=FIELD), "field: a teacher must be trained as a network alone"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(photos, replace(TINY, teachers=file, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
