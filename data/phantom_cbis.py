"""Phantom lesions laid out on disk as CBIS-DDSM's are, for when that archive is not at hand.

    FOLDER/mass_case_description_train_set.csv …                 the four tables
    FOLDER/films/Mass-Training_P_00001_LEFT_CC/film.png          a film, under one name for each kind of its lesions
    FOLDER/films/Mass-Training_P_00001_LEFT_CC_1/mask.png        one lesion on it, and crop.png

What a lesion is can be seen: spiculated masses and clusters of many specks are malignant. As in the real archive some
patients are in a training and in a test table.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .archive import SourceOptions
from .ingest import Outcome, ingest
from .phantom import DENSITIES, MAX_VALUE, SIDES, VIEWS, Finding, PhantomSettings, findings, records, render
from .phantom_texture import stream
from .sources import read_archive
from .sources.phantom import KEY

DATASET = "phantom-lesions"
COLUMNS = {
    "mass": ("breast_density", "mass shape", "mass margins"),
    "calc": ("breast density", "calc type", "calc distribution"),
}
PARTS = {"train": "Training", "test": "Test"}
MANY = 13  # specks of a cluster, which has 5 to 20
LEAKING = 10  # one patient in so many has masses in the training tables and calcifications in the test's


@dataclass(frozen=True)
class Lesion:
    """A row of a table."""

    kind: str  # "mass" or "calc"
    part: str  # "train" or "test"
    film: str  # the folder of the film
    number: int  # on its film, from 1, for masses and calcifications apart
    malignant: bool
    density: int

    @property
    def folder(self) -> str:
        """Of its mask and its crop."""
        return f"{self.film}_{self.number}"

    def cells(self) -> list[str]:
        """The row."""
        _, _, patient, side, view = self.film.split("_")
        terms = ("SPICULATED" if self.malignant else "CIRCUMSCRIBED") if self.kind == "mass" else "CLUSTERED"
        pathology = "MALIGNANT" if self.malignant else "BENIGN"
        spelt = {"mass": "mass", "calc": "calcification"}[self.kind]
        first = [f"P_{patient}", str(self.density), side, view, str(self.number), spelt, "N/A", terms]
        files = (f"{self.film}/1/2/film.png", f"{self.folder}/1/2/crop.png", f"{self.folder}/1/2/mask.png")
        return [*first, "4" if self.malignant else "3", pathology, "4", *files]


def make_lesions(shards: Path, patients: int, settings: PhantomSettings, workers: int | None = None) -> Outcome:
    """Write the archive beside the data set, and ingest it as a user would ingest CBIS-DDSM: a sample a lesion.

    Raises:
        UserError: `shards` holds something else.
    """
    folder = shards.with_name(f"{shards.name}.archive")
    write_archive(folder, patients, settings)
    archive = read_archive("cbis-ddsm", folder, SourceOptions(level="roi", disjoint=True))
    named = replace(archive, dataset=DATASET, licence="made by miram, free of rights")
    return ingest(named, shards, KEY, workers)


def write_archive(folder: Path, patients: int, settings: PhantomSettings) -> None:
    """The tables and the films with lesions of that many patients."""
    rows: dict[tuple[str, str], list[Lesion]] = defaultdict(list)
    densities = {record.patient_id: str(record.labels["density"]) for record in records(patients, settings)}
    for patient, density in enumerate(densities.values()):
        for side in SIDES:
            for lesion in breast(folder / "films", patient, side, settings, DENSITIES.index(density) + 1):
                rows[lesion.kind, lesion.part].append(lesion)
    write_tables(folder, rows)


def write_tables(folder: Path, rows: Mapping[tuple[str, str], list[Lesion]]) -> None:
    """The four tables."""
    for kind, (density, *terms) in COLUMNS.items():
        header = ["patient_id", density, "left or right breast", "image view", "abnormality id", "abnormality type"]
        header += [*terms, "assessment", "pathology", "subtlety"]
        header += ["image file path", "cropped image file path", "ROI mask file path"]
        for part in PARTS:
            with (folder / f"{kind}_case_description_{part}_set.csv").open("w", newline="") as file:
                csv.writer(file).writerows([header, *(lesion.cells() for lesion in rows[kind, part])])


def breast(films: Path, patient: int, side: str, settings: PhantomSettings, density: int) -> Iterator[Lesion]:
    """Write the films of a breast that show lesions, and tell these."""
    found = findings(settings, patient, side)
    for view in VIEWS if found else ():
        drawn = render(settings, patient, side, view)
        assert drawn.mask is not None
        for number, finding in enumerate(found, start=1):
            mask = drawn.mask == number
            if not mask.any():
                continue  # beyond the film, or behind another
            part = part_of(patient, finding.label)
            film = (
                f"{finding.label.title()}-{PARTS[part]}_P_{patient + 1:05d}_{'LEFT' if side == 'L' else 'RIGHT'}_{view}"
            )
            lesion = Lesion(finding.label, part, film, 1, is_malignant(finding), density)
            write_lesion(films, lesion, drawn.pixels, mask)
            yield lesion


def part_of(patient: int, kind: str) -> str:
    """A third of the patients are test patients."""
    if patient % LEAKING == LEAKING - 1:
        return "train" if kind == "mass" else "test"
    return "test" if patient % 3 == 2 else "train"


def is_malignant(finding: Finding) -> bool:
    """Whether a mass has spicules or a cluster many specks: the first that is drawn of either (phantom_texture)."""
    drawn = stream(*finding.key)
    return bool(drawn.random() < 0.4) if finding.label == "mass" else int(drawn.integers(5, 21)) >= MANY


def write_lesion(films: Path, lesion: Lesion, pixels: NDArray[np.generic], mask: NDArray[np.bool_]) -> None:
    """Film, crop and mask."""
    film = (np.asarray(pixels, np.uint32) * 255 // MAX_VALUE).astype(np.uint8)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    crop = film[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    files = ((lesion.film, "film", film), (lesion.folder, "crop", crop), (lesion.folder, "mask", mask * np.uint8(255)))
    for folder, name, content in files:
        (films / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(films / folder / f"{name}.png", compress_level=1)
