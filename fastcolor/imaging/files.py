"""Reading and writing image files with all that they carry: depth, alpha, pages, EXIF, XMP, IPTC and resolution."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastcolor._files import atomic_path
from fastcolor.imaging import tags
from fastcolor.imaging.tags import Metadata
from fastcolor.imaging.vips import SUFFIXES, ImageError, libvips, open_file, reason, to_srgb

if TYPE_CHECKING:
    import pyvips

logger = logging.getLogger(__name__)

QUALITY = 95  # of JPEG and WebP
_CLASSIC_TIFF = 3_900_000_000  # bytes of pixels from where on BigTIFF is written: offsets of TIFF end at 4 GiB
_LONGEST = {".webp": 16383, ".jpg": 65535}  # sides that the format can hold
# pixels per mm that libvips gives to files that say nothing
_INVENTED = {"jpegload": 72 / 25.4, "pngload": 2.834, "tiffload": 1.0, "webpload": 1.0}
# TIFF tag 259; what cannot hold colours (fax) or 16 bits without loss becomes deflate
_COMPRESSIONS = {1: "none", 5: "lzw", 7: "jpeg", 8: "deflate", 32773: "packbits", 32946: "deflate", 50000: "zstd"}
_KEEP_XMP, _KEEP_OTHER = 2, 16  # VipsForeignKeep


@dataclass
class Picture:
    """A decoded file.

    path: where it came from.
    pages: [H, W, 1 or 3] uint8 or uint16, grey or sRGB, upright, all of one size; at least one.
    alpha: [H, W] of the page's type, or None, for each page.
    metadata: EXIF, XMP, IPTC and TIFF tags, orientation reset.
    resolution: (x, y) pixels per mm, or None where the file says nothing; `unit` is the one it counts in, "in" or "cm".
    compression: of a TIFF file, by libvips' names.
    lossless: whether a WebP file is.
    delays: ms of each frame of an animated WebP; `loop`: how often it runs, 0 for ever.
    """

    path: Path
    pages: list[np.ndarray]
    alpha: list[np.ndarray | None]
    metadata: Metadata = field(default_factory=Metadata)
    resolution: tuple[float, float] | None = None
    unit: str = "in"
    compression: str = "deflate"
    lossless: bool = False
    delays: list[int] | None = None
    loop: int = 0


def decoded_size(path: str | Path, channels: int = 0) -> int:
    """Bytes that the pixels of a file take when it is read, from its header alone; `channels` more are counted.

    Raises:
        ImageError: as `open_file`.
    """
    image = open_file(path)
    depth = 2 if image.format == "ushort" else 1
    return image.width * image.height * image.get_n_pages() * depth * (image.bands + channels)


def read_picture(path: str | Path, max_pages: int | None = None) -> Picture:
    """Reads a JPEG, PNG, TIFF or WebP file with all its pages (the first `max_pages`).

    Colour profiles are applied, grey and CMYK ones too, and pixels are turned upright. Reduced copies of a page that
    scanners and editors put into TIFF files (thumbnails, pyramids, masks) are no pages.

    Raises:
        ImageError: missing, no image, broken or cut off, of samples that are not 8 or 16 bits, or with pages of unequal
            size. The message names the file.
    """
    path = Path(path)
    try:
        return _read(path, max_pages)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from error
    except libvips().Error as error:
        raise ImageError(f"{path}: broken or cut off ({reason(error)})") from error
    except MemoryError as error:
        raise ImageError(f"{path}: too large for this machine's memory") from error


def _read(path: Path, max_pages: int | None) -> Picture:
    first = open_file(path)
    loader, count = first.get("vips-loader"), first.get_n_pages()
    turned = _turned(first)
    width, height = (first.height, first.width) if turned else (first.width, first.height)
    picture = Picture(path, [], [])
    if not _invented_resolution(path, first):
        picture.resolution = (first.yres, first.xres) if turned else (first.xres, first.yres)
    if first.get_typeof("resolution-unit") and first.get("resolution-unit") == "cm":
        picture.unit = "cm"
    images: Iterable[pyvips.Image] = [first]
    if loader == "tiffload":
        directories = tags.read_pages(path)
        if len(directories) != count:
            directories = []
        # bit 0: a smaller copy of another page; bit 2: a mask
        numbers = [
            i for i in range(count) if i == 0 or not directories or not _number(directories[i], tags.REDUCED) & 5
        ]
        numbers = numbers[:max_pages]
        images = (open_file(path, page=i) if i else first for i in numbers)  # one open at a time
        if directories:
            picture.compression = _COMPRESSIONS.get(_number(directories[0], tags.COMPRESSION), "deflate")
            carried = [tags.upright_tags(directories[i], width, height) for i in numbers]
            picture.metadata = tags.from_tiff(carried, picture.resolution)
    else:
        picture.metadata = _metadata(path, first, width, height, turned)
        if picture.resolution is None and picture.metadata.exif:
            picture.resolution = tags.exif_resolution(picture.metadata.exif)  # turned with it
        if loader == "webpload":
            picture.lossless = tags.webp_lossless(path)
        if count > 1:
            frames = min(count, max_pages or count)
            roll = open_file(path, page=-1).copy_memory()
            images = (roll.crop(0, i * first.height, roll.width, first.height) for i in range(frames))
            picture.delays = roll.get("delay")[:frames] if roll.get_typeof("delay") else None
            picture.loop = roll.get("loop") if roll.get_typeof("loop") else 0

    for number, image in enumerate(images, 1):
        size = (image.height, image.width) if _turned(image) else (image.width, image.height)
        if size != (width, height):
            raise ImageError(
                f"{path}: its pages differ in size (page 1 is {width}×{height}, page {number} {size[0]}×{size[1]}); "
                "split it into one file a page"
            )
        try:
            pixels, alpha = to_srgb(image)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error
        page, mask = _decode(pixels, alpha)
        picture.pages.append(page)
        picture.alpha.append(mask)
    return picture


def _invented_resolution(path: Path, image: pyvips.Image) -> bool:
    loader = image.get("vips-loader")
    if any(abs(n - _INVENTED.get(loader, 1.0)) > 1e-6 for n in (image.xres, image.yres)):
        return False
    if loader == "jpegload":  # 72 per inch may be true: JFIF says so with a unit
        with open(path, "rb") as file:
            head = file.read(20)
        return not (head[6:10] == b"JFIF" and head[13] in (1, 2))
    return True


def _turned(image: pyvips.Image) -> bool:
    """Whether turning it upright swaps its sides."""
    return bool(image.get_typeof("orientation")) and image.get("orientation") > 4


def _number(directory: tags.Directory, tag: int) -> int:
    value = directory.get(tag)
    return value.first() if isinstance(value, tags.Tag) else 0


def _decode(pixels: pyvips.Image, alpha: pyvips.Image | None) -> tuple[np.ndarray, np.ndarray | None]:
    """[H, W, 1 or 3] and [H, W] or None."""
    if alpha is None:
        return pixels.numpy().reshape(pixels.height, pixels.width, pixels.bands), None
    # in one go: a file that is read from top to bottom cannot be read twice
    joined = pixels.bandjoin(alpha.cast(pixels.format))
    both = joined.numpy().reshape(joined.height, joined.width, joined.bands)
    return np.ascontiguousarray(both[..., :-1]), np.ascontiguousarray(both[..., -1])


def _metadata(path: Path, image: pyvips.Image, width: int, height: int, turned: bool) -> Metadata:
    """Of JPEG, PNG and WebP; width × height is the upright picture's."""

    def blob(name: str) -> bytes | None:
        return bytes(image.get(name)) if image.get_typeof(name) else None

    metadata = Metadata()
    if exif := blob("exif-data"):
        metadata.exif = tags.upright_exif(exif, width, height, turned)
        if metadata.exif is None:
            logger.warning("%s: its EXIF is broken and left out", path)
    if xmp := blob("xmp-data"):
        metadata.xmp = tags.upright_xmp(xmp)
    if photoshop := blob("iptc-data"):
        metadata.photoshop = tags.fresh_photoshop(photoshop) or None
    if image.get("vips-loader") == "pngload":
        metadata.texts = tags.png_texts(path)
    return metadata


