"""Nearest neighbours against scikit-learn's, against votes written out, and a choice that must not leak."""

from __future__ import annotations

import numpy as np
import pytest
from made_up import MadeUp, figure, judged, task
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from miram.finetune.probes.knn import count_votes
from miram.pretrain.monitors.probes import NEIGHBOURS, TEMPERATURE, nearest_neighbours


def test_every_candidate_is_what_scikit_learn_predicts_with_the_votes_of_the_monitors() -> None:
    rng = np.random.default_rng(0)
    known, asked = (rng.normal(size=(n, 6)).astype(np.float32) for n in (70, 31))
    truth = rng.integers(0, 3, 70)
    candidates = [(5, 0.07), (20, 0.07), (20, 0.2), (NEIGHBOURS, TEMPERATURE), (70, 0.1), (500, 0.1)]
    found = count_votes(known, truth, asked, candidates, classes=3)
    for (n, temperature), shares in zip(candidates, found, strict=True):
        model = make_pipeline(StandardScaler(), nearest_neighbours(70, n, temperature)).fit(known, truth)
        balanced = model.predict_proba(asked) / np.bincount(truth)
        np.testing.assert_allclose(shares, balanced / balanced.sum(1, keepdims=True), atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.01
    assert np.abs(found[1] - found[2]).max() > 0.01


def test_votes_are_exponentials_of_cosines_of_standardised_features() -> None:
    rng = np.random.default_rng(1)
    known, asked, truth = rng.normal(3, 2, (40, 5)), rng.normal(3, 2, (7, 5)), rng.integers(0, 2, 40)
    (found,) = count_votes(known.astype(np.float32), truth, asked.astype(np.float32), [(10, 0.1)], classes=2)
    mean, deviation = known.mean(0), known.std(0)
    a, b = (known - mean) / deviation, (asked - mean) / deviation
    cosines = b @ a.T / np.linalg.norm(b, axis=1)[:, None] / np.linalg.norm(a, axis=1)
    for row, shares in zip(cosines, found, strict=True):
        nearest = np.argsort(-row)[:10]
        votes = np.array([np.exp(row[nearest] / 0.1)[truth[nearest] == k].sum() / (truth == k).sum() for k in range(2)])
        np.testing.assert_allclose(votes / votes.sum(), shares, atol=1e-5)


def test_a_class_without_a_neighbour_gets_no_vote() -> None:
    x = np.eye(4, dtype=np.float32)
    found = count_votes(x, np.array([0, 0, 2, 2]), x, [(1, 0.1)], classes=4)
    np.testing.assert_allclose(found[0], np.eye(4)[[0, 0, 2, 2]], atol=1e-6)


def test_a_rare_class_is_not_outvoted() -> None:
    """Of 100 neighbours that know nothing 10 are of the rare class: every class has an equal part of the votes."""
    x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    (found,) = count_votes(x, (np.arange(100) < 10).astype(int), x[50:], [(100, 1e6)], classes=2)
    np.testing.assert_allclose(found, 0.5, atol=1e-3)


@pytest.mark.parametrize("leaking", [False, True])
def test_the_number_of_neighbours_is_no_leak_between_images_of_a_patient(leaking: bool) -> None:
    """The nearest neighbour is always another image of the same patient: worth all on folds of images, else nothing."""
    rng, patients = np.random.default_rng(0), np.repeat(np.arange(60), 8)
    truth = rng.permutation(np.arange(60) % 2)[patients]
    features = rng.normal(size=(60, 12))[patients] + 0.4 * truth[:, None] + 0.01 * rng.normal(size=(480, 12))
    made_up = task(truth, np.arange(480) if leaking else patients)
    settings = {"neighbours": (1, 120), "temperatures": (10.0,)}
    judgement = judged("knn", MadeUp({(-1, "mean"): features.astype(np.float32)}), made_up, **settings)
    assert set(judgement.chosen) == {"k 1, T 10" if leaking else "k 120, T 10"}
    assert figure(made_up, judgement) > (0.95 if leaking else 0.6)
