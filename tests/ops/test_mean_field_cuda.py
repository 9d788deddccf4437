"""The CUDA kernels of the mean field, built for the CPU by tests/cuda_emulator: every path, without a GPU.

The device that the emulator shows is small, so that small images already take several blocks, several groups of images,
and tiles of one image that take turns in shared memory. What only a GPU can show is in test_mean_field_gpu.py.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
import torch
from fastcolor.kernels.field import Gradients, Problem
from fastcolor.kernels.memory import STORAGE
from test_mean_field import (
    JOINT,
    SEPARABLE,
    SMALL,
    SMALL_AXES,
    allowed,
    axes_of,
    largest,
    naive_mean_field,
    naive_similarity,
    problem,
    relative,
    symmetric,
)

import fastcolor
from fastcolor.ops import mean_field as op
from fastcolor.ops.mean_field import annealed_mean, mean_field

TESTS = Path(__file__).parents[1]
KERNELS = TESTS.parent / "kernels"
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(
    COMPILER is None or not KERNELS.exists(), reason="no g++, or the sources are not beside the tests"
)

LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Multiprocessors, and bytes of shared memory or how to choose them: "image" is as few as hold one image, so that a
# batch is visited in groups; "tile" as few as the kernel runs with, where the tiles of an image take turns.
DEVICES = {"one": (1, 200 << 10), "many": (3, 40 << 10), "groups": (3, "image"), "streaming": (2, "tile")}
# Float32 scores err by some 1e-7 of what is summed, and each sweep hands that on; 16 bits round the result.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
LARGEST_ERRORS = {}  # printed by `pytest -rP -k largest_errors`


class CProblem(ctypes.Structure):
    """MeanFieldProblem of kernels/cuda/mean_field.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p), ("storage", ctypes.c_int), ("labels_last", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("batch", "labels", "height", "width", "axes", "rank", "offsets")),
        ("reach_y", ctypes.c_int64), ("reach_x", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("whole", "a", "b", "guide", "space", "sharpness", "prior")),
        ("sweeps", ctypes.c_int64), ("checkerboard", ctypes.c_bool), ("damping", ctypes.c_float),
        ("uniform", ctypes.c_bool),
    ]  # fmt: skip