def write_picture(path: str | Path, picture: Picture, pages: Sequence[np.ndarray]) -> None:
    """Writes new pixels with what the picture carried; the suffix of `path` is the format. sRGB, and tagged so.

    PNG and TIFF keep 16 bits, JPEG and WebP hold 8: there samples are rounded. JPEG has no alpha: it is left out with
    a logged warning. JPEG is written with quality 95 and full chroma, WebP with quality 95 or without loss as it was,
    TIFF with the compression that it had (deflate for files of other formats, and for fax, which holds no colour).

    Args:
        pages: [H, W, 1 or 3] uint8 or uint16, as many and as large as `picture.pages`.

    Raises:
        ImageError: the file cannot be written, or the format cannot hold it; no half file is left and an existing one
            is as it was. ValueError: pages of another number, size or type.
    """
    path = Path(path)
    suffix = {".jpeg": ".jpg", ".jpe": ".jpg", ".tiff": ".tif"}.get(path.suffix.lower(), path.suffix.lower())
    if suffix not in SUFFIXES:
        raise ImageError(
            f"{path}: cannot write {suffix or 'files without a suffix'}; {', '.join(sorted(SUFFIXES))} can be"
        )
    if [p.shape[:2] for p in pages] != [p.shape[:2] for p in picture.pages]:
        raise ValueError(f"expected {len(picture.pages)} pages of {picture.pages[0].shape[:2]}, got {len(pages)}")
    if any(p.ndim != 3 or p.shape[2] not in (1, 3) or p.dtype not in (np.uint8, np.uint16) for p in pages):
        raise ValueError("pages must be uint8 or uint16 arrays [H, W, 1 or 3]")
    if len(pages) > 1 and suffix in (".jpg", ".png"):
        raise ImageError(f"{path}: a {suffix} file holds one page, {picture.path} has {len(pages)}; write .tif")
    height, width = pages[0].shape[:2]
    if max(height * (len(pages) if suffix != ".webp" else 1), width) > _LONGEST.get(suffix, 1 << 31):
        raise ImageError(f"{path}: {width}×{height} is too large for {suffix} ({_LONGEST[suffix]} pixels a side)")
    alpha = picture.alpha
    if suffix == ".jpg" and any(a is not None for a in alpha):
        logger.warning("%s: JPEG has no alpha, that of %s is left out", path, picture.path)
        alpha = [None] * len(pages)
    try:
        with atomic_path(path) as temporary:
            image = _assemble(pages, alpha, deep=suffix in (".png", ".tif"))
            if picture.resolution:
                image = image.copy(xres=picture.resolution[0], yres=picture.resolution[1])
            if suffix == ".tif":
                _write_tiff(temporary, image, picture)
            else:
                temporary.write_bytes(_ENCODERS[suffix](path, image, picture))
    except OSError as error:
        raise ImageError(f"{path}: cannot be written ({error.strerror or error})") from error
    except libvips().Error as error:
        raise ImageError(f"{path}: cannot be written ({reason(error)})") from error


