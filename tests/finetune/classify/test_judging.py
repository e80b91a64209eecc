"""Figures of judged images: scikit-learn's at every level, intervals of patients, nothing chosen by the truth."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from made_up_judged import binary_logits, folds_of, judge, labelled, population, rows, section, softmax
from scipy.special import logit
from sklearn import metrics

from miram.engine.metrics import Kind
from miram.engine.metrics.delong import delong_interval
from miram.engine.report import Result
from miram.finetune.classify.bootstrap import Draws, delong_within
from miram.finetune.classify.config import ReadoutSection
from miram.finetune.classify.judged import Judged
from miram.finetune.classify.judging import figures_of
from miram.finetune.classify.units import LEVELS

KINDS: tuple[Kind, ...] = ("binary", "multiclass", "ordinal", "multilabel")
READOUT = ReadoutSection()


def figures(judged: Judged, **settings: Any) -> dict[str, Any]:
    return figures_of(judged, rows(len(judged.labelled.keys)), section(**settings), 0)


def intervals(found: dict[str, Any], place: int, title: str) -> list[float]:
    [table] = [table for table in found["tables"] if table["title"] == title]
    return [limit for row in table["rows"] if row[place] for limit in row[place]["interval"] or ()]


def column(found: dict[str, Any], place: int, title: str = "Figures by level") -> dict[str, Any]:
    [table] = [table for table in found["tables"] if table["title"] == title]
    return {row[0]: row[place] and row[place]["value"] for row in table["rows"]}


def test_every_level_has_the_figures_that_scikit_learn_computes_there() -> None:
    of, logits = population("binary", 30, 1)
    scores = softmax(logits / 1.5)[:, 1]
    found = figures(judge(of, logits, temperature=1.5, threshold=0.4))
    by_breast = scores.reshape(60, 2).mean(1)  # two views of each breast, as `population` makes them
    units = [(of.truth, scores), (of.truth[::2], by_breast), (of.truth[::4], by_breast.reshape(30, 2).max(1))]
    for place, (truth, score) in enumerate(units, 1):
        told, decided = column(found, place), score >= 0.4
        assert told["AUC"] == pytest.approx(metrics.roc_auc_score(truth, score))
        assert told["AP"] == pytest.approx(metrics.average_precision_score(truth, score))
        assert told["pAUC (FPR <= 0.1)"] == pytest.approx(metrics.roc_auc_score(truth, score, max_fpr=0.1))
        assert told["sensitivity"] == pytest.approx(metrics.recall_score(truth, decided))
        assert told["specificity"] == pytest.approx(metrics.recall_score(truth, decided, pos_label=0))
        assert told["balanced accuracy"] == pytest.approx(metrics.balanced_accuracy_score(truth, decided))
        assert told["Brier"] == pytest.approx(metrics.brier_score_loss(truth, score))
    assert [row["value"] for row in found["rows"]] == [*(column(found, i)["AUC"] for i in (1, 2, 3)), 0.5]
    assert [row["detail"] for row in found["rows"][:3]] == ["120 images", "60 breasts", "30 patients"]


@pytest.mark.parametrize(("level", "place"), [("image", 1), ("breast", 2), ("patient", 3)])
def test_the_level_that_leads_is_the_headline(level: Any, place: int) -> None:
    of, logits = population("binary", 30, 1)
    found = figures(judge(of, logits), headline=level)
    assert (found["value"], found["level"]) == (column(found, place)["AUC"], level)


def test_other_kinds_have_the_figures_that_scikit_learn_computes() -> None:
    of, logits = population("multiclass", 30, 0)
    found = figures(judge(of, logits))
    assert found["value"] == pytest.approx(metrics.balanced_accuracy_score(of.truth, logits.argmax(1)))
    of, logits = population("multilabel", 30, 0)
    found = figures(judge(of, logits))
    assert found["value"] == pytest.approx(metrics.roc_auc_score(of.truth, logits, average="macro"))
    of, logits = population("ordinal", 30, 0)
    judged = judge(of, logits)
    decided = (judged.probabilities.cumsum(1) >= 0.5).argmax(1)
    expected = metrics.cohen_kappa_score(of.truth, decided, weights="quadratic")
    assert figures(judged)["value"] == pytest.approx(expected)


def test_auc_compares_images_of_the_same_fold_alone() -> None:
    of, logits = population("binary", 30, 1)
    fold = folds_of(of, 3)
    logits[:, 1] += 5.0 * fold  # models of different folds are on different scales
    inside = pairs = 0.0
    for i in np.flatnonzero(of.truth == 1):
        for j in np.flatnonzero((of.truth == 0) & (fold == fold[i])):
            gap = (logits[i] - logits[j]) @ np.array([-1, 1])
            inside, pairs = inside + (gap > 0) + 0.5 * (gap == 0), pairs + 1
    found = figures(judge(of, logits, fold))
    assert found["value"] == pytest.approx(inside / pairs)
    assert any("same fold alone" in note for note in found["notes"])
    assert not any("same fold" in note for note in figures(judge(of, logits))["notes"])


def test_every_fold_has_its_own_temperature_and_thresholds() -> None:
    of = labelled("binary", [0, 1, 0, 1], ["a", "b", "c", "d"])
    cuts = {0: dict.fromkeys(LEVELS, (0.5,)), 1: {"image": (0.9,), "breast": (0.5,), "patient": (0.2,)}}
    logits, fold = binary_logits([0.3, 0.6, 0.3, 0.6]), np.array([0, 0, 1, 1])
    judged = Judged(of, np.arange(4), logits, fold, {0: 1.0, 1: 0.5}, cuts)
    odds = np.exp(np.diff(logits, axis=1)[:, 0] / np.array([1, 1, 0.5, 0.5]))
    np.testing.assert_allclose(judged.probabilities[:, 1], odds / (1 + odds))
    np.testing.assert_allclose(judged.uncalibrated[:, 1], [0.3, 0.6, 0.3, 0.6])
    decided = {level: judged.decided(judged.cases(level, READOUT)).tolist() for level in LEVELS}
    assert decided == {"image": [0, 1, 0, 0], "breast": [0, 1, 0, 1], "patient": [0, 1, 0, 1]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_of_judged_images_changes_no_decision(kind: Kind) -> None:
    of, logits = population(kind, 30, 1)
    shuffled = of.truth[np.random.default_rng(0).permutation(30).repeat(4) * 4]  # patients keep one truth
    other = type(of)(of.target, of.rows, shuffled, *list(vars(of).values())[3:])
    assert (shuffled != of.truth).any()
    first, second = (judge(x, logits, folds_of(of, 3), 1.4, 0.45) for x in (of, other))
    np.testing.assert_array_equal(first.probabilities, second.probabilities)
    for level in LEVELS:
        cases = [judged.cases(level, READOUT) for judged in (first, second)]
        np.testing.assert_array_equal(first.decided(cases[0]), second.decided(cases[1]))
        np.testing.assert_array_equal(cases[0].probabilities, cases[1].probabilities)


def test_calibration_is_told_before_and_after_temperature() -> None:
    of, logits = population("binary", 30, 1)
    found = figures(judge(of, 4 * logits, temperature=4.0))
    for place, temperature in ((1, 1.0), (2, 4.0)):
        probabilities = softmax(4 * logits / temperature)
        told = column(found, place, "Calibration of images")
        assert told["log loss"] == pytest.approx(metrics.log_loss(of.truth, probabilities))
        assert told["Brier"] == pytest.approx(metrics.brier_score_loss(of.truth, probabilities[:, 1]))
    assert "Temperature: 4." in found["tables"][1]["note"]


# ---------------------------------------------------------------------------------------------- intervals


def width(found: dict[str, Any]) -> float:
    low, high = found["interval"]
    return float(high - low)


def test_copies_of_a_patient_s_image_add_nothing_to_what_is_known() -> None:
    """Four copies of an image as four patients halve the interval; as one patient they leave it as it was."""
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=60)
    scores = np.clip(0.3 + 0.3 * truth + 0.25 * rng.normal(size=60), 0.01, 0.99)
    names = np.array([f"p{i:02}" for i in range(60)])
    fourfold = (np.repeat(truth, 4), binary_logits(np.repeat(scores, 4)))
    alone = figures(judge(labelled("binary", truth, names.tolist()), binary_logits(scores)), replicates=1000)
    theirs = labelled("binary", fourfold[0], np.repeat(names, 4).tolist())
    strangers = labelled("binary", fourfold[0], [f"p{i}" for i in range(240)])
    together = figures(judge(theirs, fourfold[1]), replicates=1000)
    apart = figures(judge(strangers, fourfold[1]), replicates=1000)
    assert width(together) == pytest.approx(width(alone), rel=1e-9)
    assert width(together) / width(apart) == pytest.approx(2, rel=0.15)


def test_one_draw_of_patients_weighs_images_breasts_and_patients() -> None:
    of, logits = population("binary", 10, 0)
    draws = Draws.of(of.truth, of.patients, 30, 0)
    assert draws.times.shape == (30, 10)
    assert (draws.times.sum(1) == 10).all()
    judged = judge(of, logits)
    for level in LEVELS:
        case = judged.cases(level, READOUT)
        [weights] = draws.weights(case.patients)
        for m, patient in enumerate(case.patients):
            np.testing.assert_array_equal(weights[:, m], draws.times[:, draws.patients.tolist().index(patient)])


def test_many_cases_are_weighed_a_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    of, logits = population("binary", 10, 0)
    whole = figures(judge(of, logits))
    monkeypatch.setattr("miram.finetune.classify.bootstrap.HELD", 90)  # two samples of 40 images
    assert len(list(Draws.of(of.truth, of.patients, 30, 0).weights(of.patients))) == 15
    for title in ("Figures by level", "Calibration of images"):
        for place in (1, 2):
            assert intervals(figures(judge(of, logits)), place, title) == pytest.approx(intervals(whole, place, title))


def test_a_class_that_nearly_all_samples_lack_leaves_the_other_intervals() -> None:
    names = np.array([f"p{i:02}" for i in range(20)])
    draws = Draws.of(np.arange(20), names, 30, 0)  # all 20 in one sample: once in 40 million
    assert draws.times.shape == (30, 20)


def test_one_patient_gives_figures_without_intervals() -> None:
    of = labelled("binary", [0, 1, 0, 1], ["a"] * 4, ["L", "L", "R", "R"])
    found = figures(judge(of, binary_logits([0.1, 0.8, 0.4, 0.3])))
    assert (found["value"], found["interval"]) == (0.75, None)
    assert [limit for place in (1, 2, 3) for limit in intervals(found, place, "Figures by level")] == []
    assert intervals(found, 2, "Calibration of images") == []
    assert found["tables"][0]["columns"][1:] == ["4 images", "2 breasts", "1 patient"]
    assert found["notes"][1] == "There are no intervals: all images are of one patient."


def test_two_patients_of_whom_every_sample_needs_both_give_none_either() -> None:
    found = figures(judge(labelled("binary", [0, 1, 1], ["a", "b", "b"]), binary_logits([0.5, 0.8, 0.4])))
    assert (found["value"], found["interval"]) == (0.5, None)


def test_delong_is_that_of_one_fold_and_of_two_equal_folds_half_the_variance() -> None:
    of, logits = population("binary", 40, 0)
    patients = judge(of, logits).cases("patient", READOUT)
    one, expected = delong_within(patients), delong_interval(patients.truth, patients.probabilities[:, 1])
    assert (one.value, *one.interval) == pytest.approx((expected.value, *expected.interval))
    twice = labelled("binary", np.tile(of.truth[::4], 2), [f"q{i:02}" for i in range(80)])
    scores = np.tile(patients.probabilities[:, 1], 2)
    two = delong_within(judge(twice, binary_logits(scores), np.repeat([0, 1], 40)).cases("patient", READOUT))
    assert two.value == pytest.approx(one.value)
    spread = [np.diff(logit(x.interval))[0] for x in (one, two)]
    assert spread[0] / spread[1] == pytest.approx(np.sqrt(2))


def test_delong_is_beside_the_auc_of_patients_alone() -> None:
    of, logits = population("binary", 40, 0)
    [row] = [r for r in figures(judge(of, logits))["tables"][0]["rows"] if r[0] == "AUC, interval by DeLong"]
    assert row[1] is None
    assert row[2] is None
    assert row[3]["value"] == pytest.approx(column(figures(judge(of, logits)), 3)["AUC"])


# ---------------------------------------------------------------------------------------------- what is told


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_plain_json_that_the_report_reads(kind: Kind) -> None:
    of, logits = population(kind, 12, 0)
    found = figures(judge(of, logits, folds_of(of, 3)))
    told = Result.model_validate(json.loads(json.dumps(found | {"schema": "miram.result/1"}, allow_nan=False)))
    assert told.value == found["value"]
    assert (told.n_images, told.n_patients) == (48, 12)
    assert [row.name for row in told.rows] == ["by image", "by breast", "by patient", "majority class"]


def test_classes_are_counted_by_image() -> None:
    of, logits = population("multilabel", 12, 0)
    assert figures(judge(of, logits))["classes"] == dict(zip(of.target.classes, of.truth.sum(0), strict=True))


def test_what_cannot_be_computed_is_none_and_the_rest_is_told() -> None:
    """Every patient has a positive image: there is no AUC of patients."""
    of = labelled("binary", [0, 1] * 6, [f"p{i // 2}" for i in range(12)])
    found = figures(judge(of, binary_logits(np.linspace(0.1, 0.9, 12))), headline="patient")
    json.dumps(found, allow_nan=False)
    assert (found["value"], found["interval"]) == (None, None)
    assert column(found, 1)["AUC"] is not None


def test_patients_whose_images_disagree_are_counted_and_told() -> None:
    of, logits = population("multiclass", 12, 0)
    of.truth[0] = (of.truth[0] + 1) % 3
    found = figures(judge(of, logits))
    assert "Left out, as their images are of different classes: 1 of breasts, 1 of patients." in found["notes"]
    assert found["tables"][0]["columns"][1:] == ["48 images", "23 breasts", "11 patients"]


@pytest.mark.parametrize("kind", ["multiclass"])
def test_a_level_without_a_case_is_empty(kind: Kind) -> None:
    of = labelled(kind, [0, 1, 2, 0, 1, 2], ["a", "a", "b", "b", "c", "c"])
    found = figures(judge(of, np.eye(3)[[0, 1, 2, 0, 1, 2]]))
    assert found["rows"][2] == {"name": "by patient", "value": None, "interval": None, "detail": "0 patients"}
    assert found["value"] == 1.0


def test_few_patients_are_warned_of() -> None:
    said = [figures(judge(*population("binary", n, 0)))["notes"][1] for n in (49, 50)]
    assert "With 49 patients they are too short" in said[0]
    assert "too short" not in said[1]


def test_the_operating_point_is_told() -> None:
    judged = judge(*population("binary", 12, 0))
    told = figures(judged, operating_point="specificity", operating_at=0.95)["notes"][-1]
    assert "at a specificity of at least 0.95" in told


def test_a_seed_gives_the_same_figures_again() -> None:
    judged = judge(*population("binary", 20, 0))
    assert figures(judged) == figures(judged)