class CGradients(ctypes.Structure):
    """MeanFieldGradients of kernels/cuda/mean_field.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in Gradients._fields]


class Emulator:
    """The host's entry points, called as fastcolor.ops.mean_field calls those of fastcolor._cuda."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        for name in ("scratch", "resident_pixels"):
            getattr(self.library, name).restype = ctypes.c_int64
        self.division = {}  # of the last call

    def set_device(self, multiprocessors: int, shared: int | str, seed: int = 0) -> None:
        self.device = multiprocessors, shared, seed
        if not isinstance(shared, str):
            self.library.set_device(multiprocessors, shared, seed)

    def problem(self, p: Problem) -> CProblem:
        self.whole = torch.tensor([*p.counts, *p.dy, *p.dx], dtype=torch.int32)
        batch, labels, height, width = p.logits.shape
        reach = [max(map(abs, steps), default=0) for steps in (p.dy, p.dx)]
        self.native = CProblem(
            p.logits.data_ptr(), STORAGE[p.logits.dtype], p.labels_last, batch, labels, height, width,
            len(p.counts), p.a.shape[1], len(p.dy), *reach, self.whole.data_ptr(), p.a.data_ptr(), p.b.data_ptr(),
            p.guide.data_ptr(), p.space.data_ptr(), p.sharpness.data_ptr(), op._address(p.prior), p.sweeps,
            p.checkerboard, p.damping, p.uniform,
        )  # fmt: skip
        return self.native

    def _scratch(self, native, *options) -> torch.Tensor:
        return torch.full((self.library.scratch(ctypes.byref(native), *options),), math.nan)

    def _divide(self, native, backward: int) -> None:
        """How the work is divided among blocks, with as much shared memory as the device is to have."""
        numbers = (ctypes.c_int64 * 6)()
        multiprocessors, shared, seed = self.device
        sizes = range(2048, 256 << 10, 256) if isinstance(shared, str) else [shared]
        for size in sizes:
            self.library.set_device(multiprocessors, size, seed)
            if self.library.division(ctypes.byref(native), backward, numbers) == 0:
                names = ("threads", "blocks", "groups", "pixels", "tile", "vectors")
                self.division = dict(zip(names, numbers, strict=True))
                if shared != "image" or self.division["pixels"] <= self.division["tile"]:
                    return
        raise AssertionError("the device is too small")

    def forward(self, p: Problem, marginals, colors, temperature, ab, states) -> None:
        native = self.problem(p)
        if p.logits.numel():
            self._divide(native, 0)
        scratch = self._scratch(native, states is not None, 0)
        addresses = [ctypes.c_void_p(op._address(x)) for x in (marginals, colors, ab, states, scratch)]
        assert (
            self.library.forward_pass(ctypes.byref(native), *addresses[:2], ctypes.c_float(temperature), *addresses[2:])
            == 0
        )

    def backward(self, p: Problem, grad, states, to: Gradients) -> None:
        native = self.problem(p)
        if p.logits.numel():
            self._divide(native, 1)
        scratch = self._scratch(native, 0, 1)
        to = CGradients(*map(op._address, to))
        assert self.library.backward_pass(
            ctypes.byref(native), ctypes.c_void_p(grad.data_ptr()), ctypes.c_void_p(states.data_ptr()),
            ctypes.byref(to), ctypes.c_void_p(scratch.data_ptr()),
        ) == 0  # fmt: skip


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    to = tmp_path_factory.mktemp("emulator") / "mean_field.so"
    command = [
        COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
        f"-I{TESTS / 'cuda_emulator'}", f"-I{KERNELS}", *os.environ.get("FASTCOLOR_EMULATOR_FLAGS", "").split(),
        str(TESTS / "cuda_emulator" / "mean_field.cpp"), "-o", str(to),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    return to


@pytest.fixture(params=DEVICES)
def emulator(request, library, monkeypatch):
    """fastcolor with the backend "cuda", on CPU tensors."""
    emulator = Emulator(library)
    emulator.set_device(*DEVICES[request.param], seed=zlib.crc32(request.node.name.encode()))
    monkeypatch.setattr(op, "_chosen", lambda device, forced: "reference" if "reference" in forced else "cuda")
    monkeypatch.setattr(
        op, "_kernels", lambda problem, backend, backward=False: emulator.backward if backward else emulator.forward
    )
    return emulator


def record(group: str, error: float) -> float:
    LARGEST_ERRORS[group] = max(LARGEST_ERRORS.get(group, 0.0), error)
    return error


def check(group, logits, guide, similarity="potts", gamma=10.0, bins=None, layouts=LAYOUTS, tolerance=None, **options):
    """Against the naive loop in float64, on the same rounded inputs."""
    if isinstance(similarity, str):
        s = naive_similarity(similarity, logits.shape[1], bins, gamma)
    else:
        similarity = similarity.float()
        s = similarity.double().numpy()
    if logits.dtype == torch.float64:
        logits = logits.float()
    exact = naive_mean_field(logits, guide.float(), s, bins, **options)
    for layout in layouts:
        u, g = logits.contiguous(memory_format=layout), guide.float()
        q = mean_field(u, g, similarity=similarity, gamma=gamma, bins=bins, **options)
        assert q.dtype == logits.dtype
        assert record(f"{group}, {str(q.dtype)[6:]}", largest(q, exact)) <= (tolerance or TOLERANCE[q.dtype])
    return q


@pytest.mark.parametrize("schedule", op.SCHEDULES)
@pytest.mark.parametrize(
    "shape", [(1, 3, 1, 1), (2, 3, 1, 7), (1, 4, 5, 1), (3, 3, 5, 3), (1, 1, 3, 4), (2, 2, 7, 5), (2, 3, 8, 8)], ids=str
)
def test_shapes(emulator, shape, schedule):
    logits, guide = problem(shape)
    for neighborhood in op.NEIGHBORHOODS:
        check("shapes", logits, guide, neighborhood=neighborhood, schedule=schedule, sweeps=3)
    check("shapes", logits, guide, symmetric(shape[1]), schedule=schedule, sweeps=2)


def test_division(emulator, request):
    """The devices of these tests do send the kernel down all of its ways."""
    logits, guide = problem((6, 37, 8, 16), dtype=torch.float16)
    pair = tuple(0.1 * symmetric(37)[:, :3] for _ in "ab")
    results = []
    for name, cast in (("reference", lambda x: x.double()), ("auto", lambda x: x)):
        u, g = (cast(x).detach().requires_grad_() for x in (logits, guide))
        with fastcolor.use_backend(name):
            q = mean_field(u, g, similarity=pair, sweeps=2, radius=1)
            if name == "auto":
                assert emulator.division["threads"] > 32 or "one" not in request.node.name, emulator.division
                forward = emulator.division
            q[:, ::2].sum().backward()
        results.append((q.detach(), u.grad, g.grad))
    for exact, fast in zip(*results, strict=True):
        assert relative(fast, exact) <= 2e-3
    expected = {
        "one": {"groups": 1, "blocks": 2},
        "many": {"groups": 1, "blocks": 6},
        "groups": {"groups": 6},
        "streaming": {"groups": 1},
    }[request.node.callspec.params["emulator"]]
    for name, value in expected.items():
        assert forward[name] == value, forward
    assert (forward["tile"] < forward["pixels"]) == ("streaming" in request.node.name)
    for shape, layout, vectors in (((1, 3, 4, 8), 0, 1), ((1, 3, 3, 5), 0, 0), ((1, 3, 4, 8), 1, 0)):
        mean_field(torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]), torch.rand(1, 1, *shape[2:]),
                   similarity="potts", sweeps=1)  # fmt: skip
        assert emulator.division["vectors"] == vectors


