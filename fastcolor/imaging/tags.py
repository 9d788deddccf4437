"""What a file carries beside its pixels: TIFF tags, EXIF, XMP and IPTC, read and written byte by byte.

libvips neither reads nor writes EXIF in TIFF files, keeps a quarter of their IPTC, and rebuilds the EXIF of the other
formats with fields of its own. An EXIF block is a small TIFF file, so one reader and one writer of directories do.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

logger = logging.getLogger(__name__)

# bytes of one value, by field type (TIFF 6.0 and BigTIFF; 13 and 18 are offsets, which would point nowhere in a copy)
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8, 17: 8}
_UNITS = {**_SIZES, 5: 4, 10: 4}  # rationals are pairs
_SHORT, _LONG, _UNDEFINED = 3, 4, 7

REDUCED, COMPRESSION = 254, 259
_ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION, _UNIT = 274, 282, 283, 296
_XMP, _IPTC, _PHOTOSHOP, _EXIF, _GPS, _INTEROP = 700, 33723, 34377, 34665, 34853, 40965
_COLOR_SPACE, _PIXEL_WIDTH, _PIXEL_HEIGHT = 40961, 40962, 40963  # in the EXIF directory
_DIRECTORIES = {_EXIF, _GPS, _INTEROP}
_RESOLUTION = {_X_RESOLUTION, _Y_RESOLUTION, _UNIT}
_READ_TOO = {REDUCED, COMPRESSION, *_RESOLUTION}
# below 32768 (private from there on) only the tags that describe the picture and not how its pixels are stored:
# names of document and page, description, make, model, software, date, artist, host computer, XMP
_DESCRIPTIVE = {269, 270, 271, 272, 285, 305, 306, 315, 316, _XMP}
# storage of the SGI formats, of raw sensors (CFA, DNG); ICC profile; Photoshop's layers, grey ones
_STORAGE = {*range(32995, 32999), 33421, 33422, 34675, 37724, *range(50706, 53000)}
_LARGEST = 1 << 26  # bytes of one value; a larger one is an error in the file, or not metadata

_JPEG_SEGMENT = 65533  # bytes that one holds
_PHOTOSHOP_HEAD = b"Photoshop 3.0\0"
_IPTC_RESOURCE = 0x0404
_STALE_RESOURCES = {0x0409, 0x040C, 0x040F}  # two kinds of thumbnails, grey ones, and the profile of the old pixels


@dataclass(frozen=True)
class Tag:
    """Values of one TIFF field: `data` holds them little-endian, one after the other."""

    kind: int
    data: bytes

    def first(self) -> int:
        return int.from_bytes(self.data[: _SIZES[self.kind]], "little")


@dataclass(frozen=True)
class _Stored:
    """A field whose values already stand in the file: `word` holds them or says where."""

    kind: int
    count: int
    word: bytes


Directory = dict[int, "Tag | _Stored | Directory"]


@dataclass
class Metadata:
    """What goes from one file to the next, whatever their formats.

    exif: a block without its `Exif\\0\\0` head, upright and without thumbnail.
    xmp: the packet, upright.
    photoshop: resources (8BIM ...), IPTC among them, as in tag 34377 of TIFF.
    pages: TIFF tags of each page, EXIF as a directory in the directory; empty when the source is no TIFF.
    texts: chunks of PNG with text in them, whole.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    photoshop: bytes | None = None
    pages: list[Directory] = field(default_factory=list)
    texts: bytes = b""


# --- directories of TIFF and EXIF -------------------------------------------------------------------------------------


