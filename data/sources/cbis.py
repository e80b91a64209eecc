"""CBIS-DDSM (Lee et al. 2017, TCIA, CC BY 3.0): 3,568 abnormalities on 3,032 films of 1,566 patients, scanned.

    SRC/CBIS-DDSM/Mass-Training_P_00001_LEFT_CC/<date-study>/<series>/1-1.dcm     the film
    SRC/CBIS-DDSM/Mass-Training_P_00001_LEFT_CC_1/<date-study>/<series>/1-1.dcm   crop and mask of abnormality 1,
    SRC/CBIS-DDSM/Mass-Training_P_00001_LEFT_CC_1/<date-study>/<series>/1-2.dcm   in one series or two, in any order
    SRC/…/mass_case_description_train_set.csv …                                   four tables, or in the folder --labels

What lies between the first folder and the file does not matter, so the older `<folder>/<uid>/<uid>/000000.dcm` and PNG
or JPEG copies that keep the folders' names are read, too, as are copies sorted by series UID. Which file is the mask is
seen in its pixels alone: it has two values and the film's shape; a crop has many. 71 films are in the mass and in the
calc tables, under two names: each is one film here. Patients are P_00001 …, not DICOM's PatientID (one an image).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import UserError
from ..archive import Archive, SourceOptions
from ..dicom.reader import DicomOptions
from ..geometry import nearest
from ..image import UnreadableImage, stamp
from ..reading import is_image, read_file, walk_files
from ..record import Film, Pixels, Record, Region
from .cbis_tables import PARTS, Finding, labels, read_tables

LICENCE = "CC BY 3.0"
ASPECT = 0.01  # by so much of its height to width a mask may differ from its film
SCALE = 2.0  # a two-valued image further from the film's size is no mask of it
LOSSY = 0.01  # of a JPEG's pixels: so many lie between the mask's two values
Mask = NDArray[np.bool_]
Files = Mapping[str, Sequence[Path]]
Group = Sequence[Finding]  # what a record shows: the abnormalities of a film, or one alone


def read(src: Path, options: SourceOptions) -> Archive:
    """The films that are there with the masks of all abnormalities, or a square around each of these.

    Raises:
        UserError: tables or films are missing altogether, or a table is not as published.
    """
    options.only("cbis-ddsm", "labels", "level", "margin", "disjoint", "dicom")
    if not 0 <= options.margin <= 10:
        raise UserError(f"--margin is {options.margin}; it must lie between 0 and 10 sides of the square")
    findings = read_tables(options.labels or src)
    files = find_files(src, findings)
    image = options.level == "image"
    groups = films_of(findings) if image else [[finding] for finding in findings]
    there = [group for group in groups if film_of(group, files) and (image or masks_of(group[0], files))]
    if not there:
        raise UserError(
            f"{src} holds none of the {len(groups)} {'films' if image else 'abnormalities with film and mask'} that "
            f"the tables name; name the folder above those called like {findings[0].film} and {findings[0].mask}"
        )
    splits = Splits(findings, options.disjoint)
    return Archive(
        dataset="cbis-ddsm",
        licence=LICENCE,
        records=[record(group, files, splits.of(group), options) for group in there],
        breast=image,
        notes=tuple(notes(groups, there, files, splits, image=image)),
        absent=tuple(absent(groups, files, image=image)),
        settings={"level": options.level, "disjoint": options.disjoint} | ({} if image else {"margin": options.margin}),
    )


# ---------------------------------------------------------------------------------------------- files


def find_files(src: Path, findings: Sequence[Finding]) -> Files:
    """The image files below every folder that carries the name of a film, a mask or a series of the tables."""
    wanted = {name for f in findings for name in (f.film, f.mask, f.film_series, *f.mask_series)} - {""}
    found: dict[str, list[Path]] = defaultdict(list)
    for path in walk_files(src):
        places = wanted.intersection(path.relative_to(src).parent.parts)
        if places and is_image(path):
            for place in places:
                found[place].append(path)
    return found


def film_of(group: Group, files: Files) -> Path | None:
    """The film's file, under the first of its names that is there."""
    names = (name for f in group for name in (f.film, f.film_series))
    return next((files[name][0] for name in names if name in files), None)


