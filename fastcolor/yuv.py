"""Y'CbCr formats of video: what the numbers in the planes of a frame mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastcolor.reference.lab import WHITE, XYZ_TO_RGB

# Weights of red and blue in luma: ITU-R BT.601-7 (2.5.1), BT.709-6 (3.2), BT.2020-2 (table 4)
MATRICES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
# (x, y) of red, green and blue, and of white D65: BT.709-6 (1.3), BT.2020-2 (table 3). sRGB has those of BT.709.
PRIMARIES = {
    "bt709": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
}
_D65 = (0.3127, 0.3290)
SUBSAMPLINGS = {"444": (1, 1), "422": (1, 2), "420": (2, 2)}  # luma samples of a chroma sample, (down, across)
LOCATIONS = ("left", "center", "topleft")


@dataclass(frozen=True)
class YuvFormat:
    """The format of a frame's planes.

    subsampling: "420", "422" or "444".
    bits: of a sample, 8 (uint8 planes) to 16 (uint16 planes).
    matrix: "bt601", "bt709" or "bt2020" (non-constant luminance): the weights of R', G', B' in Y'.
    full_range: black at 0 and white at 2^bits − 1; else at 16 and 235, chroma from 16 to 240, times 2^(bits − 8).
    primaries: "bt709" (those of sRGB too) or "bt2020".
    chroma_location: where the samples of subsampled chroma lie: "left" (on the luma samples of even columns, between
        the rows: MPEG-2, H.264 and HEVC where nothing else is said), "center" (between four luma samples: JPEG,
        MPEG-1), or "topleft" (on the luma samples of even columns and rows: BT.2020).

    R', G', B' are taken as sRGB-encoded, whatever the matrix, as players and image tools do.

    Raises:
        ValueError: a field has another value.
    """

    subsampling: str = "420"
    bits: int = 8
    matrix: str = "bt709"
    full_range: bool = False
    primaries: str = "bt709"
    chroma_location: str = "left"

    def __post_init__(self):
        choices = {
            "subsampling": SUBSAMPLINGS, "matrix": MATRICES, "primaries": PRIMARIES, "chroma_location": LOCATIONS,
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if not (isinstance(self.bits, int) and 8 <= self.bits <= 16):
            raise ValueError(f"bits must be from 8 to 16, got {self.bits!r}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the planes."""
        return torch.uint8 if self.bits == 8 else torch.uint16

    @property
    def steps(self) -> tuple[int, int]:
        """Luma samples of a chroma sample, (down, across)."""
        return SUBSAMPLINGS[self.subsampling]

    @property
    def cosited(self) -> tuple[bool, bool]:
        """Whether chroma lies on every second luma sample, (down, across), and not between two."""
        return self.chroma_location == "topleft", self.chroma_location != "center"

    @property
    def offsets(self) -> tuple[float, float]:
        """Where the first chroma sample lies, (down, across), in luma samples from the edge of the frame."""
        return tuple(0.5 if on else step / 2 for step, on in zip(self.steps, self.cosited, strict=True))

    def chroma_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the chroma planes of a frame; odd sides are rounded up."""
        down, across = self.steps
        return -(-height // down), -(-width // across)

    @property
    def black(self) -> int:
        """The luma of black."""
        return 0 if self.full_range else 16 << (self.bits - 8)

    @property
    def luma_span(self) -> int:
        """From the luma of black to that of white."""
        return 2**self.bits - 1 if self.full_range else 219 << (self.bits - 8)

    @property
    def chroma_span(self) -> int:
        """From Cb = −½ to Cb = ½."""
        return 2**self.bits - 1 if self.full_range else 224 << (self.bits - 8)

    @property
    def luma_weights(self) -> tuple[float, float, float]:
        """Of R', G' and B' in Y'."""
        red, blue = MATRICES[self.matrix]
        return red, 1 - red - blue, blue

    @property
    def xyz_to_rgb(self) -> tuple[tuple[float, float, float], ...]:
        """XYZ / white to linear RGB of the primaries, 3×3: greys are the same in all."""
        return _FROM_XYZ[self.primaries]


def _to_xyz(primaries: str) -> torch.Tensor:
    """Linear RGB to XYZ from the chromaticities: SMPTE RP 177."""
    columns = torch.tensor(
        [[x / y, 1.0, (1 - x - y) / y] for x, y in PRIMARIES[primaries]], dtype=torch.float64, device="cpu"
    ).T
    x, y = _D65
    white = torch.tensor([x / y, 1.0, (1 - x - y) / y], dtype=torch.float64, device="cpu")
    return columns * torch.linalg.solve(columns, white)


def _from_xyz(primaries: str) -> tuple[tuple[float, float, float], ...]:
    from_xyz, white = (torch.tensor(m, dtype=torch.float64, device="cpu") for m in (XYZ_TO_RGB, WHITE))
    srgb = from_xyz * white
    if primaries == "bt709":
        return tuple(map(tuple, srgb.tolist()))
    return tuple(map(tuple, (_to_xyz(primaries).inverse() @ _to_xyz("bt709") @ srgb).tolist()))


_FROM_XYZ = {primaries: _from_xyz(primaries) for primaries in PRIMARIES}