class _Reader:
    """Reads directories of a TIFF file or an EXIF block. Raises ValueError or struct.error where they are broken."""

    def __init__(self, file: BinaryIO):
        self.file = file
        head = self._read(0, 16, exact=False)
        self.order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        if not self.order or len(head) < 8:
            raise ValueError("not a TIFF structure")
        magic = self._number(head[2:4])
        if magic not in (42, 43) or (magic == 43 and len(head) < 16):
            raise ValueError("not a TIFF structure")
        self.big = magic == 43
        # bytes of: the number of fields, a field, its count and its word
        self.counter, self.entry, self.word = (8, 20, 8) if self.big else (2, 12, 4)
        self.link = 8 if self.big else 4  # where the first directory's offset stands

    def _read(self, at: int, size: int, exact: bool = True) -> bytes:
        self.file.seek(at)
        data = self.file.read(size)
        if exact and len(data) != size:
            raise ValueError("ends in the middle of its metadata")
        return data

    def _number(self, data: bytes) -> int:
        return int.from_bytes(data, "little" if self.order == "<" else "big")

    def chain(self) -> Iterator[tuple[int, int]]:
        """(offset of a directory, where the link to it stands), page after page."""
        link, seen = self.link, set()
        while (at := self._number(self._read(link, self.word))) and at not in seen:
            seen.add(at)
            yield at, link
            link = self.end(at)

    def end(self, at: int) -> int:
        """Where the link to the next directory stands."""
        return at + self.counter + self.entry * self._number(self._read(at, self.counter))

    def fields(self, at: int) -> Iterator[tuple[int, int, int, int, bytes]]:
        """(tag, type, count, where the values stand, the field's last word) of one directory."""
        count = self._number(self._read(at, self.counter))
        if count > 4096:
            raise ValueError("a directory of that many fields is none")
        table = self._read(at + self.counter, count * self.entry)
        for i in range(count):
            row = table[i * self.entry : (i + 1) * self.entry]
            tag, kind = self._number(row[:2]), self._number(row[2:4])
            values, word = self._number(row[4 : 4 + self.word]), row[4 + self.word :]
            size = values * _SIZES.get(kind, 1)
            inline = at + self.counter + i * self.entry + 4 + self.word
            yield tag, kind, values, inline if size <= self.word else self._number(word), word

    def directory(self, at: int, depth: int = 0) -> Directory:
        """The fields that have known types, sub-directories included."""
        found: Directory = {}
        for tag, kind, count, where, word in self.fields(at):
            if tag in _DIRECTORIES:
                if depth < 2:
                    try:
                        found[tag] = self.directory(self._number(word), depth + 1)
                    except (ValueError, struct.error):  # the rest is still good
                        logger.debug("sub-directory %d is broken", tag)
                continue
            size = count * _SIZES.get(kind, 0)
            if not 0 < size <= _LARGEST or not (depth or tag in _READ_TOO or _carried(tag)):
                continue
            data = self._read(where, size)
            if tag == _IPTC:  # often declared as LONG, but bytes in any case
                kind = _UNDEFINED
            elif self.order == ">" and _UNITS[kind] > 1:
                data = np.frombuffer(data, f">u{_UNITS[kind]}").astype(f"<u{_UNITS[kind]}").tobytes()
            found[tag] = Tag(kind, data)
        return found


def _carried(tag: int) -> bool:
    return tag in _DESCRIPTIVE or (tag >= 32768 and tag not in _STORAGE)


def _only_carried(directory: Directory) -> Directory:
    return {tag: value for tag, value in directory.items() if _carried(tag)}


def _pack(directory: Directory, at: int, big: bool = False, following: int = 0) -> bytes:
    """The bytes of a directory that will stand at `at` (even) with all its values behind it, little-endian."""
    counter, word, entry = ("<Q", "<Q", 20) if big else ("<H", "<I", 12)
    inline = struct.calcsize(word)
    head = struct.pack(counter, len(directory))
    free = at + len(head) + entry * len(directory) + inline
    rows, values = b"", b""
    for tag, value in sorted(directory.items()):
        if isinstance(value, _Stored):
            kind, count, last = value.kind, value.count, value.word
        elif isinstance(value, Tag):
            kind, count, last = value.kind, len(value.data) // _SIZES[value.kind], value.data.ljust(inline, b"\0")
            if len(value.data) > inline:
                last = struct.pack(word, free + len(values))
                values += value.data + b"\0" * (len(value.data) % 2)
        else:
            kind, count, last = _LONG, 1, struct.pack("<I", free + len(values)).ljust(inline, b"\0")
            values += _pack(value, free + len(values), big)
        rows += struct.pack("<HH", tag, kind) + struct.pack(word, count) + last
    return head + rows + struct.pack(word, following) + values


