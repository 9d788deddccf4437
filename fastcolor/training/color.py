"""What a run learns with --task color: the network (and the field), its loss, what it is measured by, its file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcolor.bins import ColorBins
from fastcolor.evaluation.metrics import colorfulness, psnr
from fastcolor.model.backbone import start_backbone
from fastcolor.model.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from fastcolor.model.field import field_options, learnable_field, log_marginals
from fastcolor.model.network import AB_SCALE, ColorNetwork, NetworkConfig, pool_to
from fastcolor.ops.cross_entropy import color_cross_entropy
from fastcolor.ops.head_cross_entropy import head_cross_entropy
from fastcolor.ops.lab import lab_to_rgb, rgb_to_lab
from fastcolor.ops.mean_field import annealed_mean
from fastcolor.training.classify import accuracy, compiled
from fastcolor.training.config import TrainConfig, autocast
from fastcolor.training.data import Batch
from fastcolor.training.degrade import degrade
from fastcolor.training.teachers import Teachers, soft_cross_entropy

_TEMPERATURE = 0.38


def split_lab(rgb: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """uint8 crops [B, H, W, 3] to L [B, 1, H, W] and the mean ab [B, 2, ⌈H/stride⌉, ⌈W/stride⌉] of the output grid."""
    L, ab = rgb_to_lab(rgb, channels_last=True).permute(0, 3, 1, 2).split((1, 2), dim=1)
    return L.contiguous(), pool_to(ab, stride)


def predict_ab(output: Tensor, bins: ColorBins | None, temperature: float = _TEMPERATURE) -> Tensor:
    """The network's output to ab at its own grid: the annealed mean of logits, or the regression itself."""
    return output.float() if bins is None else annealed_mean(output, temperature, bins, logits=True)


