"""The mean field that goes with a colour network: its options where nothing else is said, and as they are learned."""

from __future__ import annotations

from torch import Tensor

from fastcolor.bins import ColorBins
from fastcolor.ops.mean_field import MeanField, check_options

# Chosen by benchmarks/quality.py: docs/quality.md has the figures.
FIELD = {
    "similarity": "quadratic",
    "gamma": 10.0,
    "neighborhood": "square",
    "radius": 3,
    "sigma_space": 3.0,
    "sigma_light": 3.0,
    "weight": 0.1,
    "schedule": "parallel",
    "damping": 0.0,
    "start": "softmax",
    "sweeps": 5,
}
LEARNED = ("weight", "sigma_space", "sigma_light")


def learnable_field(bins: ColorBins, sweeps: int, start: dict | None = None) -> MeanField:
    """The field of `FIELD`, or with options of an earlier one, its weight and sigmas being parameters."""
    return MeanField(bins, learn=LEARNED, **{**FIELD, **(start or {}), "sweeps": sweeps})


def field_options(field: MeanField) -> dict:
    """What a field has become, as options of `mean_field`: plain numbers and names, as a checkpoint keeps them."""
    kept = {name: field.options[name] for name in FIELD if name in field.options}
    learned = {name: field.value(name).item() for name in LEARNED}
    return {**kept, **learned, "similarity": field.value("similarity")}


def check_field_options(options: dict) -> dict:
    """Options read from a checkpoint, in which only those of `FIELD` may stand.

    Raises:
        ValueError: another option, a value of another type, or one that `mean_field` does not take.
    """
    if not isinstance(options, dict):
        raise ValueError(f"the field must be a table of options, got {options!r}")
    for name, value in options.items():
        if name not in FIELD:
            raise ValueError(f"the field has no option {name!r}")
        kinds = (int, float) if isinstance(FIELD[name], float) else type(FIELD[name])
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"the field's {name} must be like {FIELD[name]!r}, got {value!r}")
    check_options({**FIELD, **options})
    return dict(options)


def log_marginals(marginals: Tensor) -> Tensor:
    """[B, K, H, W] marginals as scores for `color_cross_entropy`: log q, with zeros at the smallest normal number."""
    # as 1 / q goes into the backward, a subnormal q would make it infinite
    return marginals.clamp_min(1.2e-38).log()
