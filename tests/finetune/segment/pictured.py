"""Judged images made by hand: squares as lesions, squares as what was said, and the cases they make."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from miram.data.shards import Sample
from miram.finetune.segment.cases import Candidate, Case, Lesion, Overlap
from miram.finetune.segment.target import Target

SHAPE = (90, 70)


def lesions() -> Target:
    """Findings one by one."""
    lookup = np.ones(256, np.uint8)
    lookup[0] = 0
    return Target("instances", ("background", "lesion"), lookup, lesions=True)


def tissues() -> Target:
    """Two classes, 9 counts for nothing."""
    lookup = np.zeros(256, np.uint8)
    lookup[1], lookup[2], lookup[9] = 1, 2, 255
    return Target("classes", ("background", "fat", "dense"), lookup, lesions=False)


def square(top: int, left: int, side: int, value: int = 1) -> NDArray[np.uint8]:
    mask = np.zeros(SHAPE, np.uint8)
    mask[top : top + side, left : left + side] = value
    return mask


def sample(key: str, mask: NDArray[np.uint8] | None = None) -> Sample:
    pixels = np.random.default_rng(len(key)).integers(20, 200, SHAPE).astype(np.uint8)
    return Sample(key, pixels, 255, {"mask_kind": "instances"}, mask)


def lesion(area: int = 100, dice: float = 0.8, score: float = 0.9, hit: bool | None = None, **other: Any) -> Lesion:
    """One of class 1 and number 1, hit by both rules where it has a Dice."""
    hit, nan = dice > 0 if hit is None else hit, float("nan")
    seen = {"score_iou": score, "score_point": score} if hit else {"score_iou": nan, "score_point": nan}
    edges = {"hd95": 3.0, "surface_dice": 0.7} if dice else {"hd95": nan, "surface_dice": nan}
    fields = {"cls": 1, "number": 1, "diameter": 2 * (area / np.pi) ** 0.5, "hit_iou": hit, "hit_point": hit}
    return Lesion(**(fields | {"area": area, "dice": dice} | seen | edges | other))


def case(key: str, dice: float | None = None, false: int = 0, patient: str = "", **other: Any) -> Case:
    """One lesion of 100 pixels drawn with so much Dice, or none; so many pixels said where nothing is.

    The false part is a candidate, surer than lesions are.
    """
    truth, both = (0, 0) if dice is None else (100, round(100 * dice))
    said = both + false + (truth - both) * (dice is not None and dice > 0)
    overlap = Overlap(truth, said, both, int(false > 0), false)
    found = () if dice is None else (lesion(truth, dice),)
    marks = [Candidate(1, one.score_iou, truth, 1, 1) for one in found if dice]
    marks += [Candidate(1, 0.95, false, 0, 0)] * (false > 0)
    fields = {"key": key, "patient": patient or key, "fold": 0, "spacing_mm": None, "height": 90, "width": 70}
    counts = {"overlaps": (overlap,), "false_components": int(false > 0), "false_area": false}
    return Case(**(fields | counts | {"lesions": found, "candidates": tuple(marks)} | other))
