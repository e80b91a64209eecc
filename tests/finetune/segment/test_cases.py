"""One image's figures: against MONAI, against sets of pixels, and against what a table of empty masks should say."""

from __future__ import annotations

import warnings
from math import isnan, pi

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from miram.finetune.segment.cases import Case, Rules, score_case

IGNORED = 255
Pixels = set[tuple[int, int]]


def square(at: tuple[int, int], side: int = 10, size: int = 40) -> NDArray[np.uint8]:
    """(size, size) a square of ones."""
    mask = np.zeros((size, size), np.uint8)
    mask[at[0] : at[0] + side, at[1] : at[1] + side] = 1
    return mask


def judged(
    truth: NDArray[np.uint8],
    said: NDArray[np.uint8],
    probabilities: NDArray[np.float32] | None = None,
    findings: NDArray[np.int32] | None = None,
    rules: Rules | None = None,
    spacing_mm: float | None = 0.07,
) -> Case:
    """A case; by default one lesion where there is truth, and a model as sure as its mask."""
    if probabilities is None:
        probabilities = np.stack([said == cls for cls in range(3)]).astype(np.float32)
    if findings is None:
        findings = np.where(truth == IGNORED, 0, truth).astype(np.int32)
    return score_case("key", "patient", 0, spacing_mm, truth, findings, said, probabilities, rules)


EMPTY = np.zeros((40, 40), np.uint8)
ONE_PIXEL = Rules(tolerance_mm=0.07)


def test_nothing_on_an_image_where_nothing_is_is_no_dice_and_no_false_mark() -> None:
    case = judged(EMPTY, EMPTY)
    assert isnan(case.overlaps[0].dice)
    assert isnan(case.overlaps[0].iou)
    assert not case.positive
    assert (case.false_components, case.false_area, case.lesions, case.candidates) == (0, 0, (), ())


def test_something_on_an_image_where_nothing_is_is_counted_as_false_and_is_no_dice() -> None:
    case = judged(EMPTY, square((5, 5)) | square((25, 25), side=3))
    assert isnan(case.overlaps[0].dice)
    assert (case.false_components, case.false_area, case.lesions) == (2, 109, ())
    assert [(mark.lesion_iou, mark.lesion_point) for mark in case.candidates] == [(0, 0), (0, 0)]


def test_a_missed_lesion_has_a_dice_of_0_and_no_distance_and_says_so() -> None:
    case = judged(square((5, 5)), EMPTY)
    (lesion,) = case.lesions
    assert (case.overlaps[0].dice, case.overlaps[0].iou) == (0, 0)
    assert (lesion.dice, lesion.missed, lesion.hit_iou, lesion.hit_point) == (0, True, False, False)
    assert all(isnan(v) for v in (lesion.hd95, lesion.surface_dice, lesion.score_iou, lesion.score_point))
    assert lesion.area == 100
    assert lesion.diameter == pytest.approx(2 * (100 / pi) ** 0.5)


def test_a_mask_two_pixels_off_has_the_figures_of_the_table() -> None:
    case = judged(square((5, 5)), square((7, 5)), rules=ONE_PIXEL)
    (lesion,) = case.lesions
    assert case.overlaps[0].dice == lesion.dice == pytest.approx(0.8)
    assert case.overlaps[0].iou == pytest.approx(80 / 120)
    assert lesion.hd95 == 2.0
    assert lesion.surface_dice == pytest.approx(0.556, abs=5e-4)
    assert (lesion.hit_iou, lesion.hit_point, lesion.missed) == (True, True, False)
    assert case.false_components == 0


def test_without_a_spacing_the_tolerance_is_in_pixels() -> None:
    near, far = (Rules(tolerance_mm=1e-9, tolerance_px=px) for px in (1.0, 2.0))
    agree = [
        judged(square((5, 5)), square((7, 5)), rules=r, spacing_mm=None).lesions[0].surface_dice for r in (near, far)
    ]
    assert agree == pytest.approx([0.556, 1.0], abs=5e-4)


def blob(rng: np.random.Generator, size: int = 48) -> NDArray[np.bool_]:
    """A random component without corners of its own, which may reach the border."""
    y, x = np.mgrid[:size, :size]
    at, axes, turn = rng.uniform(8, size - 8, 2), rng.uniform(4, 14, 2), rng.uniform(0, pi)
    u, v = (
        (y - at[0]) * np.cos(turn) + (x - at[1]) * np.sin(turn),
        (x - at[1]) * np.cos(turn) - (y - at[0]) * np.sin(turn),
    )
    return np.asarray((u / axes[0]) ** 2 + (v / axes[1]) ** 2 <= 1)


