"""Where a model looks: a map of what an image's decision rests on, drawn over the image.

Of frames it is what changes when a part is hidden (saliency/occlusion.py), of tiles the attention that the model itself
gave them (saliency/attention.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data.geometry import Geometry
from ..data.record import Film
from ..data.shards import ShardDataset
from ..engine.metrics import Ints
from .classify.locked import Locked
from .classify.mil import MilModel
from .saliency.attention import attended
from .saliency.occlusion import occlusion
from .saliency.picture import draw


def explain(
    locked: Locked,
    shards: ShardDataset,
    row: int,
    path: Path,
    title: str,
    film: Film | None = None,
    batch_size: int = 64,
    rows: Ints | None = None,
) -> str:
    """Draw what an image's decision rests on, beside the image.

    Args:
        locked: the model.
        shards: the data set.
        row: which of its images.
        path: PNG to write.
        title: what the image is called.
        film: as it was before the breast was cut out; the map is then drawn in its place there.
        batch_size: frames at once.
        rows: those that were judged with it, which a breast's decision rests on; None: all.

    Returns:
        A caption.
    """
    sample = shards[row]
    if isinstance(locked.model, MilModel):
        found = attended(locked, shards, row, batch_size, rows)
    else:
        found = occlusion(locked, sample, batch_size)
    stored = np.asarray(sample.pixels)
    geometry = Geometry.from_dict(sample.meta["geometry"]) if film is not None else None
    draw(path, film.pixels if film is not None else stored, found, title, stored, geometry)
    return f"{title}: {found.caption}"
