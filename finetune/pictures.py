"""Pictures of what decisions rest on, in a folder of the user's: what they are called, and whose they are.

FOLDER/STEM-map.png   a picture an image, called after its file; of equal names the later ones are numbered
FOLDER/maps.csv       picture, file, model: one row a picture, written before any is drawn
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path

from ..data.image import SUFFIXES
from ..data.reading import DICOM_SUFFIXES
from ..engine.errors import UserError
from ..engine.files import make_folder, write_atomic

LISTING, COLUMNS = "maps.csv", ["picture", "file", "model"]
LONGEST = 200  # bytes of a stem: names end at 255


def names_for(files: Sequence[str]) -> list[str]:
    """What the picture of each file is called, each differently, on any system."""
    used: dict[str, str] = {}
    for file in files:
        stem = os.fsencode(stem_of(file))[:LONGEST].decode(errors="ignore")
        free = (f"{stem}-map{end}.png" for end in chain([""], (f"-{n}" for n in count(2))))
        picture = next(one for one in free if one.lower() not in used)
        used[picture.lower()] = picture
    return list(used.values())


def stem_of(file: str) -> str:
    """A file's name without the suffix of a format; what follows a point in a UID is none."""
    path = Path(file)
    return path.stem if path.suffix.lower() in SUFFIXES | DICOM_SUFFIXES else path.name


def claim(folder: Path, files: Mapping[str, str], model: str, inputs: Iterable[Path]) -> None:
    """Take the names of pictures in a folder.

    Args:
        folder: made if it is not there.
        files: file by picture.
        model: digest of the model.
        inputs: the files that are judged.

    Raises:
        UserError: a picture would lie where one of the images lies, or something that is no earlier map of the same
            file by the same model.
    """
    listed, judged = listing(folder), {path.resolve() for path in inputs}
    for picture, file in files.items():
        place = folder / picture
        if place.resolve() in judged:
            raise UserError(f"{place} is one of the images, and its map would replace it; --explain another folder")
        if place.exists() and listed.get(picture) != (file, model):
            raise UserError(f"{place} is there, and is no map of {file} by this model; --explain another folder")
    make_folder(folder)
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows((picture, *of) for picture, of in (listed | {p: (f, model) for p, f in files.items()}).items())
    write_atomic(folder / LISTING, buffer.getvalue())


def listing(folder: Path) -> dict[str, tuple[str, str]]:
    """(file, model) of each picture that the folder says it has.

    Raises:
        UserError: the listing is none of ours.
    """
    path = folder / LISTING
    if not path.exists():
        return {}
    try:
        header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True)
        if header != COLUMNS:
            raise ValueError("other columns")
        return {picture: (file, model) for picture, file, model in rows}
    except (OSError, csv.Error, ValueError) as error:
        raise UserError(f"{path} is no list of maps ({error}); --explain another folder") from error
