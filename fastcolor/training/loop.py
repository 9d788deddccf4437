"""The training loop: one command from a folder of photos to a checkpoint, interruptible and exactly resumable."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fastcolor._files import atomic_path
from fastcolor.bins import ColorBins
from fastcolor.evaluation.metrics import colorfulness, psnr
from fastcolor.imaging.vips import libvips, reason
from fastcolor.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fastcolor.model.device import choose_device
from fastcolor.model.field import LEARNED, field_options, learnable_field, log_marginals
from fastcolor.model.network import AB_SCALE, ColorNetwork, NetworkConfig, pool_to
from fastcolor.ops.cross_entropy import color_cross_entropy
from fastcolor.ops.head_cross_entropy import head_cross_entropy
from fastcolor.ops.lab import lab_to_rgb, rgb_to_lab
from fastcolor.ops.labels import label_histogram
from fastcolor.ops.mean_field import annealed_mean
from fastcolor.training.config import TrainConfig
from fastcolor.training.data import (
    DataError,
    EpochSampler,
    InOrder,
    PhotoCrops,
    Problems,
    check_headers,
    find_photos,
    make_loader,
    split,
)
from fastcolor.training.sources import fingerprint

STATE, MODEL, HISTORY = "state.pt", "model.safetensors", "history.jsonl"
_SAMPLES = 6  # pictures in the grid of each epoch
_PRIOR_IMAGES = 4000  # how many training images the label statistics are taken from
_TEMPERATURE = 0.38
_FIELD_RATE = 10.0  # learning rate of the field's three logarithms, as a multiple of the network's


class TrainingError(RuntimeError):
    """A run that cannot start or go on. The message says what to try."""


class Reporter(Protocol):
    """Where a run tells how it goes; the command line shows it as bars and lines."""

    def stage(self, text: str, total: int) -> None: ...
    def advance(self, count: int = 1, **values: float) -> None: ...
    def say(self, text: str) -> None: ...


class Silent:
    """A reporter that shows nothing."""

    def stage(self, text: str, total: int) -> None: ...
    def advance(self, count: int = 1, **values: float) -> None: ...
    def say(self, text: str) -> None: ...


@dataclass
class Progress:
    """Where a run stands: what the state file holds beside weights and optimizer."""

    epoch: int = 0  # finished epochs
    step: int = 0  # steps done in the epoch under way
    loss_sum: float = 0.0  # over the images of the epoch under way
    images: int = 0
    history: list[dict] = field(default_factory=list)  # one entry for each finished epoch


@dataclass
class Result:
    """What a run leaves: `finished` is False after an interruption."""

    finished: bool
    out: Path
    history: list[dict]
    problems: Problems


def split_lab(rgb: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """uint8 crops [B, H, W, 3] to L [B, 1, H, W] and the mean ab [B, 2, ⌈H/stride⌉, ⌈W/stride⌉] of the output grid."""
    L, ab = rgb_to_lab(rgb, channels_last=True).permute(0, 3, 1, 2).split((1, 2), dim=1)
    return L.contiguous(), pool_to(ab, stride)


def predict_ab(output: Tensor, bins: ColorBins | None, temperature: float = _TEMPERATURE) -> Tensor:
    """The network's output to ab at its own grid: the annealed mean of logits, or the regression itself."""
    return output.float() if bins is None else annealed_mean(output, temperature, bins, logits=True)


