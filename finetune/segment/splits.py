"""Who learns, who chooses the threshold, who is judged: always whole patients, each part with and without findings.

Legend: n images.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np

from ...engine.errors import UserError
from ...engine.metrics import Ints
from ..task import Fold, Task, grouped_folds, outer_folds


def outer(task: Task, folds: int, seed: int) -> tuple[list[Fold], str]:
    """Pairs of images to learn from and to judge, and their name for the reader.

    Raises:
        UserError: too few patients have a finding, or the official split leaks or has none in a part.
    """
    if official(task):
        for split in ("train", "test"):
            if not task.truth[task.splits == split].any():
                raise UserError(f"data.shards: no image of split {split!r} has anything but background in its mask")
        return outer_folds(replace(task, classes=("any",), truth=np.zeros_like(task.truth)), folds, seed)
    if (found := len(np.unique(task.patients[task.truth == 1]))) < folds:
        raise UserError(
            f"masks show findings of {found} patients, fewer than {folds} folds; lower segment.folds (2 at the least), "
            "or ingest more patients"
        )
    return outer_folds(balanced(task, np.arange(len(task.truth)), folds), folds, seed, "segment.folds")


def official(task: Task) -> bool:
    """Whether the data says who learns and who is judged."""
    return {"train", "test"} <= set(task.splits.tolist())


def inner(task: Task, fit: Ints, holdout: float | None, seed: int) -> tuple[Ints, Ints, str]:
    """Images to learn from, images that choose the threshold, and how they came about.

    Args:
        task: patients, and which images hold something.
        fit: the training images.
        holdout: share of the patients that chooses; None: nothing is to be chosen.
        seed: of the division.
    """
    if holdout is None:
        return fit, fit[:0], ""
    val = (task.splits[fit] == "val") & official(task)
    if task.truth[fit][val].any() and task.truth[fit][~val].any():
        return fit[~val], fit[val], "the official val patients"
    for count in range(max(2, round(1 / holdout)), 1, -1):
        with suppress(UserError):
            strata = balanced(task, fit, count)
            known, held = next(grouped_folds(strata.truth[fit], strata.patients[fit], count, seed, strata))
            if task.truth[fit][known].any() and task.truth[fit][held].any():
                return fit[known], fit[held], f"{len(held)} held-out images"
    return fit, fit[:0], "too few patients to hold some out"


def balanced(task: Task, images: Ints, folds: int) -> Task:
    """Images with and without findings apart where each kind has enough patients, else images with any beside none."""
    patients = [len(np.unique(task.patients[images][task.truth[images] == k])) for k in (0, 1)]
    if patients[0] >= folds:
        return task
    return replace(task, classes=("any",), truth=np.zeros_like(task.truth))
