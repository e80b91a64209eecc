"""The same figures group by group, wherever the index says of its images what divides them.

Legend: n labelled images, m cases of a level, g groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ...data.layout import LABEL
from ...data.table import Rows
from ...engine.errors import UserError, did_you_mean
from ...engine.metrics import Floats, Ints, bootstrap_scores, decisions, headline
from .bootstrap import Cell, Draws, Table, cell, estimated
from .judged import Judged
from .units import PLURAL, Cases

USUAL = (*("dataset", "site", "vendor", "manufacturer", "machine"), *("view", "laterality", "density", "age", "race"))
AGES = ((40, "< 40"), (50, "40-49"), (60, "50-59"), (70, "60-69"))
OLDEST, UNKNOWN = ">= 70", "not stated"
MANY = 20  # groups that a table shows
IMPOSSIBLE = "cannot be computed"


def check_subgroups(rows: Rows, names: Sequence[str], key: str = "finetune.subgroups") -> None:
    """Refuse a subgroup that the data cannot tell, before anything is trained; `key` is where the user named it.

    Raises:
        UserError: neither a column nor a label of the index has the name.
    """
    known = sorted({column.removeprefix(LABEL) for column in rows.columns})
    for name in names:
        if name not in known:
            raise UserError(f"{key}: the data has no column or label {name!r}{did_you_mean(name, known)}")


def groupings(rows: Rows, labelled: Ints, names: Sequence[str], task: str) -> dict[str, NDArray[np.str_]]:
    """(n,) what each labelled image is, by every column that divides them; never by the task itself.

    Args:
        rows: of the data set.
        labelled: (n,) numbers of the labelled images among them.
        names: columns or labels to look for beside the usual ones.
        task: the label that is predicted.
    """
    found, of = {}, rows.take(labelled)
    for name in dict.fromkeys((*USUAL, *names)):
        column = next((c for c in (name, LABEL + name) if c in rows.columns), None)
        if column is None or name == task:
            continue
        values = [age_group(v) if name == "age" else v for v in of.column(column)]
        if len(set(values) - {""}) > 1:
            found[name] = np.array([value or UNKNOWN for value in values])
    return found


def age_group(age: str) -> str:
    """`47`, `047Y` and `40-49` are `40-49`; what starts with no number stays as it is."""
    years = re.match(r"\d+", age)
    if years is None:
        return age
    return next((name for below, name in AGES if int(years[0]) < below), OLDEST)


def subgroup_table(
    judged: Judged, of: Cases, decided: Ints, name: str, group: NDArray[np.str_], replicates: int, seed: int
) -> Table:
    """A row a group: how many, the leading figure, and of two classes sensitivity and specificity.

    Args:
        judged: what the cases are made of.
        of: the m cases.
        decided: (m,) or (m, k) on each.
        name: the column.
        group: (m,) of each case.
        replicates: bootstrap samples of a group's patients.
        seed: of the samples.
    """
    target = judged.labelled.target
    shown, more = in_order(group)
    rows: list[list[Cell]] = []
    for value in shown:
        here = np.flatnonzero(group == value)
        part = of.of(here)
        draws = Draws.of(part.truth, part.patients, replicates, seed)
        figures = estimated(partial(leading, judged, part, decided[here]), part.patients, draws)
        positive = [int(part.truth.sum())] if target.kind == "binary" else []
        told = [cell(figure) or IMPOSSIBLE for figure in figures.values()]
        rows.append([value, len(part), *positive, len(draws.patients), *told])
    note = (
        "Intervals: bootstrap samples of the group's own patients; none where a class has too few of them."
        + " Balanced accuracy is over the classes that a group has." * (target.kind == "multiclass")
        + f" {more} smaller groups are not shown." * bool(more)
    )
    return {
        "title": f"By {name} ({PLURAL[of.level]})",
        "columns": [
            *(name, "cases", *([f"{target.name} = {target.classes[1]}"] if target.kind == "binary" else [])),
            *("patients", headline(target.kind)),
            *(("sensitivity", "specificity") if target.kind == "binary" else ()),
        ],
        "rows": rows,
        "note": note,
    }


def leading(judged: Judged, of: Cases, decided: Ints, weights: Floats) -> dict[str, Floats]:
    """(R,) the figures that a subgroup is reported by."""
    kind, folds = judged.labelled.target.kind, of.fold if judged.grouped else None
    told = len(np.unique(of.truth)) > 1  # of one class alone balanced accuracy would be its recall
    figure = bootstrap_scores(headline(kind), of.truth, of.probabilities, weights, folds)
    found: dict[str, Floats] = {headline(kind): figure if told else np.full(len(weights), np.nan)}
    if kind == "binary":
        found["sensitivity"] = decisions.sensitivity(of.truth, decided, weights)
        found["specificity"] = decisions.specificity(of.truth, decided, weights)
    return found


def in_order(group: NDArray[np.str_]) -> tuple[list[str], int]:
    """The 20 largest groups as a reader expects them, numbers by size and unknown last; how many more there are."""
    names, counts = np.unique(group, return_counts=True)
    largest = names[np.argsort(-counts, kind="stable")][:MANY].tolist()
    return sorted(largest, key=place), len(names) - len(largest)


def place(name: str) -> tuple[bool, bool, float, str]:
    """Where a group stands."""
    number = re.match(r"\d+(\.\d+)?", name)
    youngest = -1.0 if name == AGES[0][1] else 0.0
    return name == UNKNOWN, name == OLDEST, float(number[0]) if number else youngest, name
