"""A mask as DICOM Segmentation, beside the image that it is of.

source: patient and study, SOPInstanceUID      patient's name and id are copied: it goes where the source came from
    -> Segmentation Storage, BINARY            one frame a class but the background, empty ones too, as large as the
                                               source's, pixel on pixel; 1 bit a pixel

A mammogram has no place in the patient's space: often it lacks a FrameOfReferenceUID, and it never needs one (PS3.3
A.26). The frames refer to the source image instead, with SpatialLocationsPreserved. A size of pixels is not written,
as a segmentation may only give one together with a slice thickness, which a projection has none of; the source has it.

highdicom is an extra: pip install 'miram[dicom-seg]'. Legend: H W of an image.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from ...data.dicom.pixels import guarded, read_dataset_of
from ...data.dicom.reader import is_dicom
from ...data.image import UnreadableImage
from ...engine.errors import UserError
from ...version import __version__

NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
MAY_BE_EMPTY = (  # but have to be there (PS3.3 C.7.1.1, C.7.2.1), and are not, of many an anonymised file
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)
IN_SPACE = ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "ImagePositionPatient", "ImageOrientationPatient")
LONGEST = 64  # characters of a name (LO)
INSTEAD = "leave out --format dicom-seg"


def refuse_source(path: Path, classes: Sequence[str]) -> None:
    """Make sure that a DICOM-SEG can be made of a file, before hours are spent on its mask.

    Raises:
        UserError: highdicom is not installed, the file is no DICOM, or its header does not allow it.
    """
    source = read_source(path)
    source.Rows = source.Columns = 8
    encoded(path, source, np.zeros((8, 8), np.uint8), classes, "")


def encode_seg(path: Path, mask: NDArray[np.uint8], classes: Sequence[str], model: str) -> bytes:
    """A DICOM-SEG file.

    Args:
        path: the DICOM file that was segmented.
        mask: (H, W) class numbers, 0 the background.
        classes: names, background first.
        model: its digest.

    Raises:
        UserError: as `refuse_source`.
    """
    return encoded(path, read_source(path), mask, classes, model)


def read_source(path: Path) -> Dataset:
    """The header that a segmentation refers to, with all that highdicom asks for.

    Raises:
        UserError: it is no DICOM file, or does not say which image it is.
    """
    if not is_dicom(path):
        raise UserError(f"{path} is no DICOM file, and a DICOM-SEG refers to one; {INSTEAD}, or name DICOM files alone")
    try:
        with guarded("header"):
            source = read_dataset_of(path, pixels=False)
            lacking = [keyword for keyword in NEEDED if not source.get(keyword)]
    except UnreadableImage as error:
        raise UserError(f"{path}: {error}; {INSTEAD}") from error
    if lacking:
        raise UserError(f"{path} has no {', '.join(lacking)}, by which a DICOM-SEG refers to its image; {INSTEAD}")
    for keyword in IN_SPACE:
        if keyword in source:
            delattr(source, keyword)
    for keyword in MAY_BE_EMPTY:
        if keyword not in source:
            setattr(source, keyword, None)
    return source


def encoded(path: Path, source: Dataset, mask: NDArray[np.uint8], classes: Sequence[str], model: str) -> bytes:
    """The file's bytes.

    Raises:
        UserError: highdicom is not installed, or refuses the header.
    """
    hd = highdicom()
    assert mask.shape == (source.Rows, source.Columns), "a mask is as large as its image"
    try:
        with guarded("header"):
            made = hd.seg.Segmentation(
                source_images=[source],
                pixel_array=mask,
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=[segment(number, name) for number, name in enumerate(classes[1:], 1)],
                series_instance_uid=hd.UID(),
                series_number=1,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="miram",
                manufacturer_model_name="miram segment",
                software_versions=__version__,
                device_serial_number=model[:LONGEST] or "none",
                content_label="SEGMENTATION",
                content_description="Said by a model",
                series_description="Segmentation by miram",
                omit_empty_frames=False,
            )
            buffer = io.BytesIO()
            made.save_as(buffer)
    except UnreadableImage as error:
        raise UserError(f"{path}: no DICOM-SEG can be made of its header ({why(error)}); {INSTEAD}") from error
    return buffer.getvalue()


def why(error: UnreadableImage) -> str:
    """What highdicom complains of, where its words cannot quote the header."""
    cause = error.__cause__
    text = str(cause)
    return "it needs a FrameOfReferenceUID" if "Frame Of Reference" in text else type(cause).__name__


def segment(number: int, name: str) -> Any:
    """What a class is: a lesion where it is called so, else a tissue that a code of our own names."""
    hd, codes = highdicom(), code_lists()
    lesion = name == "lesion"
    category = codes.SCT.MorphologicallyAbnormalStructure if lesion else codes.SCT.Tissue
    short = name.replace("\\", "/")[:LONGEST]
    kind = codes.SCT.Lesion if lesion else hd.sr.CodedConcept(str(number), "99MIRAM", short)
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=short,
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="miram", family=codes.cid7162.ArtificialIntelligence, version=__version__
        ),
    )


@cache
def highdicom() -> Any:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise UserError(
            "a DICOM-SEG needs highdicom, which is not installed: pip install 'miram[dicom-seg]', or "
            "leave out --format dicom-seg"
        ) from error
    return highdicom


def code_lists() -> Any:
    """DICOM's own codes."""
    from pydicom.sr.codedict import codes

    return codes
