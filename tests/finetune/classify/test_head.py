"""The head over standardised features, against scikit-learn and problems solved one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from miram.finetune.classify.head import StandardisedLinear, solve
from miram.finetune.classify.targets import Target

RNG = np.random.default_rng(5)
X = RNG.normal(size=(120, 6)) * [1, 10, 0.1, 3, 1, 1] + [0, 50, 3, 0, -4, 0]
Z = (X - X.mean(0)) / X.std(0)


def head_of(x: np.ndarray, truth: np.ndarray, target: Target, c: float, balanced: bool = False) -> StandardisedLinear:
    weights = target.class_weights(truth).double() if balanced else None
    head = StandardisedLinear.of(x, target.width)
    solve(head, torch.from_numpy(x), torch.from_numpy(truth), target, weights, 0.0, c)
    return head


def said(head: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(head(torch.from_numpy(x)).numpy())


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
def test_it_is_scikit_learns_logistic_regression(classes: int, balanced: bool) -> None:
    truth = (
        (Z[:, 0] + 0.5 * RNG.normal(size=120) > RNG.normal()).astype(np.int64) if classes == 2 else np.arange(120) % 4
    )
    target = Target("made up", "binary" if classes == 2 else "multiclass", tuple("abcd"[:classes]))
    head = head_of(X, truth, target, 0.3, balanced)
    # scikit-learn has a single weight vector for two classes: our two opposite ones pay half of its penalty each.
    c = 0.3 * (2 if classes == 2 else 1)
    theirs = LogisticRegression(C=c, class_weight="balanced" if balanced else None, tol=1e-10, max_iter=5000)
    theirs.fit(StandardScaler().fit_transform(X), truth)
    ours = target.probabilities(said(head, X))
    expected = theirs.predict_proba(Z)
    assert np.abs(ours - expected).max() < 1e-4


def test_several_labels_are_so_many_regressions() -> None:
    truth = np.stack([Z[:, 0] > 0.3, Z[:, 3] + RNG.normal(size=120) > 1, RNG.random(120) > 0.5], 1).astype(np.int64)
    head = head_of(X, truth, Target("made up", "multilabel", ("a", "b", "c")), 0.3)
    for label in range(3):  # an image's loss is the mean over labels, so that each has a third of the weight
        theirs = LogisticRegression(C=0.3 / 3, tol=1e-10, max_iter=5000).fit(Z, truth[:, label])
        assert np.abs(said(head, X)[:, label] - theirs.decision_function(Z)).max() < 1e-3


def test_a_scale_is_won_in_its_order() -> None:
    grade = np.digitize(Z[:, 0] + 0.3 * RNG.normal(size=120), [-0.8, 0.2, 1.0])
    target = Target("made up", "ordinal", ("a", "b", "c", "d"))
    probabilities = target.probabilities(said(head_of(X, grade, target, 1.0), X))
    assert np.corrcoef(probabilities @ np.arange(4), grade)[0, 1] > 0.85


def test_the_plain_layer_computes_the_same_of_features_as_they_are() -> None:
    head = head_of(X, np.arange(120) % 3, Target("made up", "multiclass", ("a", "b", "c")), 1.0)
    plain = head.plain()
    assert type(plain) is torch.nn.Linear
    assert np.abs(said(plain, X) - said(head, X)).max() < 1e-9


def test_a_feature_that_never_varies_is_no_division_by_zero() -> None:
    x = np.column_stack([X, np.full(120, 7.0)])
    head = head_of(x, np.arange(120) % 2, Target("made up", "binary", ("a", "b")), 1.0)
    assert np.isfinite(said(head.plain(), x)).all()
    assert abs(head.weight[0, -1].item()) < 1e-9
    assert head.weight.grad is None
