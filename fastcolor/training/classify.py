"""What a run learns with --task classify: ResNet-18 on lightness, from folders of classes. The backbone of colours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcolor.model.backbone import save_backbone, start_backbone
from fastcolor.model.resnet import ResNet18Gray, normalize_lightness
from fastcolor.ops.lab import rgb_to_lab
from fastcolor.training.config import TrainConfig, autocast
from fastcolor.training.data import Batch
from fastcolor.training.degrade import degrade


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Whether the class of each image [B] is the best of its scores [B, classes], and among the best five: 1 or 0."""
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return {"val_top1": best[:, 0].double(), "val_top5": best.any(1).double()}


def compiled(function: Callable[[Tensor], Tensor], sizes: set[int]) -> Callable[[Tensor], Tensor]:
    """`function` of a batch through torch.compile where it learns from one of these many images; as it is for others,
    such as the last ones of an epoch, for which compiling again (minutes) would not pay."""
    fast = torch.compile(function, dynamic=False)
    return lambda x: fast(x) if torch.is_grad_enabled() and len(x) in sizes else function(x)


class ClassTask(nn.Module):
    """Crops to the cross-entropy of their classes."""

    file = "backbone.safetensors"
    field = bins = prior = teachers = None  # nothing of a colour run

    def __init__(self, config: TrainConfig, classes: tuple[str, ...]):
        super().__init__()
        self.config, self.film, self.classes = config, config.film, classes
        self.network = ResNet18Gray(len(classes))
        self._compiled = None

    def start(self, config: TrainConfig) -> str:
        """Takes over the weights of a file; what there is to say about it.

        Raises:
            CheckpointError: no such file, or one of another network.
        """
        path = config.backbone or config.init
        if not path:
            return ""
        left_out = start_backbone(self.network, path, self.classes)
        return f"backbone from {path}" + (", without its classifier" if left_out else "")

    def compile(self, sizes: set[int]) -> None:
        """From now on the network learns through torch.compile from batches of these sizes."""
        self._compiled = compiled(self.network, sizes)

    def _scores(self, rgb: Tensor, seeds: Tensor | None) -> Tensor:
        L = rgb_to_lab(rgb, channels_last=True).permute(0, 3, 1, 2)[:, :1].contiguous()
        if self.training and seeds is not None and self.film.share > 0:
            L = degrade(rgb, L, seeds, self.film)
        network = self._compiled or self.network
        with autocast(self.config.precision, L.device):
            return network(normalize_lightness(L).contiguous(memory_format=torch.channels_last)).float()

    def forward(self, rgb: Tensor, seeds: Tensor | None, labels: Tensor) -> Tensor:
        """The mean loss of crops [B, H, W, 3] uint8 with labels [B] int64."""
        return F.cross_entropy(self._scores(rgb, seeds), labels)

    @torch.no_grad()
    def measure(self, batch: Batch) -> tuple[dict[str, Tensor], None]:
        """Of each image of a batch on the device: values [B]; there is nothing to show."""
        scores = self._scores(batch.rgb, None)
        values = {"val_loss": F.cross_entropy(scores, batch.labels, reduction="none"), **accuracy(scores, batch.labels)}
        return values, None

    def save(self, path: Path, notes: dict) -> None:
        save_backbone(path, self.network, self.classes, notes)

    @staticmethod
    def line(entry: dict) -> str:
        """One finished epoch in words."""
        return f"top-1 {entry['val_top1']:.1%}, top-5 {entry['val_top5']:.1%}"
