"""Frozen features of a data set, computed once and kept.

FOLDER/<key>.safetensors   owners             (W,)       the number of the image that each window is of, ascending
                           windows/-1/mean    (W, D)     a layer, counted from the end, and a pool; float32
                           crops/-1/mean      (n k, D)   of k random crops of every image
                           tokens             (T, D)     patch tokens of the last block, window after window; float16
FOLDER/<key>.json          {"schema", "sha256": of the file, "name", "reading": {…}}; written last

The key covers the encoder's weights and shape, the samples and how they are read, so that a stale file is never taken;
one that is not what its JSON says is computed again.
Legend: n images, W windows, k crops, D features, N patches of a window.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from ..data.config import CropSection
from ..data.shards import ShardDataset
from ..data.views import MultiScaleViews, windows
from ..engine.errors import UserError
from ..engine.files import read_json, sha256, sync_folder, write_json
from ..engine.launch import device
from ..engine.track import progress_bar
from ..pretrain.encoder import Encoder, normalisation, weights_digest
from ..pretrain.features import batched, image_means
from .columns import Columns
from .config import Pool

CACHE = "miram.features/1"
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Reading:
    """What is read off an encoder.

    Args:
        layers: blocks, counted from the end (-1 is the last), each through the encoder's final norm; where timm norms
            after pooling only, there is none and they come as they are.
        pools: features of a window or crop.
        crops: random crops of every image, as training draws them, beside the windows that cover it.
        tokens: keep all patch tokens of the last block.
        seed: of the crops.
    """

    layers: tuple[int, ...] = (-1,)
    pools: tuple[Pool, ...] = ("mean",)
    crops: int = 0
    tokens: bool = False
    seed: int = 0

    @property
    def parts(self) -> list[str]:
        """The pools that are stored; joined ones are made of them."""
        return sorted({part for pool in self.pools for part in pool.split("+")})

    def check(self, vit: Encoder) -> None:
        """Refuse what the encoder has not.

        Raises:
            UserError: a layer or a class token that is not there, or a number of crops that cannot be.
        """
        depth = len(vit.blocks)
        if odd := [layer for layer in self.layers if not -depth <= layer <= -1]:
            raise UserError(f"layer {odd[0]} is not there: the encoder's {depth} blocks are -1 (the last) to -{depth}")
        if "cls" in self.parts and vit.cls_token is None:
            raise UserError("pool cls: the encoder has no class token; choose pool mean")
        if self.crops < 0:
            raise UserError(f"{self.crops} crops of an image cannot be drawn; 0 leaves them out")
        if not self.layers or not self.pools:
            raise UserError("features are of at least one layer and one pool")


class Features:
    """The features in a file, read when they are asked for."""

    def __init__(self, path: Path, n: int):
        self.path, self.n = path, n
        self._file: Any = safe_open(path, "np")

    def pooled(self, layer: int, pool: Pool) -> Floats:
        """(n, D) of every image: the mean over its windows."""
        rows = self.windows(layer, pool)
        return image_means([(self.owners, rows)], self.n, rows.shape[1])

    def windows(self, layer: int, pool: Pool) -> Floats:
        """(W, D) of every window."""
        return self._joined("windows", layer, pool)

    def crops(self, layer: int, pool: Pool) -> Floats:
        """(n, k, D) of every image's random crops."""
        rows = self._joined("crops", layer, pool)
        return rows.reshape(self.n, -1, rows.shape[1])

    @cached_property
    def owners(self) -> NDArray[np.int64]:
        """(W,) the number of the image that each window is of."""
        return np.asarray(self._file.get_tensor("owners"))

    def tokens(self, i: int) -> Floats:
        """(T, D) patch tokens of image i, of all its windows; good to three digits."""
        last = self._token_ends[i]
        rows = self._file.get_slice("tokens")[int(last - self.token_counts[i]) : int(last)]
        return np.asarray(rows).astype(np.float32)

    @cached_property
    def token_counts(self) -> NDArray[np.int64]:
        """(n,) patch tokens of every image."""
        total, _ = self._file.get_slice("tokens").get_shape()
        return np.bincount(self.owners, minlength=self.n) * (total // len(self.owners))

    @cached_property
    def _token_ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.token_counts)

    def _joined(self, kind: str, layer: int, pool: Pool) -> Floats:
        parts = [np.asarray(self._file.get_tensor(f"{kind}/{layer}/{part}")) for part in pool.split("+")]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def cached_features(
    vit: Encoder, shards: ShardDataset, reading: Reading, batch_size: int, folder: Path, name: str
) -> Features:
    """Features of all samples, from the file in `folder` if they are there.

    Of two processes that want the same, one computes and the other waits. Memory holds a batch; on disk the folder
    takes twice the file while it is made.

    Args:
        vit: the encoder; it is put on the accelerator, in eval mode.
        shards: the samples, in the order of the features.
        reading: what is read off.
        batch_size: windows and crops encoded at once. It changes nothing but the last bits.
        folder: of the files.
        name: of the encoder, for people.

    Raises:
        UserError: the encoder cannot be read in this way, takes other channels than the data has, or is not finite.
    """
    reading.check(vit)
    check_channels(vit, shards)
    vit = vit.eval()
    path = folder / f"{key(vit, shards, reading)}.safetensors"
    make_once(
        path,
        {"name": name, "reading": asdict(reading)},
        lambda columns: extract(vit, shards, reading, batch_size, name, columns),
    )
    return Features(path, len(shards))


