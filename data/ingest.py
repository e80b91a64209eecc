"""From an archive's records to shards: in parallel, going on after a kill, the same bytes however done.

Each image: read -> breast mask, crop, chest wall to the left, zero outside -> resize where asked -> PNG, JSON, mask.
Images that cannot be used are left out and listed in OUT.skipped.csv, beside the data set and not in it: it names the
user's own files.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..engine.errors import UserError
from ..engine.files import write_atomic
from .archive import Archive
from .breast import isolate
from .burned import text_on
from .duplicates import phash
from .geometry import Geometry, Size
from .image import UnreadableImage, encode_png
from .index import read_manifest
from .keys import hashed
from .layout import LABEL, SAMPLE, Encoded, Moments, Remark
from .record import Film, Record
from .writer import Outcome, Work, cut, discard, identity_of, locked, publish, write_set

__all__ = ["Archive", "Outcome", "ingest"]


def ingest(
    archive: Archive,
    out: Path,
    secret: bytes,
    workers: int | None = None,
    *,
    size: Size | None = None,
    part: tuple[int, int] | None = None,
) -> Outcome:
    """Write an archive's records as a data set, or, of `part` (i, n), every n-th shard of it from the i-th on.

    Raises:
        UserError: there is nothing to ingest, nothing could be read, or `out` holds something else.
        RunFailed: a worker process was killed.
    """
    if not archive.records:
        raise UserError(f"{archive.dataset}: there is no image to ingest")
    out, size = out.resolve(), size or Size()
    refuse_equal_keys(archive, [sample_key(record, archive.dataset, secret) for record in archive.records])
    facts, shards = settings(archive, secret, size), cut(archive.records)
    if part:
        facts |= {"part": list(part)}
        shards = {number: records for number, records in shards.items() if number % part[1] == part[0] - 1}
    one = partial(prepare, archive=replace(archive, records=(), absent=()), secret=secret, size=size)
    work = Work(shards=shards, prepare=one, identity=identity_of(json.dumps(facts)), facts=facts)
    absent = dict.fromkeys(archive.absent, "the table lists it, the folder lacks it")
    return write(work, out, workers, absent, empty=bool(part))


def write(
    work: Work[Any], out: Path, workers: int | None, absent: Mapping[str, str] | None = None, *, empty: bool = False
) -> Outcome:
    """Write a data set and give it its name, unless it is there already.

    Args:
        absent: what else is to be listed as left out, with the reason.
        empty: whether a set without a sample is one.

    Raises:
        UserError: `out` holds something else, another process is writing it, or no sample could be made.
        RunFailed: a worker process was killed.
    """
    with locked(out):
        if there := already_written(out, work.facts):
            discard(out)
            return there
        outcome = write_set(work, out, workers or os.cpu_count() or 1, "images")
        if not outcome.samples and not empty:
            discard(out)
            name, reason = next(iter(outcome.skipped.items()))
            count, dataset = len(outcome.skipped), work.facts["dataset"]
            raise UserError(f"{dataset}: none of {count} images could be used; the first, {name}: {reason}")
        kept = {name: f"kept, but {remark}" for name, remark in outcome.remarks.items()}
        write_skipped(out, {**(absent or {}), **kept, **outcome.skipped})
        publish(out)
    return outcome


def settings(archive: Archive, secret: bytes, size: Size) -> dict[str, Any]:
    """What the manifest says of the ingest; `records` is a keyed digest, so that the ids stay secret."""
    content = json.dumps([_identity(record) for record in archive.records])
    return {
        "dataset": archive.dataset,
        "licence": archive.licence,
        "channels": archive.channels,
        "preprocessing": {
            "breast": archive.breast,
            "burned_in": not archive.quarantine,
            **asdict(size),
            **archive.settings,
        },
        "records": hashed(secret, archive.dataset, content),
    }


def _identity(r: Record) -> list[Any]:
    labels = sorted(r.labels.items())
    return [r.image_id, r.patient_id, r.exam_id, r.laterality, r.view, r.split, r.spacing_mm, r.stamp, labels]


def refuse_equal_keys(archive: Archive, keys: list[str]) -> None:
    """Two images of one key would become one sample.

    Raises:
        UserError: there are such images; both are named.
    """
    seen: dict[str, Record] = {}
    for key, record in zip(keys, archive.records, strict=True):
        if (twin := seen.setdefault(key, record)) is not record:
            raise UserError(f"{archive.dataset}: {record.name} and {twin.name} have the same id; keep one of them")


def already_written(out: Path, facts: Mapping[str, Any]) -> Outcome | None:
    """What `out` holds, where it holds this data set; None where it holds nothing.

    Raises:
        UserError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir():
        raise UserError(f"{out} is a file; name a folder for the data set")
    if not (out / "manifest.json").exists():
        raise UserError(f"{out} is not empty and holds no data set of miram; name another folder")
    there = read_manifest(out)
    other = [key for key, value in facts.items() if there.get(key) != value]
    if other:
        same = " of the same images" if "records" not in other else ""
        what = ", ".join(key for key in other if key != "records") or "other images or labels"
        raise UserError(
            f"{out} already holds another data set ({there.get('dataset')}){same}; it differs in {what}: "
            "name another folder"
        )
    return Outcome(samples=there["index"]["samples"], unchanged=True)