def read_pages(path: Path) -> list[Directory]:
    """What a TIFF file says of each page: description, EXIF, and the tags REDUCED and COMPRESSION.

    Empty where the structure is broken: what libvips can still read is worth more than an error.
    """
    try:
        with open(path, "rb") as file:
            reader = _Reader(file)
            return [reader.directory(at) for at, _ in reader.chain()]
    except (ValueError, struct.error) as error:
        logger.warning("%s: its tags are not readable and left out (%s)", path, error)
        return []


def append_tags(path: Path, pages: list[Directory], resolution: bool) -> None:
    """Adds tags to each page of a TIFF file that libvips wrote; without `resolution` takes its invented one away.

    New directories go to the end of the file, and the links that led to the old ones lead there.
    """
    with open(path, "r+b") as file:
        reader = _Reader(file)
        if reader.order == ">":
            raise OSError("TIFF tags are written on little-endian machines only")
        for (at, _), tags in zip(list(reader.chain()), pages, strict=True):
            stored: Directory = {tag: _Stored(kind, n, word) for tag, kind, n, _, word in reader.fields(at)}
            if not resolution:
                stored = {tag: value for tag, value in stored.items() if tag not in _RESOLUTION}
            following = reader._number(reader._read(reader.end(at), reader.word))
            place = file.seek(0, io.SEEK_END)
            file.write(b"\0" * (place % 2))
            place += place % 2
            packed = _pack({**tags, **stored}, place, reader.big, following)
            if not reader.big and place + len(packed) >= 1 << 32:
                raise OSError("the file is too large for its metadata")
            file.write(packed)
            file.seek(reader.link)
            file.write(struct.pack("<Q" if reader.big else "<I", place))
            reader.link = reader.end(place)  # the next page's


# --- turning metadata upright -----------------------------------------------------------------------------------------


def upright_exif(block: bytes, width: int, height: int, turned: bool) -> bytes | None:
    """An EXIF block for pixels that were turned upright and are width × height: orientation 1, sRGB, no thumbnail.

    Bytes are changed in place, so that maker notes, full of offsets, stay where they were. None for a broken block.
    """
    block = block.removeprefix(b"Exif\0\0")
    patched = bytearray(block)
    try:
        reader = _Reader(io.BytesIO(block))
        formats = {_SHORT: reader.order + "H", _LONG: reader.order + "I"}
        first = reader._number(block[reader.link : reader.link + reader.word])
        resolution = {}
        for tag, kind, _, where, word in reader.fields(first):
            if tag == _ORIENTATION:
                struct.pack_into(formats[kind], patched, where, 1)
            elif tag in (_X_RESOLUTION, _Y_RESOLUTION):
                resolution[tag] = where
            elif tag == _EXIF:
                new = {_COLOR_SPACE: 1, _PIXEL_WIDTH: width, _PIXEL_HEIGHT: height}
                for inner, inner_kind, _, inner_where, _ in reader.fields(reader._number(word)):
                    if inner in new:
                        limit = (1 << 8 * _SIZES[inner_kind]) - 1
                        struct.pack_into(formats[inner_kind], patched, inner_where, min(new[inner], limit))
        if turned and len(resolution) == 2:
            x, y = resolution[_X_RESOLUTION], resolution[_Y_RESOLUTION]
            patched[x : x + 8], patched[y : y + 8] = patched[y : y + 8], patched[x : x + 8]
        end = reader.end(first)
        patched[end : end + reader.word] = bytes(reader.word)  # the second directory is the thumbnail's
        return bytes(patched)
    except (ValueError, KeyError, struct.error):
        return None


def upright_xmp(packet: bytes) -> bytes:
    """The packet with tiff:Orientation, an element or an attribute, set to 1."""
    return re.sub(rb"(tiff:Orientation(?:\s*=\s*[\"']|>)\s*)[2-8]", rb"\g<1>1", packet)


def upright_tags(page: Directory, width: int, height: int) -> Directory:
    """The tags of a TIFF page to be carried, for pixels that were turned upright."""
    page = {
        tag: value for tag, value in page.items() if tag in _DIRECTORIES or _carried(tag) and tag not in _RESOLUTION
    }
    if isinstance(xmp := page.get(_XMP), Tag):
        page[_XMP] = Tag(xmp.kind, upright_xmp(xmp.data))
    if isinstance(photoshop := page.get(_PHOTOSHOP), Tag):
        page[_PHOTOSHOP] = Tag(photoshop.kind, fresh_photoshop(photoshop.data))
    if isinstance(exif := page.get(_EXIF), dict):
        new = {_COLOR_SPACE: 1, _PIXEL_WIDTH: width, _PIXEL_HEIGHT: height}
        page[_EXIF] = exif | {tag: Tag(_LONG, struct.pack("<I", n)) for tag, n in new.items() if tag in exif}
        if _COLOR_SPACE in exif:  # the one that must be SHORT
            page[_EXIF][_COLOR_SPACE] = Tag(_SHORT, struct.pack("<H", 1))
    return page


