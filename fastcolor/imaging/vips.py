"""Opening image files with libvips (through pyvips), turned upright and into sRGB."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyvips

_JPEG = frozenset({".jpg", ".jpeg", ".jpe"})
SUFFIXES = _JPEG | frozenset({".png", ".tif", ".tiff", ".webp"})


class ImageError(ValueError):
    """A file that is not a picture we can read or write. The message names the file and says why."""


def libvips():
    """The pyvips module, imported when the first file is read: operations and models do without it.

    Raises:
        ImportError: pyvips is missing; the message says how to get it.
    """
    # its warnings (an odd EXIF field, an unknown TIFF tag) and its own log of every call help nobody here
    logging.getLogger("pyvips").setLevel(logging.ERROR)
    try:
        import pyvips
    except (ImportError, OSError) as error:  # OSError: pyvips is there, the library behind it is not
        raise ImportError(f"image files need libvips: pip install 'pyvips[binary]' ({error})") from error
    # files are read once; a cache would only keep memory, and give back the old picture of a name that was written anew
    pyvips.cache_set_max(0)
    return pyvips


def reason(error: Exception) -> str:
    """What the system said, or else the first line of what libvips says, without the names of its own parts."""
    text = getattr(error, "detail", None) or str(error)
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if line.startswith("system error: "):
            return line.removeprefix("system error: ")
    return lines[0].split(": ", 1)[-1] if lines else type(error).__name__


def open_file(path: str | Path, *, page: int = 0, shrink: int = 1) -> pyvips.Image:
    """Opens a file lazily: its header is read now, pixels that turn out broken raise `pyvips.Error` when computed.

    Args:
        path: a local file.
        page: of a TIFF, counted from 0; -1 gives all frames of an animated WebP, one under the other.
        shrink: 2, 4 or 8 decodes a JPEG at that fraction of its size, several times faster; no other format changes.

    Raises:
        ImageError: missing, a folder, empty, or not an image.
    """
    path = Path(path)
    for _ in range(2):
        try:
            return _open(path, page, shrink)
        except ImageError as error:
            # libvips keeps its messages in one place for all threads: another file's failure may have taken this one's
            if "unable to call" not in str(error):
                raise
    return _open(path, page, shrink)


def _open(path: Path, page: int, shrink: int) -> pyvips.Image:
    pyvips = libvips()
    try:
        if path.is_dir():
            raise ImageError(f"{path}: is a folder, expected an image file")
        if path.stat().st_size == 0:
            raise ImageError(f"{path}: the file is empty")
        if shrink > 1 and path.suffix.lower() in _JPEG:
            with suppress(pyvips.Error):  # a file of another kind under this name, or a broken one: as any other
                return pyvips.Image.jpegload(str(path), shrink=shrink, fail_on="truncated", access="sequential")
        # a truncated file is an error, never a picture with a grey half
        image = pyvips.Image.new_from_file(str(path), fail_on="truncated", access="sequential")
        if page != 0 and image.get_n_pages() > 1:
            options = {"page": page} if page > 0 else {"n": -1}
        elif shrink > 1 and image.get("vips-loader") == "jpegload":
            options = {"shrink": shrink}
        else:
            return image
        return pyvips.Image.new_from_file(str(path), fail_on="truncated", access="sequential", **options)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from error
    except pyvips.Error as error:
        raise ImageError(f"{path}: not a readable image ({reason(error)})") from error


def open_bytes(data: bytes, name: str, *, shrink: int = 1) -> pyvips.Image:
    """As `open_file`, of a file's content in memory; `name` is what errors call it.

    Raises:
        ImageError: empty, or not an image.
    """
    pyvips = libvips()
    if not data:
        raise ImageError(f"{name}: the file is empty")
    try:
        image = pyvips.Image.new_from_buffer(data, "", fail_on="truncated", access="sequential")
        if shrink > 1 and image.get("vips-loader") == "jpegload_buffer":
            return pyvips.Image.new_from_buffer(data, "", fail_on="truncated", access="sequential", shrink=shrink)
        return image
    except pyvips.Error as error:
        raise ImageError(f"{name}: not a readable image ({reason(error)})") from error


def to_srgb(image: pyvips.Image) -> tuple[pyvips.Image, pyvips.Image | None]:
    """(1 or 3 bands of sRGB, 8 or 16 bits deep as the file is; alpha or None): upright, colour profile applied.

    Raises:
        ImageError: samples that are neither 8 nor 16 bits unsigned and not of a colour space libvips knows.
    """
    pyvips = libvips()
    image = upright(image)
    alpha = None
    if image.hasalpha():
        alpha = image[image.bands - 1]
        image = image[: image.bands - 1] if image.bands > 2 else image[0]
    deep = image.format == "ushort"
    if image.get_typeof("icc-profile-data") and not _is_srgb(image):
        try:
            image = image.icc_transform("srgb", embedded=True, intent="relative", depth=16 if deep else 8)
        except pyvips.Error:  # a broken profile, or one of other channels: the pixels are read as if it was not there
            image = image.copy()
            image.remove("icc-profile-data")
    if image.interpretation == "cmyk":
        image = image.icc_transform("srgb", input_profile="cmyk", intent="relative", depth=16 if deep else 8)
    elif image.format not in ("uchar", "ushort") or image.interpretation not in (
        "srgb", "rgb", "rgb16", "b-w", "grey16", "multiband",
    ):  # fmt: skip
        if image.interpretation in ("lab", "labs", "labq", "xyz", "scrgb", "hsv", "lch", "yxy"):
            image = image.colourspace("rgb16" if image.format != "uchar" else "srgb")
        else:
            raise ImageError(f"samples of type {image.format} are not supported; 8 or 16 bits unsigned are")
    if image.bands == 2 or image.bands > 3:
        image = image[0] if image.bands == 2 else image[:3]
    return image, alpha


def upright(image: pyvips.Image) -> pyvips.Image:
    """The image turned as its orientation tag says, and the tag reset."""
    if image.get_typeof("orientation") and image.get("orientation") > 2:
        # files are opened for reading from top to bottom, and turning starts elsewhere
        image = image.copy_memory()
    return image.autorot()


def _is_srgb(image: pyvips.Image) -> bool:
    profile = image.get("icc-profile-data")
    if image.bands != 3:
        return False
    return b"sRGB IEC61966" in profile[:4096].replace(b"\0", b"") or profile == libvips().Image.profile_load("srgb")
