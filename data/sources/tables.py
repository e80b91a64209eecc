"""Tables of archives, and what the images they list need: cells that may be empty, files that may be missing, boxes.

A table is text with a header line. Cells are stripped; a column that is not asked for is dropped while reading, as
some tables have 150 of them on half a million lines.
"""

from __future__ import annotations

import csv
import errno
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ...engine.errors import UserError
from ..dicom.reader import DicomOptions
from ..image import UnreadableImage
from ..reading import read_file
from ..record import Box, Film

MISSING = {"", "nan", "none", "null", "na", "n/a", "removed"}
ABSENT = "the table lists them, the folder lacks them"  # Archive.absent names them
DENSITIES = {"1": "A", "2": "B", "3": "C", "4": "D"}
Row = dict[str, str]


def find_table(name: str, src: Path, labels: Path | None, *, below: str = "", alone: bool = False) -> Path:
    """Where a table lies: where `labels` (a folder, or a file in it) says, else in the archive or its folder `below`.

    A source with one table (`alone`) takes the file that `labels` names, whatever it is called.

    Raises:
        UserError: it is in none of these places.
    """
    if labels is not None and labels.is_file() and alone:
        return labels
    base = src if labels is None else labels.parent if labels.is_file() else labels
    for path in (base / name, base / below / name):
        if path.is_file():
            return path
    raise UserError(f"{base} holds no table {name}; name the archive's folder, or that of its tables with --labels")


def each_row(path: Path, columns: Sequence[str], delimiter: str = ",", optional: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a table, one after the other, with these columns; an `optional` one that it lacks is empty.

    Raises:
        UserError: the file cannot be read as text, or lacks columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = [cell.strip() for cell in next(reader, [])]
            places = _places(path, header, columns, optional)
            for cells in reader:
                if any(cells):
                    yield {name: cells[i].strip() if i < len(cells) else "" for name, i in places.items()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the table {path} cannot be read ({error}); get an undamaged copy") from error


def _places(path: Path, header: list[str], columns: Sequence[str], optional: Sequence[str]) -> dict[str, int]:
    lacking = [name for name in columns if name not in header]
    if lacking:
        raise UserError(f"the table {path} lacks the columns {', '.join(lacking)}; use the archive's own table")
    nowhere = len(header) + 10**6
    return {name: header.index(name) if name in header else nowhere for name in (*columns, *optional)}


def read_csv(path: Path, columns: Sequence[str], delimiter: str = ",", optional: Sequence[str] = ()) -> list[Row]:
    """All rows of a table at once; see `each_row`.

    Raises:
        UserError: the file cannot be read as text, lacks columns, or holds no row.
    """
    rows = list(each_row(path, columns, delimiter, optional))
    if not rows:
        raise UserError(f"the table {path} has no rows; get an undamaged copy")
    return rows


# ---------------------------------------------------------------------------------------------- cells


def known(cell: str) -> str:
    """The cell, or nothing where it says that nothing is known."""
    return "" if cell.lower() in MISSING else cell


def number(cell: str) -> float | None:
    """A finite number, or None where there is none."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def whole(cell: str) -> int | None:
    """A whole number, also if written `2.0` (a column with gaps) or `True`; else None."""
    value = number({"true": "1", "false": "0"}.get(cell.lower(), cell))
    return int(value) if value is not None and value == int(value) else None


def decade(cell: str) -> str:
    """An age as `40-49`, from 80 on `80+`, as exact high ages identify; nothing of nothing."""
    age = number(cell)
    if age is None or age < 0:
        return ""
    start = int(age) // 10 * 10
    return "80+" if start >= 80 else f"{start}-{start + 9}"


def numbered_density(cell: str) -> str:
    """The letter of a density numbered 1 … 4, or nothing: 5 and others are no density."""
    return DENSITIES.get(str(whole(cell)), "")


def given(**labels: str | int | None) -> dict[str, str | int]:
    """The labels that are known."""
    return {task: label for task, label in labels.items() if label is not None and label != ""}


# ---------------------------------------------------------------------------------------------- images


def find_image(src: Path, name: str, suffixes: Sequence[str]) -> Path | None:
    """The file below `src` that a table names without its suffix; None where none exists or it lies outside `src`.

    The first suffix wins; each is tried in lower and in upper case.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        return None
    spelt = (spelling for suffix in suffixes for spelling in (suffix, suffix.upper()))
    return next((path for path in (src / f"{parts}{suffix}" for suffix in spelt) if _exists(path)), None)


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def left_out(counts: Counter[str]) -> tuple[str, ...]:
    """A note for each reason why images were left out."""
    return tuple(f"{count} {'images' if count > 1 else 'image'} left out: {why}" for why, count in counts.items())


def clip(boxes: Sequence[Box], height: int, width: int) -> tuple[Box, ...]:
    """Boxes cut at the frame's edge; those beyond it, or inside out, are dropped."""
    cut = (
        replace(
            b,
            left=max(b.left, 0.0),
            top=max(b.top, 0.0),
            right=min(b.right, width - 1),
            bottom=min(b.bottom, height - 1),
        )
        for b in boxes
    )
    return tuple(box for box in cut if box.left <= box.right and box.top <= box.bottom)


def read_with_boxes(
    path: Path, dicom: DicomOptions, boxes: tuple[Box, ...], size: tuple[int, int] | None = None
) -> Film:
    """The film in a file with its boxes, which count in pixels of a frame of that size (height, width).

    Raises:
        UnreadableImage: the file cannot be used, or has another size and boxes that would be wrong there.
    """
    film = read_file(path, dicom)
    height, width = film.pixels.shape[:2]
    if boxes and size is not None and size != (height, width):
        raise UnreadableImage(
            f"it has {width} x {height} pixels, and its boxes were drawn on {size[1]} x {size[0]}; use the original"
        )
    return replace(film, boxes=clip(boxes, height, width))
