"""Any folder of images, DICOM among them, with a table of what is known of them and a folder of their masks.

    SRC/**/*.png|pgm|tif|jpg|bmp|dcm, and DICOM files of any name
    LABELS.csv      file, and any of: patient, exam, laterality, view, split, spacing_mm, bits, max_value; every other
                    column is a label
    MASKS/**        see masks.py; may lie in SRC, or be SRC

`file` is the path below SRC (backslashes count as slashes), or its name where that is unique, with or without suffix.
What the table leaves open of patient, exam, side and view is taken from DICOM headers. Where neither tells the patient,
or an anonymiser wrote the same for everybody, nobody knows which images belong together: each counts as a patient,
which leaks between splits if that is wrong. `bits` or `max_value` says how far the pixels reach where the file has room
for more: 12 bits come as 0 … 4095 in files of 16.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from ...engine.errors import UserError
from ...engine.track import Meter
from ..archive import Archive, SourceOptions
from ..dicom.reader import DicomOptions, read_header
from ..image import SUFFIXES, UnreadableImage, in_colour, opened, read_film, stamp, stored_range
from ..reading import is_image, read_file
from ..record import Film, MaskKind, Record
from .labels import KNOWN, Row, max_value, read_table, side, spacing_mm, split, view
from .masks import MaskFile, pair, split_shared, stem_of, with_masks

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "holdout"}
SAMPLED = 16  # images whose range is looked at
RANGES = (10, 12, 14)  # bits that detectors give, below the 16 of their files
NOBODY = re.compile(  # what anonymisers leave in place of a patient's id
    r"0+|x+|-+|anon(ym\w*)?|(de-?)?identified|deid|removed|redacted|unknown|none|null|nan|na|n/a|patient(_?id)?|empty",
    re.IGNORECASE,
)
FEW = 4  # images that one patient's exam has: from more on, one id for all is nobody's
MANY = 200  # files whose headers take long enough to show progress
Masks = dict[Path, list[MaskFile]]


def read(src: Path, options: SourceOptions) -> Archive:
    """Every image below the folder that the table names, or all of them where there is no table.

    Raises:
        UserError: no image in the folder, a table that cannot be read or names none or unknown files, masks that fit
            no image or several.
    """
    options.only("folder", "labels", "masks", "mask_kind", "channels", "dicom")
    if options.masks is None and options.mask_kind == "classes":
        raise UserError("--mask-kind says what masks hold; name their folder with --masks")
    images, masks, strays = find(src, options.masks, options.mask_kind)
    if not images:
        raise UserError(f"{src} holds no image (DICOM, {', '.join(sorted(SUFFIXES))}); name a folder that does")
    table = match_rows(src, images, read_table(options.labels)) if options.labels else {path: {} for path in images}
    table, odd = with_headers(table)
    records = [record(src, path, row, masks.get(path, []), options) for path, row in table.items()]
    return Archive(
        dataset="folder",
        licence="unknown",
        records=records,
        breast=options.channels == 1,
        channels=options.channels,
        notes=(*odd, *notes(images, table), *mask_notes(options.masks, images, table, masks, strays)),
        settings={"masks": options.mask_kind} if options.masks else {},
    )


# ---------------------------------------------------------------------------------------------- files


def find(src: Path, folder: Path | None, kind: MaskKind) -> tuple[list[Path], Masks, list[Path]]:
    """The images, the masks of those that have some, and masks of no image.

    Raises:
        UserError: the folder of masks is missing, holds none that fit, one that fits several images, or
            several of classes for an image.
    """
    if folder is None:
        return [path for path in listed(src) if is_image(path)], {}, []
    if not folder.is_dir():
        raise UserError(f"the folder of masks {folder} is not there; name it with --masks")
    place, masks_place = src.resolve(), folder.resolve()
    if place.is_relative_to(masks_place):
        images, files = split_shared([path for path in listed(src) if is_image(path)])
        folder = src
    else:
        images = [p for p in listed(src) if not p.resolve().is_relative_to(masks_place) and is_image(p)]
        files = [path for path in listed(folder) if path.suffix.lower() in SUFFIXES]
    masks, strays = pair(images, src, files, folder)
    if images and not masks:
        raise UserError(
            f"no mask in {folder} is called like an image of {src}: film7.png has film7.png there, or film7_mask.png, "
            "film7_mask_1.png, film7_benign.png; rename them, or leave out --masks"
        )
    several = next((image for image in masks if len(masks[image]) > 1), None)
    if several is not None and kind == "classes":
        raise UserError(f"{several} has {len(masks[several])} masks, and classes are numbered in one; join them")
    return images, masks, strays


def listed(folder: Path) -> list[Path]:
    """Files below a folder, but for hidden ones, which systems leave behind.

    Raises:
        UserError: a name is no text.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if any(part.startswith(".") or part == "__MACOSX" for part in below.parts) or not path.is_file():
            continue
        try:
            str(below).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{folder} holds a file whose name is no UTF-8, {str(below)!a}; rename it") from error
        found.append(path)
    return found