def test_resident_pixels(emulator):
    """On a device like an H200: 227 KB for each of 132 multiprocessors."""
    emulator.library.set_device(132, 228 << 10, 0)
    sixteen, thirty_two = (emulator.library.resident_pixels(s, ctypes.c_int64(313), ctypes.c_int64(3)) for s in (2, 0))
    assert 10 * 64 * 64 <= sixteen <= 132 * (227 << 10) / 626
    assert 5 * 64 * 64 <= thirty_two <= sixteen / 2 + 132 * 8


@pytest.mark.parametrize("neighborhood", op.NEIGHBORHOODS)
@pytest.mark.parametrize("radius, dilation", [(1, 2), (3, 1), (2, 5), (9, 1)])
def test_neighborhoods(emulator, radius, dilation, neighborhood):
    logits, guide = problem((1, 3, 6, 9), seed=radius)
    options = {"radius": radius, "dilation": dilation, "neighborhood": neighborhood, "sigma_light": 30.0}
    for schedule in op.SCHEDULES:
        check("neighborhoods", logits, guide, sweeps=2, schedule=schedule, **options)


@pytest.mark.parametrize("schedule", op.SCHEDULES)
@pytest.mark.parametrize("name, bins", [
    ("potts", None), ("gaussian", SMALL), ("quadratic", SMALL), ("potts", SMALL_AXES), ("gaussian", SMALL_AXES),
    ("quadratic", SMALL_AXES), ("steps", SEPARABLE), ("quadratic", SEPARABLE),
], ids=str)  # fmt: skip
def test_similarities(emulator, name, bins, schedule):
    logits, guide = problem((2 if bins is not SEPARABLE else 1, bins.count if bins else 5, 3, 4))
    for gamma in (7.0, 25.0):
        check("similarities", logits, guide, name, gamma, bins, sweeps=2, radius=1, weight=0.4, schedule=schedule)
    if bins is SMALL_AXES:  # a matrix may couple the axes
        check("similarities", logits, guide, symmetric(8), bins=bins, sweeps=2, schedule=schedule)


@pytest.mark.parametrize("start", op.STARTS)
@pytest.mark.parametrize("schedule", op.SCHEDULES)
def test_start_and_damping(emulator, schedule, start):
    logits, guide = problem((1, 4, 4, 5))
    for damping, sweeps in itertools.product((0.0, 0.3, 0.9), (0, 1, 3)):
        options = {"schedule": schedule, "damping": damping, "start": start, "sweeps": sweeps}
        check("start and damping", logits, guide, symmetric(4), **options)


