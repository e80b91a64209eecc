"""All figures of a kind of task by the names people know them by, and the one that leads.

    kind         truth               probabilities              headline
    binary       (m,) 0 or 1         (m, 2)                     AUC
    multiclass   (m,) class          (m, k)                     balanced accuracy
    ordinal      (m,) class          (m, k) lowest first        quadratic kappa
    multilabel   (m, k) 0 or 1       (m, k) each for itself     AUC, the mean over labels

Legend: m cases, k classes, R bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import numpy as np

from . import decisions, ranking
from .calibration import brier, ece, log_loss
from .estimate import Estimate, Floats, Ints, Kind

Metric = Literal["AUC", "balanced accuracy", "quadratic kappa"]
HEADLINE: Mapping[Kind, Metric] = {
    "binary": "AUC",
    "multiclass": "balanced accuracy",
    "ordinal": "quadratic kappa",
    "multilabel": "AUC",
}
MAX_FPR = 0.1  # of screening: McKinney et al. 2020
AT_ONCE = 1 << 18  # weights worked on at a time: what fits the cache is faster, and 50,000 images fit the memory


def headline(kind: Kind) -> Metric:
    """The figure that leads."""
    return HEADLINE[kind]


def panel(
    kind: Kind, truth: Ints, probabilities: Floats, decided: Ints, weights: Floats, groups: Ints | None = None
) -> dict[str, Floats]:
    """(R,) every figure of a kind of task, by name, the headline first.

    Args:
        kind: of the task.
        truth: (m,) classes, or (m, k) 0/1 of labels.
        probabilities: (m, k).
        decided: as truth.
        weights: (R, m).
        groups: (m,) folds: see `ranking`.
    """
    of_kind = {"binary": _binary, "multilabel": _multilabel}.get(kind, partial(_classes, kind))
    found = [of_kind(truth, probabilities, decided, part, groups) for part in parts(weights)]
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def estimates(
    kind: Kind, truth: Ints, probabilities: Floats, decided: Ints, weights: Floats, groups: Ints | None = None
) -> dict[str, Estimate]:
    """Every figure with its interval: arguments as of `panel`."""
    every = partial(panel, kind, truth, probabilities, decided, groups=groups)
    values, samples = every(weights=np.ones((1, len(truth)))), every(weights=weights)
    return {name: Estimate.of(float(value[0]), samples[name]) for name, value in values.items()}


def parts(weights: Floats) -> Iterator[Floats]:
    """(R, m) weights, so many samples at a time that the work stays small."""
    rows = max(1, AT_ONCE // weights.shape[1])
    return (weights[start : start + rows] for start in range(0, len(weights), rows))


def _binary(
    truth: Ints, probabilities: Floats, decided: Ints, weights: Floats, groups: Ints | None
) -> dict[str, Floats]:
    score = probabilities[:, 1]
    folds, (pooled,) = ranking.curves(truth, score, weights, groups), ranking.curves(truth, score, weights)
    sensitivity = decisions.sensitivity(truth, decided, weights)
    specificity = decisions.specificity(truth, decided, weights)
    return {
        "AUC": ranking.area(folds),
        "AP": pooled.average_precision(),
        f"pAUC (FPR <= {MAX_FPR})": ranking.partial_area(folds, MAX_FPR),
        "sensitivity at 90 % specificity": pooled.sensitivity_at(0.9),
        "sensitivity at 95 % specificity": pooled.sensitivity_at(0.95),
        "specificity at 90 % sensitivity": pooled.specificity_at(0.9),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "balanced accuracy": (sensitivity + specificity) / 2,
        "accuracy": decisions.accuracy(truth, decided, weights),
        "F1": decisions.f1(truth, decided, weights),
        "pF1": decisions.pf1(truth, score, weights),
        "kappa": decisions.kappa(truth, decided, weights),
        **_calibration("binary", truth, probabilities, weights),
    }


def _multilabel(
    truth: Ints, probabilities: Floats, decided: Ints, weights: Floats, groups: Ints | None
) -> dict[str, Floats]:
    """Means over the labels that some cases have and others have not; of those no case or every case has, nan."""
    both = [label for label in range(truth.shape[1]) if len(np.unique(truth[:, label])) == 2]
    each = [
        _binary(
            truth[:, j], np.stack([1 - probabilities[:, j], probabilities[:, j]], 1), decided[:, j], weights, groups
        )
        for j in both or range(truth.shape[1])
    ]
    return {name: np.mean([label[name] for label in each], axis=0) for name in each[0]}


def _classes(
    kind: Kind, truth: Ints, probabilities: Floats, decided: Ints, weights: Floats, groups: Ints | None
) -> dict[str, Floats]:
    k = probabilities.shape[1]
    kappas = {
        "quadratic kappa": decisions.kappa(truth, decided, weights, "quadratic", k),
        "linear kappa": decisions.kappa(truth, decided, weights, "linear", k),
    }
    return {
        **(kappas if kind == "ordinal" else {}),
        "balanced accuracy": decisions.balanced_accuracy(truth, decided, weights),
        "accuracy": decisions.accuracy(truth, decided, weights),
        "macro F1": decisions.f1(truth, decided, weights, macro=True),
        "kappa": decisions.kappa(truth, decided, weights, None, k),
        "AUC, one against the rest": _mean_auc(_one_hot(truth, k), probabilities, weights, groups),
        **_calibration(kind, truth, probabilities, weights),
    }


def _calibration(kind: Kind, truth: Ints, probabilities: Floats, weights: Floats) -> dict[str, Floats]:
    figures = {"Brier": brier, "log loss": log_loss, "ECE": ece}
    return {name: figure(kind, truth, probabilities, weights) for name, figure in figures.items()}


def _one_hot(truth: Ints, classes: int) -> Ints:
    return np.eye(classes, dtype=np.int64)[truth]


def _mean_auc(truth: Ints, scores: Floats, weights: Floats, groups: Ints | None) -> Floats:
    """(R,) mean AUC of the columns of (m, k) truth that have both values."""
    both = [j for j in range(truth.shape[1]) if len(np.unique(truth[:, j])) == 2]
    each = [ranking.auc(truth[:, j], scores[:, j], weights, groups) for j in both]
    return np.mean(each, axis=0) if each else np.full(len(weights), np.nan)


# ---------------------------------------------------------------------------------------------- one figure


def score(
    metric: Metric, truth: Ints, probabilities: Floats, weights: Floats | None = None, groups: Ints | None = None
) -> float:
    """One metric of (m, k) probabilities, cases weighted by (m,) weights; the rest as in `bootstrap_scores`."""
    once = np.ones(len(truth)) if weights is None else weights
    return float(bootstrap_scores(metric, truth, probabilities, once[None], groups)[0])


def bootstrap_scores(
    metric: Metric, truth: Ints, probabilities: Floats, weights: Floats, groups: Ints | None = None
) -> Floats:
    """(R,) one metric on each bootstrap sample.

    AUC is of class 1 where truth is (m,), the mean over labels where it is (m, k), and compares pairs of the same
    group only. Balanced accuracy is of the most probable class, quadratic kappa of the median of the distribution.
    """
    return np.concatenate([_score(metric, truth, probabilities, part, groups) for part in parts(weights)])


def _score(metric: Metric, truth: Ints, probabilities: Floats, weights: Floats, groups: Ints | None) -> Floats:
    if metric == "AUC" and truth.ndim == 2:
        return _mean_auc(truth, probabilities, weights, groups)
    if metric == "AUC":
        return ranking.auc(truth, probabilities[:, 1], weights, groups)
    if metric == "balanced accuracy":
        return decisions.balanced_accuracy(truth, probabilities.argmax(1), weights)
    median = (np.cumsum(probabilities, axis=1)[:, :-1] < 0.5).sum(1)
    return decisions.kappa(truth, median, weights, "quadratic", probabilities.shape[1])


def chance(metric: Metric, classes: int) -> float:
    """What the most frequent class, always answered, scores."""
    return {"AUC": 0.5, "balanced accuracy": 1 / classes, "quadratic kappa": 0.0}[metric]
