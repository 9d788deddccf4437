"""Folders of photos as batches of uint8 RGB crops, the same ones whatever the number of workers."""

from __future__ import annotations

import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from fastcolor.imaging.find import find_images
from fastcolor.imaging.vips import SUFFIXES, ImageError, libvips, reason
from fastcolor.training.sources import (
    GREY,
    PACK,
    PackError,
    class_of,
    find_tars,
    fingerprint,
    is_packed,
    is_packed_grey,
    list_pack,
    list_tars,
    open_photo,
    read_pixels,
)


class DataError(ValueError):
    """A folder that nothing can be learned from. The message names it."""


@dataclass
class Problems:
    """Files that were left out, each with its reason, in the order they were found."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, why: str) -> bool:
        """Notes a file; False where it was known already."""
        if path in self.reasons:
            return False
        self.reasons[path] = why
        return True

    def counts(self) -> Counter:
        return Counter("greyscale" if why == GREY else "unreadable" for why in self.reasons.values())


def find_photos(data: str | Path) -> tuple[list[Path], list[Path]]:
    """Training and validation photos of a folder; without folders train/ and val/ inside, all are in the first list.

    The folder may hold images, nested or not, and tar files of images (WebDataset), or be a pack (`fastcolor pack`).

    Raises:
        DataError: no such folder, no images in it, or a pack or tar file that cannot be read.
    """
    data = Path(data)
    if not data.is_dir():
        raise DataError(f"{data}: {'is a file' if data.exists() else 'no such folder'}, expected a folder of images")
    try:
        if (data / PACK).exists():
            packed = list_pack(data)
            return packed.get("train", packed.get("all", [])), packed.get("val", [])
        apart = (data / "train").is_dir() and (data / "val").is_dir()
        folders = [data / "train", data / "val"] if apart else [data]
        found = [list_tars(find_tars(folder)) + find_images(folder) for folder in folders]
    except (PackError, ImageError) as error:
        raise DataError(str(error)) from error
    for folder, files in zip(folders, found, strict=True):
        if not files:
            raise DataError(f"{folder}: no images in it ({', '.join(sorted(SUFFIXES))})")
    return found[0], found[1] if apart else []


def split(files: Sequence[Path], val_share: float, seed: int) -> tuple[list[Path], list[Path]]:
    """A seeded split of at least two files into training and validation, one of each at least."""
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(max(1, round(len(files) * val_share)), len(files) - 1)
    return [files[i] for i in sorted(order[held_out:])], [files[i] for i in sorted(order[:held_out])]


def check_headers(
    files: Sequence[Path], problems: Problems, advance: Callable[[], None] = lambda: None, grey: bool = False
) -> list[Path]:
    """The files whose headers say that they are colour images (or images at all, with `grey`); the others go to
    `problems`.

    Headers only, so that a million files are a matter of minutes. What is wrong further in is found when it is read.
    """

    def look(path: Path) -> str | None:
        try:
            if is_packed(path):
                return GREY if not grey and is_packed_grey(path) else None
            image = open_photo(path)
            if grey:
                return None
            return GREY if image.interpretation in ("b-w", "grey16") and not image.get_typeof("palette") else None
        except ImageError as error:
            return str(error)
        finally:
            advance()

    good = []
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        for path, why in zip(files, pool.map(look, files), strict=True):
            if why is None:
                good.append(path)
            else:
                problems.add(str(path), why)
    return good


@dataclass
class Photos:
    """What a run learns from and is checked with. `labels` count in `classes`; both are empty without classes."""

    train: list[Path]
    val: list[Path]
    classes: tuple[str, ...] = ()
    train_labels: list[int] = field(default_factory=list)
    val_labels: list[int] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.train + self.val)


def gather_photos(
    data: str | Path, val_share: float, seed: int, classes: str, grey: bool, problems: Problems,
    stage: Callable[[str, int], None] = lambda *_: None, advance: Callable[[], None] = lambda: None,
) -> Photos:  # fmt: skip
    """Finds the photos of a folder, leaves out what is no use by its header, and splits them.

    Args:
        classes: "none"; "folders", which every photo has to lie in; or "auto": where train/ and val/ hold the same
            folders, two or more, and every photo lies in one of them.
        grey: photos without colour are of use.
        problems: gets what was left out.

    Raises:
        DataError: too few photos, or folders that are no classes.
    """
    train, val = find_photos(data)
    apart = bool(val)
    stage("reading headers", len(train) + len(val))
    train, val = (check_headers(files, problems, advance, grey) for files in (train, val))
    if not apart and len(train) > 1:
        train, val = split(train, val_share, seed)
    kind = "images" if grey else "colour images"
    if not train or not val:
        usable = f"{len(train)} to train on and {len(val)} to check with"
        first = "".join(f"; left out: {why}" for why in list(problems.reasons.values())[:1])
        raise DataError(f"{data}: too few usable {kind}, {usable}; one of each is needed{first}")
    if classes == "none":
        return Photos(train, val)
    roots = (Path(data) / "train", Path(data) / "val") if apart else (Path(data), Path(data))
    of_train, of_val = ([class_of(f, root) for f in files] for files, root in zip((train, val), roots, strict=True))
    names = sorted(set(of_train))
    if classes == "auto":
        if not apart or len(names) < 2 or "" in names or set(of_val) != set(names):
            return Photos(train, val)
    else:
        outside = next((f for f, c in zip(train + val, of_train + of_val, strict=True) if c == ""), None)
        if outside is not None:
            raise DataError(f"{outside}: lies in no folder of a class, expected CLASS/{outside.name.split('!')[-1]}")
        strange = sorted(set(of_val) - set(names))
        if strange and apart:
            raise DataError(f"{data}: classes in val/ that train/ has not: {', '.join(strange[:5])}")
        # held out by chance though there is no other of their class: these are better learned from
        train += [f for f, c in zip(val, of_val, strict=True) if c in strange]
        of_train += [c for c in of_val if c in strange]
        val = [f for f, c in zip(val, of_val, strict=True) if c not in strange]
        of_val = [c for c in of_val if c not in strange]
        names = sorted(set(of_train))
        if len(names) < 2:
            raise DataError(f"{data}: holds one class, {names[0]!r}; two are needed to tell apart")
        if not val:
            raise DataError(
                f"{data}: {len(names)} classes with {len(train)} {kind}: nothing is left to check with; "
                "give more of each class, or a larger --val-share"
            )
    number = {name: i for i, name in enumerate(names)}
    return Photos(train, val, tuple(names), [number[c] for c in of_train], [number[c] for c in of_val])


class Batch(NamedTuple):
    """Crops as the loader hands them over."""

    rgb: Tensor  # [B, size, size, 3] uint8
    failed: list[tuple[str, str]]  # files that could not be used on the way, each with its reason
    seeds: Tensor  # [B] int64, one for each (seed, epoch, index)
    labels: Tensor  # [B] int64, numbers of classes; zeros where there are none


class PhotoCrops(Dataset):
    """Square crops [size, size, 3] uint8, asked for as (epoch, index).

    Random crops (part of the short-side square, mirrored half of the time) are drawn from (seed, epoch, index) alone:
    neither workers nor an interruption change them. `epoch` None gives the middle square, whole.
    """

    def __init__(
        self, files: Sequence[Path], size: int, seed: int = 0, crop: float = 0.4,
        labels: Sequence[int] | None = None, grey: bool = False,
    ):  # fmt: skip
        self.files = [str(f) for f in files]
        self.size, self.seed, self.crop, self.grey = size, seed, crop, grey
        self.labels = np.zeros(len(self.files), np.int64) if labels is None else np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[np.ndarray, list[tuple[str, str]]]:
        """The crop, and the files that failed on the way: the next good file takes the place of a bad one."""
        epoch, first = key
        failed = []
        for offset in range(min(len(self.files), 1000)):
            index = (first + offset) % len(self.files)
            try:
                return self._load(epoch, index), failed
            except ImageError as error:
                failed.append((self.files[index], str(error)))
            except libvips().Error as error:
                failed.append((self.files[index], f"{self.files[index]}: broken ({reason(error)})"))
        raise DataError(f"{len(failed)} files in a row could not be used; the first: {failed[0][1]}")

    def __getitems__(self, keys: list[tuple[int | None, int]]) -> Batch:
        """A batch at once, which is what a loader asks for."""
        crops = [self[key] for key in keys]
        used = [(index + len(failed)) % len(self.files) for (_, index), (_, failed) in zip(keys, crops, strict=True)]
        draws = [np.random.SeedSequence((self.seed, 0 if e is None else e, i)).generate_state(2) for e, i in keys]
        return Batch(
            torch.from_numpy(np.stack([pixels for pixels, _ in crops])),
            [problem for _, failed in crops for problem in failed],
            torch.from_numpy(np.array(draws, np.int64) @ np.array([1 << 31, 1])),
            torch.from_numpy(self.labels[used]),
        )

    def _load(self, epoch: int | None, index: int) -> np.ndarray:
        size = self.size
        if epoch is None:
            share, x, y, mirror = 1.0, 0.5, 0.5, False
        else:
            # as numpy draws it from a sequence: nearby keys give unrelated streams
            random = np.random.default_rng((self.seed, epoch, index))
            share, x, y, mirror = random.uniform(self.crop, 1), random.random(), random.random(), random.random() < 0.5
        pixels = read_pixels(self.files[index], size / math.sqrt(share), self.grey)
        height, width = pixels.shape[:2]
        side = max(1, round(min(height, width) * math.sqrt(share)))
        left, top = round(x * (width - side)), round(y * (height - side))
        pixels = resized(pixels[top : top + side, left : left + side], size)
        return np.ascontiguousarray(pixels[:, ::-1] if mirror else pixels)


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """[H, W, 3] uint8 to [size, size, 3], bicubic, its filter widened where the picture shrinks."""
    # PyTorch has vector code for bytes in this order, several times faster than libvips for a crop
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    planes = F.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return planes[0].permute(1, 2, 0).contiguous().numpy()


class EpochSampler(Sampler):
    """(epoch, index) pairs of one epoch, in an order drawn from (seed, epoch), from `start` on."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch, self.start = count, seed, 0, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        return ((self.epoch, int(i)) for i in order[self.start :])

    def __len__(self) -> int:
        return self.count - self.start


