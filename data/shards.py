"""Shards: plain WebDataset tars that any tool reads, with an index that people and samplers read.

DIR/manifest.json         format, settings, pixel statistics; samples, bytes and sha256 of each shard and of the index
DIR/index.csv             one row a sample: key, shard, offset and size of each member, patient, labels, …
DIR/shard-000000.tar
    KEY.json              what is known of the image; nothing that names a patient
    KEY.png               grayscale, 16-bit where the source has more than 8 bits
    KEY.mask.png          optional: 0 outside, k inside the k-th finding
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..engine.errors import UserError
from ..engine.files import read_json, sha256, write_atomic, write_json
from .image import decode_png
from .record import Pixels

MANIFEST = "miram.shards/1"
SAMPLE = "miram.sample/1"
MEMBERS = ("png", "json", "mask.png")
KEY_PATTERN = re.compile(r"[0-9a-z_-]+")
FIXED = ("key", "shard", *(f"{m}_{what}" for m in MEMBERS for what in ("offset", "size")))
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
)
LABEL = "label_"
OPEN_SHARDS = 32

Row = dict[str, str]


@dataclass(frozen=True)
class Encoded:
    """A sample ready to be written: its key, what the index says of it, the bytes of its members."""

    key: str
    row: Mapping[str, Any]  # DESCRIBED columns and label_<task>
    members: Mapping[str, bytes]  # by MEMBERS


@dataclass(frozen=True)
class Sample:
    """A sample as read: (H, W) pixels, the largest value their format allows, its JSON, its mask if it has one."""

    key: str
    pixels: Pixels
    max_value: int
    meta: Mapping[str, Any]
    mask: NDArray[np.uint8] | None = None

    @property
    def nbytes(self) -> int:
        """Memory its arrays take."""
        return self.pixels.nbytes + (0 if self.mask is None else self.mask.nbytes)


# ---------------------------------------------------------------------------------------------- writing


def write_shards(
    folder: Path, samples: Iterable[Encoded], shard_bytes: int = 256 * 2**20
) -> dict[str, Mapping[str, Any]]:
    """Write samples in the order they come and return their index rows by key. Equal samples give equal bytes."""
    import webdataset  # imported here: readers do without it

    rows: dict[str, Mapping[str, Any]] = {}
    files: dict[str, BinaryIO] = {}

    def open_shard(name: str) -> BinaryIO:
        files[name] = (folder / name).open("wb")  # opened here: webdataset would take a folder's name for a URL
        return files[name]

    def close_shard(name: str) -> None:
        files.pop(name).close()

    options = {"maxsize": shard_bytes, "verbose": 0, "encoder": False, "mtime": 0, "user": "", "group": ""}
    with webdataset.ShardWriter("shard-%06d.tar", opener=open_shard, post=close_shard, **options) as writer:
        for sample in samples:
            assert KEY_PATTERN.fullmatch(sample.key), sample.key
            assert sample.key not in rows, f"key {sample.key} given twice"
            writer.write({"__key__": sample.key, **sample.members})
            rows[sample.key] = sample.row
    return rows


def seal(folder: Path, rows: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write index.csv and manifest.json for the shards in the folder; `facts` go into the manifest."""
    shards = sorted(folder.glob("shard-*.tar"))
    labels = sorted({column for row in rows.values() for column in row if column.startswith(LABEL)})
    places = [(key, shard.name, where) for shard in shards for key, where in scan(shard).items()]
    table = [{"key": key, "shard": shard, **where, **rows[key]} for key, shard, where in places]
    write_index(folder / "index.csv", [*FIXED, *DESCRIBED, *labels], table)
    counts = {shard.name: sum(name == shard.name for _, name, _ in places) for shard in shards}
    listed = [
        {"name": s.name, "samples": counts[s.name], "bytes": s.stat().st_size, "sha256": sha256(s)} for s in shards
    ]
    index = {"samples": len(table), "sha256": sha256(folder / "index.csv")}
    write_json(folder / "manifest.json", MANIFEST, {**facts, "index": index, "shards": listed})


