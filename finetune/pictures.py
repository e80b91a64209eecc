"""What is written of a user's images, in a folder of the user's: how files are called, and whose they are.

FOLDER/STEM-map.png   a picture an image, called after its file; of equal names the later ones are numbered
FOLDER/maps.csv       picture, file, model: one row a file that is written, before any is

Masks are called STEM-mask.png, with masks.csv, and so on (`Kind`).
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from ..data.image import SUFFIXES
from ..data.reading import DICOM_SUFFIXES
from ..engine.errors import UserError
from ..engine.files import make_folder, write_atomic

COLUMNS = ["picture", "file", "model"]
LONGEST = 200  # bytes of a stem: names end at 255


@dataclass(frozen=True)
class Kind:
    """What is written of each image, and the option that names the folder for it."""

    name: str
    option: str

    @property
    def listing(self) -> str:
        """The file that says whose the others are."""
        return f"{self.name}s.csv"


MAP, MASK, OVERLAY = Kind("map", "--explain"), Kind("mask", "--masks"), Kind("overlay", "--explain")


def names_for(files: Sequence[str], kind: Kind = MAP) -> list[str]:
    """What the picture of each file is called, each differently, on any system."""
    used: dict[str, str] = {}
    for file in files:
        stem = os.fsencode(stem_of(file))[:LONGEST].decode(errors="ignore")
        free = (f"{stem}-{kind.name}{end}.png" for end in chain([""], (f"-{n}" for n in count(2))))
        picture = next(one for one in free if one.lower() not in used)
        used[picture.lower()] = picture
    return list(used.values())


def stem_of(file: str) -> str:
    """A file's name without the suffix of a format; what follows a point in a UID is none."""
    path = Path(file)
    return path.stem if path.suffix.lower() in SUFFIXES | DICOM_SUFFIXES else path.name


def claim(folder: Path, files: Mapping[str, str], model: str, inputs: Iterable[Path], kind: Kind = MAP) -> None:
    """Take the names of pictures in a folder.

    Args:
        folder: made if it is not there.
        files: file by picture.
        model: digest of the model.
        inputs: the files that are judged.
        kind: of what is written.

    Raises:
        UserError: a picture would lie where one of the images lies, or something that is no earlier one of the same
            file by the same model.
    """
    listed, judged = listing(folder, kind), {path.resolve() for path in inputs}
    for picture, file in files.items():
        place = folder / picture
        if place.resolve() in judged:
            raise UserError(
                f"{place} is one of the images, and its {kind.name} would replace it; {kind.option} another folder"
            )
        if place.exists() and listed.get(picture) != (file, model):
            raise UserError(
                f"{place} is there, and is no {kind.name} of {file} by this model; {kind.option} another folder"
            )
    make_folder(folder)
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows((picture, *of) for picture, of in (listed | {p: (f, model) for p, f in files.items()}).items())
    write_atomic(folder / kind.listing, buffer.getvalue())


def listing(folder: Path, kind: Kind) -> dict[str, tuple[str, str]]:
    """(file, model) of each picture that the folder says it has.

    Raises:
        UserError: the listing is none of ours.
    """
    path = folder / kind.listing
    if not path.exists():
        return {}
    try:
        header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True)
        if header != COLUMNS:
            raise ValueError("other columns")
        return {picture: (file, model) for picture, file, model in rows}
    except (OSError, csv.Error, ValueError) as error:
        raise UserError(f"{path} is no list of {kind.name}s ({error}); {kind.option} another folder") from error