@pytest.mark.parametrize("sigma_space, sigma_light, weight", [
    (0.5, 2.0, 3.0), (math.inf, 10.0, 0.5), (2.0, math.inf, 0.2), (1e-30, 1.0, 1.0), (1.0, 1e-30, 1.0), (3.0, 10.0, 0.0)
])  # fmt: skip
def test_widths(emulator, sigma_space, sigma_light, weight):
    logits, guide = problem((1, 3, 4, 5))
    if sigma_light < 1e-9:
        guide = guide.div(25).floor()
    exact = {"sigma_space": max(sigma_space, 1e-9), "sigma_light": max(sigma_light, 1e-9), "weight": weight}
    q = mean_field(
        logits.float(), guide.float(), similarity="potts", sigma_space=sigma_space, sigma_light=sigma_light,
        weight=weight,
    )  # fmt: skip
    expected = naive_mean_field(logits.float(), guide.float(), naive_similarity("potts", 3, None), **exact)
    assert record("widths", largest(q, expected)) <= 5e-6


@pytest.mark.parametrize("schedule", op.SCHEDULES)
@pytest.mark.parametrize("name, bins", [("quadratic", SMALL), ("potts", SMALL), ("steps", SMALL_AXES)], ids=str)
def test_previous_frame(emulator, name, bins, schedule):
    logits, guide = problem((2, bins.count, 4, 3))
    others, guide_before = problem((2, bins.count, 4, 3), seed=1)
    before = torch.cat([others[:, first:last].softmax(1) for first, last, _ in axes_of(bins, bins.count)], 1)
    options = {"weight_time": 0.7, "sigma_time": 4.0, "sweeps": 2, "radius": 1, "weight": 0.4, "schedule": schedule}
    previous = (before.float(), (guide + 0.1 * guide_before).float())
    check("previous", logits, guide, name, bins=bins, previous=previous, **options)


@pytest.mark.parametrize("schedule", op.SCHEDULES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_types(emulator, dtype, schedule):
    for shape in ((2, 5, 5, 4), (2, 5, 4, 8), (1, 37, 3, 11)):
        logits, guide = problem(shape, dtype=dtype)
        for s in (symmetric(shape[1], scale=0.3), "potts") if shape[1] == 37 else (symmetric(5), "quadratic"):
            bins = SMALL if shape[1] == 5 else None
            check("types", logits, guide, s, bins=bins, schedule=schedule, sweeps=2, weight=0.3)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 32, 64])
def test_ranks(emulator, rank):
    """Columns in registers up to four, in shared memory beyond."""
    labels = max(rank, 21)
    logits, guide = problem((2, labels, 4, 5), seed=rank)
    a, b = torch.randn(2, labels, rank, dtype=torch.float64) * 0.4 / rank**0.5
    s = (a.float().double() @ b.float().double().T).numpy()
    exact = naive_mean_field(logits.float(), guide.float(), s, sweeps=2)
    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            u = logits.to(dtype).contiguous(memory_format=layout)
            q = mean_field(u, guide.float(), similarity=(a.float(), b.float()), sweeps=2)
            if dtype == torch.float32:
                assert record("ranks", largest(q, exact)) <= 5e-6
            else:
                with fastcolor.use_backend("reference"):
                    exact_short = mean_field(u.double(), guide.double(), similarity=(a, b), sweeps=2)
                assert largest(q, exact_short) <= 2**-8


