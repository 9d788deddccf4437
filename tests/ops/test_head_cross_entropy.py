"""The last layer and the loss in one against the two apart."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import available
from torch.nn import functional as F

import fastcolor
from fastcolor import ColorBins

BACKENDS = available("cpp", "reference")


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    monkeypatch.setattr(sys.modules["fastcolor.ops.head_cross_entropy"], "FEWEST", 0)


def problem(bins, shape=(2, 5, 7), channels=6, dtype=torch.float32):
    features = torch.randn(shape[0], channels, *shape[1:]).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(bins.count, channels, 1, 1) * 0.5, torch.randn(bins.count)
    return features, weight, bias, torch.randn(shape[0], 2, *shape[1:]) * 40


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["joint", "separable"])
@pytest.mark.parametrize("masked", [False, True])
def test_is_the_two_operations(backend, kind, reduction, masked, monkeypatch):
    monkeypatch.setattr(
        sys.modules["fastcolor.ops.head_cross_entropy"], "_CHUNK", {4: 16}
    )  # several chunks, the last one part-filled
    bins = ColorBins(kind)
    inputs = [x.requires_grad_() for x in problem(bins)[:3]]
    ab = problem(bins)[3]
    options = {"bins": bins, "weights": torch.rand(bins.count) + 0.5, "reduction": reduction}
    if masked:
        options["ignore"] = torch.rand(2, 5, 7) < 0.4
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = fastcolor.color_cross_entropy(F.conv2d(*exact), ab.double(), **options)
    with fastcolor.use_backend(backend.name):
        loss = fastcolor.head_cross_entropy(*inputs, ab, **options)
        (3 * loss).backward()
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(inputs, exact, strict=True):
        assert ours.grad.shape == ours.shape and ours.grad.dtype == ours.dtype
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5 * theirs.grad.abs().max().item())


def test_nothing_to_count():
    *inputs, ab = problem(ColorBins())
    inputs = [x.requires_grad_() for x in inputs]
    loss = fastcolor.head_cross_entropy(*inputs, ab, ignore=torch.ones(2, 5, 7, dtype=torch.bool))
    loss.backward()
    assert loss.isnan() and all((x.grad == 0).all() for x in inputs)


def test_bfloat16_features_and_float32_weights():
    bins = ColorBins()
    features, weight, bias, ab = problem(bins, dtype=torch.bfloat16)
    features, weight = features.requires_grad_(), weight.requires_grad_()
    loss = fastcolor.head_cross_entropy(features, weight, None, ab)
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (features, weight.to(torch.bfloat16))]
    expected = fastcolor.color_cross_entropy(F.conv2d(*exact), ab.double())
    expected.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert features.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert (weight.grad - exact[1].grad).norm() < 0.02 * exact[1].grad.norm()


def test_without_a_gradient_and_of_nothing():
    features, weight, bias, ab = problem(ColorBins())
    expected = fastcolor.color_cross_entropy(F.conv2d(features, weight, bias), ab)
    assert fastcolor.head_cross_entropy(features, weight, bias, ab).item() == pytest.approx(expected.item(), rel=1e-6)
    weight.requires_grad_()
    loss = fastcolor.head_cross_entropy(features[:0], weight, bias, ab[:0], reduction="sum")
    loss.backward()
    assert loss.item() == 0 and (weight.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(12, 6)}, r"weight must have shape \[313, 6\] .* got \[12, 6\]"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \[313\], got \[3\]"),
        ({"ab": torch.zeros(1, 2, 5, 7)}, r"ab must have shape \[2, 2, 5, 7\], got \[1, 2, 5, 7\]"),
        ({"reduction": "none"}, "reduction must be one of mean, sum; got 'none'"),
        ({"ignore": torch.zeros(1, 5, 7, dtype=torch.bool)}, r"ignore must have shape \[2, 5, 7\], got \[1, 5, 7\]"),
    ],
)
def test_errors(change, message):
    features, weight, bias, ab = problem(ColorBins())
    arguments = {"features": features.requires_grad_(), "weight": weight, "bias": bias, "ab": ab, **change}
    with pytest.raises(ValueError, match=message):
        fastcolor.head_cross_entropy(**arguments)


def test_autocast_leaves_it_alone():
    """Sums over pixels in bfloat16 would lose what float32 features have."""
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        *inputs, ab = problem(ColorBins())
        inputs = [x.requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            fastcolor.head_cross_entropy(*inputs, ab).backward()
        found.append([x.grad for x in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
