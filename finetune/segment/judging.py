"""What segmented images are worth: the content of result.json, with the definitions in words.

Mean Dice over the images with something on them leads. All intervals are from the same bootstrap samples of patients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..classify.bootstrap import Draws, cell
from ..classify.judging import FEW_PATIENTS, NOTHING
from .cases import Case, Rules
from .measures import BY, RULES, Lesions
from .tables import Group, counted, groups, owners, tables

METRIC = "mean Dice"
NAMED = 4  # classes that a task's name lists


def figures_of(
    cases: Sequence[Case], classes: Sequence[str], rules: Rules, replicates: int, seed: int
) -> dict[str, Any]:
    """What result.json says of judged images, ready for JSON: None where a figure or an interval cannot be computed.

    Args:
        cases: the judged images, at least one.
        classes: names, background first.
        rules: what the images were scored by.
        replicates: bootstrap samples of patients.
        seed: of them.
    """
    draws = draws_of(cases, replicates, seed)
    found = groups(cases, classes, draws)
    whole, counts = found[0], found[0].counts
    return {
        "task": ", ".join(classes[1:]) if len(classes) <= NAMED + 1 else f"{len(classes) - 1} classes",
        "level": "image",
        "metric": METRIC,
        **(cell(whole.figures[METRIC]) or NOTHING),
        "n_images": counts["images"],
        "n_patients": counts["patients"],
        "classes": on_images(cases, classes),
        "rows": [*rows(found)],
        "tables": tables(found, draws),
        "notes": [*notes(cases, classes, rules), what_intervals_hold(draws, replicates)],
    }


def draws_of(cases: Sequence[Case], replicates: int, seed: int) -> Draws:
    """Bootstrap samples of patients, with an image that has something on it in each, and one that has not."""
    positive = np.array([case.positive for case in cases], np.int64)
    return Draws.of(positive, owners(cases), replicates, seed)


def on_images(cases: Sequence[Case], classes: Sequence[str]) -> dict[str, int]:
    """Images that each class is on, and those with nothing on them."""
    each = {name: sum(case.overlaps[i].truth > 0 for case in cases) for i, name in enumerate(classes[1:])}
    return {"nothing on them": sum(not case.positive for case in cases)} | each


def rows(of: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """The figures to be seen at once, each with what it is over."""
    whole, counts = of[0], of[0].counts
    positives = f"{counted(counts['positives'], 'image')} with something on them"
    yield row(METRIC, whole, METRIC, positives)
    for group in of[1:]:
        yield row(f"{METRIC}, {group.name}", group, METRIC, counted(group.counts["positives"], "image"))
    yield row("pooled Dice", whole, "pooled Dice", counted(counts["images"], "image"))
    if counts["lesions"]:
        every = f"{counted(counts['lesions'], 'lesion')}, {counts['missed']} missed"
        for name in (*(f"lesion sensitivity, {BY[rule]}" for rule in RULES), "lesion Dice, missed as 0"):
            yield row(name, whole, name, every)
        for rule in RULES:
            yield row(f"CPM, {BY[rule]}", whole, f"CPM, {BY[rule]}", "mean FROC sensitivity, 1/8 to 8 false marks")
    if counts["negatives"]:
        name = "negatives with anything said"
        yield row(name, whole, name, f"{counted(counts['negatives'], 'image')} with nothing on them; lower is better")


def row(name: str, group: Group, figure: str, detail: str) -> dict[str, Any]:
    """One of them."""
    return {"name": name, **(cell(group.figures[figure]) or NOTHING), "detail": detail}


# ---------------------------------------------------------------------------------------------- notes


def notes(cases: Sequence[Case], classes: Sequence[str], rules: Rules) -> Iterator[str]:
    """The definitions, a sentence or two each."""
    yield (
        "Whole stored images are judged, with nobody pointing out where to look. Figures of cut-out regions are not "
        "comparable; where ingest stored regions, these are such figures."
    )
    each = ", of an image the mean over the classes on it" * (len(classes) > 2)
    yield (
        f"Mean Dice and IoU: over images with something on them{each}; found nothing counts as 0. Pooled Dice: the "
        "pixels of all images added up first. What is said on images with nothing on them has figures of its own."
    )
    lesions = Lesions.of(cases)
    if len(lesions):
        yield from about_lesions(cases, rules)
        yield from about_froc(cases, rules)
    yield from about_units(cases, lesions)


def about_lesions(cases: Sequence[Case], rules: Rules) -> Iterator[str]:
    """When a lesion is found, and how its outline is judged."""
    yield (
        f"A lesion is found by the IoU rule where a connected part of what was said has an intersection over union "
        f"with it of at least {rules.iou:g}, by the point rule where such a part has its most probable pixel in it. It "
        "is missed where nothing said touches it."
    )
    near = {False: f"{rules.tolerance_mm:g} mm", True: f"{rules.tolerance_px:g} pixels"}
    within = [near[unknown] for unknown in sorted({case.spacing_mm is None for case in cases if case.lesions})]
    yield (
        "HD95: 95th percentile of the distances between the outlines. Surface Dice: share of both outlines within "
        f"{', or where the spacing is unknown '.join(within)} of the other."
    )


def about_froc(cases: Sequence[Case], rules: Rules) -> Iterator[str]:
    """What a mark is."""
    yield (
        f"FROC: a mark is a connected part of probability {rules.floor:g} or more, or of half the threshold where that "
        f"is less, one of the {rules.most} most probable of its image; its score is the peak, by the IoU rule its "
        "region is what is at least half as probable as the peak. False marks are counted over all images. CPM: the "
        "mean of the sensitivities at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false marks per image."
    )
    if len({case.fold for case in cases}) > 1:
        yield "FROC ranks the marks of all folds together, though models of different folds are not on one scale."


def about_units(cases: Sequence[Case], lesions: Lesions) -> Iterator[str]:
    """Where millimetres are not to be had."""
    unknown = sum(case.spacing_mm is None for case in cases)
    if unknown:
        parted = ", and sizes are thirds of the lesions" * (len(lesions) > 0 and lesions.unit == "px")
        yield (
            f"The spacing of {unknown} of {counted(len(cases), 'image')} is unknown: figures that they could count in "
            f"are in pixels of the stored images{parted}."
        )


def what_intervals_hold(draws: Draws, replicates: int) -> str:
    """What the intervals are of, and what is not in them."""
    if len(draws.patients) < 2:
        return "There are no intervals: all images are of one patient."
    few = f" With {len(draws.patients)} patients they are too short to be taken at their word."
    return (
        f"Intervals: 95 %, {replicates} bootstrap samples of patients. They hold the trained models and thresholds "
        "fixed: the spread over folds, seeds and training sets is not in them."
        + few
        * (len(draws.patients) < FEW_PATIENTS)
    )
