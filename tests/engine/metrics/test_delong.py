"""DeLong against its definition pair by pair, a published example and the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import logit
from scipy.stats import norm

from miram.engine.metrics import patient_bootstrap
from miram.engine.metrics.delong import delong, delong_interval, delong_test
from miram.engine.metrics.ranking import auc

Array = NDArray[np.float64]


def made_up(seed: int, m: int, ties: bool) -> tuple[NDArray[np.int64], Array]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, m)
    truth[:4] = 0, 0, 1, 1
    scores = truth + rng.normal(size=m) + rng.normal(size=(3, m))
    return truth, scores.round() if ties else scores


def by_pairs(truth: NDArray[np.int64], scores: Array) -> tuple[Array, Array]:
    """AUCs and covariance from the kernel of every (positive, negative) pair: DeLong 1988, equations 3 to 6."""
    positive, negative = scores[:, truth == 1], scores[:, truth == 0]
    kernel = (positive[:, :, None] > negative[:, None]) + 0.5 * (positive[:, :, None] == negative[:, None])
    aucs, (p, n) = kernel.mean((1, 2)), kernel.shape[1:]
    v10, v01 = kernel.mean(2) - aucs[:, None], kernel.mean(1) - aucs[:, None]
    return aucs, v10 @ v10.T / (p - 1) / p + v01 @ v01.T / (n - 1) / n


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("m", [4, 9, 60])
def test_aucs_and_covariance_are_those_of_every_pair(m: int, ties: bool) -> None:
    for seed in range(10):
        truth, scores = made_up(seed, m, ties)
        for found, expected in zip(delong(truth, scores), by_pairs(truth, scores), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-12)


def rated(counts: list[int]) -> Array:
    return np.repeat(np.arange(1.0, 6), counts)


def test_the_ct_images_of_hanley_and_mcneil_give_the_published_figures() -> None:
    """Hanley & McNeil 1982, table I: ratings of 58 normal and 51 abnormal images, area 0.893.

    The manual of Stata's roctab prints 0.8932, standard error 0.0307 and 0.83295 to 0.95339 for them.
    """
    truth = np.repeat([0, 1], [58, 51])
    ratings = np.concatenate([rated([33, 6, 6, 11, 2]), rated([3, 2, 2, 11, 33])])
    (value,), ((variance,),) = delong(truth, ratings[None])
    error = np.sqrt(variance)
    assert (value, error) == (pytest.approx(0.8932, abs=5e-5), pytest.approx(0.0307, abs=5e-5))
    bounds = value + np.array([-1, 1]) * norm.ppf(0.975) * error
    assert bounds == pytest.approx([0.83295, 0.95339], abs=6e-6)


def test_four_cases_by_hand() -> None:
    """Positives 3 and 1, negatives 2 and 0: 3 of 4 pairs; every component is 1 or 1/2, of variance 1/8."""
    (value,), ((variance,),) = delong(np.array([1, 1, 0, 0]), np.array([[3.0, 1, 2, 0]]))
    assert (value, variance) == (0.75, pytest.approx(1 / 8 / 2 + 1 / 8 / 2))


def test_the_interval_is_symmetric_on_the_logit_scale_and_stays_below_one() -> None:
    truth, scores = np.repeat([0, 1], 20), np.concatenate([np.arange(20.0), np.arange(20) + 18.5])
    estimate = delong_interval(truth, scores)
    low, high = estimate.interval
    assert 0.99 < estimate.value < high < 1
    assert logit(high) - logit(estimate.value) == pytest.approx(logit(estimate.value) - logit(low))
    _, ((variance,),) = delong(truth, scores[None])
    slope = 1 / (estimate.value * (1 - estimate.value))
    assert logit(high) - logit(estimate.value) == pytest.approx(1.959964 * np.sqrt(variance) * slope)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Binormal scores, one a patient: the AUC is Phi(d / sqrt 2)."""
    rng, d = np.random.default_rng(0), 1.2
    truth, value, held = np.repeat([0, 1], [60, 40]), norm.cdf(d / np.sqrt(2)), []
    for _ in range(600):
        low, high = delong_interval(truth, rng.normal(size=100) + d * truth).interval
        held.append(low <= value <= high)
    assert 0.93 < np.mean(held) < 0.975


def test_its_error_is_that_of_the_bootstrap() -> None:
    truth, scores = made_up(3, 400, False)
    weights = patient_bootstrap(truth, np.arange(400).astype(str), 1000, seed=0)
    samples = np.stack([auc(truth, s, weights) for s in scores])
    _, covariance = delong(truth, scores)
    np.testing.assert_allclose(np.cov(samples), covariance, rtol=0.15)


def test_the_paired_test_is_that_of_the_difference() -> None:
    truth, scores = made_up(1, 80, True)
    aucs, covariance = by_pairs(truth, scores)
    difference, (low, high), p = delong_test(truth, scores[0], scores[1])
    contrast = np.array([1, -1, 0])
    error = np.sqrt(contrast @ covariance @ contrast)
    assert difference == pytest.approx(aucs[0] - aucs[1])
    assert (low, high) == pytest.approx((difference - 1.959964 * error, difference + 1.959964 * error))
    assert p == pytest.approx(2 * (1 - norm.cdf(abs(difference) / error)))
    assert delong_test(truth, scores[1], scores[0])[0] == -difference


def test_equally_good_scores_are_called_different_in_one_case_of_twenty() -> None:
    rng, truth = np.random.default_rng(1), np.repeat([0, 1], 40)
    shared = rng.normal(size=(600, 80)) + truth
    ps = [delong_test(truth, s + rng.normal(size=80), s + rng.normal(size=80))[2] for s in shared]
    assert np.mean(np.array(ps) < 0.05) == pytest.approx(0.05, abs=0.025)


def test_a_score_does_not_differ_from_one_that_ranks_alike() -> None:
    truth, scores = made_up(2, 50, False)
    assert delong_test(truth, scores[0], np.exp(scores[0])) == (0, (0, 0), 1)


def test_what_the_variance_cannot_say_is_nan() -> None:
    truth = np.array([0, 0, 1, 1])
    perfect = delong_interval(truth, np.arange(4.0))
    assert perfect.value == 1
    assert np.isnan(perfect.interval).all()
    difference, interval, p = delong_test(truth, np.arange(4.0), -np.arange(4.0))
    assert (difference, np.isnan([*interval, p]).all()) == (1, True)
    single = delong_interval(np.array([0, 0, 1]), np.array([0.0, 2, 1]))
    assert single.value == 0.5
    assert np.isnan(single.interval).all()
    assert np.isnan(delong_interval(np.zeros(3, int), np.arange(3.0)).value)
