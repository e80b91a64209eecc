"""Any folder of grayscale images, with a table of what is known of them.

    SRC/**/*.png|pgm|tif|jpg|bmp
    LABELS.csv      file, and any of: patient, exam, laterality, view, split, spacing_mm; every other column is a label

`file` is the path below SRC, or its name where that is unique, with or without suffix. Without a table, or without its
`patient` column, nobody knows which images belong together: each counts as a patient, which leaks between splits if
that is wrong.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ...engine.errors import UserError
from ..image import SUFFIXES, read_film, stamp
from ..ingest import Archive
from ..record import Label, Record

KNOWN = ("file", "patient", "exam", "laterality", "view", "split", "spacing_mm")
IDENTIFYING = re.compile(r"patient|name|birth|dob|mrn|accession|address|phone|(^|_)uid", re.IGNORECASE)
Row = dict[str, str]


def read(src: Path, labels: Path | None = None) -> Archive:
    """Every image below the folder that the table names, or all of them where there is no table.

    Raises:
        UserError: no image in the folder, or a table that cannot be read or names none or unknown files.
    """
    images = sorted(p for p in src.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not images:
        raise UserError(f"{src} holds no image ({', '.join(sorted(SUFFIXES))}); name a folder that does")
    table = match_rows(src, images, read_table(labels)) if labels else {path: {} for path in images}
    records = [record(src, path, row) for path, row in table.items()]
    return Archive(dataset="folder", licence="unknown", records=records, notes=tuple(notes(images, table)))


def notes(images: list[Path], table: dict[Path, Row]) -> Iterator[str]:
    """What may be other than the user thinks."""
    if len(images) > len(table):
        yield f"{len(images) - len(table)} images are not in the label file and were left out"
    lonely = sum(not row.get("patient") for row in table.values())
    if lonely:
        yield f"{lonely} images have no patient: each counts as one of its own, which leaks if that is wrong"


def read_table(path: Path) -> list[Row]:
    """The rows of the label file, stripped.

    Raises:
        UserError: it is missing, not text, or has no `file` column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            rows = [{_column(k): (v or "").strip() for k, v in row.items() if k} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the label file {path} cannot be read ({error})") from error
    if not rows or "file" not in rows[0]:
        raise UserError(f"the label file {path} needs a header with the column `file`, and rows below it")
    telling = sorted(column for column in rows[0] if IDENTIFYING.search(column) and column not in KNOWN)
    if telling:
        raise UserError(
            f"the label file {path} has columns that may name a patient ({', '.join(telling)}), and labels are stored "
            "in the clear: call the patient's id `patient` (it is hashed) and drop the others"
        )
    return rows


def _column(name: str) -> str:
    """A header as written, but for the known ones, whose case does not matter."""
    name = name.strip()
    return name.lower() if name.lower() in KNOWN else name


def match_rows(src: Path, images: list[Path], rows: list[Row]) -> dict[Path, Row]:
    """The row of each image it names.

    Raises:
        UserError: a row names no image, or several, or one that another row named.
    """
    names = Counter(name for path in images for name in _names(src, path))
    by_name = {name: path for path in images for name in _names(src, path) if names[name] == 1}
    by_name |= {path.relative_to(src).as_posix(): path for path in images}
    table: dict[Path, Row] = {}
    for row in rows:
        path = by_name.get(row["file"])
        if path is None:
            fault = "several images" if names[row["file"]] > 1 else "no image"
            raise UserError(
                f"the label file names {row['file']!r}, and {fault} in {src} is called so; correct the `file` column"
            )
        if path in table:
            raise UserError(f"the label file names {row['file']!r} twice; keep one row an image")
        table[path] = row
    return table


def _names(src: Path, path: Path) -> set[str]:
    return {path.relative_to(src).with_suffix("").as_posix(), path.name, path.stem}


def record(src: Path, path: Path, row: Row) -> Record:
    """An image's record.

    Raises:
        UserError: spacing_mm is no number.
    """
    name = path.relative_to(src).as_posix()
    spacing = _spacing(row.get("spacing_mm", ""), name)
    return Record(
        read=partial(read_film, path, spacing),
        spacing_mm=spacing,
        stamp=stamp(path),
        name=name,
        image_id=name,
        patient_id=row.get("patient") or f"file:{name}",
        exam_id=row.get("exam", ""),
        laterality=row.get("laterality", "").upper()[:1],
        view=row.get("view", "").upper(),
        split=row.get("split", ""),
        labels=_labels(row),
    )


def _labels(row: Row) -> dict[str, Label]:
    return {column: value for column, value in row.items() if column not in KNOWN and value}


def _spacing(text: str, name: str) -> float | None:
    if not text:
        return None
    try:
        spacing = float(text)
    except ValueError:
        spacing = 0.0
    if not (math.isfinite(spacing) and spacing > 0):
        raise UserError(f"the label file gives {name} the spacing_mm {text!r}; it must be a length in millimetres")
    return spacing
