"""Dividing patients into splits, folds and label fractions, and what of it to tell. (File: splits.py.)"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from ..engine.errors import UserError, did_you_mean
from ..engine.seeding import stable_seed
from .layout import LABEL
from .splits import TEST, TRAIN, VAL, Patients, Split, patient_of, split_values
from .table import Row

Strata = Mapping[str, list[str]]  # class -> patients in the order in which they are taken


def make_split(
    rows: Sequence[Row],
    *,
    task: str | None = None,
    seed: int = 0,
    test: float = 0.2,
    val: float = 0.0,
    folds: int = 0,
    fractions: Sequence[float] = (),
    keep_official: bool = False,
) -> Split:
    """Divide patients, each class in the same parts. The order of rows does not matter.

    Args:
        rows: of all images, with or without a label.
        task: label to stratify by; a patient with several counts as the rarest of them. Those without a label are a
            class of their own.
        seed: another one, other patients.
        test: part of the patients, from 0 to below 1; each class with two or more gives at least one.
        val: as `test`; not together with folds, each of which can serve as `val`.
        folds: parts that `train` is dealt into, 0 for none.
        fractions: parts of `train` between 0 and 1, for label-efficiency curves; at least one patient of each class.
        keep_official: take the patients of the archive's own test split as they are instead of drawing `test`.

    Raises:
        UserError: no such task or official split, or parts that do not add up.
    """
    _check_parts(test, val, folds, fractions)
    official = _official_test(rows) if keep_official else set()
    strata = _strata(rows, task, seed, without=official)
    tested, strata = (official, strata) if keep_official else _take(strata, test)
    # Both are parts of all patients, yet val is taken from those whom test left.
    held_out, strata = _take(strata, val if keep_official else val / (1 - test))
    train = [p for members in strata.values() for p in members]
    if not train:
        raise UserError("every patient is in test (or val), none is left for training; leave out --keep-official")
    if folds > len(train):
        raise UserError(f"{len(train)} patients are left for training, too few for {folds} folds; lower --folds")
    return Split(
        data="",
        task=task,
        seed=seed,
        splits={TRAIN: _sorted(train), **({VAL: _sorted(held_out)} if val else {}), TEST: _sorted(tested)},
        # Dealt class by class, without a break in between: neither classes nor folds differ by more than one patient.
        folds=tuple(_sorted(train[k::folds]) for k in range(folds)),
        fractions={
            f"{f:g}": _sorted(p for members in strata.values() for p in _first(members, f)) for f in sorted(fractions)
        },
    )


def _check_parts(test: float, val: float, folds: int, fractions: Sequence[float]) -> None:
    if not (0 <= test < 1 and 0 <= val < 1 and test + val < 1):
        raise UserError(f"--test {test} and --val {val} must be parts of the patients that add up to less than 1")
    if val and folds:
        raise UserError(f"--val {val} and --folds {folds} both hold patients out of training; give one of them")
    if folds < 0 or folds == 1:
        raise UserError(f"--folds {folds} divides nothing; give 2 or more, or leave it out")
    for fraction in fractions:
        if not 0 < fraction < 1:
            raise UserError(f"--fractions {fraction:g} must lie between 0 and 1, such as 0.1")


def _official_test(rows: Sequence[Row]) -> set[str]:
    """Patients with any image in the archive's test split: seen in both, they may not be trained on."""
    found = {patient_of(row) for row in rows if row["split"] == TEST}
    if not found:
        known = ", ".join(sorted(map(repr, split_values(rows))))
        raise UserError(f"no image is in an official test split (the data says {known}); leave out --keep-official")
    return found


def _strata(rows: Sequence[Row], task: str | None, seed: int, without: set[str]) -> Strata:
    """Patients by class, in an order that follows from the seed and each one's name alone."""
    classes = patient_classes(rows, task)
    strata: dict[str, list[str]] = defaultdict(list)
    for patient in sorted(classes.keys() - without, key=lambda p: (stable_seed(seed, p), p)):
        # Data sets differ in much; mixed ones are divided in the same parts, too.
        strata[f"{patient.rpartition('/')[0]}/{classes[patient]}"].append(patient)
    return {c: strata[c] for c in sorted(strata)}


def patient_classes(rows: Sequence[Row], task: str | None) -> dict[str, str]:
    """Each patient's class: the rarest of the labels of their images, empty where they have none.

    The rarest, as it is the one a split runs short of; in screening it is the severest, too.

    Raises:
        UserError: no image has a label of this task, or a row names no patient.
    """
    if any(not row["patient"] for row in rows):
        raise UserError("the data has images without a patient, who cannot be kept on one side; ingest it again")
    known = sorted({column.removeprefix(LABEL) for row in rows for column in row if column.startswith(LABEL)})
    if task is not None and task not in known:
        raise UserError(f"the data has no label {task!r}{did_you_mean(task, known)}")
    labels: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        labels[patient_of(row)].add(row.get(f"{LABEL}{task}", ""))
    frequency = Counter(label for found in labels.values() for label in found)
    return {
        patient: min((x for x in found if x), key=lambda x: (frequency[x], x), default="")
        for patient, found in labels.items()
    }


def _take(strata: Strata, part: float) -> tuple[set[str], Strata]:
    """That part of each class and the rest; a class with two or more patients is on both sides."""
    first = {c: _first(members, part)[: len(members) - 1] for c, members in strata.items()}
    return {p for m in first.values() for p in m}, {c: members[len(first[c]) :] for c, members in strata.items()}


def _first(members: list[str], part: float) -> list[str]:
    """The first of a class: its part, rounded, and at least one."""
    return members[: max(1, round(part * len(members)))] if part else []


def _sorted(patients: Iterable[str]) -> Patients:
    return tuple(sorted(patients))


def describe(split: Split, rows: Sequence[Row]) -> Table:
    """Patients, images and patients of each class, by split."""
    classes = patient_classes(rows, split.task)
    images = Counter(patient_of(row) for row in rows)
    shown = sorted(set(classes.values())) if split.task else []
    title = f"by {split.task}, seed {split.seed}" if split.task else f"seed {split.seed}"
    table = Table("split", "patients", "images", *(c or "no label" for c in shown), title=title, title_justify="left")
    for name, patients in split.groups():
        counts = Counter(classes[p] for p in patients)
        numbers = (len(patients), sum(images[p] for p in patients), *(counts[c] for c in shown))
        table.add_row(name, *map(str, numbers))
    return table


def shortages(split: Split, rows: Sequence[Row]) -> list[str]:
    """One sentence for each class that has too few patients to be everywhere."""
    if split.task is None:
        return []
    classes = patient_classes(rows, split.task)
    totals = Counter(c for c in classes.values() if c)
    groups = {name: {classes[p] for p in patients} for name, patients in split.groups() if patients}
    lacking = {c: [name for name, found in groups.items() if c not in found] for c in sorted(totals)}
    return [
        f"class {c} of {split.task} has {_plural(totals[c])}: none in {', '.join(names)}"
        for c, names in lacking.items()
        if names
    ]


def _plural(count: int) -> str:
    return "1 patient" if count == 1 else f"{count} patients"