# --- from one container to the other ----------------------------------------------------------------------------------


def from_tiff(pages: list[Directory], resolution: tuple[float, float] | None) -> Metadata:
    """Metadata of a TIFF file, from the tags of its pages (of `upright_tags`) and its pixels per mm."""
    first = pages[0] if pages else {}
    simple = {tag: tag_value.data for tag, tag_value in first.items() if isinstance(tag_value, Tag)}
    photoshop = simple.get(_PHOTOSHOP)
    if photoshop is None and _IPTC in simple:
        photoshop = _resource(_IPTC_RESOURCE, simple[_IPTC])
    # private tags and long values are of TIFF alone: JPEG has room for 64 kB of EXIF
    exif = {
        tag: value
        for tag, value in first.items()
        if tag in _DIRECTORIES or (tag in _DESCRIPTIVE | {33432} and len(value.data) < 1 << 14 and tag != _XMP)
    }
    if resolution:
        exif |= _resolution_tags(*resolution)
    return Metadata(_block(exif) if exif else None, simple.get(_XMP), photoshop, pages)


def to_tiff(metadata: Metadata, count: int) -> list[Directory]:
    """Tags for each of `count` TIFF pages."""
    if metadata.pages:
        return metadata.pages
    first: Directory = {}
    if metadata.exif:
        try:
            reader = _Reader(io.BytesIO(metadata.exif))
            first = reader.directory(next(reader.chain())[0])
        except (ValueError, struct.error, StopIteration):
            logger.debug("EXIF is broken and left out")
    first = {
        tag: value for tag, value in first.items() if tag in _DIRECTORIES or _carried(tag) and tag not in _RESOLUTION
    }
    if metadata.xmp:
        first[_XMP] = Tag(1, metadata.xmp)
    if metadata.photoshop:
        first[_PHOTOSHOP] = Tag(_UNDEFINED, metadata.photoshop)
        for number, _, data in _resources(metadata.photoshop):
            if number == _IPTC_RESOURCE and data:
                first[_IPTC] = Tag(_UNDEFINED, data)
    return [first] + [{} for _ in range(count - 1)]


def resolution_block(x: float, y: float) -> bytes:
    """An EXIF block that says pixels per mm and nothing else, for WebP, which has no other place for it."""
    return _block(_resolution_tags(x, y))


def _resolution_tags(x: float, y: float) -> Directory:
    x_inch, y_inch = (Tag(5, struct.pack("<II", min(round(n * 25400), 0xFFFFFFFF), 1000)) for n in (x, y))
    return {_X_RESOLUTION: x_inch, _Y_RESOLUTION: y_inch, _UNIT: Tag(_SHORT, struct.pack("<H", 2))}


def exif_resolution(block: bytes) -> tuple[float, float] | None:
    """(x, y) pixels per mm that an EXIF block says, or None."""
    try:
        reader = _Reader(io.BytesIO(block))
        found = reader.directory(next(reader.chain())[0])
        x, y = (a / b for a, b in (struct.unpack("<II", found[tag].data) for tag in (_X_RESOLUTION, _Y_RESOLUTION)))
        unit = found[_UNIT].first() if _UNIT in found else 2
    except (ValueError, KeyError, struct.error, StopIteration, ZeroDivisionError):
        return None
    scale = {2: 25.4, 3: 10.0}.get(unit)
    return (x / scale, y / scale) if scale and x and y else None


def _block(directory: Directory) -> bytes:
    return b"II*\0\x08\0\0\0" + _pack(directory, 8)


def _resource(number: int, data: bytes) -> bytes:
    return b"8BIM" + struct.pack(">HHI", number, 0, len(data)) + data + b"\0" * (len(data) % 2)


