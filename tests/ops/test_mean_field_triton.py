"""The Triton kernels of the mean field without a GPU: in the interpreter (TRITON_INTERPRET=1), and compiled for one."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
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
    op_arguments,
    problem,
    relative,
    symmetric,
)

import fastcolor
from fastcolor.ops import _backend
from fastcolor.ops import mean_field as op
from fastcolor.ops.mean_field import MeanField, annealed_mean, label_factors, mean_field
from fastcolor.reference import mean_field as reference

triton = pytest.importorskip("triton", reason="triton is not installed")

interpreted = pytest.mark.skipif(not _backend.interpreting(), reason="runs under TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(_backend.interpreting(), reason="nothing is compiled under TRITON_INTERPRET=1")
# NumPy says where inf and nan pass, also in pixels past the end of an image
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SCHEDULES = [  # schedule, damping, start, neighbourhood, sweeps
    ("parallel", 0.0, "softmax", "square", 3), ("parallel", 0.3, "uniform", "cross", 4),
    ("checkerboard", 0.0, "softmax", "cross", 2), ("checkerboard", 0.4, "uniform", "square", 3),
]  # fmt: skip
# Rounding of float32, handed on by each sweep. The interpreter cuts bfloat16 off where a GPU rounds: a whole step.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
LARGEST_ERRORS = {}  # test: what was measured, printed by `pytest -rP -k largest_errors`


def remember(error: float) -> float:
    """The largest error of the test that calls, and the error again."""
    frame = sys._getframe()
    while not frame.f_code.co_name.startswith("test_"):
        frame = frame.f_back
    test = frame.f_code.co_name
    LARGEST_ERRORS[test] = max(LARGEST_ERRORS.get(test, 0.0), error)
    return error


LARGE = {
    "OFFSETS": 32, "ARRIVING": 512, "PAIR_TERMS": 64, "FEW_CHUNK": 64, "MANY_PIXELS": 64, "BACKWARD_CHUNK": 64,
    "BACKWARD_PIXELS": 64,
}  # fmt: skip


@pytest.fixture
def as_launched():
    """Tiles as on a GPU."""
    from fastcolor.kernels.triton import mean_field as kernels

    with fastcolor.use_backend("triton"):
        yield kernels


@pytest.fixture
def on_triton(monkeypatch, as_launched):
    """In few steps: the interpreter pays for each, and hardly for its size."""
    for name, value in LARGE.items():
        monkeypatch.setattr(as_launched, name, value)
    return as_launched


def check(logits, guide, similarity="potts", gamma=10.0, bins=None, tolerance=None, layouts=LAYOUTS, **options):
    """Against the naive float64 loop, whose logits are those that the kernels get."""
    named = isinstance(similarity, str)
    s = naive_similarity(similarity, logits.shape[1], bins, gamma) if named else similarity.numpy()
    exact = naive_mean_field(logits, guide, s, bins, **options)
    similarity = similarity if named else similarity.float()
    for layout in layouts:
        u = logits.contiguous(memory_format=layout) if layout else logits
        q = mean_field(u, guide, similarity=similarity, gamma=gamma, bins=bins, **options)
        assert q.dtype == u.dtype
        error = largest(q, exact)
        assert (remember(error) if u.dtype == torch.float32 else error) <= (tolerance or TOLERANCE[u.dtype])


def float_problem(shape, **options):
    return tuple(x.float() for x in problem(shape, **options))


# --- interpreter: arithmetic, masks and addresses; memory that a kernel does not write is nan, see conftest.py --------


@interpreted
@pytest.mark.parametrize("schedule", op.SCHEDULES)
@pytest.mark.parametrize(
    "shape", [(1, 3, 1, 1), (2, 3, 1, 7), (1, 4, 5, 1), (1, 1, 3, 4), (1, 2, 9, 11), (1, 7, 5, 3)], ids=str
)
def test_shapes(on_triton, shape, schedule):
    """One pixel, lines, two programs (99 pixels), K = 1; R = K below and above the few columns."""
    logits, guide = float_problem(shape)
    check(logits, guide, schedule=schedule, sweeps=2)
    check(logits, guide, symmetric(shape[1]), schedule=schedule, sweeps=2, neighborhood="cross")


@interpreted
@pytest.mark.parametrize("neighborhood", op.NEIGHBORHOODS)
@pytest.mark.parametrize("radius, dilation", [(1, 1), (3, 1), (2, 2), (1, 5), (9, 2)])
def test_neighborhoods(on_triton, radius, dilation, neighborhood):
    for labels in (3, 6):
        logits, guide = float_problem((1, labels, 5, 4), seed=radius)
        options = {"radius": radius, "dilation": dilation, "neighborhood": neighborhood, "sigma_light": 30.0}
        check(logits, guide, sweeps=2, layouts=LAYOUTS[:1], **options)


@interpreted
@pytest.mark.parametrize("schedule", op.SCHEDULES)
@pytest.mark.parametrize("name, bins", [
    ("potts", None), ("gaussian", SMALL), ("quadratic", SMALL), ("potts", SMALL_AXES), ("steps", SMALL_AXES),
    ("gaussian", SMALL_AXES), ("quadratic", SMALL_AXES), ("steps", SEPARABLE), ("quadratic", SEPARABLE),
], ids=str)  # fmt: skip
def test_similarities(on_triton, name, bins, schedule):
    logits, guide = float_problem((1, bins.count if bins else 5, 3, 4))
    check(logits, guide, name, 7.0, bins, sweeps=2, radius=1, weight=0.4, schedule=schedule)


@interpreted
def test_a_matrix_may_couple_the_axes_of_separable_bins(on_triton):
    check(*float_problem((1, 8, 4, 3)), symmetric(8), bins=SMALL_AXES, sweeps=2)


@interpreted
@pytest.mark.parametrize("start", op.STARTS)
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("schedule", op.SCHEDULES)
def test_start_and_damping(on_triton, schedule, damping, start):
    for labels, sweeps in itertools.product((4, 5), (0, 1, 3)):
        logits, guide = float_problem((1, labels, 3, 5))
        options = {"schedule": schedule, "damping": damping, "start": start, "sweeps": sweeps, "layouts": LAYOUTS[:1]}
        check(logits, guide, symmetric(labels), radius=1, **options)


@interpreted
@pytest.mark.parametrize("schedule", op.SCHEDULES)
@pytest.mark.parametrize("name, bins", [("quadratic", SMALL), ("potts", SMALL), ("steps", SMALL_AXES)], ids=str)
def test_previous_frame(on_triton, name, bins, schedule):
    logits, guide = float_problem((1, bins.count, 4, 3))
    others, guide_before = float_problem((1, bins.count, 4, 3), seed=1)
    parts = [others[:, first:last].softmax(1) for first, last, _ in axes_of(bins, bins.count)]
    previous = (torch.cat(parts, 1), guide + 0.1 * guide_before)
    options = {"previous": previous, "weight_time": 0.7, "sigma_time": 4.0, "sweeps": 2, "radius": 1, "weight": 0.4}
    check(logits, guide, name, bins=bins, schedule=schedule, **options)


@interpreted
@pytest.mark.parametrize("sigma_space, sigma_light, weight", [
    (math.inf, math.inf, 0.1), (1e-30, 1.0, 1.0), (1.0, 1e-30, 1.0), (3.0, 10.0, 0.0),
])  # fmt: skip
def test_widths(on_triton, sigma_space, sigma_light, weight):
    logits, guide = float_problem((1, 3, 4, 5))
    if sigma_light < 1e-9:
        guide = guide.div(25).floor()  # equal neighbours keep their weight, 0 / 0 must not appear
    naive = {"sigma_space": max(sigma_space, 1e-9), "sigma_light": max(sigma_light, 1e-9), "weight": weight}
    exact = naive_mean_field(logits, guide, np.eye(3), **naive)
    q = mean_field(logits, guide, similarity="potts", sigma_space=sigma_space, sigma_light=sigma_light, weight=weight)
    assert remember(largest(q, exact)) <= TOLERANCE[torch.float32]


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
def test_313_labels(on_triton, layout):
    """The quadratic similarity with 3 columns, and a gaussian with many."""
    logits, guide = problem((1, 313, 3, 4), scale=1.5)
    pair = label_factors("gaussian", gamma=40.0, tolerance=0.02)[:2]
    assert pair[0].shape[1] > 16
    for s in ("quadratic", pair):
        with fastcolor.use_backend("reference"):
            exact = mean_field(logits, guide, similarity=s, weight=0.1, sweeps=3)
        s = s if isinstance(s, str) else tuple(x.float() for x in s)
        u = logits.float().contiguous(memory_format=layout)
        q = mean_field(u, guide.float(), similarity=s, weight=0.1, sweeps=3)
        assert remember(largest(q, exact)) <= TOLERANCE[torch.float32]


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_types(on_triton, dtype):
    """Aligned rows of labels (K = 8), rows that are not (K = 5), and rows of pixels that are (4×4)."""
    for labels, height, width in ((8, 3, 3), (5, 4, 4)):
        logits, guide = problem((1, labels, height, width), dtype=dtype)
        pair = symmetric(labels)[:, :2]
        check(logits, guide, (pair @ pair.T).float(), sweeps=2, weight=0.3)
        exact = naive_mean_field(logits, guide, (pair @ pair.T).numpy(), sweeps=2, weight=0.3)
        for layout in LAYOUTS:
            u = logits.contiguous(memory_format=layout)
            q = mean_field(u, guide, similarity=(pair.float(), pair.float()), sweeps=2, weight=0.3)
            assert largest(q, exact) <= TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize("layout", ["permuted", "strided"])
def test_strides(on_triton, layout):
    logits, guide = float_problem((2, 5, 4, 6))
    if layout == "permuted":
        logits = logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        guide = guide.expand(2, 5, 4, 6)[:, 3:4]
    else:
        logits, guide = float_problem((2, 10, 4, 12))
        logits, guide = logits[:, ::2, :, ::2], guide[..., ::2]
    check(logits, guide, "quadratic", bins=SMALL, sweeps=2, layouts=(None,))


@interpreted
def test_extreme_logits(on_triton):
    """At 1e4 a float32 score is rounded by up to 5e-4, whoever adds the field to it."""
    for labels, name, bins in ((5, "gaussian", SMALL), (3, "potts", None)):
        logits, guide = float_problem((1, labels, 5, 3))
        logits = 1e4 * logits.sign()
        check(logits, guide, name, bins=bins, sweeps=2, tolerance=1e-3)
        logits[0, :, 2, 1] = 1e4
        logits[0, 1, 1] = -math.inf
        q = mean_field(logits, guide, similarity="potts", damping=0.5)
        assert q.isfinite().all() and (q[0, 1, 1] == 0).all()
        logits[0, 1, 1] = -1e30
        assert largest(q, mean_field(logits, guide, similarity="potts", damping=0.5)) <= 1e-3


@interpreted
@pytest.mark.parametrize("labels", [4, 19])
def test_nan_and_forbidden_labels(on_triton, labels):
    logits, guide = float_problem((1, labels, 9, 9))
    logits[0, 3] = -math.inf
    logits[0, 1, 4, 4] = math.nan
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[2:7, 2:7] = True
    for layout in LAYOUTS:
        q = mean_field(logits.contiguous(memory_format=layout), guide, similarity="potts", radius=1, sweeps=2)
        bad = q.isnan().any(1)[0]
        assert torch.equal(bad, expected)
        assert (q[0, 3][~bad] == 0).all()
        u = logits.nan_to_num(0.0, None, -math.inf)[..., :3].contiguous(memory_format=layout).requires_grad_()
        q = mean_field(u, guide[..., :3], similarity="potts", start="uniform", damping=0.2, sweeps=2)
        q[:, 0].sum().backward()
        assert q.isfinite().all() and u.grad.isfinite().all()


@interpreted
@pytest.mark.parametrize("bins, name", [(JOINT, "quadratic"), (SMALL_AXES, "steps"), (SMALL, "potts")], ids=str)
@pytest.mark.parametrize("temperature", [0.05, 0.38, 3.0])
def test_annealed_mean_of_the_last_sweep(on_triton, temperature, bins, name):
    logits, guide = problem((1, bins.count, 3, 4))
    options = {"bins": bins, "similarity": name, "weight": 0.1}
    for sweeps, schedule, start in ((0, "parallel", "softmax"), (1, "checkerboard", "uniform")):
        options |= {"sweeps": sweeps, "schedule": schedule, "start": start}
        with fastcolor.use_backend("reference"):
            exact = annealed_mean(mean_field(logits, guide, **options), temperature, bins)
        for layout in LAYOUTS:
            u = logits.float().contiguous(memory_format=layout)
            ab = op.mean_field_annealed(u, guide.float(), temperature=temperature, **options)
            assert ab.dtype == torch.float32
            assert remember(largest(ab, exact)) <= 2e-3 / min(temperature, 1)


@interpreted
def test_empty(on_triton):
    for shape in ((0, 5, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0)):
        u, g = torch.empty(shape, requires_grad=True), torch.empty(shape[0], 1, *shape[2:])
        mean_field(u, g, bins=SMALL).sum().backward()
        assert u.grad.shape == shape
        assert op.mean_field_annealed(u.detach(), g, bins=SMALL).shape == (shape[0], 2, *shape[2:])


@interpreted
@pytest.mark.parametrize("labels", [3, 6])
def test_states(on_triton, labels):
    """[B, U + 1, 2, R, H, W]: F_k = Bᵀ q_k and H_k = Σ_j w_ij F_k−1,j, which another backend's backward may take."""
    logits, guide = problem((2, labels, 3, 4))
    s, options = symmetric(labels), {"weight": 0.3, "neighborhood": "cross", "radius": 1}
    around = reference.offsets("cross", 1, 1, 3, 4)
    weights = reference.pair_weights(guide, around, 0.3, 3.0, 10.0)
    captured = []
    launch = on_triton.mean_field
    on_triton.mean_field = lambda *a: (launch(*a), captured.append(a[-1]))
    try:
        mean_field(logits.float().requires_grad_(), guide.float(), similarity=s.float(), sweeps=3, **options)
    finally:
        on_triton.mean_field = launch
    h, f = captured[0].view(2, 4, 2, labels, 3, 4).double().unbind(2)
    assert (h[:, 0] == 0).all()
    for k in range(3):
        with fastcolor.use_backend("reference"):
            q = mean_field(logits, guide, similarity=s, sweeps=k, **options)
        assert remember(largest(f[:, k], q)) <= 5e-6  # B is the identity
        assert largest(h[:, k + 1], reference.gathered(q, around, weights)) <= 5e-6


