"""What segmented images are worth together. Lesions, candidates and hits are as `cases.py` defines them.

    positive         an image with truth of any class; the others are negatives
    mean Dice, IoU   over positives, of each its own: the mean over the classes that occur in its truth
    pooled Dice      2 both / (truth + said), the pixels of all images and classes added up first
    negatives        share of negatives on which anything is said; false components, and their area, per negative
    sensitivity      share of lesions that the mask hits, by the rule of IoU or of points
    lesion Dice      mean over all lesions, missed ones as 0; and over those that are not missed
    HD95, surface    mean over lesions that are not missed, so never without how many are: a missed lesion has no
      Dice           distance, and would make the mean better
    FROC             sensitivity at a rate: the largest over thresholds of the candidates' scores at which false marks
                     per image, over all images, are at most that many; nothing is interpolated, and a threshold above
                     every score is one of them. A candidate that hits nothing is a false mark. CPM is the mean over
                     RATES.

What is of one class has that class alone: its truth makes an image positive. Millimetres are given where the spacing of
every image that could count is known, whatever was said on it, else pixels: a unit never depends on the model.

Weights are (R, m), as in `engine.metrics`: how often each of m images occurs. All figures are (R,), what recomputing
them on the images so repeated would give; nan where that cannot be.

Legend: m images, n lesions, R bootstrap samples, u distinct scores, f rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np

from ...engine.metrics import Floats, Ints
from ...engine.metrics.estimate import mean, ratio
from ...engine.metrics.ranking import ROUNDING, Curve
from .cases import Case, Lesion

Rule = Literal["iou", "point"]
RULES: tuple[Rule, ...] = ("iou", "point")
BY: dict[Rule, str] = {"iou": "IoU rule", "point": "point rule"}
RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)  # false marks per image
EDGES_MM = (5.0, 10.0, 20.0)  # diameters that part small lesions from large ones
HELD = 4_000_000  # weights of marks in memory at once
NAN = float("nan")


def figures(cases: Sequence[Case], weights: Floats) -> dict[str, Floats]:
    """Every figure by its name; (R,) each. Medians, which have no good bootstrap interval, are in `spread`."""
    return {
        **of_images(cases, weights),
        **of_negatives(cases, weights),
        **Lesions.of(cases).figures(weights),
        **of_marks(cases, weights),
    }


def of_class(cases: Sequence[Case], cls: int) -> list[Case]:
    """The same images as though there were no other class."""
    return [
        replace(
            case,
            overlaps=(overlap,),
            false_components=overlap.false_components,
            false_area=overlap.false_area,
            lesions=tuple(lesion for lesion in case.lesions if lesion.cls == cls),
            candidates=tuple(mark for mark in case.candidates if mark.cls == cls),
        )
        for case in cases
        for overlap in case.overlaps[cls - 1 : cls]
    ]


def tally(cases: Sequence[Case]) -> dict[str, int]:
    """How many there are of what the figures are of."""
    lesions = [lesion for case in cases for lesion in case.lesions]
    positive = sum(case.positive for case in cases)
    missed = sum(lesion.missed for lesion in lesions)
    return {
        "images": len(cases),
        "patients": len({case.patient for case in cases}),
        "positives": positive,
        "negatives": len(cases) - positive,
        "lesions": len(lesions),
        "missed": missed,
    }


# ---------------------------------------------------------------------------------------------- images


def dice_of(case: Case) -> float:
    """Mean over the classes that occur; nan of a negative."""
    return occurring([overlap.dice for overlap in case.overlaps if overlap.truth])


def iou_of(case: Case) -> float:
    """Mean over the classes that occur; nan of a negative."""
    return occurring([overlap.iou for overlap in case.overlaps if overlap.truth])


def occurring(values: Sequence[float]) -> float:
    """Their mean; nan of none."""
    return float(np.mean(values)) if values else NAN


def of_images(cases: Sequence[Case], weights: Floats) -> dict[str, Floats]:
    """Dice and IoU."""
    positive = np.array([case.positive for case in cases], bool)
    dice, iou = (column([of(case) for case in cases]) for of in (dice_of, iou_of))
    both = column([sum(overlap.both for overlap in case.overlaps) for case in cases])
    either = column([sum(overlap.truth + overlap.said for overlap in case.overlaps) for case in cases])
    return {
        "mean Dice": mean(dice[positive], weights[:, positive]),
        "mean IoU": mean(iou[positive], weights[:, positive]),
        "pooled Dice": np.where(weights @ positive > 0, ratio(2 * (weights @ both), weights @ either), NAN),
    }


def spread(cases: Sequence[Case]) -> dict[str, tuple[float, float]]:
    """Median and standard deviation (of a sample) over positives, by the name of the mean."""
    positives = [case for case in cases if case.positive]
    values = {
        "mean Dice": column([dice_of(case) for case in positives]),
        "mean IoU": column([iou_of(case) for case in positives]),
    }
    return {
        name: (float(np.median(of)) if len(of) else NAN, float(of.std(ddof=1)) if len(of) > 1 else NAN)
        for name, of in values.items()
    }


def of_negatives(cases: Sequence[Case], weights: Floats) -> dict[str, Floats]:
    """What is said where nothing is."""
    at = np.array([not case.positive for case in cases], bool)
    negatives, weights = [case for case in cases if not case.positive], weights[:, at]
    unit = "mm2" if spaced(negatives) else "px"
    areas = column([case.false_area * (case.spacing_mm or 1) ** (2 * (unit == "mm2")) for case in negatives])
    return {
        "negatives with anything said": mean(column([case.false_area > 0 for case in negatives]), weights),
        "false components per negative": mean(column([case.false_components for case in negatives]), weights),
        f"false area per negative, {unit}": mean(areas, weights),
    }


def spaced(cases: Sequence[Case]) -> bool:
    """Whether the spacing of all is known."""
    return all(case.spacing_mm is not None for case in cases)


def column(values: Sequence[float]) -> Floats:
    """(m,) numbers."""
    return np.array(values, np.float64)


# ---------------------------------------------------------------------------------------------- lesions


@dataclass(frozen=True)
class Lesions:
    """Lesions of many images.

    Attributes:
        owner: (n,) number of each one's image.
        spacing: (n,) mm per pixel; None where one is unknown.
    """

    owner: Ints
    lesions: tuple[Lesion, ...]
    spacing: Floats | None

    @classmethod
    def of(cls, cases: Sequence[Case]) -> Lesions:
        """All there are."""
        owner = np.array([i for i, case in enumerate(cases) for _ in case.lesions], np.int64)
        spacing = [cases[i].spacing_mm for i in owner.tolist()]
        known = [mm for mm in spacing if mm is not None]
        found = tuple(lesion for case in cases for lesion in case.lesions)
        return cls(owner, found, column(known) if len(known) == len(spacing) else None)

    def __len__(self) -> int:
        return len(self.lesions)

    @property
    def unit(self) -> str:
        """Of distances."""
        return "px" if self.spacing is None else "mm"

    @property
    def diameters(self) -> Floats:
        """(n,) in `unit`."""
        return column([lesion.diameter for lesion in self.lesions]) * self.scale

    @cached_property
    def scale(self) -> Floats:
        """(n,) units per pixel."""
        return np.ones(len(self)) if self.spacing is None else self.spacing

    @property
    def missed(self) -> int:
        """How many are missed."""
        return sum(lesion.missed for lesion in self.lesions)

    def within(self, low: float, high: float) -> Lesions:
        """Those of a diameter from `low` to less than `high`, in `unit`."""
        at = np.flatnonzero((low <= self.diameters) & (self.diameters < high))
        spacing = None if self.spacing is None else self.spacing[at]
        return Lesions(self.owner[at], tuple(self.lesions[i] for i in at.tolist()), spacing)

    def figures(self, weights: Floats) -> dict[str, Floats]:
        """Sensitivity, Dice and distances; weights of all images."""
        weights = weights[:, self.owner]
        found = np.array([not lesion.missed for lesion in self.lesions], bool)
        dice, hd95, agree = (
            column([getattr(lesion, name) for lesion in self.lesions]) for name in ("dice", "hd95", "surface_dice")
        )
        hits = {rule: column([getattr(lesion, f"hit_{rule}") for lesion in self.lesions]) for rule in RULES}
        return {
            **{f"lesion sensitivity, {BY[rule]}": mean(hits[rule], weights) for rule in RULES},
            "lesion Dice, missed as 0": mean(dice, weights),
            "lesion Dice, not missed": mean(dice[found], weights[:, found]),
            f"HD95 of not missed, {self.unit}": mean((hd95 * self.scale)[found], weights[:, found]),
            "surface Dice of not missed": mean(agree[found], weights[:, found]),
        }


@dataclass(frozen=True)
class Stratum:
    """Lesions of like size; `name` says their diameters."""

    name: str
    lesions: Lesions


def strata(cases: Sequence[Case]) -> list[Stratum]:
    """By diameter: parted at EDGES_MM, or into thirds of the lesions where a spacing is unknown.

    A missed lesion is in its stratum, so the strata of a figure lie around the figure of all.
    """
    every = Lesions.of(cases)
    inner = EDGES_MM if every.spacing is not None else thirds(every.diameters)
    edges = (0.0, *inner, np.inf)
    return [Stratum(f"{span(low, high)} {every.unit}", every.within(low, high)) for low, high in pairwise(edges)]


def thirds(diameters: Floats) -> tuple[float, ...]:
    """Diameters that part the lesions into thirds; fewer where many are of one size."""
    if not len(diameters):
        return ()
    return tuple(float(edge) for edge in np.unique(np.quantile(diameters, [1 / 3, 2 / 3], method="higher")))


def span(low: float, high: float) -> str:
    """Words for diameters from `low` to less than `high`."""
    if low == 0:
        return f"< {high:.3g}" if np.isfinite(high) else "all,"
    return f"{low:.3g} to {high:.3g}" if np.isfinite(high) else f">= {low:.3g}"


# ---------------------------------------------------------------------------------------------- marks


@dataclass(frozen=True)
class Froc:
    """The curve at each distinct score, the highest first."""

    thresholds: Floats  # (u,)
    rates: Floats  # (R, u) false marks per image
    sensitivity: Floats  # (R, u); nan where there is no lesion

    @classmethod
    def of(cls, cases: Sequence[Case], rule: Rule, weights: Floats) -> Froc:
        """By one rule. It holds R times as many numbers as there are marks: for many samples, `sensitivities`."""
        score, hit, owner = marks(cases, rule)
        if not len(score):
            return cls(score, np.zeros((len(weights), 0)), np.zeros((len(weights), 0)))
        curve = Curve.of(hit, score, weights[:, owner], np.arange(len(score)))
        lesions = weights @ column([len(case.lesions) for case in cases])
        rates = ratio(curve.negatives, weights.sum(1, keepdims=True))
        return cls(np.unique(score)[::-1], rates, ratio(curve.positives, lesions[:, None]))

    def at(self, rates: Sequence[float]) -> Floats:
        """(R, f) sensitivity at false marks per image."""
        start = np.zeros((len(self.rates), 1))
        steps = np.concatenate([start, self.sensitivity], axis=1)
        last = [(self.rates <= rate + ROUNDING).sum(1) for rate in rates]
        return np.take_along_axis(steps, np.stack(last, axis=1), axis=1)


def marks(cases: Sequence[Case], rule: Rule) -> tuple[Floats, Ints, Ints]:
    """Score, 1 of a lesion that is found (by its best candidate) or 0 of a false mark, and number of the image."""
    found = [
        (score, 1, i)
        for i, case in enumerate(cases)
        for score in (getattr(lesion, f"score_{rule}") for lesion in case.lesions)
        if not np.isnan(score)
    ]
    false = [
        (mark.score, 0, i)
        for i, case in enumerate(cases)
        for mark in case.candidates
        if not getattr(mark, f"lesion_{rule}")
    ]
    score, hit, owner = np.array([*found, *false], np.float64).reshape(-1, 3).T
    return score, hit.astype(np.int64), owner.astype(np.int64)


def sensitivities(cases: Sequence[Case], rule: Rule, weights: Floats, rates: Sequence[float] = RATES) -> Floats:
    """(R, f) FROC sensitivity at false marks per image, a few samples at a time; nan where there is no lesion."""
    lesions = weights @ column([len(case.lesions) for case in cases])
    step = max(1, HELD // (1 + sum(len(case.candidates) + len(case.lesions) for case in cases)))
    parts = [Froc.of(cases, rule, weights[i : i + step]).at(rates) for i in range(0, len(weights), step)]
    return np.where(lesions[:, None] > 0, np.concatenate(parts), NAN)


def of_marks(cases: Sequence[Case], weights: Floats) -> dict[str, Floats]:
    """FROC at RATES and its mean, by both rules."""
    found: dict[str, Floats] = {}
    for rule in RULES:
        at = sensitivities(cases, rule, weights)
        found |= {f"FROC at {rate:g}, {BY[rule]}": at[:, i] for i, rate in enumerate(RATES)}
        found[f"CPM, {BY[rule]}"] = at.mean(1)
    return found
