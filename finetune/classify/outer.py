"""Who judges whom: the official split, or folds of patients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...engine.errors import UserError
from ..task import Fold, Task, outer_folds
from .labels import Labelled


def outer(labelled: Labelled, folds: int, seed: int) -> tuple[list[Fold], str]:
    """Pairs of images to train on and to judge, and their name for the reader.

    Several labels at once have no classes to balance but the rarest label of an image: strata of too few patients join
    the largest one, and an official split only has to have every label on both sides.

    Raises:
        UserError: a class has fewer patients than there are folds, or the official split is unusable.
    """
    task = labelled.strata
    if labelled.target.kind != "multilabel":
        return outer_folds(task, folds, seed, "finetune.folds")
    if {"train", "test"} <= set(labelled.splits.tolist()):
        check_labels(labelled)
        return outer_folds(replace(task, classes=("any",), truth=np.zeros_like(task.truth)), folds, seed)
    return outer_folds(joined_strata(task, folds), folds, seed, "finetune.folds")


def check_labels(labelled: Labelled) -> None:
    """Refuse an official split that cannot be learnt from, or not be scored.

    Raises:
        UserError: no image, or every image, of a side has a label.
    """
    for side in ("train", "test"):
        truth = labelled.truth[labelled.splits == side]
        for name, share in zip(labelled.target.classes, truth.mean(0), strict=True):
            if share in (0, 1):
                which = "every" if share else "no"
                raise UserError(
                    f"data.task={labelled.target.name}: {which} image of split {side!r} has the label {name}"
                )


def joined_strata(task: Task, folds: int) -> Task:
    """Strata of fewer patients than there are folds, made part of the largest."""
    patients = np.array([len(np.unique(task.patients[task.truth == k])) for k in range(len(task.classes))])
    kept = np.flatnonzero((patients >= folds) | (patients == patients.max()))
    truth = np.where(np.isin(task.truth, kept), task.truth, int(patients.argmax()))
    return replace(task, classes=tuple(task.classes[k] for k in kept), truth=np.searchsorted(kept, truth))