def skipped_file(out: Path) -> Path:
    """The list of what was left out, beside the data set."""
    return out.with_name(f"{out.name}.skipped.csv")


def write_skipped(out: Path, skipped: Mapping[str, str]) -> None:
    """Write the list, or remove an old one where nothing was left out."""
    if not skipped:
        skipped_file(out).unlink(missing_ok=True)
        return
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([("file", "reason"), *sorted(skipped.items())])
    write_atomic(skipped_file(out), buffer.getvalue())


def prepare(record: Record, *, archive: Archive, secret: bytes, size: Size) -> Encoded | Remark:
    """One record as the bytes of a sample, or the reason why it was left out."""
    try:
        film = record.read()
        stored, geometry = place(film, archive)
        stored, geometry = shrink(stored, geometry, size)
    except (UnreadableImage, ValueError) as error:
        return Remark(record.name, str(error))
    except Exception as error:  # one odd file among thousands must not end the night's work
        return Remark(record.name, f"unforeseen {type(error).__name__}: please report it, if you can with the file")
    row = describe(record, stored, archive.dataset, secret)
    made = encode(sample_key(record, archive.dataset, secret), row, stored, geometry)
    less = "masks" in film.facts  # as a source says that could not use them all
    return replace(made, remark=Remark(record.name, "masks that do not fit were left out")) if less else made


def place(film: Film, archive: Archive) -> tuple[Film, Geometry]:
    """The part of a film that is kept, at the film's own resolution.

    Raises:
        UnreadableImage: there is text on the breast.
        ValueError: there is no breast to see.
    """
    if film.region is None and not archive.breast:
        return film, Geometry.whole(*film.pixels.shape[:2])
    if film.region is None:
        stored, geometry = isolate(film)
    else:
        geometry = Geometry.crop((film.pixels.shape[0], film.pixels.shape[1]), film.region)
        stored = geometry.apply_film(film)
    if archive.quarantine and text_on(stored.pixels, stored.pixels > 0, stored.max_value):
        raise UnreadableImage(
            "quarantined: there seems to be text on the breast; look at it, then --burned-in takes it"
        )
    return stored, geometry


def shrink(film: Film, geometry: Geometry, size: Size) -> tuple[Film, Geometry]:
    """The stored image at another size, with its mask, marks and spacing.

    Raises:
        ValueError: the size needs a spacing and there is none.
    """
    now = (film.pixels.shape[0], film.pixels.shape[1])
    shape = size.shape(now, film.spacing_mm)
    if shape == now:
        return film, geometry
    spacing = size.spacing_mm or (None if film.spacing_mm is None else round(film.spacing_mm * now[0] / shape[0], 6))
    small = Geometry.whole(*now).resized(shape).apply_film(film)
    return replace(small, spacing_mm=spacing), geometry.resized(shape)


def encode(key: str, row: Mapping[str, Any], film: Film, geometry: Geometry) -> Encoded:
    """A stored film as a sample."""
    meta = {"schema": SAMPLE, **row, "geometry": geometry.as_dict(), **marks(film), "facts": dict(film.facts)}
    members = {"png": encode_png(film.pixels), "json": b""}
    if film.mask is not None:
        meta["mask_kind"] = film.mask_kind
        members["mask.png"] = encode_png(film.mask)
    members["json"] = json.dumps(meta).encode()
    return Encoded(key, row, members, Moments.of(film))


def marks(film: Film) -> dict[str, list[dict[str, Any]]]:
    """The marks of a film, ready for JSON."""
    return {name: [asdict(mark) for mark in getattr(film, name)] for name in ("circles", "boxes", "polygons")}


def sample_key(record: Record, dataset: str, secret: bytes) -> str:
    """The data set's name and the image's keyed hash; no dot, which would split the sample."""
    key = f"{dataset.lower()}-{hashed(secret, dataset, 'image', record.image_id)}"
    return re.sub(r"[^0-9a-z_-]", "-", key)


def describe(record: Record, film: Film, dataset: str, secret: bytes) -> dict[str, Any]:
    """The index columns of a sample: patient and exam hashed, labels as they are."""
    height, width = film.pixels.shape[:2]
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
        "phash": phash(film.pixels),
        **{LABEL + task: label for task, label in sorted(record.labels.items())},
    }
