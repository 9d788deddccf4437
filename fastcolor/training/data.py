"""Folders of photos as batches of uint8 RGB crops, the same ones whatever the number of workers."""

from __future__ import annotations

import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastcolor.imaging.find import find_images
from fastcolor.imaging.vips import SUFFIXES, ImageError, libvips, reason
from fastcolor.training.sources import (
    GREY,
    PACK,
    PackError,
    find_tars,
    is_packed,
    list_pack,
    list_tars,
    open_photo,
    read_photo,
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


def check_headers(files: Sequence[Path], problems: Problems, advance: Callable[[], None] = lambda: None) -> list[Path]:
    """The files whose headers say that they are colour images; the others go to `problems`.

    Headers only, so that a million files are a matter of minutes. What is wrong further in is found when it is read.
    """

    def look(path: Path) -> str | None:
        try:
            if is_packed(path):
                return None
            image = open_photo(path)
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


class PhotoCrops(Dataset):
    """Square crops [size, size, 3] uint8, asked for as (epoch, index).

    Random crops (part of the short-side square, mirrored half of the time) are drawn from (seed, epoch, index) alone:
    neither workers nor an interruption change them. `epoch` None gives the middle square, whole.
    """

    def __init__(self, files: Sequence[Path], size: int, seed: int = 0, crop: float = 0.4):
        self.files = [str(f) for f in files]
        self.size, self.seed, self.crop = size, seed, crop

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

    def _load(self, epoch: int | None, index: int) -> np.ndarray:
        size = self.size
        if epoch is None:
            share, x, y, mirror = 1.0, 0.5, 0.5, False
        else:
            # as numpy draws it from a sequence: nearby keys give unrelated streams
            random = np.random.default_rng((self.seed, epoch, index))
            share, x, y, mirror = random.uniform(self.crop, 1), random.random(), random.random(), random.random() < 0.5
        image = read_photo(self.files[index], size / math.sqrt(share))
        side = max(1, round(min(image.width, image.height) * math.sqrt(share)))
        left, top = round(x * (image.width - side)), round(y * (image.height - side))
        image = image.crop(left, top, side, side).resize(size / side, vscale=size / side)
        pixels = image.numpy()
        if pixels.shape != (size, size, 3):  # rounding inside the resize
            pixels = image.embed(0, 0, size, size, extend="copy").numpy()
        return np.ascontiguousarray(pixels[:, ::-1] if mirror else pixels)


class EpochSampler(Sampler):
    """(epoch, index) pairs of one epoch, in an order drawn from (seed, epoch), from `start` on."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch, self.start = count, seed, 0, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        return ((self.epoch, int(i)) for i in order[self.start :])

    def __len__(self) -> int:
        return self.count - self.start


class InOrder(Sampler):
    """(None, index) for every file, in order: the middle crops."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Iterator[tuple[None, int]]:
        return ((None, i) for i in range(self.count))

    def __len__(self) -> int:
        return self.count


def collate(items: list[tuple[np.ndarray, list[tuple[str, str]]]]) -> tuple[Tensor, list[tuple[str, str]]]:
    """Crops to one batch [B, size, size, 3] uint8, and the files that failed."""
    return torch.from_numpy(np.stack([crop for crop, _ in items])), [f for _, failed in items for f in failed]


def _start_worker(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the main process handles them, and ends its workers
    os.environ["VIPS_CONCURRENCY"] = "1"  # one decoding thread a worker
    libvips().cache_set_max(0)


def make_loader(crops: PhotoCrops, sampler: Sampler, batch_size: int, workers: int, pin: bool) -> DataLoader:
    """Batches of `collate`. Workers are started fresh, not forked: libvips keeps threads that a fork would lose."""
    return DataLoader(
        crops,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers > 0 else None,
        worker_init_fn=_start_worker,
        multiprocessing_context="spawn" if workers > 0 else None,
    )
