"""Trained colour networks that a run learns from beside the photos: Hinton et al. 2015, arXiv 1503.02531."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastcolor.bins import ColorBins
from fastcolor.model.checkpoint import CheckpointError, load_checkpoint
from fastcolor.training.config import autocast


class Teachers:
    """Networks that give their mean distribution over the labels. No module, so that they are no part of a task's
    parameters, statistics and state: nothing learns, averages, saves or sends them.

    Args:
        paths: files of colour models, at least one.
        bins: the labels of the run, which must be theirs. precision: of `PRECISIONS`.

    Raises:
        CheckpointError: no such file, or one of a network that cannot teach this run.
    """

    def __init__(self, paths: list[str], bins: ColorBins, precision: str, device: torch.device):
        self.bins, self.precision = bins, precision
        self.networks: list[nn.Module] = []
        self.files: dict[str, str] = {}  # path to the hash of what is in it
        for path in paths:
            checkpoint = load_checkpoint(path)
            config = checkpoint.network.config
            if config.head != "distribution" or config.bins != bins:
                found = f"head distribution over {config.bins}" if config.head == "distribution" else "head regression"
                raise CheckpointError(f"{path}: a teacher must have head distribution over {bins}, got {found}")
            if checkpoint.mrf:
                # its scores are what a field starts from: alone they are not the distribution it was trained to give
                raise CheckpointError(f"{path}: a teacher must be trained as a network alone, got one with a field")
            network = checkpoint.network.requires_grad_(False)
            self.networks.append(network.to(device, memory_format=torch.channels_last))
            self.files[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]

    def __deepcopy__(self, memo: dict) -> Teachers:
        return self  # they never change: the average of a task's weights needs no second ones

    @property
    def bytes(self) -> int:
        """What their weights take."""
        return sum(p.numel() * p.element_size() for network in self.networks for p in network.parameters())

    @torch.no_grad()
    def __call__(self, L: Tensor) -> Tensor:
        """L [B, 1, H, W] to the mean of their distributions [B, K, ⌈H/4⌉, ⌈W/4⌉], float32; each group of labels has a
        sum of 1."""
        mean = None
        for network in self.networks:
            with autocast(self.precision, L.device):
                logits = network(L)
            mean = torch.zeros_like(logits, dtype=torch.float32) if mean is None else mean
            for place, _ in self.bins.groups():
                mean[:, place] += logits[:, place].float().softmax(1)
        return mean.div_(len(self.networks))


def soft_cross_entropy(logits: Tensor, target: Tensor, bins: ColorBins) -> Tensor:
    """−Σ_k p_k log softmax(u)_k, the mean over the pixels; of separable bins the sum of both groups' own.

    Only its gradient is kept for the backward, N·K numbers of the logits' type for N pixels; the forward goes through
    two or three times as many floats.

    Args:
        logits: [B, K, H, W], floating. target: [B, K, H, W] distributions; no gradient goes there.

    Returns:
        a scalar; float64 for float64 logits, else float32.
    """
    return _SoftCrossEntropy.apply(logits, target, bins)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, bins):
        ctx.pixels = logits[:, 0].numel()
        loss, grad = 0.0, torch.empty_like(logits)
        for place, _ in bins.groups():
            wide = logits[:, place] if logits.dtype == torch.float64 else logits[:, place].float()
            scores = wide.log_softmax(1)
            loss = loss - (scores * target[:, place]).sum(1).mean()
            # of the sum over pixels: in float16 a mean's would vanish before a gradient scaler's factor reaches it
            grad[:, place] = scores.exp_().sub_(target[:, place])
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (grad,) = ctx.saved_tensors
        return grad * (upstream / ctx.pixels), None, None
