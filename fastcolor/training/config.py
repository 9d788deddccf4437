"""The options of a training run: the command line and the keys of --config files are made from this dataclass."""

from __future__ import annotations

import difflib
import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from fastcolor.training.degrade import Film


class ConfigError(ValueError):
    """An option out of range, or a file of options that cannot be used. The message names it."""


TASKS = ("color", "classify")
HEADS = ("distribution", "regression")
LABELS = ("joint", "separable")
CLASSES = ("auto", "none", "folders")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("cosine", "constant")
RESUME = ("no", "yes", "auto")

_MANY = (1 << 31) - 1

_MODEL, _DATA, _LEARNING, _MACHINE, _RUN = "Model", "Data", "Learning", "Machine", "Run"


def _option(default, help: str, panel: str):
    return field(default=default, metadata={"help": help, "panel": panel})


@dataclass
class TrainConfig:
    """One training run; every field is a flag of `fastcolor train`, and a key of its --config files."""

    task: str = _option("color", "color, or classify (the backbone alone, on folders of classes)", _MODEL)
    head: str = _option(
        "distribution", "distribution (classes over ab colours) or regression (ab by mean squares)", _MODEL
    )
    bins: str = _option("joint", "labels of the distribution head: joint (313) or separable (25 + 25)", _MODEL)
    fusion: bool = _option(True, "global features reach the colour network", _MODEL)
    skip: bool = _option(False, "features of layer1 reach the colour network", _MODEL)
    mrf_sweeps: int = _option(
        0, "sweeps of the mean field between network and loss, trained together; 0 trains the network alone", _MODEL
    )
    backbone: str = _option(
        "", "weights of ResNet-18 to start from: of --task classify, or torchvision's (.pth, .safetensors)", _MODEL
    )
    init: str = _option(
        "", "weights to start from (a model.safetensors of the same head and bins); empty: random", _MODEL
    )
    classes: str = _option(
        "auto",
        "the scene loss beside the colour loss: auto (where train/ and val/ hold the same folders of classes), none, "
        "or folders (wanted: an error where photos lie in no folder)",
        _MODEL,
    )
    class_weight: float = _option(1 / 300, "weight of the scene loss (Iizuka et al. 2016)", _MODEL)

    size: int = _option(256, "side of the square crops, pixels", _DATA)
    crop: float = _option(0.4, "smallest share of the picture's short-side square that a random crop keeps", _DATA)
    val_share: float = _option(0.1, "share of images held out where the folder has no train/ and val/", _DATA)
    degrade: float = _option(
        0.0, "share of the crops whose lightness the network sees as on old film; their colours stay", _DATA
    )
    orthochromatic: float = _option(1.0, "strength, in [0, 1]: emulsions that are blind to red", _DATA)
    blur: float = _option(1.0, "strength: lens and focus", _DATA)
    grain: float = _option(1.0, "strength: the emulsion's", _DATA)
    fading: float = _option(1.0, "strength: contrast and tones that are lost", _DATA)
    scratches: float = _option(1.0, "strength: and dust", _DATA)
    jpeg: float = _option(1.0, "strength: compression of the scan", _DATA)

    epochs: int = _option(100, "passes over the training images", _LEARNING)
    batch_size: int = _option(32, "images a step, of all processes and pieces together", _LEARNING)
    accumulate: int = _option(
        1, "pieces in which a process goes through its part of a batch: less memory, nearly the same step", _LEARNING
    )
    lr: float = _option(1e-3, "peak learning rate of Adam", _LEARNING)
    beta1: float = _option(0.9, "Adam's memory of gradients", _LEARNING)
    beta2: float = _option(0.999, "Adam's memory of their squares", _LEARNING)
    weight_decay: float = _option(0.0, "decoupled, as of AdamW", _LEARNING)
    clip: float = _option(0.0, "largest norm of the gradient; 0 leaves it as it is", _LEARNING)
    schedule: str = _option("cosine", "learning rate: cosine (to 0 at the last step) or constant", _LEARNING)
    warmup: int = _option(200, "steps of linear warm-up, at most a tenth of the run", _LEARNING)
    ema: float = _option(
        0.999, "decay of the average of the weights that is validated and saved, slower in the first steps; 0: none",
        _LEARNING,
    )  # fmt: skip
    rebalance: float = _option(
        0.0,
        "class weights w ∝ (λ p̃ + (1 − λ)/Q)^−1: 0 none, 0.5 those of Zhang et al. 2016, 1 inverse frequency",
        _LEARNING,
    )
    field_rate: float = _option(10.0, "learning rate of the field's parameters, as a multiple of --lr", _LEARNING)
    teachers: str = _option(
        "", "colour models of the same bins to learn from beside the photos, with commas between the files", _LEARNING
    )
    teach: float = _option(0.5, "the teachers' share of the loss, in [0, 1] (Hinton et al. 2015)", _LEARNING)

    precision: str = _option(
        "fp32", "fp32, bf16 (faster where the processor has it) or fp16 (with scaled gradients)", _MACHINE
    )
    compile: bool = _option(False, "the network through torch.compile: slow to start, faster on a GPU", _MACHINE)
    sync_norm: bool = _option(
        True, "batch normalization over the images of all processes, so that they train as one would", _MACHINE
    )
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, mps ...", _MACHINE)
    workers: int = _option(-1, "processes that decode images, for each training process; -1 chooses", _MACHINE)

    seed: int = _option(0, "seed of the split, the weights, the order, the crops and the film", _RUN)
    out: str = _option("runs/fastcolor", "folder of the run: checkpoints, samples, logs", _RUN)
    resume: str = _option(
        "no", "continue the run in --out where it stopped; `--resume auto` starts it where there is none", _RUN
    )
    save_every: float = _option(
        600.0, "seconds between saves inside an epoch: what a crash can cost; 0 saves at ends only", _RUN
    )

    def __post_init__(self):
        if isinstance(self.resume, bool):
            self.resume = "yes" if self.resume else "no"

    @property
    def film(self) -> Film:
        return Film(self.degrade, *(getattr(self, f.name) for f in fields(Film) if f.name != "share"))

    @property
    def teacher_files(self) -> list[str]:
        return [name.strip() for name in self.teachers.split(",")] if self.teachers else []

    def check(self) -> None:
        """Raises ConfigError for the first field that is of another type or out of range."""
        for f in fields(self):
            kind, value = type(f.default), getattr(self, f.name)
            # a whole number is a number; numpy's are none that config.json could keep
            fits = isinstance(value, (int, float) if kind is float else kind)
            if not fits or isinstance(value, bool) is not (kind is bool):
                raise ConfigError(f"{f.name} must be {_KINDS[kind]}, got {value!r}")
            if kind is float and not -sys.float_info.max <= value <= sys.float_info.max:
                raise ConfigError(f"{f.name} must be a finite number, got {value}")
        for name, choices in (("task", TASKS), ("head", HEADS), ("bins", LABELS), ("classes", CLASSES),
                              ("precision", PRECISIONS), ("schedule", SCHEDULES), ("resume", RESUME)):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        # below 64 the last features of a single image are one value, which batch normalization cannot take
        for name, low, high in (
            ("size", 64, 1 << 14), ("epochs", 1, _MANY), ("batch_size", 1, _MANY), ("accumulate", 1, _MANY),
            ("warmup", 0, _MANY), ("workers", -1, 1024), ("mrf_sweeps", 0, 1000), ("clip", 0, None),
            ("weight_decay", 0, None), ("class_weight", 0, None), ("save_every", 0, None), ("field_rate", 0, None),
            ("seed", 0, (1 << 63) - 1),
        ):  # fmt: skip
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}")
            if high is not None and getattr(self, name) > high:
                raise ConfigError(f"{name} must be at most {high}, got {getattr(self, name)}")
        if not self.out:
            raise ConfigError("out must be the name of a folder, got ''")
        if self.mrf_sweeps and self.head != "distribution":
            raise ConfigError(f"mrf_sweeps needs head distribution, got {self.head}: a field has labels to agree on")
        if self.teachers:
            if not all(self.teacher_files):
                raise ConfigError(f"teachers must be files with commas between them, got {self.teachers!r}")
            # a teacher says what a network alone should: through a field that would be another target
            for name, wanted in (("task", "color"), ("head", "distribution"), ("mrf_sweeps", 0)):
                if getattr(self, name) != wanted:
                    raise ConfigError(f"teachers need {name} {wanted}, got {getattr(self, name)}")
        if self.task == "classify" and self.classes == "none":
            raise ConfigError("classes must be auto or folders for task classify, got 'none'")
        if self.lr <= 0:
            raise ConfigError(f"lr must be positive, got {self.lr}")
        for name in ("rebalance", "teach", "degrade", *(f.name for f in fields(Film) if f.name != "share")):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.crop <= 1:
            raise ConfigError(f"crop must be above 0 and at most 1, got {self.crop}")
        if not 0 < self.val_share < 1:
            raise ConfigError(f"val_share must be between 0 and 1, got {self.val_share}")
        for name in ("ema", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.accumulate > self.batch_size:
            raise ConfigError(f"accumulate must be at most batch_size, {self.batch_size}, got {self.accumulate}")

    def differences(self, other: dict) -> list[str]:
        """Fields that decide the course of a run and differ from those in `other`."""
        free = {"epochs", "device", "workers", "out", "resume", "init", "backbone", "save_every", "compile"}
        before = {f.name: other.get(f.name, f.default) for f in fields(self)}  # older runs lack newer options
        return [
            f"{f.name} was {before[f.name]!r}, is {getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name not in free and before[f.name] != getattr(self, f.name)
        ]


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Convolutions and products at a precision of `PRECISIONS`; nothing changes at fp32."""
    enabled = precision != "fp32"
    return torch.autocast(device.type, PRECISIONS[precision] if enabled else None, enabled)


def read_options(path: str | Path) -> dict:
    """Options from a TOML file, or from the config.json of a run: names of `TrainConfig`, and perhaps `data`.

    Raises:
        ConfigError: the file cannot be read, has a name that is none, or a value of another type.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
        found = json.loads(text) if path.suffix == ".json" else _toml().loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # of both decoders, and of UTF-8
        raise ConfigError(
            f"{path}: not a readable {path.suffix.lstrip('.').upper() or 'TOML'} file ({error})"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must be a table of options, got {type(found).__name__}")
    known = {"data": str, **{f.name: type(f.default) for f in fields(TrainConfig)}}
    options = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
            raise ConfigError(f"{path}: unknown option {key!r}; {hint}")
        kind = known[name]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            with suppress(OverflowError):
                value = float(value)
        if not (isinstance(value, kind) or (name == "resume" and isinstance(value, bool))) or (
            kind is int and isinstance(value, bool)
        ):
            raise ConfigError(f"{path}: {key} must be {_KINDS[kind]}, got {value!r}")
        options[name] = value
    return options


_KINDS = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}


def _toml():
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib
