"""Any file that holds an image, told apart by what is in it: DICOM, or what Pillow reads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .dicom.reader import DicomOptions, is_dicom, read_dicom
from .image import SUFFIXES, read_film
from .record import Film

DICOM_SUFFIXES = {".dcm", ".dicom", ""}


def is_image(path: Path) -> bool:
    """Whether a file may hold an image; its first bytes decide where its name does not."""
    suffix = path.suffix.lower()
    return suffix in SUFFIXES or ((suffix in DICOM_SUFFIXES or suffix[1:].isdigit()) and is_dicom(path))


def read_file(path: Path, dicom: DicomOptions, *, channels: Literal[1, 3] = 1, spacing_mm: float | None = None) -> Film:
    """The film in a file. A spacing given here wins over the file's own.

    Raises:
        UnreadableImage: it cannot be decoded, or is an image that must not be used; says why.
    """
    if path.suffix.lower() not in SUFFIXES and is_dicom(path):
        return read_dicom(path, dicom, spacing_mm=spacing_mm)
    return read_film(path, spacing_mm, channels=channels)
