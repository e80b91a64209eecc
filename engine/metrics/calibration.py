"""From logits to probabilities, and whether these can be taken at their word.

Logits are (m, w):

    binary, multiclass   softmax over w = k classes
    multilabel           w = k labels, a sigmoid each
    ordinal              w = k - 1 of CORN (Shi, Cao & Raschka 2023): sigmoid(z_j) is the probability of a class above j
                         given that it is at least j, so P(y > j) is the product of sigmoid(z_0) … sigmoid(z_j)

Legend: m cases, k classes, w logits, R bootstrap samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax

from .estimate import Floats, Ints, Kind, mean

BINS = 15
EPSILON = float(np.finfo(np.float64).eps)
REACH = 100.0  # temperatures are looked for up to so many times smaller or larger than the logits' own spread


def probabilities(kind: Kind, logits: NDArray[np.floating], temperature: float = 1.0) -> Floats:
    """(m, k) of (m, w) logits at a temperature; rows sum to 1, but of multilabel each stands alone.

    The hotter, the more alike all answers become. On an ordered scale it divides the classes' own logarithms: were its
    questions' answers divided before they are multiplied, all would sink towards the lowest class.
    """
    return np.exp(_log_probabilities(kind, _scores(kind, logits) / temperature))


def _scores(kind: Kind, logits: NDArray[np.floating]) -> Floats:
    """What a temperature divides: (m, w) logits, or on an ordered scale (m, k) logarithms of class probabilities."""
    x: Floats = logits.astype(np.float64)
    if kind != "ordinal":
        return x
    reached = np.cumsum(np.pad(log_expit(x), ((0, 0), (1, 0))), axis=1)
    return np.asarray(reached + np.pad(log_expit(-x), ((0, 0), (0, 1))))


def _log_probabilities(kind: Kind, scores: Floats) -> Floats:
    """(m, k) logarithms, which neither overflow nor vanish."""
    return np.asarray(log_expit(scores) if kind == "multilabel" else log_softmax(scores, axis=1))


def _surprise(kind: Kind, scores: Floats, truth: Ints) -> float:
    """Mean negative log likelihood."""
    if kind == "multilabel":
        return float(-log_expit(np.where(truth == 1, scores, -scores)).mean())
    return float(-_log_probabilities(kind, scores)[np.arange(len(truth)), truth].mean())


def fit_temperature(kind: Kind, logits: NDArray[np.floating], truth: Ints) -> float:
    """The T > 0 at which the truth is most likely (Guo et al. 2017).

    1.0 where it cannot be told: fewer than two classes, equal logits, or every case on its right side, so that the
    likelihood grows without end as T falls. Logits that say nothing or the contrary give the largest T that is looked
    for, with which probabilities are all but equal.
    """
    scores = _scores(kind, logits)
    spread = scores if kind == "multilabel" else scores - scores.mean(1, keepdims=True)
    scale = float(np.sqrt(np.mean(spread**2))) if scores.size else 0.0
    if scale == 0 or len(np.unique(truth)) < 2:
        return 1.0
    reach = float(np.log(REACH))  # the likelihood is concave in 1 / T: one optimum

    def surprise(step: float) -> float:
        return _surprise(kind, spread / (scale * np.exp(step)), truth)

    step = float(minimize_scalar(surprise, bounds=(-reach, reach), method="bounded", options={"xatol": 1e-6}).x)
    return 1.0 if step < -reach + 0.01 else scale * float(np.exp(step))


def brier(kind: Kind, truth: Ints, probabilities: Floats, weights: Floats) -> Floats:
    """(R,) mean squared distance of probability and truth.

    Of the positive class in binary tasks and of each label, averaged, in multilabel ones (0 to 1); summed over the
    classes in the others (Brier 1950; 0 to 2).
    """
    if kind == "binary":
        return mean((probabilities[:, 1] - truth) ** 2, weights)
    if kind == "multilabel":
        return mean(((probabilities - truth) ** 2).mean(1), weights)
    return mean(((probabilities - np.eye(probabilities.shape[1])[truth]) ** 2).sum(1), weights)


def log_loss(kind: Kind, truth: Ints, probabilities: Floats, weights: Floats) -> Floats:
    """(R,) mean negative logarithm of what the truth was given, in nats; of multilabel the mean over labels too."""
    if kind == "multilabel":
        given = np.where(truth == 1, probabilities, 1 - probabilities)
        return mean(-np.log(given.clip(EPSILON)).mean(1), weights)
    return mean(-np.log(probabilities[np.arange(len(truth)), truth].clip(EPSILON)), weights)


def ece(kind: Kind, truth: Ints, probabilities: Floats, weights: Floats, n_bins: int = BINS) -> Floats:
    """(R,) expected calibration error (Naeini et al. 2015): mean gap between what is said and what is so, over bins.

    Bins are equally wide and contain their lower end; the last one also 1. What is said: in binary tasks the
    probability of class 1, in multilabel ones that of each label (averaged over them); in the others that of the most
    probable class, and it is so if that is the truth.
    """
    if kind == "binary":
        return binned_gap(probabilities[:, 1], truth == 1, weights, n_bins)
    if kind == "multilabel":
        each = [binned_gap(p, t == 1, weights, n_bins) for p, t in zip(probabilities.T, truth.T, strict=True)]
        return np.asarray(np.mean(each, axis=0))
    return binned_gap(probabilities.max(1), probabilities.argmax(1) == truth, weights, n_bins)


def binned_gap(said: Floats, so: NDArray[np.bool_], weights: Floats, n_bins: int) -> Floats:
    """(R,) the sum over bins of |sum of said - sum of so|, a case."""
    edges = np.linspace(0, 1, n_bins + 1)[1:-1]
    gaps = np.eye(n_bins)[np.searchsorted(edges, said, side="right")] * (said - so)[:, None]
    return np.asarray(np.abs(weights @ gaps).sum(1) / weights.sum(1))
