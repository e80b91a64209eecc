"""`miram predict` with a segmentation model: a user's own films in, masks out, each in the pixels of its film.

MASKS/STEM-mask.png, .json, …   a mask an image (writing.py); MASKS/masks.csv says whose they are (../pictures.py)
PICTURES/STEM-overlay.png       the image with outlines of what was said, where pictures are asked for
FILE.csv                        file, said, and of each class pixels_CLASS, mm2_CLASS, components_CLASS, p_CLASS (the
                                highest probability); threshold, mask, model: one row an image

Images are read, judged and written one by one. Legend: K classes with background as class 0.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...data.dicom.reader import is_dicom, read_header
from ...data.record import Film
from ...data.shards import Sample
from ...data.table import Row
from ...engine.errors import RunFailed, UserError
from ...engine.files import make_folder, write_atomic
from ...engine.track import Meter
from ..films import Images, Taking, say, taken
from ..pictures import MASK, OVERLAY, Kind, claim, names_for
from .dicom_seg import refuse_source
from .locked import SegmentCard, Segmenter, read_segmenter
from .overlay import draw_overlay
from .writing import DICOM_SEG, Said, film_spacing, geometry_of, names_of, refuse_formats, restored, write_mask

APART = 1.5  # how many times larger or smaller an image may look


@dataclass
class Judged:
    """One image that is to be judged."""

    images: Images
    row: int
    stem: str = ""  # of its mask's files
    picture: str = ""

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.images.names[self.row]

    @property
    def path(self) -> Path | None:
        """The user's file; None of a data set's image."""
        return Path(self.name) if self.images.records else None


def predict(
    run: str | Path,
    images: Sequence[str],
    masks: Path,
    formats: Sequence[str] = (),
    out: Path | None = None,
    pictures: Path | None = None,
    encoder: str | None = None,
    batch_size: int = 8,
    taking: Taking = Taking(),
) -> None:
    """Segment images with the model of a run; print a CSV, or write one.

    Args:
        run: of `miram segment`.
        images: DICOM files or pictures, folders of them, data sets.
        masks: folder for the masks: a PNG and a JSON an image.
        formats: what is written beside them: nifti, dicom-seg.
        out: .csv to write; None: print.
        pictures: folder for pictures of the images with outlines.
        encoder: where the encoder now lies.
        batch_size: tiles judged at once.
        taking: what of the files is taken, and what they do not say themselves.

    Raises:
        UserError: the run has no sound model, an image is not there, a format is not known or impossible, or a file
            would replace something else.
        RunFailed: none of the images could be used.
    """
    if out is not None and out.suffix != ".csv":
        raise UserError(f"--out {out} must end in .csv; what is known of a mask lies beside it as JSON")
    refuse_formats(formats)
    segmenter = read_segmenter(run, encoder, batch_size)
    with taken(images, segmenter.card, taking) as (found, left_out):
        predict_masks(segmenter, found, left_out, masks, formats, out, pictures)


def predict_masks(
    segmenter: Segmenter,
    found: Sequence[Images],
    left_out: dict[str, str],
    folder: Path,
    formats: Sequence[str] = (),
    out: Path | None = None,
    pictures: Path | None = None,
) -> None:
    """Segment what was taken of the user's images, one by one.

    Raises:
        UserError: images have other channels than the model takes, a DICOM-SEG is asked for and impossible, or a file
            would replace something else.
        RunFailed: none of the images could be used.
    """
    images = [one for some in found for one in usable(segmenter.card, some, left_out)]
    for name, reason in left_out.items():
        say(f"left out {name}: {reason}")
    if not images:
        raise RunFailed(f"none of the {len(left_out)} images could be used; each is listed above with its reason")
    for one in images:
        warn_of_scale(segmenter.card, one)
    if DICOM_SEG in formats:
        refuse_sources(images, segmenter.card.classes)
    name_files(segmenter, images, folder, formats, pictures)
    table = Table(segmenter, out)
    try:
        with Meter("masks", len(images)) if out else nullcontext() as meter:
            for one in images:
                judge(segmenter, one, folder, formats, pictures, table)
                if meter:
                    meter.advance()
    finally:
        table.write()  # pictures may fail, and what was judged is judged


def usable(card: SegmentCard, images: Images, left_out: dict[str, str]) -> Iterator[Judged]:
    """The images that the model can read; those without the resolution that it needs are added to `left_out`.

    Raises:
        UserError: they have other channels than the model takes.
    """
    shards = images.shards
    if shards.channels != card.channels:
        raise UserError(
            f"{', '.join(shards.roots)}: the images have {shards.channels} channels, and the model takes "
            f"{card.channels}; ingest them again with --channels {card.channels}"
        )
    for row, (name, described) in enumerate(zip(images.names, shards.rows, strict=True)):
        if fault := fault_of(card, described):
            left_out[name] = fault
        else:
            yield Judged(images, row)


def fault_of(card: SegmentCard, row: Row) -> str:
    """Why an image cannot be brought to the model's resolution; nothing where it can."""
    spacing = float(row["spacing_mm"]) if row["spacing_mm"] else None
    try:
        card.reading().resolution.raster((int(row["height"]), int(row["width"])), spacing)
    except ValueError as error:
        return str(error)
    return ""


