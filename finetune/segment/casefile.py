"""Judged images as tables, for people, comparisons and other programs.

    FOLDER/cases.csv         key, patient, fold, spacing_mm, height, width,
                             then of each class truth:CLASS, said:CLASS, both:CLASS, false_components:CLASS,
                             false_area:CLASS; one row an image
    FOLDER/lesions.csv       key, class, number, area, diameter, hit_iou, hit_point, dice, hd95, surface_dice,
                             score_iou, score_point; one row a lesion
    FOLDER/candidates.csv    key, class, score, area, lesion_iou, lesion_point; one row a candidate

Areas and distances are in stored pixels; a hit is 1 or 0; empty is what does not exist: an unknown spacing, the
distance of a missed lesion, the score of one that no candidate hits. Numbers are in full: what is read is what was
written. What the columns mean is in `cases.py`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from math import isinf, isnan
from pathlib import Path
from typing import Any, TypeVar

from ...engine.errors import UserError
from ...engine.files import make_folder, write_atomic
from .cases import NAN, Candidate, Case, Lesion, Overlap

WHO = ("key", "patient", "fold", "spacing_mm", "height", "width")
OVERLAP, LESION, CANDIDATE = (tuple(field.name for field in fields(of)) for of in (Overlap, Lesion, Candidate))
Row = Mapping[str, str]
Of = TypeVar("Of", Lesion, Candidate)


def write_cases(folder: Path, cases: Sequence[Case], classes: Sequence[str]) -> None:
    """Write the three tables.

    Args:
        folder: made where it is not there.
        cases: each key once.
        classes: names, background first.
    """
    assert len({case.key for case in cases}) == len(cases), "an image twice"
    make_folder(folder)
    lesions = [[case.key, *numbered(lesion, LESION, classes)] for case in cases for lesion in case.lesions]
    candidates = [[case.key, *numbered(mark, CANDIDATE, classes)] for case in cases for mark in case.candidates]
    write_table(folder / "lesions.csv", header(LESION), lesions)
    write_table(folder / "candidates.csv", header(CANDIDATE), candidates)
    columns = [*WHO, *(f"{name}:{cls}" for cls in classes[1:] for name in OVERLAP)]
    write_table(folder / "cases.csv", columns, map(row_of, cases))


def row_of(case: Case) -> list[str]:
    """A row of cases.csv."""
    pixels = [getattr(overlap, name) for overlap in case.overlaps for name in OVERLAP]
    return [text(value) for value in (*(getattr(case, name) for name in WHO), *pixels)]


def header(names: Sequence[str]) -> list[str]:
    """Columns of what is in a class of an image."""
    return ["key", "class", *names[1:]]


def numbered(of: Lesion | Candidate, names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Its fields as text, the class by its name."""
    return [classes[of.cls], *(text(getattr(of, name)) for name in names[1:])]


def text(value: str | float | None) -> str:
    """As the tables have it."""
    if value is None or (isinstance(value, float) and isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A CSV file."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(columns)
    table.writerows(rows)
    write_atomic(path, buffer.getvalue())


# ---------------------------------------------------------------------------------------------- reading


def read_cases(folder: Path) -> list[Case]:
    """What `write_cases` wrote.

    Raises:
        UserError: a file is missing, or is none of ours.
    """
    columns, rows = read_table(folder / "cases.csv")
    classes = tuple(name.removeprefix("truth:") for name in columns if name.startswith("truth:"))
    fitting(folder / "cases.csv", columns, [*WHO, *(f"{name}:{cls}" for cls in classes for name in OVERLAP)])
    keys = [row["key"] for row in rows]
    if len(set(keys)) < len(keys):
        raise damaged(folder / "cases.csv", "an image is there twice")
    lesions = read_within(folder / "lesions.csv", Lesion, LESION, keys, classes)
    candidates = read_within(folder / "candidates.csv", Candidate, CANDIDATE, keys, classes)
    return [
        parsed(folder / "cases.csv", case_of, row, classes, tuple(lesions[key]), tuple(candidates[key]))
        for key, row in zip(keys, rows, strict=True)
    ]


def case_of(row: Row, classes: Sequence[str], lesions: tuple[Lesion, ...], candidates: tuple[Candidate, ...]) -> Case:
    """A row of cases.csv with what the other tables say of it."""
    overlaps = tuple(Overlap(*(whole(row[f"{name}:{cls}"]) for name in OVERLAP)) for cls in classes)
    spacing = None if row["spacing_mm"] == "" else real(row["spacing_mm"])
    return Case(
        row["key"],
        row["patient"],
        int(row["fold"]),
        spacing,
        whole(row["height"]),
        whole(row["width"]),
        overlaps,
        sum(overlap.false_components for overlap in overlaps),
        sum(overlap.false_area for overlap in overlaps),
        lesions,
        candidates,
    )


def read_within(
    path: Path, of: type[Of], names: Sequence[str], keys: Sequence[str], classes: Sequence[str]
) -> dict[str, list[Of]]:
    """By key, what a table has in the images."""
    columns, rows = read_table(path)
    fitting(path, columns, header(names))
    found: dict[str, list[Of]] = {key: [] for key in keys}
    for row in rows:
        if row["key"] not in found or row["class"] not in classes:
            raise damaged(path, f"{row['key']!r} or {row['class']!r} is not in cases.csv")
        found[row["key"]].append(parsed(path, one_of, row, of, classes))
    return found


def one_of(row: Row, of: type[Of], classes: Sequence[str]) -> Of:
    """A lesion or a candidate."""
    kinds: dict[str, Callable[[str], Any]] = {"int": whole, "float": real, "bool": flag}
    values = [kinds[str(field.type)](row[field.name]) for field in fields(of)[1:]]
    return of(1 + classes.index(row["class"]), *values)


def whole(written: str) -> int:
    """A count."""
    if not written.isascii() or not written.isdigit():
        raise ValueError(f"{written!r} is no count")
    return int(written)


def real(written: str) -> float:
    """A number; nan of nothing."""
    value = float(written) if written else NAN
    if isinf(value) or (written and isnan(value)):
        raise ValueError(f"{written!r} is no number")
    return value


def flag(written: str) -> bool:
    """Yes or no."""
    if written not in ("0", "1"):
        raise ValueError(f"{written!r} is neither 0 nor 1")
    return written == "1"


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """Columns and rows of a CSV file."""
    try:
        columns, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True)
        return columns, [dict(zip(columns, row, strict=True)) for row in rows]
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; `miram segment` writes it when it has judged") from error
    except (csv.Error, ValueError) as error:
        raise damaged(path, str(error)) from error


def fitting(path: Path, columns: list[str], expected: list[str]) -> None:
    """Refuse other columns."""
    if columns != expected:
        raise damaged(path, f"its columns are not {', '.join(expected)}")


def parsed(path: Path, parse: Callable[..., Any], *of: Any) -> Any:
    """What a row says."""
    try:
        return parse(*of)
    except ValueError as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, why: str) -> UserError:
    """The sentence for a file that is none of ours."""
    return UserError(f"{path} is damaged or of another version ({why}); run what wrote it again")
