"""Figures of decisions against scikit-learn on repeated cases, probabilistic F1 by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from miram.engine.metrics import decisions

Rows = list[tuple[int, int, int]]  # truth, decision, times


def rows(classes: int) -> st.SearchStrategy[Rows]:
    one = st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1), st.integers(0, 3))
    every = [(k, 0, 1) for k in range(classes)]  # each class in the truth
    return st.lists(one, max_size=20).map(lambda found: every + found)


def kappa_of(weights: str | None) -> Callable[..., float]:
    return lambda t, d: sk.cohen_kappa_score(t, d, weights=weights, labels=range(4))


BINARY: dict[str, tuple[Callable[..., Any], Callable[..., float]]] = {
    "sensitivity": (decisions.sensitivity, sk.recall_score),
    "specificity": (decisions.specificity, lambda t, d: sk.recall_score(t, d, pos_label=0)),
    "F1": (decisions.f1, sk.f1_score),
}
EVERY: dict[str, tuple[Callable[..., Any], Callable[..., float]]] = {
    "accuracy": (decisions.accuracy, sk.accuracy_score),
    "balanced accuracy": (decisions.balanced_accuracy, sk.balanced_accuracy_score),
    "macro F1": (decisions.f1, lambda t, d: sk.f1_score(t, d, average="macro")),
    "kappa": (lambda *a: decisions.kappa(*a, classes=4), kappa_of(None)),
    "linear kappa": (lambda *a: decisions.kappa(*a, "linear", 4), kappa_of("linear")),
    "quadratic kappa": (lambda *a: decisions.kappa(*a, "quadratic", 4), kappa_of("quadratic")),
}


def agree(ours: Callable[..., Any], theirs: Callable[..., float], found: Rows) -> None:
    truth, decided, times = (np.array(column) for column in zip(*found, strict=True))
    again, decided_again = np.repeat(truth, times), np.repeat(decided, times)
    expected = theirs(again, decided_again)
    assert ours(truth, decided, times[None].astype(float))[0] == pytest.approx(expected, abs=1e-12)
    assert ours(again, decided_again, np.ones((1, len(again))))[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", BINARY)
@given(found=rows(2))
def test_figures_of_two_classes_are_those_of_scikit_learn(name: str, found: Rows) -> None:
    agree(*BINARY[name], found)


@pytest.mark.parametrize("name", EVERY)
@given(found=rows(4))
def test_figures_of_several_classes_are_those_of_scikit_learn(name: str, found: Rows) -> None:
    agree(*EVERY[name], found)


def test_a_confusion_has_truth_in_its_rows() -> None:
    table = decisions.confusion(np.array([0, 0, 1, 2]), np.array([1, 0, 1, 0]), np.array([[3.0, 1, 2, 5]]))
    assert table.tolist() == [[[1, 3, 0], [0, 2, 0], [5, 0, 0]]]


def test_a_class_that_does_not_occur_keeps_its_place_on_the_scale() -> None:
    """Classes 0, 1 and 3 of 4: scikit-learn told of all labels."""
    truth, decided, once = np.array([0, 1, 3, 3, 1]), np.array([0, 3, 3, 1, 1]), np.ones((1, 5))
    expected = sk.cohen_kappa_score(truth, decided, weights="quadratic", labels=range(4))
    assert decisions.kappa(truth, decided, once, "quadratic", 4)[0] == pytest.approx(expected)
    squeezed = sk.cohen_kappa_score(truth, decided, weights="quadratic")
    assert abs(squeezed - expected) > 0.01


def test_chance_agreement_is_a_kappa_of_zero_and_a_single_class_has_none() -> None:
    truth, decided = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert decisions.kappa(truth, decided, np.ones((1, 4)))[0] == 0
    assert np.isnan(decisions.kappa(np.zeros(4, int), np.zeros(4, int), np.ones((1, 4)), classes=2)[0])


def test_probabilistic_f1_by_hand() -> None:
    """Positives 0.9 and 0.4, negatives 0.2 and 0.5: precision 1.3 / 2, recall 1.3 / 2."""
    truth, p = np.array([1, 1, 0, 0]), np.array([0.9, 0.4, 0.2, 0.5])
    assert decisions.pf1(truth, p, np.ones((1, 4)))[0] == pytest.approx(0.65)
    # The first twice, the last not at all: 2.2 of 2.4 and 2.2 of 3.
    weighted = decisions.pf1(truth, p, np.array([[2.0, 1, 1, 0]]))[0]
    precision, recall = 2.2 / 2.4, 2.2 / 3
    assert weighted == pytest.approx(2 * precision * recall / (precision + recall))


@given(found=rows(2))
def test_probabilistic_f1_of_certain_probabilities_is_f1(found: Rows) -> None:
    truth, decided, times = (np.array(column) for column in zip(*found, strict=True))
    weights = times[None].astype(float)
    ours = decisions.pf1(truth, decided.astype(float), weights)
    np.testing.assert_allclose(ours, decisions.f1(truth, decided, weights, macro=False), atol=1e-12)


def test_a_sample_that_lacks_a_class_of_the_truth_has_no_figure() -> None:
    truth, decided, weights = np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([[1.0, 1, 1], [1, 1, 0]])
    for figure in (decisions.balanced_accuracy, decisions.f1, decisions.sensitivity, decisions.pf1):
        assert list(np.isnan(figure(truth, decided, weights))) == [False, True], figure.__name__
    three = np.array([0, 1, 2])
    assert np.isnan(decisions.f1(three, three, np.array([[1.0, 1, 0]]))[0])
    assert not np.isnan(decisions.specificity(truth, decided, weights)).any()


def test_a_class_that_is_never_true_has_no_recall_to_be_averaged() -> None:
    truth, decided = np.array([0, 0, 2, 2]), np.array([0, 1, 2, 2])
    assert decisions.balanced_accuracy(truth, decided, np.ones((1, 4)))[0] == (1 / 2 + 1) / 2
    expected = sk.f1_score(truth, decided, average="macro")
    assert decisions.f1(truth, decided, np.ones((1, 4)))[0] == pytest.approx(expected)
