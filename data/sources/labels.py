"""The table a user writes for a folder of images.

    LABELS.csv      UTF-8, commas; `file`, and any of KNOWN; every other column is a label, stored in the clear

Because labels are stored in the clear, columns that may tell who a patient is are refused: by their name, by values
that look like dates, UIDs or addresses (identifying.py), by repeating the file's or the patient's name, by too many
different texts, by ages above 89, which are so rare that they name somebody. View and split are stored in the clear,
too: a view is one of VIEWS, a split a short word. This catches slips; it does not replace looking at the table.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...engine.errors import UserError
from ..dicom.reader import VIEWS as DICOM_VIEWS
from ..identifying import identifies, told_by

KNOWN = ("file", "patient", "exam", "laterality", "view", "split", "spacing_mm", "bits", "max_value")
ALMOST_FILE = {"image", "img", "path", "filename", "file_name", "filepath", "image_path", "img_path", "image_file"}
HASHED = {"file", "patient", "exam"}  # what they hold never leaves in the clear
SIDES = {"L": ("l", "left", "links", "gauche", "izquierda", "sinistra")}
SIDES["R"] = ("r", "right", "rechts", "droite", "derecha", "destra")
SIDE_OF = {word: letter for letter, words in SIDES.items() for word in words}
VIEWS = {*DICOM_VIEWS, "LAT", "LATERAL", "OBLIQUE", "AXIAL", "CORONAL", "SAGITTAL", "FRONTAL", "AP", "PA", "LL", "ID"}
VIEWS |= {"CCID", "MLOID", "MAG", "SPOT", "TAN", "MACULA", "DISC"}  # what other archives than mammograms call theirs
SPLIT = re.compile(r"[A-Za-z0-9_-]{1,16}")
AGE = re.compile(r"(^|[\W_])(age|ages|alter)([\W_]|$)", re.IGNORECASE)
YEARS = re.compile(r"0*(\d{2,4})(?:\.\d*)? ?[Yy]?")
OLDEST = 89  # years that may be told exactly (HIPAA's safe harbour, 45 CFR 164.514)
RANGES = {"bits": {str(n): 2**n - 1 for n in range(1, 17)}}
RANGES["max_value"] = {str(largest): largest for largest in RANGES["bits"].values()}
LONGEST = 500  # characters of a label
LARGEST = 200 * 2**20  # bytes of a table
MANY = 16  # rows from which a text that never repeats is no label but an identifier
CLASSES, SHARE = 20, 0.1  # a label has no more different texts than that, or than that part of its rows
Row = dict[str, str]


def read_table(path: Path) -> list[Row]:
    """The rows of the label file, stripped; every row has every column.

    Raises:
        UserError: it is missing, no CSV, has no `file` column, or columns that may tell who a patient is.
    """
    header, *lines = read_lines(path)
    columns = [_column(name) for name in header]
    check_header(path, columns)
    if not lines:
        raise UserError(f"the label file {path} needs a header with the column `file`, and rows below it")
    rows = [{k: v.strip() for k, v in zip(columns, line, strict=True) if k} for line in lines]
    rows = [row | {"file": row["file"].replace("\\", "/")} for row in rows]
    check_labels(path, rows)
    return rows


def read_lines(path: Path) -> list[list[str]]:
    """The fields of the header and of every row that is not blank, as many in each.

    Raises:
        UserError: it is no file, too large, not UTF-8, no CSV, or a row has more or fewer fields than the header.
    """
    if not path.is_file():
        raise UserError(f"the label file {path} is not there; name a CSV file")
    if path.stat().st_size > LARGEST:
        raise UserError(f"the label file {path} is larger than {LARGEST >> 20} MB; name the CSV file, not an image")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the label file {path} is no UTF-8 text; save it as `CSV UTF-8`") from error
    if strange := re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text):
        line = text.count("\n", 0, strange.start()) + 1
        raise UserError(f"the label file {path} holds a control character in line {line}, so it is no plain CSV")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines: list[list[str]] = []
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            lines.append(fields)
            if len(fields) != len(lines[0]):
                raise csv.Error(f"{len(fields)} fields where the header has {len(lines[0])}")
    except csv.Error as error:
        raise UserError(f"the label file {path} is no CSV in line {reader.line_num} ({error}); correct it") from error
    return lines or [[]]


def _column(name: str) -> str:
    """A header as written, but for the known ones, whose case does not matter."""
    name = name.strip()
    return name.lower() if name.lower() in KNOWN else name


def check_header(path: Path, columns: Sequence[str]) -> None:
    """Refuse a header that is not ours, or names what must not be stored.

    Raises:
        UserError: no `file`, a column twice, a name that cannot be stored, or that says it identifies.
    """
    if "file" not in columns:
        other = next((f" (call {name!r} so)" for name in columns if name.lower() in ALMOST_FILE), "")
        other = " and commas between columns" if len(columns) == 1 and re.search("[;\t]", columns[0]) else other
        raise UserError(f"the label file {path} needs a header with the column `file`{other}, and rows below it")
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise UserError(f"the label file {path} has two columns {twice[0]!r}; rename or drop one")
    odd = next((name for name in columns if len(name) > 100 or not name.isprintable()), None)
    if odd is not None:
        raise UserError(f"the label file {path} has a column {odd[:30]!r}, which is no name for a label; rename it")
    if bad := [repr(column) for column in columns if identifies(column) and column not in KNOWN]:
        raise UserError(
            f"the label file {path} has columns that may tell who a patient is ({', '.join(bad[:5])}), and labels are "
            "stored in the clear: call a patient's id `patient` and an exam's `exam` (these are hashed), drop the "
            "others, or rename one that tells nothing of the kind"
        )


def check_labels(path: Path, rows: Sequence[Row]) -> None:
    """Refuse columns whose values may tell who a patient is.

    Raises:
        UserError: one does; it is named, its values are not.
    """
    for column in rows[0]:
        if column not in HASHED and (what := next(telling(column, rows), "")):
            raise UserError(
                f"the column {column!r} of the label file {path} {what}, and labels are stored in the clear: drop it, "
                "or call it `patient` or `exam` if it is one (these are hashed)"
            )


def telling(column: str, rows: Sequence[Row]) -> Iterator[str]:
    """What makes a column look as if it told who a patient is."""
    given = [row for row in rows if row[column]]
    values = {row[column] for row in given}
    for value in values:
        if len(value) > LONGEST:
            yield f"holds a text of {len(value)} characters"
        yield from (f"holds {what}" for what in told_by(value))
        if AGE.search(column) and (years := YEARS.fullmatch(value)) and int(years[1]) > OLDEST:
            yield f"holds ages above {OLDEST}, which identify (write decades, such as 70-79 and 80+)"
    if column not in KNOWN and len(values) >= 3:
        yield from repeating(column, given)
    texts = values if column == "split" else {value for value in values if is_code(value)}
    if len(texts) > max(CLASSES, SHARE * len(given)):
        yield f"has {len(texts)} different texts, more than a label's classes"


def repeating(column: str, given: Sequence[Row]) -> Iterator[str]:
    """Which of the archive's ids the values of a column repeat, or look like."""
    values = {row[column] for row in given}
    if all(Path(row["file"]).stem in row[column] for row in given):
        yield "repeats the names of the files"
    if all(row[column] in (row.get("patient"), row.get("exam")) for row in given):
        yield "repeats the patient or exam"
    if len(values) == len(given) >= MANY and all(map(is_code, values)):
        yield "differs in every row, as identifiers do"
    pairs = {(row.get("patient"), row[column]) for row in given}
    patients = {patient for patient, _ in pairs if patient}
    if len(given) > len(pairs) == len(values) == len(patients) >= MANY and all(map(str.isdecimal, values)):
        yield "numbers the patients"