@interpreted
@pytest.mark.parametrize("schedule, damping, start, neighborhood, sweeps", SCHEDULES)
@pytest.mark.parametrize("name, bins, shape, radius", [
    ("quadratic", None, (1, 313, 2, 3), 1), ("quadratic", SMALL, (2, 5, 4, 5), 2),
    ("steps", SMALL_AXES, (1, 8, 5, 7), 1),
    ("matrix", SMALL_AXES, (1, 8, 3, 5), 2), ("pair", None, (1, 21, 9, 8), 1), ("potts", None, (1, 3, 1, 1), 1),
], ids=str)  # fmt: skip
def test_gradients(on_triton, name, bins, shape, radius, schedule, damping, start, neighborhood, sweeps):
    """All of them against the reference in float64, relative to the largest of the kind."""
    logits, guide = problem(shape, scale=1.5)
    others, guide_before = problem(shape, seed=4)
    labels = shape[1]
    axes = axes_of(JOINT if labels == 313 else bins, labels)
    parts = [others[:, first:last].softmax(1) for first, last, _ in axes]
    scalars = [torch.tensor(v, dtype=torch.float64) for v in (0.3, 1.7, 20.0, 0.5, 30.0)]
    factors = {"matrix": [symmetric(labels)], "pair": [0.5 * symmetric(labels)[:, :2], symmetric(labels)[:, 2:4]]}
    inputs = [logits, guide, torch.cat(parts, 1), guide + 0.2 * guide_before, *scalars, *factors.get(name, [])]
    upstream = torch.randn(shape, dtype=torch.float64)

    def gradients(tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        u, g, q_before, g_before, weight, sigma_space, sigma_light, weight_time, sigma_time, *s = tensors
        chosen = {"matrix": lambda: (s[0] + s[0].T) / 2, "pair": lambda: tuple(s)}.get(name, lambda: name)()
        q = mean_field(
            u, g, similarity=chosen, bins=bins, gamma=30.0, radius=radius, sweeps=sweeps, schedule=schedule,
            damping=damping, start=start, neighborhood=neighborhood, weight=weight, sigma_space=sigma_space,
            sigma_light=sigma_light, previous=(q_before, g_before), weight_time=weight_time, sigma_time=sigma_time,
        )  # fmt: skip
        (q * upstream.to(q)).sum().backward()
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]

    with fastcolor.use_backend("reference"):
        exact = gradients(inputs)
        inputs = [x.float() for x in inputs]
        plain = gradients(inputs)
    inputs[0] = inputs[0].contiguous(memory_format=LAYOUTS[(labels + sweeps) % 2])
    for f, p, e in zip(gradients(inputs), plain, exact, strict=True):
        assert f.shape == e.shape and remember(relative(f, e)) <= allowed(p, e)


