"""Training from photos on disk: images a second, ours beside the reference pipeline, and where the time goes.

`python -m benchmarks.training [--data FOLDER] [--size 128x128] [--batch 16] [--device cpu|cuda] [--json FILE]
[--quick]`

The reference pipeline is what ports of Zhang et al. 2016 do, written anew and without mistakes: Pillow decodes and
crops, scikit-image makes Lab in the loader's workers, soft targets are a tensor of N·K, the network (the same one) and
its cross-entropy run in eager float32, Adam in PyTorch's default form. Ours is the training loop of `fastcolor train`
with its defaults, averaged weights included, from the same JPEG files and from a pack of them (`fastcolor pack`).

A sample is a whole epoch of some steps, from the first photo read to the last step; pipelines take turns, and none has
a worker at work while another is timed. All have the same threads, and as many workers.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fastcolor.bins import ColorBins, soft_encode
from fastcolor.model.network import ColorNetwork, pool_to
from fastcolor.ops.head_cross_entropy import head_cross_entropy
from fastcolor.training.color import split_lab
from fastcolor.training.config import TrainConfig, autocast
from fastcolor.training.report import Silent, Stop
from fastcolor.training.run import Run
from fastcolor.training.sources import pack

from . import timing
from .timing import Candidate

BINS = ColorBins()
BATCH = {"cpu": {128: 16, 256: 8}, "cuda": {128: 128, 256: 64}}  # images a step, by the side of the crops
STEPS = 8  # of a sample
PHOTO = (500, 375)  # of the photos that are made up where no folder is given
CROP = 0.4  # smallest share of the short-side square, as in TrainConfig
LOSS_BOUND = 1e-4  # relative difference of the two losses for the same crops and weights
STAGES = ("waiting for crops", "Lab, targets, loss", "forward", "backward", "optimizer")


# --- photos -----------------------------------------------------------------------------------------------------------


def made_up_photo(seed: int) -> np.ndarray:
    """[H, W, 3] uint8: plains of colour with borders, and grain at several scales, that a JPEG has some work with."""
    random = np.random.default_rng(seed)
    width, height = PHOTO
    y, x = np.mgrid[:height, :width]
    picture = np.zeros((height, width, 3))
    for _ in range(5):
        a, b, c = random.uniform(-1, 1, 3)
        inside = a * x / width + b * y / height + c * 0.5 + 0.1 * np.sin(x / random.uniform(10, 60)) > 0
        picture[inside] = random.uniform(0, 255, 3)
    for scale, strength in ((1, 8), (4, 12), (16, 16)):
        grain = random.normal(0, strength, (height // scale + 1, width // scale + 1, 1))
        picture += np.kron(grain, np.ones((scale, scale, 1)))[:height, :width]
    return picture.clip(0, 255).astype(np.uint8)


def lay_out(folder: Path, photos: int, data: Path | None) -> None:
    """folder/train and folder/val, the latter with one photo: made up, or links to those of `data`."""
    from fastcolor.imaging.find import find_images
    from fastcolor.imaging.vips import libvips

    for part, numbers in (("train", range(photos)), ("val", range(photos, photos + 1))):
        (folder / part).mkdir(parents=True)
        found = find_images(data) if data else []
        if data and not found:
            raise SystemExit(f"{data}: no images in it")
        for i in numbers:
            if found:
                source = found[i % len(found)].resolve()
                (folder / part / f"{i:05d}{source.suffix}").symlink_to(source)
            else:
                image = libvips().Image.new_from_array(made_up_photo(i), interpretation="srgb")
                image.jpegsave(str(folder / part / f"{i:05d}.jpg"), Q=90)


# --- the reference pipeline -------------------------------------------------------------------------------------------


class ReferenceCrops(Dataset):
    """Random crops as L [1, H, W] and ab [2, H, W] float32: Pillow, then scikit-image in float64."""

    def __init__(self, files: list[str], size: int):
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image
        from skimage.color import rgb2lab

        image = Image.open(self.files[index]).convert("RGB")
        random = np.random.default_rng()
        side = min(image.size) * math.sqrt(random.uniform(CROP, 1))
        left, top = random.random() * (image.width - side), random.random() * (image.height - side)
        box = (left, top, left + side, top + side)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        lab = torch.from_numpy(rgb2lab(np.asarray(image))).float().permute(2, 0, 1)
        return lab[:1], lab[1:]


def dense_targets(ab: Tensor) -> Tensor:
    """Soft-encoding as a tensor [B, K, h, w]."""
    index, p = soft_encode(BINS, ab.movedim(1, -1))
    target = ab.new_zeros(ab.shape[0], *ab.shape[2:], BINS.count)
    return target.scatter_(-1, index[0], p[0].to(ab)).movedim(-1, 1)


class Reference:
    """The reference pipeline: `epoch` trains on every photo once."""

    def __init__(self, folder: Path, size: int, batch: int, workers: int, device: str):
        files = sorted(str(f) for f in (folder / "train").iterdir())
        self.loader = DataLoader(
            ReferenceCrops(files, size), batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers else None, pin_memory=device == "cuda",
        )  # fmt: skip
        torch.manual_seed(0)
        self.network, self.device = ColorNetwork().to(device).train(), device
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-4)

    def network_parameters(self) -> Iterator[Tensor]:
        return self.network.parameters()

    def loss(self, logits: Tensor, ab: Tensor) -> Tensor:
        return F.cross_entropy(logits, dense_targets(pool_to(ab, self.network.stride)))

    def epoch(self) -> None:
        for L, ab in self.loader:
            L, ab = L.to(self.device), ab.to(self.device)
            loss = self.loss(self.network(L), ab)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()

    def stages(self) -> Iterator[dict[str, float]]:
        clock = Clock(self.device)
        for L, ab in self.loader:
            clock("waiting for crops")
            L, ab = L.to(self.device), ab.to(self.device)
            logits = self.network(L)
            clock("forward")
            loss = self.loss(logits, ab)
            clock("Lab, targets, loss")
            self.optimizer.zero_grad()
            loss.backward()
            clock("backward")
            self.optimizer.step()
            loss.item()
            clock("optimizer")
            yield clock.take()


# --- ours -------------------------------------------------------------------------------------------------------------


class Ours:
    """The loop of `fastcolor train`: `epoch` is `Run.train_epoch`."""

    def __init__(self, data: Path, out: Path, precision: str, size: int, batch: int, workers: int, device: str):
        self.config = TrainConfig(
            size=size, batch_size=batch, lr=1e-4, crop=CROP, precision=precision, workers=workers, device=device,
            epochs=1 << 20, out=str(out), save_every=0, classes="none",
        )  # fmt: skip
        self.run = Run(data, self.config, Silent())
        self.device = device

    def network_parameters(self) -> Iterator[Tensor]:
        return self.run.network.parameters()

    def epoch(self) -> None:
        self._next()
        self.run.train_epoch(Stop())

    def _next(self) -> None:
        progress = self.run.progress
        progress.epoch, progress.step, progress.loss_sum, progress.images = progress.epoch + 1, 0, 0.0, 0

    def stages(self) -> Iterator[dict[str, float]]:
        """The same step in its parts. The network's last layer counts among the loss, which it is fused with."""
        self._next()
        run, task = self.run, self.run.task
        run.batches.epoch, run.batches.start = run.progress.epoch, 0
        head = task.network.head
        clock = Clock(self.device)
        for batch in run.loader:
            clock("waiting for crops")
            L, ab = split_lab(batch.rgb.to(run.device), task.network.stride)
            L = L.contiguous(memory_format=torch.channels_last)
            clock("Lab, targets, loss")
            with autocast(self.config.precision, run.device):
                features, _ = task.network.features_with_classes(L)
            clock("forward")
            loss = head_cross_entropy(features, head.weight, head.bias, ab, bins=task.bins)
            clock("Lab, targets, loss")
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            clock("backward")
            run.optimizer.step()
            if run.average is not None:
                run.average.update(task, 0)
            loss.item()
            clock("optimizer")
            yield clock.take()


