"""Tables of segmented images for result.json: images, lesions, FROC, sizes, each figure with its interval.

Every figure is one of `measures.py`, where its definition is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engine.metrics import Estimate
from ..classify.bootstrap import Draws, Table, cell, estimated
from .cases import Case
from .measures import BY, RATES, RULES, figures, of_class, spread, strata, tally

OVER_IMAGES = ("mean Dice", "mean IoU", "pooled Dice")
Counts = Mapping[str, int]


@dataclass(frozen=True)
class Group:
    """Images as they are judged, all classes together or as though there were one."""

    name: str
    cases: Sequence[Case]
    figures: Mapping[str, Estimate]
    whole: bool  # all classes together

    @property
    def counts(self) -> Counts:
        """Of images, lesions and patients."""
        return tally(self.cases)


def groups(cases: Sequence[Case], classes: Sequence[str], draws: Draws) -> list[Group]:
    """All classes together, and where there are several, each for itself."""
    each = [(name, of_class(cases, number), False) for number, name in enumerate(classes[1:], 1)]
    found = [("all", list(cases), True), *(each if len(each) > 1 else [])]
    return [Group(name, of, estimated(partial(figures, of), owners(of), draws), whole) for name, of, whole in found]


def owners(cases: Sequence[Case]) -> NDArray[np.str_]:
    """(m,) whose each image is."""
    return np.array([case.patient for case in cases], np.str_)


def tables(of: Sequence[Group], draws: Draws) -> list[Table]:
    """Those that there is something to put into."""
    found = [images(of), negatives(of)]
    if of[0].counts["lesions"]:
        found += [lesions(of), froc(of), *(sizes(group, draws) for group in of)]
    return [table for table in found if table["rows"]]


def images(of: Sequence[Group]) -> Table:
    """Dice and IoU of images with something on them."""
    rows: list[list[Any]] = []
    for group in of:
        both = spread(group.cases)
        for name in OVER_IMAGES:
            middle, sd = (number if np.isfinite(number) else None for number in both.get(name, (np.nan, np.nan)))
            rows.append([titled(name, group, of), group.counts["positives"], cell(group.figures[name]), middle, sd])
    return {
        "title": "Images with something on them",
        "columns": ["figure", "images", "value", "median", "sd"],
        "rows": rows,
        "note": "Median and sd (over images) are plain: bootstrap intervals of a median do not hold. Pooled Dice takes "
        "the pixels of all images, those with nothing on them too.",
    }


def negatives(of: Sequence[Group]) -> Table:
    """What is said where nothing is."""
    some = [group for group in of if group.counts["negatives"]]
    return {
        "title": "Images with nothing on them",
        "columns": ["figure", *headed(some, lambda counts: counted(counts["negatives"], "image"))],
        "rows": rows_where(some, lambda name: "negative" in name),
        "note": "Lower is better." + " A class counts images that may have other classes on them." * (len(of) > 1),
    }


def lesions(of: Sequence[Group]) -> Table:
    """How many were found, and how well they were drawn."""

    def told(counts: Counts) -> str:
        return f"{counted(counts['lesions'], 'lesion')}, {counts['missed']} missed"

    some = [group for group in of if group.counts["lesions"]]
    return {
        "title": "Lesions",
        "columns": ["figure", *headed(some, told)],
        "rows": rows_where(some, lambda name: "lesion" in name or "missed" in name),
        "note": "Missed: nothing said touches it. A missed lesion has no distance: HD95 and surface Dice are of the "
        "others alone, and a model that finds fewer can have better ones.",
    }


def froc(of: Sequence[Group]) -> Table:
    """Sensitivity at rates of false marks, by both rules."""
    some = [group for group in of if group.counts["lesions"]]
    columns = [(group, rule) for group in some for rule in RULES]
    return {
        "title": "FROC: lesions found at false marks per image",
        "columns": ["false marks per image", *(titled(BY[rule], group, of) for group, rule in columns)],
        "rows": [
            *(
                [f"{rate:g}", *(cell(group.figures[f"FROC at {rate:g}, {BY[rule]}"]) for group, rule in columns)]
                for rate in RATES
            ),
            ["mean (CPM)", *(cell(group.figures[f"CPM, {BY[rule]}"]) for group, rule in columns)],
        ],
        "note": "Over all images, those with nothing on them too.",
    }


def sizes(group: Group, draws: Draws) -> Table:
    """The same of lesions of like size."""
    names = [*(f"lesion sensitivity, {BY[rule]}" for rule in RULES), "lesion Dice, missed as 0"]
    rows: list[list[Any]] = []
    for stratum in strata(group.cases):
        found = estimated(stratum.lesions.figures, owners(group.cases), draws)
        held = stratum.lesions
        rows.append([stratum.name, len(held), held.missed, *(cell(found[name]) for name in names)])
    return {
        "title": "Lesions by size" + f": {group.name}" * (not group.whole),
        "columns": ["diameter", "lesions", "missed", *names],
        "rows": rows if group.counts["lesions"] else [],
        "note": "Diameter of a disc of the lesion's area. Missed lesions are in the stratum of their size.",
    }


def rows_where(of: Sequence[Group], wanted: Callable[[str], bool]) -> list[list[Any]]:
    """A row a figure whose name is wanted, a column a group."""
    names = dict.fromkeys(name for group in of for name in group.figures if wanted(name))
    return [[name, *(cell(group.figures.get(name)) for group in of)] for name in names]


# ---------------------------------------------------------------------------------------------- words


def counted(count: int, thing: str) -> str:
    """`1 lesion`, `2 lesions`."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def titled(name: str, group: Group, of: Sequence[Group]) -> str:
    """A figure's name, with the class where there are several."""
    return name if len(of) == 1 else f"{name}, {group.name}"


def headed(of: Sequence[Group], told: Callable[[Counts], str]) -> Iterator[str]:
    """A column's head for every group."""
    return (told(group.counts) if group.whole else f"{group.name}: {told(group.counts)}" for group in of)
