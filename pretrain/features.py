"""One feature for a whole image, as monitors and probes both mean it: the mean over windows that cover the image.

Legend: n images, D features, W windows of one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.shards import Sample
from ..data.views import windows
from .encoder import Encoder, normalisation

Windows = tuple[list[int], Tensor]  # the number of the image that each window is of, and (W, C, height, width)


def window_batches(vit: Encoder, samples: Iterable[Sample], batch_size: int) -> Iterator[Windows]:
    """Windows of all samples, of the encoder's input size, a fixed number at once."""
    normalise = normalisation(vit)
    owners: list[int] = []
    waiting: list[Tensor] = []
    for i, sample in enumerate(samples):
        parts = windows(sample, vit.patch_embed.img_size, normalise)
        owners += [i] * len(parts)
        waiting += parts
        while len(waiting) >= batch_size:
            yield owners[:batch_size], torch.stack(waiting[:batch_size])
            owners, waiting = owners[batch_size:], waiting[batch_size:]
    if waiting:
        yield owners, torch.stack(waiting)


def image_features(vit: Encoder, batches: Iterable[Windows], n: int, pool: str) -> NDArray[np.float32]:
    """(n, D) from the windows of n images, in the encoder's present mode, on its device.

    Args:
        vit: the encoder.
        batches: of `window_batches`.
        n: images, each with at least one window.
        pool: feature of a window, see `pool_tokens`.
    """
    sums: NDArray[np.float32] = np.zeros((n, vit.embed_dim), np.float32)
    counts = np.zeros((n, 1), np.float32)
    device = next(vit.parameters()).device
    for owners, batch in batches:
        pooled = pool_tokens(vit, vit.forward_features(batch.to(device)), pool).float().cpu().numpy()
        np.add.at(sums, owners, pooled)
        np.add.at(counts, owners, 1)
    return sums / counts


def pool_tokens(vit: Encoder, tokens: Tensor, pool: str) -> Tensor:
    """(B, prefix + N, D) -> (B, D): the class token (`cls`), or the mean of the patch tokens (`mean`)."""
    return tokens[:, 0] if pool == "cls" else tokens[:, vit.num_prefix_tokens :].mean(1)
