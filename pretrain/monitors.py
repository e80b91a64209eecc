"""What a pretraining has learnt to see: pictures of input, mask and reconstruction at every scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..engine.loop import Batch
from .masking import random_masking, upsample_mask
from .miram import Miram
from .patches import patch_moments, patchify, unpatchify

CAPTION = (
    "For each scale: the truth, what the encoder saw of it, and that with its gaps filled in by the model. "
    "{borrowed}Images of the pretraining set, cropped and masked as in training."
)
NORM_PIX = (
    "The model predicts each patch up to its mean and contrast, which this picture borrows from the truth: "
    "brightness is given, only structure is predicted. "
)


@torch.no_grad()
def reconstructions(model: Miram, batch: Batch) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """For each scale s: s, then (B, s*H, s*W) truth, what of it was visible (NaN elsewhere), the same filled in."""
    ids_keep, mask = random_masking(batch["noise"], model.mask_ratio)
    pictures = []
    for section, prediction in zip(model.scales, model.reconstruct(batch["view/1"], ids_keep), strict=True):
        target = batch[f"view/{section.scale}"]
        patches, grid = (patchify(target, model.p), (model.grid[0] * section.scale, model.grid[1] * section.scale))
        if model.norm_pix:
            mean, std = patch_moments(patches, model.variance_floor)
            prediction = prediction * std + mean
        hidden = upsample_mask(mask, model.grid, section.scale)[..., None]
        seen, filled = patches.masked_fill(hidden, float("nan")), torch.where(hidden, prediction, patches)
        parts = (target, *(unpatchify(x.float(), model.p, grid) for x in (seen, filled)))
        pictures.append((section.scale, *(part[:, 0].cpu() for part in parts)))
    return pictures


def draw_reconstructions(model: Miram, batch: Batch, path: Path) -> None:
    """A row an image: target, visible part and reconstruction at every scale, in one grey scale a row."""
    columns = [
        (f"{name}, scale {scale}", images)
        for scale, *parts in reconstructions(model, batch)
        for name, images in zip(("truth", "seen", "filled in"), parts, strict=True)
    ]
    rows = len(columns[0][1])
    figure = Figure(figsize=(2.1 * len(columns), 2.1 * rows * _aspect(columns) + 0.4), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for row in range(rows):
        low, high = torch.quantile(columns[0][1][row], torch.tensor([0.0, 0.999])).tolist()
        for axis, (name, images) in zip(axes[row], columns, strict=True):
            axis.set(xticks=[], yticks=[], facecolor="#c9d3de")
            axis.imshow(images[row].numpy(), cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
            axis.set_title(name if row == 0 else "", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _aspect(columns: Sequence[tuple[str, Tensor]]) -> float:
    return columns[0][1].shape[1] / columns[0][1].shape[2]


def caption(model: Miram) -> str:
    """What the picture shows, and what of it is borrowed."""
    return CAPTION.format(borrowed=NORM_PIX if model.norm_pix else "")