class ColorTask(nn.Module):
    """Crops to the loss of their colours, with that of their scenes where the folders name these."""

    file = "model.safetensors"

    def __init__(self, config: TrainConfig, classes: tuple[str, ...]):
        super().__init__()
        self.config, self.film = config, config.film
        bins = ColorBins(config.bins)
        self.network = ColorNetwork(NetworkConfig(config.head, bins, config.fusion, classes, config.skip))
        for parameter in self.network.unused():
            parameter.requires_grad_(False)
        self.field = learnable_field(bins, config.mrf_sweeps) if config.mrf_sweeps else None
        self.bins = bins if config.head == "distribution" else None
        self.prior: Tensor | None = None  # [K] float64
        self.weights: Tensor | None = None  # [K], of rebalancing
        self.teachers: Teachers | None = None  # of the training alone: `loss` knows nothing of them
        self._features, self._whole = None, None  # compiled, where that is wanted

    def start(self, config: TrainConfig) -> str:
        """Takes over weights of other runs, as the configuration says; what there is to say about it.

        Raises:
            CheckpointError: no such file, or one of another network.
        """
        if config.backbone:
            left_out = start_backbone(self.network.backbone, config.backbone, self.network.config.classes)
            return f"backbone from {config.backbone}" + (", without its classifier" if left_out else "")
        if config.init:
            self._start_from(config.init)
            return f"starts from {config.init}"
        return ""

    def _start_from(self, path: str) -> None:
        """Takes over a network, and the field that was trained with it."""
        start = load_checkpoint(path)
        found, ours = start.network.config.to_dict(), self.network.config.to_dict()
        # a skip connection starts at zero, and a classifier of its own can be learned: both may be new
        new = {"classes"} | ({"skip"} if ours["skip"] else set())
        different = [
            f"{name} is {found[name]!r}, not {ours[name]!r}"
            for name in ours
            if found[name] != ours[name] and name not in new
        ]
        if different:
            raise CheckpointError(f"{path}: cannot start from another network: {'; '.join(different)}")
        state = start.network.state_dict()
        if found["classes"] != ours["classes"]:
            state = {n: v for n, v in state.items() if not n.startswith("backbone.fc.")}
        self.network.load_state_dict(state, strict=False)
        if self.field is not None:
            self.field = learnable_field(self.bins, self.config.mrf_sweeps, start.mrf)

    def set_prior(self, prior: Tensor) -> None:
        """Label probabilities of the training set, [K] float64: for rebalancing, and for the file."""
        self.prior = prior
        if self.config.rebalance > 0:
            device = next(self.network.parameters()).device
            self.weights = self.bins.rebalancing_weights(prior, 1 - self.config.rebalance).float().to(device)

    def compile(self, sizes: set[int]) -> None:
        """From now on the network learns through torch.compile from batches of these sizes."""
        if self._wants_output:
            self._whole = compiled(self.network.forward_with_classes, sizes)
        else:
            self._features = compiled(self.network.features_with_classes, sizes)

    # --- loss ----------------------------------------------------------------------------------------------------

    @property
    def _wants_output(self) -> bool:
        """Whether training needs the network's whole output at once."""
        return self.bins is None or self.field is not None or self.teachers is not None

    def forward(self, rgb: Tensor, seeds: Tensor, labels: Tensor) -> Tensor:
        """The training loss. Where nothing else wants the logits, they never exist all at once.

        Args:
            rgb: [B, H, W, 3] uint8. seeds: [B] int64, of the film. labels: [B] int64.

        Returns:
            a scalar, the mean over the images.
        """
        if self.teachers is not None:
            return self._taught(rgb, seeds, labels)
        if self._wants_output:
            return self.loss(rgb, seeds, labels)[0]
        L, ab = self._seen(rgb, seeds)
        with autocast(self.config.precision, L.device):
            features, scores = (self._features or self.network.features_with_classes)(L)
        head = self.network.head
        loss = head_cross_entropy(features, head.weight, head.bias, ab, bins=self.bins, weights=self.weights)
        return self._with_scene(loss, scores, labels)

    def loss(
        self, rgb: Tensor, seeds: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss of crops, the network's output (with a field, the logarithm of its marginals), and class scores."""
        loss, output, scores = self._colors(rgb, seeds)
        return self._with_scene(loss, scores, labels), output, scores

    def _taught(self, rgb: Tensor, seeds: Tensor, labels: Tensor) -> Tensor:
        """The training loss with teachers, who see the crop as it is, whatever the film does to it."""
        target = self.teachers(self._seen(rgb, None)[0])  # before the network's own activations need memory
        loss, output, scores = self._colors(rgb, seeds)
        share = self.config.teach
        loss = (1 - share) * loss + share * soft_cross_entropy(output, target, self.bins)
        return self._with_scene(loss, scores, labels)

    def _colors(self, rgb: Tensor, seeds: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `loss`, without the scenes in it."""
        L, ab = self._seen(rgb, seeds)
        with autocast(self.config.precision, L.device):
            output, scores = (self._whole or self.network.forward_with_classes)(L)
        if self.bins is None:
            # ab scaled to a range of 1, as Melas-Kyriazi and Han 2017 report their errors
            loss = F.mse_loss(output.float() / (2 * AB_SCALE), ab / (2 * AB_SCALE))
        else:
            if self.field is not None:
                output = log_marginals(self.field(output.float(), pool_to(L, self.network.stride)))
            loss = color_cross_entropy(output, ab, bins=self.bins, weights=self.weights)
        return loss, output, scores

    def _seen(self, rgb: Tensor, seeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """L as the network gets it, degraded in training, and the ab to be learned, which no film touches."""
        L, ab = split_lab(rgb, self.network.stride)
        if self.training and seeds is not None and self.film.share > 0:
            L = degrade(rgb, L, seeds, self.film)
        return L.contiguous(memory_format=torch.channels_last), ab

    def _with_scene(self, loss: Tensor, scores: Tensor | None, labels: Tensor | None) -> Tensor:
        if scores is None or labels is None:
            return loss
        return loss + self.config.class_weight * F.cross_entropy(scores.float(), labels)

    # --- measures and files --------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Of each image of a batch on the device: values [B], and pictures [B, 3, H, 3 W] uint8, which show grey,
        prediction and truth side by side."""
        loss, output, scores = self.loss(batch.rgb, None, batch.labels)
        truth = batch.rgb.permute(0, 3, 1, 2)
        L = rgb_to_lab(truth)[:, :1]
        ab = F.interpolate(predict_ab(output, self.bins), truth.shape[-2:], mode="bilinear", align_corners=False)
        color = lab_to_rgb(torch.cat((L, ab), 1), dtype=torch.uint8)
        grey = lab_to_rgb(torch.cat((L, torch.zeros_like(ab)), 1), dtype=torch.uint8)
        # without any error it counts as 100 dB, so that the mean stays finite
        values = {
            "val_loss": loss.expand(len(truth)),
            "val_psnr": psnr(color, truth).clamp_max(100),
            "val_psnr_grey": psnr(grey, truth).clamp_max(100),
            "val_colorfulness": colorfulness(color),
            "val_colorfulness_truth": colorfulness(truth),
        }
        if scores is not None:
            values |= accuracy(scores, batch.labels)
        return values, torch.cat((grey, color, truth), dim=3)

    def save(self, path: Path, notes: dict) -> None:
        options = {} if self.field is None else field_options(self.field)
        save_checkpoint(path, Checkpoint(self.network, self.prior, notes, options))

    @staticmethod
    def line(entry: dict) -> str:
        """One finished epoch in words."""
        scene = f", top-1 {entry['val_top1']:.1%}" if "val_top1" in entry else ""
        return (
            f"PSNR {entry['val_psnr']:.2f} dB (grey {entry['val_psnr_grey']:.2f}), "
            f"colourfulness {entry['val_colorfulness'] / max(entry['val_colorfulness_truth'], 1e-9):.0%}{scene}"
        )
