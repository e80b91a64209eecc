"""A user's own files as samples: each film becomes what it would have become in the data a model was trained on.

Files are ingested as `miram data ingest folder` does, with the training data's settings, into a temporary folder and
under a secret that nobody keeps. Data sets are opened as they are.
"""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..data.archive import Archive, SourceOptions
from ..data.dicom.reader import DicomOptions
from ..data.geometry import Size
from ..data.image import SUFFIXES, UnreadableImage, opened, stored_range
from ..data.ingest import ingest, sample_key
from ..data.reading import is_image, walk_files
from ..data.record import Film, Record
from ..data.shards import ShardDataset
from ..data.sources.folder import NOBODY, header_row, range_note, record
from ..data.store.local import is_remote
from ..engine.errors import UserError
from .classify.cards import Taught, other_settings, pixel_settings

DATASET = "films"
ELSEWHERE = re.compile(r";[^;]*--(?!any-modality|burned-in|for-processing|spacing)[a-z].*$")  # advice on ingest alone


@dataclass(frozen=True, kw_only=True)
class Taking:
    """What of a user's files is taken, and what they do not say themselves."""

    bits: int | None = None
    """that hold the pixels of 16-bit pictures, where it is fewer"""
    spacing_mm: float | None = None
    """millimetres a pixel of pictures, and of DICOM files whose header has none"""
    any_modality: bool = False
    for_processing: bool = False
    burned_in: bool = False


@dataclass(frozen=True)
class Images:
    """Samples of one origin, and what a reader of the output calls each.

    Attributes:
        shards: the samples.
        names: (n,) files, or of a data set its keys.
        records: (n,) what the files are read by; none of a data set.
    """

    shards: ShardDataset
    names: tuple[str, ...]
    records: tuple[Record, ...] = ()

    @cached_property
    def patients(self) -> NDArray[np.str_]:
        """(n,) hashed patients; "" where nobody knows whose a file is."""
        hashed = self.shards.rows.column("patient")
        if not self.records:
            return np.array(hashed)
        known = (not r.patient_id.startswith("file:") for r in self.records)
        return np.array([patient if told else "" for patient, told in zip(hashed, known, strict=True)])

    def film(self, i: int) -> Film | None:
        """The film as it was before the breast was cut out; None of a data set."""
        return self.records[i].read() if self.records else None


@contextmanager
def taken(
    images: Sequence[str], card: Taught, taking: Taking = Taking(), workers: int | None = None
) -> Iterator[tuple[list[Images], dict[str, str]]]:
    """Everything that was named, and the files that cannot be used with the reason; gone from disk at the end.

    Args:
        images: files, folders of them, data sets.
        card: of the model they are for.
        taking: what of the files is taken.
        workers: processes that read them; None: one a core.

    Raises:
        UserError: a name leads nowhere, or a folder has no image.
    """
    files, sets = named(images)
    found = [Images(shards, tuple(shards.rows.column("key"))) for shards in map(ShardDataset, sets)]
    for images_of in found:
        warn_of_other_settings(card, images_of.shards)
    if not files:
        yield found, {}
        return
    with TemporaryDirectory(prefix="miram-films-") as folder:
        archive, secret, out = archive_of(files, card, taking), secrets.token_bytes(32), Path(folder) / DATASET
        size = Size(spacing_mm=settings(card).get("spacing_mm"), max_size=settings(card).get("max_size"))
        outcome = ingest(archive, out, secret, workers, size=size, part=(1, 1))  # a part may be without a sample
        left_out = {name: ELSEWHERE.sub("", reason) for name, reason in outcome.skipped.items()}
        if outcome.samples:
            of = {sample_key(record, DATASET, secret): record for record in archive.records}
            shards = ShardDataset(out)
            records = tuple(of[key] for key in shards.rows.column("key"))
            found.insert(0, Images(shards, tuple(r.name for r in records), records))
        yield found, left_out


# ---------------------------------------------------------------------------------------------- what was named


