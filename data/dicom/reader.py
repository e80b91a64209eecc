"""Mammograms in DICOM files, in the order that the standard asks for.

    header -> refusals -> stored integers -> modality -> VOI -> inversion -> padding to 0 -> Film
              (here)      (pixels.py)        (voi.py: one table from stored integers to grey)

What leaves a file is pixels, a spacing and facts of closed lists; a reason never quotes the header.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydicom.dataset import Dataset

from ..image import UnreadableImage
from ..record import Film
from .decoder import decoder
from .pixels import Layout, codes_of, guarded, read_dataset_of, uncompressed
from .voi import grey, numbers, text

VIEWS = {
    # SNOMED CT and RT codes of PS3.16 CID 4014: the name that ViewPosition would have.
    "CC": ("399162004", "R-10242"),
    "MLO": ("399368009", "R-10226"),
    "ML": ("399260004", "R-10224"),
    "LM": ("399352003", "R-10228"),
    "LMO": ("399099002", "R-10230"),
    "FB": ("399196006", "R-10244"),
    "SIO": ("399188001", "R-102D0"),
    "ISO": ("441555000", "R-40AAA"),
    "XCCL": ("399192008", "R-1024A"),
    "XCCM": ("399101009", "R-1024B"),
    "XCC": ("R-102CF",),
    "AT": (),
    "CV": (),
}
MANUFACTURERS = {
    # How a word of the name begins, `$` where it ends there, too -> what is kept of it. The first that fits counts.
    "HOLOGIC": "hologic",
    "LORAD": "hologic",
    "GE$": "ge",
    "GEMS$": "ge",
    "GENERAL ELECTRIC": "ge",
    "SIEMENS": "siemens",
    "FUJI": "fuji",
    "PHILIPS": "philips",
    "SECTRA": "philips",
    "PLANMED": "planmed",
    "IMS$": "ims",
    "GIOTTO": "giotto",
    "CARESTREAM": "carestream",
    "KODAK": "carestream",
    "AGFA": "agfa",
    "KONICA": "konica",
    "METALTRONICA": "metaltronica",
}
TOMOSYNTHESIS = ("1.2.840.10008.5.1.4.1.1.13.1.3", "1.2.840.10008.5.1.4.1.1.13.1.4", "1.2.840.10008.5.1.4.1.1.13.1.5")
FOR_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.2.1"
FOR_PRESENTATION = "1.2.840.10008.5.1.4.1.1.1.2"
SPACING = (0.01, 1.0)  # millimetres a pixel that a mammogram may have
ANISOTROPY = 0.01  # the most by which a pixel's two sides may differ


@dataclass(frozen=True, kw_only=True)
class DicomOptions:
    """What of an archive's DICOM files is taken, and how."""

    for_processing: bool = False
    """take raw FOR PROCESSING images too"""
    any_modality: bool = False
    """take other modalities than MG: scanned films say RG, SC, …"""
    implants: bool = True
    """False leaves out breasts with an implant, as far as the header says"""
    burned_in: bool = False
    """take images with text on the breast"""
    voi: Literal["auto", "window", "none"] = "auto"
    """the file's lookup table, else its window; its window only; neither"""
    voi_index: int = 0
    """which of several of them; the first where a file has fewer"""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What an archive's source may ask of a file. The ids are its own: they are hashed before anything is written."""

    patient_id: str
    study_uid: str
    series_uid: str
    sop_uid: str
    laterality: str  # "L", "R" or unknown
    view: str  # a key of VIEWS, or unknown
    modality: str
    rows: int  # 0 where it holds no image
    columns: int
    spacing_mm: float | None


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: it says so, or begins like a data set that lacks the preamble. Never raises."""
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    if start[128:] == b"DICM":
        return True
    # Group 2 or 8, in either byte order, then a type in two capitals or, without one, a short length.
    little, big = start[:2] in (b"\2\0", b"\10\0"), start[:2] in (b"\0\2", b"\0\10")
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    short = start[6:8] == b"\0\0" and start[5:6] == b"\0"
    return len(start) >= 12 and ((little and (explicit or short)) or (big and explicit))


def read_header(path: Path) -> Header:
    """What the header of a DICOM file says, pixels left alone.

    Raises:
        UnreadableImage: it cannot be read.
    """
    with guarded("header"):
        header = read_dataset_of(path, pixels=False)
        rows, columns = (int((numbers(header, keyword) or [0])[0]) for keyword in ("Rows", "Columns"))
        ids = [str(header.get(keyword) or "").strip() for keyword in ("PatientID", "StudyInstanceUID")]
        ids += [str(header.get(keyword) or "").strip() for keyword in ("SeriesInstanceUID", "SOPInstanceUID")]
        return Header(
            patient_id=ids[0],
            study_uid=ids[1],
            series_uid=ids[2],
            sop_uid=ids[3],
            laterality=_laterality(header),
            view=_view(header),
            modality=text(header, "Modality"),
            rows=rows,
            columns=columns,
            spacing_mm=_spacing(header),
        )


def read_dicom(path: Path, options: DicomOptions, *, spacing_mm: float | None = None) -> Film:
    """The film in a DICOM file. A spacing given here wins over the file's own.

    Raises:
        UnreadableImage: it cannot be decoded, or is an image that the options leave out; says why.
    """
    with guarded("header"):
        header = read_dataset_of(path, pixels=False)
        for refused, reason in _refusals(header, options):
            if refused:
                raise UnreadableImage(reason)
        layout = Layout.of(header)
        how: Any = {"signed": layout.signed, "voi": options.voi, "index": options.voi_index}
        shade = grey(header, layout.bits, **how)  # before the pixels, which take long
        facts = _facts(header) | {"voi": shade.voi}
        spacing = spacing_mm or _spacing(header)
    with guarded("pixels"):
        syntax = header.file_meta.TransferSyntaxUID
        if syntax.is_private or syntax.name == syntax:
            raise UnreadableImage("its transfer syntax is not of the standard")
        decode = decoder.decode if syntax.is_encapsulated else uncompressed
        codes = codes_of(decode(path, layout), layout, syntax)
        if layout.signed and not codes.max() >> (layout.bits - 1):
            shade = grey(header, layout.bits, negative=False, **how)
    return Film(pixels=shade.table[codes], max_value=shade.max_value, spacing_mm=spacing, facts=facts)


def _refusals(header: Dataset, options: DicomOptions) -> Iterator[tuple[bool, str]]:
    """Whether the image is one to leave out, and why; in the order in which a user would like to hear of it."""
    kind = [str(value).strip().upper() for value in _several(header, "ImageType")]
    intent, sop = _presentation(header), text(header, "SOPClassUID")
    film = options.any_modality
    nothing = not {"SOPClassUID", "Modality", "Rows"} & set(header.dir())
    yield nothing, "its header says nothing of an image, so it is damaged or no DICOM file; get it again"
    yield not film and text(header, "Modality") != "MG", "its modality is not MG; --any-modality takes it"
    yield sop in TOMOSYNTHESIS, "it is of a tomosynthesis"
    yield any(value != 1 for value in numbers(header, "NumberOfFrames")), "it has several frames"
    yield any("TOMO" in value or value == "GENERATED_2D" for value in kind), "it is computed from a tomosynthesis"
    raw = intent == "FOR PROCESSING" and not options.for_processing
    yield raw, "it is raw (FOR PROCESSING); --for-processing takes it"
    yield "SECONDARY" in kind[1:2] and not film, "it is a secondary image, such as a screen; --any-modality takes it"
    yield any("SCREEN" in value or value == "LOCALIZER" for value in kind), "it is a picture of a screen"
    control = "YES" in (text(header, "QualityControlImage"), text(header, "CalibrationImage"))
    yield control, "it is a quality-control image"
    yield text(header, "BreastImplantPresent") == "YES" and not options.implants, "it shows an implant"
    colour = any(value != 1 for value in numbers(header, "SamplesPerPixel"))
    photometric = text(header, "PhotometricInterpretation")
    yield colour or photometric not in ("MONOCHROME1", "MONOCHROME2"), "it is in colour, or does not say it is not"
    burned = text(header, "BurnedInAnnotation") == "YES" and not options.burned_in
    yield burned, "quarantined: its header says that text is burned in; --burned-in takes it"


def _several(header: Dataset, keyword: str) -> list[object]:
    value = header.get(keyword)
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _presentation(header: Dataset) -> str:
    """What the image was made for: FOR PRESENTATION, FOR PROCESSING, or unknown."""
    classes = {FOR_PROCESSING: "FOR PROCESSING", FOR_PRESENTATION: "FOR PRESENTATION"}
    intent = text(header, "PresentationIntentType")
    said = {intent, classes.get(text(header, "SOPClassUID"), "")}
    return next((known for known in ("FOR PROCESSING", "FOR PRESENTATION") if known in said), "")


def _facts(header: Dataset) -> dict[str, str]:
    name = text(header, "Manufacturer")
    parts = {part.replace("$", r"\b"): maker for part, maker in MANUFACTURERS.items()}
    maker = next((maker for part, maker in parts.items() if re.search(rf"\b{part}", name)), "other" if name else "")
    return {
        "photometric": text(header, "PhotometricInterpretation"),
        "presentation": _presentation(header),
        "manufacturer": maker,
    }


def _laterality(header: Dataset) -> str:
    side = text(header, "ImageLaterality") or text(header, "Laterality")
    return side if side in ("L", "R") else ""


def _view(header: Dataset) -> str:
    position = text(header, "ViewPosition")
    if position in VIEWS:
        return position
    codes = {text(item, "CodeValue") for item in header.get("ViewCodeSequence") or []}
    return next((view for view, known in VIEWS.items() if codes.intersection(known)), "")


def _spacing(header: Dataset) -> float | None:
    """Millimetres a pixel in the breast's plane, where the header is to be believed.

    Of a film that was scanned, the scanner's; of a detector, its own over the magnification (PS3.3 10.7.1.3).
    """
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        try:
            sides = numbers(header, keyword)
            enlarged = (numbers(header, "EstimatedRadiographicMagnificationFactor") or [1.0])[0]
        except UnreadableImage:
            continue
        if len(sides) != 2:
            continue
        if max(sides) - min(sides) > ANISOTROPY * max(sides):
            return None
        by = enlarged if keyword == "ImagerPixelSpacing" and 1 <= enlarged <= 3 else 1.0
        spacing = (sides[0] + sides[1]) / 2 / by
        return spacing if SPACING[0] <= spacing <= SPACING[1] else None
    return None
