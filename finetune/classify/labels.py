"""From the labels of an index to a task: which images, of whom, of what class.

data.task=density       a column: each of its values a class, or as finetune.classes says
data.task=side+density  columns joined: "L a", "L b", …
data.task=mass,calc     columns of 0 and 1: a multilabel task
CALC|MASS               a value that is a set, in a column of which finetune.kind says multilabel

An image without a label is no part of the task: nobody looked.

Legend: n labelled images, k classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...data.shards import ShardDataset
from ...engine.errors import UserError, did_you_mean
from ...engine.metrics import Ints, Kind
from ..task import Task
from .targets import Target

Strings = NDArray[np.str_]
Classes = Sequence[str] | Mapping[str, Sequence[str]] | None
OTHERS = "*"  # stands for all values that no other class takes
NONE = "none"  # stratum of images without any of a multilabel task's labels
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")


@dataclass(frozen=True)
class Labelled:
    """The labelled images of a data set."""

    target: Target
    rows: Ints  # (n,) of the data set
    truth: Ints  # (n,) class, or (n, k) of 0 and 1 for multilabel
    patients: Strings  # (n,) dataset/patient
    breasts: Strings  # (n,) dataset/patient/L or R; the image's key where its side is unknown
    keys: Strings  # (n,)
    splits: Strings  # (n,)
    left_out: dict[str, int]  # labels that no class takes, and how many images have them

    @property
    def strata(self) -> Task:
        """By what folds are balanced: the class; of a multilabel task the rarest label that an image has, or none."""
        names, truth = self.target.classes, self.truth
        if self.target.kind == "multilabel":
            label = np.where(truth, truth.sum(0), len(truth) + 1).argmin(1)
            found, truth = np.unique(np.where(truth.any(1), label, len(names)), return_inverse=True)
            names = tuple((*names, NONE)[i] for i in found)
        return Task(self.target.name, names, self.rows, truth, self.patients, self.splits)


@dataclass(frozen=True)
class _Said:
    """What the index says of the images of a task."""

    rows: Ints  # (n,)
    values: list[frozenset[str]]  # (n,) labels of each image: one of them, if it is no multilabel task
    known: list[str]  # all labels there are, in their order
    unknown: dict[str, int]  # images with a label in some of the columns alone, by the column that lacks it


def read_labels(
    shards: ShardDataset,
    name: str | None,
    kind: Literal["auto"] | Kind = "auto",
    classes: Classes = None,
    separator: str = "|",
    *,
    complete: bool = True,
) -> Labelled:
    """The task that a label of the index makes.

    Args:
        shards: the data set.
        name: a label, several joined by "+", or several of 0 and 1 by ",".
        kind: of the task; auto: two classes binary, more multiclass, several columns multilabel.
        classes: None: every value is one, by number or else by alphabet; a list: those values, in this order; a
            mapping: the values of each class, "*" for all others. What none of them takes is left out; of a
            multilabel task it is the label that is left out, not the image.
        separator: between the labels of one image, in a multilabel task of one column.
        complete: refuse classes and labels that no image has; a locked model's classes may be missing elsewhere.

    Raises:
        UserError: no task or no such label, classes that do not fit it, nothing to tell apart, or an image of nobody.
    """
    if name is None:
        raise UserError("data.task is not set; name the label to predict, e.g. --data.task=density")
    several = name not in shards.tasks and "," in name
    if several:
        refuse_columns(name, kind, complete=complete)
    said = _columns(shards, name) if several else _column(shards, name, separator if kind == "multilabel" else "")
    if not len(said.rows):
        raise UserError(f"data.task={name}: no image has this label; name another task, or another data.split")
    table = table_of(name, said.known, classes, complete)
    kind = kind_of(name, kind, several, list(table))
    truth = np.array([[not x.isdisjoint(of) for of in table.values()] for x in said.values], np.int64)
    truth = truth.reshape(len(said.values), len(table))
    kept = np.flatnonzero(truth.any(1)) if kind != "multilabel" else np.arange(len(truth))
    _check(name, truth[kept], list(table), kind, complete)
    taken = {value for values in table.values() for value in values}
    others = Counter(value for x in said.values for value in sorted(x - taken))
    truth = truth[kept] if kind == "multilabel" else truth[kept].argmax(1)
    return _labelled(shards, Target(name, kind, tuple(table)), said.rows[kept], truth, dict(others) | said.unknown)


def refuse_columns(name: str, kind: Literal["auto"] | Kind, *, complete: bool = True) -> None:
    """Raises: UserError: several columns cannot be a task of this kind."""
    if kind not in ("auto", "multilabel"):
        other = f"finetune.kind={kind}" if complete else f"{kind}, as the model's"
        raise UserError(f"data.task={name}: several columns are a multilabel task, not {other}")


def _columns(shards: ShardDataset, name: str) -> _Said:
    """Several columns of 0 and 1: an image has the labels of those that are 1."""
    parts = _parts(name, ",")
    rows, cells, unknown = _cells(shards, parts)
    for part, column in zip(parts, cells.T, strict=True):
        odd = sorted(set(column.tolist()) - {"0", "1"})
        if odd:
            raise UserError(f"data.task={name}: {part} is {odd[0]!r} somewhere; several columns must be 0 or 1 each")
    return _Said(rows, [frozenset(np.array(parts)[row == "1"].tolist()) for row in cells], parts, unknown)


def _column(shards: ShardDataset, name: str, separator: str) -> _Said:
    """One column, or several joined; its values are sets where there is a separator."""
    parts = [name] if name in shards.tasks else _parts(name, "+")
    if separator and len(parts) > 1:
        raise UserError(f"data.task={name} is one joined label, and no multilabel task; write {','.join(parts)}")
    rows, cells, unknown = _cells(shards, parts)
    joined = [" ".join(row) for row in cells.tolist()]
    values = [frozenset(filter(None, value.split(separator)) if separator else [value]) for value in joined]
    return _Said(rows, values, _in_order(frozenset().union(*values)), unknown)


def _parts(name: str, sign: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in name.split(sign)))


def _cells(shards: ShardDataset, parts: Sequence[str]) -> tuple[Ints, Strings, dict[str, int]]:
    """Rows with a label in every column, (n, columns) of these, and how many images lack one of them alone."""
    cells = np.array([shards.labels(part) for part in parts]).T
    there = cells != ""
    whole, partly = there.all(1), there.any(1) & ~there.all(1)
    lacking = {f"{part} unknown": int((partly & ~there[:, i]).sum()) for i, part in enumerate(parts)}
    return np.flatnonzero(whole), cells[whole], {reason: count for reason, count in lacking.items() if count}


def _in_order(values: frozenset[str]) -> list[str]:
    """By number where all are numbers, else by alphabet."""
    if all(NUMBER.fullmatch(value) for value in values):
        return sorted(values, key=lambda value: (float(value), value))
    return sorted(values)


def table_of(name: str, known: list[str], classes: Classes, complete: bool) -> dict[str, tuple[str, ...]]:
    """The values of every class, in the classes' order.

    Raises:
        UserError: a value is given twice, or (`complete`) no image has it.
    """
    if classes is None:
        return {value: (value,) for value in known}
    table = {c: tuple(v) for c, v in classes.items()} if isinstance(classes, Mapping) else {c: (c,) for c in classes}
    values = [value for some in table.values() for value in some] if isinstance(classes, Mapping) else list(classes)
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise UserError(f"finetune.classes: {twice[0]!r} is given twice; a label belongs to one class")
    missing = [value for value in values if value not in (*known, OTHERS)]
    if missing and complete:
        hint = did_you_mean(missing[0], known)
        raise UserError(f"finetune.classes: no image of data.task={name} has the label {missing[0]!r}{hint}")
    others = tuple(value for value in known if value not in values)
    return {c: others if v == (OTHERS,) else (*v, *(others if OTHERS in v else ())) for c, v in table.items()}


def kind_of(name: str, kind: Literal["auto"] | Kind, several: bool, classes: list[str]) -> Kind:
    """The kind of the task.

    Raises:
        UserError: it has not the classes for it.
    """
    if several or kind == "multilabel":
        return "multilabel"
    if len(classes) < 2:
        raise UserError(
            f"data.task={name}: every labelled image is {', '.join(map(repr, classes))}; there is nothing to tell "
            "apart, name another task, or more of its labels with finetune.classes"
        )
    if kind == "binary" and len(classes) > 2:
        raise UserError(
            f"finetune.kind=binary, but data.task={name} has {len(classes)} classes ({', '.join(classes)}); "
            "name two with finetune.classes, the positive one last, or join labels as {class: [labels]}"
        )
    return ("binary" if len(classes) == 2 else "multiclass") if kind == "auto" else kind


def _check(name: str, truth: Ints, classes: list[str], kind: Kind, complete: bool) -> None:
    """Refuse a task without an image, and classes that no image has; of labels also those that all have."""
    if not len(truth):
        model = f"the model knows ({', '.join(classes)}); name another label with data.task"
        takes = "finetune.classes takes; name others" if complete else model
        raise UserError(f"data.task={name}: no image has a label that {takes}")
    counts = truth.sum(0).tolist() if complete else []
    for c, count in zip(classes, counts, strict=False):
        if not count or (kind == "multilabel" and count == len(truth)):
            how = "no" if not count else "every"
            raise UserError(
                f"data.task={name}: {how} labelled image is {c!r}; there is nothing to tell apart, "
                "leave it out (finetune.classes)"
            )


def _labelled(shards: ShardDataset, target: Target, rows: Ints, truth: Ints, left_out: dict[str, int]) -> Labelled:
    """The images in these rows, and whose they are."""
    chosen = shards.rows.take(rows)
    dataset, patient, side, keys = (np.array(chosen.column(c)) for c in ("dataset", "patient", "laterality", "key"))
    nobody = int((patient == "").sum())
    if nobody:
        raise UserError(
            f"data.task={target.name}: {nobody} labelled images name no patient, who could then be in training and in "
            "test; ingest the data again, or index it with --patient"
        )
    patients = np.char.add(np.char.add(dataset, "/"), patient)
    breasts = np.where(side == "", keys, np.char.add(np.char.add(patients, "/"), side))
    splits = np.array(shards.splits)[rows]
    return Labelled(target, rows, truth, patients, breasts, keys, splits, left_out)
