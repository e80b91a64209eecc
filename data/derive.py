"""Data sets made of data sets: packed or smaller copies of one, and one joined from the parts of an array job.

Keys, patients, labels and `records` stay, so that splits and provenance of the first set hold for the second.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import UserError
from ..engine.files import sync_folder
from .duplicates import phash
from .geometry import Geometry, Size
from .image import encode_png
from .index import read_index, read_manifest
from .ingest import already_written, marks, shrink, skipped_file, write, write_skipped
from .layout import SAMPLE, Encoded, Moments, Remark, Shard, partial_folder, seal
from .packed import encode_npy
from .record import Box, Circle, Film, Polygon
from .shards import Sample, ShardDataset
from .table import Row
from .writer import Outcome, Work, discard, identity_of, locked, publish

OWN = ("schema", "index", "shards", "pixels", "skipped", "adopted")  # what a manifest says of the files beside it alone


# ---------------------------------------------------------------------------------------------- packed, smaller


def derive(folder: Path | str, out: Path, size: Size, *, packed: bool, workers: int | None = None) -> Outcome:
    """Write the samples of a data set again: `packed` as raw numbers, or at another size, or both.

    Raises:
        UserError: the folder is no data set, or `out` holds something else, or no sample is left.
        RunFailed: a worker process was killed.
    """
    manifest, shards = read_manifest(folder), ShardDataset(folder)
    facts = {k: v for k, v in manifest.items() if k not in OWN}
    facts["preprocessing"] = {**facts.get("preprocessing", {}), **{k: v for k, v in asdict(size).items() if v}}
    facts |= {"packed": packed, "derived_from": shards.digest}
    by_shard: dict[str, list[int]] = {}
    for i, name in enumerate(shards.rows.column("shard")):
        by_shard.setdefault(name, []).append(i)
    one = partial(derive_sample, str(folder), shards.digest, size, packed)
    identity = identity_of(json.dumps(facts))
    work = Work(shards=dict(enumerate(by_shard.values())), prepare=one, identity=identity, facts=facts)
    return write(work, out.resolve(), workers)


def derive_sample(folder: str, digest: str, size: Size, packed: bool, i: int) -> Encoded | Remark:
    """Sample i of a data set, made anew."""
    shards = opened(folder, digest)
    sample, row = shards[i], shards.rows[i]
    described = {k: v for k, v in row.items() if not k.endswith(("_offset", "_size")) and k not in ("key", "shard")}
    try:
        meta = own_meta(sample, described)
        film, geometry = shrink(as_film(sample, row, meta), Geometry.from_dict(meta["geometry"]), size)
    except (ValueError, TypeError, KeyError) as error:
        return Remark(sample.key, str(error))
    changed = describe_again(film)
    meta = {**meta, **changed, "geometry": geometry.as_dict(), **marks(film)}
    image = {"npy": encode_npy(film.pixels)} if packed else {"png": encode_png(film.pixels)}
    members = {**image, "json": json.dumps(meta).encode()}
    if film.mask is not None:
        members["mask.png"] = encode_png(film.mask)
    return Encoded(sample.key, described | changed, members, Moments.of(film))


@lru_cache(maxsize=1)
def opened(folder: str, digest: str) -> ShardDataset:
    """The data set, opened once a process and state."""
    return ShardDataset(folder)


def own_meta(sample: Sample, described: Row) -> Mapping[str, Any]:
    """A sample's JSON; of a foreign sample only what the index took from it, as the rest may name somebody."""
    if sample.meta.get("schema") == SAMPLE:
        return sample.meta
    whole = Geometry.whole(*sample.pixels.shape[:2]).as_dict()
    kind = {} if sample.mask is None else {"mask_kind": "classes"}
    return {"schema": SAMPLE, **described, "geometry": whole, **kind}


def as_film(sample: Sample, row: Row, meta: Mapping[str, Any]) -> Film:
    """A stored sample as a film of its own."""
    return Film(
        pixels=np.asarray(sample.pixels),
        max_value=sample.max_value,
        spacing_mm=float(row["spacing_mm"]) if row["spacing_mm"] else None,
        circles=tuple(Circle(**mark) for mark in meta.get("circles", ())),
        boxes=tuple(Box(**mark) for mark in meta.get("boxes", ())),
        polygons=tuple(polygon(mark) for mark in meta.get("polygons", ())),
        mask=sample.mask,
    )


