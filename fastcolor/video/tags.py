"""From FFmpeg's names and numbers of pixel formats and colours to ours, and back."""

from __future__ import annotations

from dataclasses import dataclass

import av

from fastcolor.video.errors import VideoError
from fastcolor.yuv import YuvFormat

# ITU-T H.273, tables 2 to 4, which FFmpeg's numbers are
UNSPECIFIED = 2
_MATRICES = {1: "bt709", 5: "bt601", 6: "bt601", 9: "bt2020"}
_BT2020_PRIMARIES = 9
_BT709 = 1
LIMITED, FULL = 1, 2  # AVCOL_RANGE_MPEG, AVCOL_RANGE_JPEG

# Decoders of these say nothing of the range where the stream says nothing, and its standard means the limited one.
# Elsewhere grey without a word is that of images: PNG, TIFF, raw frames, and FFV1, whose grey FFmpeg takes as full.
_LIMITED_GREY = {"h264", "hevc", "av1", "vp9", "vp8", "mpeg4", "mpeg2video", "mpeg1video", "prores", "dnxhd"}


@dataclass(frozen=True)
class Colours:
    """The colour tags of a film in H.273's numbers, and what of them the stream itself said."""

    matrix: int
    full_range: bool
    primaries: int
    transfer: int
    guessed: tuple[str, ...] = ()

    @property
    def range(self) -> int:
        return FULL if self.full_range else LIMITED

    def yuv(self, subsampling: str, bits: int, chroma_location: str = "left") -> YuvFormat:
        return YuvFormat(
            subsampling,
            bits,
            _MATRICES[self.matrix],
            self.full_range,
            "bt2020" if self.primaries == _BT2020_PRIMARIES else "bt709",
            chroma_location,
        )


def read_colours(frame: av.VideoFrame, codec: str) -> Colours:
    """The tags of a decoded frame; what it does not say is chosen as players choose it.

    Matrix: BT.709 from 720 lines or 1280 columns on, else BT.601 (that of 625 lines for 576, of 525 lines for others).
    Primaries: BT.709 unless they are those of BT.2020: they are what the new colours are made for, and greys are the
    same in all.
    """
    guessed = []
    matrix = frame.colorspace
    if matrix not in _MATRICES:
        if matrix == 10:  # BT.2020 constant luminance: luma is not ours to change, chroma is
            matrix = 9
        elif frame.height >= 720 or frame.width >= 1280:
            matrix = _BT709
        else:
            matrix = 5 if frame.height == 576 else 6
        guessed.append("matrix")
    if frame.color_range in (LIMITED, FULL) and not frame.format.is_rgb:
        full = frame.color_range == FULL
    else:
        name = frame.format.name
        grey = name.startswith(("gray", "ya8", "ya16", "mono"))
        full = name.startswith("yuvj") or (grey and codec not in _LIMITED_GREY)
        guessed.append("range")
    primaries = frame.color_primaries if frame.color_primaries in (_BT709, _BT2020_PRIMARIES) else _BT709
    if primaries != frame.color_primaries:
        guessed.append("primaries")
    transfer = frame.color_trc
    if transfer in (0, UNSPECIFIED, 3):
        transfer = _BT709
        guessed.append("transfer")
    return Colours(matrix, full, primaries, transfer, tuple(guessed))


# --- pixel formats ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelFormat:
    """What the writer has to know of a pixel format: its name, and the planes to fill.

    Semi-planar formats (nv12, p010le) are filled as their planar kin, and FFmpeg interleaves them.
    """

    name: str
    planar: str
    subsampling: str
    bits: int


_SEMI_PLANAR = {
    "nv12": "yuv420p", "nv16": "yuv422p", "nv24": "yuv444p",
    "p010le": "yuv420p10le", "p210le": "yuv422p10le", "p410le": "yuv444p10le",
    "p012le": "yuv420p12le", "p212le": "yuv422p12le", "p412le": "yuv444p12le",
    "p016le": "yuv420p16le", "p216le": "yuv422p16le", "p416le": "yuv444p16le",
}  # fmt: skip


def pixel_format(name: str) -> PixelFormat | None:
    """None where it is not one of Y'CbCr in planes, little-endian, without alpha."""
    planar = _SEMI_PLANAR.get(name, name)
    for subsampling in ("420", "422", "444"):
        for bits in (8, 9, 10, 12, 14, 16):
            if planar == f"yuv{subsampling}p" + ("" if bits == 8 else f"{bits}le"):
                return PixelFormat(name, planar, subsampling, bits)
    return None


def known_formats(codec: av.Codec) -> list[PixelFormat]:
    """Those of an encoder that can be written here, planar ones first."""
    formats = [pixel_format(f.name) for f in codec.video_formats or ()]
    return sorted((f for f in formats if f is not None), key=lambda f: f.name != f.planar)


def choose_format(codec: av.Codec, bits: int, asked: str | None) -> PixelFormat:
    """The pixel format of the output: `asked` for, or else the nearest to 4:2:0 with the bits of the luma.

    Raises:
        VideoError: the encoder cannot write it.
    """
    known = known_formats(codec)
    if not known:
        raise VideoError(f"--codec {codec.name}: takes no planar Y'CbCr, which is what is written here")
    if asked is not None:
        for candidate in (asked, f"{asked}le"):
            found = next((f for f in known if f.name == candidate), None)
            if found:
                return found
        raise VideoError(
            f"--pix-fmt {asked}: {codec.name} takes {', '.join(f.name for f in known)} of those that are written here"
        )
    # enough bits before few, then as few as possible, then little chroma
    return min(known, key=lambda f: (f.bits < bits, abs(f.bits - bits), f.subsampling, f.name != f.planar))
