"""Ranking figures against scikit-learn, against pairs counted one by one, and by hand where scores tie."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from miram.engine.metrics.ranking import auc, average_precision, partial_auc, sensitivity_at, specificity_at

Array = NDArray[np.float64]
Cases = tuple[NDArray[np.int64], Array, NDArray[np.int64], Array]  # truth, score, group, weights

ONES = np.ones((1, 8))
# Few distinct scores: most cases tie with another.
ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 2), st.integers(0, 3)), min_size=2, max_size=25
)


def arrays(rows: list[tuple[int, int, int, int]]) -> Cases:
    truth, rank, group, times = (np.array(column) for column in zip(*rows, strict=True))
    return truth, rank / 5, group, times.astype(np.float64)


def both(rows: list[tuple[int, int, int, int]]) -> bool:
    return {0, 1} <= {truth for truth, _, _, times in rows if times}


def repeated(cases: Cases) -> tuple[NDArray[np.int64], Array, NDArray[np.int64]]:
    truth, score, group, weights = cases
    times = weights.astype(int)
    return np.repeat(truth, times), np.repeat(score, times), np.repeat(group, times)


FIGURES: dict[str, tuple[Callable[..., Array], Callable[..., float]]] = {
    "auc": (auc, roc_auc_score),
    "average precision": (average_precision, average_precision_score),
    "partial auc": (partial_auc, lambda truth, score: roc_auc_score(truth, score, max_fpr=0.1)),
    "wide partial auc": (
        lambda *cases: partial_auc(*cases, max_fpr=0.37),
        lambda truth, score: roc_auc_score(truth, score, max_fpr=0.37),
    ),
}


@pytest.mark.parametrize("name", FIGURES)
@given(rows=ROWS.filter(both))
def test_figures_are_those_of_scikit_learn_on_repeated_cases(name: str, rows: list[tuple[int, int, int, int]]) -> None:
    ours, theirs = FIGURES[name]
    truth, score, _, weights = cases = arrays(rows)
    again, repeated_score, _ = repeated(cases)
    expected = theirs(again, repeated_score)
    assert ours(truth, score, weights[None])[0] == pytest.approx(expected, abs=1e-12)
    assert ours(again, repeated_score, np.ones((1, len(again))))[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", FIGURES)
def test_scores_without_ties_and_fractional_weights_are_scikit_learn_s_too(name: str) -> None:
    rng = np.random.default_rng(0)
    truth, score, weights = rng.integers(0, 2, 300), rng.normal(size=300), rng.random((7, 300))
    ours, _ = FIGURES[name]
    theirs = {"auc": roc_auc_score, "average precision": average_precision_score}.get(name, roc_auc_score)
    extra = {"partial auc": {"max_fpr": 0.1}, "wide partial auc": {"max_fpr": 0.37}}.get(name, {})
    expected = [theirs(truth, score, sample_weight=w, **extra) for w in weights]
    np.testing.assert_allclose(ours(truth, score, weights), expected, atol=1e-12)


@given(rows=ROWS)
def test_auc_within_groups_is_the_share_of_ordered_pairs_of_one_group(rows: list[tuple[int, int, int, int]]) -> None:
    truth, score, group, weights = cases = arrays(rows)
    found = auc(truth, score, weights[None], group)[0]
    truth, score, group = repeated(cases)
    pairs = product(np.flatnonzero(truth == 1), np.flatnonzero(truth == 0))
    wins = [(score[i] > score[j]) + 0.5 * (score[i] == score[j]) for i, j in pairs if group[i] == group[j]]
    assert np.isnan(found) if not wins else found == pytest.approx(np.mean(wins), abs=1e-12)


def test_partial_auc_within_groups_is_the_mean_of_theirs_by_their_pairs() -> None:
    rng = np.random.default_rng(1)
    truth, score, group = rng.integers(0, 2, 90), rng.integers(0, 9, 90) / 9, rng.integers(0, 3, 90)
    of_group = [(truth[group == g], score[group == g]) for g in range(3)]
    pairs = [t.sum() * (1 - t).sum() for t, _ in of_group]
    expected = np.average([roc_auc_score(t, s, max_fpr=0.1) for t, s in of_group], weights=pairs)
    assert partial_auc(truth, score, np.ones((1, 90)), group)[0] == pytest.approx(expected, abs=1e-12)


def test_folds_on_different_scales_are_ranked_for_themselves() -> None:
    truth, fold = np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.repeat([0, 1], 4)
    score = truth * 0.1 + fold * 0.5
    assert auc(truth, score, ONES)[0] == pytest.approx(0.75)
    assert auc(truth, score, ONES, fold)[0] == partial_auc(truth, score, ONES, fold)[0] == 1


@given(rows=ROWS.filter(both), asked=st.sampled_from([0.0, 0.5, 0.9, 0.95, 1.0]))
def test_sensitivity_at_a_specificity_is_the_best_of_every_threshold(
    rows: list[tuple[int, int, int, int]], asked: float
) -> None:
    truth, score, _, weights = cases = arrays(rows)
    found = sensitivity_at(truth, score, weights[None], asked)[0], specificity_at(truth, score, weights[None], asked)[0]
    truth, score, _ = repeated(cases)
    points = [(np.mean(score[truth == 1] >= t), np.mean(score[truth == 0] < t)) for t in [*np.unique(score), np.inf]]
    assert found[0] == pytest.approx(max(tpr for tpr, tnr in points if tnr >= asked - 1e-9))
    assert found[1] == pytest.approx(max(tnr for tpr, tnr in points if tpr >= asked - 1e-9))


def test_a_specificity_that_is_met_exactly_counts() -> None:
    """1 - 0.9 is less than a tenth in floating point; one of ten negatives called positive is 90 % all the same."""
    truth, score = np.repeat([0, 1], [10, 4]), np.concatenate([np.arange(10) / 10, [0.85, 0.95, 0.95, 0.1]])
    assert sensitivity_at(truth, score, np.ones((1, 14)), 0.9)[0] == 3 / 4
    assert sensitivity_at(truth, score, np.ones((1, 14)), 0.95)[0] == 2 / 4
    assert specificity_at(truth, score, np.ones((1, 14)), 0.75)[0] == 9 / 10


def test_a_tie_across_the_threshold_is_not_split() -> None:
    truth, score = np.array([1, 1, 0, 1, 0, 0, 0, 0]), np.array([0.9, 0.5, 0.5, 0.5, 0.2, 0.2, 0.1, 0.1])
    assert sensitivity_at(truth, score, ONES, 0.9)[0] == pytest.approx(1 / 3)
    assert sensitivity_at(truth, score, ONES, 0.8)[0] == 1
    assert specificity_at(truth, score, ONES, 0.9)[0] == 4 / 5


@pytest.mark.parametrize("figure", [auc, average_precision, partial_auc, sensitivity_at, specificity_at])
def test_a_sample_without_positives_has_no_figure_and_the_others_theirs(figure: Callable[..., Array]) -> None:
    truth, score = np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.4, 0.9])
    samples = figure(truth, score, np.array([[1.0, 1, 1, 1], [2, 2, 0, 0], [1, 0, 0, 1]]))
    assert list(np.isnan(samples)) == [False, True, False]
    assert samples[0] == figure(truth, score, np.ones((1, 4)))[0]
    assert samples[2] == 1


@pytest.mark.parametrize("figure", [auc, partial_auc, sensitivity_at, specificity_at])
def test_a_sample_without_negatives_has_none_either(figure: Callable[..., Array]) -> None:
    assert np.isnan(figure(np.array([0, 1]), np.array([0.1, 0.9]), np.array([[0.0, 1]]))).all()


def test_a_constant_score_is_chance() -> None:
    truth, score = np.array([1, 1, 0, 1, 0, 0, 0, 0]), np.full(8, 0.5)
    assert auc(truth, score, ONES)[0] == partial_auc(truth, score, ONES)[0] == 0.5
    assert average_precision(truth, score, ONES)[0] == 3 / 8
    assert sensitivity_at(truth, score, ONES)[0] == specificity_at(truth, score, ONES)[0] == 0