@interpreted
@pytest.mark.parametrize("wanted", ["logits", "guide", "a"])
@pytest.mark.parametrize("rank", [3, 5])
def test_gradients_that_are_not_wanted(as_launched, rank, wanted):
    """The logits' gradient without and with sums for the factors comes from different kernels."""
    logits, guide = problem((1, 6, 4, 3))
    pair = 0.5 * symmetric(6)[:, :rank], symmetric(6)[:, :rank]
    grads = []
    for name, cast in (("triton", torch.Tensor.float), ("reference", torch.Tensor.double)):
        u, g, a, b = (cast(x).detach() for x in (logits, guide, *pair))
        x = {"logits": u, "guide": g, "a": a}[wanted].requires_grad_()
        with fastcolor.use_backend(name):
            mean_field(u, g, similarity=(a, b), weight=0.3, sweeps=2)[:, ::2].square().sum().backward()
        grads.append(x.grad)
    assert remember(relative(*grads)) <= 1e-5


@interpreted
@pytest.mark.parametrize("sweeps, start", [(0, "softmax"), (0, "uniform"), (1, "uniform")])
def test_gradients_of_few_sweeps(on_triton, sweeps, start):
    for labels in (3, 6):
        logits, guide = problem((1, labels, 3, 4))
        grads = []
        for name, cast in (("triton", torch.Tensor.float), ("reference", torch.Tensor.double)):
            u, g, s = (cast(x).detach().requires_grad_() for x in (logits, guide, symmetric(labels)))
            with fastcolor.use_backend(name):
                q = mean_field(u, g, similarity=s + s.T, weight=0.3, sweeps=sweeps, start=start)
                if q.requires_grad:
                    q[:, ::2].square().sum().backward()
            grads.append([torch.zeros_like(x) if x.grad is None else x.grad for x in (u, g, s)])
        for fast, exact in zip(*grads, strict=True):
            assert remember(relative(fast, exact)) <= 1e-5


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_16_bits(on_triton, dtype):
    logits, guide = problem((1, 21, 5, 7), dtype=dtype)
    upstream = torch.randn(logits.shape).to(dtype)
    pair = (0.5 * symmetric(21)[:, :2], symmetric(21)[:, 2:4])
    grads = []
    for name, cast in (("triton", lambda x: x), ("reference", lambda x: x.double())):
        u = cast(logits).detach().requires_grad_()
        with fastcolor.use_backend(name):
            mean_field(u, cast(guide), similarity=pair, weight=0.3, sweeps=2).backward(cast(upstream))
        grads.append(u.grad)
    assert grads[0].dtype == dtype and relative(*grads) <= 2 * torch.finfo(dtype).eps


