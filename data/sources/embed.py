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
    number,
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
INNERMOST = re.compile(r"[\[(]([^\[\]()]+)[\])]")
BIRADS = {"N": 1, "B": 2, "P": 3, "S": 4, "M": 5, "K": 6, "A": 0}
MILDEST_FIRST = (1, 2, 3, 0, 4, 5, 6)
LICENCE = (
    "EMBED Research Use Agreement: non-commercial research; clause 5: no public release of models, weights or "
    "embeddings trained on any of it without written permission of Emory University School of Medicine"
)
SETTINGS = {"boxes": "mirrored back"}
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
    absent: dict[str, None] = {}  # in order, each once
    mirrored: set[str] = set()
    for row in each_row(table, METADATA, optional=("DCM_ROI_coords",)):
        if why := unfit(row):
            counts[why] += 1
        elif path := image_path(src, row["anon_dicom_path"]):
            found = record(src, path, row, exams.get((row["empi_anon"], row["acc_anon"]), []), options)
            records.setdefault(found.image_id, found)
            mirrored.update([found.image_id] if all(boxes_of(row)) else [])
        else:
            absent[name_of(row["anon_dicom_path"])] = None
    if not records:
        raise UserError(f"no plain 2D image of {table} is in {src}; name the folder above images/cohort_1")
    counts += Counter({ABSENT: len(absent)})
    return Archive(
        dataset="embed",
        licence=LICENCE,
        records=list(records.values()),
        notes=(NOTE, *uncertain(len(mirrored)), *unlabelled(records.values()), *left_out(counts)),
        absent=tuple(absent),
        settings=SETTINGS,
    )


def uncertain(count: int) -> tuple[str, ...]:
    """A note on boxes that may lie on the wrong side."""
    if not count:
        return ()
    return (
        f"the boxes of {count} images come from ROI_coords, which seem to count in copies with the chest wall on the "
        "left, as an issue of the archive and columns of later tables suggest and nothing documents: they are mirrored "
        "back on films with the breast on the right; look at some before you trust them",
    )


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
    name = name_of(original)
    places = (find_image(folder, name, (".dcm", ".png")) for folder in (src / "images", src))
    return next((path for path in places if path is not None), None)


def name_of(original: str) -> str:
    """What the archive calls that file, without its suffix."""
    match = IN_ARCHIVE.search(original.replace("\\", "/"))
    return re.sub(r"\.dcm$", "", match[0] if match else original, flags=re.IGNORECASE)


def record(src: Path, path: Path, row: Row, exam: list[Row], options: SourceOptions) -> Record:
    """An image's record."""
    side = row["ImageLateralityFinal"].upper()[:1]
    boxes, mirrored = boxes_of(row)
    name = path.relative_to(src).as_posix()
    return Record(
        read=partial(read_image, path, options.dicom, boxes, chest_wall_left=mirrored),
        name=name,
        stamp=f"{stamp(path)} {boxes}",  # a corrected table makes another set
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


def boxes_of(row: Row) -> tuple[tuple[Box, ...], bool]:
    """An image's boxes, and whether they were drawn on a copy with the chest wall on the left."""
    exact = known(row["DCM_ROI_coords"])
    return parse_boxes(exact or row["ROI_coords"]), not exact


def parse_boxes(cell: str) -> tuple[Box, ...]:
    """The boxes in lists, nested to any depth, of ymin, xmin, ymax, xmax; a list of anything else is dropped."""
    lists = ([number(text) for text in re.split(r"[\s,]+", each.strip(" ,"))] for each in INNERMOST.findall(cell))
    whole_ones = ([x for x in each if x is not None] for each in lists if len(each) == 4)
    return tuple(Box(top=b[0], left=b[1], bottom=b[2], right=b[3]) for b in whole_ones if len(b) == 4)


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