def match_rows(src: Path, images: list[Path], rows: list[Row]) -> dict[Path, Row]:
    """The row of each image it names.

    Raises:
        UserError: a row names no image, or several, or one that another row named.
    """
    names = Counter(name for path in images for name in _names(src, path))
    by_name = {name: path for path in images for name in _names(src, path) if names[name] == 1}
    by_name |= {path.relative_to(src).as_posix().replace("\\", "/"): path for path in images}
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
    stem = stem_of(path)
    return {name.replace("\\", "/") for name in (path.relative_to(src).with_name(stem).as_posix(), path.name, stem)}


# ---------------------------------------------------------------------------------------------- records


def with_headers(table: Mapping[Path, Row]) -> tuple[dict[Path, Row], list[str]]:
    """The rows of all images, filled up with what DICOM headers say, and what the user should know of that."""
    table = {path: without_filler(row) for path, row in table.items()}
    files = [path for path in table if path.suffix.lower() not in SUFFIXES]
    told: dict[Path, Row] = {}
    with Meter("headers", len(files)) if len(files) > MANY else nullcontext() as meter:
        for path in files:
            told[path] = header_row(path)
            if meter:
                meter.advance()
    ids = {path: row["patient"] for path, row in told.items() if "patient" in row and not table[path].get("patient")}
    one = len(ids) == len(table) > FEW and len(set(ids.values())) == 1
    blank = {path for path, patient in ids.items() if one or NOBODY.fullmatch(patient)}
    for path in blank:
        del told[path]["patient"]
    notes = [f"{len(blank)} DICOM headers give the same patient for all or a filler such as `anonymous`: not believed"]
    own = {path: {name: value for name, value in row.items() if value} for path, row in table.items()}
    return {path: {**told.get(path, {}), **row} for path, row in own.items()}, notes if blank else []


def header_row(path: Path) -> Row:
    """What a DICOM header says of patient, exam, side and view."""
    try:
        header = read_header(path)
    except UnreadableImage:  # it is left out, and listed, when its pixels are read
        return {}
    told = {
        "patient": header.patient_id,
        "exam": header.study_uid,
        "laterality": header.laterality,
        "view": header.view,
    }
    return {name: value for name, value in told.items() if value}


