"""Splits that keep a patient whole, written down so that every stage uses the same one.

SPLIT.json      miram.split/1; a patient is "data set/hashed patient", as in index.csv
    data        digest of the data it divides
    task, seed  what it was stratified by (null: nothing), and the seed that drew it
    splits      {"train": [patient, …], "val": […], "test": […]}; "val" where it was asked for
    folds       [[patient, …], …]: the patients of "train" dealt into k parts; [] without folds
    fractions   {"0.1": [patient, …], …}: parts of "train", each inside every larger one
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ..engine.errors import UserError, did_you_mean
from ..engine.files import read_json, write_json
from .table import Row

SPLIT = "miram.split/1"
TRAIN, VAL, TEST = "train", "val", "test"

Patients = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Patients of each split, fold and label fraction."""

    data: str
    task: str | None
    seed: int
    splits: dict[str, Patients]
    folds: tuple[Patients, ...]
    fractions: dict[str, Patients]

    def names(self) -> list[str]:
        """What `select` knows."""
        held_out = {VAL} if self.folds or VAL in self.splits else set()
        ordered = [name for name in (TRAIN, VAL, TEST) if name in {TRAIN, TEST} | held_out]
        return ordered + [f"{TRAIN}-{fraction}" for fraction in self.fractions]

    def patients(self, name: str, fold: int | None = None) -> set[str]:
        """Who is in a split: `train`, `val`, `test`, or `train-0.1` for a label fraction.

        With a fold, `val` is that fold and `train` (or its fraction) is what lies outside of it.

        Raises:
            UserError: there is no such split or fold.
        """
        if name not in self.names():
            raise UserError(f"the split file has no split {name!r}{did_you_mean(name, self.names())}")
        self._check_fold(fold)
        if name == VAL and fold is None and VAL not in self.splits:
            raise UserError("the split file has no val patients of its own; set data.fold to validate on a fold")
        if name == VAL and fold is not None:
            return set(self.folds[fold])
        chosen = self.splits[name] if name in self.splits else self.fractions[name.removeprefix(f"{TRAIN}-")]
        return set(chosen) - set(() if fold is None else self.folds[fold])

    def _check_fold(self, fold: int | None) -> None:
        if fold is not None and not 0 <= fold < len(self.folds):
            raise UserError(f"the split file has {len(self.folds)} folds, numbered from 0; data.fold cannot be {fold}")

    def select(self, rows: Sequence[Row], name: str | None, fold: int | None = None) -> list[int]:
        """Numbers of the rows in a split, in their order; None selects all.

        Raises:
            UserError: there is no such split or fold, or none of the rows is in it.
        """
        if name is None:
            return list(range(len(rows)))
        wanted = self.patients(name, fold)
        chosen = [i for i, row in enumerate(rows) if patient_of(row) in wanted]
        if not chosen:
            raise UserError(f"no image is in split {name!r} of the split file; make another with `miram data split`")
        return chosen

    def sides(self, rows: Sequence[Row], fold: int | None = None) -> list[str]:
        """The split of each row, "" for none: `train`, `val` or `test`, the fold counting as `val`."""
        self._check_fold(fold)
        side = {patient: name for name, patients in self.splits.items() for patient in patients}
        side |= dict.fromkeys(() if fold is None else self.folds[fold], VAL)
        return [side.get(patient_of(row), "") for row in rows]

    def groups(self) -> list[tuple[str, Patients]]:
        """Every list of patients in the file with its name."""
        folds = [(f"fold {k}", patients) for k, patients in enumerate(self.folds)]
        return [*self.splits.items(), *folds, *((f"{TRAIN}-{name}", p) for name, p in self.fractions.items())]

    def write(self, path: Path, digest: str) -> None:
        """Write it for the data that has this digest."""
        write_json(path, SPLIT, asdict(self) | {"data": digest})


def patient_of(row: Row) -> str:
    """Who an image is of. Hashes are drawn for each data set, so that only both together name a patient."""
    return f"{row['dataset']}/{row['patient']}"


# ---------------------------------------------------------------------------------------------- reading


