"""Judged images that are shown with a map of what counted: the surest right and the surest wrong decisions in turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data.shards import ShardDataset
from ..engine.metrics import Ints
from .classify.config import ReadoutSection
from .classify.judged import Judged
from .classify.locked import Locked
from .explain import explain
from .said import answered


def explained(
    locked: Locked, shards: ShardDataset, judged: Judged, folder: Path, count: int, batch_size: int, note: str = ""
) -> dict[str, str]:
    """Draw `explained-1.png` … into a folder; the captions by file name, each with a note at the end."""
    captions = {}
    for number, image in enumerate(surest(judged)[:count], 1):
        name, row = f"explained-{number}.png", int(judged.labelled.rows[image])
        key, rows = str(judged.labelled.keys[image]), judged.labelled.rows
        said = explain(locked, shards, row, folder / name, key, None, batch_size, rows)
        label = locked.target.named(judged.labelled.truth[image], locked.card.target.separator)
        captions[name] = f"{said} Its label: {answered(locked.target, label)}.{note}"
    return captions


def surest(judged: Judged) -> Ints:
    """Labelled images: of those that were decided rightly and wrongly the surest first, in turn."""
    of = judged.cases("image", ReadoutSection())
    right = judged.decided(of) == of.truth
    right = right if right.ndim == 1 else right.all(1)
    order = np.argsort(-of.probabilities.max(1), kind="stable")
    sides = [order[right[order]], order[~right[order]]]
    rank = np.concatenate([np.arange(len(side)) for side in sides])
    return np.asarray(judged.images[np.concatenate(sides)[np.argsort(rank, kind="stable")]])