@pytest.mark.parametrize("labels", [1, 2, 7, 8, 9, 31, 32, 33, 64, 65])
def test_tails(emulator, labels):
    """Labels end within a lane's four, within the eight lanes, and with both."""
    logits, guide = problem((1, labels, 3, 13), seed=labels)
    for dtype in (torch.float32, torch.float16):
        u, pair = logits.to(dtype), (0.3 * symmetric(labels)[:, :3], symmetric(labels, seed=1)[:, :3])
        exact = naive_mean_field(u.float(), guide.float(), (pair[0].float() @ pair[1].float().T).numpy(), sweeps=1)
        for layout in LAYOUTS:
            q = mean_field(u.contiguous(memory_format=layout), guide.float(), similarity=pair, sweeps=1)
            assert record(f"tails, {str(dtype)[6:]}", largest(q, exact)) <= TOLERANCE[dtype]
        if labels <= 64:
            check("tails", u, guide, sweeps=1, weight=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_313_labels(emulator, dtype):
    logits, guide = problem((2, 313, 4, 6), dtype=dtype)
    check("313 labels", logits, guide, "quadratic", bins=JOINT, radius=1, weight=0.3, sweeps=2)


def test_extreme_logits(emulator):
    """At 1e4 a float32 score is rounded by up to 5e-4, whoever adds the field to it."""
    logits, guide = problem((1, 5, 5, 3), dtype=torch.float32)
    logits = 1e4 * logits.sign()
    check("extreme", logits, guide, "gaussian", bins=SMALL, tolerance=5e-4)
    logits[0, :, 2, 1] = 1e4 * torch.tensor([1, 1, -1, -1, 1])
    logits[0, 3, 1] = -math.inf  # forbidden labels
    q = mean_field(logits, guide, similarity="potts", damping=0.5)
    assert q.isfinite().all() and (q[0, 3, 1] == 0).all()
    logits[0, 3, 1] = -1e30
    assert largest(q, mean_field(logits, guide, similarity="potts", damping=0.5)) <= 5e-4


@pytest.mark.parametrize("shape", [(1, 19, 9, 9), (1, 70, 9, 9)], ids=str)
def test_nan_and_forbidden_labels(emulator, shape):
    logits, guide = (x.float() for x in problem(shape))
    pair = tuple(0.1 * symmetric(shape[1])[:, :3].float() for _ in "ab")
    logits[0, 3] = -math.inf
    logits[0, 1, 4, 4] = math.nan
    for layout, similarity in itertools.product(LAYOUTS, ("potts" if shape[1] <= 64 else pair, pair)):
        q = mean_field(logits.contiguous(memory_format=layout), guide, similarity=similarity, radius=1, sweeps=2)
        bad = q.isnan().any(1)[0]
        expected = torch.zeros(9, 9, dtype=torch.bool)
        expected[2:7, 2:7] = True
        assert torch.equal(bad, expected)
        assert (q[0, 3][~bad] == 0).all()
        u = logits.nan_to_num(0.0, None, -math.inf).contiguous(memory_format=layout).requires_grad_()
        q = mean_field(u, guide, similarity=similarity, start="uniform", damping=0.2)
        q[:, 0].sum().backward()
        assert q.isfinite().all() and u.grad.isfinite().all()


def test_scores_of_any_size(emulator):
    """The largest score comes late, the first labels are forbidden or far below all others."""
    logits, guide = problem((1, 70, 4, 3), dtype=torch.float32)
    logits[:, 50, 0] += 1000
    logits[:, :40, 1] = -math.inf
    logits[:, :33, 2] = -3e37
    logits[:, :, 3, 0] -= 2e5
    logits[:, :, 3, 1] = -1e30
    logits[:, 7, 3, 2] = 1e30
    pair = tuple(symmetric(70)[:, :3].float() * 0.1 for _ in "ab")
    for layout in LAYOUTS:
        q = mean_field(logits.contiguous(memory_format=layout), guide, similarity=pair, sweeps=0)
        assert record("large scores, no sweep", largest(q, logits.double().softmax(1))) <= 1e-6
        q = mean_field(logits.contiguous(memory_format=layout), guide, similarity=pair, sweeps=2)
        with fastcolor.use_backend("reference"):
            exact = mean_field(logits.double(), guide.double(), similarity=pair, sweeps=2)
        assert record("large scores", largest(q, exact)) <= 5e-6


@pytest.mark.parametrize("bins, name", [(JOINT, "quadratic"), (SEPARABLE, "steps"), (SMALL, "potts"),
                                        (SMALL_AXES, "quadratic")], ids=str)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.05, 0.38, 1.0, 3.0])
def test_annealed_mean_of_the_last_sweep(emulator, temperature, bins, name):
    logits, guide = problem((2, bins.count, 3, 4))
    options = {"bins": bins, "similarity": name, "weight": 0.1}
    for sweeps, schedule, start in (
        (0, "parallel", "softmax"),
        (2, "parallel", "uniform"),
        (2, "checkerboard", "softmax"),
    ):
        options |= {"sweeps": sweeps, "schedule": schedule, "start": start}
        with fastcolor.use_backend("reference"):
            exact = annealed_mean(mean_field(logits, guide, **options), temperature, bins)
        for layout in LAYOUTS:
            u = logits.float().contiguous(memory_format=layout)
            ab = op.mean_field_annealed(u, guide.float(), temperature=temperature, **options)
            assert ab.dtype == torch.float32
            assert record("annealed, ab", largest(ab, exact)) <= 2e-3 / min(temperature, 1)


