"""A linear probe that a reviewer would accept: logistic regression on frozen features, everything grouped by patient.

C is chosen on inner folds of the training patients only; every image is judged by a model that never saw its patient.
Where the data has patients in both an official train and test split, those are used and the test patients judged once.

Legend: n images, D features, k classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

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
    """What a probe says of m judged images: their numbers in the task, (m, k) probabilities, fold, C of each fold."""

    images: Ints
    probabilities: Floats
    fold: Ints
    chosen_c: tuple[float, ...]


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


def outer_folds(task: Task, folds: int, seed: int) -> tuple[list[Fold], str]:
    """The official split if the task's images have one, else folds of patients; and its name for the reader.

    Raises:
        UserError: a class has fewer patients than there are folds, or the official split is unusable.
    """
    train, test = (np.flatnonzero(task.splits == s) for s in ("train", "test"))
    if len(train) and len(test):
        check_official(task, train, test)
        return [(train, test)], "official train and test"
    splits = list(grouped_folds(task.truth, task.patients, folds, seed, task))
    return splits, f"{folds} folds by patient"


def check_official(task: Task, train: Ints, test: Ints) -> None:
    """Refuse a split that leaks or cannot be scored.

    Raises:
        UserError: a patient is on both sides, or a class is missing from one.
    """
    both = len(np.intersect1d(task.patients[train], task.patients[test]))
    if both:
        raise UserError(f"data.task={task.name}: {both} patients are in both train and test; correct the split column")
    for name, side in (("train", train), ("test", test)):
        missing = [c for k, c in enumerate(task.classes) if k not in task.truth[side]]
        if missing:
            raise UserError(f"data.task={task.name}: no image of class {', '.join(missing)} is in split {name!r}")


def grouped_folds(truth: Ints, patients: NDArray[np.str_], folds: int, seed: int, task: Task) -> Iterator[Fold]:
    """Folds that keep a patient whole and classes balanced.

    Raises:
        UserError: a class has fewer patients than there are folds.
    """
    for k in np.unique(truth):
        found = len(np.unique(patients[truth == k]))
        if found < folds:
            raise UserError(
                f"data.task={task.name}: class {task.classes[k]!r} has {found} patients, fewer than {folds} folds; "
                "lower probe.folds and probe.inner_folds, or ingest more patients"
            )
    yield from StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32).split(truth, truth, patients)


def judge(
    features: NDArray[np.float32], task: Task, splits: Sequence[Fold], c_grid: Sequence[float], inner: int, seed: int
) -> Judgement:
    """Fit on each fold's training patients, judge the others.

    Args:
        features: (n, D) of the task's images.
        task: classes and patients.
        splits: what to fit on and what to judge.
        c_grid: strengths to choose from.
        inner: folds of training patients the choice is made on.
        seed: of the inner folds.
    """
    judged, probabilities, fold, chosen_c = [], [], [], []
    for number, (fit, rest) in enumerate(splits):
        search = fit_probe(features[fit], task, fit, c_grid, inner, seed)
        assert len(search.classes_) == len(task.classes), "a fold was fitted without one of the classes"
        judged.append(rest)
        probabilities.append(search.predict_proba(features[rest]))
        fold.append(np.full(len(rest), number))
        chosen_c.append(float(search.best_params_["logisticregression__C"]))
    return Judgement(np.concatenate(judged), np.concatenate(probabilities), np.concatenate(fold), tuple(chosen_c))


def fit_probe(
    features: NDArray[np.float32], task: Task, fit: Ints, c_grid: Sequence[float], inner: int, seed: int
) -> GridSearchCV:
    """Logistic regression on standardised features with C chosen on inner folds of patients."""
    truth, patients = task.truth[fit], task.patients[fit]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, class_weight="balanced"))
    scoring = "roc_auc" if task.metric == "AUC" else "balanced_accuracy"
    folds = list(grouped_folds(truth, patients, inner, seed, task))
    search = GridSearchCV(model, {"logisticregression__C": list(c_grid)}, scoring=scoring, cv=folds)
    return search.fit(features, truth)


def fold_scores(task: Task, judgement: Judgement) -> list[float]:
    """The metric within each fold."""
    truth = task.truth[judgement.images]
    return [
        score(task.metric, truth[judgement.fold == f], judgement.probabilities[judgement.fold == f])
        for f in np.unique(judgement.fold)
    ]
