"""From an archive's records to shards, in parallel, either whole or not at all.

Each image: read -> breast mask, crop, chest wall to the left, zero outside -> PNG + JSON (+ mask). Images that cannot
be read are named and left out. The folder appears under its name only when everything in it is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import UserError
from ..engine.track import progress_bar
from .breast import Geometry, isolate
from .image import UnreadableImage, encode_png
from .keys import hashed
from .record import Film, Record
from .shards import LABEL, SAMPLE, Encoded, read_manifest, seal, write_shards


@dataclass(frozen=True, kw_only=True)
class Archive:
    """What a source hands over: its records, and how they want to be treated."""

    dataset: str
    licence: str
    records: Sequence[Record]
    breast: bool = True  # isolate the breast; off for images of something else
    notes: tuple[str, ...] = ()  # what the user should know before trusting it
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the source, kept in the manifest


@dataclass
class Outcome:
    """What an ingest did. `skipped` maps an image's name to the reason."""

    samples: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    unchanged: bool = False  # the same data set was there already


@dataclass
class Moments:
    """Count, sum and sum of squares of pixels, as fractions of their largest value."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, film: Film) -> Moments:
        """The moments of one image."""
        x = film.pixels.astype(np.float64) / film.max_value
        return cls(x.size, float(x.sum()), float(np.square(x).sum()))

    def add(self, other: Moments) -> None:
        """Take another image in."""
        self.n += other.n
        self.total += other.total
        self.squares += other.squares

    def statistics(self) -> dict[str, float]:
        """Count, mean and standard deviation."""
        mean = self.total / self.n
        return {"n": self.n, "mean": mean, "std": max(self.squares / self.n - mean**2, 0.0) ** 0.5}


_Prepared = tuple[Encoded, Moments] | str  # or the reason why not


def ingest(archive: Archive, out: Path, secret: bytes, workers: int | None = None) -> Outcome:
    """Write an archive's records as a data set.

    Raises:
        UserError: there is nothing to ingest, nothing could be read, or `out` holds something else.
    """
    if not archive.records:
        raise UserError(f"{archive.dataset}: there is no image to ingest")
    out, settings = out.absolute(), _settings(archive, secret)
    if _same_data_set(out, settings):
        return Outcome(samples=read_manifest(out)["index"]["samples"], unchanged=True)
    partial_folder = out.with_name(f".{out.name}.miram-partial")  # one of ours, so what a killed ingest left may go
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    try:
        outcome = _write(archive, partial_folder, secret, settings, workers or os.cpu_count() or 1)
        partial_folder.replace(out)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return outcome


def _settings(archive: Archive, secret: bytes) -> dict[str, Any]:
    """What the manifest says of the ingest; `records` is a keyed digest, so that the ids stay secret."""
    content = json.dumps([_identity(record) for record in archive.records])
    return {
        "dataset": archive.dataset,
        "licence": archive.licence,
        "channels": 1,
        "preprocessing": {"breast": archive.breast, **archive.settings},
        "records": hashed(secret, archive.dataset, content),
    }


def _identity(r: Record) -> list[Any]:
    labels = sorted(r.labels.items())
    return [r.image_id, r.patient_id, r.exam_id, r.laterality, r.view, r.split, r.spacing_mm, r.stamp, labels]


def _same_data_set(out: Path, settings: Mapping[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir():
        raise UserError(f"{out} is a file; name a folder for the data set")
    if not (out / "manifest.json").exists():
        raise UserError(f"{out} is not empty and holds no data set of miram; name another folder")
    there = read_manifest(out)
    if any(there.get(key) != value for key, value in settings.items()):
        raise UserError(f"{out} already holds another data set ({there.get('dataset')}); name another folder")
    if there["skipped"]:
        raise UserError(
            f"{out} lacks {there['skipped']} images that could not be read when it was made; name another folder"
        )
    return True


def _write(archive: Archive, folder: Path, secret: bytes, settings: dict[str, Any], workers: int) -> Outcome:
    outcome, pixels = Outcome(), Moments()

    def samples() -> Iterator[Encoded]:
        prepare_one = partial(prepare, dataset=archive.dataset, secret=secret, breast=archive.breast)
        for record, prepared in zip(archive.records, each(prepare_one, archive.records, workers), strict=True):
            if isinstance(prepared, str):
                outcome.skipped[record.name] = prepared
            else:
                outcome.samples += 1
                pixels.add(prepared[1])
                yield prepared[0]

    rows = write_shards(folder, samples())
    if not rows:
        name, reason = next(iter(outcome.skipped.items()))
        raise UserError(
            f"{archive.dataset}: none of {len(archive.records)} images could be read; the first, {name}: {reason}"
        )
    seal(folder, rows, settings | {"pixels": pixels.statistics(), "skipped": len(outcome.skipped)})
    return outcome


def each(function: Callable[[Record], _Prepared], records: Sequence[Record], workers: int) -> Iterator[_Prepared]:
    """The function over the records, in order, in as many processes; with a progress bar."""
    with progress_bar() as bar, ExitStack() as stack:
        todo: Iterator[_Prepared] = map(function, records)
        if workers > 1 and len(records) >= 32:  # starting processes costs more than a few images
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            todo = pool.map(function, records, chunksize=4)
        yield from bar.track(todo, total=len(records), task_id=bar.add_task("images", total=len(records), note=""))


def prepare(record: Record, *, dataset: str, secret: bytes, breast: bool) -> _Prepared:
    """One record as the bytes of a sample, or the reason why it was left out."""
    try:
        film = record.read()
        stored, geometry = isolate(film) if breast else (film, Geometry.whole(*film.pixels.shape))
    except (UnreadableImage, ValueError) as error:
        return str(error)
    row = describe(record, stored, dataset, secret)
    meta = {
        "schema": SAMPLE,
        **row,
        "geometry": geometry.as_dict(),
        "circles": [asdict(circle) for circle in stored.circles],
    }
    members = {"png": encode_png(stored.pixels), "json": json.dumps(meta).encode()}
    if stored.mask is not None:
        members["mask.png"] = encode_png(stored.mask)
    return Encoded(sample_key(record, dataset, secret), row, members), Moments.of(stored)


def sample_key(record: Record, dataset: str, secret: bytes) -> str:
    """The data set's name and the image's keyed hash; no dot, which would split the sample."""
    key = f"{dataset.lower()}-{hashed(secret, dataset, 'image', record.image_id)}"
    return re.sub(r"[^0-9a-z_-]", "-", key)


def describe(record: Record, film: Film, dataset: str, secret: bytes) -> dict[str, Any]:
    """The index columns of a sample: patient and exam hashed, labels as they are."""
    height, width = film.pixels.shape
    return {
        "dataset": dataset,
        "patient": hashed(secret, dataset, "patient", record.patient_id),
        "exam": hashed(secret, dataset, "exam", record.patient_id, record.exam_id) if record.exam_id else "",
        "laterality": record.laterality,
        "view": record.view,
        "split": record.split,
        "height": height,
        "width": width,
        "bits": film.max_value.bit_length(),
        "max_value": film.max_value,
        "spacing_mm": "" if film.spacing_mm is None else film.spacing_mm,
        **{LABEL + task: label for task, label in sorted(record.labels.items())},
    }
