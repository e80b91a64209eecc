"""Where a probability becomes a decision: an operating point on validation cases, for each level its own.

A threshold lies half way between two neighbouring probabilities, so that rounding moves no case across it.

Legend: j validation images, m cases of a level, w outputs of a head.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ...engine.metrics import Floats, Ints, Kind
from .config import FinetuneSection, Level
from .labels import Labelled
from .units import LEVELS, Cases, cases

UNTOLD = 0.5  # where a class is missing: the more probable answer
ROUNDING = 1e-9  # 9 of 10 is not quite 1 - 1 / 10


def choose_thresholds(
    labelled: Labelled, images: Ints, logits: Floats, temperature: float, section: FinetuneSection
) -> dict[Level, tuple[float, ...]]:
    """The thresholds of every level at the section's operating point, on validation images.

    Args:
        labelled: the task's images.
        images: (j,) numbers of the validation images.
        logits: (j, w) of them.
        temperature: of the probabilities that will be decided on.
        section: operating point and read-out.

    Returns:
        One threshold for two classes, one a label of several, none for several classes or an ordinal scale.
    """
    target, fold = labelled.target, np.zeros(len(images), np.int64)
    probabilities = target.probabilities(logits, temperature)
    found: dict[Level, tuple[float, ...]] = {}
    for level in LEVELS:
        of = cases(labelled, images, probabilities, fold, level, section.readout)
        asked = answers(target.kind, of)
        point, at = section.operating_point, section.operating_at
        found[level] = tuple(choose_threshold(truth, scores, point, at) for truth, scores in asked)
    return found


def answers(kind: Kind, of: Cases) -> list[tuple[Ints, Floats]]:
    """(m,) truth and probability of every answer that a threshold decides."""
    if kind == "binary":
        return [(of.truth, of.probabilities[:, 1])]
    return list(zip(of.truth.T, of.probabilities.T, strict=True)) if kind == "multilabel" else []


def choose_threshold(
    truth: Ints, scores: Floats, point: Literal["youden", "sensitivity", "specificity"], at: float
) -> float:
    """The threshold of an operating point; 0.5 where a class is missing.

    Args:
        truth: (m,) 0 or 1.
        scores: (m,) probabilities of 1.
        point: youden: the largest sensitivity + specificity (Youden 1950), of equals the more sensitive; sensitivity:
            the largest specificity where sensitivity is at least `at`; specificity: the other way round.
        at: for the latter two.
    """
    if len(np.unique(truth)) < 2:
        return UNTOLD
    cuts = cut_points(scores)
    sensitivity, specificity = rates(truth, scores, cuts)
    wanted = {
        "youden": np.round(sensitivity + specificity, 9),
        "sensitivity": np.where(sensitivity >= at - ROUNDING, specificity, -1),
        "specificity": np.where(specificity >= at - ROUNDING, sensitivity, -1),
    }[point]
    then = specificity if point == "specificity" else sensitivity
    return float(cuts[np.lexsort((then, wanted))[-1]])


def cut_points(scores: Floats) -> Floats:
    """Every threshold that divides (m,) scores differently, ascending: all positive first, none last."""
    seen = np.unique(scores)
    middle = (seen[:-1] + seen[1:]) / 2
    middle = np.where(middle > seen[:-1], middle, seen[1:])  # neighbouring floats have nothing between them
    return np.concatenate([[0.0], middle, np.nextafter(seen[-1:], 2)])


def rates(truth: Ints, scores: Floats, cuts: Floats) -> tuple[Floats, Floats]:
    """Sensitivity and specificity at each cut: positive is what reaches it."""
    ordered = [np.sort(scores[truth == answer]) for answer in (0, 1)]
    below = [np.searchsorted(side, cuts, side="left") / len(side) for side in ordered]
    return 1 - below[1], below[0]
