"""color_cross_entropy against a naive loop in float64."""

from __future__ import annotations

import math

import pytest
import torch

import fastcolor
from fastcolor import ColorBins


def naive(logits, ab, bins, weights=None, ignore=None, neighbors=5, sigma=5.0):
    """From the formula, a pixel and a label at a time: [B, H, W]."""
    batch, _, height, width = logits.shape
    losses = torch.zeros(batch, height, width, dtype=torch.float64)
    for i in range(batch):
        for y in range(height):
            for x in range(width):
                if ignore is not None and ignore[i, y, x]:
                    continue
                for axis, (place, centers) in enumerate(bins.groups()):
                    u = logits[i, place, y, x].tolist()
                    color = ab[i, :, y, x].tolist() if bins.kind == "joint" else [ab[i, axis, y, x].item()]
                    squared = [sum((c - v) ** 2 for c, v in zip(row, color, strict=True)) for row in centers.tolist()]
                    order = sorted(range(len(u)), key=lambda k: (squared[k], k))
                    near = order[:neighbors] if bins.kind == "joint" else order[:1]
                    p = [math.exp(-(squared[k] - squared[near[0]]) / (2 * sigma**2)) for k in near]
                    top = max(u)
                    norm = top + math.log(sum(math.exp(v - top) for v in u))
                    loss = norm - sum(p_k / sum(p) * u[k] for p_k, k in zip(p, near, strict=True))
                    w = 1.0 if weights is None else weights[place][near[0]].item()
                    losses[i, y, x] += w * loss
    return losses


def problem(kind, shape=(2, 3, 5), dtype=torch.float64):
    bins = ColorBins(kind)
    logits = torch.randn(shape[0], bins.count, *shape[1:], dtype=torch.float64) * 3
    ab = torch.randn(shape[0], 2, *shape[1:], dtype=torch.float64) * 45  # some beyond the gamut
    return bins, logits.to(dtype), ab.to(dtype)


