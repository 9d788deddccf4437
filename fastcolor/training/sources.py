"""Where photos lie: files of their own, members of tar files (WebDataset), or raw pixels in a pack.

A photo inside another file has a path that says all that is needed to read it, so that lists of photos are lists of
paths whatever they are, and workers need no index:

    shards/00000.tar!1536:48213!a/0001.jpg        bytes 1536 to 1536 + 48213 of the tar file
    packed/train/00000.bin!0:288:384!a/0001.jpg   288 × 384 pixels of RGB from byte 0 on; 0:288:384:1 if grey
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastcolor._files import FolderInUse, FolderLock, atomic_path
from fastcolor.imaging.vips import SUFFIXES, ImageError, libvips, open_bytes, open_file, reason, to_srgb

if TYPE_CHECKING:
    import pyvips

PACK = "pack.json"
VERSION = 2  # 1: without the pictures that have no colour
_INSIDE = re.compile(r"(?P<file>.*?\.(?:tar|bin))!(?P<place>[0-9:]+)!(?P<name>.*)", re.DOTALL)
_BATCH = 64  # photos that are decoded together
_INDEXED = 100  # images that make it worth keeping the list of a tar file
_INDEX_VERSION = 1
_BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # what NumPy finds in a broken .npz
_SPLITS = ("train", "val", "all")
GREY = "greyscale: no colour to learn from"
_GREY_LEVELS = 3  # largest difference between channels, of 255, in a picture that counts as grey


class PackError(ValueError):
    """A pack that cannot be made or read. The message names it."""


def open_photo(path: str | Path, *, shrink: int = 1) -> pyvips.Image:
    """A photo wherever it lies, opened lazily. `shrink` as of `open_file`.

    Raises:
        ImageError: missing, empty, or not an image.
    """
    inside = _INSIDE.fullmatch(str(path))
    if inside is None:
        return open_file(path, shrink=shrink)
    if inside["file"].endswith(".bin"):
        pixels = _packed_pixels(inside)
        image = libvips().Image.new_from_memory(pixels.reshape(-1).data, pixels.shape[1], pixels.shape[0], 3, "uchar")
        return image.copy(interpretation="srgb")
    name = f"{inside['file']}!{inside['name']}"
    start, size = (int(n) for n in inside["place"].split(":"))
    try:
        file = _opened(inside["file"])  # by this name it stays open while it is read
        return open_bytes(os.pread(file.handle, size, start), name, shrink=shrink)
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or error}") from error


def _packed_pixels(inside: re.Match) -> np.ndarray:
    """[H, W, 3] uint8 in a shard that is mapped into memory, of a path that `_INSIDE` matched."""
    file, name = inside["file"], f"{inside['file']}!{inside['name']}"
    start, height, width = (int(n) for n in inside["place"].split(":")[:3])
    try:
        pixels = _mapped(file)[start : start + 3 * height * width]
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or error}") from error
    if len(pixels) < 3 * height * width:
        raise ImageError(f"{name}: the file ends before these pixels do")
    return pixels.reshape(height, width, 3)


def read_pixels(path: str | Path, wanted: float, grey: bool = False) -> np.ndarray:
    """A colour photo upright in 8-bit sRGB, [H, W, 3] uint8, not to be written to: of a pack it is the file itself.
    Decoded at a fraction of its size where the format allows it and a short side of `wanted` pixels is left.

    Args:
        grey: photos without colour are taken too.

    Raises:
        ImageError: missing, empty, not an image, or without colour. pyvips.Error: pixels that are broken.
    """
    inside = _INSIDE.fullmatch(str(path))
    if inside is not None and inside["file"].endswith(".bin"):
        if not grey and _marked_grey(inside):
            raise ImageError(GREY)
        return _packed_pixels(inside)  # checked when it was written
    image = open_photo(path)
    shrink = next((s for s in (8, 4, 2) if min(image.width, image.height) / s >= wanted), 1)
    if shrink > 1:
        image = open_photo(path, shrink=shrink)
    image, _ = to_srgb(image)
    if image.format == "ushort":
        image = image.colourspace("srgb")
    pixels = image.numpy()
    if not grey and (image.bands == 1 or is_grey(pixels)):
        raise ImageError(GREY)
    return np.repeat(pixels.reshape(image.height, image.width, 1), 3, 2) if image.bands == 1 else pixels


def shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    """[H, W, 3] uint8 with a short side of `side` at most."""
    height, width = pixels.shape[:2]
    if min(height, width) <= side:
        return pixels
    image = libvips().Image.new_from_array(pixels, interpretation="srgb")
    return image.resize(side / min(height, width)).numpy()


def class_of(path: Path, root: Path) -> str:
    """The class of a photo: its folder below `root`, or inside its tar file or pack, as "airfield" or "a/airfield"; ""
    for one that lies in none."""
    inside = _INSIDE.fullmatch(str(path))
    if inside is None:
        folder = path.relative_to(root).parent
    else:
        folder = Path(inside["name"].rpartition("!")[2]).parent
        # a pack of train/ and val/ keeps these two in the names
        if folder.parts[:1] == (Path(inside["file"]).parent.name,) and folder.parts[0] in _SPLITS:
            folder = Path(*folder.parts[1:])
    return "" if folder == Path() else folder.as_posix()


def fingerprint(files: Sequence[Path]) -> str:
    """A short name for a list of files, by their names and order."""
    return hashlib.sha256("\n".join(f"{f.parent.name}/{f.name}" for f in files).encode()).hexdigest()[:16]


def is_packed(path: str | Path) -> bool:
    """Whether these are pixels of a pack, which hold what was checked when they were written."""
    inside = _INSIDE.fullmatch(str(path))
    return inside is not None and inside["file"].endswith(".bin")


def is_packed_grey(path: str | Path) -> bool:
    """Whether these are pixels of a pack that had no colour when they were written."""
    inside = _INSIDE.fullmatch(str(path))
    return inside is not None and inside["file"].endswith(".bin") and _marked_grey(inside)


def _marked_grey(inside: re.Match) -> bool:
    return inside["place"].count(":") == 3


class _Opened:
    """A file that is closed when nobody knows of it any more."""

    def __init__(self, file: str):
        self.handle = os.open(file, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "handle"):
            os.close(self.handle)


# Each takes one of the 1024 handles that a process has as a rule; what falls out is opened again.
@lru_cache(maxsize=256)
def _opened(file: str) -> _Opened:
    return _Opened(file)


@lru_cache(maxsize=512)
def _mapped(file: str) -> np.ndarray:
    return np.memmap(file, np.uint8, "r")


def is_grey(pixels: np.ndarray) -> bool:
    """Whether the channels [H, W, 3] differ by no more than rounding does."""

    def grey(part: np.ndarray) -> bool:
        rest = part[..., 1:].astype(np.int16)
        return bool((np.abs(rest - part[..., :1]) <= _GREY_LEVELS).all())

    return grey(pixels[::16, ::16]) and grey(pixels)  # colour shows in a few pixels


# --- tar files --------------------------------------------------------------------------------------------------------


def find_tars(folder: Path) -> list[Path]:
    """Tar files right in a folder, in order."""
    return sorted(p for p in folder.glob("*.tar") if not p.name.startswith(".")) if folder.is_dir() else []


def list_tars(tars: Sequence[Path]) -> list[Path]:
    """The images of uncompressed tar files, by headers alone: their pixels are read when they are needed.

    A class that stands beside an image (0001.cls beside 0001.jpg, as WebDataset writes it) becomes its folder. What a
    tar file holds is kept in the user's cache folder, and read again when the file is another one.

    Raises:
        ImageError: not a tar file, or a compressed one, in which nothing can be found without reading all before it.
    """

    def members(tar: Path) -> list[Path]:
        try:
            identity = _identity(tar)
            index = _index_file(tar)
            found = _kept_members(index, identity)
            if found is None:
                found = _read_members(tar)
                # one that is still being written is another file in a moment
                if len(found) >= _INDEXED and identity == _identity(tar):
                    _keep_members(index, identity, found)
        except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
            raise ImageError(f"{tar}: not a readable, uncompressed tar file ({error})") from error
        return [Path(f"{tar}!{start}:{size}!{name}") for start, size, name in found]

    with ThreadPoolExecutor(8) as pool:
        return [photo for found in pool.map(members, tars) for photo in found]


_Members = list[tuple[int, int, str]]  # where each image starts, its bytes, its name


def _read_members(tar: Path) -> _Members:
    with tarfile.open(tar, "r:") as file:
        found, classes = [], {}
        for m in file:
            stem, suffix = os.path.splitext(m.name)
            if not m.isfile() or os.path.basename(m.name).startswith("."):
                continue
            if suffix == ".cls":
                classes[stem] = file.extractfile(m).read(64).decode().strip()
            elif suffix.lower() in SUFFIXES:
                found.append((stem, m))
    named = [(f"{classes[s]}/{os.path.basename(m.name)}" if s in classes else m.name, m) for s, m in found]
    return [(m.offset_data, m.size, name) for name, m in named]


def _identity(tar: Path) -> list[int]:
    """What changes with a file: its bytes, and when it and its name were written."""
    found = os.stat(tar)
    return [_INDEX_VERSION, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _index_file(tar: Path) -> Path | None:
    """Where the members of a tar file are kept; None without a folder for it."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # nobody's home
        return None
    name = hashlib.sha256(os.fsencode(os.path.realpath(tar))).hexdigest()[:32]
    return Path(cache, "fastcolor", "tars", f"{name}.npz")


