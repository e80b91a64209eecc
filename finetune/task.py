"""What a probe is asked and how it is judged fairly: labelled images, folds of patients, a choice on inner folds.

Every image is judged by a model that never saw its patient, and whatever is chosen is chosen on inner folds of the
training patients. Where the data has patients in both an official train and test split, those are used and the test
patients judged once.

Legend: n images, m judged images, k classes, c candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from ..data.shards import ShardDataset
from ..engine.errors import UserError
from ..engine.metrics import Floats, Ints, Metric, score

Fold = tuple[NDArray[np.int64], NDArray[np.int64]]  # images to fit on, images to judge


@dataclass(frozen=True)
class Task:
    """The labelled images of a data set: which, of whom, of what class."""

    name: str
    classes: tuple[str, ...]
    chosen: Ints  # (n,) rows of the data set that have a label
    truth: Ints  # (n,) class of each
    patients: NDArray[np.str_]  # (n,)
    splits: NDArray[np.str_]  # (n,)

    @property
    def metric(self) -> Metric:
        """AUC for two classes, balanced accuracy for more."""
        return "AUC" if len(self.classes) == 2 else "balanced accuracy"


@dataclass(frozen=True)
class Judgement:
    """What a probe says of m judged images: numbers in the task, (m, k) probabilities, fold; and each fold's choice."""

    images: Ints
    probabilities: Floats
    fold: Ints
    chosen: tuple[str, ...]


def read_task(shards: ShardDataset, name: str | None) -> Task:
    """The task of a data set's label.

    Raises:
        UserError: no task was named, no sample has it, or all have the same label.
    """
    if name is None:
        raise UserError("data.task is not set; name the label to predict, e.g. --data.task=density")
    labels = np.array(shards.labels(name))
    chosen = np.flatnonzero(labels != "")
    classes, truth = np.unique(labels[chosen], return_inverse=True)
    if len(classes) < 2:
        raise UserError(
            f"data.task={name}: every labelled image is {', '.join(map(repr, classes))}; there is nothing to tell apart"
        )
    dataset, patient, split = (
        np.array(c)[chosen] for c in (*map(shards.rows.column, ("dataset", "patient")), shards.splits)
    )
    patients = np.char.add(np.char.add(dataset, "/"), patient)
    return Task(name, tuple(map(str, classes)), chosen, truth, patients, split)


def outer_folds(task: Task, folds: int, seed: int, setting: str = "probe.folds") -> tuple[list[Fold], str]:
    """The official split if the task's images have one, else folds of patients; and its name for the reader.

    `setting` is what says how many folds.

    Raises:
        UserError: a class has fewer patients than there are folds, or the official split is unusable.
    """
    train, test = (np.flatnonzero(task.splits == s) for s in ("train", "test"))
    if len(train) and len(test):
        check_official(task, train, test)
        return [(train, test)], "official train and test"
    splits = list(grouped_folds(task.truth, task.patients, folds, seed, task, setting))
    return splits, f"{folds} folds by patient"


def check_official(task: Task, train: Ints, test: Ints) -> None:
    """Refuse a split that leaks or cannot be scored.

    Raises:
        UserError: a patient is on both sides, or a class is missing from one.
    """
    sides = {"train": train, "val": np.flatnonzero(task.splits == "val"), "test": test}
    for first, second in combinations(sides, 2):
        if both := len(np.intersect1d(task.patients[sides[first]], task.patients[sides[second]])):
            raise UserError(
                f"data.task={task.name}: {both} patients are in both {first} and {second}; correct the split column"
            )
    for name, side in (("train", train), ("test", test)):
        missing = [c for k, c in enumerate(task.classes) if k not in task.truth[side]]
        if missing:
            raise UserError(f"data.task={task.name}: no image of class {', '.join(missing)} is in split {name!r}")


def grouped_folds(
    truth: Ints, patients: NDArray[np.str_], folds: int, seed: int, task: Task, setting: str = "probe.folds"
) -> Iterator[Fold]:
    """Folds that keep a patient whole and classes balanced; `setting` is what says how many.

    Raises:
        UserError: a class has fewer patients than there are folds, or is in none of those to fit on.
    """
    for k, name in enumerate(task.classes):
        found = len(np.unique(patients[truth == k]))
        if found < folds:
            raise UserError(
                f"data.task={task.name}: class {name!r} has {found} patients, fewer than {folds} folds ({setting}); "
                "lower that (2 at the least), or ingest more patients"
            )
    for fit, rest in StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32).split(truth, truth, patients):
        if len(np.unique(truth[fit])) < len(task.classes):
            raise UserError(
                f"data.task={task.name}: a class is missing from what a fold is fitted on; lower {setting}, "
                "set another seed, or ingest more patients"
            )
        yield fit, rest


def judge_folds(
    task: Task, splits: Sequence[Fold], fit_and_judge: Callable[[Ints, Ints], tuple[Floats, str]]
) -> Judgement:
    """The judgement of every fold, joined.

    Args:
        task: classes and patients.
        splits: what to fit on and what to judge.
        fit_and_judge: images to fit on and m images to judge -> their (m, k) probabilities, and what was chosen.
    """
    judged = [fit_and_judge(fit, rest) for fit, rest in splits]
    fold = [np.full(len(rest), number) for number, (_, rest) in enumerate(splits)]
    images, probabilities = [rest for _, rest in splits], [p for p, _ in judged]
    chosen = tuple(choice for _, choice in judged)
    return Judgement(np.concatenate(images), np.concatenate(probabilities), np.concatenate(fold), chosen)


def choose(task: Task, fit: Ints, folds: int, seed: int, candidates: Callable[[Ints, Ints], Floats]) -> int:
    """The candidate with the best mean score over inner folds of the training patients; of equals the first.

    Args:
        task: classes and patients.
        fit: the training images.
        folds: how many inner folds.
        seed: of the inner folds.
        candidates: images to fit on and m images to judge -> (c, m, k) probabilities of every candidate.

    Raises:
        UserError: a class has fewer training patients than there are inner folds.
    """
    scores = []
    for known, held in grouped_folds(task.truth[fit], task.patients[fit], folds, seed, task):
        truth = task.truth[fit[held]]
        if task.metric == "balanced accuracy" or len(np.unique(truth)) == 2:  # no AUC of a single class
            scores.append([score(task.metric, truth, p) for p in candidates(fit[known], fit[held])])
    return int(np.mean(scores, axis=0).argmax()) if scores else 0


def fold_scores(task: Task, judgement: Judgement) -> list[float]:
    """The metric within each fold that can be scored: no AUC of a single class."""
    truth = task.truth[judgement.images]
    folds = [judgement.fold == f for f in np.unique(judgement.fold)]
    scored = [fold for fold in folds if task.metric == "balanced accuracy" or len(np.unique(truth[fold])) == 2]
    return [score(task.metric, truth[fold], judgement.probabilities[fold]) for fold in scored]
