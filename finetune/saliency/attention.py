"""How much a model of tiles looked at each part of an image: the attention that the model itself gave its tiles.

Legend: T tiles, r and c rows and columns of a map.
"""

from __future__ import annotations

import numpy as np

from ...data.shards import ShardDataset
from ...data.tiles import Boxes
from ...engine.metrics import Floats, Ints
from ..classify.locked import Locked, unlabelled
from ..classify.mil import MilModel, attention, logits, names_of
from ..said import said_of
from .worth import Map

CELLS = 8  # of a map along a tile
FAINTEST = 1e-6


def attended(locked: Locked, shards: ShardDataset, row: int, batch_size: int = 64, rows: Ints | None = None) -> Map:
    """How much a model of tiles looked at each part of an image, among all judged images of its bag.

    Args:
        locked: a model of tiles.
        shards: where the image lies, and the others of its bag.
        row: which it is.
        batch_size: tiles at once.
        rows: those that were judged, `row` among them; a bag holds no others. None: all.
    """
    model = locked.model
    assert isinstance(model, MilModel)
    rows = np.arange(len(shards)) if rows is None else rows
    names = names_of(unlabelled(locked.target, shards, rows), model.bag)
    bag = rows[names == names[rows == row]]
    here = int(np.flatnonzero(bag == row)[0])
    with locked.tiles(shards, bag, batch_size) as (features, of):
        worth = attention(model, features, of, here)
        boxes = features.boxes(int(of.rows[here]))
        said = said_of(locked, logits(model, features, of, np.array([here])))
    values = rastered(worth, boxes, shards[row].pixels.shape[:2])
    how = (
        "Orange: tiles that the decision rests on, for or against; their shares add up to 1 over all judged images of "
        f"the {model.bag}."
    )
    return Map(values, said, "share of the attention", FAINTEST, how)


def rastered(worth: Floats, boxes: Boxes, shape: tuple[int, ...]) -> Floats:
    """(r, c) values of an image of this shape from (T,) values of its (T, 4) boxes; where they overlap the mean."""
    cell = float(boxes[:, 2:].min()) / CELLS
    rows, columns = (max(1, round(length / cell)) for length in shape[:2])
    total, count = np.zeros((rows, columns)), np.zeros((rows, columns))
    y, x = (np.arange(rows) + 0.5) * shape[0] / rows, (np.arange(columns) + 0.5) * shape[1] / columns
    for value, (top, left, height, width) in zip(worth, boxes, strict=True):
        inside = ((y >= top) & (y < top + height))[:, None] & ((x >= left) & (x < left + width))
        total += value * inside
        count += inside
    return np.asarray(total / np.maximum(count, 1))