@interpreted
def test_equal_inputs_give_equal_bits(as_launched):
    logits, guide = float_problem((1, 6, 5, 7))
    runs = []
    for _ in "ab":
        u, g = (x.clone().requires_grad_() for x in (logits, guide))
        pair = [symmetric(6)[:, :2].float().requires_grad_() for _ in "ab"]
        q = mean_field(u, g, similarity=tuple(pair), weight=0.2, sweeps=2)
        q[:, ::2].square().sum().backward()
        runs.append((q.detach(), u.grad, g.grad, *(x.grad for x in pair)))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@interpreted
@pytest.mark.parametrize("layout, dtype, rank", [
    ("planes", torch.float32, 5), ("labels_last", torch.bfloat16, 5), ("permuted", torch.float32, 2),
])  # fmt: skip
def test_opcheck(on_triton, rank, layout, dtype):
    u, guide = problem((1, 5, 2, 3), dtype=dtype)
    guide = guide.float()
    if layout == "labels_last":
        u = u.contiguous(memory_format=torch.channels_last)
    elif layout == "permuted":
        u = u.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    arguments = (*op_arguments(u, guide, rank)[:-1], "triton")
    ops = torch.ops.fastcolor
    torch.library.opcheck(ops.mean_field.default, (*arguments, True))
    torch.library.opcheck(ops.mean_field_annealed.default, (*arguments, torch.rand(5, 2), 0.5))
    _, states = ops.mean_field(*arguments, True)
    grad = torch.randn(u.shape, dtype=dtype)
    torch.library.opcheck(ops.mean_field_backward.default, (grad, states, *arguments, True, rank == 5))


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_compiles_to_one_graph(on_triton, layout):
    logits, guide = float_problem((1, 5, 3, 4))
    field = MeanField(SMALL, similarity=symmetric(5).float(), learn=MeanField.LEARNABLE, sweeps=2, weight=0.3)
    results = []
    for run in (field, torch.compile(field, fullgraph=True, backend="aot_eager")):
        u = logits.contiguous(memory_format=layout).clone().requires_grad_()
        field.zero_grad()
        q = run(u, guide, (logits.softmax(1), guide + 3))
        q[:, 0].sum().backward()
        results.append([q.detach(), u.grad, *(p.grad.clone() for p in field.parameters())])
    for eager, graph in zip(*results, strict=True):
        assert relative(graph, eager) <= 1e-5


