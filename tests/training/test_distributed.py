"""Two processes, talking by gloo, against one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

from fastcolor.training.config import TrainConfig
from fastcolor.training.data import EpochBatches, find_photos
from fastcolor.training.distributed import ALONE, SharedBatchNorm2d, share_norms, team
from fastcolor.training.loop import train
from fastcolor.training.report import Silent, Stop
from fastcolor.training.run import Run
from fastcolor.training.sources import pack

# a low rate: Adam's first steps are signs of gradients, and magnify their last bits
TINY = TrainConfig(size=64, epochs=2, batch_size=4, lr=1e-4, warmup=0, workers=0, device="cpu", val_share=0.25)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(data, config, tmp_path, *arguments, processes=2):
    path = tmp_path / "two.json"
    path.write_text(json.dumps(asdict(config)))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes,
        "-m", "fastcolor", "train", data, "--config", path, *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"epochs": 1, "degrade": 0.5, "classes": "folders", "clip": 1.0, "mrf_sweeps": 1}], ids=str
)
def test_two_processes_train_as_one(photos, tmp_path, options):
    """The same images, losses and steps; batch normalization is over the images of both."""
    if options:
        files = find_photos(photos)[0]
        photos, root = tmp_path / "packed", photos
        assert pack({"all": files}, root, photos, 72).finished
    one = train(photos, replace(TINY, out=str(tmp_path / "one"), **options))
    process = torchrun(photos, replace(TINY, out=str(tmp_path / "two"), **options), tmp_path)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("epoch 1: loss") == 1 and output.count("is ready") == 1  # the first process speaks for both
    two = [json.loads(line) for line in (tmp_path / "two" / "history.jsonl").read_text().splitlines()]
    for ours, theirs in zip(two, one.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for name in ("val_loss", "val_psnr", "val_colorfulness"):
            assert ours[name] == pytest.approx(theirs[name], rel=5e-4), name


@pytest.mark.parametrize("ema", [0.5, pytest.param(0.0, marks=pytest.mark.slow)])
def test_all_validate_what_is_saved(photos, tmp_path, ema):
    """Also where each process normalizes its own images: the statistics are those of the file, not its own."""
    config = replace(TINY, epochs=1, lr=5e-3, batch_size=3, ema=ema, sync_norm=False, out=str(tmp_path / "run"))
    process = torchrun(photos, config, tmp_path)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    (entry,) = (json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines())
    found, _ = Run(photos, replace(config, resume="yes"), Silent()).validate(Stop())
    for name in ("val_loss", "val_psnr", "val_colorfulness"):
        assert entry[name] == pytest.approx(found[name], rel=1e-6), name


def test_one_signal_stops_all_and_one_process_goes_on(photos, tmp_path):
    config = replace(TINY, epochs=200, batch_size=2, out=str(tmp_path / "run"), resume="auto")
    process = torchrun(photos, config, tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "history.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C reaches them; torchrun then sends them SIGTERM
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "--resume goes on from here" in output, output
    epochs = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["progress"]["epoch"] + 1
    # where a run stands does not depend on the number of processes
    assert train(photos, replace(config, epochs=epochs)).finished


@pytest.mark.slow
def test_errors_come_from_the_first_process_once(photos, tmp_path):
    process = torchrun(photos, replace(TINY, batch_size=1, out=str(tmp_path / "run")), tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "2 processes with 1 pieces each need 2 at least, got 1" in output
    assert sum(line.startswith("error: ") for line in output.splitlines()) == 1


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 11, 16])
def test_every_image_counts_once(count):
    """Whatever the number of processes and pieces: together they go through the steps of one."""
    whole = EpochBatches(count, 3, 8)
    for world, pieces in ((1, 3), (2, 1), (3, 2)):
        parts = [EpochBatches(count, 3, 8, rank, world, pieces) for rank in range(world)]
        lists = [list(part) for part in parts]
        assert len({len(each) for each in lists}) == 1 and [len(each) for each in lists] == [len(p) for p in parts]
        iterators = [iter(each) for each in lists]
        for step, expected in enumerate(whole):
            weights = {}
            for part, iterator in zip(parts, iterators, strict=True):
                for stands_for in part.counts(step):
                    keys = next(iterator)
                    for key in keys:
                        weights[key] = weights.get(key, 0) + stands_for / len(keys)
            assert sorted(weights) == sorted(expected)
            assert all(w == pytest.approx(1) for w in weights.values())


def test_an_epoch_goes_on_at_any_step():
    batches = EpochBatches(11, 3, 4, rank=1, world=2, pieces=2)
    batches.epoch = 5
    whole = list(batches)
    batches.start = 1
    assert list(batches) == whole[len(batches.counts(0)) :] and len(batches) == len(list(batches))


def test_alone_nothing_is_asked():
    x = torch.ones(3)
    assert ALONE.sum(x) is x and ALONE.gather(4) == [4] and ALONE.share(lambda: 5) == 5 and ALONE.lead
    assert ALONE.device("auto") == "auto"


def norms_of(rank, port, x, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    with team() as members:
        norm = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
        share_norms(norm, torch.device("cpu"))
        assert isinstance(norm[0], SharedBatchNorm2d)
        own = (x[:3] if rank == 0 else x[3:]).clone().requires_grad_()
        out = norm(own)
        (out**3).sum().backward()
        for parameter in norm.parameters():
            members.sum(parameter.grad)
        found = out, own.grad, norm[0].weight.grad, norm[0].running_mean, norm[0].running_var
        results.put((rank, [t.detach().numpy() for t in found]))


@pytest.mark.slow  # test_two_processes_train_as_one has it inside
def test_shared_normalization_is_that_of_all_images():
    x = torch.randn(5, 3, 4, 6) * 2 + 1
    norm, whole = torch.nn.BatchNorm2d(3), x.clone().requires_grad_()
    out = norm(whole)
    (out**3).sum().backward()
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=norms_of, args=(rank, port, x, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in range(2))
    for process in processes:
        process.join(30)
    parts = [[torch.from_numpy(t) for t in found[rank]] for rank in range(2)]
    for i, expected in enumerate((out, whole.grad)):
        assert torch.allclose(torch.cat([parts[0][i], parts[1][i]]), expected, atol=1e-4)
    for i, expected in ((2, norm.weight.grad), (3, norm.running_mean), (4, norm.running_var)):
        for part in parts:
            assert torch.allclose(part[i], expected, rtol=1e-4, atol=1e-5)