def test_states(emulator):
    """H and F of the start and of each update, as kernels/cuda/mean_field.h has them."""
    logits, guide = (x.float() for x in problem((2, 6, 4, 5)))
    around = fastcolor.reference.mean_field.offsets("square", 1, 1, 4, 5)
    a, b = (0.3 * symmetric(6, seed)[:, :2].float() for seed in (0, 1))
    space, sharpness = torch.full((len(around),), 0.2), torch.tensor(0.1)
    dy, dx = ([offset[axis] for offset in around] for axis in (0, 1))
    for checkerboard, damping, uniform in ((False, 0.3, True), (True, 0.2, False)):
        p = Problem(
            logits, False, guide, a, b, space, sharpness, None, dy, dx, [6], 2, checkerboard, damping, uniform
        )  # fmt: skip
        updates = 4 if checkerboard else 2
        states = torch.full((2, updates + 1, 2, 2, 4, 5), math.nan)
        q = torch.empty_like(logits)
        emulator.forward(p, q, None, 1.0, None, states)
        h, f = states.double().unbind(2)
        assert (h[:, 0] == 0).all()
        start = torch.full_like(logits, 1 / 6) if uniform else logits.softmax(1)
        assert largest(f[:, 0], torch.einsum("lr,blhw->brhw", b.double(), start.double())) <= 1e-6
        weights = [
            torch.exp(-0.5 * ((guide.double() - other) * 0.1) ** 2) * 0.2
            for other in fastcolor.reference.mean_field.shifted(guide.double(), around)
        ]
        parity = (torch.arange(4)[:, None] + torch.arange(5)) % 2
        for k in range(1, updates + 1):
            new = fastcolor.reference.mean_field.gathered(f[:, k - 1], around, weights)
            new = (1 - damping) * new + damping * h[:, k - 1]
            if checkerboard:
                new = torch.where(parity == (k + 1) % 2, new, h[:, k - 1])
            assert largest(h[:, k], new) <= 1e-6


@pytest.mark.parametrize("schedule, damping, start, neighborhood", [
    ("parallel", 0.0, "softmax", "square"), ("parallel", 0.3, "uniform", "cross"),
    ("checkerboard", 0.0, "softmax", "square"), ("checkerboard", 0.4, "uniform", "square"),
])  # fmt: skip
@pytest.mark.parametrize("name, bins, shape", [
    ("quadratic", SMALL, (2, 5, 4, 9)), ("steps", SMALL_AXES, (2, 8, 5, 7)), ("quadratic", SMALL_AXES, (1, 8, 4, 4)),
    ("matrix", SMALL_AXES, (1, 8, 3, 5)), ("pair", None, (1, 37, 5, 7)), ("potts", None, (1, 3, 1, 1)),
    ("matrix", None, (1, 21, 3, 4)),
], ids=str)  # fmt: skip
def test_gradients(emulator, name, bins, shape, schedule, damping, start, neighborhood):
    """All of them against the reference in float64, relative to the largest of the kind."""
    logits, guide = problem(shape, scale=1.5)
    others, guide_before = problem(shape, seed=4)
    parts = [others[:, first:last].softmax(1) for first, last, _ in axes_of(bins, shape[1])]
    scalars = [torch.tensor(v, dtype=torch.float64) for v in (0.3, 1.7, 20.0, 0.5, 30.0)]
    labels = shape[1]
    factors = {
        "matrix": [symmetric(labels, scale=3 / labels**0.5)],
        "pair": [0.5 * symmetric(labels)[:, :2], 0.5 * symmetric(labels)[:, 2:4]],
    }
    inputs = [logits, guide, torch.cat(parts, 1), guide + 0.2 * guide_before, *scalars, *factors.get(name, [])]
    upstream = torch.randn(shape, dtype=torch.float64)

    def gradients(tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        u, g, q_before, g_before, weight, sigma_space, sigma_light, weight_time, sigma_time, *s = tensors
        chosen = {"matrix": lambda: (s[0] + s[0].T) / 2, "pair": lambda: tuple(s)}.get(name, lambda: name)()
        q = mean_field(
            u, g, similarity=chosen, bins=bins, gamma=30.0, radius=2, sweeps=2, schedule=schedule, damping=damping,
            start=start, neighborhood=neighborhood, weight=weight, sigma_space=sigma_space, sigma_light=sigma_light,
            previous=(q_before, g_before), weight_time=weight_time, sigma_time=sigma_time,
        )  # fmt: skip
        (q * upstream.to(q)).sum().backward()
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]

    with fastcolor.use_backend("reference"):
        exact = gradients(inputs)
        inputs = [x.float() for x in inputs]
        plain = gradients(inputs)
    names = ("logits", "guide", "previous", "previous guide", "weight", "sigma_space", "sigma_light", "weight_time")
    names += ("sigma_time", "similarity", "similarity")
    for layout in LAYOUTS:
        inputs[0] = inputs[0].contiguous(memory_format=layout)
        fast = gradients(inputs)
        for kind, f, p, e in zip(names, fast, plain, exact, strict=False):
            error = record(f"gradient of {kind}", relative(f, e))
            assert f.shape == e.shape and error <= allowed(p, e), kind


