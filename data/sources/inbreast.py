"""INbreast (Moreira et al. 2012): 410 digital mammograms of 115 cases, findings outlined.

    SRC/INbreast.csv                `;` between cells; patient and age say `removed`
    SRC/AllDICOMs/<File Name>_<hash>_MG_<L|R>_<CC|ML>_ANON.dcm          or .png
    SRC/AllXML/<File Name>.xml      outlines of findings (outlines.py); no file where nothing was found

The hash in a file's name is the only patient id. `ML` there is what the table calls MLO: the table is right. The mask
numbers classes (`CLASSES`), not findings: a film may have hundreds of calcifications, more than a mask can count. Where
outlines overlap, the smaller one is on top; each stays in the film's polygons. Outlines are taken to count from the
centre of the first pixel. Written from the published description and table; no original file was seen.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ...engine.errors import UserError
from ..archive import Archive, SourceOptions
from ..dicom.reader import DicomOptions
from ..image import UnreadableImage, stamp
from ..reading import read_file
from ..record import Film, Polygon, Record
from .outlines import read_outlines
from .tables import ABSENT, Row, find_table, given, known, left_out, numbered_density, read_csv

COLUMNS = ("Laterality", "View", "Acquisition date", "File Name", "ACR", "Bi-Rads")
FILE = re.compile(r"(\d+)_([0-9a-f]+)_MG_([LR])_([A-Z]+)_ANON\.(dcm|png)", re.IGNORECASE)
VIEWS = {"ML": "MLO"}
CLASSES = ("mass", "calcification", "cluster", "distortion", "asymmetry", "spiculated region", "other")
# How the original spells them, beside the names above. `Point 1`, `Point 3`, `Unnamed` and the like are `other`.
SPELLINGS = {"calcifications": "calcification", "assymetry": "asymmetry", "espiculated region": "spiculated region"}
LICENCE = "INbreast: research agreement, on request"


def read(src: Path, options: SourceOptions) -> Archive:
    """The films that are there, labelled, with outlines.

    Raises:
        UserError: the table is missing or lacks columns, or no film of it is in the folder.
    """
    options.only("inbreast", "labels", "dicom")
    table = find_table("INbreast.csv", src, options.labels, alone=True)
    rows = {row["File Name"]: row for row in read_csv(table, COLUMNS, delimiter=";") if row["File Name"]}
    folder = src / "AllDICOMs"
    films = {
        match[1]: match
        for path in sorted(folder.glob("*_ANON.*"), reverse=True)
        if (match := FILE.fullmatch(path.name))
    }
    absent = tuple(f"AllDICOMs/{name}" for name in rows if name not in films)
    counts = Counter({ABSENT: len(absent), "they are not in the table": len(films.keys() - rows.keys())})
    records = [record(src, films[name], rows[name], options) for name in rows if name in films]
    if not records:
        raise UserError(
            f"{folder} holds none of the {len(rows)} films of {table}, under names like "
            "<File Name>_<hash>_MG_R_CC_ANON.dcm; use the names of the release, they tell the patients"
        )
    told = (*notes(src, records), *left_out(+counts))
    return Archive(dataset="inbreast", licence=LICENCE, records=records, notes=told, absent=absent)


def notes(src: Path, records: list[Record]) -> list[str]:
    """What the user should know of these labels."""
    outlined = sum("mass" in record.labels for record in records)
    said = ["suspicious is BI-RADS 4, 5, 6 against 1, 2; films of BI-RADS 3 have no such label"]
    if not (src / "AllXML").is_dir():
        said.append("there is no folder AllXML: no outlines, masks, `mass` and `calcification`")
    elif outlined < len(records):
        said.append(f"{len(records) - outlined} of the files in AllXML cannot be read; their films will be skipped")
    return said


def record(src: Path, film: re.Match[str], row: Row, options: SourceOptions) -> Record:
    """A film's record."""
    path = src / "AllDICOMs" / film[0]
    outlines = src / "AllXML" / f"{film[1]}.xml" if (src / "AllXML").is_dir() else None
    view = known(row["View"]).upper() or film[4].upper()
    return Record(
        read=partial(read_outlined, path, outlines, options.dicom),
        name=f"AllDICOMs/{film[0]}",
        stamp=" ".join(stamp(file) for file in (path, outlines) if file is not None and file.exists()),
        image_id=film[1],
        patient_id=film[2].lower(),
        exam_id=known(row["Acquisition date"]),
        laterality=(known(row["Laterality"]) or film[3]).upper()[:1],
        view=VIEWS.get(view, view),
        labels=labels(row) | findings(outlines),
    )


def labels(row: Row) -> dict[str, str | int]:
    """BI-RADS 1 … 6 with 4a, 4b, 4c; `suspicious` (4 to 6: 1, 1 and 2: 0, 3: none); ACR 1 … 4 as density A … D."""
    birads = known(row["Bi-Rads"]).lower()
    suspicious = {"1": 0, "2": 0, "4": 1, "5": 1, "6": 1}.get(birads[:1])
    return given(birads=birads, suspicious=suspicious, density=numbered_density(row["ACR"]))


def findings(outlines: Path | None) -> dict[str, str | int]:
    """Whether masses and calcifications are outlined; nothing where nobody can tell."""
    try:
        names = None if outlines is None else {polygon.label for polygon in read_polygons(outlines)}
    except UnreadableImage:
        names = None
    if names is None:
        return {}
    return {"mass": int("mass" in names), "calcification": int(bool(names & {"calcification", "cluster"}))}


def read_polygons(outlines: Path) -> tuple[Polygon, ...]:
    """The outlines of a film, named by class; none where the file is missing, which means that nothing was found.

    Raises:
        UnreadableImage: the file is damaged.
    """
    polygons = read_outlines(outlines) if outlines.exists() else ()
    return tuple(replace(polygon, label=class_of(polygon.label)) for polygon in polygons)


def class_of(name: str) -> str:
    """The class that an outline's name means."""
    name = " ".join(name.lower().split())
    name = SPELLINGS.get(name, name)
    return name if name in CLASSES else "other"


def read_outlined(path: Path, outlines: Path | None, dicom: DicomOptions) -> Film:
    """The film with outlines and the mask of their classes.

    Raises:
        UnreadableImage: the film or its outlines cannot be used.
    """
    film = read_file(path, dicom)
    if outlines is None:
        return film
    polygons = read_polygons(outlines)
    height, width = film.pixels.shape[:2]
    if not all(any(0 <= x < width and 0 <= y < height for x, y in polygon.points) for polygon in polygons):
        raise UnreadableImage("its outlines lie outside of the frame; use the original size")
    return replace(film, polygons=polygons, mask=paint(polygons, height, width), mask_kind="classes")


def paint(polygons: tuple[Polygon, ...], height: int, width: int) -> NDArray[np.uint8]:
    """(H, W) classes, counted from 1, of the pixels inside or on the outlines; smaller outlines on top."""
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    for polygon in sorted(polygons, key=area, reverse=True):
        # Rounded to pixels, so that an outline smaller than a pixel still marks one.
        points = [(min(max(round(x), 0), width - 1), min(max(round(y), 0), height - 1)) for x, y in polygon.points]
        value = 1 + CLASSES.index(polygon.label)
        if len(points) > 2:
            draw.polygon(points, fill=value, outline=value)
        draw.line([*points, points[0]], fill=value)
    return np.array(mask)


def area(polygon: Polygon) -> float:
    """The area inside an outline in square pixels (shoelace formula)."""
    x, y = np.array(polygon.points).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
