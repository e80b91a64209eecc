"""Figures of decisions that were made, whatever threshold made them.

Legend: m cases, k classes, R bootstrap samples.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.sparse import csr_array

from .estimate import Floats, Ints, mean, ratio


def confusion(truth: Ints, decided: Ints, weights: Floats, classes: int | None = None) -> Floats:
    """(R, k, k) weight of the cases of each class (rows) decided as each class (columns)."""
    k = classes or 1 + int(max(truth.max(), decided.max()))
    cells = csr_array((np.ones(len(truth)), (np.arange(len(truth)), truth * k + decided)), shape=(len(truth), k * k))
    return np.asarray(weights @ cells).reshape(-1, k, k)


def accuracy(truth: Ints, decided: Ints, weights: Floats) -> Floats:
    """(R,) share of the cases decided rightly."""
    return mean((truth == decided).astype(np.float64), weights)


def balanced_accuracy(truth: Ints, decided: Ints, weights: Floats) -> Floats:
    """(R,) mean recall of the classes that occur in the truth; nan in a sample that lacks one of them."""
    table = confusion(truth, decided, weights)[:, np.unique(truth)]
    hits = table[:, np.arange(table.shape[1]), np.unique(truth)]
    return np.asarray(ratio(hits, table.sum(2)).mean(1))


def kappa(
    truth: Ints,
    decided: Ints,
    weights: Floats,
    scheme: Literal["linear", "quadratic"] | None = None,
    classes: int | None = None,
) -> Floats:
    """(R,) Cohen's kappa: 1 minus observed over expected disagreement; nan where none is to be expected.

    Args:
        truth: (m,) classes.
        decided: (m,) classes.
        weights: (R, m).
        scheme: how disagreement grows with the distance of two classes; None: all are equally far apart.
        classes: k; None: as many as occur. A class that does not occur keeps its place on the scale.
    """
    table = confusion(truth, decided, weights, classes)
    distance = np.abs(np.subtract.outer(*[np.arange(table.shape[1], dtype=np.float64)] * 2))
    cost = {None: np.sign(distance), "linear": distance, "quadratic": distance**2}[scheme]
    expected = np.einsum("ri,rj,ij->r", table.sum(2), table.sum(1), cost)
    observed = np.einsum("rij,ij->r", table, cost) * table.sum((1, 2))
    return 1 - ratio(observed, expected)


def f1(truth: Ints, decided: Ints, weights: Floats, macro: bool | None = None) -> Floats:
    """(R,) harmonic mean of precision and recall: of class 1 in two classes, else the mean over classes.

    The mean is over the classes that occur in a sample's truth or decisions. nan in a sample that lacks a class of
    the truth; of class 1 also where it never occurs in the truth. `macro` overrides what the number of classes says.
    """
    table = confusion(truth, decided, weights, max(2, 1 + int(max(truth.max(), decided.max()))))
    hits, of_class = np.einsum("rii->ri", table), table.sum(2)
    each = ratio(2 * hits, of_class + table.sum(1))
    if not (table.shape[1] > 2 if macro is None else macro):
        return np.where(of_class[:, 1] > 0, each[:, 1], np.nan)
    occurring = ~np.isnan(each)
    found = ratio(np.where(occurring, each, 0).sum(1), occurring.sum(1).astype(np.float64))
    return np.where((of_class[:, np.unique(truth)] > 0).all(1), found, np.nan)


def pf1(truth: Ints, probability: Floats, weights: Floats) -> Floats:
    """(R,) probabilistic F1 (RSNA 2022 screening challenge): F1 in which a case counts by its probability.

    With T the sum of the positives' probabilities, F that of the negatives' and P the number of positives, precision
    is T / (T + F), recall T / P, and their harmonic mean 2 T / (T + F + P).
    """
    positives = weights @ (truth == 1).astype(np.float64)
    return np.where(
        positives > 0, ratio(2 * (weights @ (truth * probability)), weights @ probability + positives), np.nan
    )


def sensitivity(truth: Ints, decided: Ints, weights: Floats) -> Floats:
    """(R,) share of the positive cases decided as positive; truth and decisions 0 or 1."""
    positive = truth == 1
    return mean((decided[positive] == 1).astype(np.float64), weights[:, positive])


def specificity(truth: Ints, decided: Ints, weights: Floats) -> Floats:
    """(R,) share of the negative cases decided as negative; truth and decisions 0 or 1."""
    negative = truth == 0
    return mean((decided[negative] == 0).astype(np.float64), weights[:, negative])
