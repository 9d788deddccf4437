"""The mean field against a naive loop in float64 that shares no code with it, and the rest of its promises."""

import inspect
import itertools
import math
import mmap
import sys
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from helpers import available, every_simd

import fastcolor
from fastcolor.bins import ColorBins
from fastcolor.ops import _backend
from fastcolor.ops import mean_field as op
from fastcolor.ops.mean_field import (
    PRESETS,
    MeanField,
    annealed_mean,
    entropy,
    hint_unary,
    histogram_unary,
    label_factors,
    mean_field,
    mode,
    probability_unary,
)
from fastcolor.reference import mean_field as reference
from fastcolor.reference.mean_field import elbo

EXACT = 1e-10
SEPARABLE = ColorBins("separable")
JOINT = ColorBins("joint")
SMALL = ColorBins("joint", [(0, 0), (10, 0), (0, 20), (-30, 10), (7, -5)])  # K = 5
SMALL_AXES = ColorBins("separable", [(-20, -30), (-10, 0), (0, 5), (15, 10)])  # K = 4 + 4


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the naive loop --------------------------------------------------------------------------------------------------


def axes_of(bins, labels):
    """[(first, last + 1, colours of the labels)]"""
    if bins is None:
        return [(0, labels, None)]
    c = bins.centers.numpy()
    if bins.kind == "joint":
        return [(0, len(c), c)]
    return [(0, len(c), c[:, :1]), (len(c), 2 * len(c), c[:, 1:])]


@cache
def naive_similarity(name, labels, bins, gamma=10.0):
    s = np.zeros((labels, labels))
    for first, last, c in axes_of(bins, labels):
        for k, m in itertools.product(range(first, last), repeat=2):
            if name == "potts":
                s[k, m] = 1.0 if k == m else 0.0
            elif name == "steps":
                s[k, m] = 10.0 if k == m else 3.0 if abs(k - m) <= 2 else 0.0
            else:
                quadratic = -sum((x - y) ** 2 for x, y in zip(c[k - first], c[m - first], strict=True)) / (2 * gamma**2)
                s[k, m] = quadratic if name == "quadratic" else math.exp(quadratic)
    return s


def naive_softmax(scores, axes):
    q = np.empty_like(scores)
    for first, last, _ in axes:
        e = np.exp(scores[first:last] - scores[first:last].max())
        q[first:last] = e / e.sum()
    return q


def naive_neighbors(y, x, height, width, radius, dilation, neighborhood):
    for dy, dx in itertools.product(range(-radius, radius + 1), repeat=2):
        yy, xx = y + dy * dilation, x + dx * dilation
        if (dy, dx) == (0, 0) or (neighborhood == "cross" and dy != 0 and dx != 0):
            continue
        if 0 <= yy < height and 0 <= xx < width:
            yield yy, xx


def naive_weight(g, y, x, yy, xx, weight, sigma_space, sigma_light):
    space = ((y - yy) ** 2 + (x - xx) ** 2) / (2 * sigma_space**2)
    return weight * math.exp(-space - (g[y, x] - g[yy, xx]) ** 2 / (2 * sigma_light**2))


def naive_mean_field(
    logits, guide, s, bins=None, radius=2, dilation=1, neighborhood="square", sigma_space=3.0, sigma_light=10.0,
    weight=1.0, sweeps=5, schedule="parallel", damping=0.0, start="softmax", previous=None, weight_time=1.0,
    sigma_time=10.0,
):  # fmt: skip
    logits, guide = logits.detach().double().numpy(), guide.detach().double().numpy()
    batch, labels, height, width = logits.shape
    axes = axes_of(bins, labels)
    out = np.empty_like(logits)
    pixels = list(itertools.product(range(height), range(width)))
    for i in range(batch):
        u, g = logits[i], guide[i, 0]
        q, scores = np.empty_like(u), np.zeros_like(u)
        for y, x in pixels:
            if start == "softmax":
                scores[:, y, x] = u[:, y, x]
            q[:, y, x] = naive_softmax(scores[:, y, x], axes)
        turns = [pixels] if schedule == "parallel" else [[p for p in pixels if sum(p) % 2 == c] for c in (0, 1)]
        for turn in turns * sweeps:
            old, before = q.copy(), scores.copy()
            for y, x in turn:
                t = u[:, y, x].copy()
                for yy, xx in naive_neighbors(y, x, height, width, radius, dilation, neighborhood):
                    w = naive_weight(g, y, x, yy, xx, weight, sigma_space, sigma_light)
                    for k in range(labels):
                        t[k] += w * np.dot(s[k], old[:, yy, xx])
                if previous is not None:
                    q_before, g_before = (p.detach().double().numpy()[i] for p in previous)
                    w = weight_time * math.exp(-((g[y, x] - g_before[0, y, x]) ** 2) / (2 * sigma_time**2))
                    t += w * (s @ q_before[:, y, x])
                if damping:
                    t = (1 - damping) * t + damping * before[:, y, x]
                scores[:, y, x] = t
                q[:, y, x] = naive_softmax(t, axes)
        out[i] = q
    return torch.from_numpy(out)


def naive_elbo(
    q, u, g, s, radius=1, neighborhood="cross", weight=1.0, sigma_space=3.0, sigma_light=10.0, previous=None
):
    """One image, numpy [K, H, W] and [H, W]; previous = (q', w_time at each pixel)."""
    _, height, width = u.shape
    total = 0.0
    for y, x in itertools.product(range(height), range(width)):
        total += sum(qk * (uk - math.log(qk)) for qk, uk in zip(q[:, y, x], u[:, y, x], strict=True) if qk > 0)
        for yy, xx in naive_neighbors(y, x, height, width, radius, 1, neighborhood):
            w = naive_weight(g, y, x, yy, xx, weight, sigma_space, sigma_light)
            total += 0.5 * w * (q[:, y, x] @ s @ q[:, yy, xx])
        if previous is not None:
            total += previous[1][y, x] * (q[:, y, x] @ s @ previous[0][:, y, x])
    return total


def problem(shape, seed=0, scale=2.0, dtype=torch.float64):
    """Logits, a guide with edges and flat parts, marginals and a guide of a frame before."""
    r = torch.Generator().manual_seed(seed)
    batch, labels, height, width = shape
    logits = scale * torch.randn(shape, generator=r, dtype=torch.float64)
    guide = 100 * torch.rand(batch, 1, height, width, generator=r, dtype=torch.float64).mul(4).floor().div(4)
    guide = guide + 5 * torch.randn(guide.shape, generator=r, dtype=torch.float64)
    return logits.to(dtype), guide.to(dtype)


def largest(a, b):
    assert a.shape == b.shape
    assert a.isfinite().all()
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


