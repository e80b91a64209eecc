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


def explained(
    locked: Locked, shards: ShardDataset, judged: Judged, folder: Path, count: int, batch_size: int, note: str = ""
) -> dict[str, str]:
    """Draw `explained-1.png` … into a folder; the captions by file name, each with a note at the end."""
    captions = {}
    for number, image in enumerate(surest(judged)[:count], 1):
        name, row = f"explained-{number}.png", int(judged.labelled.rows[image])
        said = explain(locked, shards, row, folder / name, str(judged.labelled.keys[image]), None, batch_size)
        captions[name] = f"{said} Its label: {label_of(judged, int(image)) or 'none'}.{note}"
    return captions


def label_of(judged: Judged, image: int) -> str:
    """The true class of a labelled image, or its labels."""
    target, truth = judged.labelled.target, judged.labelled.truth[image]
    if target.kind != "multilabel":
        return target.classes[int(truth)]
    return ", ".join(name for name, there in zip(target.classes, truth, strict=True) if there)


def surest(judged: Judged) -> Ints:
    """Labelled images: of those that were decided rightly and wrongly the surest first, in turn."""
    of = judged.cases("image", ReadoutSection())
    right = judged.decided(of) == of.truth
    right = right if right.ndim == 1 else right.all(1)
    order = np.argsort(-of.probabilities.max(1), kind="stable")
    sides = [order[right[order]], order[~right[order]]]
    rank = np.concatenate([np.arange(len(side)) for side in sides])
    return np.asarray(judged.images[np.concatenate(sides)[np.argsort(rank, kind="stable")]])
