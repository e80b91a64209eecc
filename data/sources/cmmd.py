"""CMMD, the Chinese Mammography Database (Cui et al. 2021, TCIA, CC BY 4.0): 5,202 images of 1,775 patients.

    SRC/CMMD/D1-0001/<date-study>/<series>/1-1.dcm     side and view stand in the header alone
    SRC/CMMD_clinicaldata_revision.csv                 or where --labels says; the .xlsx is not read: save it as CSV

    ID1,LeftRight,Age,number,abnormality,classification,subtype
    D1-0001,R,44,2,calcification,Benign,

A row tells of one breast, the one that was biopsied; 97 patients have two rows. Of the other breast nothing is known:
its images have no pathology here, which is not the same as benign. Ages become decades (`40-49`, from 80 on `80+`).
There is no official split. Written from the published description and table; no original image was seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...engine.errors import UserError
from ..archive import Archive, SourceOptions
from ..dicom.reader import Header, read_header
from ..image import UnreadableImage, stamp
from ..reading import is_image, read_file, walk_files
from ..record import Label, Record
from .tables import Row, decade, each_row, given, known

LICENCE = "CC BY 4.0"
NAME = "CMMD_clinicaldata_revision.csv"
TABLE = re.compile(r"CMMD_clinicaldata.*\.csv", re.IGNORECASE)
PATIENT = re.compile(r"D[12]-\d{4}")
COLUMNS = ("ID1", "LeftRight", "Age", "abnormality", "classification", "subtype")
Labels = dict[str, Label]


@dataclass(frozen=True)
class Table:
    """What is known of a breast by (patient, side), and of a patient."""

    breasts: Mapping[tuple[str, str], Labels]
    ages: Mapping[str, Labels]
    conflicts: int  # breasts with rows that contradict each other


def read(src: Path, options: SourceOptions) -> Archive:
    """The images that are there; those of the breast that the table tells of are labelled.

    Raises:
        UserError: the table or all images are missing, or the table lacks columns.
    """
    options.only("cmmd", "labels", "dicom")
    table = read_table(find_table(src, options.labels))
    paths = [path for path in walk_files(src) if patient_in(path, src) and is_image(path)]
    if not paths:
        raise UserError(f"{src} holds no image in folders such as CMMD/D1-0001; name the folder above them")
    headers = [header_of(path) for path in paths]
    every = [record(src, path, header, table, options) for path, header in zip(paths, headers, strict=True)]
    records = list({one.image_id: one for one in reversed(every)}.values())[::-1]
    there = {one.patient_id for one in records}
    absent = tuple(patient for patient in table.ages if patient not in there)
    told = tuple(notes(records, len(absent), len(every) - len(records), headers.count(None), table))
    return Archive(dataset="cmmd", licence=LICENCE, records=records, notes=told, absent=absent)


# ---------------------------------------------------------------------------------------------- table


def find_table(src: Path, labels: Path | None) -> Path:
    """The table that `labels` is or holds, or else the archive.

    Raises:
        UserError: there is none.
    """
    if labels is not None and labels.is_file():
        return labels
    folder = src if labels is None else labels
    found = [path for path in walk_files(folder) if TABLE.fullmatch(path.name)] if folder.is_dir() else []
    if not found:
        raise UserError(
            f"{folder} holds no {NAME}; put it there or name it with --labels (save the .xlsx of the archive as CSV)"
        )
    return found[0]


def read_table(path: Path) -> Table:
    """The table's labels. Where rows of one breast contradict each other, what they disagree on is dropped.

    Raises:
        UserError: it cannot be read, lacks columns, or says another side than L or R.
    """
    breasts: dict[tuple[str, str], Labels] = {}
    ages: dict[str, Labels] = {}
    conflicts = set()
    for row in each_row(path, COLUMNS):
        breast, told = (row["ID1"], row["LeftRight"].upper()[:1]), breast_labels(row)
        if breast[1] not in ("L", "R"):
            raise UserError(
                f"the table {path} gives {row['ID1'][:40]!r} the side {row['LeftRight'][:40]!r}; use L or R"
            )
        if breasts.setdefault(breast, told) != told:
            conflicts.add(breast)
            breasts[breast] = {task: label for task, label in breasts[breast].items() if told.get(task) == label}
        ages[row["ID1"]] = dict(given(age=decade(row["Age"])))
    if not breasts:
        raise UserError(f"the table {path} has no rows; get an undamaged copy")
    return Table(breasts, ages, len(conflicts))


def breast_labels(row: Row) -> Labels:
    """Pathology (Benign, Malignant), abnormality (mass, calcification, both) and, of 749 cancers, the subtype."""
    return dict(
        given(
            pathology=known(row["classification"]), abnormality=known(row["abnormality"]), subtype=known(row["subtype"])
        )
    )


# ---------------------------------------------------------------------------------------------- images


def patient_in(path: Path, src: Path) -> str:
    """The patient whose folder a file lies in, or nothing. The folder may be `src` itself."""
    parts = (src.resolve().name, *path.relative_to(src).parent.parts)
    return next((part for part in reversed(parts) if PATIENT.fullmatch(part)), "")


def header_of(path: Path) -> Header | None:
    """The file's header, or None where there is none of an image: ingest then says why it cannot use the file."""
    try:
        header = read_header(path)
    except UnreadableImage:
        return None
    return header if header.rows else None


def record(src: Path, path: Path, header: Header | None, table: Table, options: SourceOptions) -> Record:
    """An image's record."""
    patient = patient_in(path, src)
    side = header.laterality if header else ""
    return Record(
        read=partial(read_file, path, options.dicom),
        name=path.relative_to(src).as_posix(),
        image_id=(header.sop_uid if header else "") or path.relative_to(src).as_posix(),
        patient_id=patient,
        exam_id=header.study_uid if header else "",
        laterality=side,
        view=header.view if header else "",
        stamp=stamp(path),
        labels={**table.breasts.get((patient, side), {}), **table.ages.get(patient, {})},
    )


def notes(records: Sequence[Record], absent: int, copies: int, unread: int, table: Table) -> Iterator[str]:
    """What is missing, and what is not known of what is there."""
    if absent:
        yield f"{absent} of the table's {len(table.ages)} patients have no image on disk"
    if copies:
        yield f"{copies} files are copies of another one and were left out"
    if unread:
        yield f"{unread} files have no header that can be read, so their side and view are unknown"
    if sideless := sum(not one.laterality for one in records) - unread:
        yield f"{sideless} headers name no side, so these images have no pathology"
    if strangers := sum(one.patient_id not in table.ages for one in records):
        yield f"{strangers} images are of patients whom the table does not name"
    if table.conflicts:
        yield f"{table.conflicts} breasts have rows that contradict each other; what they disagree on was dropped"
    if untold := sum("pathology" not in one.labels for one in records):
        yield f"{untold} of {len(records)} images have no pathology: the table tells of the biopsied breast alone"
