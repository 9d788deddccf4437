"""The mean field on a CUDA device: the backends cuda and triton against the float64 reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import available
from test_mean_field import JOINT, SEPARABLE, SMALL, SMALL_AXES, largest, problem, relative, symmetric

import fastcolor
from fastcolor.ops import _backend
from fastcolor.ops import mean_field as op
from fastcolor.ops.mean_field import annealed_mean, mean_field

pytestmark = pytest.mark.gpu

LAYOUTS = (torch.contiguous_format, torch.channels_last)
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def on(name):
    there = any(b.device == "cuda" for b in available(name)) and torch.cuda.is_available()
    return pytest.param(name, marks=pytest.mark.skipif(not there, reason=f"no backend {name!r} on a device"))


@pytest.fixture(params=[on("cuda"), on("triton")])
def backend(request):
    with fastcolor.use_backend(request.param):
        yield request.param


def exactly(function, *arguments, **options):
    with fastcolor.use_backend("reference"):
        return function(*arguments, **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("schedule", op.SCHEDULES)
@pytest.mark.parametrize("name, bins, shape", [
    ("quadratic", JOINT, (2, 313, 17, 24)), ("quadratic", JOINT, (1, 313, 1, 1)), ("quadratic", SMALL, (3, 5, 33, 65)),
    ("steps", SEPARABLE, (2, 50, 13, 8)), ("quadratic", SEPARABLE, (2, 50, 16, 16)), ("potts", None, (2, 21, 7, 40)),
    ("matrix", SMALL_AXES, (2, 8, 9, 11)), ("potts", None, (1, 1, 5, 6)),
], ids=str)  # fmt: skip
def test_matches_float64(backend, name, bins, shape, schedule, dtype):
    logits, guide = (x.cuda() for x in problem(shape, dtype=dtype))
    guide = guide.float()
    similarity = symmetric(shape[1], scale=0.5).cuda().float() if name == "matrix" else name
    for damping, start in ((0.0, "softmax"), (0.4, "uniform")):
        options = {
            "similarity": similarity, "bins": bins, "schedule": schedule, "damping": damping, "start": start,
            "weight": 0.2, "sweeps": 3,
        }  # fmt: skip
        exact = exactly(mean_field, logits.double(), guide.double(), **options)
        for layout in LAYOUTS:
            q = mean_field(logits.contiguous(memory_format=layout), guide, **options)
            assert q.dtype == dtype and largest(q, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("neighborhood", op.NEIGHBORHOODS)
@pytest.mark.parametrize("radius, dilation", [(1, 1), (3, 2), (9, 1), (40, 1)])
def test_neighborhoods(backend, radius, dilation, neighborhood):
    logits, guide = (x.float().cuda() for x in problem((2, 6, 21, 34)))
    options = {"similarity": "potts", "radius": radius, "dilation": dilation, "neighborhood": neighborhood}
    options |= {"weight": 0.1, "sweeps": 3}
    exact = exactly(mean_field, logits.double(), guide.double(), **options)
    assert largest(mean_field(logits, guide, **options), exact) <= 5e-6


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 16, 32, 64])
def test_ranks(backend, rank):
    logits, guide = (x.float().cuda() for x in problem((2, 70, 12, 19)))
    pair = tuple((torch.randn(70, rank) * 0.4 / rank**0.5).cuda() for _ in "ab")
    exact = exactly(mean_field, logits.double(), guide.double(), similarity=pair, sweeps=2)
    assert largest(mean_field(logits, guide, similarity=pair, sweeps=2), exact) <= 5e-6


@pytest.mark.parametrize("shape", [(40, 313, 64, 64), (1, 313, 480, 270), (3, 313, 131, 257)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_large(backend, shape, layout):
    """Several groups of images, and images that do not fit in shared memory; twice, for races."""
    logits = (2 * torch.randn(shape, device="cuda")).bfloat16().contiguous(memory_format=layout)
    guide = 100 * torch.rand(shape[0], 1, *shape[2:], device="cuda")
    options = {"weight": 0.02, "sweeps": 8}
    q = mean_field(logits, guide, **options)
    assert torch.equal(q, mean_field(logits, guide, **options))
    some = slice(None, None, max(1, shape[0] - 1))
    exact = exactly(mean_field, logits[some].float(), guide[some], **options)
    assert largest(q[some], exact) <= 2**-8
    ab = op.mean_field_annealed(logits, guide, **options)
    assert largest(ab[some], annealed_mean(exact.double())) <= 0.05


def gradients(run, tensors, upstream):
    tensors = [x.detach().requires_grad_() for x in tensors]
    q = run(*tensors)
    (q * upstream.to(q)).sum().backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]


@pytest.mark.parametrize("schedule, damping, start", [
    ("parallel", 0.0, "softmax"), ("parallel", 0.3, "uniform"), ("checkerboard", 0.4, "uniform"),
])  # fmt: skip
@pytest.mark.parametrize("name, bins, shape", [
    ("quadratic", JOINT, (2, 313, 9, 16)), ("steps", SMALL_AXES, (2, 8, 15, 27)), ("pair", None, (3, 37, 11, 12)),
    ("matrix", None, (2, 21, 9, 13)),
], ids=str)  # fmt: skip
def test_gradients(backend, name, bins, shape, schedule, damping, start):
    logits, guide = problem(shape, scale=1.5)
    labels = shape[1]
    factors = {"matrix": [symmetric(labels, scale=0.5)], "pair": list(0.4 * torch.randn(2, labels, 3).double())}
    previous = logits.flip(2).softmax(1)
    scalars = [torch.tensor(v, dtype=torch.float64) for v in (0.1, 1.7, 20.0, 0.5, 30.0)]
    inputs = [x.cuda() for x in (logits, guide, previous, guide + 3, *scalars, *factors.get(name, []))]
    upstream = torch.randn(shape, device="cuda", dtype=torch.float64)

    def run(u, g, q_before, g_before, weight, sigma_space, sigma_light, weight_time, sigma_time, *s):
        chosen = {"matrix": lambda: (s[0] + s[0].T) / 2, "pair": lambda: tuple(s)}.get(name, lambda: name)()
        return mean_field(
            u, g, similarity=chosen, bins=bins, gamma=30.0, sweeps=3, schedule=schedule, damping=damping, start=start,
            weight=weight, sigma_space=sigma_space, sigma_light=sigma_light, previous=(q_before, g_before),
            weight_time=weight_time, sigma_time=sigma_time,
        )  # fmt: skip

    exact = exactly(gradients, run, inputs, upstream)
    inputs = [x.float() for x in inputs]
    plain = exactly(gradients, run, inputs, upstream)
    for layout in LAYOUTS:
        inputs[0] = inputs[0].contiguous(memory_format=layout)
        for f, p, e in zip(gradients(run, inputs, upstream), plain, exact, strict=True):
            assert relative(f, e) <= max(2e-5, 10 * relative(p, e))


@pytest.mark.parametrize("shape", [(24, 313, 64, 64), (1, 313, 320, 200)], ids=str)
def test_gradients_of_large_batches(backend, shape):
    logits = (2 * torch.randn(shape, device="cuda")).bfloat16()
    guide = 100 * torch.rand(shape[0], 1, *shape[2:], device="cuda")
    upstream = torch.randn(shape, device="cuda").bfloat16()

    def run(u, g):
        return mean_field(u, g, weight=0.02, sweeps=3)

    fast = gradients(run, (logits, guide), upstream)
    exact = exactly(gradients, run, (logits[-1:].float(), guide[-1:]), upstream[-1:].float())
    assert relative(fast[0][-1:], exact[0]) <= 2**-6 and relative(fast[1][-1:], exact[1]) <= 2**-6


@pytest.mark.skipif(_backend.missing("cuda") is not None or _backend.missing("triton") is not None, reason="needs both")
def test_states_are_the_same_on_both():
    """Either backend runs the backward of the other."""
    logits, guide = (x.float().cuda() for x in problem((2, 21, 9, 13)))
    pair = [0.4 * torch.randn(21, 3, device="cuda") for _ in "ab"]
    grads = []
    for forward, backward in itertools.product(("cuda", "triton"), repeat=2):
        u = logits.clone().requires_grad_()
        with fastcolor.use_backend(forward):
            q = mean_field(u, guide, similarity=tuple(pair), schedule="checkerboard", damping=0.2)
        q.grad_fn.fixed = (*q.grad_fn.fixed[:-1], backward)
        q[:, ::2].sum().backward()
        grads.append(u.grad)
    for other in grads[1:]:
        assert relative(other, grads[0].double()) <= 1e-5


def test_nan_and_forbidden_labels(backend):
    logits, guide = (x.float().cuda() for x in problem((1, 19, 9, 9)))
    logits[0, 3] = -math.inf
    logits[0, 1, 4, 4] = math.nan
    for layout in LAYOUTS:
        q = mean_field(logits.contiguous(memory_format=layout), guide, similarity="potts", radius=1, sweeps=2)
        bad = q.isnan().any(1)[0]
        expected = torch.zeros(9, 9, dtype=torch.bool, device="cuda")
        expected[2:7, 2:7] = True
        assert torch.equal(bad, expected) and (q[0, 3][~bad] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0)], ids=str)
def test_empty(backend, shape):
    u = torch.empty(shape, device="cuda", requires_grad=True)
    mean_field(u, torch.empty(shape[0], 1, *shape[2:], device="cuda"), bins=SMALL).sum().backward()
    assert u.grad.shape == shape


def test_current_stream(backend):
    """The kernel waits for what was queued before it on its own stream, and for nothing else."""
    logits, guide = torch.zeros(2, 50, 64, 64, device="cuda"), torch.zeros(2, 1, 64, 64, device="cuda")
    run = {"bins": SEPARABLE, "similarity": "quadratic"}
    mean_field(logits, guide, **run)  # compiled and loaded
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mean_field(logits, guide, **run)  # its memory is allocated: an allocation waits for the device
        torch.cuda._sleep(2_000_000_000)  # clock cycles, about a second
        logits[:, 3].fill_(100.0)
        q = mean_field(logits, guide, **run)
        assert not stream.query()  # asynchronous, and queued here
    stream.synchronize()
    assert (q[:, 3] > 0.99).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_of_the_tensor(backend):
    logits, guide = (x.float().to("cuda:1") for x in problem((1, 5, 8, 9)))
    with torch.cuda.device(0):
        q = mean_field(logits, guide, bins=SMALL)
    assert q.device == logits.device
    assert largest(q, exactly(mean_field, logits.double(), guide.double(), bins=SMALL)) <= 5e-6


def test_compile_fullgraph(backend):
    logits, guide = (x.float().cuda() for x in problem((2, 5, 8, 9)))

    def run(u, g):
        return mean_field(u * 0.9, g, bins=SMALL, weight=0.2) * 2

    results = []
    for function in (run, torch.compile(run, fullgraph=True)):
        u = logits.clone().requires_grad_()
        q = function(u, guide)
        q[:, 1].sum().backward()
        results.append((q.detach(), u.grad))
    for eager, compiled in zip(*results, strict=True):
        assert relative(compiled, eager.double()) <= 1e-5


def test_cuda_graph(backend):
    logits, guide = (x.float().cuda() for x in problem((3, 313, 24, 40)))
    options = {"weight": 0.05, "sweeps": 4}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            mean_field(logits, guide, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = mean_field(logits, guide, **options)
    for seed in range(3):
        logits.copy_(problem((3, 313, 24, 40), seed=seed)[0])
        graph.replay()
        assert largest(q, exactly(mean_field, logits.double(), guide.double(), **options)) <= 5e-6


def test_auto_takes_the_fastest_that_is_there(backend):
    with fastcolor.use_backend("auto"):
        choice = _backend.choose("mean_field", torch.device("cuda"))
    assert choice.name == next(n for n in ("cuda", "triton") if _backend.missing(n) is None)
