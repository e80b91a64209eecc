"""Thresholds: against a search over every cut that there is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from made_up_judged import binary_logits, labelled, population, section

from miram.finetune.classify.thresholds import choose_threshold, choose_thresholds, cut_points
from miram.finetune.classify.units import LEVELS, cases


def every_cut(truth: Any, scores: Any) -> list[tuple[float, float, tuple[bool, ...]]]:
    """(sensitivity, specificity, who is called positive) of every threshold that differs."""
    found = []
    for cut in [*np.unique(scores), 2.0]:
        called = [s >= cut for s in scores]
        hits = [c for c, t in zip(called, truth, strict=True) if t]
        passes = [not c for c, t in zip(called, truth, strict=True) if not t]
        found.append((sum(hits) / len(hits), sum(passes) / len(passes), tuple(called)))
    return found


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("point", ["youden", "sensitivity", "specificity"])
@pytest.mark.parametrize("at", [0.5, 0.9, 1.0])
def test_a_threshold_is_the_best_of_all_cuts(point: Any, at: float, ties: bool) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        truth = np.append([0, 1], rng.integers(2, size=18))
        scores = np.clip(0.3 * truth + rng.random(20) * 0.7, 0, 1)
        scores = np.round(scores, 1) if ties else scores
        cuts = every_cut(truth, scores)
        best = {
            "youden": max(cuts, key=lambda c: (round(c[0] + c[1], 9), c[0])),
            "sensitivity": max((c for c in cuts if c[0] >= at - 1e-9), key=lambda c: (c[1], c[0])),
            "specificity": max((c for c in cuts if c[1] >= at - 1e-9), key=lambda c: (c[0], c[1])),
        }[point]
        found = choose_threshold(truth, scores, point, at)
        assert tuple((scores >= found).tolist()) == best[2]


def test_a_cut_is_half_way_between_two_scores_and_all_or_none_are_positive_at_the_ends() -> None:
    assert cut_points(np.array([0.2, 0.6, 0.2]))[:2].tolist() == [0.0, 0.4]
    assert cut_points(np.array([0.2, 1.0]))[-1] > 1.0


def test_neighbouring_floats_are_still_told_apart() -> None:
    low = 0.3
    for _ in range(4):  # half way between two of them rounds up, then down
        high = np.nextafter(low, 1)
        found = choose_threshold(np.array([0, 1]), np.array([low, high]), "youden", 0.9)
        assert low < found <= high
        low = high


def test_one_class_alone_leaves_the_threshold_at_a_half() -> None:
    assert choose_threshold(np.ones(4, int), np.array([0.1, 0.2, 0.3, 0.4]), "youden", 0.9) == 0.5


def test_every_level_has_the_threshold_of_its_own_cases() -> None:
    of, logits = population("binary", 40, 0)
    wanted = section(operating_point="sensitivity", operating_at=0.8)
    images = np.arange(40, 160)
    found = choose_thresholds(of, images, logits[images], 1.7, wanted)
    probabilities = of.target.probabilities(logits[images], 1.7)
    for level in LEVELS:
        units = cases(of, images, probabilities, np.zeros(120, int), level, wanted.readout)
        assert found[level] == (choose_threshold(units.truth, units.probabilities[:, 1], "sensitivity", 0.8),)
    assert len(set(found.values())) == 3


def test_every_label_has_a_threshold_and_several_classes_have_none() -> None:
    of, logits = population("multilabel", 30, 0)
    found = choose_thresholds(of, np.arange(120), logits, 1.0, section())
    shares = 1 / (1 + np.exp(-logits))
    each = [choose_threshold(of.truth[:, c], shares[:, c], "youden", 0.9) for c in range(3)]
    assert found["image"] == pytest.approx(each)
    for kind in ("multiclass", "ordinal"):
        of, logits = population(kind, 30, 0)
        assert choose_thresholds(of, np.arange(120), logits, 1.0, section()) == dict.fromkeys(LEVELS, ())


def test_images_beside_the_validation_images_do_not_matter() -> None:
    scores = [0.1, 0.4, 0.35, 0.8]
    of = labelled("binary", [0, 0, 1, 1], ["a", "b", "c", "d"])
    more = labelled("binary", [0, 0, 1, 1, 1, 0], ["a", "b", "c", "d", "e", "f"])
    first = choose_thresholds(of, np.arange(4), binary_logits(scores), 1.0, section())
    assert choose_thresholds(more, np.arange(4), binary_logits(scores), 1.0, section()) == first
