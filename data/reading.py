"""Any file that holds an image, told apart by what is in it: DICOM, or what Pillow reads. And where such files lie."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ..engine.errors import UserError
from .dicom.reader import DicomOptions, is_dicom, read_dicom
from .image import SUFFIXES, UnreadableImage, read_film
from .record import Film

DICOM_SUFFIXES = {".dcm", ".dicom"}
OTHER_SUFFIXES = re.compile(
    r"\.(csv|tsv|txt|md|rst|html?|css|js|xml|jsonl?|ya?ml|toml|ini|cfg|log|xlsx?|ods|docx?|pptx?|pdf|zip|t?gz|bz2|xz|zst"
    r"|7z|rar|tar|py|ipynb|sh|npy|npz|mat|h5|hdf5|pkl|pth?|safetensors|db|sqlite|parquet)"
)
PICTURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*")  # PNG, JPEG, TIFF; BMP and PGM begin like words


def is_image(path: Path) -> bool:
    """Whether a file holds an image or should: its first bytes decide where its name does not.

    A broken one counts, so that it is listed with its reason and does not just disappear.
    """
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or suffix in DICOM_SUFFIXES:
        return True
    return not OTHER_SUFFIXES.fullmatch(suffix) and (is_dicom(path) or _is_picture(path))


def _is_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(8).startswith(PICTURES)
    except OSError:
        return False


def read_file(path: Path, dicom: DicomOptions, *, channels: Literal[1, 3] = 1, spacing_mm: float | None = None) -> Film:
    """The film in a file. A spacing given here wins over the file's own.

    Raises:
        UnreadableImage: it cannot be decoded, or is an image that must not be used; says why.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES and is_dicom(path):
        return read_dicom(path, dicom, spacing_mm=spacing_mm)
    if suffix in DICOM_SUFFIXES and path.is_file() and not _is_picture(path):
        what = "no DICOM file, whatever its name says" if path.stat().st_size else "empty"
        raise UnreadableImage(f"it is {what}; get it again")
    return read_film(path, spacing_mm, channels=channels)


# ---------------------------------------------------------------------------------------------- folders


def walk_files(folder: Path) -> Iterator[Path]:
    """Files below a folder and below the folders that are linked there, sorted; hidden ones, which systems leave, not.

    A folder is entered once, however many links lead to it, and under its own name where it has one here.

    Raises:
        UserError: a folder cannot be read, or a name is no text.
    """
    found: list[Path] = []
    visited: set[tuple[int, int]] = set()
    own, linked = [folder], list[Path]()
    while own or linked:
        place = own.pop() if own else linked.pop(0)
        try:
            at = place.stat()
            if (at.st_dev, at.st_ino) in visited:
                continue
            visited.add((at.st_dev, at.st_ino))
            with os.scandir(place) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    path, link = place / entry.name, entry.is_symlink()
                    target = path if link else entry  # a link may lead nowhere or to itself, which Path knows
                    if target.is_dir():
                        (linked if link else own).append(path)
                    elif target.is_file():
                        found.append(_named(path, folder))
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise UserError(f"the folder {place} cannot be read ({why}); mend that, or name another one") from error
    yield from sorted(found)


def _named(path: Path, folder: Path) -> Path:
    below = path.relative_to(folder)
    try:
        str(below).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{folder} holds a file whose name is no UTF-8, {str(below)!a}; rename it") from error
    return path
