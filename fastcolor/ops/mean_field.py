"""The mean field of a random field over colour labels: colours that agree across a region, and across time.

The formulas are in fastcolor.reference.mean_field, the kernels in fastcolor/kernels/*/mean_field.*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastcolor.bins import ColorBins
from fastcolor.kernels.field import Gradients, Problem
from fastcolor.kernels.memory import STORAGE
from fastcolor.ops import _backend
from fastcolor.reference import mean_field as reference
from fastcolor.reference.mean_field import LabelFactors, Scalar, Similarity

_backend.offer("mean_field", "cuda", "triton", "cpp")

_LARGEST = torch.finfo(torch.float32).max
_MOST_PIXELS = (1 << 31) - (1 << 16)  # of an image on a GPU, where pixels are counted in 32 bits
_MOST_COLUMNS = 64  # R of the kernels: above, products with A and B cost more than all else

SIMILARITIES = ("potts", "steps", "gaussian", "quadratic")
NEIGHBORHOODS = ("square", "cross")
SCHEDULES = ("parallel", "checkerboard")
STARTS = ("softmax", "uniform")

# Options of `mean_field` and `MeanField`, by name: `mean_field(unary, guide, **PRESETS["melas_kyriazi_2017"])`.
PRESETS = {
    # Melas-Kyriazi and Han 2017: w = exp(−(ΔL)² / 1e-4) with L in [0, 1], so 2 sigma_light² = 1 with L in [0, 100];
    # unary = probability_unary(logits, 10.0, bins), result = mode(marginals, bins)
    "melas_kyriazi_2017": {
        "bins": ColorBins("separable"),
        "similarity": "steps",
        "neighborhood": "cross",
        "radius": 1,
        "sigma_space": math.inf,
        "sigma_light": math.sqrt(0.5),
        "weight": 1.0,
        "start": "uniform",
        "schedule": "checkerboard",
        "sweeps": 8,
    },
}


def mean_field(
    logits: Tensor,
    guide: Tensor,
    *,
    similarity: Similarity = "quadratic",
    gamma: float = 10.0,
    bins: ColorBins | None = None,
    radius: int = 2,
    dilation: int = 1,
    neighborhood: str = "square",
    sigma_space: Scalar = 3.0,
    sigma_light: Scalar = 10.0,
    weight: Scalar = 1.0,
    sweeps: int = 5,
    schedule: str = "parallel",
    damping: float = 0.0,
    start: str = "softmax",
    previous: tuple[Tensor, Tensor] | None = None,
    weight_time: Scalar = 1.0,
    sigma_time: Scalar = 10.0,
    tolerance: float | None = None,
) -> Tensor:
    """Marginals of the pairwise field over labels that a guide image steers (Melas-Kyriazi and Han 2017).

        E(y) = − Σ_i u_i(y_i) − ½ Σ_i Σ_{j in N(i)} w_ij s(y_i, y_j)
        w_ij = weight · exp(−|p_i − p_j|² / 2 sigma_space² − (g_i − g_j)² / 2 sigma_light²)
        q_i(l) ← softmax_l(u_i(l) + Σ_{j in N(i)} w_ij Σ_l' s(l, l') q_j(l'))

    Differentiable in the logits, the guide, the weights and sigmas that are tensors, the similarity and `previous`.
    Other unaries are added to the logits: see `hint_unary`, `histogram_unary`, `probability_unary`.

    Args:
        logits: [B, K, H, W] unary scores u, float64, float32, float16 or bfloat16, any strides. −inf forbids a label;
            nan spreads to the pixels within reach, as in any convolution.
        guide: [B, 1, H, W] lightness g, floating, in [0, 100] by convention; on the device of the logits.
        similarity: s, by name: "potts" (1 where equal), "steps" (10 where equal, 3 within 2 bins, else 0; separable
            bins only), "gaussian" exp(−|c − c'|² / 2 gamma²), "quadratic" −|c − c'|² / 2 gamma²; or a symmetric
            [K, K] tensor; or two [K, R] tensors (A, B) with s = A Bᵀ, as from `label_factors`.
        gamma: width of "gaussian" and "quadratic" in ab units, > 0.
        bins: the label space. None stands for the 313 joint bins where K = 313, else for K labels without colours.
            Each axis of separable bins is a distribution of its own; named similarities keep the axes apart, a [K, K]
            tensor may couple a and b of neighbouring pixels.
        radius: reach of the neighbourhood in steps, >= 1; pixels outside the image are no neighbours.
        dilation: pixels per step, >= 1.
        neighborhood: "square" is all of the window, "cross" only its row and column (radius 1: the 4 neighbours).
        sigma_space: width in pixels, dilation included, > 0; math.inf for no decay. A float or a 0-dim tensor.
        sigma_light: width in units of the guide, > 0, likewise.
        weight: strength of the field, >= 0, likewise.
        sweeps: updates of all pixels, >= 0; 0 gives the start.
        schedule: "parallel" updates all pixels at once; "checkerboard" those with even y + x, then the others.
            On the cross of radius and dilation 1 the latter is coordinate ascent: the bound
            `fastcolor.reference.mean_field.elbo` never falls.
        damping: in [0, 1), the share of the old marginals in an update, on the scores (Baqué et al. 2016):
            q ∝ q_new^(1 − damping) · q_old^damping. Stops the oscillation of strong fields in parallel.
        start: q before the first sweep: "softmax" of the logits, or "uniform".
        previous: marginals [B, K, H, W] and guide [B, 1, H, W] of the frame before, one more neighbour at the same
            pixel, held fixed, with weight_time · exp(−(g − g')² / 2 sigma_time²). Of marginals "quadratic" needs no
            more than their mean colours: with it they may be given as ab [B, 2, H, W].
        weight_time: >= 0, a float or a 0-dim tensor.
        sigma_time: > 0, in units of the guide, likewise.
        tolerance: lets a gaussian, steps or matrix s be replaced by one of lower rank, each entry within so much of
            it; None is exact. It costs an eigendecomposition a call: for many calls pass `label_factors(...)[:2]`.

    Returns:
        [B, K, H, W] in the dtype of the logits; each axis of labels sums to 1. Arithmetic is float64 for float64
        logits, else float32.

    Raises:
        ValueError: a shape, a value or a name is not as above; the message says which, what was expected and what came.
        TypeError: logits, guide or `previous` are not floating tensors.
    """
    options = {
        "similarity": similarity, "gamma": gamma, "bins": bins, "radius": radius, "dilation": dilation,
        "neighborhood": neighborhood, "sigma_space": sigma_space, "sigma_light": sigma_light, "weight": weight,
        "sweeps": sweeps, "schedule": schedule, "damping": damping, "start": start, "previous": previous,
        "weight_time": weight_time, "sigma_time": sigma_time, "tolerance": tolerance,
    }  # fmt: skip
    check_options(options)
    _check_entries(similarity)
    return _run(logits, guide, options)


_DEFAULTS = dict(mean_field.__kwdefaults__)


def mean_field_annealed(logits: Tensor, guide: Tensor, *, temperature: Scalar = 0.38, **options) -> Tensor:
    """`annealed_mean(mean_field(logits, guide, **options), temperature)` in one: the last sweep makes the colours, and
    marginals are never written.

    Args:
        logits: [B, K, H, W], of labels that have colours.
        guide: [B, 1, H, W].
        temperature: as in `annealed_mean`.
        **options: as in `mean_field`.

    Returns:
        ab [B, 2, H, W], float64 for float64 logits, else float32.

    Raises:
        ValueError, TypeError: as `mean_field` and `annealed_mean`.
    """
    options = {**_DEFAULTS, **options}
    check_options(options)
    _check_entries(options["similarity"])
    _check_temperature(temperature)
    _check_floating("logits", logits)
    if logits.ndim == 4 and reference.resolve_bins(options["bins"], logits.shape[1]) is None:
        raise ValueError(
            f"the annealed mean needs the colours of the labels: bins with K = {logits.shape[1]}, got None"
        )
    return _run(logits, guide, options, temperature)


def _run(logits: Tensor, guide: Tensor, options: dict, temperature: Scalar | None = None) -> Tensor:
    """Checks what depends on the tensors' shapes, and calls the backend: marginals, or with a temperature their ab."""
    _check_floating("logits", logits)
    _check_floating("guide", guide)
    if logits.ndim != 4 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [B, K, H, W] with K >= 1, got {list(logits.shape)}")
    batch, labels, height, width = logits.shape
    _check_shape("guide", guide, [batch, 1, height, width])
    if guide.device != logits.device:
        raise ValueError(f"guide must be on {logits.device} as the logits are, got {guide.device}")
    if options["previous"] is not None:
        if len(options["previous"]) != 2:
            raise ValueError(f"previous must be (marginals, guide), got {len(options['previous'])} items")
        for name, x in zip(("marginals", "guide"), options["previous"], strict=True):
            _check_floating(f"previous {name}", x)
        q_before, g_before = options["previous"]
        if not reference.are_colors(q_before, labels, options["similarity"]):
            _check_shape("previous marginals", q_before, [batch, labels, height, width])
        elif list(q_before.shape) != [batch, 2, height, width]:
            raise ValueError(
                f"previous colours must have shape {[batch, 2, height, width]}, got {list(q_before.shape)}"
            )
        _check_shape("previous guide", g_before, [batch, 1, height, width])
    _check_labels("logits", labels, options["bins"])
    _check_similarity(options["similarity"], labels, options["bins"])
    with torch.autocast(logits.device.type, enabled=False):  # its matrix products would run in 16 bits
        backend = _chosen(logits.device, _backend.forced())
        if backend != "reference":
            factors = _factors(labels, options, logits.device)
            if not _left_to_reference(logits, factors[0].shape[1]):
                return _on_kernels(backend, logits, guide, factors, options, temperature)
        q = reference.mean_field(logits, guide, **options)
        return q if temperature is None else reference.annealed_mean(q, temperature, options["bins"])


# --- kernels ----------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _chosen(device: torch.device, forced: tuple[str, ...]) -> str:
    """The backend. A constant to torch.compile, which cannot trace the search; it guards on `forced`."""
    return _backend.choose("mean_field", device).name


def _left_to_reference(logits: Tensor, columns: int) -> bool:
    """Whether kernels do not take this; an error where a backend was asked for that is one of them."""
    if logits.dtype == torch.float64:
        why = _backend.FLOAT64
    elif columns > _MOST_COLUMNS:
        why = f"the similarity has {columns} columns, kernels take up to {_MOST_COLUMNS}: see label_factors"
    else:
        return False
    _backend.left_to_reference("mean_field", logits.device, why)
    return True


def _factors(labels: int, options: dict, device: torch.device) -> tuple[Tensor, Tensor]:
    """A and B [K, R] in float32."""
    similarity, *rest = (options[name] for name in ("similarity", "bins", "gamma", "tolerance"))
    if isinstance(similarity, str) and not _traced():
        return _named_factors(similarity, labels, *rest, device)
    factors = reference.label_factors(similarity, labels, *rest, dtype=torch.float32, device=device)
    return factors.a, factors.b


class _Fixed(NamedTuple):
    """What is no tensor among the arguments of the ops."""

    dy: list[int]  # [O]
    dx: list[int]  # [O]
    counts: list[int]  # [axes] labels of each axis
    sweeps: int
    checkerboard: bool
    damping: float
    uniform: bool
    backend: str  # of forward and backward, which may come when another one is asked for; "auto" on a GPU: by size


def _on_kernels(
    backend: str,
    logits: Tensor,
    guide: Tensor,
    factors: tuple[Tensor, Tensor],
    options: dict,
    temperature: Scalar | None,
) -> Tensor:
    """Weights and factors become small tensors here, in PyTorch, so that autograd reaches what they are made of."""
    labels, height, width = logits.shape[1:]
    bins = reference.resolve_bins(options["bins"], labels)
    around = reference.offsets(options["neighborhood"], options["radius"], options["dilation"], height, width)
    a, b = factors
    prior = None
    if options["previous"] is not None:
        q_before, g_before = (x.float() for x in options["previous"])
        nearness = reference.gaussian(guide.float() - g_before, options["sigma_time"])
        features = reference.features_before(q_before, b, labels, bins, options["similarity"])
        prior = options["weight_time"] * nearness * features
    tensors = (logits, guide, a, b, *_pair_terms(around, options, logits), prior)
    if backend != "cpp" and not torch.compiler.is_compiling() and height * width > _MOST_PIXELS:
        raise ValueError(f"logits must have at most {_MOST_PIXELS} pixels an image on {backend}, got {height}×{width}")
    fixed = _Fixed(
        [dy for dy, _ in around],
        [dx for _, dx in around],
        [place.stop - place.start for place in reference.label_axes(bins, labels)],
        options["sweeps"],
        options["schedule"] == "checkerboard",
        float(options["damping"]),
        options["start"] == "uniform",
        "auto" if backend == "cuda" and not _backend.forced() else backend,
    )
    scalars = (temperature,) if isinstance(temperature, Tensor) else ()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, *scalars)):
        q = _MeanField.apply(*tensors, *fixed)
        return q if temperature is None else reference.annealed_mean(q, temperature, bins)
    if temperature is None:
        return _mean_field(*tensors, *fixed, False)[0]
    colors = (_colors.__wrapped__ if _traced() else _colors)(bins, logits.device)
    # below, 1 / T would be infinite; it is the mode long before
    return _mean_field_annealed(*tensors, *fixed, colors, max(float(temperature), 1e-30))


def _pair_terms(around: list[tuple[int, int]], options: dict, like: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of each offset between equal lightnesses [O], and 1 / sigma_light []."""
    weight, sigma_space, sigma_light = (options[name] for name in ("weight", "sigma_space", "sigma_light"))
    distances = [math.hypot(dy, dx) for dy, dx in around]
    if isinstance(weight, Tensor) or isinstance(sigma_space, Tensor):
        space = weight * reference.gaussian(_constant(distances, like), sigma_space)
    else:
        steps = [d / sigma_space for d in distances]
        space = _constant([weight * math.exp(-0.5 * z * z) for z in steps], like)
    # a tiny sigma must leave 0 · (1 / sigma) = 0
    if isinstance(sigma_light, Tensor):
        return space, (1 / sigma_light).float().clamp(max=_LARGEST)
    return space, _constant(min(1 / sigma_light, _LARGEST), like)


# Tables of plain numbers are kept: a copy to a device makes the host wait for it, and cannot be captured in a graph.
# They are made outside inference mode, whose tensors could not be used in training. Tracing goes past the caches.


def _traced() -> bool:
    """Whether tensors made now may be fakes, or are watched: by torch.compile, make_fx, FakeTensorMode ..."""
    return torch.compiler.is_compiling() or torch.utils._python_dispatch._get_current_dispatch_mode() is not None


def _constant(numbers: float | list[float], like: Tensor) -> Tensor:
    """Numbers in float32 on a tensor's device."""
    if _traced():
        return like.new_tensor(numbers, dtype=torch.float32)
    return _on_device(tuple(numbers) if isinstance(numbers, list) else numbers, torch.float32, like.device)


@lru_cache(maxsize=4096)
@torch.inference_mode(False)
def _on_device(numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _named_factors(
    similarity: str, labels: int, bins: ColorBins | None, gamma: float, tolerance: float | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    factors = reference.label_factors(similarity, labels, bins, gamma, tolerance, dtype=torch.float32, device=device)
    return factors.a, factors.b


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _colors(bins: ColorBins, device: torch.device) -> Tensor:
    """[K, 2]: the ab of each label, 0 on the axis that is not its own."""
    colors = torch.zeros(bins.count, 2, dtype=torch.float32, device=device)
    for axis, (place, centers) in enumerate(bins.groups()):
        if bins.kind == "joint":
            colors[place] = centers.to(colors)
        else:
            colors[place, axis] = centers[:, 0].to(colors)
    return colors


def _labels_last(logits: Tensor) -> bool:
    """Whether labels are side by side in memory; planes of pixels where both can be said, and where neither can."""
    return not logits.is_contiguous() and logits.movedim(1, -1).is_contiguous()


def _as_read(logits: Tensor) -> Tensor:
    """The logits themselves where kernels can read them in place."""
    return logits if _labels_last(logits) else logits.contiguous()


def _empty_like(logits: Tensor, dtype: torch.dtype) -> Tensor:
    batch, labels, height, width = logits.shape
    if _labels_last(logits):
        return logits.new_empty((batch, height, width, labels), dtype=dtype).movedim(-1, 1)
    return logits.new_empty(logits.shape, dtype=dtype)


def _state_size(logits: Tensor, columns: int, fixed: _Fixed) -> int:
    """Floats of the states that the backward needs: H and F of the start and of each update."""
    batch, _, height, width = logits.shape
    updates = fixed.sweeps * (2 if fixed.checkerboard else 1)
    if fixed.backend != "cpp":
        return batch * (updates + 1) * 2 * columns * height * width
    # as kernels/cpu/mean_field.cpp lays them out
    padded = min(-(-columns // 3) * 3, -(-columns // 4) * 4)
    stride = (width + 2 * max((abs(d) for d in fixed.dx), default=0) + 31) // 16 * 16
    return batch * (updates + 1) * 2 * height * padded * stride


def _problem(logits, guide, a, b, space, sharpness, prior, fixed: _Fixed) -> Problem:
    plain = [None if x is None else x.float().contiguous() for x in (guide, a, b, space, sharpness, prior)]
    return Problem(_as_read(logits), _labels_last(logits), *plain, *fixed[:-1])


class _Native:
    """The arguments of a C++ kernel, and the tensors whose addresses it has."""

    def __init__(self, problem: Problem):
        logits, a, b, guide, space, prior = (
            getattr(problem, name) for name in ("logits", "a", "b", "guide", "space", "prior")
        )
        batch, labels, height, width = logits.shape
        whole = [torch.tensor(x, dtype=torch.int64) for x in (problem.counts, problem.dy, problem.dx)]
        counts, dy, dx = (x.data_ptr() for x in whole)
        self.kept = problem, whole
        self.problem = _backend.native("_cpu").MeanFieldProblem(
            logits.data_ptr(), STORAGE[logits.dtype], problem.labels_last, batch, labels, height, width,
            len(problem.counts), counts, a.shape[1], a.data_ptr(), b.data_ptr(), guide.data_ptr(), len(problem.dy),
            dy, dx, space.data_ptr(), problem.sharpness.item(), _address(prior), problem.sweeps,
            problem.checkerboard, problem.damping, problem.uniform, torch.get_num_threads(),
        )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _forward_on_cpp(problem: Problem, marginals, colors, temperature, ab, states) -> None:
    native = _Native(problem)
    _backend.native("_cpu").mean_field(
        native.problem, _address(marginals), _address(colors), temperature, _address(ab), _address(states)
    )


def _backward_on_cpp(problem: Problem, grad: Tensor, states: Tensor, to: Gradients) -> None:
    native, addresses = _Native(problem), [_address(x) for x in to]
    _backend.native("_cpu").mean_field_backward(native.problem, grad.data_ptr(), states.data_ptr(), *addresses)


class _NativeCuda:
    """The arguments of a CUDA kernel, with the tensors whose addresses it has and what it needs beside them."""

    def __init__(self, problem: Problem):
        logits, a, prior = problem.logits, problem.a, problem.prior
        batch, labels, height, width = logits.shape
        whole = _on_device((*problem.counts, *problem.dy, *problem.dx), torch.int32, logits.device)
        reach_y, reach_x = (max((abs(d) for d in steps), default=0) for steps in (problem.dy, problem.dx))
        self.kept = problem, whole
        self.module = _backend.native("_cuda")
        self.problem = self.module.MeanFieldProblem(
            logits.data_ptr(), STORAGE[logits.dtype], problem.labels_last, batch, labels, height, width,
            len(problem.counts), a.shape[1], len(problem.dy), reach_y, reach_x, whole.data_ptr(), a.data_ptr(),
            problem.b.data_ptr(), problem.guide.data_ptr(), problem.space.data_ptr(), problem.sharpness.data_ptr(),
            _address(prior), problem.sweeps, problem.checkerboard, problem.damping, problem.uniform,
        )  # fmt: skip
        self.stream = torch.cuda.current_stream(logits.device).cuda_stream

    def scratch(self, floats: int) -> Tensor:
        return torch.empty(floats, dtype=torch.float32, device=self.kept[0].logits.device)


def _forward_on_cuda(problem: Problem, marginals, colors, temperature, ab, states) -> None:
    with torch.cuda.device(problem.logits.device):
        native = _NativeCuda(problem)
        scratch = native.scratch(native.module.mean_field_scratch(native.problem, states is not None))
        native.module.mean_field(
            native.problem, _address(marginals), _address(colors), temperature, _address(ab), _address(states),
            scratch.data_ptr(), native.stream,
        )  # fmt: skip


def _backward_on_cuda(problem: Problem, grad: Tensor, states: Tensor, to: Gradients) -> None:
    with torch.cuda.device(problem.logits.device):
        native, addresses = _NativeCuda(problem), [_address(x) for x in to]
        scratch = native.scratch(native.module.mean_field_backward_scratch(native.problem))
        native.module.mean_field_backward(
            native.problem, grad.data_ptr(), states.data_ptr(), *addresses, scratch.data_ptr(), native.stream
        )


def _fits_cuda(problem: Problem, backward: bool) -> bool:
    """Whether the logits of one image fit in the device's shared memory, where they stay for all sweeps."""
    batch, labels, height, width = problem.logits.shape
    with torch.cuda.device(problem.logits.device):
        pixels = _backend.native("_cuda").mean_field_resident_pixels(
            STORAGE[problem.logits.dtype], labels, problem.a.shape[1], backward
        )
    if pixels == 0 and _backend.missing("triton") is not None:
        raise _backend.BackendError(
            f"mean_field cannot run on backend 'cuda': {labels} labels are too many for the device's shared memory; "
            "pip install 'fastcolor[triton]', or use_backend('reference')"
        )
    return height * width <= pixels


def _kernels(problem: Problem, backend: str, backward: bool = False):
    """The forward or the backward function of a backend; their arguments are those of kernels/triton/mean_field.py."""
    if backend == "cpp":
        return _backward_on_cpp if backward else _forward_on_cpp
    fits = backend == "triton" or _fits_cuda(problem, backward)
    if backend == "cuda" or (backend == "auto" and (fits or _backend.missing("triton") is not None)):
        return _backward_on_cuda if backward else _forward_on_cuda
    from fastcolor.kernels.triton import mean_field as triton_mean_field  # triton is optional

    return triton_mean_field.mean_field_backward if backward else triton_mean_field.mean_field


def _launch(logits, guide, a, b, space, sharpness, prior, *rest):
    *fixed, keep = rest
    fixed = _Fixed(*fixed)
    problem = _problem(logits, guide, a, b, space, sharpness, prior, fixed)
    q = _empty_like(logits, logits.dtype)
    size = _state_size(logits, a.shape[1], fixed) if keep else 0
    states = torch.zeros(size, dtype=torch.float32, device=logits.device)
    _kernels(problem, fixed.backend)(problem, q, None, 1.0, None, states if keep else None)
    return q, states


def _fake(logits, guide, a, b, space, sharpness, prior, *rest):
    *fixed, keep = rest
    size = _state_size(logits, a.shape[1], _Fixed(*fixed)) if keep else 0
    return _empty_like(logits, logits.dtype), logits.new_empty(size, dtype=torch.float32)


def _launch_annealed(logits, guide, a, b, space, sharpness, prior, *rest):
    *fixed, colors, temperature = rest
    fixed = _Fixed(*fixed)
    problem = _problem(logits, guide, a, b, space, sharpness, prior, fixed)
    ab = _fake_annealed(logits)
    _kernels(problem, fixed.backend)(problem, None, colors.float().contiguous(), temperature, ab, None)
    return ab


def _fake_annealed(logits, *_):
    batch, _, height, width = logits.shape
    return logits.new_empty((batch, 2, height, width), dtype=torch.float32)


def _launch_backward(grad, states, logits, guide, a, b, space, sharpness, prior, *rest):
    *fixed, pairs, factors = rest
    fixed = _Fixed(*fixed)
    problem = _problem(logits, guide, a, b, space, sharpness, prior, fixed)
    grad = grad.to(logits.dtype)
    if _labels_last(logits):
        grad = grad.movedim(1, -1)
    grad = grad.contiguous()  # in memory as the logits are
    wide = _empty_like(logits, torch.float32)
    of = (guide, a, b, space, sharpness, logits.new_empty(0) if prior is None else prior)
    sums = [torch.zeros(x.shape, dtype=torch.float32, device=logits.device) for x in of]  # the kernel adds to them
    to_guide, to_a, to_b, to_space, to_sharpness, to_prior = sums
    to = Gradients(
        wide,
        to_a if factors else None,
        to_b if factors else None,
        to_guide if pairs else None,
        to_space if pairs else None,
        to_sharpness if pairs else None,
        None if prior is None else to_prior,
    )
    _kernels(problem, fixed.backend, backward=True)(problem, grad, states, to)
    return wide.to(logits.dtype), *(s.to(x.dtype) for s, x in zip(sums, of, strict=True))


def _fake_backward(grad, states, logits, guide, a, b, space, sharpness, prior, *_):
    grads = [x.new_empty(x.shape) for x in (guide, a, b, space, sharpness)]
    grads.append(logits.new_empty(0) if prior is None else prior.new_empty(prior.shape))
    return _empty_like(logits, logits.dtype), *grads


_ARGUMENTS = (
    "Tensor logits, Tensor guide, Tensor a, Tensor b, Tensor space, Tensor sharpness, Tensor? prior, "
    "int[] dy, int[] dx, int[] counts, int sweeps, bool checkerboard, float damping, bool uniform, str backend"
)
_library = torch.library.Library("fastcolor", "FRAGMENT")
for _schema, _implementation, _meta in (
    (f"mean_field({_ARGUMENTS}, bool keep) -> (Tensor, Tensor)", _launch, _fake),
    (
        f"mean_field_annealed({_ARGUMENTS}, Tensor colors, float temperature) -> Tensor",
        _launch_annealed,
        _fake_annealed,
    ),
    (
        f"mean_field_backward(Tensor grad, Tensor states, {_ARGUMENTS}, bool pairs, bool factors)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _launch_backward,
        _fake_backward,
    ),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _device)
    torch.library.register_fake(f"fastcolor::{_name}", _meta, lib=_library)

# Alone they drop gradients: callers go through the functions above.
_mean_field = torch.ops.fastcolor.mean_field.default
_mean_field_annealed = torch.ops.fastcolor.mean_field_annealed.default
_mean_field_backward = torch.ops.fastcolor.mean_field_backward.default


class _MeanField(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, guide, a, b, space, sharpness, prior, *fixed):
        q, states = _mean_field(logits, guide, a, b, space, sharpness, prior, *fixed, True)
        ctx.save_for_backward(states, logits, guide, a, b, space, sharpness, prior)
        ctx.fixed = fixed
        return q

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        wanted = ctx.needs_input_grad
        pairs, factors = wanted[1] or wanted[4] or wanted[5], wanted[2] or wanted[3]
        grads = _mean_field_backward(grad, *ctx.saved_tensors, *ctx.fixed, pairs, factors)
        return *(g if w else None for g, w in zip(grads, wanted[:7], strict=True)), *(None for _ in ctx.fixed)


class MeanField(nn.Module):
    """`mean_field` with parameters that are learned; same options, same result.

    Weights and sigmas are kept as logarithms (`log_weight`, ...), so they stay positive; `value("weight")`
    reads them. A similarity that is learned is a [K, K] parameter `raw_similarity`, used as its symmetric part;
    or, started from a pair (A, B), the two parameters `raw_a` and `raw_b`, used as they are.

    Args:
        bins: as in `mean_field`; needed to learn a similarity given by name, unless it is of the 313 joint bins.
        learn: which of "weight", "sigma_space", "sigma_light", "weight_time", "sigma_time", "similarity" are
            parameters. An infinite sigma stays as it is. The two of time get a gradient only where `previous` is given.
        **options: those of `mean_field`, where the learned ones start.

    Raises:
        ValueError: as `mean_field`; or a learned weight is not > 0, or a name in `learn` is not known.
    """

    LEARNABLE = ("weight", "sigma_space", "sigma_light", "weight_time", "sigma_time", "similarity")

    def __init__(
        self,
        bins: ColorBins | None = None,
        *,
        learn: Sequence[str] = ("weight", "sigma_space", "sigma_light"),
        similarity: Similarity = "quadratic",
        gamma: float = 10.0,
        radius: int = 2,
        dilation: int = 1,
        neighborhood: str = "square",
        sigma_space: float = 3.0,
        sigma_light: float = 10.0,
        weight: float = 1.0,
        sweeps: int = 5,
        schedule: str = "parallel",
        damping: float = 0.0,
        start: str = "softmax",
        weight_time: float = 1.0,
        sigma_time: float = 10.0,
        tolerance: float | None = None,
    ):
        super().__init__()
        self.options = {
            "bins": bins, "gamma": gamma, "radius": radius, "dilation": dilation, "neighborhood": neighborhood,
            "sweeps": sweeps, "schedule": schedule, "damping": damping, "start": start, "tolerance": tolerance,
        }  # fmt: skip
        scalars = {
            "weight": weight, "sigma_space": sigma_space, "sigma_light": sigma_light,
            "weight_time": weight_time, "sigma_time": sigma_time,
        }  # fmt: skip
        for name in learn:
            _check_choice("learn", name, self.LEARNABLE)
        check_options({**self.options, **scalars, "similarity": similarity})
        _check_entries(similarity)
        self._fixed = {}
        for name, value in scalars.items():
            if name not in learn or value == math.inf:
                self._fixed[name] = float(value)
            elif value > 0:
                self.register_parameter(f"log_{name}", nn.Parameter(torch.tensor(math.log(value))))
            else:
                raise ValueError(f"{name} must be > 0 to be learned, got {value}")
        self._start_similarity(similarity, "similarity" in learn)

    def _start_similarity(self, similarity: Similarity, learn: bool) -> None:
        self._named = similarity if isinstance(similarity, str) and not learn else None
        if self._named is not None:
            return
        if isinstance(similarity, str):
            bins = self.options["bins"] or reference.JOINT_BINS
            _check_similarity(similarity, bins.count, bins)
            similarity = reference.similarity_matrix(
                similarity, bins.count, bins, self.options["gamma"], torch.get_default_dtype()
            )
        pair = isinstance(similarity, tuple)
        tensors = {"raw_a": similarity[0], "raw_b": similarity[1]} if pair else {"raw_similarity": similarity}
        for name, tensor in tensors.items():
            start = tensor.detach().clone()
            if learn:
                self.register_parameter(name, nn.Parameter(start))
            else:
                self.register_buffer(name, start, persistent=False)  # an option, not a state

    def value(self, name: str) -> Scalar | Similarity:
        """What `mean_field` gets for one of `LEARNABLE`, now."""
        if name in self._fixed:
            return self._fixed[name]
        if name != "similarity":
            return getattr(self, f"log_{name}").exp()
        if self._named is not None:
            return self._named
        if hasattr(self, "raw_a"):
            return self.raw_a, self.raw_b
        return (self.raw_similarity + self.raw_similarity.T) / 2

    def forward(self, logits: Tensor, guide: Tensor, previous: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[B, K, H, W] logits and [B, 1, H, W] guide to marginals [B, K, H, W]."""
        learned = {name: self.value(name) for name in self.LEARNABLE}
        # positive and symmetric by construction: checking the values would make the device wait
        return _run(logits, guide, {**self.options, **learned, "previous": previous})

    def extra_repr(self) -> str:
        shown = {**self.options, **self._fixed, "similarity": self._named or "tensor"}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def label_factors(
    similarity: Similarity = "quadratic",
    bins: ColorBins | None = None,
    *,
    gamma: float = 10.0,
    tolerance: float | None = None,
    rank: int | None = None,
) -> LabelFactors:
    """A and B with s = A Bᵀ, so that a sweep moves R numbers a pixel instead of K.

    "quadratic" is exact with R = 3 (separable bins: 2 + 2): terms in l' alone cancel in the softmax and are left out.
    The others are truncated eigendecompositions: the fewest of the largest |eigenvalues| that keep every entry within
    `tolerance`, and at most `rank` of them; exact, with R = K, where both are None or nothing can be left out.

    Args:
        similarity: as in `mean_field`.
        bins: the label space, the 313 joint bins if left out (not needed by a tensor).
        gamma: in ab units, > 0.
        tolerance: the largest error of an entry, >= 0; "quadratic" is always exact.
        rank: the largest R, >= 1; "quadratic" takes its own.

    Returns:
        (a, b, error): float64 [K, R] twice, and the largest |s − A Bᵀ| of an entry, which is above the tolerance only
        where `rank` ended it. The gradient of a [K, K] tensor flows through A, with the basis B held constant.

    Raises:
        ValueError: as in `mean_field`.
    """
    check_options({"similarity": similarity, "gamma": gamma, "tolerance": tolerance})
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    if isinstance(similarity, str):
        labels, device = (bins or reference.JOINT_BINS).count, "cpu"
    else:
        first = similarity[0] if isinstance(similarity, tuple) else similarity
        labels, device = len(first), first.device
    bins = reference.resolve_bins(bins, labels)
    _check_labels("similarity", labels, bins)
    _check_similarity(similarity, labels, bins)
    _check_entries(similarity)
    return reference.label_factors(similarity, labels, bins, gamma, tolerance, rank, device=device)


def annealed_mean(
    marginals: Tensor, temperature: Scalar = 0.38, bins: ColorBins | None = None, *, logits: bool = False
) -> Tensor:
    """The annealed mean Σ c q^(1/T) / Σ q^(1/T) of Zhang et al. 2016 (arXiv 1603.08511), equation 5.

    Where no gradient is wanted the kernels of the mean field make it, as a field without a sweep: the labels are read
    once.

    Args:
        marginals: [B, K, H, W], floating, not negative; any strides. They need not sum to 1.
        temperature: T > 0, a float or a 0-dim tensor: 1 is the mean, towards 0 it becomes the mode.
        bins: the label space; the 313 joint bins if left out. Separable bins give a from their first axis, b from
            their second.
        logits: `marginals` are unary scores u, and q = softmax(u) of each axis of labels: Σ c e^(u/T) / Σ e^(u/T).

    Returns:
        ab [B, 2, H, W], float64 for float64 marginals, else float32: 16 bits would band.

    Raises:
        ValueError: the shape is another, K is not that of the bins, or T is not > 0.
        TypeError: marginals are not floating.
    """
    bins = _check_marginals(marginals, bins)
    _check_temperature(temperature)
    batch, _, height, width = marginals.shape
    wants_gradient = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (marginals, temperature)
    )
    with torch.autocast(marginals.device.type, enabled=False):
        if (
            wants_gradient
            or marginals.dtype == torch.float64
            or marginals.numel() == 0
            or _chosen(marginals.device, _backend.forced()) == "reference"
        ):
            return reference.annealed_mean(marginals, temperature, bins, logits)
        unary = marginals if logits else marginals.float().log()
        guide = unary.new_zeros(batch, 1, height, width)
        return _run(unary, guide, {**_DEFAULTS, "bins": bins, "radius": 1, "sweeps": 0}, temperature)


def mode(marginals: Tensor, bins: ColorBins | None = None) -> Tensor:
    """The colour of the most probable label (of each axis), the first one among equals. Not differentiable.

    Args:
        marginals: [B, K, H, W], floating; logits of one axis have the same mode.
        bins: the label space; the 313 joint bins if left out.

    Returns:
        ab [B, 2, H, W], float64 for float64 marginals, else float32.

    Raises:
        ValueError: the shape is another, or K is not that of the bins.
        TypeError: marginals are not floating.
    """
    return reference.mode(marginals, _check_marginals(marginals, bins))


def entropy(marginals: Tensor) -> Tensor:
    """− Σ q log q in nats, a map of the doubt: 0 where one label has it all, log K where all are equal.

    Args:
        marginals: [B, K, H, W], floating. Of separable labels both axes are summed: the entropy of the colour.

    Returns:
        [B, 1, H, W], float64 for float64 marginals, else float32.

    Raises:
        ValueError: the shape is another.
        TypeError: marginals are not floating.
    """
    _check_floating("marginals", marginals)
    if marginals.ndim != 4:
        raise ValueError(f"marginals must have shape [B, K, H, W], got {list(marginals.shape)}")
    return reference.entropy(marginals)


def probability_unary(logits: Tensor, scale: float = 10.0, bins: ColorBins | None = None) -> Tensor:
    """scale · softmax(logits), the unary of Melas-Kyriazi and Han 2017, to be given to `mean_field` as its logits.

    Args:
        logits: [B, K, H, W] of the network, floating.
        scale: 10 in the paper.
        bins: the label space, whose axes are normalized apart. None: the 313 joint bins where K = 313, else one axis.

    Returns:
        [B, K, H, W] in the dtype of the logits.

    Raises:
        ValueError: the shape is another, or K is not that of the bins.
        TypeError: logits are not floating.
    """
    _check_floating("logits", logits)
    if logits.ndim != 4:
        raise ValueError(f"logits must have shape [B, K, H, W], got {list(logits.shape)}")
    _check_labels("logits", logits.shape[1], bins)
    return reference.probability_unary(logits, scale, bins)


def histogram_unary(histogram: Tensor, bins: ColorBins | None = None) -> Tensor:
    """log h, to be added to the logits: the distribution of each pixel times a global histogram (Melas-Kyriazi and
    Han 2017). A label with no count is forbidden (−inf).

    Args:
        histogram: [K] floating, finite, >= 0, counts or probabilities, as from `ColorBins.histogram`; each axis is
            normalized to 1.
        bins: the label space. None: the 313 joint bins where K = 313, else one axis.

    Returns:
        [1, K, 1, 1], float64 for a float64 histogram, else float32.

    Raises:
        ValueError: the shape is another, a value is negative or not finite, or an axis is all zero.
        TypeError: the histogram is not floating.
    """
    _check_floating("histogram", histogram)
    if histogram.ndim != 1 or len(histogram) == 0:
        raise ValueError(f"histogram must have shape [K], got {list(histogram.shape)}")
    _check_labels("histogram", len(histogram), bins)
    if not (histogram.isfinite().all() and (histogram >= 0).all()):
        raise ValueError("histogram must be finite and not negative")
    axes = reference.label_axes(reference.resolve_bins(bins, len(histogram)), len(histogram))
    if any(histogram[place].sum() == 0 for place in axes):
        raise ValueError("histogram must have a label with a count on each axis, got all zero")
    return reference.histogram_unary(histogram, bins)


def hint_unary(
    ab: Tensor,
    mask: Tensor,
    bins: ColorBins | None = None,
    *,
    strength: float = 20.0,
    neighbors: int = 5,
    sigma: float = 5.0,
) -> Tensor:
    """Clicked colours, to be added to the logits.

    At a pixel of the mask the label nearest to its colour gains `strength`, the other near ones less by how much
    farther they are, strength − (d² − d_nearest²) / 2 sigma², and never below 0. Where that outweighs the logits, what
    remains is the soft-encoding of the colour (Zhang et al. 2016, section 2.1), whose mean is the colour itself and not
    the nearest centre.

    Args:
        ab: [B, 2, H, W] floating colours; read only inside the mask.
        mask: [B, 1, H, W] bool, where a colour is given.
        bins: the label space; the 313 joint bins if left out. Separable bins are hinted on each axis.
        strength: in units of the logits, >= 0.
        neighbors: how many labels (of each axis) may gain, >= 1.
        sigma: in ab units, > 0.

    Returns:
        [B, K, H, W], 0 outside the mask; float64 for float64 colours, else float32.

    Raises:
        ValueError: a shape or a value is not as above.
        TypeError: ab is not floating or the mask not bool.
    """
    _check_floating("ab", ab)
    if ab.ndim != 4 or ab.shape[1] != 2:
        raise ValueError(f"ab must have shape [B, 2, H, W], got {list(ab.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    _check_shape("mask", mask, [ab.shape[0], 1, *ab.shape[2:]])
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be >= 0 and finite, got {strength}")
    if neighbors < 1:
        raise ValueError(f"neighbors must be >= 1, got {neighbors}")
    if not sigma > 0:
        raise ValueError(f"sigma must be > 0, got {sigma}")
    return reference.hint_unary(ab, mask, bins, strength, neighbors, sigma)


def _number(name: str, value: Scalar) -> float:
    """The value of a float or 0-dim tensor; while a graph is traced a tensor has none, and 1.0 passes every check."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.ndim != 0:
        raise ValueError(f"{name} must be a float or a 0-dim tensor, got shape {list(value.shape)}")
    return 1.0 if torch.compiler.is_compiling() else value.item()


def check_options(options: dict) -> None:
    """What can be said of options of `mean_field` without the logits: raises ValueError."""
    for name in ("radius", "dilation"):
        if name in options and options[name] < 1:
            raise ValueError(f"{name} must be >= 1, got {options[name]}")
    if options.get("sweeps", 0) < 0:
        raise ValueError(f"sweeps must be >= 0, got {options['sweeps']}")
    if not 0 <= options.get("damping", 0.0) < 1:
        raise ValueError(f"damping must be in [0, 1), got {options['damping']}")
    if not 0 < options["gamma"] < math.inf:
        raise ValueError(f"gamma must be > 0 and finite, got {options['gamma']}")
    if options.get("tolerance") is not None and not options["tolerance"] >= 0:
        raise ValueError(f"tolerance must be >= 0 or None, got {options['tolerance']}")
    for name in ("sigma_space", "sigma_light", "sigma_time"):
        if name in options and not _number(name, options[name]) > 0:
            raise ValueError(f"{name} must be > 0, got {_number(name, options[name])}")
    for name in ("weight", "weight_time"):
        if name in options and not 0 <= _number(name, options[name]) < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {_number(name, options[name])}")
    named = {"neighborhood": NEIGHBORHOODS, "schedule": SCHEDULES, "start": STARTS}
    for name, choices in named.items():
        if name in options:
            _check_choice(name, options[name], choices)
    if isinstance(options["similarity"], str):
        _check_choice("similarity", options["similarity"], SIMILARITIES)


def _check_temperature(temperature: Scalar) -> None:
    if not 0 < _number("temperature", temperature) < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {_number('temperature', temperature)}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")


def _check_shape(name: str, tensor: Tensor, expected: list[int]) -> None:
    if list(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {list(tensor.shape)}")


def _check_labels(name: str, labels: int, bins: ColorBins | None) -> None:
    if bins is not None and bins.count != labels:
        raise ValueError(f"{name} must have {bins.count} labels for {bins!r}, got {labels}")


def _check_marginals(marginals: Tensor, bins: ColorBins | None) -> ColorBins:
    _check_floating("marginals", marginals)
    bins = bins or reference.JOINT_BINS
    if marginals.ndim != 4:
        raise ValueError(f"marginals must have shape [B, {bins.count}, H, W], got {list(marginals.shape)}")
    _check_labels("marginals", marginals.shape[1], bins)
    return bins


def _check_similarity(similarity: Similarity, labels: int, bins: ColorBins | None) -> None:
    if isinstance(similarity, tuple):
        a, b = similarity
        if a.ndim != 2 or a.shape[0] != labels or a.shape[1] == 0 or a.shape != b.shape:
            raise ValueError(
                f"similarity factors must both have shape [{labels}, R], got {list(a.shape)} and {list(b.shape)}"
            )
        return
    if isinstance(similarity, Tensor):
        _check_shape("similarity", similarity, [labels, labels])
        return
    bins = reference.resolve_bins(bins, labels)
    if similarity in ("gaussian", "quadratic") and bins is None:
        raise ValueError(f"similarity {similarity!r} needs the colours of the labels: bins with K = {labels}, got None")
    if similarity == "steps" and (bins is None or bins.kind != "separable"):
        raise ValueError(f"similarity 'steps' needs labels in a row: bins=ColorBins('separable'), got {bins!r}")


def _check_entries(similarity: Similarity) -> None:
    """What only the values of a similarity given as tensors can say; a graph that is traced has none."""
    if isinstance(similarity, str) or torch.compiler.is_compiling():
        return
    tensors = similarity if isinstance(similarity, tuple) else (similarity,)
    if not all(s.isfinite().all() for s in tensors):
        raise ValueError("similarity must be finite")
    if isinstance(similarity, tuple):
        return
    s = similarity.detach()
    if s.ndim != 2 or s.shape[0] != s.shape[1] or len(s) == 0:
        raise ValueError(f"similarity must have shape [K, K], got {list(s.shape)}")
    apart, largest = (s - s.T).abs().max().item(), s.abs().max().item()
    if apart > 1e-5 * largest:  # rounding of a product in float32 passes
        raise ValueError(f"similarity must be symmetric, got entries that differ by {apart:.3g} from their mirror")