def test_dice_and_distances_are_those_of_monai() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
    rng, compared = np.random.default_rng(0), 0
    while compared < 12:
        truth, said = blob(rng), blob(rng)
        if not (truth & said).any():
            continue
        compared += 1
        case = judged(truth.astype(np.uint8), said.astype(np.uint8), rules=Rules(tolerance_px=2.0), spacing_mm=None)
        a, b = (torch.from_numpy(m)[None, None].float() for m in (said, truth))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            distance = compute_hausdorff_distance(a, b, include_background=True, percentile=95).item()
            agree = compute_surface_dice(a, b, [2.0], include_background=True).item()
            dice = compute_dice(a, b, include_background=True).item()
        (lesion,) = case.lesions
        assert (case.overlaps[0].dice, lesion.dice) == pytest.approx((dice, dice), abs=1e-6)
        assert (lesion.hd95, lesion.surface_dice) == pytest.approx((distance, agree), abs=1e-5)


def test_ignored_pixels_are_as_though_the_image_ended_there() -> None:
    rng = np.random.default_rng(3)
    p = gaussian_filter(rng.random((60, 80)), 3).astype(np.float32)
    p = (p - p.min()) / (p.max() - p.min())
    said = (p > 0.55).astype(np.uint8)
    truth = (gaussian_filter(rng.random((60, 80)), 4) > 0.52).astype(np.uint8)
    findings = np.where(truth, 1 + np.arange(80) // 20, 0).astype(np.int32)
    half = truth.copy()
    half[:, 40:] = IGNORED
    whole = judged(half, said, np.stack([1 - p, p]), findings)
    cut = judged(truth[:, :40], said[:, :40], np.stack([1 - p, p])[:, :, :40], findings[:, :40])
    assert len(cut.lesions) == 2
    assert cut.candidates
    assert cut.false_components > 0
    same = ("overlaps", "false_components", "false_area", "lesions", "candidates")
    assert repr([getattr(whole, name) for name in same]) == repr([getattr(cut, name) for name in same])


def test_an_image_that_is_ignored_whole_has_nothing() -> None:
    case = judged(np.full((40, 40), IGNORED, np.uint8), square((5, 5)))
    assert (case.positive, case.false_components, case.lesions, case.candidates) == (False, 0, (), ())


def test_a_class_said_in_the_place_of_another_is_missed_and_false() -> None:
    truth = square((5, 5)) | 2 * square((25, 25))
    said = 2 * square((5, 5)) | 2 * square((25, 25))
    case = judged(truth, said.astype(np.uint8))
    first, second = case.overlaps
    assert (first.truth, first.said, first.both, first.false_components) == (100, 0, 0, 0)
    assert (second.truth, second.said, second.both, second.false_components, second.false_area) == (
        100,
        200,
        100,
        1,
        100,
    )
    assert [(lesion.cls, lesion.number, lesion.missed) for lesion in case.lesions] == [(1, 1, True), (2, 2, False)]
    assert sorted((mark.cls, mark.lesion_iou, mark.lesion_point) for mark in case.candidates) == [(2, 0, 0), (2, 2, 2)]


def test_without_findings_pixels_are_counted_and_nothing_else() -> None:
    said = square((5, 5))
    case = score_case("key", "patient", 0, None, said, None, said, np.stack([1 - said, said]).astype(np.float32))
    assert (case.overlaps[0].dice, case.lesions, case.candidates) == (1.0, (), ())


def test_lesions_that_meet_can_both_be_drawn_perfectly() -> None:
    truth = square((5, 5)) | square((5, 15))
    findings = np.where(truth, 1 + (np.arange(40) >= 15), 0).astype(np.int32)
    case = judged(truth, truth, findings=findings)
    assert [(lesion.dice, lesion.hd95, lesion.hit_iou) for lesion in case.lesions] == [(1.0, 0.0, True)] * 2
    assert len(case.candidates) == 1
    assert [lesion.score_iou for lesion in case.lesions] == [1.0, 1.0]


def test_two_components_on_a_lesion_count_together() -> None:
    said = square((5, 5))
    said[9:11] = 0  # two parts of 40 pixels
    (lesion,) = judged(square((5, 5)), said).lesions
    assert lesion.dice == pytest.approx(2 * 80 / 180)
    strict = judged(square((5, 5)), said, rules=Rules(iou=0.5)).lesions[0]
    assert (strict.hit_iou, strict.hit_point) == (False, True)


def test_of_pixels_that_share_the_peak_the_middle_one_counts() -> None:
    said = square((10, 10), side=20)  # a model that is sure: all pixels have probability 1
    case = judged(square((16, 16), side=8), said)
    assert case.candidates[0].lesion_point == 1
    assert case.lesions[0].hit_point


# ---------------------------------------------------------------------------------------------- brute force


def flood(pixels: Pixels) -> list[Pixels]:
    """8-connected parts, in the order of their first pixel."""
    left, parts = set(pixels), []
    for start in sorted(pixels):
        if start in left:
            part, edge = set(), [start]
            while edge:
                y, x = edge.pop()
                if (y, x) in left:
                    left.remove((y, x))
                    part.add((y, x))
                    edge += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            parts.append(part)
    return parts


def where(mask: NDArray[np.bool_]) -> Pixels:
    """Pixels of a mask."""
    return {(int(y), int(x)) for y, x in np.argwhere(mask)}


def iou(region: Pixels, lesion: Pixels, others: Pixels) -> float:
    """By sets."""
    part = region - others
    return len(part & lesion) / len(part | lesion)


def test_hits_candidates_and_lesions_are_those_of_sets_of_pixels() -> None:
    rng, seen = np.random.default_rng(1), np.zeros(5, int)
    rules = Rules(iou=0.2, floor=0.3)
    for _ in range(40):
        p = gaussian_filter(rng.random((32, 32)), 1.5)
        p = ((p - p.min()) / (p.max() - p.min())).astype(np.float32)
        truth = (gaussian_filter(p + rng.normal(0, 0.9, p.shape), 2) > 0.62).astype(np.uint8)
        findings = np.where(truth, 1 + (np.arange(32) >= 16), 0).astype(np.int32)
        said = (p > 0.75).astype(np.uint8)
        case = judged(truth, said, np.stack([1 - p, p]), findings, rules)
        lesions = {n: where(findings == n) for n in (1, 2) if (findings == n).any()}
        others = {n: set().union(*(lesions[k] for k in lesions if k != n)) for n in lesions}
        regions, peaks = [], []
        for part in flood(where(p >= 0.3)):
            peak = max(part, key=lambda at: p[at])
            regions.append(next(r for r in flood({at for at in part if p[at] >= p[peak] / 2}) if peak in r))
            peaks.append(peak)
        parts = flood(where(said == 1))
        assert [(mark.score, mark.area) for mark in case.candidates] == [
            (p[peak], len(region)) for peak, region in zip(peaks, regions, strict=True)
        ]
        for mark, region, peak in zip(case.candidates, regions, peaks, strict=True):
            ious = {n: iou(region, lesions[n], others[n]) for n in lesions}
            best = max(ious, key=lambda n: ious[n], default=0)
            assert mark.lesion_iou == (best if best and ious[best] >= 0.2 else 0)
            assert mark.lesion_point == next((n for n in lesions if peak in lesions[n]), 0)
        assert case.false_components == sum(not part & where(truth == 1) for part in parts)
        assert [lesion.number for lesion in case.lesions] == list(lesions)
        for lesion in case.lesions:
            own, rest = lesions[lesion.number], others[lesion.number]
            scores = [p[a] for a, r in zip(peaks, regions, strict=True) if iou(r, own, rest) >= 0.2]
            points = [p[a] for a in peaks if a in own]
            drawn = set().union(*(part for part in parts if part & own)) - rest
            assert lesion.hit_iou == any(iou(part, own, rest) >= 0.2 for part in parts)
            assert lesion.hit_point == any(max(part, key=lambda at: p[at]) in own for part in parts)
            assert lesion.dice == pytest.approx(2 * len(drawn & own) / (len(drawn) + len(own)))
            assert (lesion.score_iou, lesion.score_point) == pytest.approx(
                (max(scores, default=np.nan), max(points, default=np.nan)), nan_ok=True
            )
            seen += [lesion.hit_iou, not lesion.hit_iou, lesion.hit_point, lesion.missed, bool(case.false_components)]
    assert (seen >= 3).all(), "the random images hold some of everything"


def test_of_a_noisy_map_the_most_probable_marks_are_kept() -> None:
    """Ten thousand of them would cost minutes, and those behind the hundredth of one image could never count."""
    rng, rules = np.random.default_rng(0), Rules(floor=0.05, most=7)
    said = np.zeros((60, 60), np.float32)
    said[::3, ::3] = rng.uniform(0.1, 0.9, (20, 20))
    truth = np.zeros((60, 60), np.uint8)
    truth[30, 30] = 1
    case = score_case("k", "p", 0, None, truth, truth.astype(int), truth, np.stack([1 - said, said]), rules)
    assert sorted(mark.score for mark in case.candidates) == sorted(np.sort(said.ravel())[-7:].astype(float).tolist())
    every = score_case("k", "p", 0, None, truth, truth.astype(int), truth, np.stack([1 - said, said]), Rules(most=400))
    assert len(every.candidates) == 400
