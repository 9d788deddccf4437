"""Numbered images out."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from fastcolor.video.errors import VideoError
from fastcolor.video.tags import PixelFormat
from fastcolor.video.writer import Encoding
from fastcolor.yuv import YuvFormat

_FORMATS = {  # encoder, pixel formats for 8 bits and for more
    ".png": ("png", "rgb24", "rgb48be"),
    ".tif": ("tiff", "rgb24", "rgb48le"),
    ".tiff": ("tiff", "rgb24", "rgb48le"),
    ".jpg": ("mjpeg", "yuvj444p", None),
    ".jpeg": ("mjpeg", "yuvj444p", None),
}


def image_pixels(target: str, bits: int) -> PixelFormat:
    """How frames are handed to `ImageWriter`: 4:4:4 with the bits of the luma, 8 for JPEG."""
    bits = 8 if _FORMATS[Path(target).suffix.lower()][2] is None else bits
    name = "yuv444p" + ("" if bits == 8 else f"{bits}le")
    return PixelFormat(name, name, "444", bits)


def yuv_to_rgb(luma: Tensor, u: Tensor, v: Tensor, yuv: YuvFormat) -> Tensor:
    """Planes of one size, [H, W] each, to R'G'B' [H, W, 3]: uint8 for 8 bits, else uint16 over its whole range."""
    red, green, blue = yuv.luma_weights
    middle = 1 << (yuv.bits - 1)
    y = (luma.float() - yuv.black) / yuv.luma_span
    cb, cr = ((c.float() - middle) / yuv.chroma_span for c in (u, v))
    r = y + 2 * (1 - red) * cr
    b = y + 2 * (1 - blue) * cb
    g = (y - red * r - blue * b) / green
    top, dtype = (255, torch.uint8) if yuv.bits == 8 else (65535, torch.uint16)
    return (torch.stack((r, g, b), -1) * top).round_().clamp_(0, top).to(dtype)


class ImageWriter:
    """Writes frames as images, each whole or not at all.

    Args:
        target: a pattern such as frames/%06d.png.
        first: number of the first image.
    """

    def __init__(self, target: str, first: int, encoding: Encoding):
        self.encoding = encoding
        info = encoding.info
        self._yuv = info.colours.yuv("444", encoding.pixels.bits)
        codec, few, many = _FORMATS[Path(target).suffix.lower()]
        self._format = few if encoding.pixels.bits == 8 else many
        options = {"start_number": str(first), "atomic_writing": "1"}
        self._container = av.open(f"file:{target}", "w", format="image2", container_options=options)
        try:
            self._stream = self._container.add_stream(codec, rate=info.rate, time_base=info.time_base)
        except ValueError as error:
            raise VideoError(f"{target}: {error}") from error
        context = self._stream.codec_context
        context.width, context.height, context.pix_fmt = info.width, info.height, self._format
        context.thread_count = encoding.threads
        if codec == "mjpeg":
            context.options = {"q:v": "2", "qmin": "1"}
        self.frames = 0

    def write(self, luma: Tensor, u: Tensor, v: Tensor, pts: int) -> None:
        rgb = yuv_to_rgb(luma, u, v, self._yuv).numpy()
        if self._format == "yuvj444p":
            frame = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format="yuvj444p", dst_colorspace="ITU601")
        elif self._format == "rgb24":
            frame = av.VideoFrame.from_ndarray(rgb, "rgb24")
        else:  # the array is taken as it lies in memory, whatever the format says
            frame = av.VideoFrame.from_ndarray(rgb.astype(np.uint16), self._format)
        frame.pts, frame.time_base = pts, self.encoding.info.time_base
        self._container.mux(self._stream.encode(frame))
        self.frames += 1

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()