def is_code(value: str) -> bool:
    """Whether a value that never repeats is more likely an identifier than a measure."""
    try:
        float(value)
    except ValueError:
        return True
    return value.isdecimal() and len(value) >= 6


# ---------------------------------------------------------------------------------------------- cells


def side(row: Row, name: str) -> str:
    """`L`, `R` or nothing.

    Raises:
        UserError: the cell says something else.
    """
    text = row.get("laterality", "")
    if text and text.lower() not in SIDE_OF:
        raise UserError(f"the label file gives {name} the laterality {text!r}; write L or R, or leave it empty")
    return SIDE_OF[text.lower()] if text else ""


def view(row: Row, name: str) -> str:
    """One of VIEWS, or nothing.

    Raises:
        UserError: the cell says something else.
    """
    text = row.get("view", "").upper()
    if text and text not in VIEWS:
        raise UserError(
            f"the label file gives {name} a `view` that is none of {', '.join(sorted(VIEWS))}; correct it or leave it "
            "empty, or give the column another name to keep it as a label"
        )
    return text


def split(row: Row, name: str) -> str:
    """The name of a split, or nothing.

    Raises:
        UserError: the cell holds more than such a name.
    """
    text = row.get("split", "")
    if text and not SPLIT.fullmatch(text):
        raise UserError(
            f"the label file gives {name} a `split` that is no name of one; write up to 16 letters, digits, _ or -"
        )
    return text


def spacing_mm(row: Row, name: str) -> float | None:
    """Millimetres a pixel, where the table tells.

    Raises:
        UserError: the cell is no length.
    """
    text = row.get("spacing_mm", "")
    try:
        spacing = float(text or "nan")
    except ValueError:
        spacing = 0.0
    if text and not (math.isfinite(spacing) and spacing > 0):
        raise UserError(f"the label file gives {name} the spacing_mm {text!r}; it must be a length in millimetres")
    return spacing if text else None


def max_value(row: Row, name: str) -> int | None:
    """The largest value of its range, where the table tells.

    Raises:
        UserError: the cells are no such range, or name two.
    """
    told = {ranges.get(row[column]) for column, ranges in RANGES.items() if row.get(column)}
    if None in told or len(told) > 1:
        raise UserError(
            f"the label file gives {name} bits {row.get('bits', '')!r} and max_value {row.get('max_value', '')!r}; "
            "bits is a number from 1 to 16, max_value that power of two less one, and one of them is enough"
        )
    return told.pop() if told else None