def read_split(path: Path) -> Split:
    """Read a split file.

    Raises:
        UserError: it is no split file, or it was edited so that a patient is on two sides.
    """
    try:
        split = TypeAdapter(Split).validate_python(read_json(path, SPLIT))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}; make it again with `miram data split`") from error
    for fault in _faults(split):
        raise UserError(f"{path}: {fault}; make it again with `miram data split`")
    return split


def _faults(split: Split) -> Iterable[str]:
    """What no split that we made has."""
    if not {TRAIN, TEST} <= split.splits.keys() <= {TRAIN, VAL, TEST}:
        yield f"its splits are {', '.join(split.splits)}, not train, test and perhaps val"
        return
    yield from _twice("splits", list(split.splits.values()))
    yield from _twice("folds", list(split.folds))
    train = set(split.splits[TRAIN])
    if split.folds and set().union(*split.folds) != train:
        yield "its folds together are not the patients of train"
    parts = sorted(split.fractions.items(), key=lambda item: len(item[1]))
    for (name, part), larger in zip(parts, [*(set(p) for _, p in parts[1:]), train], strict=False):
        yield from _twice(f"train-{name}", [part])
        if not set(part) <= larger:
            yield f"patients of train-{name} are not in the next larger part of train"


def _twice(where: str, groups: Sequence[Patients]) -> Iterable[str]:
    counts = Counter(patient for group in groups for patient in group)
    if again := [patient for patient, count in counts.items() if count > 1]:
        yield f"{_some(again)} listed more than once in {where}"


def _some(patients: Iterable[str]) -> str:
    """`4 patients (a, b, c, …) are`."""
    found = sorted(patients)
    names = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
    return f"1 patient ({names}) is" if len(found) == 1 else f"{len(found)} patients ({names}) are"


def check(split: Split, digest: str, rows: Sequence[Row], where: str = "the split file") -> None:
    """Refuse a split that is not of this data: `digest` and all its rows.

    Raises:
        UserError: it was made for other data, or its patients are not the data's.
    """
    remedy = "make it again with `miram data split`"
    if split.data != digest:
        raise UserError(f"{where} was made for other data (digest {split.data[:12]}, not {digest[:12]}); {remedy}")
    listed = {patient for group in split.splits.values() for patient in group}
    present = {patient_of(row) for row in rows}
    if listed - present:
        raise UserError(f"{where}: {_some(listed - present)} not in the data; {remedy}")
    if present - listed:
        raise UserError(f"{where}: {_some(present - listed)} in the data, but in none of its splits; {remedy}")


# ---------------------------------------------------------------------------------------------- official splits


def split_values(rows: Sequence[Row]) -> dict[str, int]:
    """The archive's own splits and how many images each has; "" for none."""
    return dict(sorted(Counter(row["split"] for row in rows).items()))


def refuse_shared_patients(rows: Sequence[Row], where: str) -> None:
    """Refuse official splits that share a patient.

    Raises:
        UserError: a patient has images in two or more of them.
    """
    sides: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["split"]:
            sides[patient_of(row)].add(row["split"])
    if shared := {patient: found for patient, found in sides.items() if len(found) > 1}:
        names = " and ".join(sorted(set().union(*shared.values())))
        raise UserError(
            f"{where}: {_some(shared)} in more than one official split ({names}); divide them with "
            "`miram data split`, or ingest again (cbis-ddsm: with --disjoint)"
        )


def select_official(rows: Sequence[Row], name: str | None, where: str) -> list[int]:
    """Numbers of the rows in one of the archive's own splits; None selects all.

    A data set without any split belongs to whatever is asked for. In one that has splits, an image without one could
    be on either side, so it is on none.

    Raises:
        UserError: no data set that has splits has this one.
    """
    if name is None:
        return list(range(len(rows)))
    divided = {row["dataset"] for row in rows if row["split"]}
    known = sorted(value for value in split_values(rows) if value)
    if divided and name not in known:
        raise UserError(f"{where} has no split {name!r}{did_you_mean(name, known)} (data.split=null takes all)")
    return [i for i, row in enumerate(rows) if row["split"] == name or row["dataset"] not in divided]