def _kept_members(index: Path | None, identity: list[int]) -> _Members | None:
    """What was kept of the very same file; None where nothing was, or it cannot be read."""
    if index is None:
        return None
    try:
        with np.load(index) as kept:
            if kept["identity"].tolist() != identity:
                return None
            names = kept["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
            return list(zip(kept["starts"].tolist(), kept["sizes"].tolist(), names, strict=True))
    except _BROKEN:
        return None


def _keep_members(index: Path | None, identity: list[int], found: _Members) -> None:
    """For the next start. Nothing is said where it cannot be written: the tar file is listed again then."""
    if index is None:
        return
    starts, sizes, names = zip(*found, strict=True)
    with suppress(OSError), atomic_path(index) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            identity=np.array(identity, np.int64),
            starts=np.array(starts, np.int64),
            sizes=np.array(sizes, np.int64),
            names=np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8),  # no name has a zero
        )


# --- packs ------------------------------------------------------------------------------------------------------------


@dataclass
class Packed:
    """What `pack` did: photos written, those of them without colour, those left out, each with its reason, and whether
    it came to the end."""

    photos: int
    grey: int
    left_out: dict[str, str]
    finished: bool


def pack(
    splits: dict[str, Sequence[Path]],
    root: Path,
    out: Path,
    size: int = 288,
    shard_bytes: int = 1 << 30,
    jobs: int = 0,
    advance: Callable[[], None] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Packed:
    """Writes photos as raw sRGB pixels that training maps into memory: no epoch decodes a file any more.

    A shard is OUT/SPLIT/00000.bin, the pixels of one photo after another, and 00000.npz, which says where each lies;
    a pack that was stopped goes on after its last shard, and one that was killed after its last whole one. Pictures
    without colour are written and marked: backbones learn from them, colours do not. A pack that an older fastcolor
    began goes on as it was begun, without them.

    Args:
        splits: photos of "train" and "val", or of "all".
        root: the folder that names are relative to.
        out: folder of the pack; made where it is missing.
        size: short side that larger photos are shrunk to; smaller ones stay. 9/8 of the crops that are trained on or
            more leaves random crops something to choose from.
        shard_bytes: of a shard, about.
        jobs: threads that decode; 0 for all processors.
        advance: called for each photo. stopped: asked between photos.

    Raises:
        PackError: `out` holds another pack. OSError: it cannot be written.
    """
    if not 16 <= size <= 4096:
        raise PackError(f"size must be between 16 and 4096 pixels, got {size}")
    if shard_bytes < 1:
        raise PackError(f"shard_bytes must be positive, got {shard_bytes}")
    out.mkdir(parents=True, exist_ok=True)
    with FolderLock(out, "pack.lock") as lock:
        try:
            lock.hold()
        except FolderInUse as error:
            raise PackError(f"{error}; wait for it, or choose another folder") from None
        return _pack(splits, root, out, size, shard_bytes, jobs, advance, stopped)


def _pack(splits, root, out, size, shard_bytes, jobs, advance, stopped) -> Packed:
    before = _head(out) if (out / PACK).exists() else None
    head = {
        "version": VERSION if before is None else before["version"],
        "size": size,
        "photos": {split: len(files) for split, files in splits.items()},
        "files": {split: fingerprint(files) for split, files in splits.items()},
        "finished": False,
    }
    if before is not None and {**before, "finished": False} != head:
        raise PackError(
            f"{out}: holds a pack of other photos or of another size ({before.get('photos')} at {before.get('size')}, "
            f"now {head['photos']} at {size}); remove it, or choose another folder"
        )
    if before is None:
        _write_head(out, head)
    done, with_grey = Packed(0, 0, {}, True), head["version"] > 1
    for split, files in splits.items():
        last = 0
        for shard in _shards(files, root, out / split, size, shard_bytes, jobs, advance, stopped, with_grey):
            done.photos += len(shard["names"])
            done.grey += int(shard["grey"].sum()) if "grey" in shard else 0
            done.left_out |= dict(zip(shard["bad"].tolist(), shard["why"].tolist(), strict=True))
            last = int(shard["consumed"])
        done.finished = last == len(files)
        if not done.finished:
            return done
    _write_head(out, {**head, "finished": True})
    return done


def _shards(
    files, root, folder, size, shard_bytes, jobs, advance, stopped, with_grey
) -> Iterator[dict[str, np.ndarray]]:
    """The index of each shard: those that are there already, then those that are written now."""
    number = consumed = 0
    while (folder / f"{number:05d}.npz").exists():
        shard = _read_shard(folder, number)
        for _ in range(int(shard["consumed"]) - consumed):
            advance()
        number, consumed = number + 1, int(shard["consumed"])
        yield shard
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        while consumed < len(files) and not stopped():
            places, names, grey, bad, at = [], [], [], {}, 0
            with atomic_path(folder / f"{number:05d}.bin") as temporary, open(temporary, "wb") as data:
                while consumed < len(files) and at < shard_bytes and not stopped():
                    several = files[consumed : consumed + _BATCH]
                    found = pool.map(lambda p: _pixels(p, size, with_grey), several)
                    for path, (pixels, note) in zip(several, found, strict=True):
                        name = str(path.relative_to(root))
                        if pixels is None:
                            bad[name] = note
                        else:
                            data.write(pixels)
                            places.append((at, *pixels.shape[:2]))
                            names.append(name)
                            grey.append(note == GREY)
                            at += pixels.nbytes
                        advance()
                    consumed += len(several)
            shard = {
                "places": np.array(places, np.int64).reshape(-1, 3),
                "names": np.array(names, str),
                "grey": np.array(grey, bool),
                "bad": np.array(list(bad), str),
                "why": np.array(list(bad.values()), str),
                "consumed": np.int64(consumed),
            }
            with atomic_path(folder / f"{number:05d}.npz") as temporary, open(temporary, "wb") as data:
                np.savez(data, **shard)
            number += 1
            yield shard


def _pixels(path: Path, size: int, grey: bool) -> tuple[np.ndarray | None, str]:
    """[H, W, 3] uint8 with a short side of `size` at most, and `GREY` for those without colour; or None and why."""
    try:
        pixels = read_pixels(path, size, grey)
        return shrunk(pixels, size), GREY if grey and is_grey(pixels) else ""
    except ImageError as error:
        return None, str(error)
    except libvips().Error as error:
        return None, f"{path}: broken ({reason(error)})"


def _read_shard(folder: Path, number: int) -> dict[str, np.ndarray]:
    """The index of a shard that is whole. Raises PackError."""
    again = f"remove {folder.parent}, and pack again"
    data, index = (folder / f"{number:05d}.{suffix}" for suffix in ("bin", "npz"))
    for path in (data, index):
        if not path.exists():
            raise PackError(f"{path}: missing from the pack; {again}")
    try:
        with np.load(index) as found:
            shard = dict(found)
        ends = [start + 3 * height * width for start, height, width in shard["places"][-1:].tolist()]
    except _BROKEN as error:
        raise PackError(f"{index}: broken ({error}); {again}") from error
    if data.stat().st_size < max(ends, default=0):
        raise PackError(f"{data}: has {data.stat().st_size} bytes, expected {ends[0]}; {again}")
    return shard


def _write_head(out: Path, head: dict) -> None:
    with atomic_path(out / PACK) as temporary:
        temporary.write_text(json.dumps(head, indent=2) + "\n")


def _head(folder: Path) -> dict:
    try:
        head = json.loads((folder / PACK).read_text())
        version = head["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackError(f"{folder / PACK}: not the head of a pack ({error})") from error
    if version not in range(1, VERSION + 1):
        raise PackError(f"{folder}: a pack of version {version}, expected {VERSION} at most: pack the photos again")
    return head


def list_pack(folder: Path) -> dict[str, list[Path]]:
    """The photos of a pack, by split.

    Raises:
        PackError: not a pack, of another version, not finished, or with a shard missing or broken.
    """
    head = _head(folder)
    if not head["finished"]:
        raise PackError(
            f"{folder}: this pack is not finished; run fastcolor pack again, which goes on where it stopped"
        )
    listed = {}
    for split in (s for s in _SPLITS if s in head["photos"]):
        photos, consumed, number = [], 0, 0
        while consumed < head["photos"][split]:
            data, shard = folder / split / f"{number:05d}.bin", _read_shard(folder / split, number)
            grey = shard["grey"] if "grey" in shard else np.zeros(len(shard["names"]), bool)
            photos += [
                Path(f"{data}!{start}:{height}:{width}{':1' if without else ''}!{name}")
                for (start, height, width), name, without in zip(shard["places"], shard["names"], grey, strict=True)
            ]
            consumed, number = int(shard["consumed"]), number + 1
        listed[split] = photos
    return listed