def named(images: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files in their order, each once, and data sets.

    Raises:
        UserError: nothing is there, or a folder has no image.
    """
    files: dict[Path, Path] = {}
    sets: dict[str, None] = {}
    for name in images:
        path = Path(name)
        if is_remote(name) or (path / "manifest.json").is_file():
            sets[name] = None
        elif path.is_dir():
            within = [file for file in walk_files(path) if is_image(file)]
            if not within:
                raise UserError(f"{name} holds no image (DICOM, {', '.join(sorted(SUFFIXES))}); name one that does")
            files |= {file.absolute(): file for file in within if file.absolute() not in files}
        elif path.is_file():
            files.setdefault(path.absolute(), path)
        else:
            raise UserError(f"there is no image, folder or data set {name}; check the path")
    if not files and not sets:
        raise UserError("name at least one image: a DICOM file or a picture, a folder of them, or a data set")
    return list(files.values()), list(sets)


# ---------------------------------------------------------------------------------------------- as in training


def settings(card: Taught) -> dict[str, Any]:
    """How the (first) training set's films became images."""
    return card.preprocessing[0] if card.preprocessing else {}


def archive_of(files: Sequence[Path], card: Taught, taking: Taking) -> Archive:
    """The files as an archive, to be ingested as the training data was; says on the screen what may be amiss."""
    how, channels = settings(card), card.channels
    if any(pixel_settings(other) != pixel_settings(how) for other in card.preprocessing):
        say("the model was trained on data sets that were ingested differently; films are treated as the first one's")
    if how.get("level") == "roi":
        say(
            "the model was trained on squares around findings; files are taken to be such squares, and left as they are"
        )
    if not how:
        say("the training data does not say how it was made of films; files are left as they are")
    wide: Literal[1, 3] = 3 if channels == 3 else 1
    known = {name: value for name, value in how.get("dicom", {}).items() if name in DicomOptions.__dataclass_fields__}
    extra = {name: True for name in ("any_modality", "for_processing", "burned_in") if getattr(taking, name)}
    options = SourceOptions(channels=wide, dicom=DicomOptions(**{**known, **extra}))
    measured = card.measured or how.get("spacing_mm") is not None
    for note in range_note(files) if taking.bits is None else ():
        say(note.replace("say so with a column `bits`", "say so with --bits").replace(" in the label file", ""))
    return Archive(
        dataset=DATASET,
        licence="the user's own",
        records=[record_of(file, taking, options, measured) for file in files],
        breast=bool(how.get("breast", False)) and how.get("level") != "roi",
        quarantine=not (how.get("burned_in", True) or taking.burned_in),
        channels=channels,
    )


@dataclass(frozen=True)
class Reading:
    """How a file is read, with the user's spacing where it has none itself; can be pickled."""

    read: Callable[[], Film]
    spacing_mm: float | None
    measured: bool  # whether the model wants a spacing

    def __call__(self) -> Film:
        """The film.

        Raises:
            UnreadableImage: it cannot be used, or nobody says its spacing and the model wants one.
        """
        film = self.read()
        spacing = film.spacing_mm or self.spacing_mm
        if self.measured and spacing is None:
            raise UnreadableImage("its spacing is unknown, and the model wants one; say it with --spacing")
        return replace(film, spacing_mm=spacing)


def record_of(file: Path, taking: Taking, options: SourceOptions, measured: bool) -> Record:
    """A file's record: of a DICOM file, patient, side, view and spacing are what its header says."""
    path = file.absolute()
    if path.suffix.lower() in SUFFIXES:
        row = {"bits": bits_of(path, taking.bits)}
    else:
        row = header_row(path)
        if NOBODY.fullmatch(row.get("patient", "")):
            del row["patient"]
    found = record(Path(path.anchor), path, row, (), options)
    return replace(found, name=str(file), read=Reading(found.read, taking.spacing_mm, measured))


def bits_of(path: Path, bits: int | None) -> str:
    """What is to be said of a picture's range: nothing where it has no room for more."""
    if bits is not None:
        with suppress(UnreadableImage), opened(path) as image:
            return str(bits) if stored_range(image) > 255 else ""
    return ""


def warn_of_other_settings(card: Taught, shards: ShardDataset) -> None:
    """Say where a data set was made of films in another way than the training data."""
    for root, manifest in zip(shards.roots, shards.manifests, strict=True):
        if told := other_settings(card, manifest):
            say(f"{root}: {told}")


def say(note: str) -> None:
    """A note on the user's screen."""
    print(f"miram: {note}", file=sys.stderr)