class Run:
    """One training run: its data, network, optimizer and files. `train` below drives it."""

    def __init__(self, data: str | Path, config: TrainConfig, reporter: Reporter):
        config.check()
        self.config, self.reporter, self.out = config, reporter, Path(config.out)
        self.device = choose_device(config.device)
        self.problems = Problems()
        if (self.out / STATE).exists() and not config.resume:
            raise TrainingError(f"{self.out}: holds a run already; --resume goes on with it, or choose another --out")
        if config.resume and not (self.out / STATE).exists():
            raise TrainingError(f"{self.out}: nothing to resume, {STATE} is missing")

        train_files, val_files = find_photos(data)
        reporter.stage("reading headers", len(train_files) + len(val_files))
        train_files = check_headers(train_files, self.problems, reporter.advance)
        if val_files:
            val_files = check_headers(val_files, self.problems, reporter.advance)
        elif len(train_files) > 1:
            train_files, val_files = split(train_files, config.val_share, config.seed)
        if not train_files or not val_files:
            usable = f"{len(train_files)} to train on and {len(val_files)} to check with"
            first = "".join(f"; left out: {why}" for why in list(self.problems.reasons.values())[:1])
            raise TrainingError(f"{data}: too few usable colour images, {usable}; one of each is needed{first}")
        self.data_id = fingerprint(train_files + val_files)

        workers = config.workers
        if workers < 0:
            workers = 1 if self.device.type == "cpu" else min(16, max(2, (os.cpu_count() or 2) - 1))
        pin = self.device.type == "cuda"
        crops = PhotoCrops(train_files, config.size, config.seed, config.crop)
        self.sampler = EpochSampler(len(crops), config.seed)
        self.loader = make_loader(crops, self.sampler, config.batch_size, workers, pin)
        middle = PhotoCrops(val_files, config.size)
        self.val_loader = make_loader(middle, InOrder(len(middle)), config.batch_size, min(workers, 2), pin)
        whole = PhotoCrops(train_files[:_PRIOR_IMAGES], config.size)
        self.prior_loader = make_loader(whole, InOrder(len(whole)), config.batch_size, 0, False)

        seed_everything(config.seed)
        bins = ColorBins(config.bins)
        self.network = ColorNetwork(NetworkConfig(head=config.head, bins=bins)).to(self.device)
        self.network.to(memory_format=torch.channels_last)
        self.bins = bins if config.head == "distribution" else None
        fused = {"fused": True} if self.device.type in ("cpu", "cuda") else {}
        self.field = learnable_field(bins, config.mrf_sweeps).to(self.device) if config.mrf_sweeps else None
        if config.init and not config.resume:
            self._start_from(config.init)
        groups = [{"params": list(self.network.parameters())}]
        if self.field is not None:
            groups.append({"params": list(self.field.parameters()), "scale": _FIELD_RATE})
        self.optimizer = torch.optim.Adam(groups, lr=config.lr, **fused)
        self.progress, self.prior = Progress(), None
        if config.resume:
            self._load_state()
        self.weights = None
        if self.bins is not None:
            if self.prior is None:
                self.prior = self._measure_prior()
            if config.rebalance > 0:
                self.weights = bins.rebalancing_weights(self.prior, 1 - config.rebalance).float().to(self.device)

    # --- learning rate -------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.sampler.count // self.config.batch_size)

    def learning_rate(self, step: int) -> float:
        """Of one step, counted from the start of the run."""
        total = self.config.epochs * self.steps_per_epoch
        warmup = min(self.config.warmup, total // 10)
        if step < warmup:
            return self.config.lr * (step + 1) / warmup
        if self.config.schedule == "constant":
            return self.config.lr
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    @property
    def network_size(self) -> int:
        """The short side at which whole pictures look as the crops did, which keep between √crop and 1 of it."""
        share = (1 + self.config.crop) / 2
        return 8 * round(self.config.size / math.sqrt(share) / 8)

    # --- one step, one epoch -------------------------------------------------------------------------------------

    def training_loss(self, rgb: Tensor) -> Tensor:
        """`loss` without the output: where nothing else wants the logits, they never exist all at once."""
        if self.bins is None or self.field is not None:
            return self.loss(rgb)[0]
        L, ab = split_lab(rgb.to(self.device, non_blocking=True), self.network.stride)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            features = self.network.features(L.contiguous(memory_format=torch.channels_last))
        head = self.network.head
        return head_cross_entropy(features, head.weight, head.bias, ab, bins=self.bins, weights=self.weights)

    def loss(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch of crops, and the network's output: with a field, the logarithm of its marginals."""
        L, ab = split_lab(rgb.to(self.device, non_blocking=True), self.network.stride)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            output = self.network(L.contiguous(memory_format=torch.channels_last))
        if self.bins is None:
            # ab scaled to a range of 1, as Melas-Kyriazi and Han 2017 report their errors
            return F.mse_loss(output.float() / (2 * AB_SCALE), ab / (2 * AB_SCALE)), output
        if self.field is not None:
            output = log_marginals(self.field(output.float(), pool_to(L, self.network.stride)))
        return color_cross_entropy(output, ab, bins=self.bins, weights=self.weights), output

    def train_epoch(self, stop: Stop) -> bool:
        """Goes on with the epoch under way; False where it was interrupted."""
        config, progress = self.config, self.progress
        self.sampler.epoch, self.sampler.start = progress.epoch, progress.step * config.batch_size
        self.network.train()
        self.reporter.stage(f"epoch {progress.epoch + 1}/{config.epochs}", self.sampler.count)
        self.reporter.advance(min(self.sampler.start, self.sampler.count))
        for rgb in self._batches(self.loader, stop):
            rate = self.learning_rate(progress.epoch * self.steps_per_epoch + progress.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("scale", 1.0)
            loss = self.training_loss(rgb)
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} at epoch {progress.epoch + 1}, step {progress.step + 1}; "
                    f"try a lower --lr (it was {rate:.2g}) or --precision fp32"
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            progress.step += 1
            progress.images += len(rgb)
            progress.loss_sum += value * len(rgb)
            self.reporter.advance(len(rgb), loss=progress.loss_sum / progress.images)
            if stop.asked:
                return False
        return not stop.asked

    def _batches(self, loader: DataLoader, stop: Stop) -> Iterator[Tensor]:
        """The batches of a loader; ends early after a signal, which may have ended the workers already."""
        try:
            for rgb, failed in loader:
                self._note(failed)
                yield rgb
        except DataError as error:  # with the worker's whole traceback in its message
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None
        except RuntimeError:
            if not stop.asked:
                raise

    @torch.no_grad()
    def validate(self, stop: Stop) -> tuple[dict[str, float], Tensor] | None:
        """Means over the validation images, and the grid of samples [3, H, W] uint8: grey, prediction, truth.

        None after an interruption.
        """
        self.network.eval()
        self.reporter.stage("validation", len(self.val_loader.dataset))
        totals, count, rows = {}, 0, []
        for rgb in self._batches(self.val_loader, stop):
            loss, output = self.loss(rgb)
            truth = rgb.to(self.device).permute(0, 3, 1, 2)
            L = rgb_to_lab(truth)[:, :1]
            ab = F.interpolate(predict_ab(output, self.bins), truth.shape[-2:], mode="bilinear", align_corners=False)
            color = lab_to_rgb(torch.cat((L, ab), 1), dtype=torch.uint8)
            grey = lab_to_rgb(torch.cat((L, torch.zeros_like(ab)), 1), dtype=torch.uint8)
            # a colourless truth cannot come up: greyscale files are left out
            parts = {
                "val_loss": loss.expand(len(rgb)),
                "val_psnr": psnr(color, truth),
                "val_psnr_grey": psnr(grey, truth),
                "val_colorfulness": colorfulness(color),
                "val_colorfulness_truth": colorfulness(truth),
            }
            for name, values in parts.items():
                # a prediction without any error counts as 100 dB, so that the mean stays finite
                totals[name] = totals.get(name, 0.0) + values.double().clamp_max(100).sum().item()
            count += len(rgb)
            for i in range(min(len(rgb), _SAMPLES - len(rows))):
                rows.append(torch.cat((grey[i], color[i], truth[i]), dim=2).cpu())
            self.reporter.advance(len(rgb))
            if stop.asked:
                break
        if stop.asked:
            return None
        return {name: total / count for name, total in totals.items()}, torch.cat(rows, dim=1)

    def _measure_prior(self) -> Tensor:
        """Label probabilities of the training set, [K] float64, from the middle crops of its first images."""
        self.reporter.stage("measuring colours", len(self.prior_loader.dataset))
        counts = torch.zeros(self.bins.count, dtype=torch.float64)
        for rgb, failed in self.prior_loader:
            self._note(failed)
            _, ab = split_lab(rgb, self.network.stride)
            counts += label_histogram(ab.movedim(1, -1), self.bins)
            self.reporter.advance(len(rgb))
        for place, _ in self.bins.groups():
            counts[place] /= counts[place].sum()
        return counts

    def _note(self, failed: list[tuple[str, str]]) -> None:
        for path, why in failed:
            if self.problems.add(path, why):
                self.reporter.say(f"left out: {why if path in why else f'{path}: {why}'}")

    # --- files -----------------------------------------------------------------------------------------------------

    def save_state(self) -> None:
        state = {
            "config": asdict(self.config),
            "data": self.data_id,
            "network": self.network.state_dict(),
            "field": None if self.field is None else self.field.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "prior": self.prior,
            "progress": asdict(self.progress),
            "random": torch.get_rng_state(),
        }
        try:
            with atomic_path(self.out / STATE) as temporary:
                torch.save(state, temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{self.out / STATE}: cannot be written ({str(error).splitlines()[0]})") from error

    def _start_from(self, path: str) -> None:
        """Takes over a network, and the field that was trained with it."""
        start = load_checkpoint(path)
        found, ours = start.network.config.to_dict(), self.network.config.to_dict()
        different = [f"{name} is {found[name]!r}, not {ours[name]!r}" for name in ours if found[name] != ours[name]]
        if different:
            raise TrainingError(f"{path}: cannot start from another network: {'; '.join(different)}")
        self.network.load_state_dict(start.network.state_dict())
        if self.field is not None:
            self.field = learnable_field(self.bins, self.config.mrf_sweeps, start.mrf).to(self.device)

    def _load_state(self) -> None:
        path = self.out / STATE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            names = {"config", "data", "network", "optimizer", "prior", "progress", "random"}
            if not isinstance(state, dict) or not names <= state.keys():
                raise ValueError("it holds something else")
        except Exception as error:  # torch.load raises many kinds on a broken file
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrainingError(f"{path}: not a readable state of a run ({why})") from error
        if state["config"]["epochs"] != self.config.epochs and self.config.schedule != "constant":
            self.reporter.say(
                f"{self.config.epochs} epochs instead of {state['config']['epochs']}: "
                "the learning rate goes on along the new schedule"
            )
        changed = self.config.differences(state["config"])
        if changed:
            raise TrainingError(f"{path}: cannot resume with other options: {'; '.join(changed)}")
        if state["data"] != self.data_id:
            raise TrainingError(f"{path}: cannot resume, the usable images in the data folder are not those of the run")
        self.network.load_state_dict(state["network"])
        if self.field is not None:
            self.field.load_state_dict(state["field"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.prior = state["prior"]
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["random"])

    def save_model(self) -> None:
        notes = {
            "epochs": self.progress.epoch,
            "size": self.network_size,
            "options": {k: v for k, v in asdict(self.config).items() if k not in ("out", "device", "resume", "init")},
            "validation": self.progress.history[-1] if self.progress.history else {},
        }
        options = {} if self.field is None else field_options(self.field)
        save_checkpoint(self.out / MODEL, Checkpoint(self.network, self.prior, notes, options))


class Stop:
    """Whether SIGINT (Ctrl-C) or SIGTERM has come: the step under way is finished. A second one stops at once."""

    def __init__(self):
        self.asked = False

    def __call__(self, number: int, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stop_on_signals():
    stop, before = Stop(), {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread: signals are the caller's to handle
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def save_grid(path: Path, grid: Tensor) -> None:
    """Writes [3, H, W] uint8 as a PNG."""
    image = libvips().Image.new_from_array(grid.permute(1, 2, 0).contiguous().numpy(), interpretation="srgb")
    try:
        with atomic_path(path) as temporary:
            image.pngsave(str(temporary))
    except libvips().Error as error:
        raise OSError(f"{path}: cannot be written ({reason(error)})") from error


def _writer(out: Path, reporter: Reporter):
    """TensorBoard's writer, or None with a word where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        reporter.say("TensorBoard events are not written: pip install tensorboard")
        return None
    return SummaryWriter(str(out))


def train(data: str | Path, config: TrainConfig, reporter: Reporter | None = None) -> Result:
    """Trains on a folder of images. Writes to config.out: state.pt (all that --resume needs), model.safetensors (what
    `Colorizer.load` reads), history.jsonl, samples/*.png, TensorBoard events and config.json.

    SIGINT and SIGTERM finish the step under way, save and return; a resumed run continues with the very next step.

    Args:
        data: a folder of images, nested or not, or with train/ and val/ inside.
        config: see `TrainConfig`.
        reporter: told about stages, steps and problems.

    Raises:
        ValueError: an option out of range. DataError: nothing to learn from. TrainingError: a run that cannot start
        or go on.
    """
    reporter = reporter or Silent()
    run = Run(data, config, reporter)  # nothing to lose yet: Ctrl-C ends it as usual
    out = run.out
    counts = run.problems.counts()
    if counts:
        reporter.say(f"left out: {', '.join(f'{n} {kind}' for kind, n in counts.items())}")
        for path, why in run.problems.reasons.items():
            reporter.say(f"  {why if path in why else f'{path}: {why}'}")
    with atomic_path(out / "config.json") as temporary:
        temporary.write_text(json.dumps({"data": str(data), **asdict(config)}, indent=2) + "\n")
    writer = _writer(out, reporter)
    try:
        with stop_on_signals() as stop:
            while run.progress.epoch < config.epochs:
                entry, grid = run_epoch(run, stop)
                if entry is None:
                    reporter.say(f"stopped in epoch {run.progress.epoch + 1}; --resume goes on from here")
                    return Result(False, out, run.progress.history, run.problems)
                _keep(run, entry, grid, writer)
                if stop.asked and run.progress.epoch < config.epochs:
                    reporter.say(f"stopped after epoch {run.progress.epoch}; --resume goes on from here")
                    return Result(False, out, run.progress.history, run.problems)
    finally:
        if writer is not None:
            writer.close()
    return Result(True, out, run.progress.history, run.problems)


def run_epoch(run: Run, stop: Stop) -> tuple[dict, Tensor] | tuple[None, None]:
    """Finishes the epoch under way: its entry in the history, and the samples. None where it was interrupted."""
    progress, started, images = run.progress, time.perf_counter(), run.progress.images
    whole = run.train_epoch(stop)
    seconds = time.perf_counter() - started
    run.save_state()  # before validation, which an interruption leaves out: resumed, it comes first
    found = run.validate(stop) if whole else None
    if found is None:
        return None, None
    scores, grid = found
    entry = {
        "epoch": progress.epoch + 1,
        "loss": progress.loss_sum / max(1, progress.images),
        **scores,
        "lr": run.optimizer.param_groups[0]["lr"],
        "images_per_second": (progress.images - images) / seconds,
    }
    if run.field is not None:
        entry |= {f"field_{name}": run.field.value(name).item() for name in LEARNED}
    progress.history.append(entry)
    progress.epoch, progress.step, progress.loss_sum, progress.images = progress.epoch + 1, 0, 0.0, 0
    return entry, grid


def _keep(run: Run, entry: dict, grid: Tensor, writer) -> None:
    """Writes what a finished epoch leaves; the state first, so that no failure after it loses the epoch."""
    run.save_state()
    run.save_model()
    with atomic_path(run.out / HISTORY) as temporary:
        temporary.write_text("".join(json.dumps(e) + "\n" for e in run.progress.history))
    save_grid(run.out / "samples" / f"epoch_{entry['epoch']:04d}.png", grid)
    if writer is not None:
        for name, value in entry.items():
            writer.add_scalar(name, value, entry["epoch"])
        writer.add_image("samples", grid, entry["epoch"])
        writer.flush()
    run.reporter.say(
        f"epoch {entry['epoch']}: loss {entry['loss']:.4f}, validation {entry['val_loss']:.4f}, "
        f"PSNR {entry['val_psnr']:.2f} dB (grey {entry['val_psnr_grey']:.2f}), "
        f"colourfulness {entry['val_colorfulness'] / max(entry['val_colorfulness_truth'], 1e-9):.0%}, "
        f"{entry['images_per_second']:.1f} images/s"
    )
