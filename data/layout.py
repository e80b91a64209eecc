"""A data set on disk: plain WebDataset tars that any tool reads, with an index that people and samplers read.

DIR/manifest.json         format, settings, pixel statistics; samples, bytes and sha256 of each shard and of the index
DIR/index.csv             one row a sample: key, shard, offset and size of each member, patient, labels, …
DIR/shard-000000.tar
    KEY.json              what is known of the image; nothing that names a patient
    KEY.png               grayscale, 16-bit where the source has more than 8 bits; RGB where colour was asked for
    KEY.npy               the same as raw numbers, instead of the PNG, in a packed set
    KEY.mask.png          optional: 0 outside, k inside the k-th finding, or the number of the class
"""

from __future__ import annotations

import csv
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.files import sha256, write_atomic, write_json
from .record import Film

MANIFEST = "miram.shards/1"
SAMPLE = "miram.sample/1"
IMAGES = ("npy", "png", "jpg", "jpeg")  # a sample has one of them; our own sets hold npy or png
MEMBERS = (*IMAGES, "json", "mask.png")
KEY_PATTERN = re.compile(r"[0-9a-z_-]+")
DESCRIBED = (
    "dataset",
    "patient",
    "exam",
    "laterality",
    "view",
    "split",
    "height",
    "width",
    "bits",
    "max_value",
    "spacing_mm",
    "phash",
)
LABEL = "label_"


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of pixels, as fractions of their largest value."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, film: Film) -> Moments:
        """The moments of one image."""
        counts = np.bincount(film.pixels.reshape(-1))  # exact, and faster than a copy in floats
        x = np.arange(len(counts)) / film.max_value
        return cls(film.pixels.size, float(counts @ x), float(counts @ x**2))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.n + other.n, self.total + other.total, self.squares + other.squares)

    def statistics(self) -> dict[str, float]:
        """Count, mean and standard deviation."""
        mean = self.total / max(self.n, 1)
        return {"n": self.n, "mean": mean, "std": max(self.squares / max(self.n, 1) - mean**2, 0.0) ** 0.5}


@dataclass(frozen=True)
class Remark:
    """An item that was left out, or kept with less than it should have: its name on the user's own screen, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Encoded:
    """A sample ready to be written: its key, what the index says of it, the bytes of its members."""

    key: str
    row: Mapping[str, Any]  # DESCRIBED columns and label_<task>
    members: Mapping[str, bytes]  # by MEMBERS
    moments: Moments = field(default_factory=Moments)
    remark: Remark | None = None


@dataclass(frozen=True)
class Shard:
    """A finished shard: what the manifest says of it and its rows of the index."""

    name: str
    bytes: int
    sha256: str
    moments: Moments
    rows: Sequence[Mapping[str, Any]]

    def fact(self) -> dict[str, Any]:
        """Its entry in the manifest."""
        return {
            "name": self.name,
            "samples": len(self.rows),
            "bytes": self.bytes,
            "sha256": self.sha256,
            "pixels": [self.moments.n, self.moments.total, self.moments.squares],
        }


def partial_folder(out: Path) -> Path:
    """Where a set is written until it is complete."""
    return out.with_name(f".{out.name}.miram-partial")


def write_tar(path: Path, samples: Iterable[Encoded]) -> tuple[dict[str, Mapping[str, Any]], Moments]:
    """Write samples in the order they come; their rows by key, and their moments. Equal samples give equal bytes."""
    import webdataset  # imported here: readers do without it

    rows: dict[str, Mapping[str, Any]] = {}
    moments = Moments()
    options = {"encoder": False, "mtime": 0, "user": "", "group": ""}
    # Opened here: webdataset would take a folder's name for a URL.
    with path.open("wb") as file, webdataset.TarWriter(file, **options) as writer:
        for sample in samples:
            assert KEY_PATTERN.fullmatch(sample.key), sample.key
            assert sample.key not in rows, f"key {sample.key} given twice"
            writer.write({"__key__": sample.key, **sample.members})
            rows[sample.key] = sample.row
            moments += sample.moments
    return rows, moments


def finished(path: Path, rows: Mapping[str, Mapping[str, Any]], moments: Moments) -> Shard:
    """The shard at `path`, with the places of its members."""
    placed = [{"key": key, "shard": path.name, **where, **rows[key]} for key, where in scan(path).items()]
    return Shard(path.name, path.stat().st_size, sha256(path), moments, placed)


def scan(path: Path) -> dict[str, dict[str, int]]:
    """Offset and size of every sample's members, by key, in the shard's order."""
    places: dict[str, dict[str, int]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            places.setdefault(key, {}).update({f"{kind}_offset": member.offset_data, f"{kind}_size": member.size})
    return places


def seal(folder: Path, shards: Sequence[Shard], facts: Mapping[str, Any], skipped: int = 0) -> None:
    """Write index.csv and manifest.json for the shards in the folder; `facts` go into the manifest."""
    shards = [shard for shard in shards if shard.rows]
    table = [row for shard in shards for row in shard.rows]
    write_index(folder / "index.csv", columns(table), table)
    index = {"samples": len(table), "sha256": sha256(folder / "index.csv")}
    moments = sum((shard.moments for shard in shards), Moments())
    counted = {"pixels": moments.statistics(), "skipped": skipped}
    listed = [shard.fact() for shard in shards]
    write_json(folder / "manifest.json", MANIFEST, {**facts, **counted, "index": index, "shards": listed})


def columns(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The index's header for these rows: places of the members that occur, what is described, labels by name."""
    used = {column for row in table for column in row}
    places = [f"{member}_{what}" for member in MEMBERS for what in ("offset", "size")]
    return [
        "key",
        "shard",
        *(place for place in places if place in used),
        *DESCRIBED,
        *sorted(column for column in used if column.startswith(LABEL)),
    ]


def write_index(path: Path, header: Sequence[str], table: Iterable[Mapping[str, Any]]) -> None:
    """Write the index, empty where a sample has no value."""
    lines = [header, *([row.get(column, "") for column in header] for row in table)]
    buffer = _Lines()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    write_atomic(path, "".join(buffer))


class _Lines(list[str]):
    """What csv.writer needs of a file."""

    def write(self, text: str) -> None:
        self.append(text)
