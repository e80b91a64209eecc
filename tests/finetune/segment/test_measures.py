"""Figures over many images: against repeating the images, against MONAI's FROC, against sums written out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import mean, median, stdev

import numpy as np
import pytest
from random_cases import random_cases
from scipy.ndimage import gaussian_filter, label

from miram.finetune.segment.cases import NAN, Case, Rules, score_case
from miram.finetune.segment.measures import (
    RATES,
    Froc,
    Rule,
    figures,
    marks,
    of_class,
    sensitivities,
    spread,
    strata,
    tally,
)


def plain(cases: Sequence[Case]) -> dict[str, float]:
    """Every figure of the images, each once."""
    return {name: float(value[0]) for name, value in figures(cases, np.ones((1, len(cases)))).items()}


def test_weights_are_what_repeating_images_would_give() -> None:
    cases, rng = random_cases(30, seed=0, classes=2), np.random.default_rng(1)
    weights = rng.integers(0, 4, (6, len(cases))).astype(np.float64)
    weighted = figures(cases, weights)
    parted = [part.lesions.figures(weights) for part in strata(cases)]
    for r, times in enumerate(weights.astype(int).tolist()):
        repeated = [case for case, n in zip(cases, times, strict=True) for _ in range(n)]
        ones = np.ones((1, len(repeated)))
        expected = {name: value[0] for name, value in figures(repeated, ones).items()}
        assert {name: value[r] for name, value in weighted.items()} == pytest.approx(expected, nan_ok=True)
        for of, part in zip(parted, strata(repeated), strict=True):
            again = {name: value[0] for name, value in part.lesions.figures(ones).items()}
            assert {name: value[r] for name, value in of.items()} == pytest.approx(again, nan_ok=True)


def test_figures_are_the_sums_of_their_definitions() -> None:
    cases = random_cases(40, seed=2)
    positives, negatives = ([case for case in cases if case.positive == yes] for yes in (True, False))
    lesions = [(lesion, case.spacing_mm or NAN) for case in cases for lesion in case.lesions]
    found = [(lesion, mm) for lesion, mm in lesions if lesion.dice > 0]
    got, first = plain(cases), [case.overlaps[0] for case in cases]
    assert {
        "mean Dice": mean(2 * o.both / (o.truth + o.said) for o in first if o.truth),
        "mean IoU": mean(o.both / (o.truth + o.said - o.both) for o in first if o.truth),
        "pooled Dice": 2 * sum(o.both for o in first) / sum(o.truth + o.said for o in first),
        "negatives with anything said": mean(float(case.overlaps[0].said > 0) for case in negatives),
        "false components per negative": mean(case.false_components for case in negatives),
        "false area per negative, mm2": mean(case.false_area * (case.spacing_mm or NAN) ** 2 for case in negatives),
        "lesion sensitivity, IoU rule": mean(float(lesion.hit_iou) for lesion, _ in lesions),
        "lesion sensitivity, point rule": mean(float(lesion.hit_point) for lesion, _ in lesions),
        "lesion Dice, missed as 0": mean(lesion.dice for lesion, _ in lesions),
        "lesion Dice, not missed": mean(lesion.dice for lesion, _ in found),
        "HD95 of not missed, mm": mean(lesion.hd95 * mm for lesion, mm in found),
        "surface Dice of not missed": mean(lesion.surface_dice for lesion, _ in found),
    } == pytest.approx({name: value for name, value in got.items() if "FROC" not in name and "CPM" not in name})
    dices = [case.overlaps[0].dice for case in positives]
    assert spread(cases)["mean Dice"] == pytest.approx((median(dices), stdev(dices)))
    assert tally(cases)["missed"] == len(lesions) - len(found)
    assert tally(cases)["positives"] + tally(cases)["negatives"] == 40


def test_a_missed_lesion_lowers_every_mean_it_belongs_to() -> None:
    cases = random_cases(30, seed=3)
    i = next(i for i, case in enumerate(cases) if case.lesions and not case.lesions[0].missed and case.overlaps[0].both)
    gone = replace(
        cases[i].lesions[0],
        hit_iou=False,
        hit_point=False,
        dice=0.0,
        hd95=NAN,
        surface_dice=NAN,
        score_iou=NAN,
        score_point=NAN,
    )
    overlap = replace(cases[i].overlaps[0], both=0, said=cases[i].overlaps[0].said - cases[i].overlaps[0].both)
    hit = replace(cases[i].lesions[0], hit_iou=True, hit_point=True, score_iou=1.0, score_point=1.0)
    before = [*cases[:i], replace(cases[i], lesions=(hit, *cases[i].lesions[1:])), *cases[i + 1 :]]
    after = [*cases[:i], replace(cases[i], overlaps=(overlap,), lesions=(gone, *cases[i].lesions[1:])), *cases[i + 1 :]]
    was, now = plain(before), plain(after)
    means = [name for name in was if "not missed" not in name and "negative" not in name]
    assert len(means) == 6 + 2 * (len(RATES) + 1)
    assert [name for name in means if not now[name] < was[name]] == []
    assert tally(after)["missed"] == tally(before)["missed"] + 1


def test_a_positive_with_nothing_said_is_in_the_mean_and_a_negative_is_not() -> None:
    truth, nothing = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8)
    truth[5:15, 5:15] = 1
    images = {
        "perfect": (truth, truth),
        "missed": (truth, nothing),
        "quiet": (nothing, nothing),
        "false": (nothing, truth),
    }
    cases = [
        score_case(key, "p", 0, None, real, real.astype(np.int32), said, np.stack([1 - said, said]).astype(np.float32))
        for key, (real, said) in images.items()
    ]
    got = plain(cases)
    assert (got["mean Dice"], got["mean IoU"], got["lesion Dice, missed as 0"]) == (0.5, 0.5, 0.5)
    assert got["pooled Dice"] == pytest.approx(2 * 100 / 400)
    assert (got["lesion Dice, not missed"], got["HD95 of not missed, px"]) == (1.0, 0.0)
    assert (got["negatives with anything said"], got["false area per negative, px"]) == (0.5, 50.0)
    assert [got[f"FROC at {rate:g}, IoU rule"] for rate in RATES] == [0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_what_cannot_be_computed_is_nan() -> None:
    quiet = [case for case in random_cases(60, seed=4) if not case.positive and not case.lesions]
    got = plain(quiet)
    known = {name for name, value in got.items() if not np.isnan(value)}
    assert known == {name for name in got if "negative" in name}
    loud = plain([case for case in random_cases(40, seed=4) if case.positive])
    assert np.isnan(loud["false components per negative"])
    assert np.isnan(spread(quiet)["mean Dice"]).all()


# ---------------------------------------------------------------------------------------------- FROC


def test_the_point_rule_gives_monais_froc() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.metrics.froc import compute_fp_tp_probs_nd, compute_froc_curve_data
    rng, rules = np.random.default_rng(5), Rules(floor=0.25)
    cases, false, true, lesions = [], [], [], 0
    for i in range(12):
        p = gaussian_filter(rng.random((64, 64)), 2)
        p = ((p - p.min()) / (p.max() - p.min())).astype(np.float32)
        p *= p > 0.6  # apart from each other, or there were one candidate an image
        findings = label(gaussian_filter(4 * rng.random((64, 64)) + p, 3) > 2.25, np.ones((3, 3)))[0].astype(np.int32)
        said = (p >= 0.8).astype(np.uint8)
        cases.append(
            score_case(
                str(i), "p", 0, None, (findings > 0).astype(np.uint8), findings, said, np.stack([1 - p, p]), rules
            )
        )
        parts, n = label(p >= rules.floor, np.ones((3, 3)))
        peaks = np.array([np.unravel_index(np.where(parts == k, p, -1).argmax(), p.shape) for k in range(1, n + 1)])
        fp, tp, targets = compute_fp_tp_probs_nd(p[tuple(peaks.T)], peaks, findings)
        false, true, lesions = [*false, *fp], [*true, *tp], lesions + targets
    rates, sensitivity = compute_froc_curve_data(np.array(false), np.array(true), lesions, len(cases))
    ours = Froc.of(cases, "point", np.ones((1, 12)))
    assert len(false) > 5
    assert 0.2 < sensitivity.max() < 1
    kept = len(rates) - 1  # MONAI leaves out its lowest score (0 of the lesions that nothing hits), and ends at (0, 0)
    np.testing.assert_allclose(ours.rates[0], rates[:kept][::-1])
    np.testing.assert_allclose(ours.sensitivity[0], sensitivity[:kept][::-1])


@pytest.mark.parametrize("rule", ["iou", "point"])
def test_sensitivity_at_a_rate_is_the_best_of_all_thresholds(rule: Rule) -> None:
    cases = random_cases(25, seed=6)
    score, hit, _ = marks(cases, rule)
    lesions = sum(len(case.lesions) for case in cases)
    every = [(sum((score >= t) & (hit == 0)) / 25, sum((score >= t) & (hit == 1)) / lesions) for t in [*score, 2.0]]
    expected = [max(sensitivity for false, sensitivity in every if false <= rate) for rate in RATES]
    got = plain(cases)
    by = {"iou": "IoU rule", "point": "point rule"}[rule]
    assert [got[f"FROC at {rate:g}, {by}"] for rate in RATES] == pytest.approx(expected)
    assert got[f"CPM, {by}"] == pytest.approx(mean(expected))
    assert len(set(expected)) > 3


def test_samples_taken_a_few_at_a_time_are_those_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cases, weights = random_cases(20, seed=7), np.random.default_rng(0).integers(0, 3, (9, 20)).astype(np.float64)
    at_once = sensitivities(cases, "iou", weights)
    monkeypatch.setattr("miram.finetune.segment.measures.HELD", 200)
    np.testing.assert_array_equal(sensitivities(cases, "iou", weights), at_once)


def test_a_sample_without_lesions_has_no_sensitivity() -> None:
    cases = random_cases(20, seed=13)
    without = np.array([[0.0 if case.lesions else 1.0 for case in cases], [1.0] * 20])
    assert np.isnan(sensitivities(cases, "iou", without)).all(1).tolist() == [True, False]


def test_a_model_that_marks_nothing_finds_nothing() -> None:
    silent = [
        replace(
            case, candidates=(), lesions=tuple(replace(one, score_iou=NAN, score_point=NAN) for one in case.lesions)
        )
        for case in random_cases(20, seed=8)
    ]
    assert not sensitivities(silent, "point", np.ones((2, 20))).any()


# ---------------------------------------------------------------------------------------------- parts


def test_strata_part_the_lesions_by_millimetres() -> None:
    cases = random_cases(60, seed=9)
    sizes = [lesion.diameter * (case.spacing_mm or NAN) for case in cases for lesion in case.lesions]
    parts = strata(cases)
    assert [part.name for part in parts] == ["< 5 mm", "5 to 10 mm", "10 to 20 mm", ">= 20 mm"]
    edges = [0, 5, 10, 20, 1e9]
    assert [len(part.lesions) for part in parts] == [
        sum(low <= size < high for size in sizes) for low, high in pairwise(edges)
    ]
    whole, ones = plain(cases)["lesion Dice, missed as 0"], np.ones((1, 60))
    means = [(part.lesions.figures(ones)["lesion Dice, missed as 0"][0], len(part.lesions)) for part in parts]
    assert sum(value * n for value, n in means if n) / len(sizes) == pytest.approx(whole)


def test_a_lesion_at_an_edge_is_among_the_larger_ones() -> None:
    case = next(case for case in random_cases(9, seed=9) if case.lesions)
    alone = replace(case, spacing_mm=0.5, lesions=(replace(case.lesions[0], diameter=10.0),))
    assert [len(part.lesions) for part in strata([alone])] == [0, 1, 0, 0]


def test_where_a_spacing_is_unknown_strata_are_thirds_and_distances_are_pixels() -> None:
    cases = random_cases(60, seed=10)
    i = next(i for i, case in enumerate(cases) if case.lesions)
    cases[i] = replace(cases[i], spacing_mm=None)
    parts = strata(cases)
    assert [part.name[-2:] for part in parts] == ["px"] * 3
    assert max(len(p.lesions) for p in parts) - min(len(p.lesions) for p in parts) <= 2
    assert sum(len(part.lesions) for part in parts) == tally(cases)["lesions"]
    got = plain(cases)
    found = [lesion.hd95 for case in cases for lesion in case.lesions if not lesion.missed]
    assert got["HD95 of not missed, px"] == pytest.approx(mean(found))
    assert "false area per negative, mm2" in got, "the spacing of every negative is known"


def test_a_unit_does_not_depend_on_what_the_model_finds() -> None:
    cases = random_cases(40, seed=11)
    i = next(i for i, case in enumerate(cases) if len(case.lesions) == 1)
    gone = replace(cases[i].lesions[0], dice=0.0, hd95=NAN, surface_dice=NAN)
    cases[i] = replace(cases[i], spacing_mm=None, lesions=(gone,))
    assert "HD95 of not missed, px" in plain(cases)


def test_a_class_alone_has_its_own_positives_and_false_marks() -> None:
    cases = random_cases(30, seed=12, classes=2)
    for cls in (1, 2):
        alone = of_class(cases, cls)
        assert [case.positive for case in alone] == [case.overlaps[cls - 1].truth > 0 for case in cases]
        assert {lesion.cls for case in alone for lesion in case.lesions} == {cls}
        assert {mark.cls for case in alone for mark in case.candidates} == {cls}
        negatives = [case.overlaps[cls - 1] for case in cases if not case.overlaps[cls - 1].truth]
        got = plain(alone)
        assert got["false components per negative"] == pytest.approx(mean(o.false_components for o in negatives))


def test_dice_of_an_image_is_the_mean_over_the_classes_it_has() -> None:
    cases = [case for case in random_cases(30, seed=12, classes=2) if case.positive]
    kinds = {tuple(overlap.truth > 0 for overlap in case.overlaps) for case in cases}
    assert kinds == {(True, True), (True, False), (False, True)}
    expected = mean(mean(o.dice for o in case.overlaps if o.truth) for case in cases)
    assert plain(cases)["mean Dice"] == pytest.approx(expected)
