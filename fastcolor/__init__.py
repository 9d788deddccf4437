"""fastcolor: colorization of photographs and film, and training of the models that do it, on fused kernels."""

from fastcolor import _openmp  # noqa: F401  before torch
from fastcolor._version import __version__
from fastcolor.bins import ColorBins
from fastcolor.model.colorizer import ColorizeOptions, Colorizer
from fastcolor.ops._backend import BackendError, use_backend
from fastcolor.ops.cross_entropy import color_cross_entropy
from fastcolor.ops.head_cross_entropy import head_cross_entropy
from fastcolor.ops.lab import lab_to_rgb, rgb_to_lab
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
from fastcolor.ops.render import luma_to_lightness, render, render_uv
from fastcolor.video.colorizer import VideoColorizer, VideoOptions
from fastcolor.yuv import YuvFormat

__all__ = [
    "BackendError",
    "ColorBins",
    "ColorizeOptions",
    "Colorizer",
    "MeanField",
    "PRESETS",
    "VideoColorizer",
    "VideoOptions",
    "YuvFormat",
    "__version__",
    "annealed_mean",
    "color_cross_entropy",
    "entropy",
    "head_cross_entropy",
    "hint_unary",
    "histogram_unary",
    "lab_to_rgb",
    "label_factors",
    "luma_to_lightness",
    "mean_field",
    "mode",
    "probability_unary",
    "render",
    "render_uv",
    "rgb_to_lab",
    "use_backend",
]