def scan(shard: Path) -> dict[str, dict[str, int]]:
    """Offset and size of every sample's members, by key, in the shard's order."""
    places: dict[str, dict[str, int]] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            places.setdefault(key, {}).update({f"{kind}_offset": member.offset_data, f"{kind}_size": member.size})
    return places


def write_index(path: Path, columns: Sequence[str], table: Sequence[Mapping[str, Any]]) -> None:
    """Write the index, empty where a sample has no value."""
    lines = [columns, *([row.get(column, "") for column in columns] for row in table)]
    buffer = _Lines()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    write_atomic(path, "".join(buffer))


class _Lines(list[str]):
    """What csv.writer needs of a file."""

    def write(self, text: str) -> None:
        self.append(text)


# ---------------------------------------------------------------------------------------------- reading


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a data set.

    Raises:
        UserError: the folder is missing or holds no shards of ours.
    """
    if not folder.is_dir():
        raise UserError(
            f"the data folder {folder} is not there; make one with `miram data phantom` or `miram data ingest`"
        )
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder} holds no manifest.json, so it is no data set; make one with `miram data ingest`")
    return read_json(folder / "manifest.json", MANIFEST)


def read_index(folder: Path) -> list[Row]:
    """The rows of index.csv as text, in the shards' order.

    Raises:
        UserError: it is missing or lacks columns.
    """
    path = folder / "index.csv"
    if not path.exists():
        raise UserError(f"{path} is not there; ingest the data set again")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {*FIXED, *DESCRIBED} - set(reader.fieldnames or ())
        if missing:
            raise UserError(f"{path} lacks the columns {', '.join(sorted(missing))}; ingest the data set again")
        return list(reader)


class ShardDataset:
    """Samples by number, read at known offsets: no unpacking, no shuffling buffer, any order.

    Args:
        folders: one or several data sets.
        split: keep the rows of this split and those without one; None keeps all.
        cache_mb: decoded images kept in this process, in megabytes.

    Raises:
        UserError: a folder is missing, is no data set, or no row is left.
    """

    def __init__(self, folders: Path | str | Sequence[Path | str], split: str | None = None, cache_mb: int = 0):
        paths = [Path(folders)] if isinstance(folders, Path | str) else [Path(folder) for folder in folders]
        self.folders, self.manifests = paths, [read_manifest(path) for path in paths]
        indexed = [(path / row["shard"], row) for path in paths for row in read_index(path)]
        kept = [(path, row) for path, row in indexed if split is None or row["split"] in ("", split)]
        if not kept:
            found = sorted({row["split"] for _, row in indexed})
            raise UserError(
                f"{', '.join(map(str, paths))} has no sample in split {split!r}; data.split can be: {', '.join(found)}"
            )
        self.paths, self.rows = [path for path, _ in kept], [row for _, row in kept]
        if len({row["key"] for row in self.rows}) < len(self.rows):
            raise UserError(f"{', '.join(map(str, paths))} hold the same images twice; ingest one with another --name")
        self._files: dict[Path, int] = {}
        self._cache: OrderedDict[int, Sample] = OrderedDict()
        self._cache_bytes, self._cache_limit = 0, cache_mb * 2**20

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens its own files and keeps its own images."""
        return self.__dict__ | {"_files": {}, "_cache": OrderedDict(), "_cache_bytes": 0}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Sample:
        """Sample i.

        Raises:
            UserError: its bytes are damaged.
        """
        if i not in self._cache:
            return self._remember(i, self._read(i))
        self._cache.move_to_end(i)
        return self._cache[i]

    def _read(self, i: int) -> Sample:
        row, source = self.rows[i], f"{self.paths[i]}: sample {self.rows[i]['key']}"
        pixels = decode_png(self.member(i, "png"), source)
        mask = decode_png(self.member(i, "mask.png"), source).astype(np.uint8) if row["mask.png_size"] else None
        try:
            meta = json.loads(self.member(i, "json"))
        except ValueError as error:
            raise UserError(f"{source} has a damaged JSON; run `miram data verify` on its folder") from error
        return Sample(row["key"], pixels, int(row["max_value"]), meta, mask)

    def member(self, i: int, kind: str) -> bytes:
        """The bytes of one member (`png`, `json`, `mask.png`) of sample i."""
        path, row = self.paths[i], self.rows[i]
        size = int(row[f"{kind}_size"])
        content = os.pread(self._open(path), size, int(row[f"{kind}_offset"]))
        if len(content) != size:
            raise UserError(f"the shard {path} is cut short; run `miram data verify {path.parent}`")
        return content

    def _open(self, path: Path) -> int:
        """The shard's file descriptor; few are kept, so that thousands of shards do not exhaust them."""
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_RDONLY)
            except FileNotFoundError as error:
                raise UserError(f"the shard {path} is not there; run `miram data verify {path.parent}`") from error
            if len(self._files) > OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
        return self._files[path]

    def _remember(self, i: int, sample: Sample) -> Sample:
        if sample.nbytes > self._cache_limit:
            return sample
        self._cache[i] = sample
        self._cache_bytes += sample.nbytes
        while self._cache_bytes > self._cache_limit:
            _, oldest = self._cache.popitem(last=False)
            self._cache_bytes -= oldest.nbytes
        return sample

    @property
    def digest(self) -> str:
        """Changes when any byte of the data sets does."""
        parts = [(m["index"]["sha256"], [shard["sha256"] for shard in m["shards"]]) for m in self.manifests]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def pixel_statistics(self) -> tuple[float, float]:
        """(mean, standard deviation) of all pixels as fractions of their largest value."""
        weights = [manifest["pixels"]["n"] for manifest in self.manifests]
        means = [manifest["pixels"]["mean"] for manifest in self.manifests]
        squares = [manifest["pixels"]["std"] ** 2 + manifest["pixels"]["mean"] ** 2 for manifest in self.manifests]
        mean = float(np.average(means, weights=weights))
        return mean, float(np.sqrt(max(np.average(squares, weights=weights) - mean**2, 0.0)))

    def labels(self, task: str) -> list[str]:
        """The label of every sample for a task, empty where it has none.

        Raises:
            UserError: no sample has such a label.
        """
        known = sorted({column.removeprefix(LABEL) for row in self.rows for column in row if column.startswith(LABEL)})
        if task not in known:
            raise UserError(
                f"the data has no label {task!r}; data.task can be: {', '.join(known) or 'nothing, it has no labels'}"
            )
        return [row.get(LABEL + task, "") for row in self.rows]


