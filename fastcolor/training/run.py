"""One training run: its data, network and optimizer, a step, an epoch, its state. `loop.train` drives it."""

from __future__ import annotations

import gc
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from fastcolor._files import atomic_path
from fastcolor.model.device import choose_device
from fastcolor.ops.labels import label_histogram
from fastcolor.training import memory
from fastcolor.training.average import Average
from fastcolor.training.classify import ClassTask
from fastcolor.training.color import ColorTask, split_lab
from fastcolor.training.config import ConfigError, TrainConfig
from fastcolor.training.data import (
    Batch,
    DataError,
    EpochBatches,
    InOrder,
    PhotoCrops,
    Photos,
    Problems,
    gather_photos,
    make_loader,
)
from fastcolor.training.distributed import ALONE, Team, share_norms
from fastcolor.training.report import Reporter, Silent, Stop
from fastcolor.training.state import (
    LEFT_OUT,
    STATE,
    Progress,
    TrainingError,
    read_state,
    write_state,
)
from fastcolor.training.teachers import Teachers

_SAMPLES = 6  # pictures in the grid of each epoch
_PRIOR_IMAGES = 4000  # how many training images at most the label statistics are taken from
NAMED = 5  # files that are left out, by name; the others are counted
_LOOK_EVERY = 10  # steps on a GPU between two looks at the loss: each one waits for the device
_SMALLEST_SCALE = 1e-3  # of float16 gradients: below, no scale makes them finite


class Run:
    """One training run, as one process of it sees it.

    Args:
        data, config: as of `loop.train`. reporter: used by the first process alone. team: the processes.
        dry: nothing will be trained: no label statistics are taken from the photos, and a folder that --resume would
            not fit is no error.
    """

    def __init__(
        self, data: str | Path, config: TrainConfig, reporter: Reporter, team: Team = ALONE, dry: bool = False
    ):
        # the first one's: of a run that goes on it may come from the run's folder, which other machines need not see
        config = team.share(lambda: config)
        self.config, self.team, self.out = config, team, Path(config.out)
        self.reporter = reporter if team.lead else Silent()
        self.resumed = team.share(lambda: self._check(dry))
        self.device = choose_device(team.device(config.device))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.problems, self._said = Problems(), 0
        self.photos = team.share(lambda: self._gather(data))
        self._tell_left_out()
        self._load_data()

        seed_everything(config.seed)
        make = ClassTask if config.task == "classify" else ColorTask
        self.task = make(config, self.photos.classes)
        if not self.resumed and (said := self.task.start(config)):
            self.reporter.say(said)
        self.task.to(self.device)
        self.task.network.to(memory_format=torch.channels_last)
        if config.teachers:
            self.task.teachers = Teachers(config.teacher_files, self.bins, config.precision, self.device)
        self.progress = Progress()
        state = team.share(self._read_state) if self.resumed else None
        if state is not None:
            self._take_over(state)
        if self.bins is not None and not (dry and state is None):
            self.task.set_prior(self._measure_prior() if state is None else state["prior"])
        self.average = Average(self.task, config.ema) if config.ema else None
        if team.world > 1 and config.sync_norm:
            share_norms(self.task, self.device)

        groups = [{"params": list(self.network.parameters())}]
        if self.field is not None:
            groups.append({"params": list(self.field.parameters()), "scale": config.field_rate})
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        if state is not None:
            self._take_over_learning(state)
        if config.compile:
            self.task.compile({int(n) for n in self.batches.counts(0)})
        self.learner = self.task
        if team.world > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.learner = DistributedDataParallel(self.task, device_ids=ids, gradient_as_bucket_view=True)
        self._sum = torch.zeros((), dtype=torch.float64 if self.device.type != "mps" else torch.float32)
        self._seen, self._saved = 0, time.monotonic()

    def _check(self, dry: bool) -> bool:
        """Whether the run goes on with an earlier one, and whether it may start at all."""
        config, least = self.config, self.team.world * self.config.accumulate
        config.check()
        if config.batch_size < least:
            raise ConfigError(
                f"batch_size is the whole step's: {self.team.world} processes with {config.accumulate} pieces each "
                f"need {least} at least, got {config.batch_size}"
            )
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"out must be a folder, {self.out} is a file")
        there = (self.out / STATE).exists()
        if dry:
            return there and config.resume != "no"
        if there and config.resume == "no":
            raise TrainingError(f"{self.out}: holds a run already; --resume goes on with it, or choose another --out")
        if config.resume == "yes" and not there:
            raise TrainingError(f"{self.out}: nothing to resume, {STATE} is missing")
        return there

    @property
    def network(self) -> torch.nn.Module:
        return self.task.network

    @property
    def field(self) -> torch.nn.Module | None:
        return self.task.field

    @property
    def bins(self):
        return self.task.bins

    @property
    def teachers(self) -> dict[str, str]:
        """The files of the teachers, with hashes of what is in them."""
        return {} if self.task.teachers is None else self.task.teachers.files

    @property
    def judged(self) -> torch.nn.Module:
        """What is validated and saved: the average of the weights where there is one, else these themselves."""
        return self.task if self.average is None else self.average.module

    # --- data ----------------------------------------------------------------------------------------------------

    def _gather(self, data: str | Path) -> Photos:
        config, grey = self.config, self.config.task == "classify"
        classes = "folders" if grey else config.classes
        return gather_photos(
            data, config.val_share, config.seed, classes, grey, self.problems, self.reporter.stage,
            self.reporter.advance,
        )  # fmt: skip

    def _tell_left_out(self) -> None:
        """What the headers said."""
        reasons = self.problems.reasons
        if reasons:
            self.reporter.say(f"left out: {', '.join(f'{n} {kind}' for kind, n in self.problems.counts().items())}")
        for path, why in islice(reasons.items(), NAMED):
            self.reporter.say(f"  {named(path, why)}")
        if len(reasons) > NAMED:
            self.reporter.say(f"  ... {self.out / LEFT_OUT} names all of them after the first epoch")

    def _load_data(self) -> None:
        config, photos, team = self.config, self.photos, self.team
        grey = config.task == "classify"
        workers = config.workers
        if workers < 0:
            workers = 1 if self.device.type == "cpu" else min(16, max(2, (os.cpu_count() or 2) // _local_world() - 1))
        pin = self.device.type == "cuda"
        crops = PhotoCrops(photos.train, config.size, config.seed, config.crop, photos.train_labels or None, grey)
        self.batches = EpochBatches(
            len(crops), config.seed, config.batch_size, team.rank, team.world, config.accumulate
        )
        self.loader = make_loader(crops, self.batches, None, workers, pin)
        middle = PhotoCrops(photos.val, config.size, labels=photos.val_labels or None, grey=grey)
        at_once = max(1, config.batch_size // team.world // config.accumulate)
        order = InOrder(len(middle), team.rank, team.world)
        self.val_loader = make_loader(middle, order, at_once, min(workers, 2), pin)
        self._val_at_once = at_once
        # spread over the list: in order of folders, the first ones would be of one class
        share = min(_PRIOR_IMAGES, len(photos.train))
        whole = PhotoCrops([photos.train[i * len(photos.train) // share] for i in range(share)], config.size)
        self.prior_loader = make_loader(whole, InOrder(len(whole), team.rank, team.world), at_once, 0, False)

    def _measure_prior(self) -> Tensor:
        """Label probabilities of the training set, [K] float64, from middle crops of images all over it."""
        self.reporter.stage("measuring colours", len(self.prior_loader.dataset))
        counts = torch.zeros(self.bins.count, dtype=torch.float64)
        for batch in self.prior_loader:
            self._note(batch.failed)
            _, ab = split_lab(batch.rgb, self.network.stride)
            counts += label_histogram(ab.movedim(1, -1), self.bins)
            self.reporter.advance(len(batch.rgb) * self.team.world)
        self.team.sum(counts)  # whole numbers: in any order the same
        for place, _ in self.bins.groups():
            counts[place] /= counts[place].sum()
        return counts

    def _batches(self, loader: DataLoader, stop: Stop) -> Iterator[Batch]:
        """The batches of a loader; ends early after a signal, which may have ended the workers already."""
        try:
            for batch in loader:
                self._note(batch.failed)
                yield batch
        except DataError as error:  # with the worker's whole traceback in its message
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None
        except RuntimeError as error:
            if not stop.asked or memory.is_out_of_memory(error):
                raise

    def _note(self, failed: list[tuple[str, str]]) -> None:
        """Files that turned out to be no use: the first ones are named, `tell_problems` counts the rest."""
        for path, why in failed:
            if self.problems.add(path, why):
                self._said += 1
                if self._said <= NAMED:
                    self.reporter.say(f"left out: {named(path, why)}")

    def tell_problems(self) -> None:
        """Brings together what all processes left out, and writes the list."""
        for reasons in self.team.gather(self.problems.reasons):
            self._note(list(reasons.items()))
        if not self.team.lead or not self.problems.reasons:
            return
        if self._said > NAMED:
            counts = ", ".join(f"{n} {kind}" for kind, n in self.problems.counts().items())
            self.reporter.say(f"left out so far: {counts}; {self.out / LEFT_OUT} names them")
            self._said = 0
        with atomic_path(self.out / LEFT_OUT) as temporary:
            temporary.write_text("".join(f"{named(p, why)}\n" for p, why in self.problems.reasons.items()))

    # --- learning rate -------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps

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

    def train_epoch(self, stop: Stop) -> bool:
        """Goes on with the epoch under way; False where it was interrupted."""
        config, progress, batches = self.config, self.progress, self.batches
        batches.epoch, batches.start = progress.epoch, progress.step
        self.task.train()
        self.reporter.stage(f"epoch {progress.epoch + 1}/{config.epochs}", batches.order.count)
        self._seen = min(progress.step * config.batch_size, batches.order.count)
        self.reporter.advance(self._seen)
        # counted on the device, so that nothing waits for it
        self._sum = self._sum.new_tensor(progress.loss_sum if self.team.lead else 0.0, device=self.device)
        loader = self._batches(self.loader, stop)
        while progress.step < batches.steps:
            counts = batches.counts(progress.step)
            pieces = list(islice(loader, len(counts)))
            if len(pieces) < len(counts):
                if self.team.world > 1:  # the others wait for this step's gradient: leaving quietly would hang them
                    raise TrainingError(f"process {self.team.rank} was stopped while it read; --resume auto goes on")
                progress.loss_sum = self._sum.item()  # on a GPU the last look may be some steps ago
                return False
            self._step(pieces, counts)
            waits = self.device.type != "cpu" and progress.step % _LOOK_EVERY and progress.step < batches.steps
            if not waits and self._look(stop):
                return False
        return not self.agree(stop.asked)

    def _step(self, pieces: list[Batch], counts: list[int]) -> None:
        """One step of the optimizer: the gradient of the mean loss over the images of all pieces and processes."""
        config, progress = self.config, self.progress
        images = self.batches.images(progress.step)
        done = progress.epoch * self.steps_per_epoch + progress.step
        rate = self.learning_rate(done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        failed = False
        try:
            for k, (batch, count) in enumerate(zip(pieces, counts, strict=True)):
                waits = self.team.world > 1 and k < len(pieces) - 1
                with self.learner.no_sync() if waits else nullcontext():
                    loss = self.learner(*self._on_device(batch))
                    self._sum += loss.detach() * count
                    # DDP takes the mean over the processes
                    share = 1.0 if count == images else count * self.team.world / images
                    self.scaler.scale(loss if share == 1.0 else loss * share).backward()
            if config.clip > 0:
                self.scaler.unscale_(self.optimizer)
                parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            failed = True
        if failed:  # out here the error, and with it all that it holds, is gone
            batch = loss = None
            raise TrainingError(self._memory_advice(max(len(p.rgb) for p in pieces))) from None
        if self.average is not None:
            self.average.update(self.task, done)
        progress.step += 1
        progress.images += images

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(x.to(self.device, non_blocking=True) for x in (batch.rgb, batch.seeds, batch.labels))

    def _look(self, stop: Stop) -> bool:
        """Brings the loss to the host, stops on one that is no number, saves when it is time; whether to stop."""
        progress, config = self.progress, self.config
        late = self.team.lead and config.save_every > 0 and time.monotonic() - self._saved >= config.save_every
        told = torch.tensor([self._sum.item(), stop.asked, late], dtype=torch.float64)
        progress.loss_sum, asked, late = self.team.sum(told).tolist()
        if not math.isfinite(progress.loss_sum):
            raise TrainingError(
                f"the loss is {progress.loss_sum} at epoch {progress.epoch + 1}, step {progress.step}; "
                f"try a lower --lr (it was {self.optimizer.param_groups[0]['lr']:.2g}), --clip 1 or --precision fp32"
            )
        if self.scaler.is_enabled() and self.scaler.get_scale() < _SMALLEST_SCALE:
            raise TrainingError(
                f"the gradients are not finite at any scale at epoch {progress.epoch + 1}, step {progress.step}; "
                "try a lower --lr, --clip 1 or --precision bf16"
            )
        seen = min(progress.step * config.batch_size, self.batches.order.count)
        self.reporter.advance(seen - self._seen, loss=progress.loss_sum / progress.images)
        self._seen = seen
        asked = asked or (self.team.world == 1 and stop.asked)  # it may have come since
        if late and not asked:
            self.save_state()
        return bool(asked)

    def agree(self, asked: bool) -> bool:
        """Whether any process was asked to stop."""
        return bool(self.team.sum(torch.tensor(float(asked))))

    def _memory_advice(self, images: int) -> str:
        config, team = self.config, self.team
        self._let_go()
        text = f"out of memory with {images} crops of {config.size} pixels at once on {self.device}"
        free = memory.free_bytes(self.device)
        try:
            # other processes take no part: with the statistics that are there, nothing is asked of them
            need = memory.step_need(self.task.eval(), config.size, self.device)
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            need = None
        later = memory.weights_bytes(self.task, 1 if self.optimizer.state else 3)
        fits = min(images - 1, need.fits(free - later)) if need is not None and free is not None else 0
        if fits < 1:
            return f"{text}; not even one fits: try a smaller --size"
        pieces = -(-images * config.accumulate // fits)
        return (
            f"{text}; about {fits} fit: try --batch-size {fits * team.world * config.accumulate}, or for the same "
            f"steps --accumulate {pieces}"
        )

    def _let_go(self) -> None:
        """Of memory that the next try needs."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measured(self, batch: Batch) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """Of a batch's images, all at once; where memory runs out, of fewer at once from then on: images are judged one
        by one, and a run could not go on with another batch size."""
        at = 0
        while at < len(batch.rgb):
            found, images = None, min(self._val_at_once, len(batch.rgb) - at)
            rgb, seeds, labels = (x[at : at + images] for x in (batch.rgb, batch.seeds, batch.labels))
            try:
                rgb, seeds, labels = self._on_device(Batch(rgb, [], seeds, labels))
                found = self.judged.measure(Batch(rgb, [], seeds, labels))
            except RuntimeError as error:
                if not memory.is_out_of_memory(error):
                    raise
            if found is not None:
                at += images
                yield found
                continue
            rgb = seeds = labels = None  # out here the error, and with it all that it holds, is gone
            self._let_go()
            text = f"out of memory with {images} crops of {self.config.size} pixels at once in validation"
            if images == 1:
                raise TrainingError(
                    f"{text} on {self.device}; the epoch's training is saved: --resume where there is more memory, or "
                    "start again with a smaller --size"
                )
            self._val_at_once = images // 2
            self.reporter.say(f"{text}: goes on with {self._val_at_once}")

    @torch.no_grad()
    def validate(self, stop: Stop) -> tuple[dict[str, float], Tensor | None] | None:
        """Means over the validation images, and the grid of samples [3, H, W] uint8, where the task has pictures.

        None after an interruption.
        """
        # what is saved; without shared normalization each process has statistics of its own
        self.team.follow(self.judged.eval())
        self.reporter.stage("validation", len(self.val_loader.dataset))
        totals, count, rows = {}, 0, []
        for batch in self._batches(self.val_loader, stop):
            for values, pictures in self._measured(batch):
                for name, each in values.items():
                    totals[name] = totals.get(name, 0.0) + each.double().sum().item()
                if pictures is not None:
                    rows += [row.cpu() for row in pictures[: _SAMPLES - len(rows)]]
            count += len(batch.rgb)
            self.reporter.advance(len(batch.rgb) * self.team.world)
            if stop.asked:
                break
        if self.agree(stop.asked):
            return None
        parts = self.team.gather((totals, count))
        images = sum(n for _, n in parts)
        means = {name: sum(t.get(name, 0.0) for t, _ in parts) / images for name in totals}
        return means, torch.cat(rows, dim=1) if rows else None

    # --- files ---------------------------------------------------------------------------------------------------

    def save_state(self) -> None:
        """Writes all that resuming needs; the first process does it for all."""
        self._saved = time.monotonic()
        if not self.team.lead:
            return
        if not all(x.isfinite().all() for x in self.task.parameters()):
            raise TrainingError(
                f"weights are not finite at epoch {self.progress.epoch + 1}, step {self.progress.step} (the last save "
                "stays as it is); try a lower --lr, --clip 1 or --precision fp32"
            )
        write_state(
            self.out / STATE,
            {
                "config": asdict(self.config),
                "data": self.photos.fingerprint,
                "classes": list(self.photos.classes),
                "network": self.network.state_dict(),
                "field": None if self.field is None else self.field.state_dict(),
                "average": None if self.average is None else self.average.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "prior": self.task.prior,
                "teachers": self.teachers,
                "progress": asdict(self.progress),
                "random": torch.get_rng_state(),
            },
        )

    def _read_state(self) -> dict:
        """What an earlier start left, after a look at whether it is the same run."""
        path = self.out / STATE
        state = read_state(path)
        if state["config"]["epochs"] != self.config.epochs and self.config.schedule != "constant":
            self.reporter.say(
                f"{self.config.epochs} epochs instead of {state['config']['epochs']}: "
                "the learning rate goes on along the new schedule"
            )
        # runs from before there was an average have none yet: it starts now
        changed = self.config.differences({"ema": self.config.ema, **state["config"]})
        if changed:
            raise TrainingError(f"{path}: cannot resume with other options: {'; '.join(changed)}")
        classes = state.get("classes", [])
        if classes != list(self.photos.classes):
            found = f"{len(classes)} classes, the data folder has {len(self.photos.classes)}"
            raise TrainingError(
                f"{path}: cannot resume, the run has {found}" + ("" if classes else "; try --classes none")
            )
        if state["data"] != self.photos.fingerprint:
            raise TrainingError(f"{path}: cannot resume, the usable images in the data folder are not those of the run")
        for file, found in self.teachers.items():
            if found != state["teachers"][file]:
                raise TrainingError(
                    f"{path}: cannot resume, the teacher {file} is not the one of the run: its sha256 starts with "
                    f"{found}, not {state['teachers'][file]}"
                )
        return state

    def _take_over(self, state: dict) -> None:
        """The network of an earlier start."""
        try:
            self.network.load_state_dict(state["network"])
            if self.field is not None:
                self.field.load_state_dict(state["field"])
        except RuntimeError as error:  # of another version of fastcolor
            raise TrainingError(f"{self.out / STATE}: cannot resume, its network is another one ({error})") from error
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["random"])

    def _take_over_learning(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None and state.get("average") is not None:
            self.average.module.load_state_dict(state["average"])

    def save_model(self) -> None:
        """Writes the weights that are judged; the first process does it for all."""
        if not self.team.lead:
            return
        left = ("out", "device", "resume", "init", "backbone", "teachers", "workers", "save_every")
        notes = {
            "epochs": self.progress.epoch,
            "size": self.network_size,
            "options": {k: v for k, v in asdict(self.config).items() if k not in left},
            "validation": self.progress.history[-1] if self.progress.history else {},
        }
        self.judged.save(self.out / self.task.file, notes)


def named(path: str, why: str) -> str:
    return why if path in why else f"{path}: {why}"


def _local_world() -> int:
    """Processes of this training on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
