"""Figures against counting by hand, intervals against theory."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm

from miram.engine.errors import UserError
from miram.engine.metrics import Estimate, bootstrap_scores, chance, patient_bootstrap, score

Scored = list[tuple[int, int, int]]  # class, rank, times

CASES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=25).filter(
    lambda rows: {0, 1} <= {truth for truth, _, times in rows if times}
)


def binary(scores: list[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 2) probabilities of classes 0 and 1."""
    return np.stack([1 - np.asarray(scores), np.asarray(scores)], 1)


def answers(predicted: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """(n, k) probabilities that are sure of the predicted class."""
    return np.eye(classes)[predicted]


def auc_by_pairs(truth: list[int], ranks: list[float]) -> float:
    """Part of the (positive, negative) pairs in the right order; a tie is half right."""
    positives = [r for t, r in zip(truth, ranks, strict=True) if t]
    negatives = [r for t, r in zip(truth, ranks, strict=True) if not t]
    wins = [(p > n) + 0.5 * (p == n) for p, n in product(positives, negatives)]
    return sum(wins) / len(wins)


@given(CASES)
def test_weighted_auc_is_the_share_of_ordered_pairs_among_repeated_images(rows: Scored) -> None:
    truth, ranks, times = (np.array(column) for column in zip(*rows, strict=True))
    found = score("AUC", truth, binary(ranks / 5), times.astype(float))
    repeated_truth, repeated_ranks = np.repeat(truth, times).tolist(), np.repeat(ranks / 5, times).tolist()
    assert found == pytest.approx(auc_by_pairs(repeated_truth, repeated_ranks), abs=1e-12)
    assert score("AUC", np.array(repeated_truth), binary(repeated_ranks)) == pytest.approx(found, abs=1e-12)


def test_balanced_accuracy_is_the_mean_recall_of_the_most_probable_class() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1, 2])
    probabilities = np.array(
        [
            [0.5, 0.3, 0.2],
            [0.4, 0.3, 0.3],
            [0.6, 0.3, 0.1],
            [0.1, 0.7, 0.2],
            [0.2, 0.5, 0.3],
            [0.45, 0.35, 0.2],
            [0.3, 0.3, 0.4],
        ]
    )
    assert score("balanced accuracy", truth, probabilities) == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    weights = np.array([0, 0, 1, 2, 3, 1, 5.0])
    assert score("balanced accuracy", truth, probabilities, weights) == pytest.approx((1 / 3 + 3 / 4 + 1) / 3)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_chance_is_what_always_answering_one_class_scores(classes: int) -> None:
    truth = np.repeat(np.arange(classes), range(1, classes + 1))
    constant = answers(np.full(len(truth), classes - 1), classes)
    assert chance("balanced accuracy", classes) == pytest.approx(score("balanced accuracy", truth, constant))
    assert chance("AUC", 2) == pytest.approx(score("AUC", np.array([0, 1, 1]), binary([0.3, 0.3, 0.3])))


def test_images_of_a_patient_go_together_and_each_sample_has_as_many_patients_as_there_are() -> None:
    patients = np.array(list("aabbbcdddd"))
    truth = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    rows = patient_bootstrap(truth, patients, replicates=200, seed=5)
    assert rows.shape == (200, 10)
    of_patient = {name: rows[:, patients == name] for name in "abcd"}
    for times in of_patient.values():
        assert (times == times[:, :1]).all()
    assert (np.stack([times[:, 0] for times in of_patient.values()]).sum(0) == 4).all()
    assert len(np.unique(rows, axis=0)) > 20


def test_samples_are_a_function_of_the_seed_and_not_of_the_order_of_images() -> None:
    truth, patients = np.arange(12) % 2, np.array([f"p{i // 2}" for i in range(12)])
    first = patient_bootstrap(truth, patients, 20, seed=1)
    assert (first == patient_bootstrap(truth, patients, 20, seed=1)).all()
    assert not np.array_equal(first, patient_bootstrap(truth, patients, 20, seed=2))
    order = np.random.default_rng(0).permutation(12)
    assert (patient_bootstrap(truth[order], patients[order], 20, seed=1) == first[:, order]).all()


def test_every_sample_has_every_class_even_one_of_a_single_patient() -> None:
    truth = np.array([0] * 20 + [1] * 20 + [2])
    rows = patient_bootstrap(truth, np.array([f"p{i}" for i in range(41)]), 300, seed=0)
    assert all((rows[:, truth == k].sum(1) > 0).all() for k in range(3))
    # A Poisson(1) count, given that it is not zero, has mean 1 / (1 - 1/e).
    assert rows[:, -1].mean() == pytest.approx(1 / (1 - np.exp(-1)), rel=0.1)


def test_each_patient_is_drawn_once_on_average() -> None:
    truth, patients = np.arange(30) % 2, np.arange(30).astype(str)
    rows = patient_bootstrap(truth, patients, 2000, seed=0)
    assert rows.mean(0) == pytest.approx(np.ones(30), abs=0.12)
    assert rows.var() == pytest.approx(1 - 1 / 30, rel=0.05)  # binomial(n, 1/n)


def half_width(truth: NDArray[np.int64], right: NDArray[np.bool_], patients: NDArray[np.str_]) -> float:
    probabilities = answers(np.where(right, truth, 1 - truth), 2)
    weights = patient_bootstrap(truth, patients, 400, seed=3)
    samples = bootstrap_scores("balanced accuracy", truth, probabilities, weights)
    low, high = Estimate.of(score("balanced accuracy", truth, probabilities), samples).interval
    return (high - low) / 2


