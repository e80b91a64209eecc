"""What is learnt when an image is segmented.

Cross-entropy or focal loss of every pixel, and Dice of every image (MONAI's). Dice alone would not do: of an image with
nothing on it its gradient is next to zero, so it never teaches a model to be silent, and over a whole batch it hides a
small lesion behind a large one.

Legend: B images, K classes, H W of a crop.
"""

from __future__ import annotations

from typing import Literal

import torch
from monai.losses.dice import DiceLoss
from monai.losses.focal_loss import FocalLoss
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.findings import IGNORED
from ...engine.objective import Batch, Objective
from ...pretrain.encoder import Encoder
from ...pretrain.layers import distances
from .decoders import EncoderDecoder

SMOOTH = 1.0  # pixels added above and below: where there is nothing and nothing is said, nothing is lost


class Segment(Objective):
    """A model under the loss of pixels and the Dice of images.

    Args:
        model: images (B, C, H, W) -> logits (B, K, H, W).
        loss: of pixels; focal as Lin et al. 2017, with gamma 2.
        dice: weight of the Dice loss.
    """

    loss_names = ("pixels", "dice")

    def __init__(self, model: nn.Module, loss: Literal["ce", "focal"] = "ce", dice: float = 1.0):
        super().__init__()
        self.model, self.loss, self.loss_weights = model, loss, (1.0, dice)
        self.dice = DiceLoss(
            include_background=False,
            to_onehot_y=True,
            softmax=True,
            reduction="none",
            smooth_nr=SMOOTH,
            smooth_dr=SMOOTH,
            ignore_index=IGNORED,
        )
        self.focal = FocalLoss(to_onehot_y=True, use_softmax=True, reduction="none", ignore_index=IGNORED)

    def forward(self, batch: Batch) -> Tensor:
        """`image` (B, C, H, W) and `mask` (B, H, W) of class numbers -> (2,) sums over images."""
        logits = self.model(batch["image"])
        with torch.autocast(logits.device.type, enabled=False):
            return self.losses(logits.float(), batch["mask"]).sum(1)

    def losses(self, logits: Tensor, mask: Tensor) -> Tensor:
        """(B, K, H, W) logits and (B, H, W) class numbers -> (2, B): pixels and Dice of each image."""
        dice = self.dice(logits, mask[:, None]).flatten(1).mean(1)
        return torch.stack([self.pixels(logits, mask), dice])

    def pixels(self, logits: Tensor, mask: Tensor) -> Tensor:
        """(B,) mean loss of the pixels that count."""
        if self.loss == "focal":
            each = self.focal(logits, mask[:, None]).sum(1)
        else:
            each = F.cross_entropy(logits, mask, ignore_index=IGNORED, reduction="none")
        return each.flatten(1).sum(1) / (mask != IGNORED).flatten(1).sum(1).clamp(min=1)

    def counts(self, batch: Batch) -> Tensor:
        """(2,) images."""
        images = batch["image"]
        return torch.full((2,), len(images), dtype=torch.float32, device=images.device)

    def distances(self) -> dict[str, int]:
        """Of the encoder's parameters from the decoder, for methods that leave the encoder's names as they are."""
        if isinstance(self.model, EncoderDecoder) and isinstance(encoder := self.model.taps.tuned.model, Encoder):
            return distances(encoder, "model.taps.tuned.model.")
        return {}