# Float32 scores err by some 1e-7 of what is summed, and each sweep hands that on.
TOLERANCE = {torch.float64: EXACT, torch.float32: 5e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
kernels = available("cpp")
LARGEST_ERRORS = {}  # backend and test: what was measured, printed by `pytest -rP -k largest_errors`


def check(logits, guide, similarity="potts", gamma=10.0, bins=None, tolerance=None, float32_tolerance=None, **options):
    """Against the naive loop: the reference as it is given, and each kernel in float32 or 16 bits."""
    labels = logits.shape[1]
    named = isinstance(similarity, str)
    s = naive_similarity(similarity, labels, bins, gamma) if named else similarity.numpy()
    expected = naive_mean_field(logits, guide, s, bins, **options)
    got = mean_field(logits, guide, similarity=similarity, gamma=gamma, bins=bins, **options)
    assert got.dtype == logits.dtype
    assert largest(got, expected) <= (tolerance or TOLERANCE[logits.dtype])
    short = logits if logits.dtype != torch.float64 else logits.float()
    exact = expected if short is logits else naive_mean_field(short, guide.float(), s, bins, **options)
    similarity = similarity if named else similarity.float()
    for backend in kernels:
        with fastcolor.use_backend(backend.name):
            for u in (short, short.contiguous(memory_format=torch.channels_last)):
                q = mean_field(u, guide.float(), similarity=similarity, gamma=gamma, bins=bins, **options)
                assert q.dtype == u.dtype
                error = largest(q, exact)
                if u.dtype == torch.float32:
                    place = backend.name, inspect.stack()[1].function
                    LARGEST_ERRORS[place] = max(LARGEST_ERRORS.get(place, 0.0), error)
                assert error <= max(tolerance or 0.0, float32_tolerance or TOLERANCE[u.dtype])
    return got


def symmetric(labels, seed=0, scale=1.0):
    m = torch.randn(labels, labels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * (m + m.T) / 2


# ---- against the naive loop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", op.SCHEDULES)
@pytest.mark.parametrize("neighborhood", op.NEIGHBORHOODS)
@pytest.mark.parametrize(
    "shape", [(1, 3, 1, 1), (2, 3, 1, 7), (1, 4, 5, 1), (2, 3, 5, 3), (1, 1, 3, 4), (1, 2, 7, 5)], ids=str
)
def test_shapes(shape, neighborhood, schedule):
    logits, guide = problem(shape)
    q = check(logits, guide, neighborhood=neighborhood, schedule=schedule, sweeps=3)
    assert largest(q.sum(1), torch.ones(shape[0], *shape[2:])) <= 1e-12
    check(logits, guide, symmetric(shape[1]), neighborhood=neighborhood, schedule=schedule, sweeps=2)


@pytest.mark.parametrize("neighborhood", op.NEIGHBORHOODS)
@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("radius", [1, 2, 3, 9])
def test_neighborhoods(radius, dilation, neighborhood):
    logits, guide = problem((1, 3, 5, 4), seed=radius)
    options = {"radius": radius, "dilation": dilation, "neighborhood": neighborhood, "sweeps": 2, "sigma_light": 30.0}
    check(logits, guide, **options)
    check(logits, guide, schedule="checkerboard", **options)


def test_huge_radius_costs_no_more_than_the_image():
    logits, guide = problem((1, 2, 3, 4))
    q = mean_field(logits, guide, similarity="potts", radius=3)
    assert torch.equal(q, mean_field(logits, guide, similarity="potts", radius=1000))


@pytest.mark.parametrize("schedule", op.SCHEDULES)
@pytest.mark.parametrize("name, bins", [
    ("potts", None), ("potts", SMALL), ("gaussian", SMALL), ("quadratic", SMALL),
    ("potts", SMALL_AXES), ("steps", SMALL_AXES), ("gaussian", SMALL_AXES), ("quadratic", SMALL_AXES),
    ("steps", SEPARABLE), ("quadratic", SEPARABLE),
], ids=str)  # fmt: skip
def test_similarities(name, bins, schedule):
    logits, guide = problem((2 if bins is not SEPARABLE else 1, bins.count if bins else 5, 3, 4))
    for gamma in (7.0, 25.0):
        check(logits, guide, name, gamma, bins, sweeps=2, radius=1, weight=0.4, schedule=schedule)


def test_313_labels_are_the_joint_bins():
    logits, guide = problem((1, 313, 3, 3))
    for name in ("quadratic", "gaussian"):
        q = mean_field(logits, guide, similarity=name, radius=1, weight=0.3, sweeps=2)
        s = naive_similarity(name, 313, JOINT)
        assert largest(q, naive_mean_field(logits, guide, s, JOINT, radius=1, weight=0.3, sweeps=2)) <= EXACT
        assert torch.equal(q, mean_field(logits, guide, similarity=name, radius=1, weight=0.3, sweeps=2, bins=JOINT))


def test_defaults():
    logits, guide = problem((1, 313, 4, 3))
    s = naive_similarity("quadratic", 313, JOINT, 10.0)
    assert largest(mean_field(logits, guide), naive_mean_field(logits, guide, s)) <= EXACT


def test_a_matrix_may_couple_the_axes_of_separable_bins():
    logits, guide = problem((1, 8, 4, 3))
    check(logits, guide, symmetric(8), bins=SMALL_AXES, sweeps=3)


def test_axes_run_by_themselves():
    logits, guide = problem((1, 8, 4, 3))
    both = mean_field(logits, guide, similarity="steps", bins=SMALL_AXES)
    changed = logits.clone()
    changed[:, 4:] += torch.randn_like(changed[:, 4:])
    assert torch.equal(both[:, :4], mean_field(changed, guide, similarity="steps", bins=SMALL_AXES)[:, :4])


@pytest.mark.parametrize("start", op.STARTS)
@pytest.mark.parametrize("damping", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("schedule", op.SCHEDULES)
def test_start_and_damping(schedule, damping, start):
    logits, guide = problem((1, 4, 4, 5))
    for sweeps in (0, 1, 3):
        check(logits, guide, symmetric(4), schedule=schedule, damping=damping, start=start, sweeps=sweeps)


def test_damping_ends_the_oscillation():
    logits, guide = torch.zeros(1, 2, 6, 6, dtype=torch.float64), torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    logits[:, 0] = 0.1
    options = {"similarity": -2 * torch.eye(2, dtype=torch.float64), "radius": 1, "neighborhood": "cross"}
    for damping, moves in ((0.0, True), (0.6, False)):
        last, later = (mean_field(logits, guide, sweeps=n, damping=damping, **options) for n in (200, 201))
        assert (largest(last, later) > 0.5) == moves


@pytest.mark.parametrize("sigma_space, sigma_light, weight", [
    (0.5, 2.0, 3.0), (math.inf, 10.0, 0.5), (2.0, math.inf, 0.2), (math.inf, math.inf, 0.1), (1e-30, 1.0, 1.0),
    (1.0, 1e-30, 1.0), (3.0, 10.0, 0.0),
])  # fmt: skip
def test_widths(sigma_space, sigma_light, weight):
    logits, guide = problem((1, 3, 4, 5))
    if sigma_light < 1e-9:
        guide = guide.div(25).floor()  # equal neighbours keep their weight, 0 / 0 must not appear
    # 1e-30 squared is 0 in the naive loop's division: a width that small is the same as 1e-9
    naive = {"sigma_space": max(sigma_space, 1e-9), "sigma_light": max(sigma_light, 1e-9), "weight": weight}
    for convert in (float, lambda v: torch.tensor(v, dtype=torch.float64)):
        q = mean_field(
            logits, guide, similarity="potts", sigma_space=convert(sigma_space), sigma_light=convert(sigma_light),
            weight=convert(weight),
        )  # fmt: skip
        assert largest(q, naive_mean_field(logits, guide, np.eye(3), **naive)) <= EXACT


@pytest.mark.parametrize("bins", [SMALL, SMALL_AXES], ids=str)
@pytest.mark.parametrize("backend", available("reference", "cpp"), ids=str)
def test_previous_frame_as_colours(bins, backend):
    """Of marginals the quadratic similarity takes no more than their mean colours."""
    logits = torch.randn(2, bins.count, 5, 4, device=backend.device)
    marginals = reference.softmax(torch.randn_like(logits) * 2, reference.label_axes(bins, bins.count))
    guide, before = (torch.rand(2, 1, 5, 4, device=backend.device) * 20 for _ in range(2))
    options = {"bins": bins, "weight_time": 0.8, "sigma_time": 7.0, "radius": 1}
    colors = reference.expected_colors(marginals, bins)
    with fastcolor.use_backend(backend.name):
        q, of_colors = (mean_field(logits, guide, previous=(p, before), **options) for p in (marginals, colors))
        without = mean_field(logits, guide, **options)
    assert (q - of_colors).abs().max() < 1e-5 < (q - without).abs().max()


@pytest.mark.parametrize("schedule", op.SCHEDULES)
@pytest.mark.parametrize("name, bins", [("quadratic", SMALL), ("potts", SMALL), ("steps", SMALL_AXES)], ids=str)
def test_previous_frame(name, bins, schedule):
    logits, guide = problem((2, bins.count, 4, 3))
    others, guide_before = problem((2, bins.count, 4, 3), seed=1)
    parts = [others[:, first:last].softmax(1) for first, last, _ in axes_of(bins, bins.count)]
    previous = (torch.cat(parts, 1), guide + 0.1 * guide_before)
    options = {"previous": previous, "weight_time": 0.7, "sigma_time": 4.0, "sweeps": 2, "radius": 1, "weight": 0.4}
    changed = check(logits, guide, name, bins=bins, schedule=schedule, **options)
    options.update(previous=None)
    assert largest(changed, mean_field(logits, guide, similarity=name, bins=bins, schedule=schedule, **options)) > 1e-3


def test_low_rank_pair_is_the_similarity():
    logits, guide = problem((1, 6, 4, 3))
    a, b = torch.randn(2, 6, 2, dtype=torch.float64)
    q = mean_field(logits, guide, similarity=(a, b))
    assert largest(q, naive_mean_field(logits, guide, (a @ b.T).numpy())) <= EXACT


def test_tolerance_bounds_the_change():
    logits, guide = problem((1, 313, 3, 4))
    exact = mean_field(logits, guide, similarity="gaussian", gamma=40.0, weight=0.1)
    errors = []
    for tolerance in (0.1, 0.01, 1e-4, 0.0):
        q = mean_field(logits, guide, similarity="gaussian", gamma=40.0, weight=0.1, tolerance=tolerance)
        errors.append(largest(q, exact))
        # scores move by at most Σ w · tolerance, w <= 0.1 for 11 neighbours at most: q by twice that, grown by sweeps
        assert errors[-1] <= 10 * tolerance + EXACT
    assert errors[0] > errors[1] > errors[2]
    pair = label_factors("gaussian", gamma=40.0, tolerance=0.01)[:2]
    assert largest(mean_field(logits, guide, similarity=pair, weight=0.1), exact) == errors[1]


@pytest.mark.parametrize("layout", ["channels_last", "permuted", "strided"])
def test_strides(layout):
    logits, guide = problem((2, 5, 4, 6))
    if layout == "channels_last":
        logits = logits.contiguous(memory_format=torch.channels_last)
        guide = guide.contiguous(memory_format=torch.channels_last)
    elif layout == "permuted":
        logits = logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        guide = guide.expand(2, 5, 4, 6)[:, 3:4]
    else:
        logits, guide = problem((2, 10, 4, 12))
        logits, guide = logits[:, ::2, :, ::2], guide[..., ::2]
    assert not logits.is_contiguous()
    check(logits, guide, "quadratic", bins=SMALL)


@every_simd
@pytest.mark.parametrize("dtype, step", [(torch.float32, 2e-6), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_types(dtype, step):
    """Arithmetic in float32: the result is the exact one, rounded once (by half a step of 16 bits at 1)."""
    logits, guide = problem((2, 5, 5, 4), dtype=dtype)
    check(logits, guide, "quadratic", bins=SMALL, tolerance=step)
    check(logits, guide.float(), "quadratic", bins=SMALL, tolerance=step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(logits, guide, "quadratic", bins=SMALL, tolerance=step)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, 5e-4)])
def test_extreme_logits(dtype, tolerance):
    """At 1e4 a float32 score is rounded by up to 5e-4, whoever adds the field to it."""
    logits, guide = problem((1, 5, 5, 3), dtype=dtype)
    logits = 1e4 * logits.sign()
    check(logits, guide, "gaussian", bins=SMALL, tolerance=tolerance, float32_tolerance=5e-4)
    logits[0, :, 2, 1] = 1e4 * torch.tensor([1, 1, -1, -1, 1])
    logits[0, 3, 1] = -math.inf  # forbidden labels
    q = mean_field(logits, guide, similarity="potts", damping=0.5)
    assert q.isfinite().all() and (q[0, 3, 1] == 0).all()
    logits[0, 3, 1] = -1e30
    assert largest(q, mean_field(logits, guide, similarity="potts", damping=0.5)) <= tolerance


def test_nan_stays_within_reach():
    logits, guide = problem((1, 3, 9, 9))
    logits[0, 1, 4, 4] = math.nan
    bad = mean_field(logits, guide, similarity="potts", radius=1, sweeps=2, start="softmax").isnan().any(1)[0]
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[2:7, 2:7] = True
    assert torch.equal(bad, expected)


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0)], ids=str)
def test_empty(shape):
    logits = torch.empty(shape, requires_grad=True)
    guide = torch.empty(shape[0], 1, *shape[2:])
    for schedule in op.SCHEDULES:
        q = mean_field(logits, guide, similarity="quadratic", bins=SMALL, schedule=schedule)
        assert q.shape == shape
    q.sum().backward()
    assert annealed_mean(q, bins=SMALL).shape == (shape[0], 2, *shape[2:])