@pytest.fixture(scope="module")
def independent() -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.str_]]:
    """300 patients of two classes, one image each, 70 % of either class answered rightly."""
    truth = np.arange(300) % 2
    return truth, np.arange(300) % 20 < 14, np.array([f"p{i}" for i in range(300)])


def test_interval_of_independent_patients_is_the_normal_one(
    independent: tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.str_]],
) -> None:
    assert half_width(*independent) == pytest.approx(1.96 * np.sqrt(0.7 * 0.3 / 300), rel=0.15)


def test_copies_of_an_image_within_a_patient_are_no_further_evidence(
    independent: tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.str_]],
) -> None:
    truth, right, patients = independent
    images = np.repeat(np.arange(300), 4)
    together = half_width(truth[images], right[images], patients[images])
    apart = half_width(truth[images], right[images], np.arange(1200).astype(str))
    assert together == pytest.approx(half_width(*independent), rel=1e-12)
    assert together / apart == pytest.approx(2, rel=0.15)  # sqrt(4)


def test_interval_is_the_middle_95_percent_of_the_samples() -> None:
    estimate = Estimate.of(7, np.random.default_rng(0).permutation(np.arange(1001.0)))
    assert estimate == Estimate(7.0, (25.0, 975.0))


def test_scores_are_one_per_sample() -> None:
    truth, probabilities = np.array([0, 1, 0, 1]), binary([0.1, 0.2, 0.3, 0.4])
    weights = np.array([[1.0, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 2, 1, 1]])
    assert bootstrap_scores("AUC", truth, probabilities, weights) == pytest.approx([1, 0, 3 / 4, 1 / 3])


def test_bootstrap_scores_are_scikit_learn_s_on_every_sample() -> None:
    rng = np.random.default_rng(5)
    truth, probabilities = rng.integers(0, 3, 60), rng.random((60, 3))
    weights = patient_bootstrap(truth, rng.integers(0, 20, 60).astype(str), 30, seed=1)
    expected = [score("balanced accuracy", truth, probabilities, w) for w in weights]
    np.testing.assert_allclose(bootstrap_scores("balanced accuracy", truth, probabilities, weights), expected)


# ---------------------------------------------------------------------------------------------- patients


def clustered(rng: np.random.Generator, patients: int, images: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Truth and score of every image; what is special to a patient is half of a score's variance."""
    truth = np.repeat(np.arange(patients) % 2, images)
    score = truth + np.repeat(rng.normal(size=patients), images) + rng.normal(size=patients * images)
    return truth, score


def test_the_interval_holds_the_true_auc_only_where_images_of_a_patient_go_together() -> None:
    """40 patients of 6 images, 200 times: AUC of two patients' images is Phi(1 / 2)."""
    rng, value, held = np.random.default_rng(0), norm.cdf(0.5), {"patient": [], "image": []}
    unit = {"patient": np.repeat(np.arange(40), 6).astype(str), "image": np.arange(240).astype(str)}
    for seed in range(200):
        truth, ranks = clustered(rng, 40, 6)
        for name, of in unit.items():
            samples = bootstrap_scores("AUC", truth, binary(ranks), patient_bootstrap(truth, of, 150, seed))
            low, high = Estimate.of(0, samples).interval
            held[name].append(low <= value <= high)
    assert 0.88 < np.mean(held["patient"]) < 0.99
    assert np.mean(held["image"]) < 0.75


def test_what_cannot_be_computed_in_a_few_samples_is_left_out_and_in_half_of_them_is_nan() -> None:
    samples = np.arange(1001.0)
    samples[:100] = np.nan
    assert Estimate.of(7, samples) == Estimate(7.0, (122.5, 977.5))
    samples[:501] = np.nan
    assert np.isnan(Estimate.of(7, samples).interval).all()
    assert np.isnan(Estimate.of(float("nan"), np.arange(1001.0)).interval).all()


def test_each_label_is_present_and_absent_in_every_sample_as_far_as_it_ever_is() -> None:
    truth = np.zeros((60, 4), int)
    truth[:3, 0], truth[::2, 2] = 1, 1  # in one patient; in every other case; the last label is in no case
    truth[:, 1] = np.arange(60) // 3 != 7  # in all patients but one
    rows = patient_bootstrap(truth, (np.arange(60) // 3).astype(str), 300, seed=0)
    assert rows.shape == (300, 60)
    assert ((rows @ truth > 0) == [True, True, True, False]).all()
    assert (rows @ (1 - truth) > 0).all()


def test_too_few_patients_of_a_class_are_refused() -> None:
    truth = np.arange(40)  # forty classes of one patient each: no sample has all
    with pytest.raises(UserError, match="too few patients of a class"):
        patient_bootstrap(truth, truth.astype(str), 5, seed=0)


def test_auc_within_groups_is_the_same_in_score_and_samples() -> None:
    rng = np.random.default_rng(3)
    truth, p, fold = rng.integers(0, 2, 60), binary(rng.integers(0, 6, 60) / 6), rng.integers(0, 3, 60)
    weights = patient_bootstrap(truth, rng.integers(0, 20, 60).astype(str), 40, seed=1)
    samples = bootstrap_scores("AUC", truth, p, weights, fold)
    expected = [score("AUC", truth, p, w, groups=fold) for w in weights]
    np.testing.assert_allclose(samples, expected)
    assert abs(samples - bootstrap_scores("AUC", truth, p, weights)).max() > 0.001
