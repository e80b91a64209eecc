"""Variance of AUCs without a bootstrap: DeLong, DeLong & Clarke-Pearson 1988, by midranks (Sun & Xu 2014).

The cases must be independent: one score a patient. For several images of a patient use `patient_bootstrap`.

Legend: m cases, p of them positive and n negative, s scores of each.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm, rankdata

from .estimate import NAN, Estimate, Floats, Ints

Z = float(norm.ppf(0.975))


def delong(truth: Ints, scores: Floats) -> tuple[Floats, Floats]:
    """(s,) AUCs and their (s, s) covariance; the latter nan with fewer than two positive or two negative cases.

    Args:
        truth: (m,) 0 or 1.
        scores: (s, m) of s models on the same cases, higher for the positive ones.
    """
    positive, negative = scores[:, truth == 1], scores[:, truth == 0]
    p, n = positive.shape[1], negative.shape[1]
    if min(p, n) == 0:
        return np.full(len(scores), NAN), np.full((len(scores), len(scores)), NAN)
    among_all = rankdata(np.concatenate([positive, negative], axis=1), axis=1)
    wins = (among_all[:, :p] - rankdata(positive, axis=1)) / n  # of each positive, share of negatives below it
    losses = 1 - (among_all[:, p:] - rankdata(negative, axis=1)) / p  # of each negative, share of positives above it
    if min(p, n) == 1:
        return wins.mean(1), np.full((len(scores), len(scores)), NAN)
    return wins.mean(1), np.atleast_2d(np.cov(wins)) / p + np.atleast_2d(np.cov(losses)) / n


def delong_interval(truth: Ints, score: Floats) -> Estimate:
    """AUC and its 95 % interval, symmetric on the logit scale so that it stays within 0 and 1.

    The interval is nan where the variance says nothing: an AUC of exactly 0 or 1, or a single case of a class.
    """
    (value,), ((variance,),) = delong(truth, score[None])
    if not variance > 0:
        return Estimate(float(value), (NAN, NAN))
    half = Z * np.sqrt(variance) / (value * (1 - value))
    return Estimate(float(value), (float(expit(logit(value) - half)), float(expit(logit(value) + half))))


def delong_test(truth: Ints, a: Floats, b: Floats) -> tuple[float, tuple[float, float], float]:
    """AUC of `a` minus that of `b` on the same cases, its 95 % interval, and the two-sided p.

    Two scores that rank alike differ by 0 with p = 1. Interval and p are nan where the variance says nothing.
    """
    aucs, covariance = delong(truth, np.stack([a, b]))
    difference = float(aucs[0] - aucs[1])
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    if variance > 1e-15:  # what is left of the three terms by rounding
        half = Z * float(np.sqrt(variance))
        return difference, (difference - half, difference + half), float(2 * norm.sf(abs(difference) / (half / Z)))
    if abs(difference) < 1e-12 and np.isfinite(variance):
        return 0.0, (0.0, 0.0), 1.0
    return difference, (NAN, NAN), NAN
