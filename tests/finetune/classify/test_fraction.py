"""Label fractions: whole patients, every class, small inside large."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from miram.finetune.classify.fraction import labelled_fraction
from miram.finetune.task import Task

FRACTIONS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.99, 1.0)


def task(truth: NDArray[np.int64], patients: NDArray[np.int64], k: int = 3) -> Task:
    names = np.array([f"set/p{p}" for p in patients])
    return Task("made up", tuple("abcd"[:k]), np.arange(len(truth)), truth, names, np.full(len(truth), ""))


def screening(seed: int = 0, patients: int = 200) -> Task:
    """Four images a patient; one in ten is of class 1, one in forty of class 2, in some of their images."""
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(patients), 4)
    worst = rng.choice(3, patients, p=[0.875, 0.1, 0.025])
    truth = np.where(rng.random(len(of)) < 0.5, worst[of], 0)
    return task(truth, of)


def test_fractions_lie_inside_each_other_and_the_whole_is_all() -> None:
    made_up = screening()
    fit = np.arange(0, 800)[np.arange(800) % 16 < 12]
    for seed in range(5):
        chosen = [labelled_fraction(made_up, fit, fraction, seed) for fraction in FRACTIONS]
        assert all(set(small) <= set(large) for small, large in pairwise(chosen))
        np.testing.assert_array_equal(chosen[-1], fit)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_patients_come_whole_and_of_those_that_may_be_trained_on(fraction: float) -> None:
    made_up = screening()
    fit = np.random.default_rng(3).permutation(800)[:500]
    chosen = labelled_fraction(made_up, fit, fraction, seed=1)
    of = set(made_up.patients[chosen])
    np.testing.assert_array_equal(chosen, [i for i in fit if made_up.patients[i] in of])


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_each_class_gives_its_share_and_at_least_a_patient(fraction: float) -> None:
    made_up = screening()
    fit = np.arange(800)
    severest = {p: made_up.truth[made_up.patients == p].max() for p in set(made_up.patients)}  # and the rarest
    chosen = set(made_up.patients[labelled_fraction(made_up, fit, fraction, seed=2)])
    for c in range(3):
        there = [p for p, worst in severest.items() if worst == c]
        assert len(chosen & set(there)) == max(1, round(fraction * len(there)))


def test_a_class_that_only_comes_with_rarer_ones_stays() -> None:
    """Class 1 is in patients 0 to 3, all of whom have class 2 or 3, too; patients 5 and 6 have these alone."""
    patients = np.array([0, 1, 2, 3, 0, 1, 5, 2, 3, 6, *range(7, 30)])
    truth = np.array([1, 1, 1, 1, 2, 2, 2, 3, 3, 3] + [0] * 23)
    made_up = task(truth, patients, k=4)
    for seed in range(30):
        chosen = [labelled_fraction(made_up, np.arange(len(truth)), fraction, seed) for fraction in FRACTIONS]
        assert all(set(truth[some]) == {0, 1, 2, 3} for some in chosen)
        assert all(set(small) <= set(large) for small, large in pairwise(chosen))


def test_seeds_draw_other_patients() -> None:
    made_up = screening()
    drawn = {labelled_fraction(made_up, np.arange(800), 0.1, seed).tobytes() for seed in range(20)}
    assert len(drawn) == 20


def test_the_order_of_images_does_not_matter() -> None:
    made_up = screening()
    fit = np.arange(800)
    shuffled = np.random.default_rng(9).permutation(fit)
    one, other = (labelled_fraction(made_up, images, 0.2, seed=4) for images in (fit, shuffled))
    assert set(one) == set(other)


def test_patients_that_come_later_change_little() -> None:
    """Forty more patients, half of whom sort before all others by name: most of those chosen stay."""
    before = screening()
    more = np.repeat(np.arange(40), 4)
    names = np.array([f"{'a' if p % 2 else 'z'}et/p{p}" for p in more])
    after = Task(
        "made up",
        before.classes,
        np.arange(960),
        np.concatenate([before.truth, np.zeros(160, np.int64)]),
        np.concatenate([before.patients, names]),
        np.full(960, ""),
    )
    one = set(before.patients[labelled_fraction(before, np.arange(800), 0.3, seed=0)])
    other = set(after.patients[labelled_fraction(after, np.arange(960), 0.3, seed=0)])
    assert len(one - other) <= 4  # 0.3 of the larger set reaches about as far down the same order
