"""Masks as files, each in the pixels of its film: PNG with a JSON beside it, NIfTI, DICOM-SEG.

FOLDER/STEM.png       0 and 255 where there is one class beside the background, else the numbers of the classes
FOLDER/STEM.json      {"schema": "miram.mask/1", "file", "model", "classes": background first, "values": {CLASS: value
                      in the PNG}, "thresholds" or null, "height", "width", "spacing_mm" or null, "found": [{"class",
                      "pixels", "mm2" or null, "components", "largest_probability"}], "sop_instance_uid" or null}
FOLDER/STEM.nii.gz    (columns, rows, 1) class numbers
FOLDER/STEM.dcm       one frame a class (dicom_seg.py)

`sop_instance_uid` is that of the user's own DICOM file; what comes of a data set names nobody. `spacing_mm` is of the
film's pixels. Components are told by pixels that touch, at a corner too.

In the NIfTI, array element [x, y, 0] is the pixel in row y and column x, and its axes run to the patient's left and
back (RAS affine diag(-spacing, -spacing, 1)). This is what ITK makes of a picture: SimpleITK, 3D Slicer and nnU-Net's
readers of NIfTI give (1, rows, columns) with the identity for a direction. It is no claim about the patient.

Legend: H W of a film, K classes with background as class 0.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ...data.findings import TOUCHING
from ...data.geometry import Geometry
from ...data.image import encode_png
from ...data.shards import Sample
from ...engine.errors import UserError, did_you_mean
from ...engine.files import write_atomic, write_json
from .dicom_seg import encode_seg

MASK = "miram.mask/1"
NIFTI, DICOM_SEG = "nifti", "dicom-seg"
SUFFIXES = {NIFTI: ".nii.gz", DICOM_SEG: ".dcm"}  # of what may be written beside PNG and JSON


@dataclass(frozen=True)
class Found:
    """What was said of one class."""

    name: str
    pixels: int
    mm2: float | None
    components: int
    largest_probability: float

    def as_dict(self) -> dict[str, Any]:
        """The fields by name in JSON."""
        values = asdict(self)
        return {"class": values.pop("name"), **values}


@dataclass(frozen=True)
class Said:
    """A mask in the pixels of its film, and what belongs to it.

    Attributes:
        file: what the user calls the image.
        mask: (H, W) class numbers.
        classes: names, background first.
        largest: (K - 1,) the highest probability of each class but the background.
        model: digest of the model.
        thresholds: of the classes but the background; None: the most probable was said.
        spacing_mm: of the film's pixels.
        sop_uid: SOPInstanceUID of the user's DICOM file, or nothing.
    """

    file: str
    mask: NDArray[np.uint8]
    classes: tuple[str, ...]
    largest: tuple[float, ...]
    model: str
    thresholds: tuple[float, ...] | None = None
    spacing_mm: float | None = None
    sop_uid: str = ""

    @cached_property
    def found(self) -> tuple[Found, ...]:
        """Of each class but the background."""
        return tuple(self._found())

    @property
    def anything(self) -> bool:
        """Whether any class but the background was said."""
        return bool(self.mask.any())

    @property
    def values(self) -> dict[str, int]:
        """What the PNG holds for each class."""
        numbers = (0, 255) if len(self.classes) == 2 else range(len(self.classes))
        return dict(zip(self.classes, numbers, strict=True))

    def _found(self) -> Iterator[Found]:
        for number, (name, largest) in enumerate(zip(self.classes[1:], self.largest, strict=True), 1):
            here = self.mask == number
            pixels = int(here.sum())
            mm2 = None if self.spacing_mm is None else round(pixels * self.spacing_mm**2, 3)
            yield Found(name, pixels, mm2, ndimage.label(here, TOUCHING)[1], round(largest, 6))


# ---------------------------------------------------------------------------------------------- back to the film


def geometry_of(sample: Sample) -> Geometry:
    """How a sample came out of its film; of one that does not tell, the way that changes nothing."""
    told: Mapping[str, Any] | None = sample.meta.get("geometry")
    height, width = sample.pixels.shape[:2]
    return Geometry.from_dict(told) if told else Geometry.whole(height, width)


def film_spacing(sample: Sample) -> float | None:
    """Millimetres a pixel of the film that a sample came out of, as far as the sample tells."""
    stored, geometry = sample.meta.get("spacing_mm"), geometry_of(sample)
    if not stored:
        return None
    factor = math.sqrt(math.prod(geometry.shape) / math.prod(geometry.box))
    return float(stored) if factor == 1 else round(float(stored) * factor, 6)


def restored(probabilities: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    """(K, H, W) of the film; what was cut away from it is background."""
    film = np.moveaxis(geometry.restore(np.moveaxis(probabilities[1:], 0, -1)), -1, 0)
    return np.concatenate([1 - film.sum(axis=0, keepdims=True), film]).astype(np.float32)


# ---------------------------------------------------------------------------------------------- files


def refuse_formats(formats: Sequence[str]) -> None:
    """Raises: UserError: a format is not known."""
    for name in formats:
        if name not in SUFFIXES:
            raise UserError(f"--format {name} is not known{did_you_mean(name, [*SUFFIXES])}")


def names_of(stem: str, formats: Sequence[str]) -> list[str]:
    """What is written of a mask."""
    return [f"{stem}{suffix}" for suffix in (".png", ".json", *(SUFFIXES[name] for name in dict.fromkeys(formats)))]


def write_mask(folder: Path, stem: str, said: Said, formats: Sequence[str] = (), source: Path | None = None) -> None:
    """Write a mask; the PNG comes last, so that the rest is there where it is.

    Args:
        folder: made if it is not there.
        stem: of the files' names.
        said: the mask.
        formats: of SUFFIXES, beside PNG and JSON.
        source: the DICOM file that was segmented.

    Raises:
        UserError: a DICOM-SEG cannot be made of the source.
    """
    if DICOM_SEG in formats:
        assert source is not None, "a DICOM-SEG has a source"
        encoded = encode_seg(source, said.mask, said.classes, said.model)
        write_atomic(folder / f"{stem}{SUFFIXES[DICOM_SEG]}", encoded)
    if NIFTI in formats:
        write_atomic(folder / f"{stem}{SUFFIXES[NIFTI]}", encode_nifti(said.mask, said.spacing_mm))
    write_json(folder / f"{stem}.json", MASK, described(said))
    levels = np.array([*said.values.values()], np.uint8)
    write_atomic(folder / f"{stem}.png", encode_png(levels[said.mask]))


def described(said: Said) -> dict[str, Any]:
    """What the JSON holds."""
    height, width = said.mask.shape
    return {
        "file": said.file,
        "model": said.model,
        "classes": said.classes,
        "values": said.values,
        "thresholds": said.thresholds,
        "height": height,
        "width": width,
        "spacing_mm": said.spacing_mm,
        "found": [found.as_dict() for found in said.found],
        "sop_instance_uid": said.sop_uid or None,
    }


def encode_nifti(mask: NDArray[np.uint8], spacing_mm: float | None) -> bytes:
    """(H, W) class numbers as the bytes of a .nii.gz; of an unknown spacing, pixels are 1 wide and no unit is given."""
    side, nifti = spacing_mm or 1.0, cast(Any, nib.Nifti1Image)  # nibabel has no types of it
    image = nifti(np.ascontiguousarray(mask.T[..., None]), np.diag([-side, -side, 1.0, 1.0]))
    image.header.set_xyzt_units("mm" if spacing_mm else "unknown")
    image.header["descrip"] = b"mask" if spacing_mm else b"mask, spacing unknown"
    for set_form in (image.set_qform, image.set_sform):
        set_form(image.affine, code=1)
    return gzip.compress(image.to_bytes(), 6, mtime=0)