def test_input_is_left_alone():
    logits, guide = problem((1, 5, 4, 3))
    copies = logits.clone(), guide.clone()
    mean_field(logits, guide, similarity="quadratic", bins=SMALL, schedule="checkerboard", previous=(logits, guide))
    assert torch.equal(logits, copies[0]) and torch.equal(guide, copies[1])


# ---- against pydensecrf ----------------------------------------------------------------------------------------------


def lattice_field(logits, grey, weight, sigma_space, sigma_light, sweeps):
    """pydensecrf's marginals [K, H W] in float64, of logits [K, H, W] and an image of three equal channels [H, W]."""
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    labels, height, width = logits.shape
    crf = densecrf.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(np.ascontiguousarray(-logits.reshape(labels, -1), dtype=np.float32))
    crf.addPairwiseBilateral(
        sxy=sigma_space, srgb=sigma_light * 3**0.5, compat=weight, normalization=densecrf.NO_NORMALIZATION,
        rgbim=np.ascontiguousarray(np.repeat(grey[:, :, None], 3, 2).astype(np.uint8)),
    )  # fmt: skip
    return np.asarray(crf.inference(sweeps)).astype(np.float64)


def lattice_kernel(grey, sigma_space, sigma_light):
    """The matrix by which pydensecrf filters, [H W, H W]: what one sweep adds to the scores for an impulse of q."""
    columns, high = [], 12.0
    for pixel in range(grey.size):
        logits = np.zeros((2, *grey.shape))
        logits[0].flat[pixel] = high
        q = lattice_field(logits, grey, 1.0, sigma_space, sigma_light, 1)
        columns.append((np.log(q[0] / q[1]) - logits[0].ravel()) / math.tanh(high / 2))
    return np.stack(columns, 1)


@pytest.mark.parametrize(
    "weight, sigma_space, sigma_light", [(0.3, 4.0, 10.0), (0.2, 6.0, 20.0), (0.1, 8.0, 10.0), (0.02, 8.0, 10.0)]
)
def test_pydensecrf(weight, sigma_space, sigma_light):
    """Potts labels on 16×16 pixels with a window over all of them.

    Its update is ours with another kernel. A permutohedral lattice gives back what it is given at one of its vertices,
    but pixels lie between them: splatting to the d + 1 around and slicing from them leaves 0.55 of the peak on average
    over 5 dimensions (0.8 over 2), and less where the blur meets a vertex that no pixel made. So its kernel is read off
    from impulses, and our weight is multiplied by the amplitude of the Gaussian that is nearest to it. What differs
    then is its weight of a pixel with itself, which we have not, and the error of the lattice.
    """
    labels, n = 5, 16
    logits = problem((1, labels, n, n), scale=1.5, dtype=torch.float32)[0]
    coarse = torch.rand(1, 1, 4, 4) * 255
    guide = torch.nn.functional.interpolate(coarse, size=(n, n)) + 5 * torch.randn(1, 1, n, n)
    guide = guide.round().clamp(0, 255)
    u, grey = logits[0].double().numpy(), guide[0, 0].double().numpy()
    lattice = lattice_field(u, grey, weight, sigma_space, sigma_light, 5)

    kernel, others = lattice_kernel(grey, sigma_space, sigma_light), ~np.eye(n * n, dtype=bool)
    y, x = np.mgrid[:n, :n]
    place = np.stack([y / sigma_space, x / sigma_space, grey / sigma_light], -1).reshape(-1, 3)
    gaussian = np.exp(-0.5 * ((place[:, None] - place) ** 2).sum(-1))
    amplitude = (kernel * gaussian)[others].sum() / (gaussian[others] ** 2).sum()

    def dense(matrix):
        scores = unary = torch.from_numpy(u.reshape(labels, -1))
        for _ in range(5):
            scores = unary + weight * scores.softmax(0) @ torch.from_numpy(matrix.T)
        return scores.softmax(0).numpy()

    q = mean_field(
        logits, guide, similarity="potts", radius=n - 1, sigma_space=sigma_space, sigma_light=sigma_light,
        weight=weight * amplitude,
    )[0].reshape(labels, -1).numpy()  # fmt: skip
    itself = np.diag(np.diag(kernel))
    differences = {
        "the dense loop with its kernel": dense(kernel),
        "without the pixel itself": dense(kernel * others),
        "with our kernel for the others": dense(amplitude * gaussian * others + itself),
        "ours": q,
    }
    differences = {name: float(np.abs(other - lattice).max()) for name, other in differences.items()}
    same = (q.argmax(0) == lattice.argmax(0)).mean()
    moved = np.abs(lattice - dense(np.zeros_like(kernel))).max()  # by the field at all
    print(f"{amplitude=:.3f}, itself {np.diag(kernel).mean():.3f}, {same=:.2%}, {moved=:.3f}", differences)
    assert 0.4 < amplitude < 0.6
    assert differences["the dense loop with its kernel"] <= 1e-5
    # what is left is no more than its two causes
    assert (
        differences["ours"] <= differences["without the pixel itself"] + differences["with our kernel for the others"]
    )
    assert same >= 0.98
    assert moved > 2 * differences["ours"]


# ---- the bound -------------------------------------------------------------------------------------------------------


def test_elbo_is_the_formula():
    logits, guide = problem((2, 5, 3, 4))
    others, guide_before = problem((2, 5, 3, 4), seed=3)
    q, q_before = others.softmax(1), others.flip(1).softmax(1)
    for name in ("potts", "gaussian", "quadratic"):
        s = naive_similarity(name, 5, SMALL)
        got = elbo(
            q, logits, guide, similarity=name, bins=SMALL, radius=2, weight=0.8,
            previous=(q_before, guide_before), weight_time=0.6, sigma_time=9.0,
        )  # fmt: skip
        w_time = 0.6 * torch.exp(-((guide - guide_before) ** 2) / (2 * 81))
        for i in range(2):
            before = (q_before[i].numpy(), w_time[i, 0].numpy())
            expected = naive_elbo(q[i].numpy(), logits[i].numpy(), guide[i, 0].numpy(), s, 2, "square", 0.8,
                                  previous=before)  # fmt: skip
            assert abs(got[i].item() - expected) <= 1e-10 * abs(expected)


def test_elbo_never_falls_under_checkerboard():
    """200 problems of many sizes, strengths and similarities, positive or not, each over four sweeps."""
    r = np.random.default_rng(0)
    gains = []
    for seed in range(200):
        bins = (None, SMALL, SMALL_AXES)[seed % 3]
        labels = bins.count if bins else int(r.integers(1, 7))
        shape = (1, labels, int(r.integers(1, 6)), int(r.integers(1, 6)))
        logits, guide = problem(shape, seed, scale=r.uniform(0, 3))
        names = [symmetric(labels, seed, scale=r.uniform(0.1, 5))]
        names += ["potts"] if bins is None else ["quadratic", "gaussian"] + ["steps"] * (bins is SMALL_AXES)
        field = {
            "similarity": names[seed // 3 % len(names)], "bins": bins, "radius": 1, "neighborhood": "cross",
            "sigma_light": r.uniform(1, 50), "weight": r.uniform(0, 3),
        }  # fmt: skip
        if seed % 4 == 0:
            field["previous"] = (logits.flip(2).softmax(1), guide.flip(3))
        options = {"start": op.STARTS[seed % 2], "damping": 0.4 * (seed % 5 == 0), "schedule": "checkerboard"}
        bounds = [
            elbo(mean_field(logits, guide, sweeps=n, **options, **field), logits, guide, **field).item()
            for n in range(5)
        ]
        for before, after in itertools.pairwise(bounds):
            assert after >= before - 1e-11 * max(1, abs(before)), (seed, bounds)
        gains.append(bounds[-1] - bounds[0])
    assert np.mean(np.array(gains) > 1e-6) > 0.9


def test_elbo_at_a_fixed_point_is_the_log_partition_of_pixels_alone():
    """Without neighbours the field is exact: the bound is Σ_i log Σ_l exp u_i(l)."""
    logits, guide = problem((2, 4, 3, 3))
    q = mean_field(logits, guide, similarity="potts", weight=0.0)
    bound = elbo(q, logits, guide, similarity="potts", weight=0.0)
    assert largest(bound, logits.logsumexp(1).sum((1, 2))) <= 1e-10


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, damping", [("parallel", 0.0), ("parallel", 0.3), ("checkerboard", 0.0)])
@pytest.mark.parametrize("similarity", ["quadratic", "gaussian", "potts", "matrix", "pair"])
def test_gradcheck(similarity, schedule, damping):
    logits, guide = problem((1, 5, 2, 2), scale=1.0)
    others, guide_before = problem((1, 5, 2, 2), seed=4)
    scalars = [torch.tensor(v, dtype=torch.float64) for v in (0.3, 1.7, 20.0, 0.5, 30.0)]
    tensors = {"matrix": [symmetric(5)], "pair": [0.5 * symmetric(5)[:, :2], symmetric(5)[:, 2:4]]}.get(similarity, [])
    inputs = [logits, guide, others.softmax(1), guide_before, *scalars, *tensors]
    inputs = [x.clone().requires_grad_() for x in inputs]

    def run(u, g, q_before, g_before, weight, sigma_space, sigma_light, weight_time, sigma_time, *s):
        chosen = {"matrix": lambda: (s[0] + s[0].T) / 2, "pair": lambda: s}.get(similarity, lambda: similarity)()
        return mean_field(
            u, g, similarity=chosen, bins=SMALL, gamma=30.0, radius=1, sweeps=2, schedule=schedule, damping=damping,
            weight=weight, sigma_space=sigma_space, sigma_light=sigma_light, previous=(q_before, g_before),
            weight_time=weight_time, sigma_time=sigma_time,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, inputs, atol=1e-7)


def test_gradcheck_separable_and_outputs():
    logits, guide = (x.requires_grad_() for x in problem((1, 8, 2, 2), scale=1.0))

    def run(u, g, temperature):
        q = mean_field(u, g, similarity="steps", bins=SMALL_AXES, radius=1, sweeps=2, weight=0.1, start="uniform")
        return annealed_mean(q, temperature, SMALL_AXES), entropy(q)

    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (logits, guide, temperature), atol=1e-7)


