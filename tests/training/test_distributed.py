"""Two processes, talking by gloo, against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from fastcolor.training.config import TrainConfig
from fastcolor.training.loop import train

# beta1 and beta2 small: Adam's first steps are signs of gradients, and would magnify their last bits
TINY = TrainConfig(size=64, epochs=2, batch_size=4, lr=1e-3, warmup=0, workers=0, device="cpu", val_share=0.25)
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


@pytest.mark.parametrize("options", [{}, {"degrade": 0.5, "classes": "folders", "clip": 1.0, "mrf_sweeps": 1}], ids=str)
def test_two_processes_train_as_one(photos, tmp_path, options):
    """The same images, losses and steps; batch normalization is over the images of both."""
    one = train(photos, replace(TINY, out=str(tmp_path / "one"), **options))
    process = torchrun(photos, replace(TINY, out=str(tmp_path / "two"), **options), tmp_path)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("epoch 1: loss") == 1 and output.count("is ready") == 1  # the first process speaks for both
    two = [json.loads(line) for line in (tmp_path / "two" / "history.jsonl").read_text().splitlines()]
    for ours, theirs in zip(two, one.history, strict=True):
        for name in ("loss", "val_loss", "val_psnr", "val_colorfulness"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3), name