class Clock:
    """Seconds since the last call, by stage."""

    def __init__(self, device: str):
        self.device, self.spent, self.last = device, {}, time.perf_counter()

    def __call__(self, stage: str) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.spent[stage] = self.spent.get(stage, 0.0) + now - self.last
        self.last = now

    def take(self) -> dict[str, float]:
        spent, self.spent = self.spent, {}
        return spent


# --- measuring --------------------------------------------------------------------------------------------------------


def loss_difference(network: nn.Module, folder: Path, size: int) -> float:
    """How far our loss lies from the reference pipeline's, relative, for the same two crops and weights."""
    from PIL import Image
    from skimage.color import rgb2lab

    files = sorted((folder / "train").iterdir())[:2]
    crops = [np.asarray(Image.open(f).convert("RGB").resize((size, size))) for f in files]
    rgb = torch.from_numpy(np.stack(crops))
    network = network.cpu().eval()
    lab = torch.from_numpy(np.stack([rgb2lab(c) for c in crops])).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = F.cross_entropy(network(lab[:, :1]), dense_targets(pool_to(lab[:, 1:], network.stride)))
        L, ab = split_lab(rgb, network.stride)
        head = network.head
        ours = head_cross_entropy(network.features(L), head.weight, head.bias, ab, bins=BINS)
    return abs(ours.item() / theirs.item() - 1)


