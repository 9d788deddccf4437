"""The moving average of a network's weights: what is validated and saved."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of all weights and statistics of a module, on its device.

    After update n (from 0) the decay is min(decay, (1 + n) / (20 + n)): the average spans about a twentieth of the
    steps so far, and at most 1 / (1 − decay) of them. Twice that span lagged a little in a run of 336 steps.

    Args:
        module: copied as it is, weights included.
        decay: in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = copy.deepcopy(module).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, module: nn.Module, n: int) -> None:
        """Takes in the weights after update n."""
        share = 1 - min(self.decay, (1 + n) / (20 + n))
        ours, theirs = self._tensors(self.module), self._tensors(module)
        torch._foreach_lerp_(ours, theirs, share)

    @staticmethod
    def _tensors(module: nn.Module) -> list[Tensor]:
        # statistics too: those of the normalization belong to the weights they were measured with
        found = (*module.parameters(), *module.buffers())
        return [x.detach() for x in found if x.is_floating_point()]
