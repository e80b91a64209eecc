"""Logits of whole images: what a model says of an image's frames, averaged.

Legend: n images, w outputs of the head, B frames at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...data.frames import frames
from ...data.shards import ShardDataset
from ...data.views import Normalisation
from ...engine.launch import device
from ...engine.metrics import Floats, Ints
from ...pretrain.features import batched, image_means


def frame_logits(
    model: nn.Module,
    shards: ShardDataset,
    rows: Ints,
    input: Literal["whole", "windows"],
    size: tuple[int, int],
    normalise: Normalisation,
    batch_size: int,
) -> Floats:
    """(n, w) logits of images, in the order of `rows`: the mean over an image's frames.

    Args:
        model: frames (B, C, H, W) -> (B, w). It is put on the accelerator, and left in the mode it was in.
        shards: the samples.
        rows: (n,) which of them.
        input: what a frame is (data/frames.py).
        size: height and width of a frame.
        normalise: of the encoder, never of these images: what is said of one must not depend on the others.
        batch_size: frames at once. It changes nothing but the last bits.
    """
    pictures = (frames(shards[int(row)], size, normalise, input) for row in rows)
    return mean_logits(model, pictures, len(rows), batch_size)


@torch.inference_mode()
def mean_logits(model: nn.Module, pictures: Iterable[Tensor], n: int, batch_size: int) -> Floats:
    """(n, w) logits of n images that come as (K, C, H, W) frames each: the mean over them."""
    model, training = model.to(device()), model.training
    parts = (("frame", i, frame) for i, several in enumerate(pictures) for frame in several)
    try:
        model.eval()
        told: list[tuple[list[int], NDArray[np.float32]]] = [
            (owners, model(batch.to(device())).float().cpu().numpy()) for _, owners, batch in batched(parts, batch_size)
        ]
    finally:
        model.train(training)
    return image_means(told, n, told[0][1].shape[1]).astype(np.float64)