def test_gradients_of_one_label(emulator):
    logits, guide = (x.float().requires_grad_() for x in problem((2, 1, 3, 4)))
    q = mean_field(logits, guide, similarity="potts")
    (q * torch.randn(q.shape)).sum().backward()
    assert logits.grad.abs().max() <= 2e-6 and guide.grad.abs().max() <= 2e-6


@pytest.mark.parametrize("dtype, step", [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(2, 21, 5, 7), (2, 21, 4, 8)], ids=str)
def test_gradients_in_16_bits(emulator, shape, layout, dtype, step):
    logits, guide = problem(shape, dtype=dtype)
    upstream = torch.randn(logits.shape).to(dtype)
    for columns in (2, 7):
        pair = (0.5 * symmetric(21)[:, :columns], symmetric(21)[:, columns : 2 * columns])
        grads = []
        for name, cast in (("auto", lambda x: x), ("reference", lambda x: x.double())):
            u = cast(logits.contiguous(memory_format=layout)).detach().requires_grad_()
            g = cast(guide).detach().requires_grad_()
            s = tuple((m.float() if name == "auto" else m).detach().requires_grad_() for m in pair)
            with fastcolor.use_backend(name):
                mean_field(u, g, similarity=s, weight=0.3, sweeps=2).backward(cast(upstream))
            grads.append((u.grad, g.grad, *(m.grad for m in s)))
        for fast, exact in zip(*grads, strict=True):
            assert record(f"gradients, {str(dtype)[6:]}", relative(fast, exact)) <= step


def test_313_labels_backward(emulator):
    logits, guide = problem((1, 313, 3, 5))
    grads = []
    for name, cast in (("auto", lambda x: x.float()), ("reference", lambda x: x)):
        u, g = (cast(x).detach().requires_grad_() for x in (logits, guide))
        with fastcolor.use_backend(name):
            q = mean_field(u, g, radius=1, weight=0.1, sweeps=2)
            (q[:, ::2] ** 2).sum().backward()
        grads.append((u.grad, g.grad))
    for fast, exact in zip(*grads, strict=True):
        assert record("gradients, 313 labels", relative(fast, exact)) <= 1e-5


def test_empty(emulator):
    for shape in ((0, 5, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0)):
        u, g = torch.empty(shape, requires_grad=True), torch.empty(shape[0], 1, *shape[2:])
        mean_field(u, g, bins=SMALL).sum().backward()
        assert op.mean_field_annealed(u.detach(), g, bins=SMALL).shape == (shape[0], 2, *shape[2:])
        assert u.grad.shape == shape


def test_largest_errors():
    """What the checks above measured, for a report: `pytest -rP -k largest_errors` after them shows it."""
    for group, error in sorted(LARGEST_ERRORS.items()):
        print(f"{group}: {error:.2g}")
