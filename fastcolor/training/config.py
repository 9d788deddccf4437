"""The options of a training run. The command line is made from this dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


class ConfigError(ValueError):
    """An option out of range. The message names it."""


PRECISIONS = ("fp32", "bf16")
SCHEDULES = ("cosine", "constant")


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """One training run; every field is a flag of `fastcolor train`."""

    head: str = _option("distribution", "distribution (classes over ab colours) or regression (ab by mean squares)")
    bins: str = _option("joint", "labels of the distribution head: joint (313) or separable (25 + 25)")
    size: int = _option(256, "side of the square crops, pixels")
    epochs: int = _option(100, "passes over the training images")
    batch_size: int = _option(32, "images a step")
    lr: float = _option(1e-3, "peak learning rate of Adam")
    schedule: str = _option("cosine", "learning rate: cosine (to 0 at the last step) or constant")
    warmup: int = _option(200, "steps of linear warm-up, at most a tenth of the run")
    rebalance: float = _option(
        0.0, "class weights w ∝ (λ p̃ + (1 − λ)/Q)^−1: 0 none, 0.5 those of Zhang et al. 2016, 1 inverse frequency"
    )
    mrf_sweeps: int = _option(
        0, "sweeps of the mean field between network and loss, trained together; 0 trains the network alone"
    )
    init: str = _option("", "weights to start from (a model.safetensors of the same head and bins); empty: random")
    crop: float = _option(0.4, "smallest share of the picture's short-side square that a random crop keeps")
    precision: str = _option("fp32", "fp32 or bf16 (faster where the processor has bf16 instructions)")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, mps ...")
    workers: int = _option(-1, "processes that decode images; -1 chooses")
    val_share: float = _option(0.1, "share of images held out where the folder has no train/ and val/")
    seed: int = _option(0, "seed of the split, the weights, the order and the crops")
    out: str = _option("runs/fastcolor", "folder of the run: checkpoints, samples, logs")
    resume: bool = _option(False, "continue the run in --out where it stopped")

    def check(self) -> None:
        """Raises ConfigError for the first field that is out of range."""
        for name, choices in (("head", ("distribution", "regression")), ("bins", ("joint", "separable")),
                              ("precision", PRECISIONS), ("schedule", SCHEDULES)):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        # below 64 the last features of a single image are one value, which batch normalization cannot take
        for name, low in (("size", 64), ("epochs", 1), ("batch_size", 1), ("warmup", 0), ("workers", -1),
                          ("mrf_sweeps", 0)):  # fmt: skip
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.mrf_sweeps and self.head != "distribution":
            raise ConfigError(f"mrf_sweeps needs head distribution, got {self.head}: a field has labels to agree on")
        if not self.lr > 0:
            raise ConfigError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.rebalance <= 1:
            raise ConfigError(f"rebalance must be between 0 and 1, got {self.rebalance}")
        if not 0 < self.crop <= 1:
            raise ConfigError(f"crop must be above 0 and at most 1, got {self.crop}")
        if not 0 < self.val_share < 1:
            raise ConfigError(f"val_share must be between 0 and 1, got {self.val_share}")

    def differences(self, other: dict) -> list[str]:
        """Fields that decide the course of a run and differ from those in `other`."""
        free = {"epochs", "device", "workers", "out", "resume", "init"}
        before = {f.name: other.get(f.name, f.default) for f in fields(self)}  # older runs lack newer options
        return [
            f"{f.name} was {before[f.name]!r}, is {getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name not in free and before[f.name] != getattr(self, f.name)
        ]
