"""The training loop: one command from a folder of photos to a checkpoint, interruptible and exactly resumable."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from fastcolor._files import FolderInUse, FolderLock, atomic_path
from fastcolor.imaging.vips import libvips, reason
from fastcolor.model.field import LEARNED
from fastcolor.training.config import TrainConfig
from fastcolor.training.data import Problems
from fastcolor.training.distributed import Team, team
from fastcolor.training.report import Reporter, Silent, Stop, stop_on_signals
from fastcolor.training.run import Run
from fastcolor.training.state import (
    CONFIG,
    HISTORY,
    STATE,
    TrainingError,
    record_start,
    remove_halves,
    write_json,
)


@dataclass
class Result:
    """What a run leaves: `finished` is False after an interruption."""

    finished: bool
    out: Path
    history: list[dict]
    problems: Problems
    model: Path  # the weights, once there are some


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
    `Colorizer.load` reads; backbone.safetensors with task classify), history.jsonl, samples/*.png, TensorBoard events,
    config.json, and run.json, which says with which versions and on which data the run was started.

    SIGINT and SIGTERM finish the step under way, save and return; a resumed run continues with the very next step.
    Under torchrun every process calls it alike; the first one writes and speaks. One training alone works in a folder.

    Args:
        data: a folder of images, nested or not, or with train/ and val/ inside.
        config: see `TrainConfig`.
        reporter: told about stages, steps and problems.

    Raises:
        ValueError: an option out of range. DataError: nothing to learn from. CheckpointError: weights to start from
        that cannot be used. TrainingError: a run that cannot start or go on.
    """
    reporter = reporter or Silent()
    with team() as members, FolderLock(config.out) as lock:
        if members.share(lambda: Path(config.out).is_dir()):
            _hold(lock, members, reporter)  # before the state is read, which another one may be about to replace
        run = Run(data, config, reporter, members)  # nothing to lose yet: Ctrl-C ends it as usual
        _hold(lock, members, reporter, run)  # where there was no folder: one is made now that the options are good
        try:
            return _drive(run, str(data))
        finally:
            run.learner = None  # DDP holds the group of processes, which ends here


def _hold(lock: FolderLock, members: Team, reporter: Reporter, run: Run | None = None) -> None:
    """Makes the folder of a run this training's alone, for as long as its first process lives."""

    def hold() -> None:
        lock.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            why = lock.hold()
        except FolderInUse as error:
            raise TrainingError(f"{error}; wait for it, or choose another --out") from None
        if run is not None and (run.out / STATE).exists() != run.resumed:
            raise TrainingError(f"{run.out}: another run has been there since this one started; start it again")
        if why and run is not None:
            reporter.say(f"{why}: nothing keeps a second run out of {run.out}")

    members.share(hold)


def _drive(run: Run, data: str) -> Result:
    """Epoch after epoch, to the end or to a signal."""
    out, config, reporter, lead = run.out, run.config, run.reporter, run.team.lead
    _tell_start(run, data)
    _catch_up(run)
    writer = _writer(out, reporter) if lead else None
    result = Result(False, out, run.progress.history, run.problems, out / run.task.file)
    try:
        with stop_on_signals(run.team.world > 1) as stop:
            while run.progress.epoch < config.epochs:
                entry, grid = run_epoch(run, stop)
                if entry is None:
                    reporter.say(f"stopped in epoch {run.progress.epoch + 1}; --resume goes on from here")
                    return result
                _keep(run, entry, grid, writer)
                if run.agree(stop.asked) and run.progress.epoch < config.epochs:
                    reporter.say(f"stopped after epoch {run.progress.epoch}; --resume goes on from here")
                    return result
    finally:
        if writer is not None:
            writer.close()
    result.finished = True
    return result


def _tell_start(run: Run, data: str) -> None:
    """What is known before the first step, said and written."""
    reporter, photos = run.reporter, run.photos
    if not run.team.lead:
        return
    if photos.classes and run.config.task == "color":
        names = ", ".join([*photos.classes[:3], *(["..."] if len(photos.classes) > 3 else [])])
        reporter.say(
            f"{len(photos.classes)} classes by folder ({names}): scene loss × {run.config.class_weight:.3g} beside "
            "that of the colours; --classes none leaves it out"
        )
    if run.teachers:
        reporter.say(f"teachers: {', '.join(run.teachers)}; their share of the loss is {run.config.teach:g}")
    remove_halves(run.out)
    write_json(run.out / CONFIG, {"data": data, **asdict(run.config), "resume": "no"})
    facts = {
        "processes": run.team.world,
        "device": str(run.device),
        "seed": run.config.seed,
        "data": data,
        "fingerprint": photos.fingerprint,
        "train": len(photos.train),
        "val": len(photos.val),
        "classes": len(photos.classes),
        "left_out": run.problems.counts(),
        "teachers": run.teachers,
        "epoch": run.progress.epoch,
        "step": run.progress.step,
    }
    record_start(run.out, facts)


def run_epoch(run: Run, stop: Stop) -> tuple[dict, Tensor | None] | tuple[None, None]:
    """Finishes the epoch under way: its entry in the history, and the samples. None where it was interrupted."""
    progress, started, images = run.progress, time.perf_counter(), run.progress.images
    whole = run.train_epoch(stop)
    seconds = time.perf_counter() - started
    run.save_state()  # before validation, which an interruption leaves out: resumed, it comes first
    found = run.validate(stop) if whole else None
    if found is None:
        return None, None
    run.tell_problems()
    scores, grid = found
    entry = {
        "epoch": progress.epoch + 1,
        "loss": progress.loss_sum / max(1, progress.images),
        **scores,
        "lr": run.optimizer.param_groups[0]["lr"],
        "images_per_second": (progress.images - images) / seconds,
    }
    if run.field is not None:
        entry |= {f"field_{name}": run.judged.field.value(name).item() for name in LEARNED}
    progress.history.append(entry)
    progress.epoch, progress.step, progress.loss_sum, progress.images = progress.epoch + 1, 0, 0.0, 0
    return entry, grid


def _lines(run: Run) -> str:
    return "".join(json.dumps(e) + "\n" for e in run.progress.history)


def _write_model(run: Run) -> None:
    run.save_model()
    with atomic_path(run.out / HISTORY) as temporary:
        temporary.write_text(_lines(run))


def _catch_up(run: Run) -> None:
    """Writes the model of the last epoch, where a run ended between its state and its model."""
    if not run.team.lead or not run.progress.history or run.progress.step:
        return
    history = run.out / HISTORY
    if not (run.out / run.task.file).exists() or not history.exists() or history.read_text() != _lines(run):
        _write_model(run)


def _keep(run: Run, entry: dict, grid: Tensor | None, writer) -> None:
    """Writes what a finished epoch leaves; the state first, so that no failure after it loses the epoch."""
    if not run.team.lead:
        return
    run.save_state()
    _write_model(run)
    if grid is not None:
        save_grid(run.out / "samples" / f"epoch_{entry['epoch']:04d}.png", grid)
    if writer is not None:
        for name, value in entry.items():
            writer.add_scalar(name, value, entry["epoch"])
        if grid is not None:
            writer.add_image("samples", grid, entry["epoch"])
        writer.flush()
    run.reporter.say(
        f"epoch {entry['epoch']}: loss {entry['loss']:.4f}, validation {entry['val_loss']:.4f}, "
        f"{run.task.line(entry)}, {entry['images_per_second']:.1f} images/s"
    )