def sampled(pipelines: dict, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of `rounds` epochs of each pipeline, in turn; one before that does not count."""

    def sample(pipeline) -> float:
        start = time.perf_counter()
        pipeline.epoch()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    names = list(pipelines)
    for name in names:
        sample(pipelines[name])
    taken: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds):
        for i in range(len(names)):
            name = names[(i + k) % len(names)]
            taken[name].append(sample(pipelines[name]))
            print(f"  round {k + 1} of {rounds}: {name}, {taken[name][-1]:.1f} s", file=sys.stderr)
    return taken


def shares(pipeline) -> dict[str, float]:
    """Each stage's share of a step, of the medians over an epoch without its first step."""
    steps = list(pipeline.stages())[1:]
    medians = {stage: statistics.median(s.get(stage, 0.0) for s in steps) for stage in STAGES}
    total = sum(medians.values())
    return {stage: round(seconds / total, 4) for stage, seconds in medians.items()}


def loading(pipeline) -> float:
    """Images a second that the loader gives while nothing is trained."""
    if isinstance(pipeline, Ours):
        pipeline._next()
        pipeline.run.batches.epoch, pipeline.run.batches.start = pipeline.run.progress.epoch, 0
        loader, count = pipeline.run.loader, pipeline.run.batches.order.count
    else:
        loader, count = pipeline.loader, len(pipeline.loader.dataset)
    start = time.perf_counter()
    for _ in loader:
        pass
    return count / (time.perf_counter() - start)


@contextmanager
def pipelines(size: int, batch: int, photos: int, options) -> Iterator[dict]:
    """All of them on the same photos, by name; and under "difference" how far the two losses lie apart."""
    with tempfile.TemporaryDirectory() as place:
        data, packed = Path(place, "photos"), Path(place, "pack")
        lay_out(data, photos, options.data)
        parts = {part: sorted((data / part).iterdir()) for part in ("train", "val")}
        pack(parts, data, packed, size * 9 // 8)
        common = (size, batch, options.workers, options.device)
        made: dict = {}
        some = 1 if options.quick else 2
        for source, where in (("pack", packed), ("JPEG", data))[:some]:
            for precision in ("fp32", "bf16")[:some]:
                out = Path(place, source, precision)
                made[f"fastcolor, {source}, {precision}"] = Ours(where, out, precision, *common)
        made["reference pipeline, JPEG, fp32"] = Reference(data, *common)
        made["difference"] = loss_difference(ColorNetwork(), data, size)
        try:
            yield made
        finally:
            made.clear()  # ends the workers before their files go


def benchmark(size: int, batch: int, options) -> list[dict]:
    steps, rounds = (3, 2) if options.quick else (STEPS, options.rounds)
    photos = steps * batch
    title = f"training, crops of {size}×{size}, {batch} a step, {steps} steps a sample, {options.workers} worker(s)"
    context = {"op": "training", "size": f"{size}x{size}", "batch": batch, "title": title,
               "oracle": "loss of the reference pipeline, relative", "photos": photos}  # fmt: skip
    with pipelines(size, batch, photos, options) as made:
        error = made.pop("difference")
        candidates = [Candidate(n, None, ours=isinstance(p, Ours), error=error) for n, p in made.items()]
        for c in candidates:
            if c.ours and not error <= LOSS_BOUND:
                c.why_not = f"off by {error:.2g}, more than {LOSS_BOUND:g}"
        able = {c.name: made[c.name] for c in candidates if not c.why_not}
        taken = sampled(able, rounds, options.device)
        found = {name: (shares(p), loading(p)) for name, p in able.items()}
    rows = []
    for c in candidates:
        times = timing.summary([t / steps for t in taken[c.name]]) if c.name in taken else None
        row = timing.row(c, times, 0, **context)
        if times is not None:
            stages, alone = found[c.name]
            row["images_per_s"] = round(batch / times.median, 2)
            row["loader_alone_images_per_s"] = round(alone, 1)
            row["shares"] = stages
            row["note"] = f"{row['images_per_s']:.1f} images/s"
        rows.append(row)
    rows = timing.compare(rows)
    timing.show(rows, title)
    show_shares([r for r in rows if "shares" in r])
    return rows


def show_shares(rows: list[dict]) -> None:
    for r in rows:
        parts = ", ".join(f"{stage} {share:.0%}" for stage, share in r["shares"].items())
        print(f"  {r['candidate']}: {parts}; the loader alone {r['loader_alone_images_per_s']:.0f} images/s")


def main(arguments: list[str] | None = None) -> int:
    made = timing.parser(
        "training", __doc__, "sides of the crops; 128x128 and 256x256", "three steps of four crops of 64"
    )
    made.add_argument("--data", type=Path, help="folder of photos; made-up ones otherwise")
    made.add_argument("--batch", type=int, help="images a step")
    made.add_argument("--rounds", type=int, default=5, help="samples of each pipeline")
    made.add_argument("--workers", type=int, default=1, help="processes that decode, of each pipeline")
    options = timing.parse(made, arguments)
    sizes = [64] if options.quick else [128, 256]
    if options.size:
        if options.size[0] != options.size[1] or options.size[0] < 64:
            made.error(f"--size must be a square of at least 64x64, got {options.size[0]}x{options.size[1]}")
        sizes = [options.size[0]]
    record, rows = timing.machine(options.device, options.commit), []
    for size in sizes:
        batch = options.batch or (4 if options.quick else BATCH[options.device].get(size, 16))
        rows += benchmark(size, batch, options)
    return timing.finish("training", options, record, rows)


if __name__ == "__main__":
    sys.exit(main())
