"""EMBED Open Data (Jeong et al. 2023): 2D and synthetic mammograms of 22,382 patients, findings and pathology.

    SRC/tables/EMBED_OpenData_clinical.csv      one row a finding
    SRC/tables/EMBED_OpenData_metadata.csv      one row a file
    SRC/images/cohort_<1|2>/<patient>/<study>/<SOP instance UID>.dcm     or .png; also without images/

A finding belongs to the images of its exam and its side; one of side B or of no side to both breasts. (Joined by exam
alone, as is often done, findings mark the other breast.) A pathology result counts for the side of its biopsy. Only
2D images count, without spot compression and magnification. A breast without a row of its own is unlabelled, not
negative; density is the exam's.

Boxes: DCM_ROI_coords where the table has it. The ROI_coords of the open table fit the archive's PNGs, which were
mirrored where needed to have the chest wall on the left (its issue 9, and columns of later tables): they are mirrored
back on a film whose brighter half is the right one. Written from the published description; no original file was seen.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...engine.errors import UserError
from ..archive import Archive, SourceOptions
from ..dicom.reader import DicomOptions
from ..image import stamp
from ..record import Box, Film, Record
from .tables import (
    ABSENT,
    Row,
    each_row,
    find_image,
    find_table,
    given,
    known,
    left_out,
    numbered_density,
    read_with_boxes,
    whole,
)

CLINICAL = ("empi_anon", "acc_anon", "side", "tissueden", "asses", "path_severity")
METADATA = (
    *("empi_anon", "acc_anon", "anon_dicom_path", "FinalImageType", "ImageLateralityFinal", "ViewPosition"),
    *("spot_mag", "ROI_coords"),
)
IN_ARCHIVE = re.compile(r"cohort_\d+/.+")  # anon_dicom_path begins with folders of the machine it was made on
BIRADS = {"N": 1, "B": 2, "P": 3, "S": 4, "M": 5, "K": 6, "A": 0}
MILDEST_FIRST = (1, 2, 3, 0, 4, 5, 6)
LICENCE = (
    "EMBED Research Use Agreement: non-commercial research; clause 5: no public release of models, weights or "
    "embeddings trained on any of it without written permission of Emory University School of Medicine"
)
NOTE = "EMBED forbids to release models, weights or embeddings trained on it without written permission (clause 5)"


def read(src: Path, options: SourceOptions) -> Archive:
    """The plain 2D images that are there, labelled with the findings of their breast.

    Raises:
        UserError: a table is missing or lacks columns, or none of its images is in the folder.
    """
    options.only("embed", "labels", "dicom")
    exams = read_findings(find_table("EMBED_OpenData_clinical.csv", src, options.labels, below="tables"))
    table = find_table("EMBED_OpenData_metadata.csv", src, options.labels, below="tables")
    counts: Counter[str] = Counter()
    records: dict[str, Record] = {}
    for row in each_row(table, METADATA, optional=("DCM_ROI_coords",)):
        why = unfit(row)
        path = None if why else image_path(src, row["anon_dicom_path"])
        if path is None:
            counts[why or ABSENT] += 1
            continue
        found = record(src, path, row, exams.get((row["empi_anon"], row["acc_anon"]), []), options)
        records.setdefault(found.image_id, found)
    if not records:
        raise UserError(f"no plain 2D image of {table} is in {src}; name the folder above images/cohort_1")
    notes = (NOTE, *unlabelled(records.values()), *left_out(counts))
    return Archive(dataset="embed", licence=LICENCE, records=list(records.values()), notes=notes)


def unlabelled(records: Iterable[Record]) -> tuple[str, ...]:
    """A note on breasts about which the table says nothing."""
    count = sum("birads" not in record.labels for record in records)
    return (f"{count} images have no assessment of their side: they are unlabelled, not negative",) if count else ()


def read_findings(table: Path) -> dict[tuple[str, str], list[Row]]:
    """The findings of each exam, by patient and exam; columns about the person are not read."""
    exams = defaultdict(list)
    for row in each_row(table, CLINICAL, optional=("bside",)):
        exams[row["empi_anon"], row["acc_anon"]].append(row)
    return dict(exams)


def unfit(row: Row) -> str:
    """Why an image is left out, or nothing."""
    if row["FinalImageType"].upper() != "2D":
        return "they are no 2D mammograms (FinalImageType)"
    if whole(row["spot_mag"]) not in (None, 0):
        return "spot compression or magnification"
    return ""


def image_path(src: Path, original: str) -> Path | None:
    """The file that the table calls `…/cohort_1/patient/study/uid.dcm`, or None."""
    match = IN_ARCHIVE.search(original.replace("\\", "/"))
    name = re.sub(r"\.dcm$", "", match[0] if match else original, flags=re.IGNORECASE)
    places = (find_image(folder, name, (".dcm", ".png")) for folder in (src / "images", src))
    return next((path for path in places if path is not None), None)


def record(src: Path, path: Path, row: Row, exam: list[Row], options: SourceOptions) -> Record:
    """An image's record."""
    side = row["ImageLateralityFinal"].upper()[:1]
    exact = known(row["DCM_ROI_coords"])
    boxes = parse_boxes(exact or row["ROI_coords"])
    name = path.relative_to(src).as_posix()
    return Record(
        read=partial(read_image, path, options.dicom, boxes, chest_wall_left=not exact),
        name=name,
        stamp=stamp(path),
        image_id=name.rsplit(".", 1)[0].removeprefix("images/"),
        patient_id=row["empi_anon"],
        exam_id=row["acc_anon"],
        laterality=side if side in ("L", "R") else "",
        view=known(row["ViewPosition"]).upper(),
        labels=labels(exam, side),
    )