# ---------------------------------------------------------------------------------------------- checking


def verify(folder: Path) -> Iterator[str]:
    """Every fault of a data set, one sentence each; none for a sound one.

    Raises:
        UserError: the folder is missing or is no data set.
    """
    manifest = read_manifest(folder)
    index = folder / "index.csv"
    if not index.exists():
        yield "index.csv is missing"
        return
    if sha256(index) != manifest["index"]["sha256"]:
        yield "index.csv was changed after it was written"
    for fact in manifest["shards"]:
        yield from _verify_shard(folder / fact["name"], fact)
    listed = {fact["name"] for fact in manifest["shards"]}
    yield from (f"{p.name} is not in the manifest" for p in sorted(folder.glob("*.tar")) if p.name not in listed)


def _verify_shard(path: Path, fact: Mapping[str, Any]) -> Iterator[str]:
    if not path.exists():
        yield f"{path.name} is missing"
    elif path.stat().st_size != fact["bytes"]:
        yield f"{path.name} has {path.stat().st_size} bytes, the manifest says {fact['bytes']}"
    elif sha256(path) != fact["sha256"]:
        yield f"{path.name} does not match its sha256"
    elif len(scan(path)) != fact["samples"]:
        yield f"{path.name} holds {len(scan(path))} samples, the manifest says {fact['samples']}"
