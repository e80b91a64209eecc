"""What frozen features say of a label while a training runs: a figure to watch, not to report.

No C is chosen, no interval drawn, and few images are read. `miram probe` makes the figure for a paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ...data.shards import ShardDataset
from ...engine.errors import UserError
from ...engine.metrics import Ints, Metric, score
from .album import spread

LEAST_FOLDS, MOST_FOLDS = 3, 5
C = 0.1
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO's k-NN (Caron et al. 2021, section 4.1)


@dataclass(frozen=True)
class Labelled:
    """Images with a label: rows of their data set, class and patient of each."""

    task: str
    rows: list[int]
    truth: Ints  # (n,) classes 0 … k-1
    patients: NDArray[np.str_]  # (n,)

    @classmethod
    def of(cls, shards: ShardDataset, task: str, most: int) -> Labelled:
        """At most so many of the images that have the label, evenly spread over the data set.

        Raises:
            UserError: no image has such a label, all have the same, or a class has too few patients.
        """
        if task not in shards.tasks:
            known = ", ".join(shards.tasks) or "nothing, the data has no labels"
            raise UserError(f"monitor.task: the data has no label {task!r}; it can be: {known}")
        labels = np.array(shards.labels(task))
        labelled = np.flatnonzero(labels != "")
        rows = labelled[spread(len(labelled), most)]
        classes, truth = np.unique(labels[rows], return_inverse=True)
        patients = np.array(
            ["/".join(pair) for pair in zip(*map(shards.rows.column, ("dataset", "patient")), strict=True)]
        )
        found = cls(task, rows.tolist(), truth, patients[rows])
        found.refuse_too_few(classes)
        return found

    def refuse_too_few(self, classes: NDArray[np.str_]) -> None:
        """Raises: UserError: there is nothing to tell apart, or a class has too few patients."""
        found = f"monitor.task={self.task}: of the {len(self.rows)} images looked at"
        if len(classes) < 2:
            raise UserError(f"{found} every one is {str(classes[0])!r}; choose another task, or raise monitor.images")
        rarest = fewest_patients(self.truth, self.patients, len(classes))
        if rarest < LEAST_FOLDS:
            raise UserError(
                f"{found} those of a class are of {rarest} patient{'s' * (rarest > 1)}, fewer than {LEAST_FOLDS}; "
                "raise monitor.images if there are more, or choose another task"
            )

    def __call__(self, features: NDArray[np.float32], read: list[int]) -> dict[str, float]:
        """The figures of (m, D) features of the images at places `read`: AUC of two classes, else balanced accuracy.

        Every image is judged by a fit on other patients. Nothing where too few patients of a class could be read, or
        a fold would be fitted without a class: a look must not stop a training.
        """
        truth, patients = self.truth[read], self.patients[read]
        k = int(self.truth.max()) + 1
        n = min(MOST_FOLDS, fewest_patients(truth, patients, k))
        if n < LEAST_FOLDS:
            return {}
        folds = list(StratifiedGroupKFold(n, shuffle=True, random_state=0).split(features, truth, patients))
        if any(len(np.unique(truth[fit])) < k for fit, _ in folds):
            return {}
        neighbours = make_pipeline(StandardScaler(), nearest_neighbours(min(len(fit) for fit, _ in folds)))
        metric: Metric = "AUC" if k == 2 else "balanced accuracy"
        fold = fold_of(folds, len(truth))
        figures = {}
        for name, model in (("probe", linear_probe()), ("knn", neighbours)):
            judged = cross_val_predict(model, features, truth, cv=folds, method="predict_proba")
            figures[f"{name}/{self.task}"] = score(metric, truth, judged, groups=fold)
        return {name: figure for name, figure in figures.items() if np.isfinite(figure)}


def fold_of(folds: Sequence[tuple[Ints, Ints]], images: int) -> Ints:
    """(images,) the fold each is judged in: an AUC compares no images across folds, which are not on one scale."""
    fold = np.empty(images, np.int64)
    for number, (_, held) in enumerate(folds):
        fold[held] = number
    return fold


def fewest_patients(truth: Ints, patients: NDArray[np.str_], k: int) -> int:
    """Patients of the rarest of k classes: so many folds can each have one."""
    return min(len(np.unique(patients[truth == i])) for i in range(k))


def linear_probe(c: float = C) -> Pipeline:
    """Logistic regression on standardised features, classes weighted to balance; `finetune` chooses C."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000, class_weight="balanced"))


def nearest_neighbours(
    fitted: int, neighbours: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> KNeighborsClassifier:
    """Each of the nearest k votes exp(cosine / T), as in DINO, which is exp(-distance / T) up to a common factor.

    Unlike there, it is given standardised features: those of a masked autoencoder share so large a mean that every
    cosine is near one, and the votes know nothing (measured: chance, against that of the linear probe).
    """
    weights = partial(votes, temperature=temperature)
    return KNeighborsClassifier(min(neighbours, fitted), metric="cosine", weights=weights)


def votes(distances: NDArray[np.float64], temperature: float = TEMPERATURE) -> NDArray[np.float64]:
    """Weights of neighbours at cosine distances, relative to the nearest so that none underflows."""
    return np.exp((distances.min(-1, keepdims=True) - distances) / temperature)
