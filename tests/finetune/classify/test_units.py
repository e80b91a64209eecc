"""Images, breasts and patients: against the same put together one by one."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from made_up_judged import CLASSES, NAMES, labelled

from miram.engine.metrics import Floats, Kind
from miram.finetune.classify.config import ReadoutSection
from miram.finetune.classify.labels import Labelled
from miram.finetune.classify.units import cases

KINDS: tuple[Kind, ...] = ("binary", "multiclass", "ordinal", "multilabel")


def some(kind: Kind, n: int = 60, seed: int = 0) -> tuple[Labelled, Floats, Any]:
    """Patients of two data sets who share hashes, with known and unknown sides, and any truth."""
    rng = np.random.default_rng(seed)
    k = len((CLASSES | NAMES)[kind])
    truth = rng.integers(2, size=(n, k)) if kind == "multilabel" else rng.integers(k, size=n)
    patients = [f"p{i}" for i in rng.integers(9, size=n)]
    of = labelled(kind, truth, patients, rng.choice(["L", "R", ""], n).tolist(), rng.choice(["one", "two"], n))
    probabilities = rng.random((n, k)) if kind == "multilabel" else rng.dirichlet(np.ones(k), n)
    return of, probabilities, np.unique(of.patients, return_inverse=True)[1] % 3


def by_hand(kind: Kind, how: str, members: list[Floats]) -> Floats:
    if how == "mean" or kind == "multiclass":
        return sum(members) / len(members)
    if kind == "multilabel":
        return np.array([max(p[c] for p in members) for c in range(len(members[0]))])
    return max(members, key=lambda p: sum(c * share for c, share in enumerate(p)))


@pytest.mark.parametrize(("views", "breasts"), list(itertools.product(("mean", "max"), repeat=2)))
@pytest.mark.parametrize("kind", KINDS)
def test_breasts_and_patients_are_those_put_together_by_hand(kind: Kind, views: Any, breasts: Any) -> None:
    of, probabilities, fold = some(kind)
    images = np.random.default_rng(1).permutation(len(fold))[:45]
    readout = ReadoutSection(views=views, breasts=breasts)
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, image in enumerate(images):
        groups[of.patients[image]][of.breasts[image]].append(place)
    side = {
        b: by_hand(kind, views, [probabilities[images[i]] for i in m]) for g in groups.values() for b, m in g.items()
    }
    whole = {p: by_hand(kind, breasts, [side[b] for b in g]) for p, g in groups.items()}
    members = {
        "breast": {b: m for g in groups.values() for b, m in g.items()},
        "patient": {p: [i for m in g.values() for i in m] for p, g in groups.items()},
    }
    for level, expected in (("breast", side), ("patient", whole)):
        found = cases(of, images, probabilities[images], fold[images], level, readout)
        truths = {name: [of.truth[images[i]] for i in m] for name, m in members[level].items()}
        agree = [n for n in sorted(expected) if kind != "multiclass" or len(set(map(int, truths[n]))) == 1]
        assert found.ids.tolist() == agree
        assert found.left_out == len(expected) - len(agree)
        np.testing.assert_allclose(found.probabilities, [expected[n] for n in agree], atol=1e-12)
        np.testing.assert_array_equal(found.truth, [np.max(truths[n], axis=0) for n in agree])
        assert [sorted(m) for m in found.members] == [sorted(images[members[level][n]]) for n in agree]
        owners = [of.patients[images[members[level][n][0]]] for n in agree]
        assert found.patients.tolist() == owners
        assert found.fold.tolist() == [fold[images[members[level][n][0]]] for n in agree]


def test_images_stay_as_they_are_and_in_their_order() -> None:
    of, probabilities, fold = some("multiclass")
    images = np.array([5, 2, 40, 3])
    found = cases(of, images, probabilities[images], fold[images], "image", ReadoutSection())
    assert found.ids.tolist() == ["key-5", "key-2", "key-40", "key-3"]
    np.testing.assert_array_equal(found.probabilities, probabilities[images])
    np.testing.assert_array_equal(found.truth, of.truth[images])
    assert found.left_out == 0


def test_one_patient_hash_in_two_data_sets_is_two_patients() -> None:
    of = labelled("binary", [0, 1], ["p", "p"], ["L", "L"], np.array(["one", "two"]))
    for level in ("breast", "patient"):
        found = cases(of, np.arange(2), np.array([[0.9, 0.1], [0.2, 0.8]]), np.zeros(2, int), level, ReadoutSection())
        assert found.truth.tolist() == [0, 1]


def test_images_of_unknown_side_are_breasts_of_their_own_and_belong_to_their_patient() -> None:
    of = labelled("binary", [0, 0, 1], ["p", "p", "p"], ["", "L", ""])
    scores = np.array([[0.8, 0.2], [0.6, 0.4], [0.5, 0.5]])
    breasts = cases(of, np.arange(3), scores, np.zeros(3, int), "breast", ReadoutSection())
    patient = cases(of, np.arange(3), scores, np.zeros(3, int), "patient", ReadoutSection())
    assert len(breasts) == 3
    assert patient.probabilities.tolist() == [[0.5, 0.5]]


def test_the_worst_breast_on_a_scale_is_kept_whole() -> None:
    """The largest share of every class by itself would sum to more than one."""
    of = labelled("ordinal", [0, 3], ["p", "p"], ["L", "R"])
    left, right = [0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]
    found = cases(of, np.arange(2), np.array([left, right]), np.zeros(2, int), "patient", ReadoutSection())
    assert found.probabilities.tolist() == [right]
    assert found.truth.tolist() == [3]


def test_a_patient_in_two_folds_is_refused() -> None:
    of, probabilities, _ = some("binary")
    with pytest.raises(AssertionError, match="several folds"):
        cases(of, np.arange(60), probabilities, np.arange(60) % 3, "patient", ReadoutSection())


def test_values_of_images_become_values_of_cases_only_where_images_agree() -> None:
    of = labelled("binary", [0, 1, 1], ["p", "p", "q"], ["L", "R", "L"])
    found = cases(of, np.arange(3), np.full((3, 2), 0.5), np.zeros(3, int), "patient", ReadoutSection())
    assert found.grouped_by(np.array(["x", "x", "y"])).tolist() == ["x", "y"]
    assert found.grouped_by(np.array(["x", "z", "y"])) is None