def test_gradient_of_a_truncated_matrix_is_finite():
    logits, guide = problem((1, 6, 3, 3))
    s = (torch.eye(6, dtype=torch.float64) + 1e-9 * symmetric(6)).requires_grad_()  # equal eigenvalues
    full = (torch.ones(6, 6, dtype=torch.float64) + 1e-4 * symmetric(6)).requires_grad_()
    for matrix in (s, full):
        mean_field(logits, guide, similarity=matrix, tolerance=1e-3)[:, 0].sum().backward()
        assert matrix.grad.isfinite().all() and matrix.grad.abs().max() > 0


def test_gradients_at_certainty_are_finite():
    logits = torch.tensor([0.0, 1e4, -1e4, -math.inf, 3.0]).reshape(1, 5, 1, 1).expand(1, 5, 3, 3).clone()
    logits.requires_grad_()
    q = mean_field(logits, torch.zeros(1, 1, 3, 3), similarity="quadratic", bins=SMALL)
    (annealed_mean(q, 0.1, SMALL).sum() + entropy(q).sum()).backward()
    assert logits.grad.isfinite().all()


# ---- label factors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins, rank", [(JOINT, 3), (SEPARABLE, 4), (SMALL, 3)], ids=str)
def test_quadratic_factors_are_exact(bins, rank):
    a, b, error = label_factors("quadratic", bins, gamma=13.0)
    assert a.shape == b.shape == (bins.count, rank) and error == 0
    apart = torch.from_numpy(naive_similarity("quadratic", bins.count, bins, 13.0)) - a @ b.T
    for first, last, _ in axes_of(bins, bins.count):
        block = apart[first:last, first:last]
        assert (block - block[:1]).abs().max() <= 1e-10  # what is left does not depend on l
        apart[first:last, first:last] = 0
    assert apart.abs().max() == 0


@pytest.mark.parametrize("gamma", [10.0, 40.0])
@pytest.mark.parametrize("tolerance", [0.05, 0.005, 1e-5])
def test_gaussian_factors_report_their_error(gamma, tolerance):
    s = naive_similarity("gaussian", 313, JOINT, gamma)
    a, b, error = label_factors("gaussian", gamma=gamma, tolerance=tolerance)
    true = np.abs(s - (a @ b.T).numpy()).max()
    assert abs(true - error) <= 1e-12 and error <= tolerance
    if a.shape[1] < 313:
        assert label_factors("gaussian", gamma=gamma, rank=a.shape[1] - 1).error > tolerance
    if gamma == 40:
        assert a.shape[1] <= 100


def test_rank_ends_the_truncation():
    a, b, error = label_factors("gaussian", gamma=40.0, rank=32)
    assert a.shape == b.shape == (313, 32) and 1e-3 < error < 0.0108
    assert label_factors("gaussian", gamma=40.0, tolerance=1e-9, rank=32).error == error
    values = np.sort(np.abs(np.linalg.eigvalsh(naive_similarity("gaussian", 313, JOINT, 40.0))))[::-1]
    a, b, _ = label_factors("gaussian", gamma=40.0, rank=8)
    kept = np.sort(np.linalg.svd((a @ b.T).numpy(), compute_uv=False))[::-1][:8]
    assert np.abs(kept - values[:8]).max() <= 1e-10 * values[0]


@pytest.mark.parametrize("similarity", ["potts", "steps", "gaussian", "matrix"])
@pytest.mark.parametrize("tolerance", [None, 0.0, 1e-6])
def test_full_rank_where_nothing_can_go(similarity, tolerance):
    s = symmetric(8) if similarity == "matrix" else similarity
    expected = s if similarity == "matrix" else torch.from_numpy(naive_similarity(s, 8, SMALL_AXES))
    a, b, error = label_factors(s, SMALL_AXES, tolerance=tolerance)
    assert a.shape == b.shape == (8, 8) and error == 0
    assert largest(a @ b.T, expected) <= 1e-12


def test_rank_of_a_matrix_is_found():
    v = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    s = v @ torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64)) @ v.T
    a, b, error = label_factors(s, tolerance=1e-9)
    assert a.shape == (9, 2) and error <= 1e-9 and largest(a @ b.T, s) <= 1e-9
    a, b, error = label_factors(torch.zeros(4, 4), tolerance=0.1)
    assert largest(a @ b.T, torch.zeros(4, 4)) == 0 and error == 0


# ---- what is read from the marginals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [JOINT, SEPARABLE, SMALL, SMALL_AXES], ids=str)
@pytest.mark.parametrize("temperature", [0.2, 0.38, 1.0, 3.0])
def test_annealed_mean_is_the_formula(temperature, bins):
    q = torch.cat([problem((2, bins.count, 3, 2))[0][:, a:b].softmax(1) for a, b, _ in axes_of(bins, bins.count)], 1)
    got = annealed_mean(q, temperature, bins)
    expected = []
    for first, last, c in axes_of(bins, bins.count):
        power = q[:, first:last] ** (1 / temperature)
        for d in range(c.shape[1]):
            colors = torch.from_numpy(c[:, d].copy())[None, :, None, None]
            expected.append((colors * power).sum(1) / power.sum(1))
    assert largest(got, torch.stack(expected, 1)) <= EXACT
    assert largest(annealed_mean(q.float(), temperature, bins), got) <= 1e-4


@pytest.mark.parametrize("bins", [JOINT, SEPARABLE], ids=str)
def test_annealed_mean_becomes_the_mode(bins):
    q = problem((2, bins.count, 5, 4))[0].softmax(1)
    assert largest(annealed_mean(q, 1e-6, bins), mode(q, bins)) <= 1e-6
    expected = torch.empty(2, 2, 5, 4, dtype=torch.float64)
    for b, y, x in itertools.product(range(2), range(5), range(4)):
        values = []
        for first, last, c in axes_of(bins, bins.count):
            values += list(c[int(q[b, first:last, y, x].argmax())])
        expected[b, :, y, x] = torch.tensor(values)
    assert torch.equal(mode(q, bins), expected)


def test_outputs_default_to_the_313_bins_and_the_published_temperature():
    q = problem((1, 313, 2, 3))[0].softmax(1)
    assert torch.equal(annealed_mean(q), annealed_mean(q, 0.38, JOINT))
    assert torch.equal(mode(q), mode(q, JOINT))


def test_annealed_mean_with_zeros_and_small_numbers():
    q = torch.zeros(1, 5, 1, 2, dtype=torch.float64)
    q[0, 3, 0, 0] = 1.0
    q[0, [1, 2], 0, 1] = 1e-200  # need not sum to 1; squared they would vanish
    ab = annealed_mean(q, 0.1, SMALL)
    assert largest(ab[0, :, 0], torch.tensor([[-30.0, 5.0], [10.0, 10.0]], dtype=torch.float64)) <= EXACT


def test_annealed_mean_with_nan():
    q = torch.full((1, 5, 1, 2), 0.2)
    q[0, 2, 0, 0] = torch.nan
    for backend in ("reference", "auto"):
        with fastcolor.use_backend(backend):
            ab = annealed_mean(q, bins=SMALL)
        assert ab[0, :, 0, 0].isnan().all() and ab[0, :, 0, 1].isfinite().all()


def test_annealed_mean_of_logits_is_differentiable_and_compiles():
    logits = problem((1, 5, 2, 3))[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda u: annealed_mean(u, 0.5, SMALL, logits=True), logits)
    u = logits.detach().float()
    compiled = torch.compile(lambda u: annealed_mean(u, 0.5, SMALL, logits=True), backend="aot_eager", fullgraph=True)
    assert largest(compiled(u), annealed_mean(logits.detach(), 0.5, SMALL, logits=True)) <= 1e-3