@pytest.mark.parametrize("kind", ["joint", "separable"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_naive_loop(kind, weighted, masked):
    bins, logits, ab = problem(kind)
    weights = torch.rand(bins.count, dtype=torch.float64) + 0.5 if weighted else None
    ignore = torch.rand(2, 3, 5) < 0.4 if masked else None
    expected = naive(logits, ab, bins, weights, ignore)
    options = {"bins": bins, "weights": weights, "ignore": ignore}
    assert torch.allclose(fastcolor.color_cross_entropy(logits, ab, reduction="none", **options), expected, rtol=1e-12)
    assert fastcolor.color_cross_entropy(logits, ab, reduction="sum", **options).item() == pytest.approx(expected.sum())
    counted = 30 if ignore is None else (~ignore).sum().item()
    mean = fastcolor.color_cross_entropy(logits, ab, **options)
    assert mean.item() == pytest.approx(expected.sum().item() / counted)


@pytest.mark.parametrize("neighbors", [1, 3, 10])
def test_neighbors_and_sigma(neighbors):
    bins, logits, ab = problem("joint")
    expected = naive(logits, ab, bins, neighbors=neighbors, sigma=8.0)
    options = {"neighbors": neighbors, "sigma": 8.0, "reduction": "none"}
    assert torch.allclose(fastcolor.color_cross_entropy(logits, ab, **options), expected, rtol=1e-12)


def test_gradient_is_softmax_minus_target():
    bins, logits, ab = problem("joint")
    logits.requires_grad_()
    weights = torch.rand(313, dtype=torch.float64) + 0.5
    fastcolor.color_cross_entropy(logits, ab, weights=weights, reduction="sum").backward()
    from fastcolor.bins import soft_encode

    index, p = soft_encode(bins, ab.movedim(1, -1))
    target = torch.zeros(2, 3, 5, 313, dtype=torch.float64).scatter(-1, index[0], p[0]).movedim(-1, 1)
    w = weights[index[0, ..., 0]][:, None]
    assert torch.allclose(logits.grad, w * (logits.softmax(1) - target).detach(), atol=1e-12)


def test_gradcheck():
    bins = ColorBins(centers=[[0, 0], [10, 0], [0, 10], [10, 10], [-10, 0], [0, -10]])
    logits = torch.randn(1, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    ab = torch.randn(1, 2, 2, 2, dtype=torch.float64) * 10
    assert torch.autograd.gradcheck(lambda u: fastcolor.color_cross_entropy(u, ab, bins=bins), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_types(dtype):
    bins, logits, ab = problem("joint", dtype=dtype)
    loss = fastcolor.color_cross_entropy(logits, ab)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive(logits.double(), ab.double(), bins).mean().item(), rel=1e-5)


def test_extreme_logits_and_layouts():
    bins, logits, ab = problem("joint", dtype=torch.float32)
    logits = (logits * 1e4).to(memory_format=torch.channels_last)
    loss = fastcolor.color_cross_entropy(logits, ab.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2))
    assert loss.isfinite() and loss.item() == pytest.approx(
        naive(logits.double(), ab.double(), bins).mean().item(), rel=1e-5
    )


def test_ignored_nan_does_not_leak():
    _, logits, ab = problem("joint")
    ignore = torch.zeros(2, 3, 5, dtype=torch.bool)
    ignore[0, 0, 0] = True
    clean = fastcolor.color_cross_entropy(logits, ab, ignore=ignore)
    ab[0, :, 0, 0] = float("nan")
    assert fastcolor.color_cross_entropy(logits, ab, ignore=ignore).item() == pytest.approx(clean.item())


def test_empty_batch():
    loss = fastcolor.color_cross_entropy(torch.zeros(0, 313, 2, 2), torch.zeros(0, 2, 2, 2), reduction="sum")
    assert loss.item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(1, 12, 2, 2)}, r"logits must have shape \[B, 313, H, W\] .* got \[1, 12, 2, 2\]"),
        ({"ab": torch.zeros(1, 2, 2, 3)}, r"ab must have shape \[1, 2, 2, 2\], got \[1, 2, 2, 3\]"),
        ({"weights": torch.ones(2)}, r"weights must have shape \[313\], got \[2\]"),
        ({"ignore": torch.zeros(1, 2, 2)}, "ignore must be bool"),
        ({"reduction": "max"}, "reduction must be one of mean, sum, none; got 'max'"),
        ({"sigma": 0.0}, "sigma at least 1e-06"),
    ],
)
def test_errors(change, message):
    arguments = {"logits": torch.zeros(1, 313, 2, 2), "ab": torch.zeros(1, 2, 2, 2), **change}
    with pytest.raises(ValueError, match=message):
        fastcolor.color_cross_entropy(arguments.pop("logits"), arguments.pop("ab"), **arguments)


def test_type_errors():
    with pytest.raises(TypeError, match="logits must be a floating tensor, got torch.int64"):
        fastcolor.color_cross_entropy(torch.zeros(1, 313, 1, 1, dtype=torch.int64), torch.zeros(1, 2, 1, 1))


def test_reference_compiles_whole():
    logits, ab = torch.randn(1, 313, 3, 4, dtype=torch.float64), torch.randn(1, 2, 3, 4, dtype=torch.float64) * 40
    compiled = torch.compile(fastcolor.color_cross_entropy, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(logits, ab), fastcolor.color_cross_entropy(logits, ab))


@pytest.mark.parametrize("sigma", [1e-6, 1e200])
def test_extreme_widths(sigma):
    logits, ab = torch.randn(1, 313, 3, 4), torch.randn(1, 2, 3, 4) * 40
    loss = fastcolor.color_cross_entropy(logits, ab, sigma=sigma)
    exact = fastcolor.color_cross_entropy(logits.double(), ab.double(), sigma=sigma)
    assert torch.allclose(loss.double(), exact, rtol=1e-4)
