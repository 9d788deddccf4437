"""What a run would be, before it is one."""

from __future__ import annotations

from pathlib import Path

from fastcolor.model.network import count_parameters
from fastcolor.training import memory
from fastcolor.training.config import TrainConfig
from fastcolor.training.report import Reporter
from fastcolor.training.run import Run
from fastcolor.training.state import STATE, Progress, TrainingError, read_state


def dry_run(data: str | Path, config: TrainConfig, reporter: Reporter) -> None:
    """Says what a run would be: model, data, the memory of a step, measured on crops of noise, and whether its folder
    holds a run. Writes nothing.

    Raises:
        as `train`.
    """
    run = Run(data, config, reporter, dry=True)
    photos, say = run.photos, reporter.say
    say(f"model: {_model_words(run)}, {count_parameters(run.task) / 1e6:.2f} M parameters")
    say(f"data: {len(photos.train)} to train on, {len(photos.val)} to check with, {len(photos.classes)} classes")
    if not run.problems.reasons:
        say("left out: none by their headers (pixels are looked at when they are needed)")
    say(f"steps: {run.steps_per_epoch} an epoch, {run.steps_per_epoch * config.epochs} in all")
    run.task.train()
    need = memory.step_need(run.task, config.size, run.device)
    weights = memory.weights_bytes(run.task, 4 + (run.average is not None))
    # the teachers' weights are there already, and no part of what is free
    taught = run.task.teachers.bytes if run.teachers else 0
    images = -(-config.batch_size // config.accumulate)
    total, free = weights + taught + need.of(images), memory.free_bytes(run.device)
    say(
        f"memory: about {_megabytes(total)} on {run.device}: weights, gradients and averages {_megabytes(weights)}, "
        f"{f'teachers {_megabytes(taught)}, ' if taught else ''}"
        f"{images} crops of {config.size} pixels at once {_megabytes(need.of(images))} ({_megabytes(need.image)} each)"
    )
    if free is not None:
        fits = need.fits(free - weights)
        say(f"free: {_megabytes(free)}, for about {fits} crops at once" + ("" if fits >= images else ": too few"))
    _tell_folder(run)


def _tell_folder(run: Run) -> None:
    """What the folder of the run has already, and what would come of it."""
    path, resume, say = run.out / STATE, run.config.resume, run.reporter.say
    if not path.exists():
        if resume == "yes":
            say(f"folder: {run.out} holds no run: --resume alone is refused; --resume auto, or none, starts one")
        return
    if run.resumed:
        done = run.progress
        where = f"it would go on with epoch {done.epoch + 1}, step {done.step + 1}"
        say(f"folder: {run.out} holds a run: {where if done.epoch < run.config.epochs else 'all its epochs are done'}")
        return
    try:
        done = Progress(**read_state(path)["progress"])
        stands = f"a run, {done.epoch} epochs and {done.step} steps of the next one done"
    except (TrainingError, TypeError):
        stands = f"a run, but {STATE} is not readable, and --resume would fail"
    say(
        f"folder: {run.out} holds {stands}: without --resume a start is refused and nothing is overwritten; --resume "
        "goes on with it, with its options where no others are given; another --out starts a new one"
    )


def _model_words(run: Run) -> str:
    if run.config.task == "classify":
        return "ResNet-18 on lightness"
    config = run.network.config
    parts = [config.head + (f" over {config.bins.count} labels" if run.bins is not None else "")]
    parts += [name for name in ("fusion", "skip") if getattr(config, name)]
    parts += [f"field of {run.config.mrf_sweeps} sweeps"] if run.field is not None else []
    return "ResNet-18 and colour network, " + ", ".join(parts)


def _megabytes(count: float) -> str:
    return f"{count / 2**20:.0f} MB" if count < 10 * 2**30 else f"{count / 2**30:.1f} GB"
