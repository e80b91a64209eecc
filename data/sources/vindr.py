"""VinDr-Mammo 1.0.0 (Nguyen et al. 2023): 5,000 exams of four views, breast BI-RADS and density, boxes of findings.

    SRC/breast-level_annotations.csv    one row an image
    SRC/finding_annotations.csv         one row a finding; an image without has one row `['No Finding']`, no box
    SRC/metadata.csv                    DICOM header values; not read
    SRC/images/<study_id>/<image_id>.dicom     or .dcm, .png at the same place

`finding_categories` is a Python list as text, and a finding may have several. Nobody outside knows which studies are
of one person: the study is the patient. Boxes are kept as drawn, to within a pixel: whether xmax is the last pixel or
the one after it is not documented. Written from the published description; no original file was seen.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

from ...engine.errors import UserError
from ..archive import Archive, SourceOptions
from ..image import stamp
from ..record import Box, Record
from .tables import (
    ABSENT,
    Row,
    find_image,
    find_table,
    given,
    known,
    left_out,
    number,
    read_csv,
    read_with_boxes,
    whole,
)

BREASTS = "breast-level_annotations.csv"
FINDINGS = "finding_annotations.csv"
BREAST_COLUMNS = (
    *("study_id", "image_id", "laterality", "view_position", "height", "width"),
    *("breast_birads", "breast_density", "split"),
)
FINDING_COLUMNS = ("image_id", "finding_categories", "xmin", "ymin", "xmax", "ymax")
SPLITS = {"training": "train", "test": "test"}
NOTHING = "No Finding"
LICENCE = "PhysioNet Restricted Health Data License 1.5.0"
NOTE = "the archive has no patient ids: each study counts as a patient, and two studies of one person may be split"


def read(src: Path, options: SourceOptions) -> Archive:
    """The images that are there, labelled, with the boxes of their findings.

    Raises:
        UserError: a table is missing or malformed, or none of its images is in the folder.
    """
    options.only("vindr-mammo", "labels", "dicom")
    table = find_table(BREASTS, src, options.labels)
    rows = {row["image_id"]: row for row in read_csv(table, BREAST_COLUMNS)}
    findings = read_findings(find_table(FINDINGS, src, options.labels))
    records, absent = [], []
    for image_id, row in rows.items():
        name = f"images/{row['study_id']}/{image_id}"
        path = find_image(src, name, (".dicom", ".dcm", ".png"))
        if path is None:
            absent.append(name)
        else:
            records.append(record(path, row, findings.get(image_id, []), options))
    if not records:
        raise UserError(
            f"none of the {len(rows)} images of {table} is in {src / 'images'}; name the folder above images"
        )
    notes = (NOTE, *left_out(+Counter({ABSENT: len(absent)})))
    return Archive(dataset="vindr-mammo", licence=LICENCE, records=records, notes=notes, absent=tuple(absent))


def read_findings(table: Path) -> dict[str, list[tuple[list[str], Box | None]]]:
    """Categories and box of each finding, by image.

    Raises:
        UserError: the table lacks columns, or a cell is no list of categories.
    """
    findings = defaultdict(list)
    for row in read_csv(table, FINDING_COLUMNS):
        categories = parse_categories(row["finding_categories"], table)
        findings[row["image_id"]].append((categories, parse_box(row, "+".join(categories))))
    return dict(findings)


def parse_categories(cell: str, table: Path) -> list[str]:
    """The texts of a list such as `['Mass', 'Skin Thickening']`.

    Raises:
        UserError: the cell is something else.
    """
    try:
        found = ast.literal_eval(cell) if len(cell) < 1000 else None
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        found = None
    if not (isinstance(found, list) and all(isinstance(category, str) for category in found)):
        raise UserError(
            f"the table {table} has finding_categories that are no list of texts ({cell[:40]!r}); mend them"
        )
    return found


def parse_box(row: Row, label: str) -> Box | None:
    """The row's box, or None where a corner is missing."""
    left, top, right, bottom = (number(row[column]) for column in ("xmin", "ymin", "xmax", "ymax"))
    if left is None or top is None or right is None or bottom is None:
        return None
    return Box(left=left, top=top, right=right, bottom=bottom, label=label)


def record(path: Path, row: Row, findings: list[tuple[list[str], Box | None]], options: SourceOptions) -> Record:
    """An image's record; boxes on an image of another size than the table's would be wrong, so it is checked."""
    height, width = whole(row["height"]), whole(row["width"])
    size = (height, width) if height and width else None
    boxes = tuple(box for _, box in findings if box is not None)
    return Record(
        read=partial(read_with_boxes, path, options.dicom, boxes, size),
        name=f"images/{row['study_id']}/{path.name}",
        stamp=f"{stamp(path)} {boxes}",  # a corrected table makes another set
        image_id=row["image_id"],
        patient_id=row["study_id"],
        exam_id=row["study_id"],
        laterality=row["laterality"].upper()[:1],
        view=row["view_position"].upper(),
        split=SPLITS.get(row["split"].lower(), row["split"]),
        labels=labels(row, {category for categories, _ in findings for category in categories}),
    )


def labels(row: Row, categories: set[str]) -> dict[str, str | int]:
    """BI-RADS of the breast 1 … 5, `suspicious` where that is 4 or 5, density A … D, categories joined by `|`."""
    birads = whole(known(row["breast_birads"]).upper().removeprefix("BI-RADS"))
    return given(
        birads=birads,
        suspicious=None if birads is None else int(birads >= 4),
        density=known(row["breast_density"]).upper().removeprefix("DENSITY").strip(),
        findings="|".join(sorted(categories - {NOTHING} or categories)),
    )