def test_entropy():
    q = problem((2, 5, 3, 4))[0].softmax(1)
    assert largest(entropy(q), -(q * q.log()).sum(1, keepdim=True)) <= 1e-12
    assert largest(entropy(torch.full((1, 7, 1, 1), 1 / 7)), torch.full((1, 1, 1, 1), math.log(7))) <= 1e-6
    assert entropy(torch.eye(3).reshape(1, 3, 3, 1)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_of_16_bits_are_float32(dtype):
    q = problem((1, 5, 3, 3))[0].softmax(1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for f in (lambda x: annealed_mean(x, bins=SMALL), lambda x: mode(x, SMALL), entropy):
            assert f(q).dtype == torch.float32
            assert largest(f(q), f(q.double())) <= 1e-4


# ---- unaries and the paper's own model -------------------------------------------------------------------------------


def test_paper_preset():
    """Every number of the paper's model written out here, with L in [0, 1]."""
    network, guide = problem((1, 50, 4, 4))
    guide = 50 + (guide - guide.mean()) / 40  # steps of about one unit of L: neither joined nor cut everywhere
    p = torch.cat([network[:, :25].softmax(1), network[:, 25:].softmax(1)], 1)
    unary = probability_unary(network, bins=SEPARABLE)
    assert largest(unary, 10 * p) <= 1e-12
    q = mean_field(unary, guide, **PRESETS["melas_kyriazi_2017"])

    light, s = guide[0, 0].numpy() / 100, naive_similarity("steps", 50, SEPARABLE)
    expected = np.full((50, 4, 4), 1 / 25)
    for _ in range(8):
        for color in (0, 1):
            for y, x in itertools.product(range(4), repeat=2):
                if (y + x) % 2 == color:
                    t = 10 * p[0, :, y, x].numpy()
                    for yy, xx in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                        if 0 <= yy < 4 and 0 <= xx < 4:
                            w = math.exp(-((light[y, x] - light[yy, xx]) ** 2) / 1e-4)
                            t = t + w * (s @ expected[:, yy, xx])
                    expected[:, y, x] = naive_softmax(t, axes_of(SEPARABLE, 50))
    assert largest(q[0], torch.from_numpy(expected)) <= EXACT
    assert mode(q, SEPARABLE).shape == (1, 2, 4, 4)
    module = MeanField(**PRESETS["melas_kyriazi_2017"], learn=())
    assert torch.equal(module(unary, guide), q)


def test_histogram_multiplies_the_distribution():
    logits = problem((2, 8, 3, 2))[0]
    h = torch.tensor([3.0, 0, 1, 4, 1, 1, 0, 2], dtype=torch.float64)
    unary = histogram_unary(h, SMALL_AXES)
    assert unary.shape == (1, 8, 1, 1)
    assert largest(unary.exp().flatten(), h / 8 * torch.tensor([1.0] * 4 + [2.0] * 4)) <= 1e-12
    q = mean_field(logits + unary, logits[:, :1], similarity="steps", bins=SMALL_AXES, sweeps=0)
    for place in (slice(0, 4), slice(4, 8)):
        expected = logits[:, place].softmax(1) * h[place][None, :, None, None]
        assert largest(q[:, place], expected / expected.sum(1, keepdim=True)) <= 1e-12
    assert (mean_field(logits + unary, logits[:, :1], similarity="steps", bins=SMALL_AXES)[:, [1, 6]] == 0).all()


@pytest.mark.parametrize("bins", [JOINT, SEPARABLE], ids=str)
def test_hint(bins):
    ab = torch.full((2, 2, 3, 4), math.nan)
    mask = torch.zeros(2, 1, 3, 4, dtype=torch.bool)
    clicks = {(0, 1, 2): (23.0, -37.0), (1, 0, 0): (-10.0, 40.0), (1, 2, 3): (4.0, 7.5)}
    for (b, y, x), color in clicks.items():
        ab[b, :, y, x] = torch.tensor(color)
        mask[b, 0, y, x] = True
    unary = hint_unary(ab, mask, bins, strength=20.0)
    assert unary.shape == (2, bins.count, 3, 4) and unary.isfinite().all()
    assert (unary.movedim(1, -1)[~mask[:, 0]] == 0).all()
    for (b, y, x), color in clicks.items():
        for axis, (first, last, c) in enumerate(axes_of(bins, bins.count)):
            point = np.array(color if bins.kind == "joint" else color[axis : axis + 1])
            d = ((c - point) ** 2).sum(1)
            got = unary[b, first:last, y, x].double().numpy()
            near = np.argsort(d, kind="stable")[:5]
            assert np.abs(got[near] - np.maximum(20 - (d[near] - d.min()) / 50, 0)).max() <= 1e-4
            assert (np.sort(got)[:-5] == 0).all() and abs(got.max() - 20) <= 1e-6
    # over grey logits the mean is the clicked colour, closer than the nearest centre
    shown = annealed_mean(torch.cat([unary[:, a:b].softmax(1) for a, b, _ in axes_of(bins, bins.count)], 1), 1.0, bins)
    for (b, y, x), color in clicks.items():
        assert (shown[b, :, y, x] - torch.tensor(color)).abs().max() <= 1.0
    assert (hint_unary(ab, torch.zeros_like(mask), bins) == 0).all()
    far = hint_unary(torch.full((1, 2, 1, 1), 500.0), torch.ones(1, 1, 1, 1, dtype=torch.bool), bins)
    assert far.min() >= 0 and far.max() == 20


# ---- the module ------------------------------------------------------------------------------------------------------


def test_module_is_the_function():
    logits, guide = problem((1, 5, 4, 4), dtype=torch.float32)
    options = {
        "bins": SMALL,
        "similarity": "quadratic",
        "weight": 0.3,
        "sigma_space": 2.0,
        "sigma_light": 8.0,
        "sweeps": 3,
    }
    field = MeanField(**options)
    assert [name for name, _ in field.named_parameters()] == ["log_weight", "log_sigma_space", "log_sigma_light"]
    assert largest(field(logits, guide), mean_field(logits, guide, **options)) <= 1e-6
    assert abs(field.value("weight").item() - 0.3) <= 1e-7 and field.value("similarity") == "quadratic"
    previous = (logits.flip(1).softmax(1), guide)
    expected = mean_field(logits, guide, previous=previous, **options)
    assert largest(field(logits, guide, previous), expected) <= 1e-6
    assert "quadratic" in repr(field)


@pytest.mark.parametrize("similarity", ["gaussian", "matrix", "pair"])
def test_module_learns(similarity):
    logits, guide = problem((2, 5, 4, 4), dtype=torch.float32)
    pair = (0.3 * symmetric(5)[:, :2].float(), symmetric(5)[:, 2:4].float())
    start = {"gaussian": "gaussian", "matrix": symmetric(5).float(), "pair": pair}[similarity]
    field = MeanField(SMALL, similarity=start, learn=MeanField.LEARNABLE, sweeps=2, weight=0.3)
    assert (
        largest(field(logits, guide), mean_field(logits, guide, similarity=start, bins=SMALL, sweeps=2, weight=0.3))
        <= 1e-6
    )
    target = logits.flip(1).argmax(1)
    optimizer = torch.optim.Adam(field.parameters(), 0.2)
    losses = []
    for _ in range(15):
        q = field(logits, guide, previous=(logits.softmax(1), guide + 3))
        losses.append(torch.nn.functional.nll_loss(q.clamp_min(1e-9).log(), target))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in field.parameters())
        assert all(p.grad.abs().max() > 0 for p in field.parameters())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(field.value(n) > 0 for n in ("weight", "sigma_space", "sigma_light", "weight_time", "sigma_time"))
    if similarity != "pair":
        assert torch.equal(field.value("similarity"), field.value("similarity").T)
    other = MeanField(SMALL, similarity=start, learn=MeanField.LEARNABLE, sweeps=2)
    other.load_state_dict(field.state_dict())
    assert torch.equal(other(logits, guide), field(logits, guide))


def test_module_keeps_what_it_does_not_learn():
    field = MeanField(SMALL, similarity=symmetric(5), learn=("weight",), sigma_space=math.inf)
    assert [n for n, _ in field.named_parameters()] == ["log_weight"] and list(field.state_dict()) == ["log_weight"]
    logits, guide = problem((1, 5, 3, 3))
    expected = naive_mean_field(logits, guide, symmetric(5).numpy(), sigma_space=math.inf)
    assert largest(field(logits, guide), expected) <= 1e-7
    assert list(MeanField(SMALL, sigma_space=math.inf).state_dict()) == ["log_weight", "log_sigma_light"]
    with pytest.raises(ValueError, match="weight must be > 0 to be learned, got 0.0"):
        MeanField(SMALL, weight=0.0)
    with pytest.raises(ValueError, match="learn must be one of 'weight', .*got 'gamma'"):
        MeanField(SMALL, learn=("gamma",))
    with pytest.raises(ValueError, match="radius must be >= 1, got 0"):
        MeanField(SMALL, radius=0)


@pytest.mark.parametrize("kind", ["function", "module"])
def test_compiles_to_one_graph(kind):
    logits, guide = problem((1, 5, 4, 3))
    options = {"bins": SMALL, "schedule": "checkerboard", "sweeps": 1, "radius": 1}
    field = MeanField(**options) if kind == "module" else lambda u, g: mean_field(u, g, **options)
    assert largest(torch.compile(field, fullgraph=True, backend="eager")(logits, guide), field(logits, guide)) <= 1e-12


# ---- errors ----------------------------------------------------------------------------------------------------------

NOT_SYMMETRIC = torch.eye(5) + torch.tensor([[0.0, 1, 0, 0, 0]] + [[0.0] * 5] * 4)


@pytest.mark.parametrize("change, message", [
    ({"logits": torch.zeros(5, 4, 4)}, r"logits must have shape \[B, K, H, W\] with K >= 1, got \[5, 4, 4\]"),
    ({"logits": torch.zeros(2, 0, 4, 4)}, r"logits must have shape .* K >= 1, got \[2, 0, 4, 4\]"),
    ({"logits": torch.zeros(2, 6, 8, 8)}, r"guide must have shape \[2, 1, 8, 8\], got \[2, 1, 4, 4\]"),
    ({"guide": torch.zeros(2, 4, 4)}, r"guide must have shape \[2, 1, 4, 4\], got \[2, 4, 4\]"),
    ({"bins": JOINT}, r"logits must have 313 labels for ColorBins\('joint', 313 labels\), got 5"),
    ({"bins": None, "similarity": "gaussian"}, r"similarity 'gaussian' needs the colours .* K = 5, got None"),
    ({"bins": None}, r"similarity 'quadratic' needs the colours"),
    ({"similarity": "steps"}, r"similarity 'steps' needs .*ColorBins\('separable'\), got ColorBins\('joint'"),
    ({"similarity": "pots"}, r"similarity must be one of 'potts', 'steps', 'gaussian', 'quadratic', got 'pots'"),
    ({"similarity": torch.eye(4)}, r"similarity must have shape \[5, 5\], got \[4, 4\]"),
    ({"similarity": torch.zeros(5, 3)}, r"similarity must have shape \[K, K\], got \[5, 3\]"),
    ({"similarity": NOT_SYMMETRIC}, r"similarity must be symmetric, got entries that differ by 1 "),
    ({"similarity": torch.eye(5) * math.nan}, r"similarity must be finite"),
    ({"similarity": torch.diag(torch.full((5,), math.inf))}, r"similarity must be finite"),
    ({"similarity": (torch.eye(5), torch.eye(5) * math.inf)}, r"similarity must be finite"),
    ({"similarity": (torch.ones(5, 2), torch.ones(5, 3))}, r"factors must both have shape \[5, R\], got \[5, 2\] and"),
    ({"gamma": 0.0}, r"gamma must be > 0 and finite, got 0.0"),
    ({"gamma": math.nan}, r"gamma must be > 0 and finite, got nan"),
    ({"radius": 0}, r"radius must be >= 1, got 0"),
    ({"dilation": 0}, r"dilation must be >= 1, got 0"),
    ({"neighborhood": "disk"}, r"neighborhood must be one of 'square', 'cross', got 'disk'"),
    ({"schedule": "serial"}, r"schedule must be one of 'parallel', 'checkerboard', got 'serial'"),
    ({"start": "zero"}, r"start must be one of 'softmax', 'uniform', got 'zero'"),
    ({"sigma_space": -1.0}, r"sigma_space must be > 0, got -1.0"),
    ({"sigma_light": 0}, r"sigma_light must be > 0, got 0.0"),
    ({"sigma_light": torch.tensor(-2.0)}, r"sigma_light must be > 0, got -2.0"),
    ({"sigma_light": torch.ones(2)}, r"sigma_light must be a float or a 0-dim tensor, got shape \[2\]"),
    ({"sigma_time": math.nan}, r"sigma_time must be > 0, got nan"),
    ({"weight": -0.5}, r"weight must be >= 0 and finite, got -0.5"),
    ({"weight": math.inf}, r"weight must be >= 0 and finite, got inf"),
    ({"weight_time": -1}, r"weight_time must be >= 0 and finite, got -1.0"),
    ({"sweeps": -1}, r"sweeps must be >= 0, got -1"),
    ({"damping": 1.0}, r"damping must be in \[0, 1\), got 1.0"),
    ({"damping": -0.1}, r"damping must be in \[0, 1\), got -0.1"),
    ({"tolerance": -1e-3}, r"tolerance must be >= 0 or None, got -0.001"),
    ({"previous": (torch.zeros(2, 4, 4, 4), torch.zeros(2, 1, 4, 4))}, r"previous marginals must .*\[2, 5, 4, 4\]"),
    ({"previous": (torch.zeros(2, 5, 4, 4), torch.zeros(2, 1, 4, 3))}, r"previous guide must .*got \[2, 1, 4, 3\]"),
    ({"previous": (torch.zeros(2, 2, 4, 4), torch.zeros(2, 1, 4, 4)), "similarity": "potts"},
     r"previous marginals must .*\[2, 5, 4, 4\]"),
    ({"previous": (torch.zeros(2, 5, 4, 4),)}, r"previous must be \(marginals, guide\), got 1 items"),
], ids=str)  # fmt: skip
def test_errors(change, message):
    arguments = {"logits": torch.zeros(2, 5, 4, 4), "guide": torch.zeros(2, 1, 4, 4), "bins": SMALL}
    if "logits" in change:
        arguments["bins"] = None
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        mean_field(arguments.pop("logits"), arguments.pop("guide"), **arguments)


@pytest.mark.parametrize("call, error, message", [
    (lambda: mean_field(torch.zeros(1, 5, 2, 2).long(), torch.zeros(1, 1, 2, 2)), TypeError,
     "logits must be a floating tensor, got torch.int64"),
    (lambda: mean_field(np.zeros((1, 5, 2, 2)), torch.zeros(1, 1, 2, 2), similarity="potts"), TypeError,
     "logits must be a floating tensor, got float64"),
    (lambda: mean_field(torch.zeros(1, 5, 2, 2), torch.zeros(1, 1, 2, 2).byte()), TypeError,
     "guide must be a floating tensor, got torch.uint8"),
    (lambda: annealed_mean(torch.zeros(1, 313, 2, 2), 0.0), ValueError, "temperature must be > 0 and finite, got 0.0"),
    (lambda: annealed_mean(torch.zeros(1, 313, 2, 2), -1), ValueError, "temperature must be > 0 and finite, got -1"),
    (lambda: annealed_mean(torch.zeros(1, 50, 2, 2)), ValueError, "marginals must have 313 labels .* got 50"),
    (lambda: annealed_mean(torch.zeros(313)), ValueError, r"marginals must have shape \[B, 313, H, W\], got \[313\]"),
    (lambda: mode(torch.zeros(1, 50, 2, 2), JOINT), ValueError, "marginals must have 313 labels .* got 50"),
    (lambda: mode(torch.zeros(1, 313, 2, 2).int()), TypeError, "marginals must be a floating tensor, got torch.int32"),
    (lambda: entropy(torch.zeros(3, 2, 2)), ValueError, r"marginals must have shape \[B, K, H, W\], got \[3, 2, 2\]"),
    (lambda: label_factors("gaussian", rank=0), ValueError, "rank must be >= 1, got 0"),
    (lambda: label_factors("steps"), ValueError, r"'steps' needs labels in a row: bins=ColorBins\('separable'\)"),
    (lambda: label_factors(NOT_SYMMETRIC), ValueError, "similarity must be symmetric"),
    (lambda: label_factors(torch.eye(4), SMALL), ValueError, "similarity must have 5 labels .* got 4"),
    (lambda: probability_unary(torch.zeros(5)), ValueError, r"logits must have shape \[B, K, H, W\], got \[5\]"),
    (lambda: histogram_unary(torch.ones(4), SMALL), ValueError, "histogram must have 5 labels .* got 4"),
    (lambda: histogram_unary(torch.ones(2, 2)), ValueError, r"histogram must have shape \[K\], got \[2, 2\]"),
    (lambda: histogram_unary(-torch.ones(5)), ValueError, "histogram must be finite and not negative"),
    (lambda: histogram_unary(torch.tensor([1.0] * 4 + [0.0] * 4), SMALL_AXES), ValueError, "each axis, got all zero"),
    (lambda: hint_unary(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2).bool()), ValueError, "ab must have shape"),
    (lambda: hint_unary(torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2)), TypeError, "mask must be bool, got torch.f"),
    (lambda: hint_unary(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2).bool()), ValueError,
     r"mask must have shape \[1, 1, 2, 2\], got \[1, 2, 2\]"),
    (lambda: hint_unary(torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2).bool(), strength=-1), ValueError, "strength"),
    (lambda: hint_unary(torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2).bool(), neighbors=0), ValueError, "neighbors"),
    (lambda: hint_unary(torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2).bool(), sigma=0), ValueError, "sigma must be"),
])  # fmt: skip
def test_errors_of_the_others(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- kernels ---------------------------------------------------------------------------------------------------------

on_kernels = pytest.mark.parametrize("backend", kernels, ids=str)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def relative(fast, exact):
    return largest(fast, exact) / (exact.abs().max().item() + 1e-3)


def allowed(plain, exact):
    """The error that a gradient may have: sums over pixels that nearly cancel err in the float32 reference too. Of a
    scalar, a single sum, that error is now and then 0 by luck: on which machine, the BLAS decides."""
    return max(5e-6 if exact.ndim else 5e-5, 10 * relative(plain, exact))


@every_simd
@pytest.mark.skipif(not kernels, reason="no C++ kernels")
def test_exp2_bound():
    """The bound beside exp2_of in simd_body.h: 2.5e-7 relative above 2^-126, 0 below 2^-127, nan stays."""
    x = -torch.linspace(0, 126, 1 << 22, dtype=torch.float64).float()
    out = torch.empty_like(x)
    _backend.native("_cpu").exp2_of(x.data_ptr(), out.data_ptr(), x.numel())
    exact = x.double().exp2()
    assert ((out.double() - exact).abs() / exact).max() <= 2.5e-7
    x = torch.tensor([-126.5, -127.0, -127.6, -1e4, -math.inf, math.nan, 0.0])
    out = torch.empty_like(x)
    _backend.native("_cpu").exp2_of(x.data_ptr(), out.data_ptr(), x.numel())
    assert out[0] < 1e-37 and (out[1:5] == 0).all() and out[5].isnan() and abs(out[6] - 1) <= 2.5e-7


@every_simd
@on_kernels
@pytest.mark.parametrize("labels", [1, 2, 15, 16, 17, 33, 50, 64])
@pytest.mark.parametrize("width", [1, 3, 16, 37])
def test_every_tail(backend, labels, width):
    """Vectors end within labels and within rows; R = K."""
    logits, guide = problem((2, labels, 4, width), seed=labels)
    for u in (logits.float(), logits.float().contiguous(memory_format=torch.channels_last)):
        for s in ("potts", symmetric(labels, scale=0.3)):
            exact = mean_field(logits, guide, similarity=s, sweeps=2, weight=0.2)
            with fastcolor.use_backend(backend.name):
                s = s if isinstance(s, str) else s.float()
                q = mean_field(u, guide.float(), similarity=s, sweeps=2, weight=0.2)
            assert largest(q, exact) <= 5e-6


@every_simd
@on_kernels
@pytest.mark.parametrize("height, width", [(1, 20), (9, 40), (37, 101), (50, 80)])
@pytest.mark.parametrize("name", ["quadratic", "gaussian"])
def test_313_labels_on_kernels(backend, name, height, width):
    """Large enough for tiles, prefetches and stores that pass by the caches; next to what PyTorch errs itself."""
    logits, guide = (x.float() for x in problem((1, 313, height, width), scale=3.0))
    similarity = tuple(m.float() for m in label_factors(name, gamma=40.0, rank=8)[:2]) if name == "gaussian" else name
    options = {"similarity": similarity, "weight": 0.1}
    exact = reference.mean_field(logits.double(), guide.double(), **options)
    ab = annealed_mean(exact, 0.38)
    plain = largest(reference.mean_field(logits, guide, **options), exact)
    for layout in LAYOUTS:
        u = logits.contiguous(memory_format=layout)
        with fastcolor.use_backend(backend.name):
            assert largest(mean_field(u, guide, **options), exact) <= max(2 * plain, 2e-6)
            assert largest(op.mean_field_annealed(u, guide, **options), ab) <= 2e-3
        for dtype, step in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
            expected = reference.mean_field(u.to(dtype).double(), guide.double(), **options)
            with fastcolor.use_backend(backend.name):
                assert largest(mean_field(u.to(dtype), guide, **options), expected) <= step


@every_simd
@on_kernels
@pytest.mark.parametrize("schedule, damping, start, neighborhood", [
    ("parallel", 0.0, "softmax", "square"), ("parallel", 0.3, "uniform", "cross"),
    ("checkerboard", 0.0, "softmax", "square"), ("checkerboard", 0.4, "uniform", "square"),
])  # fmt: skip
@pytest.mark.parametrize("name, bins, shape", [
    ("quadratic", None, (1, 313, 3, 5)), ("quadratic", SMALL, (2, 5, 4, 19)), ("steps", SMALL_AXES, (2, 8, 5, 7)),
    ("matrix", SMALL_AXES, (1, 8, 3, 37)), ("pair", None, (1, 21, 5, 7)), ("potts", None, (1, 3, 1, 1)),
    ("potts", None, (2, 1, 3, 4)),
], ids=str)  # fmt: skip
def test_gradients(backend, name, bins, shape, schedule, damping, start, neighborhood):
    """All of them against the reference in float64, relative to the largest of the kind."""
    logits, guide = problem(shape, scale=1.5)
    others, guide_before = problem(shape, seed=4)
    bins_or_joint = bins if bins is not None or shape[1] != 313 else JOINT
    parts = [others[:, first:last].softmax(1) for first, last, _ in axes_of(bins_or_joint, shape[1])]
    scalars = [torch.tensor(v, dtype=torch.float64) for v in (0.3, 1.7, 20.0, 0.5, 30.0)]
    labels = shape[1]
    factors = {"matrix": [symmetric(labels)], "pair": [0.5 * symmetric(labels)[:, :2], symmetric(labels)[:, 2:4]]}
    inputs = [logits, guide, torch.cat(parts, 1), guide + 0.2 * guide_before, *scalars, *factors.get(name, [])]
    upstream = torch.randn(shape, dtype=torch.float64)

    def gradients(tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        u, g, q_before, g_before, weight, sigma_space, sigma_light, weight_time, sigma_time, *s = tensors
        chosen = {"matrix": lambda: (s[0] + s[0].T) / 2, "pair": lambda: tuple(s)}.get(name, lambda: name)()
        q = mean_field(
            u, g, similarity=chosen, bins=bins, gamma=30.0, radius=2, sweeps=3, schedule=schedule, damping=damping,
            start=start, neighborhood=neighborhood, weight=weight, sigma_space=sigma_space, sigma_light=sigma_light,
            previous=(q_before, g_before), weight_time=weight_time, sigma_time=sigma_time,
        )  # fmt: skip
        (q * upstream.to(q)).sum().backward()
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]

    exact = gradients(inputs)
    inputs = [x.float() for x in inputs]
    with fastcolor.use_backend("reference"):
        plain = gradients(inputs)
    for layout in LAYOUTS:
        inputs[0] = inputs[0].contiguous(memory_format=layout)
        with fastcolor.use_backend(backend.name):
            fast = gradients(inputs)
        for f, p, e in zip(fast, plain, exact, strict=True):
            assert f.shape == e.shape and relative(f, e) <= allowed(p, e)


@every_simd
@on_kernels
@pytest.mark.parametrize("dtype, step", [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_gradients_in_16_bits(backend, dtype, step):
    logits, guide = problem((2, 21, 5, 7), dtype=dtype)
    upstream = torch.randn(logits.shape).to(dtype)
    pair = (0.5 * symmetric(21)[:, :2], symmetric(21)[:, 2:4])
    grads = []
    for name, cast in ((backend.name, lambda x: x), ("reference", lambda x: x.double())):
        u = cast(logits).detach().requires_grad_()
        with fastcolor.use_backend(name):
            q = mean_field(u, cast(guide), similarity=pair, weight=0.3)
            q.backward(cast(upstream))
        grads.append(u.grad)
    assert grads[0].dtype == dtype and relative(*grads) <= step


@every_simd
@on_kernels
@pytest.mark.parametrize("bins", [JOINT, SEPARABLE, SMALL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_annealed_mean_of_logits_and_of_marginals(backend, bins, dtype):
    for shape in ((2, bins.count, 5, 7), (1, bins.count, 1, 1), (0, bins.count, 3, 2)):
        logits = (problem(shape)[0] * 2).to(dtype)
        q = torch.cat([logits[:, a:b].double().softmax(1) for a, b, _ in axes_of(bins, bins.count)], 1)
        for temperature in (0.1, 0.38, 1.0, torch.tensor(0.7)):
            bound = 2e-3 / min(float(temperature), 1)
            expected = annealed_mean(logits.double(), temperature, bins, logits=True)
            assert largest(expected, annealed_mean(q, temperature, bins)) <= EXACT
            for layout in LAYOUTS:
                u, p = logits.contiguous(memory_format=layout), q.to(dtype).contiguous(memory_format=layout)
                before = p.clone()
                with fastcolor.use_backend(backend.name):
                    of_logits = annealed_mean(u, temperature, bins, logits=True)
                    of_marginals = annealed_mean(p, temperature, bins)
                assert of_logits.dtype == torch.float32 and largest(of_logits, expected) <= bound
                assert largest(of_marginals, annealed_mean(before.double(), temperature, bins)) <= bound
                assert torch.equal(p, before)


@every_simd
@on_kernels
@pytest.mark.parametrize("bins, name", [(JOINT, "quadratic"), (SEPARABLE, "steps"), (SMALL, "potts")], ids=str)
@pytest.mark.parametrize("temperature", [0.05, 0.38, 1.0, 3.0])
def test_annealed_mean_of_the_last_sweep(backend, temperature, bins, name):
    logits, guide = problem((2, bins.count, 4, 5))
    options = {"bins": bins, "similarity": name, "weight": 0.1}
    for sweeps, schedule, start in (
        (0, "parallel", "softmax"),
        (2, "parallel", "uniform"),
        (2, "checkerboard", "softmax"),
    ):
        options |= {"sweeps": sweeps, "schedule": schedule, "start": start}
        exact = annealed_mean(mean_field(logits, guide, **options), temperature, bins)
        assert largest(op.mean_field_annealed(logits, guide, temperature=temperature, **options), exact) == 0
        for layout in LAYOUTS:
            u = logits.float().contiguous(memory_format=layout)
            with fastcolor.use_backend(backend.name):
                ab = op.mean_field_annealed(u, guide.float(), temperature=temperature, **options)
            assert ab.dtype == torch.float32 and largest(ab, exact) <= 2e-3 / min(temperature, 1)
    with fastcolor.use_backend(backend.name):
        u = logits.float().requires_grad_()
        op.mean_field_annealed(u, guide.float(), temperature=temperature, **options).sum().backward()
        assert u.grad.abs().max() > 0
        with pytest.raises(ValueError, match="temperature must be > 0 and finite, got 0"):
            op.mean_field_annealed(u, guide.float(), temperature=0, **options)
    with pytest.raises(ValueError, match="annealed mean needs the colours of the labels: bins with K = 3"):
        op.mean_field_annealed(logits[:, :3], guide, similarity="potts")


@every_simd
@on_kernels
def test_nan_and_forbidden_labels_on_kernels(backend):
    logits, guide = (x.float() for x in problem((1, 19, 9, 9)))
    logits[0, 3] = -math.inf
    logits[0, 1, 4, 4] = math.nan
    for layout in LAYOUTS:
        with fastcolor.use_backend(backend.name):
            q = mean_field(logits.contiguous(memory_format=layout), guide, similarity="potts", radius=1, sweeps=2)
        bad = q.isnan().any(1)[0]
        expected = torch.zeros(9, 9, dtype=torch.bool)
        expected[2:7, 2:7] = True
        assert torch.equal(bad, expected)
        assert (q[0, 3][~bad] == 0).all()
        u = logits.nan_to_num(0.0, None, -math.inf).contiguous(memory_format=layout).requires_grad_()
        with fastcolor.use_backend(backend.name):
            q = mean_field(u, guide, similarity="potts", start="uniform", damping=0.2)
        q[:, 0].sum().backward()
        assert q.isfinite().all() and u.grad.isfinite().all()


@on_kernels
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_threads_change_nothing(backend, batch):
    """Columns of one image, or whole images, to each thread: the same numbers (sums of gradients up to their order)."""
    logits, guide = (x.float() for x in problem((batch, 21, 7, 75)))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for layout in LAYOUTS:
            for schedule in op.SCHEDULES:
                u, g = (x.clone(memory_format=layout).requires_grad_() for x in (logits, guide))
                pair = [symmetric(21)[:, :2].float().requires_grad_() for _ in "ab"]
                with fastcolor.use_backend(backend.name):
                    q = mean_field(u, g, similarity=tuple(pair), weight=0.2, schedule=schedule)
                    q[:, ::2].square().sum().backward()
                results.append((q.detach(), u.grad, g.grad, *(x.grad for x in pair)))
    for other, first in zip(results[4:], results[:4] * 2, strict=True):
        for x, y in zip(other[:3], first[:3], strict=True):
            assert torch.equal(x, y)
        for x, y in zip(other[3:], first[3:], strict=True):
            assert relative(x, y) <= 1e-5


@on_kernels
def test_empty_on_kernels(backend):
    for shape in ((0, 5, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0)):
        u, g = torch.empty(shape, requires_grad=True), torch.empty(shape[0], 1, *shape[2:])
        with fastcolor.use_backend(backend.name):
            mean_field(u, g, bins=SMALL).sum().backward()
            assert op.mean_field_annealed(u.detach(), g, bins=SMALL).shape == (shape[0], 2, *shape[2:])
        assert u.grad.shape == shape


def op_arguments(u, guide, rank=2):
    labels = u.shape[1]
    around = reference.offsets("square", 1, 1, *u.shape[2:])
    a, b = (0.3 * symmetric(max(labels, rank))[:labels, :rank].float() for _ in "ab")
    space = torch.full((len(around),), 0.2)
    prior = torch.rand(u.shape[0], rank, *u.shape[2:])
    return (
        u, guide, a, b, space, torch.tensor(0.1), prior, [dy for dy, _ in around], [dx for _, dx in around], [labels],
        2, False, 0.1, False, "cpp",
    )  # fmt: skip


@pytest.mark.skipif(not kernels, reason="no C++ kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["planes", "labels_last", "permuted"])
def test_opcheck(layout, dtype):
    u, guide = problem((2, 5, 4, 6), dtype=dtype)
    guide = guide.float()
    if layout == "labels_last":
        u = u.contiguous(memory_format=torch.channels_last)
    elif layout == "permuted":
        u = u.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    arguments = op_arguments(u, guide)
    ops = torch.ops.fastcolor
    torch.library.opcheck(ops.mean_field.default, (*arguments, False))
    torch.library.opcheck(ops.mean_field.default, (*arguments, True))
    torch.library.opcheck(ops.mean_field_annealed.default, (*arguments, torch.rand(5, 2), 0.5))
    _, states = ops.mean_field(*arguments, True)
    grad = torch.randn(u.shape, dtype=dtype)
    for wanted in itertools.product([False, True], repeat=2):
        torch.library.opcheck(ops.mean_field_backward.default, (grad, states, *arguments, *wanted))


@pytest.mark.skipif(not kernels, reason="no C++ kernels")
@pytest.mark.parametrize("sweeps, checkerboard, rank, width", [(0, False, 1, 1), (3, True, 5, 17), (2, False, 7, 200)])
def test_state_size(sweeps, checkerboard, rank, width):
    """Python and C++ agree on it, and neither counts in 32 bits."""
    for height in (3, 1 << 22):
        dx = torch.tensor([-3, 0, 3])
        native = _backend.native("_cpu").MeanFieldProblem(
            0, 0, False, 2, 9, height, width, 1, 0, rank, 0, 0, 0, 3, 0, dx.data_ptr(), 0, 1.0, 0, sweeps,
            checkerboard, 0.0, False, 1,
        )  # fmt: skip
        fixed = op._Fixed([0, 0, 0], dx.tolist(), [9], sweeps, checkerboard, 0.0, False, "cpp")
        size = op._state_size(torch.empty((2, 9, height, width), device="meta"), rank, fixed)
        assert size == _backend.native("_cpu").mean_field_state_size(native)
    assert size >= 2 * (1 << 22) * 2 * width


@on_kernels
@pytest.mark.parametrize("labels_last", [False, True])
def test_more_entries_than_32_bits_count(backend, labels_last):
    """8 GB of addresses with hardly any memory behind them: pages that nothing wrote are all the same page of zeros."""
    if sys.platform != "linux":
        pytest.skip("needs memory that is not reserved")
    not_reserved = 0x4000  # MAP_NORESERVE, a name that Python has only of late
    labels, height, width = 313, 2624, 2624
    assert labels * height * width > 2**31
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | not_reserved
        memory = mmap.mmap(-1, labels * height * width * 4, flags=flags)
    except OSError as error:
        pytest.skip(str(error))
    logits = torch.frombuffer(memory, dtype=torch.float32)
    if labels_last:
        logits = logits.reshape(1, height, width, labels).movedim(-1, 1)
    else:
        logits = logits.reshape(1, labels, height, width)
    label, places = 300, ((0, 0), (height - 1, width - 1))
    for y, x in places:
        logits[0, label, y, x] = 50.0
    with fastcolor.use_backend(backend.name):
        ab = op.mean_field_annealed(logits, torch.zeros(1, 1, height, width), sweeps=0)
    for y, x in places:
        assert (ab[0, :, y, x] - JOINT.centers[label]).abs().max() <= 1e-3
    grey = ab[0, :, 5, 5]
    assert (ab[0, :, -1, :-1] == grey[:, None]).all() and (ab[0, :, 1000] == grey[:, None]).all()


@on_kernels
def test_strides_on_kernels(backend):
    """Neither planes nor labels last: slices with steps, expanded, transposed, reversed in memory."""
    whole, guides = (x.float() for x in problem((2, 10, 8, 24)))
    for logits, guide in (
        (whole[:, ::2, :, ::2], guides[..., ::2]),
        (whole[:, :5, 3:], guides[:, :, 3:]),
        (whole[:1, :5].expand(2, -1, -1, -1), guides[:1].expand(2, -1, -1, -1)),
        (whole.transpose(2, 3)[:, :5], guides.transpose(2, 3)),
        (whole[:, :5].contiguous(memory_format=torch.channels_last)[..., 1:], guides[..., 1:]),
    ):
        exact = mean_field(logits.double(), guide.double(), bins=SMALL, weight=0.1)
        with fastcolor.use_backend(backend.name):
            assert largest(mean_field(logits, guide, bins=SMALL, weight=0.1), exact) <= 5e-6


@on_kernels
def test_radius_beyond_the_image_on_kernels(backend):
    for shape in ((1, 2, 3, 4), (1, 2, 1, 1), (1, 2, 1, 40)):
        logits, guide = (x.float() for x in problem(shape))
        for layout in LAYOUTS:
            u = logits.contiguous(memory_format=layout)
            with fastcolor.use_backend(backend.name):
                near, far = (
                    mean_field(u, guide, similarity="potts", radius=r) for r in (max(shape[2:]) - 1 or 1, 1000)
                )
            assert torch.equal(near, far)


@on_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_to_one_graph_on_kernels(backend, layout):
    logits, guide = (x.float() for x in problem((1, 5, 4, 6)))
    field = MeanField(SMALL, similarity=symmetric(5).float(), learn=MeanField.LEARNABLE, sweeps=2, weight=0.3)
    results = []
    for run in (field, torch.compile(field, fullgraph=True, backend="aot_eager")):
        u = logits.contiguous(memory_format=layout).clone().requires_grad_()
        field.zero_grad()
        with fastcolor.use_backend(backend.name):
            q = run(u, guide, (logits.softmax(1), guide + 3))
            q[:, 0].sum().backward()
        results.append([q.detach(), u.grad, *(p.grad.clone() for p in field.parameters())])
    for eager, compiled in zip(*results, strict=True):
        assert relative(compiled, eager) <= 1e-5


@on_kernels
def test_what_kernels_do_not_take(backend, caplog):
    logits, guide = problem((1, 80, 2, 3))
    with fastcolor.use_backend(backend.name):
        with pytest.raises(fastcolor.BackendError, match="'cpp': float64 is computed on the reference"):
            mean_field(logits, guide, similarity="potts")
        with pytest.raises(fastcolor.BackendError, match="the similarity has 80 columns, kernels take up to 64"):
            mean_field(logits.float(), guide, similarity="potts")
    with fastcolor.use_backend(backend.name, "reference"):
        q = mean_field(logits, guide, similarity="potts")
    _backend.say_once.cache_clear()
    with caplog.at_level("WARNING", "fastcolor"):
        for _ in range(2):
            assert largest(mean_field(logits.float(), guide.float(), similarity="potts"), q) <= 5e-6
    assert len(caplog.records) == 1 and "runs on the reference backend: the similarity has 80 columns" in caplog.text


@pytest.mark.skipif(not kernels, reason="no C++ kernels")
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_type_of_tensors_does_not_matter(default):
    """Kernels write float32 into memory that is made for them."""
    logits, guide = (x.float() for x in problem((1, 5, 4, 6)))

    def run():
        u, g, w = (x.clone().requires_grad_() for x in (logits, guide, torch.tensor(0.3, dtype=torch.float32)))
        q = mean_field(u, g, bins=SMALL, weight=w, sweeps=2)
        q[:, 0].sum().backward()
        op._colors.cache_clear()
        with torch.no_grad():
            ab = op.mean_field_annealed(logits, guide, bins=SMALL, sweeps=2)
        return q.detach(), u.grad, g.grad, w.grad, ab

    expected = run()
    torch.set_default_dtype(default)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
        op._colors.cache_clear()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and largest(a, b) <= 1e-6 * (1 + b.abs().max().item())


def test_fake_tensors_are_not_kept():
    """Who traces fills no table: later calls would get fakes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    options = {"bins": SMALL, "sweeps": 1, "gamma": 11.25, "weight": 0.3125, "sigma_light": 7.125}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        mean_field(torch.empty(1, 5, 3, 4), torch.empty(1, 1, 3, 4), **options)
    logits, guide = (x.float() for x in problem((1, 5, 3, 4)))
    q = mean_field(logits, guide, **options)
    assert type(q) is torch.Tensor and largest(q.sum(1), torch.ones(1, 3, 4)) <= 1e-5


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("backend, pixels, triton, expected", [
    ("auto", 24, True, "cuda"), ("auto", 23, True, "triton"), ("auto", 23, False, "cuda"),
    ("cuda", 23, True, "cuda"), ("cuda", 24, False, "cuda"), ("triton", 1000, True, "triton"),
])  # fmt: skip
def test_cuda_where_an_image_fits(monkeypatch, backend, pixels, triton, expected, backward):
    """The choice on a GPU, without one: both directions go by the name that the forward was given."""
    from types import SimpleNamespace

    asked = []
    module = SimpleNamespace(mean_field_resident_pixels=lambda *arguments: asked.append(arguments) or pixels)
    monkeypatch.setattr(op._backend, "native", lambda name: module)
    monkeypatch.setattr(op._backend, "missing", lambda name: None if triton else "not installed")
    monkeypatch.setattr(op.torch.cuda, "device", lambda device: nullcontext())
    pytest.importorskip("triton") if expected == "triton" else None
    chosen = op._kernels(SimpleNamespace(logits=torch.empty(2, 5, 4, 6), a=torch.empty(5, 3)), backend, backward)
    names = {"cuda": "_backward_on_cuda" if backward else "_forward_on_cuda",
             "triton": "mean_field_backward" if backward else "mean_field"}  # fmt: skip
    assert chosen.__name__ == names[expected]
    assert all(arguments == (0, 5, 3, backward) for arguments in asked)


def test_too_many_labels_for_cuda_alone(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(op._backend, "native", lambda name: SimpleNamespace(mean_field_resident_pixels=lambda *a: 0))
    monkeypatch.setattr(op._backend, "missing", lambda name: "not installed")
    monkeypatch.setattr(op.torch.cuda, "device", lambda device: nullcontext())
    with pytest.raises(fastcolor.BackendError, match="'cuda': 5 labels are too many .* pip install"):
        op._kernels(SimpleNamespace(logits=torch.empty(1, 5, 4, 6), a=torch.empty(5, 3)), "auto")


def test_reference_when_asked_for():
    logits, guide = (x.float() for x in problem((1, 5, 3, 3)))
    with fastcolor.use_backend("reference"):
        assert largest(mean_field(logits, guide, bins=SMALL), reference.mean_field(logits, guide, bins=SMALL)) == 0


def test_largest_errors():
    """What the checks above measured in float32, for a report: `pytest -rP -k "..."` shows it."""
    for (backend, test), error in sorted(LARGEST_ERRORS.items()):
        print(f"{backend} {test}: {error:.2g}")
