"""What a pretraining has learnt to see: reconstructions at every scale, or the pairs of views it compares."""

from __future__ import annotations

import torch
from torch import Tensor

from ...engine.objective import Batch
from ..config import ScaleSection
from ..miram import Miram
from ..patches import patch_moments, patchify, unpatchify
from .drawing import Panel, Picture, draw, grey_range

CAPTION = (
    "Input: what the encoder saw; what it did not see is pale blue. For each scale: the prediction{where}, the same "
    "set into the gaps of the truth, and the truth{upsampled}. {borrowed}Images of the pretraining set, cropped and "
    "masked as in training."
)
NORM_PIX = (
    "The model predicts each patch up to its mean and contrast, which this picture borrows from the truth: "
    "brightness is given, only structure is predicted, and the coarse blocks would be there without any training. "
)
PAIRS = (
    "The two views of an image that the model learns to tell from those of other images. "
    "Images of the pretraining set, cropped and changed as in training, in one range of grey a row."
)


def reconstructions(model: Miram, batch: Batch) -> dict[str, Tensor]:
    """By title: (B, C, H, W) input, NaN where hidden; of every scale the (B, C, s*H, s*W) of `reconstruction`."""
    ids_keep, mask = model.masks(batch)
    seen = patchify(batch["view/1"], model.p).masked_fill(mask[..., None], torch.nan)
    columns = {"input": unpatchify(seen, model.p, model.grid)}
    for section, y in zip(model.scales, model.reconstruct(batch["view/1"], ids_keep), strict=True):
        for title, images in reconstruction(model, section, y.float(), batch, mask).items():
            columns[f"{title}, scale {section.scale}"] = images
    return columns


def reconstruction(model: Miram, section: ScaleSection, y: Tensor, batch: Batch, mask: Tensor) -> dict[str, Tensor]:
    """(B, N, P*P*C) predicted patches as images in the truth's grey levels, NaN where the loss asks for none."""
    P, grid, truth = model.patch_of(section), model.grid_of(section), model.target_image(section, batch)
    patches, hidden = patchify(truth, P), model.fine_mask(section, mask)[..., None]
    if model.norm_pix:
        mean, std = patch_moments(patches, model.variance_floor)
        y = y * std + mean
    asked = y if section.loss_on == "all" else y.masked_fill(~hidden, torch.nan)
    filled = torch.where(hidden, y, patches)
    return {"prediction": unpatchify(asked, P, grid), "filled in": unpatchify(filled, P, grid), "truth": truth}


def picture_of_reconstructions(model: Miram, batch: Batch) -> Picture:
    """A row an image, in one range of grey: input, then prediction, filled in and truth of every scale."""
    count = len(batch["view/1"])
    tensors = {name: values for name, values in batch.items() if isinstance(values, Tensor)}
    # One by one: every tile is decoded, also where a training, short of memory, decodes some.
    singles = [reconstructions(model, {k: v[i : i + 1] for k, v in tensors.items()}) for i in range(count)]
    ranges = grey_range(batch["view/1"])
    columns = {title: torch.cat([single[title].cpu() for single in singles]) for title in singles[0]}
    panels = [Panel(title, images, ranges) for title, images in columns.items()]
    return Picture("reconstructions", draw(panels), caption(model))


def caption(model: Miram) -> str:
    """What the picture shows, and what of it is borrowed."""
    enlarged = model.target == "upsampled" and any(section.scale > 1 for section in model.scales)
    return CAPTION.format(
        where=" (pale blue where its loss asks for none)"
        if any(section.loss_on == "masked" for section in model.scales)
        else "",
        upsampled=" (of finer scales the input enlarged: it holds no finer detail)" if enlarged else "",
        borrowed=NORM_PIX if model.norm_pix else "",
    )


def picture_of_pairs(batch: Batch) -> Picture:
    """A row an image: its views side by side."""
    views = {name: images for name, images in batch.items() if name.startswith("view/")}
    both = torch.cat(list(views.values()), dim=-1)
    panels = [Panel(name.replace("/", " "), images, grey_range(both)) for name, images in sorted(views.items())]
    return Picture("views", draw(panels), PAIRS)
