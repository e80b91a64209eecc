"""From images to breasts and patients: what is one case, its truth, its probabilities.

    image      as judged
    breast     the mean (or largest) over its images; an image of unknown side is a breast of its own
    patient    the largest (or mean) over her breasts, where more is worse

Legend: n labelled images, j judged ones, m cases, k classes, g groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...engine.metrics import Floats, Ints, Kind
from .config import Level, ReadoutSection
from .labels import Labelled

LEVELS: tuple[Level, ...] = ("image", "breast", "patient")
PLURAL: dict[Level, str] = {"image": "images", "breast": "breasts", "patient": "patients"}


def counted(count: int, level: Level) -> str:
    """`1 patient`, `2 patients`."""
    return f"{count} {level if count == 1 else PLURAL[level]}"


@dataclass(frozen=True)
class Cases:
    """The cases of a level. Of several classes, a breast or patient whose images disagree on the truth is left out."""

    level: Level
    ids: NDArray[np.str_]  # (m,) keys of images, names of breasts or of patients
    patients: NDArray[np.str_]  # (m,)
    truth: Ints  # (m,) class, or (m, k) 0/1
    probabilities: Floats  # (m, k)
    fold: Ints  # (m,)
    members: tuple[Ints, ...]  # of each case: numbers of its images among the labelled
    left_out: int  # cases whose images disagree

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, which: Ints) -> Cases:
        """Some of the cases."""
        arrays = {name: getattr(self, name)[which] for name in ("ids", "patients", "truth", "probabilities", "fold")}
        return replace(self, **arrays, members=tuple(self.members[i] for i in which))

    def grouped_by(self, values: NDArray[np.str_]) -> NDArray[np.str_] | None:
        """(m,) the value of each case, from (n,) those of the labelled images; None where images of a case differ."""
        if any((values[images] != values[images[0]]).any() for images in self.members):
            return None
        return np.array([values[images[0]] for images in self.members])


def cases(
    labelled: Labelled, images: Ints, probabilities: Floats, fold: Ints, level: Level, readout: ReadoutSection
) -> Cases:
    """The cases that judged images make up.

    Args:
        labelled: the task's images.
        images: (j,) numbers of the judged ones.
        probabilities: (j, k) of them.
        fold: (j,) outer fold of them; a patient is in one.
        level: what is one case.
        readout: how probabilities are joined.
    """
    kind = labelled.target.kind
    if level == "image":
        names, of = labelled.keys[images], np.arange(len(images))
    else:
        breasts, breast_of = np.unique(labelled.breasts[images], return_inverse=True)
        probabilities = joined(kind, readout.views, probabilities, breast_of)
        names, of = breasts, breast_of
    if level == "patient":
        names, of = np.unique(labelled.patients[images], return_inverse=True)
        owner = np.zeros(len(breasts), np.int64)
        owner[breast_of] = of
        probabilities = joined(kind, readout.breasts, probabilities, owner)
    truth, agree = joined_truth(kind, labelled.truth[images], of)
    members = np.split(images[np.argsort(of, kind="stable")], np.cumsum(np.bincount(of))[:-1])
    first = np.unique(of, return_index=True)[1]
    assert (fold == fold[first][of]).all(), "a patient's images are in several folds"
    kept = np.flatnonzero(agree)
    return Cases(
        level,
        names[kept],
        labelled.patients[images][first[kept]],
        truth[kept],
        probabilities[kept],
        fold[first[kept]],
        tuple(members[i] for i in kept),
        len(names) - len(kept),
    )


def joined(kind: Kind, how: str, probabilities: Floats, of: Ints) -> Floats:
    """(g, k) of groups, from (m, k) of their members and (m,) group of each.

    The largest is that of the positive class, of each label, or on an ordered scale the member with the highest
    expected class. Several classes without an order have no largest: they are averaged.
    """
    if how == "mean" or kind == "multiclass":
        total = np.zeros((of.max() + 1, probabilities.shape[1]))
        np.add.at(total, of, probabilities)
        return total / np.bincount(of)[:, None]
    if kind == "multilabel":
        most = np.zeros((of.max() + 1, probabilities.shape[1]))
        np.maximum.at(most, of, probabilities)
        return most
    severity = probabilities @ np.arange(probabilities.shape[1])  # binary: the probability of class 1
    order = np.lexsort((severity, of))
    worst = order[np.cumsum(np.bincount(of)) - 1]
    return probabilities[worst]


def joined_truth(kind: Kind, truth: Ints, of: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """The largest truth of each group's members, and which groups have one: of several classes, those that agree."""
    most = np.zeros((of.max() + 1, *truth.shape[1:]), np.int64)
    np.maximum.at(most, of, truth)
    agree = np.ones(len(most), np.bool_)
    if kind == "multiclass":
        np.logical_and.at(agree, of, truth == most[of])
    return most, agree