def without_filler(row: Row) -> Row:
    """A row of the table whose patient is a word for nobody loses it. Numbers stay: somebody may count from 0."""
    patient = row.get("patient", "")
    return row | {"patient": ""} if NOBODY.fullmatch(patient) and not patient.isdecimal() else row


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a file is read: in a worker, so with nothing in it that only this process has."""

    path: Path
    dicom: DicomOptions
    channels: Literal[1, 3]
    spacing_mm: float | None = None
    max_value: int | None = None
    masks: tuple[Path, ...] = ()
    mask_kind: MaskKind = "instances"


def read_one(how: Reading) -> Film:
    """The film with its masks and the range the table tells.

    Raises:
        UnreadableImage: the image or a mask cannot be used, or the pixels lie beyond the table's range.
    """
    film = read_file(how.path, how.dicom, channels=how.channels, spacing_mm=how.spacing_mm)
    if how.channels == 3:
        film = replace(film, pixels=in_colour(film.pixels))  # DICOM is gray
    if how.max_value is not None:
        if how.max_value > film.max_value:
            raise UnreadableImage(f"its file ends at {film.max_value}, and the table says {how.max_value}")
        if film.pixels.max() > how.max_value:
            raise UnreadableImage(f"it holds {film.pixels.max()}, and the table ends at {how.max_value}")
        film = replace(film, max_value=how.max_value)
    return with_masks(film, how.masks, how.mask_kind)


def record(src: Path, path: Path, row: Row, masks: Sequence[MaskFile], options: SourceOptions) -> Record:
    """An image's record.

    Raises:
        UserError: a cell of its row makes no sense.
    """
    name = path.relative_to(src).as_posix()
    spacing, largest = spacing_mm(row, name), max_value(row, name)
    if largest is not None and path.suffix.lower() not in SUFFIXES:
        raise UserError(f"the label file gives {name} a range, which a DICOM file tells itself; leave it empty")
    how = Reading(
        path=path,
        dicom=options.dicom,
        channels=options.channels,
        spacing_mm=spacing,
        max_value=largest,
        masks=tuple(mask.path for mask in masks),
        mask_kind=options.mask_kind,
    )
    finding = "+".join(sorted({mask.finding for mask in masks if mask.finding}))
    stamps = [stamp(file) for file in (path, *how.masks)] + ([f"max {largest}"] if largest else [])
    return Record(
        read=partial(read_one, how),
        spacing_mm=spacing,
        stamp=", ".join(stamps),
        name=name,
        image_id=name,
        patient_id=row.get("patient") or f"file:{name}",
        exam_id=row.get("exam", ""),
        laterality=side(row, name),
        view=view(row, name),
        split=split(row, name),
        labels=({"finding": finding} if finding else {})
        | {column: value for column, value in row.items() if column not in KNOWN and value},
    )


# ---------------------------------------------------------------------------------------------- notes


def notes(images: Collection[Path], table: dict[Path, Row]) -> Iterator[str]:
    """What may be other than the user thinks."""
    if len(images) > len(table):
        yield f"{len(images) - len(table)} images are not in the label file and were left out"
    lonely = sum(not row.get("patient") for row in table.values())
    if lonely:
        yield f"{lonely} images have no patient: each counts as one of its own, which leaks if that is wrong"
    splits = Counter(row.get("split", "") for row in table.values())
    if {name for name in splits if name} - SPLITS:
        found = ", ".join(f"{name or 'none'} ({count})" for name, count in sorted(splits.items()))
        yield f"the splits are called {found}: correct the table if one is misspelt"
    yield from range_note([path for path, row in table.items() if not row.get("bits") and not row.get("max_value")])


def range_note(paths: Sequence[Path]) -> Iterator[str]:
    """Whether files of 16 bits hold fewer, as far as a few of them tell."""
    files = [path for path in paths if path.suffix.lower() in SUFFIXES]
    largest = []
    for path in files[:: max(1, -(-len(files) // SAMPLED))]:
        if (value := largest_of_16_bits(path)) is not None:
            largest.append(value)
            if value >= 2 ** max(RANGES):
                return
    bits = next((n for n in RANGES if largest and max(largest) < 2**n), None)
    if bits is not None:
        yield (
            f"the {len(largest)} images of 16 bits that were looked at stay below {2**bits}: if they hold {bits} bits, "
            f"say so with a column `bits` ({bits}) in the label file, else they count as 16 bits and are dark"
        )


def largest_of_16_bits(path: Path) -> int | None:
    """The largest value of a file with room for 65535; None for others, and for those that cannot be read."""
    try:
        with opened(path) as image:
            if stored_range(image) < 2**16 - 1:
                return None
        film = read_film(path)
    except UnreadableImage:
        return None
    return int(film.pixels.max())


def mask_notes(
    folder: Path | None, images: Sequence[Path], table: dict[Path, Row], masks: Masks, strays: Sequence[Path]
) -> Iterator[str]:
    """Which images have no mask, which masks no image, and what the masks' names say."""
    if folder is None:
        if likely := len(split_shared(list(images))[1]):
            yield f"{likely} images are called like masks of others: if they are, name their folder with --masks"
        return
    bare = sum(path not in masks for path in table)
    if bare:
        yield f"{bare} images have no mask"
    if strays:
        yield f"{len(strays)} masks belong to no image, such as {strays[0].name}"
    findings = Counter(mask.finding for path in table for mask in masks.get(path, []) if mask.finding)
    if findings:
        told = ", ".join(f"{name} ({count})" for name, count in sorted(findings.items()))
        yield f"the masks' names tell the findings {told}: kept as the label `finding`"
    if strange := sum(mask.strange for path in table for mask in masks.get(path, [])):
        yield f"the names of {strange} masks hold words that are no known findings: the masks were taken, not the words"