def masks_of(finding: Finding, files: Files) -> tuple[Path, ...]:
    """The files one of which is the abnormality's mask."""
    return tuple(dict.fromkeys(path for name in (finding.mask, *finding.mask_series) for path in files.get(name, ())))


# ---------------------------------------------------------------------------------------------- records


def films_of(findings: Sequence[Finding]) -> list[Group]:
    """Abnormalities by film, whichever table they stand in."""
    return [list(group) for _, group in groupby(findings, key=lambda finding: finding.film_key)]


class Splits:
    """The official split, made one of films or of patients where it is not."""

    def __init__(self, findings: Sequence[Finding], disjoint: bool):
        test = {f.patient for f in findings if f.split == "test"}
        self.leaking = test & {f.patient for f in findings if f.split == "train"}
        self.moved = self.leaking if disjoint else set()

    def of(self, group: Group) -> str:
        """The split of a film or an abnormality: test as soon as one table says so."""
        return "test" if group[0].patient in self.moved or any(f.split == "test" for f in group) else "train"


def record(group: Group, files: Files, split: str, options: SourceOptions) -> Record:
    """The record of a film, or of an abnormality."""
    first, image = group[0], options.level == "image"
    film, masks = film_of(group, files), tuple(masks_of(finding, files) for finding in group)
    assert film is not None
    # Scans of films: their modality is not always MG, and what window they carry means nothing.
    dicom = replace(options.dicom, any_modality=True, voi="none")
    name = first.film_key if image else first.mask
    return Record(
        read=partial(read_image, film, masks, dicom)
        if image
        else partial(read_roi, film, masks[0], options.margin, dicom),
        name=name,
        image_id=name,
        patient_id=first.patient,
        laterality=first.side[0],
        view=first.view,
        split=split,
        stamp=", ".join(stamp(path) for path in dict.fromkeys((film, *(path for paths in masks for path in paths)))),
        labels=labels(group),
    )


def absent(groups: Sequence[Group], files: Files, *, image: bool) -> Iterator[str]:
    """The films without a file and the masks without one, or the abnormalities that lack either."""
    for group in groups:
        bare = [finding.mask for finding in group if not masks_of(finding, files)]
        if film_of(group, files):
            yield from bare
        else:
            yield group[0].film_key if image else group[0].mask


def notes(
    groups: Sequence[Group], there: Sequence[Group], files: Files, splits: Splits, *, image: bool
) -> Iterator[str]:
    """What is missing, what was joined, who leaks."""
    parts = {(finding.kind, finding.split) for group in groups for finding in group}
    if lacking := [" ".join(part) for part in PARTS if part not in parts]:
        yield f"there is no table of {', '.join(lacking)}: what only stands there is unknown, patients in test included"
    if gone := len(groups) - len(there):
        what = "films are" if image else "abnormalities lack film or mask"
        yield f"{gone} of the tables' {len(groups)} {what} {'not ' if image else ''}on disk and were left out"
    if bare := sum(not masks_of(finding, files) for group in there for finding in group):
        yield f"{bare} abnormalities have no mask on disk; their films were kept, and do not show them in their masks"
    if twice := sum(len({finding.kind for finding in group}) > 1 for group in there):
        yield f"{twice} films are in the mass and in the calc tables; each is one film here"
    if both := sum(len({finding.split for finding in group}) > 1 for group in there):
        yield f"{both} films are in the official train and in test; they are in test here"
    yield from leak(there, splits)


def leak(there: Sequence[Group], splits: Splits) -> Iterator[str]:
    """How many patients are on both sides, and what became of them or can be done."""
    official = f"{len(splits.leaking)} patients are in the official train and in test"
    if splits.moved:
        yield f"{official}; all of their images are in test here"
    elif splits.leaking:
        sides = Counter(patient for patient, _ in {(group[0].patient, splits.of(group)) for group in there})
        still = sum(count > 1 for count in sides.values())
        yield f"{official}, {still} of them in both with what is here: --disjoint mends it, as does `miram data split`"


# ---------------------------------------------------------------------------------------------- pixels


