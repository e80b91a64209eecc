"""One feature for a whole image, as monitors and probes both mean it: the mean over windows that cover the image.

Legend: n images, D features, W windows.
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
    cut = ((i, windows(sample, vit.patch_embed.img_size, normalise)) for i, sample in enumerate(samples))
    parts = (("windows", i, window) for i, several in cut for window in several)
    return ((owners, batch) for _, owners, batch in batched(parts, batch_size))


def batched(parts: Iterable[tuple[str, int, Tensor]], batch_size: int) -> Iterator[tuple[str, list[int], Tensor]]:
    """Pictures of one kind and size, a fixed number at once and the rest at the end: (kind, owners, pictures).

    Each kind is apart, so that one's features have the same bits whether or not there are others.
    """
    waiting: dict[str, tuple[list[int], list[Tensor]]] = {}
    for kind, owner, picture in parts:
        owners, pictures = waiting.setdefault(kind, ([], []))
        owners.append(owner)
        pictures.append(picture)
        if len(pictures) == batch_size:
            del waiting[kind]
            yield kind, owners, torch.stack(pictures)
    for kind, (owners, pictures) in waiting.items():
        yield kind, owners, torch.stack(pictures)


def image_features(vit: Encoder, batches: Iterable[Windows], n: int) -> NDArray[np.float32]:
    """(n, D) means of patch tokens from the windows of n images, in the encoder's present mode, on its device.

    Args:
        vit: the encoder.
        batches: of `window_batches`.
        n: images, each with at least one window.
    """
    device = next(vit.parameters()).device
    tokens = ((owners, vit.forward_features(batch.to(device))[:, vit.num_prefix_tokens :]) for owners, batch in batches)
    return image_means(((owners, x.mean(1).float().cpu().numpy()) for owners, x in tokens), n, vit.embed_dim)


def image_means(
    windows: Iterable[tuple[list[int] | NDArray[np.int64], NDArray[np.float32]]], n: int, width: int
) -> NDArray[np.float32]:
    """(n, D) means over each image's windows, which come as the numbers of their images and (W, D) rows."""
    sums: NDArray[np.float32] = np.zeros((n, width), np.float32)
    counts = np.zeros((n, 1), np.float32)
    for owners, rows in windows:
        np.add.at(sums, owners, rows)
        np.add.at(counts, owners, 1)
    return sums / counts
