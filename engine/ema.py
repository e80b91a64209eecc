"""A moving average of the weights, often better than the weights themselves (Polyak and Juditsky 1992)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of an objective's trainable parameters; buffers and frozen weights are as they are.

    To be made after the objective is moved or sharded: an average lies where its parameter does, and is sharded alike.

    Args:
        decay: share of the average that a step leaves, once warm.
    """

    def __init__(self, objective: nn.Module, decay: float):
        self.decay = decay
        trainable = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        assert all(p.dtype.itemsize >= 4 for p in trainable.values())  # half precision would lose 1 - decay
        self._weights: list[Tensor] = list(trainable.values())
        self.tensors = {name: p.detach().clone() for name, p in trainable.items()}
        """Averages by parameter name; loaded in place."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- d * average + (1 - d) * weights, after the optimizer took `step`, counted from 0."""
        torch._foreach_lerp_(list(self.tensors.values()), self._weights, 1 - self.decay_at(step))

    def decay_at(self, step: int) -> float:
        """min(decay, (1 + step) / (10 + step)): the first weights are soon forgotten (TensorFlow's warm-up)."""
        return min(self.decay, (1 + step) / (10 + step))
