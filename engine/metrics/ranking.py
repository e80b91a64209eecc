"""How well a score ranks positive above negative cases.

Every figure is read off a curve of cumulated weights at the distinct scores, so ties are treated as one step: half a
pair each in the AUC, one threshold in everything else.

Models of different folds are not on one scale. AUC and partial AUC therefore take `groups`, the fold of each case:
they compare pairs of the same fold only, and a fold counts by its number of pairs. The other figures are about one
threshold for all cases and pool the folds.

Legend: m cases, R bootstrap samples, u distinct scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .estimate import Floats, Ints, ratio

ROUNDING = 1e-9  # 1 - 0.9 is a little less than 0.1: a specificity of exactly what is asked must count


@dataclass(frozen=True)
class Curve:
    """Weight of positives and of negatives at or above each distinct score, the highest first; (R, u) each."""

    positives: Floats
    negatives: Floats

    @classmethod
    def of(cls, truth: Ints, score: Floats, weights: Floats, members: Ints) -> Curve:
        """Of the cases whose numbers are in `members`: (m,) truth 0/1 and score, (R, m) weights."""
        order = members[np.argsort(-score[members], kind="stable")]
        ordered, positive = weights[:, order], truth[order] == 1
        last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # of each run of equal scores
        above = [np.cumsum(np.where(side, ordered, 0), axis=1) for side in (positive, ~positive)]
        return cls(*(a if len(last) == len(order) else a[:, last] for a in above))

    @property
    def totals(self) -> tuple[Floats, Floats]:
        """(R,) weight of all positives, and of all negatives."""
        return self.positives[:, -1], self.negatives[:, -1]

    @property
    def pairs(self) -> Floats:
        """(R,) of a positive and a negative case."""
        return self.positives[:, -1] * self.negatives[:, -1]

    def ordered(self) -> Floats:
        """(R,) pairs in the right order, a tie counting half: AUC times the pairs; exact for whole weights."""
        return np.einsum("ru,ru->r", steps(self.negatives), self.positives - steps(self.positives) / 2)

    def partial(self, max_fpr: float) -> Floats:
        """(R,) area left of `max_fpr` under the straight lines between the steps, in pairs."""
        up, along = steps(self.positives), steps(self.negatives)
        room = max_fpr * self.negatives[:, -1:] - (self.negatives - along)
        taken = np.clip(room, 0, along)
        share = np.divide(taken, along, out=np.zeros_like(along), where=along > 0)
        return np.einsum("ru,ru->r", taken, self.positives - up + share * up / 2)

    def average_precision(self) -> Floats:
        """(R,) sum over thresholds of precision times the recall gained there."""
        called = self.positives + self.negatives
        precision = np.divide(self.positives, called, out=np.zeros_like(called), where=called > 0)
        return ratio(np.einsum("ru,ru->r", steps(self.positives), precision), self.positives[:, -1])

    def sensitivity_at(self, specificity: float) -> Floats:
        """(R,) see the function of this name."""
        positives, negatives = self.totals
        allowed = self.negatives <= (1 - specificity + ROUNDING) * negatives[:, None]
        return defined(ratio(np.where(allowed, self.positives, 0).max(1), positives), negatives)

    def specificity_at(self, sensitivity: float) -> Floats:
        """(R,) see the function of this name."""
        positives, negatives = self.totals
        enough = self.positives >= (sensitivity - ROUNDING) * positives[:, None]
        false = np.where(enough, self.negatives, np.inf).min(1, initial=0 if sensitivity <= 0 else np.inf)
        return defined(ratio(negatives - false, negatives), positives)


def steps(cumulated: Floats) -> Floats:
    """What each place adds to the sum before it."""
    return np.diff(cumulated, axis=1, prepend=0)


def defined(figure: Floats, needed: Floats) -> Floats:
    """The figure, nan where what it needs is not there."""
    return np.where(needed > 0, figure, np.nan)


def curves(truth: Ints, score: Floats, weights: Floats, groups: Ints | None = None) -> list[Curve]:
    """One curve a group; one of all cases where there are no groups."""
    assert len(truth) == len(score) == weights.shape[1] > 0
    if groups is None:
        return [Curve.of(truth, score, weights, np.arange(len(truth)))]
    return [Curve.of(truth, score, weights, np.flatnonzero(groups == group)) for group in np.unique(groups)]


def area(of: Sequence[Curve]) -> Floats:
    """(R,) AUC within curves."""
    return ratio(np.sum([c.ordered() for c in of], axis=0), np.sum([c.pairs for c in of], axis=0))


def partial_area(of: Sequence[Curve], max_fpr: float) -> Floats:
    """(R,) partial AUC within curves, standardised as `partial_auc` says."""
    part = ratio(np.sum([c.partial(max_fpr) for c in of], axis=0), np.sum([c.pairs for c in of], axis=0))
    least, most = max_fpr**2 / 2, max_fpr
    return (1 + (part - least) / (most - least)) / 2


def auc(truth: Ints, score: Floats, weights: Floats, groups: Ints | None = None) -> Floats:
    """(R,) share of pairs of a positive and a negative case, of the same group, that are in the right order.

    Args:
        truth: (m,) 0 or 1.
        score: (m,) higher for the positive ones.
        weights: (R, m).
        groups: (m,) e.g. the fold of each case.
    """
    return area(curves(truth, score, weights, groups))


def partial_auc(
    truth: Ints, score: Floats, weights: Floats, groups: Ints | None = None, max_fpr: float = 0.1
) -> Floats:
    """(R,) AUC of false positive rates up to `max_fpr`, standardised so that chance is 0.5 and perfection 1.

    McClish 1989; it depends on the range, which is to be named beside it. Groups as in `auc`.
    """
    return partial_area(curves(truth, score, weights, groups), max_fpr)


def average_precision(truth: Ints, score: Floats, weights: Floats) -> Floats:
    """(R,) the mean of precision over recall, by steps and not by straight lines; chance is the share of positives."""
    return curves(truth, score, weights)[0].average_precision()


def sensitivity_at(truth: Ints, score: Floats, weights: Floats, specificity: float = 0.9) -> Floats:
    """(R,) the largest sensitivity over thresholds whose specificity is at least that asked.

    A threshold calls every case positive whose score is at or above it; cases of equal score go together, nothing is
    interpolated, and a threshold above every score (sensitivity 0, specificity 1) is one of them.
    """
    return curves(truth, score, weights)[0].sensitivity_at(specificity)


def specificity_at(truth: Ints, score: Floats, weights: Floats, sensitivity: float = 0.9) -> Floats:
    """(R,) the largest specificity over thresholds whose sensitivity is at least that asked, as in `sensitivity_at`."""
    return curves(truth, score, weights)[0].specificity_at(sensitivity)