def polygon(mark: Mapping[str, Any]) -> Polygon:
    """A polygon as JSON holds it."""
    return Polygon(points=tuple((x, y) for x, y in mark["points"]), label=mark["label"])


def describe_again(film: Film) -> dict[str, Any]:
    """The columns that a new size changes."""
    height, width = film.pixels.shape[:2]
    spacing = "" if film.spacing_mm is None else film.spacing_mm
    return {"height": height, "width": width, "spacing_mm": spacing, "phash": phash(film.pixels)}


# ---------------------------------------------------------------------------------------------- parts of an array job


def merge(parts: Sequence[Path], out: Path) -> Outcome:
    """Join the parts of one array job: the same bytes as if one process had written it all.

    Shards are hard-linked where the file system can, else copied; the parts stay as they are.

    Raises:
        UserError: the parts are not of one job, one is missing or given twice, or `out` holds something else.
    """
    manifests = ordered(parts)
    facts = {k: v for k, v in manifests[0][1].items() if k not in (*OWN, "part")}
    out = out.resolve()
    with locked(out):
        if there := already_written(out, facts):
            discard(out)
            return there
        folder = partial_folder(out) / "set"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shards = sorted((s for part, m in manifests for s in taken(part, m, folder)), key=lambda s: s.name)
        if not shards:
            raise UserError(f"none of the {len(parts)} parts holds an image; see their lists of what was left out")
        seal(folder, shards, facts, sum(manifest["skipped"] for _, manifest in manifests))
        sync_folder(folder)
        left_out = read_skipped([part for part, _ in manifests])
        write_skipped(out, left_out)
        publish(out)
    return Outcome(samples=sum(len(shard.rows) for shard in shards), skipped=left_out)


def ordered(parts: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The parts by number.

    Raises:
        UserError: they are not all the parts of one job.
    """
    manifests = [(folder, read_manifest(folder)) for folder in parts]
    for folder, manifest in manifests:
        if "part" not in manifest:
            raise UserError(f"{folder} is no part of an array job (made with --partition i/n); merge joins only those")
        if any(manifest.get(k) != v for k, v in manifests[0][1].items() if k not in (*OWN, "part")):
            raise UserError(f"{folder} was not made with the same images and options as {parts[0]}; make it again")
    manifests.sort(key=lambda pair: pair[1]["part"])
    count = manifests[0][1]["part"][1]
    found = [manifest["part"] for _, manifest in manifests]
    missing = [i for i in range(1, count + 1) if [i, count] not in found]
    if missing:
        raise UserError(f"of {count} parts these are missing: {', '.join(map(str, missing))}; name all of them")
    if len(found) > count:
        raise UserError(f"{len(found)} parts were given and the job has {count}; name each of them once")
    return manifests


def taken(folder: Path, manifest: Mapping[str, Any], into: Path) -> list[Shard]:
    """The shards of a part, linked into the new set.

    Raises:
        UserError: a shard is missing or has another size than the manifest says.
    """
    rows: dict[str, list[Row]] = {}
    for row in read_index(folder) if manifest["shards"] else ():
        rows.setdefault(row["shard"], []).append(row)
    shards = []
    for fact in manifest["shards"]:
        source = folder / fact["name"]
        if not source.exists() or source.stat().st_size != fact["bytes"]:
            raise UserError(f"{source} is missing or damaged; run the part again")
        link(source, into / fact["name"])
        moments = Moments(*fact["pixels"])
        shards.append(Shard(fact["name"], fact["bytes"], fact["sha256"], moments, rows[fact["name"]]))
    return shards


def link(source: Path, target: Path) -> None:
    """Another name for the file, or a copy of it on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_skipped(parts: Sequence[Path]) -> dict[str, str]:
    """What the parts left out, as far as their lists are still there."""
    left_out: dict[str, str] = {}
    for path in map(skipped_file, parts):
        if path.exists():
            with path.open(newline="") as file:
                left_out |= {row["file"]: row["reason"] for row in csv.DictReader(file)}
    return left_out