class EpochBatches(Sampler):
    """The (epoch, index) pairs of one process, a list for each piece of each step of an epoch, from step `start` on.

    A step is `batch_size` images in the order of `EpochSampler`, whatever the number of processes and pieces: each
    process takes every world-th of them, and goes through these in up to `pieces` parts.
    """

    def __init__(self, count: int, seed: int, batch_size: int, rank: int = 0, world: int = 1, pieces: int = 1):
        self.order, self.batch_size = EpochSampler(count, seed), batch_size
        self.rank, self.world, self.pieces = rank, world, pieces
        self.epoch, self.start = 0, 0

    @property
    def steps(self) -> int:
        return -(-self.order.count // self.batch_size)

    def images(self, step: int) -> int:
        """Of one step, in all processes: the last one of an epoch may have fewer."""
        return min(self.batch_size, self.order.count - step * self.batch_size)

    def counts(self, step: int) -> list[float]:
        """How many images each piece of one step stands for, in this process. Every process has as many pieces."""
        return [len(part) * weight for part, weight in self._parts(range(self.images(step)))]

    def _parts(self, whole: Sequence) -> list[tuple[Sequence, float]]:
        """Pieces of one step for this process, and what one of their images counts."""
        if len(whole) < self.world:  # nobody goes without: all take all of them
            return [(whole, 1 / self.world)]
        own = whole[self.rank :: self.world]
        pieces = min(self.pieces, len(whole) // self.world)
        ends = [len(own) * k // pieces for k in range(pieces + 1)]
        return [(own[a:b], 1) for a, b in pairwise(ends)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self.order.epoch, self.order.start = self.epoch, 0
        keys = list(self.order)
        for step in range(self.start, self.steps):
            for part, _ in self._parts(keys[step * self.batch_size : (step + 1) * self.batch_size]):
                yield part

    def __len__(self) -> int:
        return sum(len(self.counts(step)) for step in range(self.start, self.steps))


class InOrder(Sampler):
    """(None, index) for every file of one process, in order: the middle crops."""

    def __init__(self, count: int, rank: int = 0, world: int = 1):
        self.indices = range(rank, count, world)

    def __iter__(self) -> Iterator[tuple[None, int]]:
        return ((None, i) for i in self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def _same(batch: Batch) -> Batch:
    return batch  # made by PhotoCrops.__getitems__ already


def _start_worker(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the main process handles them, and ends its workers
    os.environ["VIPS_CONCURRENCY"] = "1"  # one decoding thread a worker
    libvips().cache_set_max(0)


def make_loader(crops: PhotoCrops, sampler: Sampler, batch_size: int | None, workers: int, pin: bool) -> DataLoader:
    """A loader of `Batch`es; `batch_size` None where the sampler gives lists of keys.

    Workers are started fresh, not forked: libvips keeps threads that a fork would lose.
    """
    batches = {"batch_sampler": sampler} if batch_size is None else {"sampler": sampler, "batch_size": batch_size}
    return DataLoader(
        crops,
        **batches,
        num_workers=workers,
        collate_fn=_same,
        pin_memory=pin,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers > 0 else None,
        worker_init_fn=_start_worker,
        multiprocessing_context="spawn" if workers > 0 else None,
    )
