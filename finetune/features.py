"""Frozen features of whole images, computed once and kept.

    FOLDER/<digest>.safetensors    features (n, D), in the order of the data set's rows

The digest covers the encoder's weights, the samples and how they are read, so that a stale file is never taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..data.shards import ShardDataset
from ..data.views import windows
from ..engine.errors import UserError
from ..engine.launch import device
from ..engine.track import progress_bar
from ..pretrain.encoder import normalisation


def cached_features(
    vit: VisionTransformer, shards: ShardDataset, pool: str, batch_size: int, folder: Path, name: str
) -> NDArray[np.float32]:
    """(n, D) one feature a sample: the mean over windows that cover the image."""
    path = folder / f"{digest(vit, shards, pool)}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        save_file({"features": extract(vit, shards, pool, batch_size, name)}, temporary)
        temporary.replace(path)
    return load_file(path)["features"]


def digest(vit: VisionTransformer, shards: ShardDataset, pool: str) -> str:
    """16 hex digits of everything that features depend on."""
    state = hashlib.sha256(
        f"{pool} {normalisation(vit)} {[getattr(block.attn, 'num_heads', 0) for block in vit.blocks]}".encode()
    )
    for name, tensor in vit.state_dict().items():
        state.update(name.encode())
        state.update(tensor.cpu().contiguous().numpy().tobytes())
    state.update(" ".join(shards.rows.column("key")).encode())
    state.update(shards.digest.encode())
    return state.hexdigest()[:16]


@torch.inference_mode()
def extract(vit: VisionTransformer, shards: ShardDataset, pool: str, batch_size: int, name: str) -> NDArray[np.float32]:
    """(n, D) features of every sample, on the accelerator if there is one.

    Raises:
        UserError: the encoder's channels are not the data's.
    """
    if vit.patch_embed.proj.in_channels != shards.channels:
        raise UserError(
            f"the encoder takes {vit.patch_embed.proj.in_channels} channels and the data has {shards.channels}; ingest "
            "it again with --channels, or choose another encoder"
        )
    on = device()
    vit = vit.eval().to(on)
    sums: NDArray[np.float32] = np.zeros((len(shards), vit.embed_dim), np.float32)
    counts = np.zeros((len(shards), 1), np.float32)
    with progress_bar() as bar:
        task = bar.add_task(f"features, {name}", total=len(shards), note="")
        for owners, batch in window_batches(vit, shards, batch_size):
            pooled = pool_tokens(vit, vit.forward_features(batch.to(on)), pool).float().cpu().numpy()
            np.add.at(sums, owners, pooled)
            np.add.at(counts, owners, 1)
            bar.update(task, completed=owners[-1] + 1)
    return sums / counts


def window_batches(vit: VisionTransformer, shards: ShardDataset, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Windows of all samples in batches, with the number of the sample each belongs to."""
    normalise = normalisation(vit)
    owners: list[int] = []
    waiting: list[Tensor] = []
    for i in range(len(shards)):
        parts = windows(shards[i], vit.patch_embed.img_size, normalise)
        owners += [i] * len(parts)
        waiting += parts
        while len(waiting) >= batch_size:
            yield owners[:batch_size], torch.stack(waiting[:batch_size])
            owners, waiting = owners[batch_size:], waiting[batch_size:]
    if waiting:
        yield owners, torch.stack(waiting)


def pool_tokens(vit: VisionTransformer, tokens: Tensor, pool: str) -> Tensor:
    """(B, prefix + N, D) -> (B, D)."""
    return tokens[:, 0] if pool == "cls" else tokens[:, vit.num_prefix_tokens :].mean(1)
