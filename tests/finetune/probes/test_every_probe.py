"""What must hold for every probe: answers known beforehand are found, and no leak is fallen for."""

from __future__ import annotations

import numpy as np
import pytest
from made_up import METHODS, MadeUp, figure, judged, task

from miram.finetune.config import Method
from miram.finetune.probes import PROBES, sweep


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "STEPS", 120)


every_method = pytest.mark.parametrize("method", METHODS)


def test_all_probes_are_tried() -> None:
    assert set(METHODS) == set(PROBES)


@every_method
@pytest.mark.parametrize("classes", [2, 3])
def test_features_that_hold_the_answer_give_the_answer(method: Method, classes: int) -> None:
    rng, truth = np.random.default_rng(0), (np.arange(192) // 2) % classes
    features = rng.normal(size=(192, 5)) + 6 * np.eye(5)[truth]
    made_up = task(truth, np.arange(192) // 4)
    judgement = judged(method, MadeUp.alike(features), made_up)
    assert figure(made_up, judgement) > 0.98
    assert sorted(judgement.images) == list(range(192))
    assert len(judgement.chosen) == 4
    np.testing.assert_allclose(judgement.probabilities.sum(1), 1, atol=1e-5)


@every_method
def test_features_that_only_know_the_patient_are_worth_nothing(method: Method) -> None:
    """Every patient has one class and a fingerprint: a probe that saw a patient's other images would be perfect."""
    rng, patients = np.random.default_rng(1), np.repeat(np.arange(60), 4)
    truth = rng.permutation(np.arange(60) % 2)[patients]
    features = MadeUp.alike(rng.normal(size=(60, 120))[patients])
    honest, leaking = task(truth, patients), task(truth, np.arange(240))
    assert abs(figure(honest, judged(method, features, honest)) - 0.5) < 0.15
    assert figure(leaking, judged(method, features, leaking)) > 0.95


def halves(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """160 images of 80 patients in an official split, with a weak signal."""
    rng, truth = np.random.default_rng(seed), (np.arange(160) // 2) % 2
    features = rng.normal(size=(160, 6)) + 0.7 * truth[:, None]
    return features, truth, np.repeat(["train", "test"], 80)


@every_method
def test_labels_of_judged_images_are_never_looked_at(method: Method) -> None:
    features, truth, splits = halves(2)
    told = judged(method, MadeUp.alike(features), task(truth, np.arange(160) // 2, splits))
    wrong = np.where(splits == "test", 1 - truth, truth)
    fooled = judged(method, MadeUp.alike(features), task(wrong, np.arange(160) // 2, splits))
    assert told.chosen == fooled.chosen
    np.testing.assert_array_equal(told.probabilities, fooled.probabilities)


@every_method
def test_what_is_said_of_an_image_does_not_depend_on_the_others_that_are_judged(method: Method) -> None:
    features, truth, splits = halves(3)
    made_up = task(truth, np.arange(160) // 2, splits)
    plain = judged(method, MadeUp.alike(features), made_up)
    others = np.arange(160) >= 120
    moved = judged(method, MadeUp.alike(np.where(others[:, None], 50 * features, features)), made_up)
    assert list(plain.images) == list(range(80, 160))
    np.testing.assert_allclose(plain.probabilities[:40], moved.probabilities[:40], atol=1e-5)
    assert np.abs(plain.probabilities[40:] - moved.probabilities[40:]).max() > 0.01


@every_method
def test_a_seed_gives_the_same_judgement(method: Method) -> None:
    features, truth, splits = halves(4)
    made_up = task(truth, np.arange(160) // 2, splits)
    one, two = (judged(method, MadeUp.alike(features), made_up) for _ in range(2))
    np.testing.assert_array_equal(one.probabilities, two.probabilities)