def make_once(path: Path, content: Mapping[str, Any], fill: Callable[[Columns], None]) -> None:
    """Make a file of columns, unless it is there whole; `content` goes into the JSON beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path):
        if not is_whole(path):
            with workplace(path) as place:
                columns = Columns(place)
                fill(columns)
                written = columns.write(place / path.name)
                (place / path.name).replace(path)
            sync_folder(path.parent)
            write_json(path.with_suffix(".json"), CACHE, {"sha256": written, **content})


def check_channels(vit: Encoder, shards: ShardDataset) -> None:
    """Refuse data of other channels.

    Raises:
        UserError: the encoder's are not the data's.
    """
    if vit.patch_embed.proj.in_channels != shards.channels:
        raise UserError(
            f"the encoder takes {vit.patch_embed.proj.in_channels} channels and the data has {shards.channels}; ingest "
            "it again with --channels, or choose another encoder"
        )


# ---------------------------------------------------------------------------------------------- which file it is


def key(vit: Encoder, shards: ShardDataset, reading: Reading) -> str:
    """32 hex digits of everything that features depend on but the last bits."""
    read = {
        "layers": sorted({*reading.layers}),
        "pools": reading.parts,
        "crops": [reading.crops, reading.seed] if reading.crops else [],
        "tokens": reading.tokens,
    }
    return digest(vit, shards, read)


def digest(vit: Encoder, shards: ShardDataset, read: Mapping[str, Any]) -> str:
    """32 hex digits of an encoder, the samples, and what is read off them in which way."""
    facts = {
        "schema": CACHE,
        **read,
        "weights": weights_digest(vit),
        "settings": settings_of(vit),
        "input": repr(normalisation(vit)),
        "data": shards.digest,
        "samples": shards.rows.column("key"),
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def settings_of(vit: Encoder) -> list[str]:
    """What of an encoder its weights do not show: kinds of modules, heads, epsilons, the angles of rotary positions."""

    def plain(value: object) -> bool:
        parts = value if isinstance(value, tuple | list) else [value]
        return all(isinstance(part, bool | int | float | str) for part in parts)

    passing = {"training", "grad_checkpointing"}
    return [
        f"{path} {type(module).__name__} {name} {value}"
        for path, module in vit.named_modules()
        for name, value in sorted(vars(module).items())
        if plain(value) and name not in passing
    ]


def is_whole(path: Path) -> bool:
    """Whether a file is there, byte for byte as it was written."""
    if not path.is_file():
        return False
    try:
        whole = read_json(path.with_suffix(".json"), CACHE).get("sha256") == sha256(path)
    except UserError:
        whole = False
    if not whole:
        print(f"miram: {path} is damaged; these features are computed again", file=sys.stderr, flush=True)
    return whole


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process makes this file; the system lets go of the lock however a process ends."""
    with path.with_name(f".{path.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def workplace(path: Path) -> Iterator[Path]:
    """An empty folder beside a file, of one name: what a killed process left there goes when the next one comes."""
    place = path.with_name(f".{path.stem}.partial")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- how it is made


@torch.inference_mode()
def extract(vit: Encoder, shards: ShardDataset, reading: Reading, batch_size: int, name: str, columns: Columns) -> None:
    """All features of every sample, on the accelerator if there is one.

    Raises:
        UserError: they are not finite.
    """
    vit = vit.to(device())
    with progress_bar() as bar:
        task = bar.add_task(f"features, {name}", total=len(shards), note="")
        for kind, owners, batch in batched(pictures(vit, shards, reading), batch_size):
            for column, rows in columns_of(vit, kind, batch.to(device()), reading):
                columns.add(column, finite(rows, name).cpu())
            if kind == "windows":
                columns.add("owners", torch.tensor(owners))
                bar.update(task, completed=owners[-1] + 1)


def finite(rows: Tensor, name: str) -> Tensor:
    """The features themselves.

    Raises:
        UserError: they are not finite.
    """
    if not rows.isfinite().all():
        half = " beyond 65,504, or" if rows.dtype == torch.float16 else ""
        raise UserError(f"the encoder ({name}) gives features{half} that are not finite; is it trained?")
    return rows


def pictures(vit: Encoder, shards: ShardDataset, reading: Reading) -> Iterator[tuple[str, int, Tensor]]:
    """(C, H, W) of every image its windows, then its crops: kind, number of the image, picture.

    Crop j is what training with this seed sees of the image in epoch j.
    """
    size, normalise = vit.patch_embed.img_size, normalisation(vit)
    draw = MultiScaleViews(size, (1,), 1, CropSection(), normalise, reading.seed)
    for i in range(len(shards)):
        sample = shards[i]
        for window in windows(sample, size, normalise):
            yield "windows", i, window
        for j in range(reading.crops):
            yield "crops", i, cast(Tensor, draw(sample, j)["view/1"])


def columns_of(vit: Encoder, kind: str, images: Tensor, reading: Reading) -> Iterator[tuple[str, Tensor]]:
    """What a batch adds to its columns."""
    for layer, (prefix, patches) in states(vit, images, {-1, *reading.layers}).items():
        for part in reading.parts if layer in reading.layers else ():
            yield f"{kind}/{layer}/{part}", (prefix[:, 0] if part == "cls" else patches.mean(1)).float()
        if reading.tokens and layer == -1 and kind == "windows":
            yield "tokens", patches.flatten(0, 1).half()


def states(vit: Encoder, images: Tensor, layers: set[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """(B, prefix, D) prefix tokens and (B, N, D) patch tokens after each layer, through the final norm."""
    order, prefix = sorted(layers), vit.num_prefix_tokens > 0  # without one, timm's Eva cannot be asked for them
    found = cast(Any, vit).forward_intermediates(
        images, indices=order, return_prefix_tokens=prefix, norm=True, output_fmt="NLC", intermediates_only=True
    )
    pairs = [(p, x) for x, p in found] if prefix else [(x[:, :0], x) for x in found]
    return dict(zip(order, pairs, strict=True))
