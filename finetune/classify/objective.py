"""What is learnt when an encoder is tuned for classification, and what is shown to it.

Legend: B images, C channels, w outputs of the head, k classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from ...data.frames import TrainFrames
from ...data.shards import Sample
from ...engine.errors import UserError
from ...engine.objective import Batch, Objective
from ...pretrain.encoder import Encoder
from ...pretrain.layers import distances
from ..peft.base import Tuned
from .targets import Target
from .teacher import Teacher


@dataclass(frozen=True)
class LabelledFrames:
    """Calling it with a sample and an epoch gives `image` (C, H, W) and `truth`, () or (k,)."""

    frames: TrainFrames
    truth: Mapping[str, Tensor]  # by key

    def __call__(self, sample: Sample, epoch: int) -> dict[str, Any]:
        """A training view and its label."""
        return {**self.frames(sample, epoch), "truth": self.truth[sample.key]}


class Classify(Objective):
    """A tuned encoder and its head, under the loss of the task.

    Args:
        tuned: the encoder with a method on it, and a head of the target's width.
        target: what is predicted.
        weights: (k,) of classes; None: all alike.
        smoothing: of labels.
        mixup: alpha of mixup (Zhang et al. 2018), 0 for none; partners are those of a micro-batch, in reverse.
        teacher: whose answers to the same views are learnt, too; a second loss.
    """

    def __init__(
        self,
        tuned: Tuned,
        target: Target,
        weights: Tensor | None = None,
        smoothing: float = 0.0,
        mixup: float = 0.0,
        teacher: Teacher | None = None,
    ):
        super().__init__()
        self.loss_names = ("class", "teacher") if teacher else ("class",)
        self.loss_weights = (1 - teacher.weight, teacher.weight) if teacher else (1.0,)
        self.teacher = teacher  # no module: it is in no checkpoint, optimiser or group of ranks
        self.tuned, self.target, self.smoothing, self.mixup = tuned, target, smoothing, mixup
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """`image` (B, C, H, W) and `truth` (B,) or (B, k) -> (1,) or (2,) sums of the images' losses."""
        images, truth = batch["image"], batch["truth"]
        if self.mixup:
            share = torch.distributions.Beta(self.mixup, self.mixup).sample().to(images)
            images = share * images + (1 - share) * images.flip(0)
        logits = self.tuned(images)
        told = self.loss(logits, truth)
        if self.mixup:
            told = share * told + (1 - share) * self.loss(logits, truth.flip(0))
        losses = [told] if self.teacher is None else [told, self.teacher.losses(logits, images)]
        return torch.stack(losses).sum(1)

    def loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """(B, w) logits and their labels -> (B,), in fp32 or finer whatever autocast says."""
        with torch.autocast(logits.device.type, enabled=False):
            weights = cast("Tensor | None", self.weights)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return self.target.loss(logits, truth, weights, self.smoothing)

    def counts(self, batch: Batch) -> Tensor:
        """(1,) or (2,) images."""
        images = batch["image"]
        return torch.full((len(self.loss_names),), len(images), dtype=torch.float32, device=images.device)

    def distances(self) -> dict[str, int]:
        """Of the encoder's parameters from the head, for methods that leave the encoder's names as they are."""
        model = self.tuned.model
        return distances(model, "tuned.model.") if isinstance(model, Encoder) else {}


def set_drop_path(vit: Encoder, rate: float) -> None:
    """Stochastic depth that grows with the block, from 0 to `rate` (Huang et al. 2016), as timm builds it.

    Raises:
        UserError: the encoder's blocks have no place for it.
    """
    blocks = list(vit.blocks)
    for i, block in enumerate(blocks):
        places = [name for name in ("drop_path1", "drop_path2") if hasattr(block, name)]
        if not places:
            raise UserError(f"finetune.drop_path: {type(block).__name__} has no stochastic depth; set it to 0")
        for name in places:
            share = rate * i / max(1, len(blocks) - 1)
            setattr(block, name, DropPath(share) if share else nn.Identity())
