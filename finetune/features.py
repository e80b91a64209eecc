"""Frozen features of whole images, computed once and kept.

    FOLDER/<digest>.safetensors    features (n, D), in the order of the data set's rows

The digest covers the encoder's weights, the samples and how they are read, so that a stale file is never taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ..data.shards import ShardDataset
from ..engine.errors import UserError
from ..engine.launch import device
from ..engine.track import progress_bar
from ..pretrain.encoder import Encoder, normalisation
from ..pretrain.features import Windows, image_features, window_batches


def cached_features(
    vit: Encoder, shards: ShardDataset, pool: str, batch_size: int, folder: Path, name: str
) -> NDArray[np.float32]:
    """(n, D) one feature a sample: the mean over windows that cover the image."""
    path = folder / f"{digest(vit, shards, pool)}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        save_file({"features": extract(vit, shards, pool, batch_size, name)}, temporary)
        temporary.replace(path)
    return load_file(path)["features"]


def digest(vit: Encoder, shards: ShardDataset, pool: str) -> str:
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
def extract(vit: Encoder, shards: ShardDataset, pool: str, batch_size: int, name: str) -> NDArray[np.float32]:
    """(n, D) features of every sample, on the accelerator if there is one.

    Raises:
        UserError: the encoder's channels are not the data's.
    """
    if vit.patch_embed.proj.in_channels != shards.channels:
        raise UserError(
            f"the encoder takes {vit.patch_embed.proj.in_channels} channels and the data has {shards.channels}; ingest "
            "it again with --channels, or choose another encoder"
        )
    vit = vit.eval().to(device())
    batches = window_batches(vit, (shards[i] for i in range(len(shards))), batch_size)
    return image_features(vit, _shown(batches, len(shards), name), len(shards), pool)


def _shown(batches: Iterable[Windows], images: int, name: str) -> Iterator[Windows]:
    with progress_bar() as bar:
        task = bar.add_task(f"features, {name}", total=images, note="")
        for owners, batch in batches:
            yield owners, batch
            bar.update(task, completed=owners[-1] + 1)