def read_image(path: Path, masks: Sequence[Sequence[Path]], dicom: DicomOptions) -> Film:
    """The film with its abnormalities: the k-th has the value k in the mask, the smaller of two that overlap wins.

    The mask is None where none could be used; `facts` say so where some could not.

    Raises:
        UnreadableImage: the film cannot be decoded.
    """
    film = read_file(path, dicom)
    found: dict[int, Mask] = {}
    for number, paths in enumerate(masks, start=1):
        try:
            found[number] = find_mask(paths, film.pixels, dicom)
        except UnreadableImage:
            continue
    if len(found) < len(masks):
        film = replace(film, facts={**film.facts, "masks": "incomplete" if found else "none"})
    return replace(film, mask=paint(found, film.pixels.shape[:2]) if found else None, mask_kind="instances")


def paint(found: Mapping[int, Mask], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Masks (H, W) by number -> one image of their numbers, large ones first."""
    union = np.zeros(shape, np.uint8)
    for number in sorted(found, key=lambda n: -np.count_nonzero(found[n])):
        union[found[number]] = number
    return union


def read_roi(path: Path, masks: Sequence[Path], margin: float, dicom: DicomOptions) -> Film:
    """The film with the mask of one abnormality, and the square around it as its region.

    Raises:
        UnreadableImage: the film cannot be decoded, or no file is its mask.
    """
    film = read_file(path, dicom)
    mask = find_mask(masks, film.pixels, dicom)
    return replace(film, mask=mask.astype(np.uint8), mask_kind="instances", region=square(mask, margin))


def square(mask: Mask, margin: float) -> Region:
    """The square centred on the box around a mask: its side is the longer one of the box, and a margin on each side."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    side = round(max(height, width) * (1 + 2 * margin))
    top, left = int(rows[0]) + (height - side) // 2, int(columns[0]) + (width - side) // 2
    return Region(top=top, left=left, bottom=top + side, right=left + side)


def find_mask(paths: Sequence[Path], pixels: Pixels, dicom: DicomOptions) -> Mask:
    """The abnormality's mask among its files, at the film's size (H, W).

    Raises:
        UnreadableImage: no file is a mask, or it has another shape than the film.
    """
    masks = [mask for path in paths if (mask := as_mask(path, dicom)) is not None]
    if not masks:
        raise UnreadableImage("none of the abnormality's files is a mask (an image with two values)")
    return fit(max(masks, key=lambda mask: mask.size), (pixels.shape[0], pixels.shape[1]))


def as_mask(path: Path, dicom: DicomOptions) -> Mask | None:
    """The upper one of the two values of an image, or None for anything but such an image."""
    try:
        pixels = read_file(path, replace(dicom, burned_in=True)).pixels  # no grey level of it is kept
    except UnreadableImage:
        return None
    low, high = int(pixels.min()), int(pixels.max())
    # JPEG blurs a mask's edge. Elsewhere that excuse would take a dark crop with a bright calcification for a mask.
    slack, strays = ((high - low) // 8, LOSSY) if path.suffix.lower() in (".jpg", ".jpeg") else (0, 0.0)
    between = np.count_nonzero((pixels > low + slack) & (pixels < high - slack))
    return pixels > (low + high) // 2 if low < high and between <= strays * pixels.size else None


def fit(mask: Mask, shape: tuple[int, int]) -> Mask:
    """A mask (h, w) at its film's size (H, W): the nearest of its pixels each. Some were drawn on smaller scans.

    Raises:
        UnreadableImage: its shape differs by more than rounding explains, or it shows nothing at that size.
    """
    scale = shape[0] / mask.shape[0], shape[1] / mask.shape[1]
    if abs(scale[0] / scale[1] - 1) > ASPECT or not 1 / SCALE <= scale[0] <= SCALE:
        raise UnreadableImage(
            f"the abnormality's mask has {mask.shape[1]} x {mask.shape[0]} pixels, the film {shape[1]} x {shape[0]}"
        )
    fitted: Mask = mask if mask.shape == shape else nearest(mask, shape)
    if not fitted.any():
        raise UnreadableImage("the abnormality's mask is empty at the film's size")
    return fitted
