"""The chosen probability, against trying all of them."""

from __future__ import annotations

import numpy as np
import pytest

from miram.data.findings import IGNORED
from miram.finetune.segment.thresholds import EDGES, choose_thresholds, histograms


def test_it_has_the_best_pooled_dice_of_all() -> None:
    rng = np.random.default_rng(0)
    truth = [(rng.random((40, 30)) < share).astype(np.uint8) for share in (0.1, 0.02, 0.0)]
    said = [np.clip(0.35 * t + rng.normal(0.25, 0.15, t.shape), 0, 0.999).astype(np.float32) for t in truth]
    probabilities = [np.stack([1 - p, p]) for p in said]
    truth[0][:10] = IGNORED
    total = sum(histograms(t, p) for t, p in zip(truth, probabilities, strict=True))

    def pooled(threshold: float) -> float:
        both = sum(((p >= threshold) & (t == 1)).sum() for t, p in zip(truth, said, strict=True))
        claimed = sum(((p >= threshold) & (t != IGNORED)).sum() for t, p in zip(truth, said, strict=True))
        return 2 * both / (claimed + sum((t == 1).sum() for t in truth))

    (chosen,) = choose_thresholds(total)
    tried = np.array([pooled(threshold) for threshold in EDGES])
    assert pooled(chosen) == pytest.approx(tried.max())
    assert 0.3 < chosen < 0.6


def test_an_image_with_nothing_on_it_raises_the_threshold() -> None:
    """What is said falsely there counts, although such an image has no Dice of its own."""
    truth = np.zeros((10, 10), np.uint8)
    truth[:3] = 1
    good = np.where(truth == 1, 0.6, 0.1).astype(np.float32)
    loud = np.full((40, 40), 0.3, np.float32)
    alone = histograms(truth, np.stack([1 - good, good]))
    both = alone + histograms(np.zeros((40, 40), np.uint8), np.stack([1 - loud, loud]))
    assert choose_thresholds(alone)[0] < choose_thresholds(both)[0]
    assert 0.3 < choose_thresholds(both)[0] <= 0.6


def test_without_a_finding_to_choose_by_it_is_a_half() -> None:
    said = np.full((5, 5), 0.2, np.float32)
    assert choose_thresholds(histograms(np.zeros((5, 5), np.uint8), np.stack([1 - said, said]))) == (0.5,)


def test_classes_have_thresholds_of_their_own() -> None:
    truth = np.array([[0, 1, 2, 2]], np.uint8)
    said = np.array([[[0.9, 0.2, 0.1, 0.1]], [[0.05, 0.7, 0.1, 0.1]], [[0.05, 0.1, 0.8, 0.3]]], np.float32)
    first, second = choose_thresholds(histograms(truth, said))
    assert 0.1 < first <= 0.7
    assert 0.1 < second <= 0.3