def _assemble(pages: Sequence[np.ndarray], alpha: Sequence[np.ndarray | None], deep: bool) -> pyvips.Image:
    """One image, pages one under the other, with as many channels and bits as the richest page needs."""
    pyvips = libvips()
    deep = deep and any(p.dtype == np.uint16 for p in pages)
    channels = max(p.shape[2] for p in pages)
    masked = any(a is not None for a in alpha)

    def wrap(samples: np.ndarray) -> pyvips.Image:
        if samples.dtype == np.uint16 and not deep:
            samples = ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)
        elif samples.dtype == np.uint8 and deep:
            samples = samples.astype(np.uint16) * 257
        space = ("grey16" if deep else "b-w") if channels == 1 else ("rgb16" if deep else "srgb")
        return pyvips.Image.new_from_array(np.ascontiguousarray(samples)).copy(interpretation=space)

    images = []
    for page, mask in zip(pages, alpha, strict=True):
        image = wrap(np.broadcast_to(page, (*page.shape[:2], channels)))
        if masked:
            opaque = np.full(page.shape[:2], np.iinfo(page.dtype).max, page.dtype)
            image = image.bandjoin(wrap((opaque if mask is None else mask)[..., None]))
        images.append(image)
    roll = images[0] if len(images) == 1 else pyvips.Image.arrayjoin(images, across=1)
    roll = roll.copy()
    if len(images) > 1:
        roll.set_type(pyvips.GValue.gint_type, "page-height", pages[0].shape[0])
    return roll


