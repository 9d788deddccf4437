"""The benchmark of training compares what does the same: losses agree, every stage is timed, every photo is used."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("PIL")

from benchmarks import training
from fastcolor.model.network import ColorNetwork


def test_pipelines_do_the_same(monkeypatch):
    monkeypatch.setattr(training, "PHOTO", (120, 90))
    options = SimpleNamespace(workers=0, device="cpu", data=None, quick=False)
    with training.pipelines(64, 2, 4, options) as made:
        assert made.pop("difference") <= training.LOSS_BOUND
        assert set(made) == {f"fastcolor, {s}, {p}" for s in ("pack", "JPEG") for p in ("bf16", "fp32")} | {
            "reference pipeline, JPEG, fp32"
        }
        for name in ("fastcolor, JPEG, fp32", "reference pipeline, JPEG, fp32"):
            pipeline = made[name]
            before = [p.clone() for p in pipeline.network_parameters()]
            pipeline.epoch()
            assert not all(torch.equal(a, b) for a, b in zip(before, pipeline.network_parameters(), strict=True))
            steps = list(pipeline.stages())
            assert len(steps) == 2 and all(set(s) == set(training.STAGES) for s in steps)
            shares = training.shares(pipeline)
            assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
            assert training.loading(pipeline) > 0


def test_a_loss_that_is_off_is_seen(tmp_path, monkeypatch):
    training.lay_out(tmp_path, 2, None)
    network = ColorNetwork()
    assert training.loss_difference(network, tmp_path, 64) <= training.LOSS_BOUND
    dense = training.dense_targets
    monkeypatch.setattr(training, "dense_targets", lambda ab: dense(ab + 10))
    torch.nn.init.normal_(network.head.weight, std=0.3)
    assert training.loss_difference(network, tmp_path, 64) > training.LOSS_BOUND