def labels(exam: list[Row], side: str) -> dict[str, str | int]:
    """`birads` 0 … 6 and `path_severity` 0 (invasive) … 6 of the breast's severest finding, the exam's density A … D.

    The order of severity is BI-RADS 1, 2, 3, 0, 4, 5, 6. Density 5 (male) is no density.
    """
    own = [row for row in exam if known(row["side"]).upper() in ("", "B", side)]
    birads = [BIRADS[letter] for row in own if (letter := row["asses"].upper()) in BIRADS]
    biopsies = [whole(row["path_severity"]) for row in own if known(row["bside"]).upper() in ("", "B", side)]
    return given(
        birads=max(birads, key=MILDEST_FIRST.index, default=None),
        path_severity=min((s for s in biopsies if s is not None and 0 <= s <= 6), default=None),
        density=next(filter(None, (numbered_density(row["tissueden"]) for row in exam)), ""),
    )


def parse_boxes(cell: str) -> tuple[Box, ...]:
    """The boxes in lists, nested to any depth, of ymin, xmin, ymax, xmax; numbers left over are dropped."""
    numbers = [float(text) for text in re.findall(r"-?\d+(?:\.\d+)?", cell)]
    fours = zip(*[iter(numbers)] * 4, strict=False)
    return tuple(Box(left=left, top=top, right=right, bottom=bottom) for top, left, bottom, right in fours)


def read_image(path: Path, dicom: DicomOptions, boxes: tuple[Box, ...], *, chest_wall_left: bool) -> Film:
    """The film with its boxes, which may have been drawn on a copy with the chest wall on the left.

    Raises:
        UnreadableImage: the file cannot be used.
    """
    film = read_with_boxes(path, dicom, boxes)
    width = film.pixels.shape[1]
    left, right = film.pixels[:, : width // 2].sum(), film.pixels[:, -(width // 2) :].sum()
    if not (boxes and chest_wall_left and right > left):
        return film
    return replace(
        film, boxes=tuple(replace(b, left=width - 1 - b.right, right=width - 1 - b.left) for b in film.boxes)
    )