@interpreted
@pytest.mark.parametrize("columns, labels_last", [(3, False), (5, True)])
def test_addresses_beyond_32_bits(on_triton, monkeypatch, tmp_path, columns, labels_last):
    """The last program of an image with 2^31 logits and more, whose memory is there only where it is touched."""
    labels, height, width = 313, 1 << 14, 448
    pixels = height * width
    assert labels * pixels > 2**31
    torch.use_deterministic_algorithms(False)  # memory that is filled would be there

    def sparse(name):
        path = tmp_path / name
        with open(path, "wb") as file:
            file.truncate(2 * labels * pixels)
        flat = torch.from_file(str(path), shared=True, size=labels * pixels, dtype=torch.float16)
        if labels_last:
            return flat.view(1, height, width, labels).movedim(-1, 1)
        return flat.view(1, labels, height, width)

    u, q = sparse("logits"), sparse("marginals")
    last = width // 2  # columns of the last row that the last program certainly has
    u[:, :, -1, -last:] = torch.randn(1, labels, last).half()
    interpreter = triton.runtime.interpreter.interpreter_builder
    set_index = interpreter.set_grid_idx
    monkeypatch.setattr(on_triton, "PIXELS", 256)
    monkeypatch.setattr(on_triton, "MANY_PIXELS", 256)

    def last_program(kernel, programs, *arguments, **constants):
        monkeypatch.setattr(interpreter, "set_grid_idx", lambda x, y, z: set_index(programs - 1, 0, 0))
        monkeypatch.setattr(interpreter, "set_grid_dim", lambda *_: setattr(interpreter, "grid_dim", (programs, 1, 1)))
        kernel[(1,)](*arguments, **constants)

    monkeypatch.setattr(on_triton, "_launch", last_program)
    a, b = (torch.randn(labels, columns) for _ in "ab")
    guide = torch.zeros(1, 1, height, width)
    one = op._Fixed([0], [0], [labels], 0, False, 0.0, False, "triton")
    problem_ = op._problem(u, guide, a, b, torch.zeros(1), torch.tensor(1.0), None, one)
    assert problem_.labels_last == labels_last
    on_triton.mean_field(problem_, q, None, 1.0, None, None)
    expected = u[:, :, -1, -last:].float().softmax(1)
    assert remember(largest(q[:, :, -1, -last:].float(), expected)) <= 2**-11


def test_largest_errors():
    """What the checks above measured in float32, for a report: `pytest -rP -k "..."` shows it."""
    for test, error in sorted(LARGEST_ERRORS.items()):
        print(f"{test}: {error:.2g}")


# --- ahead of time: a kernel that no longer compiles, or spills, fails here, without a GPU ----------------------------


@compiled
@pytest.mark.parametrize("arch, case", [(90, n) for n in range(6)] + [(80, 0), (80, 2)])
def test_compiles_ahead_of_time(arch, case):
    """Every kernel as it is launched; the table of what it takes is printed, `pytest -rP` shows it."""
    registers = pytest.importorskip("benchmarks.registers", reason="the benchmarks are not beside the tests")
    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    if version < (3, 3):
        pytest.skip("triton < 3.3 takes signatures in another form")
    name = list(registers.CASES)[case]
    # bytes a thread: sizes of tiles were chosen for 313 labels, triton 3.7 and sm_90; the rest may spill a little
    allowed = 0 if arch == 90 and version >= (3, 7) and "25 + 25" not in name else 256
    for _, launch, usage in registers.table(arch, {name: registers.CASES[name]}):
        assert usage.spilled <= allowed, f"{launch.kernel.__name__} of {name} spills {usage.spilled} bytes"
