"""The loss on a CUDA device: the backend triton against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from test_cross_entropy_triton import SPACES, assert_close, problem

import fastcolor
from fastcolor.ops import _backend
from fastcolor.reference import cross_entropy as reference

REASON = _backend.missing("triton") or _backend.runs_on("triton", torch.device("cuda"))
if REASON is None and not torch.cuda.is_available():  # the interpreter needs no device, these tests do
    REASON = "backend 'triton' on a device: torch sees none"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.mark.parametrize("last", [False, True], ids=["planes", "labels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SPACES)
def test_matches_float64(kind, dtype, last):
    bins = SPACES[kind]
    for shape in ((1, 1, 1), (2, 3, 13), (4, 64, 61)):
        logits, ab = (x.cuda() for x in problem(bins, shape, dtype, last))
        ignore = torch.rand(shape, device="cuda") < 0.3
        ignore[:, 0, 0] = False
        for reduction in ("mean", "sum", "none"):
            options = {"weights": torch.rand(bins.count, device="cuda") + 0.5, "ignore": ignore, "reduction": reduction}
            ours, exact = logits.detach().requires_grad_(), logits.double().requires_grad_()
            with fastcolor.use_backend("triton"):
                loss = fastcolor.color_cross_entropy(ours, ab, bins=bins, **options)
                loss.sum().backward()
            expected = reference.color_cross_entropy(exact, ab.double(), bins, **options)
            expected.sum().backward()
            if reduction == "sum":
                assert torch.allclose(loss.double(), expected, rtol=1e-5)
                loss = expected
            assert_close(loss, ours.grad, expected, exact.grad)


def test_is_captured_in_a_graph():
    logits, ab = (x.cuda() for x in problem(SPACES["joint"], (2, 16, 16)))
    logits.requires_grad_()

    def step():
        logits.grad = None
        loss = fastcolor.color_cross_entropy(logits, ab)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        logits.mul_(0.5)
    graph.replay()
    expected = reference.color_cross_entropy(logits.double(), ab.double(), SPACES["joint"])
    assert abs(loss.item() - expected.item()) <= 1e-4
