"""Arrays in, figures with intervals out.

An interval is the 2.5 to 97.5 percentile over bootstrap samples of *patients*: images of one patient go together,
because they are no independent evidence (Field & Welsh 2007). Two models are compared on the same samples.

Legend: n images, k classes, R bootstrap samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from .errors import UserError
from .seeding import generator

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Metric = Literal["AUC", "balanced accuracy"]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, value: float, samples: Floats) -> Estimate:
        """From the figure itself and its (R,) bootstrap samples."""
        low, high = np.percentile(samples, [2.5, 97.5])
        return cls(float(value), (float(low), float(high)))


def score(metric: Metric, truth: Ints, probabilities: Floats, weights: Floats | None = None) -> float:
    """The metric of (n, k) class probabilities against (n,) classes, images weighted.

    AUC is of class 1 in a binary task; balanced accuracy is the mean recall of the most probable class.
    """
    if metric == "AUC":
        return float(roc_auc_score(truth, probabilities[:, 1], sample_weight=weights))
    return float(balanced_accuracy_score(truth, probabilities.argmax(1), sample_weight=weights))


def chance(metric: Metric, classes: int) -> float:
    """What the most frequent class, always answered, scores."""
    return 0.5 if metric == "AUC" else 1 / classes


def patient_bootstrap(truth: Ints, patients: NDArray[np.str_], replicates: int, seed: int) -> Floats:
    """(R, n) how often each image occurs in each bootstrap sample of patients; samples lacking a class are redrawn.

    Raises:
        UserError: nearly all samples lack one.
    """
    names, patient_of = np.unique(patients, return_inverse=True)
    rng, classes = generator(seed, "bootstrap"), np.unique(truth)
    rows: list[Floats] = []
    for _ in range(100 * replicates):
        if len(rows) == replicates:
            break
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        weights = times[patient_of].astype(np.float64)
        if np.isin(classes, truth[weights > 0]).all():
            rows.append(weights)
    if len(rows) < replicates:
        raise UserError("too few patients of a class are judged for an interval: most bootstrap samples lack the class")
    return np.stack(rows)


def bootstrap_scores(metric: Metric, truth: Ints, probabilities: Floats, weights: Floats) -> Floats:
    """(R,) the metric on each bootstrap sample."""
    if metric == "AUC":
        return np.array([score(metric, truth, probabilities, w) for w in weights])
    of_class = truth[:, None] == np.unique(truth)  # all samples at once: a call of scikit-learn's each takes seconds
    hits = of_class & (probabilities.argmax(1) == truth)[:, None]
    return np.asarray(((weights @ hits) / (weights @ of_class)).mean(1))