def _profile(image: pyvips.Image) -> dict[str, str]:
    """The profile of sRGB, for colour; grey stands as what the format says of grey."""
    return {"profile": "srgb"} if image.interpretation in ("srgb", "rgb16") else {}


def _with_xmp(image: pyvips.Image, picture: Picture) -> pyvips.Image:
    if picture.metadata.xmp:
        image.set_type(libvips().GValue.blob_type, "xmp-data", picture.metadata.xmp)
    return image


def _jpeg(path: Path, image: pyvips.Image, picture: Picture) -> bytes:
    metadata = picture.metadata
    if metadata.xmp and len(metadata.xmp) > 65000:
        logger.warning("%s: XMP of %d bytes does not fit into a JPEG file and is left out", path, len(metadata.xmp))
    else:
        image = _with_xmp(image, picture)
    data = image.jpegsave_buffer(
        Q=QUALITY, subsample_mode="off", optimize_coding=True, keep=_KEEP_XMP, **_profile(image)
    )
    dots = None
    if picture.resolution:
        factor = 10 if picture.unit == "cm" else 25.4
        dots = (2 if picture.unit == "cm" else 1, *(min(max(round(n * factor), 1), 65535) for n in picture.resolution))
    return tags.into_jpeg(data, metadata.exif, metadata.photoshop, dots, str(path))


def _png(path: Path, image: pyvips.Image, picture: Picture) -> bytes:
    metadata = picture.metadata
    data = _with_xmp(image, picture).pngsave_buffer(keep=_KEEP_XMP, **_profile(image))
    return tags.into_png(data, metadata.exif, metadata.texts, picture.resolution is not None)


def _webp(path: Path, image: pyvips.Image, picture: Picture) -> bytes:
    image = _with_xmp(image, picture)
    if picture.delays:
        image.set_type(libvips().GValue.array_int_type, "delay", picture.delays)
        image.set_type(libvips().GValue.gint_type, "loop", picture.loop)
    data = image.webpsave_buffer(
        Q=QUALITY,
        lossless=picture.lossless,
        exact=picture.lossless,
        smart_subsample=True,  # WebP halves chroma; this way it is seen least
        keep=_KEEP_XMP | _KEEP_OTHER,
        profile="srgb",  # for grey too: libvips turns it to RGB
    )
    exif = picture.metadata.exif
    if exif is None and picture.resolution:
        exif = tags.resolution_block(*picture.resolution)
    return tags.into_webp(data, exif)


_ENCODERS = {".jpg": _jpeg, ".png": _png, ".webp": _webp}


def _write_tiff(temporary: Path, image: pyvips.Image, picture: Picture) -> None:
    compression = picture.compression
    if compression == "jpeg" and (image.format != "uchar" or image.bands != 3):
        compression = "deflate"
    size = image.width * image.height * image.bands * (2 if image.format == "ushort" else 1)
    image.tiffsave(
        str(temporary),
        compression=compression,
        Q=QUALITY,
        bigtiff=size > _CLASSIC_TIFF,
        resunit="cm" if picture.unit == "cm" else "inch",
        keep=0,
        **_profile(image),
    )
    directories = tags.to_tiff(picture.metadata, len(picture.pages))
    tags.append_tags(temporary, directories, picture.resolution is not None)
