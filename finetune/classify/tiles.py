"""Features of an image's tiles at a stated resolution, computed once and kept: what attention reads (mil.py).

FOLDER/<key>.safetensors   owners   (ΣT,)      the number of the image that each tile is of, ascending
                           tiles    (ΣT, D)    mean of the last block's patch tokens; float32
                           boxes    (ΣT, 4)    top, left, height, width in pixels of the stored image; float64
FOLDER/<key>.json          {"schema", "sha256": of the file, "name", "tiles": {…}}; written last

A file is kept and found again as other features are (finetune/features.py).
Legend: n images, T tiles of an image, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from ...data.shards import ShardDataset
from ...data.tiles import SAME, Boxes, tiles
from ...engine.errors import UserError
from ...engine.launch import device
from ...engine.track import progress_bar
from ...pretrain.encoder import Encoder, normalisation
from ...pretrain.features import batched
from ..columns import Columns
from ..features import Floats, check_channels, digest, finite, make_once, states
from .config import TilesSection

FORM = "miram.tiles/1"  # other tiles of the same settings are another form


class TileFeatures:
    """The tiles of n images in a file, read when they are asked for."""

    def __init__(self, path: Path, n: int):
        self.path, self.n = path, n
        self._file: Any = safe_open(path, "np")

    @cached_property
    def dim(self) -> int:
        """D."""
        return int(self._file.get_slice("tiles").get_shape()[1])

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(n,) tiles of every image."""
        return np.bincount(self._file.get_tensor("owners"), minlength=self.n)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.counts)

    def tiles(self, i: int) -> Floats:
        """(T, D) features of image i's tiles."""
        return np.asarray(self._rows("tiles", i))

    def boxes(self, i: int) -> Boxes:
        """(T, 4) where they lie: top, left, height, width in pixels of the stored image."""
        return np.asarray(self._rows("boxes", i))

    def _rows(self, name: str, i: int) -> Any:
        return self._file.get_slice(name)[int(self._ends[i] - self.counts[i]) : int(self._ends[i])]


def tile_features(
    vit: Encoder, shards: ShardDataset, section: TilesSection, batch_size: int, folder: Path, name: str
) -> TileFeatures:
    """Tiles of all samples, from the file in `folder` if they are there.

    Memory holds an image and a batch of tiles.

    Args:
        vit: the encoder; it is put on the accelerator, in eval mode. A tile has the size of its input.
        shards: the samples, in the order of the features.
        section: which tiles.
        batch_size: tiles encoded at once. It changes nothing but the last bits.
        folder: of the files.
        name: of the encoder, for people.

    Raises:
        UserError: as `spacings`; the encoder takes other channels than the data has, or is not finite.
    """
    check_channels(vit, shards)
    spacing, vit = spacings(shards, section), vit.eval()
    asked = {"mm_per_pixel": section.mm_per_pixel, "overlap": section.overlap, "tissue": section.tissue}
    path = folder / f"{digest(vit, shards, {'form': FORM, 'tiles': asked, 'spacing': spacing})}.safetensors"
    make_once(
        path,
        {"name": name, "tiles": asked},
        lambda columns: extract(vit, shards, section, spacing, batch_size, name, columns),
    )
    return TileFeatures(path, len(shards))


def spacings(shards: ShardDataset, section: TilesSection) -> list[float]:
    """Millimetres a stored pixel of every sample: what its index says, else what the user does.

    Raises:
        UserError: neither says it, the index says nonsense, or the tiles would be finer than an image is.
    """
    said, stated = shards.rows.column("spacing_mm"), section.spacing_mm
    missing = [key for key, value in zip(shards.rows.column("key"), said, strict=True) if not value]
    if missing and stated is None:
        raise UserError(
            f"{len(missing)} of {len(said)} images have no spacing_mm in their index (the first is {missing[0]}), so "
            "tiles at a stated resolution cannot be cut; set finetune.tiles.spacing_mm to what their pixels measure"
        )
    found = [spacing_of(value) if value else stated or 0.0 for value in said]
    coarsest = max(found)
    if section.mm_per_pixel < (1 - SAME) * coarsest:
        count = sum(section.mm_per_pixel < (1 - SAME) * value for value in found)
        raise UserError(
            f"finetune.tiles.mm_per_pixel={section.mm_per_pixel:g} is finer than the data: {count} of {len(found)} "
            f"images are stored at up to {coarsest:g} mm a pixel; set finetune.tiles.mm_per_pixel={coarsest:g} or more"
        )
    return found


def fault_of(value: str, section: TilesSection) -> str:
    """Why tiles cannot be cut from an image with this spacing in its index; nothing where they can.

    Raises:
        UserError: as `spacing_of`.
    """
    spacing = spacing_of(value) if value else section.spacing_mm
    if spacing is None:
        return "its spacing is unknown, and the model reads it at a stated resolution"
    if section.mm_per_pixel < (1 - SAME) * spacing:
        return f"it has {spacing:g} mm a pixel, coarser than the {section.mm_per_pixel:g} mm that the model reads"
    return ""


def spacing_of(value: str) -> float:
    """A spacing as the index has it.

    Raises:
        UserError: it is no length.
    """
    try:
        spacing = float(value)
    except ValueError:
        spacing = math.nan
    if not 0 < spacing < math.inf:
        raise UserError(f"index.csv says spacing_mm {value!r}, which is no length; run `miram data verify`")
    return spacing


@torch.inference_mode()
def extract(
    vit: Encoder,
    shards: ShardDataset,
    section: TilesSection,
    spacing: list[float],
    batch_size: int,
    name: str,
    columns: Columns,
) -> None:
    """The tiles of every sample into columns, on the accelerator if there is one.

    Raises:
        UserError: features are not finite.
    """
    vit = vit.to(device())
    with progress_bar() as bar:
        task = bar.add_task(f"tiles, {name}", total=len(shards), note="")
        for _, owners, batch in batched(pictures(vit, shards, section, spacing, columns), batch_size):
            patches = states(vit, batch.to(device()), {-1})[-1][1]
            columns.add("tiles", finite(patches.mean(1).float(), name).cpu())
            columns.add("owners", torch.tensor(owners))
            bar.update(task, completed=owners[-1] + 1)


def pictures(
    vit: Encoder, shards: ShardDataset, section: TilesSection, spacing: list[float], columns: Columns
) -> Iterator[tuple[str, int, Tensor]]:
    """Every tile with the number of its image; an image's boxes go into their column as it is opened."""
    size, normalise = vit.patch_embed.img_size, normalisation(vit)
    for i, mm in enumerate(spacing):
        boxes, cut = tiles(shards[i], size, section.mm_per_pixel, mm, section.overlap, section.tissue, normalise)
        columns.add("boxes", torch.from_numpy(boxes))
        yield from (("tiles", i, tile) for tile in cut)
