"""RSNA Screening Mammography Breast Cancer Detection (Kaggle 2022): 54,706 images of 11,913 patients, two sites.

    SRC/train.csv
    SRC/train_images/<patient_id>/<image_id>.dcm     or .png at the same place
    SRC/test.csv, SRC/test_images                    not read: they have no `cancer`

`cancer` is said of a breast and stands on all its views. Site 2 tells neither BI-RADS nor density. There is no official
split and no exam id. Ages become decades (`50-59`, from 80 on `80+`), as exact high ages identify. Written from the
published description and table; no original image was seen.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from ...engine.errors import UserError
from ..archive import Archive, SourceOptions
from ..image import stamp
from ..reading import read_file
from ..record import Record
from .tables import ABSENT, Row, decade, find_image, find_table, given, known, left_out, read_csv, whole

COLUMNS = (
    *("site_id", "patient_id", "image_id", "laterality", "view", "age", "cancer", "biopsy", "invasive", "BIRADS"),
    *("implant", "density", "machine_id", "difficult_negative_case"),
)
LICENCE = "RSNA 2022 competition rules: non-commercial"
NOTES = (
    "cancer is told per breast: every view of the breast has it, whether it shows there or not",
    "test.csv is not read: it does not tell cancer",
    "site, machine and implant predict cancer: check a model against them",
)


def read(src: Path, options: SourceOptions) -> Archive:
    """The training images that are there, labelled.

    Raises:
        UserError: train.csv is missing or lacks columns, or none of its images is in the folder.
    """
    options.only("rsna", "labels", "dicom")
    table = find_table("train.csv", src, options.labels, alone=True)
    rows = {row["image_id"]: row for row in read_csv(table, COLUMNS)}
    records, absent = [], []
    for image_id, row in rows.items():
        name = f"train_images/{row['patient_id']}/{image_id}"
        path = find_image(src, name, (".dcm", ".png"))
        if path is None:
            absent.append(name)
        else:
            records.append(record(path, row, options))
    if not records:
        raise UserError(
            f"none of the {len(rows)} images of {table} is in {src / 'train_images'}; name the folder above it"
        )
    notes = (*NOTES, *left_out(+Counter({ABSENT: len(absent)})))
    return Archive(dataset="rsna", licence=LICENCE, records=records, notes=notes, absent=tuple(absent))


def record(path: Path, row: Row, options: SourceOptions) -> Record:
    """An image's record."""
    return Record(
        read=partial(read_file, path, options.dicom),
        name=f"train_images/{row['patient_id']}/{path.name}",
        stamp=stamp(path),
        image_id=row["image_id"],
        patient_id=row["patient_id"],
        laterality=row["laterality"].upper()[:1],
        view=row["view"].upper(),
        labels=labels(row),
    )


def labels(row: Row) -> dict[str, str | int]:
    """What the table tells; `birads` is 0, 1 or 2, as screening knows it."""
    return given(
        cancer=whole(row["cancer"]),
        biopsy=whole(row["biopsy"]),
        invasive=whole(row["invasive"]),
        birads=whole(row["BIRADS"]),
        density=known(row["density"]).upper(),
        implant=whole(row["implant"]),
        difficult_negative_case=whole(row["difficult_negative_case"]),
        site=known(row["site_id"]),
        machine=known(row["machine_id"]),
        age=decade(row["age"]),
    )