def _resources(block: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, whole bytes, data) of each Photoshop resource, up to the first that is broken."""
    at = 0
    while block[at : at + 4] in (b"8BIM", b"MeSa", b"PHUT", b"AgHg", b"DCSR") and at + 12 <= len(block):
        size_at = at + 6 + (block[at + 6] + 2) // 2 * 2  # a Pascal string, padded, is its name
        if size_at + 4 > len(block):
            return
        size = int.from_bytes(block[size_at : size_at + 4], "big")
        end = size_at + 4 + size
        if end > len(block):
            return
        yield int.from_bytes(block[at + 4 : at + 6], "big"), block[at : end + size % 2], block[size_at + 4 : end]
        at = end + size % 2


def fresh_photoshop(block: bytes) -> bytes:
    """Photoshop resources without those that describe the old pixels."""
    block = block.removeprefix(_PHOTOSHOP_HEAD)
    return b"".join(whole for number, whole, _ in _resources(block) if number not in _STALE_RESOURCES)


def into_jpeg(
    data: bytes, exif: bytes | None, photoshop: bytes | None, dots: tuple[int, int, int] | None, name: str
) -> bytes:
    """A JPEG file with EXIF, Photoshop resources and JFIF density (unit, x, y) put in front of all else.

    A segment holds 64 kB; what is longer is left out with a warning.
    """
    segments = b""
    if dots:
        segments += _segment(0xE0, b"JFIF\0\x01\x02" + struct.pack(">BHHBB", *dots, 0, 0))
    for marker, head, body, what in (
        (0xE1, b"Exif\0\0", exif, "EXIF"),
        (0xED, _PHOTOSHOP_HEAD, photoshop, "IPTC"),
    ):
        if body and len(head) + len(body) > _JPEG_SEGMENT:
            logger.warning("%s: %s of %d bytes does not fit into a JPEG file and is left out", name, what, len(body))
        elif body:
            segments += _segment(marker, head + body)
    return data[:2] + segments + data[2:]


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def into_png(data: bytes, exif: bytes | None, texts: bytes, resolution: bool) -> bytes:
    """A PNG file with more chunks after its header; without `resolution` libvips' invented pHYs chunk goes."""
    head = 8 + 25  # signature, IHDR
    chunk = b""
    if exif:
        chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    rest = data[head:]
    if not resolution and (at := rest.find(b"pHYs", 0, rest.find(b"IDAT"))) >= 0:
        rest = rest[: at - 4] + rest[at + 4 + 9 + 4 :]
    return data[:head] + chunk + texts + rest


def png_texts(path: Path) -> bytes:
    """The text chunks of a PNG file, byte by byte: libvips hands on those in UTF-8 only. XMP is not among them.

    Nor are the raw profiles that other programs keep there, with an orientation that is no longer true.
    """
    found = b""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            size = int.from_bytes(head[:4], "big") + 4  # with its checksum
            if head[4:] not in (b"tEXt", b"zTXt", b"iTXt") or size > _LARGEST:
                file.seek(size, io.SEEK_CUR)
                continue
            body = file.read(size)
            if not body.startswith((b"XML:com.adobe.xmp\0", b"Raw profile type")) and len(body) == size:
                found += head + body
    return found


def into_webp(data: bytes, exif: bytes | None) -> bytes:
    """A WebP file with an EXIF chunk at its end. It must have the extended header, as files with a profile do."""
    if not exif:
        return data
    if data[12:16] != b"VP8X":
        raise OSError("libvips wrote a WebP file without the header that metadata needs")
    flags = data[20] | 0x08
    chunk = b"EXIF" + struct.pack("<I", len(exif)) + exif + b"\0" * (len(exif) % 2)
    body = data[8:20] + bytes([flags]) + data[21:] + chunk
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_lossless(path: Path) -> bool:
    """Whether the (first) picture of a WebP file is stored without loss."""
    with open(path, "rb") as file:
        at = 12
        while True:
            file.seek(at)
            name, size = file.read(4), file.read(4)
            if len(size) < 4:
                return False
            if name in (b"VP8L", b"VP8 "):
                return name == b"VP8L"
            # a frame of an animation has 16 bytes of its own, then chunks
            at += 24 if name == b"ANMF" else 8 + (n := int.from_bytes(size, "little")) + n % 2