def warn_of_scale(card: SegmentCard, one: Judged) -> None:
    """Say where an image is seen much larger or smaller than those that the model learnt from."""
    row = one.images.shards.rows[one.row]
    spacing = float(row["spacing_mm"]) if row["spacing_mm"] else None
    side = max(card.reading().resolution.raster((int(row["height"]), int(row["width"])), spacing))
    if not card.rasters[0] / APART <= side <= card.rasters[1] * APART:
        say(
            f"{one.name} is {side} pixels long as the model sees it, the images that it learnt from were "
            f"{card.rasters[0]} to {card.rasters[1]}: findings in it are of another size, and the mask may mean nothing"
        )


def refuse_sources(images: Sequence[Judged], classes: Sequence[str]) -> None:
    """Raises: UserError: no DICOM-SEG can be made of one of them."""
    for one in images:
        if one.path is None:
            raise UserError(
                f"{one.name} is of a data set, which holds nothing of DICOM headers, and a DICOM-SEG refers to a DICOM "
                "file; name that file, or leave out --format dicom-seg"
            )
        refuse_source(one.path, classes)


def name_files(
    segmenter: Segmenter, images: Sequence[Judged], folder: Path, formats: Sequence[str], pictures: Path | None
) -> None:
    """Give each image the names of what is written of it, before hours are spent.

    Raises:
        UserError: something would replace what is no earlier one of the same.
    """
    names = [one.name for one in images]
    inputs = [one.path for one in images if one.path is not None]

    def take(kind: Kind, where: Path, files: dict[str, str]) -> None:
        claim(where, files, segmenter.digest, inputs, kind)

    for one, mask, picture in zip(images, names_for(names, MASK), names_for(names, OVERLAY), strict=True):
        one.stem, one.picture = mask.removesuffix(".png"), picture
    take(MASK, folder, {file: one.name for one in images for file in names_of(one.stem, formats)})
    if pictures is not None:
        take(OVERLAY, pictures, {one.picture: one.name for one in images})


# ---------------------------------------------------------------------------------------------- one image


def judge(
    segmenter: Segmenter, one: Judged, folder: Path, formats: Sequence[str], pictures: Path | None, table: Table
) -> None:
    """Segment an image, and write all that is asked for."""
    sample, film = one.images.shards[one.row], one.images.film(one.row)
    probabilities = segmenter.probabilities(sample)
    stored = segmenter.mask(probabilities)
    said = said_of(segmenter, one, sample, film, probabilities, stored)
    write_mask(folder, one.stem, said, formats, one.path)
    table.add(said, f"{one.stem}.png")
    if pictures is not None:
        draw(pictures / one.picture, Path(one.name).name, sample, film, said, stored, probabilities)


def said_of(
    segmenter: Segmenter,
    one: Judged,
    sample: Sample,
    film: Film | None,
    probabilities: NDArray[np.float32],
    stored: NDArray[np.uint8],
) -> Said:
    """The mask in the film's pixels, and what belongs to it."""
    card = segmenter.card
    return Said(
        file=one.name,
        mask=geometry_of(sample).restore(stored),
        classes=card.classes,
        largest=tuple(float(p) for p in probabilities[1:].max(axis=(1, 2))),
        model=segmenter.digest,
        thresholds=card.thresholds,
        spacing_mm=film_spacing(sample) if film is None else film.spacing_mm,
        sop_uid=read_header(one.path).sop_uid if one.path is not None and is_dicom(one.path) else "",
    )


def draw(
    path: Path,
    title: str,
    sample: Sample,
    film: Film | None,
    said: Said,
    stored: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
) -> None:
    """The picture of a mask on its film, or where that is not at hand on what is stored of it."""
    if film is None:
        pixels, most, mask = np.asarray(sample.pixels), sample.max_value, stored
    else:
        pixels, most, mask = film.pixels, film.max_value, said.mask
        probabilities = restored(probabilities, geometry_of(sample))
    draw_overlay(path, pixels, most, None, mask, said.classes, title, probabilities=probabilities)


class Table:
    """The CSV: printed row by row, or written at the end."""

    def __init__(self, segmenter: Segmenter, out: Path | None):
        self.out, self._lines = out, list[str]()
        card = segmenter.card
        self._thresholds = "|".join(f"{t:.6g}" for t in card.thresholds or ())
        columns = (f"{what}_{name}" for name in card.classes[1:] for what in ("pixels", "mm2", "components", "p"))
        self._add(["file", "said", *columns, "threshold", "mask", "model"])

    def add(self, said: Said, mask: str) -> None:
        """One image's row."""
        cells: list[object] = [said.file, "yes" if said.anything else "no"]
        for one in said.found:
            area = "" if one.mm2 is None else f"{one.mm2:.2f}"
            cells += [one.pixels, area, one.components, f"{one.largest_probability:.6f}"]
        self._add([*cells, self._thresholds, mask, said.model])

    def write(self) -> None:
        """Write the file, if there is one."""
        if self.out is not None:
            make_folder(self.out.parent)
            write_atomic(self.out, "".join(self._lines))
            print(f"wrote {self.out}: {len(self._lines) - 1} images", file=sys.stderr)

    def _add(self, cells: Sequence[object]) -> None:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow(cells)
        self._lines.append(buffer.getvalue())
        if self.out is None:
            print(buffer.getvalue(), end="", flush=True)
