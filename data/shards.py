"""Reading a data set: samples by number at known offsets, from a folder or a URL, in any order. (Layout: layout.py.)"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.errors import UserError
from .image import decode_image
from .index import read_manifest, read_table
from .layout import IMAGES, LABEL, MEMBERS
from .packed import PackedPixels
from .record import Pixels
from .splits import check, read_split, select_official
from .store.local import Place, Store, around, display, is_remote, join, open_store
from .table import Rows


@dataclass(frozen=True)
class Sample:
    """A sample as read: (H, W) or (H, W, 3) pixels, the largest value their format allows, its JSON, its mask."""

    key: str
    pixels: Pixels | PackedPixels
    max_value: int
    meta: Mapping[str, Any]
    mask: NDArray[np.uint8] | None = None

    @property
    def nbytes(self) -> int:
        """Memory its arrays take; packed pixels stay on disk."""
        held = 0 if isinstance(self.pixels, PackedPixels) else self.pixels.nbytes
        return held + (0 if self.mask is None else self.mask.nbytes)


class Cache:
    """Decoded images that were asked for last, up to a number of bytes; packed pixels are on disk anyway."""

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self._samples: OrderedDict[tuple[int, int], Sample] = OrderedDict()

    def __contains__(self, place: tuple[int, int]) -> bool:
        return place in self._samples

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        self._samples.move_to_end(place)
        return self._samples[place]

    def keep(self, place: tuple[int, int], sample: Sample) -> None:
        """Keep a sample, and let go of those that were not asked for the longest."""
        if isinstance(sample.pixels, PackedPixels) or sample.nbytes > self.limit:
            return
        self._samples[place] = sample
        self.held += sample.nbytes
        while self.held > self.limit:
            _, oldest = self._samples.popitem(last=False)
            self.held -= oldest.nbytes


class ShardDataset:
    """Samples by number, read at known offsets: no unpacking, no shuffling buffer, any order.

    Args:
        folders: one or several data sets, as folders or URLs.
        split: keep the rows of this split and those without one; None keeps all.
        cache_mb: decoded images kept in this process, in megabytes; of a remote set, its bytes too.
        split_file: a file of `miram data split`, which then says what `split` means.
        fold: of the split file: `train` is then all but this fold, `val` is this fold.

    Raises:
        UserError: a folder is missing, is no data set, or no row is left; the split file is of other data.
    """

    def __init__(
        self,
        folders: Path | str | Sequence[Path | str],
        split: str | None = None,
        cache_mb: int = 0,
        *,
        split_file: Path | str | None = None,
        fold: int | None = None,
    ):
        self.roots = [str(f) for f in ([folders] if isinstance(folders, Path | str) else folders)]
        self.manifests = [read_manifest(root) for root in self.roots]
        tables = [read_table(root, manifest) for root, manifest in zip(self.roots, self.manifests, strict=True)]
        self.every = Rows.all_of(tables)
        numbers, splits = self._choose(split, split_file, fold)
        self.rows, self.splits = self.every.take(numbers), [splits[i] for i in numbers]
        self.split_digest = hashlib.sha256(Path(split_file).read_bytes()).hexdigest() if split_file else ""
        keys = self.rows.column("key")
        if len(set(keys)) < len(keys):
            raise UserError(f"{', '.join(self.roots)} hold the same images twice; ingest one with another --name")
        self._sizes = {
            join(r, s["name"]): s["bytes"] for r, m in zip(self.roots, self.manifests, strict=True) for s in m["shards"]
        }
        self._remote = any(is_remote(shard) for shard in self._sizes)
        self._cache_limit = cache_mb * 2**20
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens its own files and keeps its own images."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_store", "_cache", "_checked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Nothing is open and nothing kept."""
        self.__dict__ |= state
        self._store = open_store(self.roots[0], max(64, self._cache_limit >> 20))
        self._checked: set[str] = set()
        self._cache = Cache(self._cache_limit)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Sample:
        """Sample i.

        Raises:
            UserError: its bytes are damaged or missing.
        """
        place = self._place(i)
        if place not in self._cache:
            sample = self._read(i)
            self._cache.keep(place, sample)
            return sample
        return self._cache[place]

    def root(self, i: int) -> str:
        """The data set that sample i belongs to."""
        return self.roots[self.rows.chosen[i, 0]]

    def subset(self, rows: Sequence[int] | NDArray[np.int64]) -> ShardDataset:
        """These rows alone, in the order of the shards; decoded images are kept for both."""
        chosen, other = sorted({int(i) for i in rows}), copy(self)
        other.rows, other.splits = self.rows.take(chosen), [self.splits[i] for i in chosen]
        other._store, other._cache = self._store, self._cache
        return other

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each shard, in the order of the samples."""
        names = zip(self.rows.chosen[:, 0].tolist(), self.rows.column("shard"), strict=True)
        return tuple(len(list(group)) for _, group in groupby(names))

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start fetching samples that will be asked for soon, where they are remote."""
        if self._remote:
            self._store.prefetch(
                [p for i in numbers if self._place(i) not in self._cache for p in self._places(i).values()]
            )

    def member(self, i: int, kind: str) -> bytes:
        """The bytes of one member (`png`, `json`, `mask.png`, …) of sample i."""
        return self._bytes(self._places(i), kind)

    def _read(self, i: int) -> Sample:
        row, places = self.rows[i], self._places(i)
        source = f"{join(self.root(i), row['shard'])}: sample {row['key']}"
        try:
            meta = json.loads(self._bytes(places, "json")) if "json" in places else {}
            max_value = int(row["max_value"])
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source} has a damaged JSON; run `miram data verify` on its folder") from error
        mask = decode_image(self._bytes(places, "mask.png"), source) if "mask.png" in places else None
        return Sample(row["key"], self._pixels(places, source), max_value, meta, mask)  # type: ignore[arg-type]

    def _pixels(self, places: Mapping[str, Place], source: str) -> Pixels | PackedPixels:
        kind = next((kind for kind in IMAGES if kind in places), None)
        if kind is None:
            raise UserError(f"{source} has no image; run `miram data verify` on its folder")
        if kind != "npy":
            return decode_image(self._bytes(places, kind), source)
        shard, start, size = places[kind]
        try:
            if not is_remote(shard):
                return PackedPixels(partial(self._read_within, shard, start), size)
            content = self._bytes(places, kind)  # row by row over a network would be a request a row
            return np.asarray(PackedPixels(lambda offset, n: content[offset : offset + n], size))
        except ValueError as error:
            raise UserError(f"{source}: {error}; run `miram data verify` on its folder") from error

    def _read_within(self, shard: str, start: int, offset: int, size: int) -> bytes:
        return self._open(shard).read(shard, start + offset, size)

    def _places(self, i: int) -> dict[str, Place]:
        """Where the members of sample i lie."""
        row, root = self.rows[i], self.root(i)
        shard = join(root, row["shard"])
        try:
            return {
                kind: (shard, int(row[f"{kind}_offset"]), int(row[f"{kind}_size"]))
                for kind in MEMBERS
                if row.get(f"{kind}_size")
            }
        except ValueError as error:
            raise UserError(f"{join(root, 'index.csv')} is damaged at {row['key']}; run `miram data verify`") from error

    def _bytes(self, places: Mapping[str, Place], kind: str) -> bytes:
        shard, offset, size = places[kind]
        if not is_remote(shard):
            return self._open(shard).read(shard, offset, size)
        _, start, length = around(places[kind], places.values())  # one request fetches all of a sample
        return self._open(shard).read(shard, start, length)[offset - start :][:size]

    def _open(self, shard: str) -> Store:
        """The store that reads a shard, which must be as long as the manifest says."""
        expected = self._sizes.get(shard)
        if expected is not None and shard not in self._checked:
            if (found := self._store.size(shard)) != expected:
                raise UserError(
                    f"the shard {display(shard)} has {found} bytes, and {expected} by its manifest; "
                    "run `miram data verify`"
                )
            self._checked.add(shard)
        return self._store

    def _place(self, i: int) -> tuple[int, int]:
        """Table and row of sample i, the same in every subset."""
        table, row = self.rows.chosen[i]
        return int(table), int(row)

    def _choose(
        self, split: str | None, split_file: Path | str | None, fold: int | None
    ) -> tuple[list[int], list[str]]:
        """Which rows the split names, and the split of every row.

        Raises:
            UserError: none of them, or the split file is of other data.
        """
        rows = self.every.narrow("dataset", "patient", "split")
        if split_file is None:
            if fold is not None:
                raise UserError(f"data.fold={fold} needs data.split_file, a file of `miram data split`")
            # Each folder is a set of its own here, whatever its name: one without splits is used whole.
            own = [row | {"dataset": str(root)} for row, root in zip(rows, self.every.chosen[:, 0], strict=True)]
            numbers, of = select_official(own, split, ", ".join(self.roots)), [row["split"] for row in rows]
        else:
            divided = read_split(Path(split_file))
            check(divided, self.population, rows, str(split_file))
            numbers, of = divided.select(rows, split, fold), divided.sides(rows, fold)
        if not numbers:
            raise UserError(f"{', '.join(self.roots)} has no sample in split {split!r}")
        return numbers, of

    @property
    def population(self) -> str:
        """Says which images of whom these are, however they are stored: a packed copy has the same."""
        parts = sorted((manifest["dataset"], manifest["records"]) for manifest in self.manifests)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def inputs(self) -> dict[str, str]:
        """What a run that is taken up again must find unchanged."""
        return {"data": self.digest, **({"split": self.split_digest} if self.split_digest else {})}

    @property
    def digest(self) -> str:
        """Changes when any byte of the data sets does."""
        parts = sorted((m["index"]["sha256"], [shard["sha256"] for shard in m["shards"]]) for m in self.manifests)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def pixel_statistics(self) -> tuple[float, float]:
        """(mean, standard deviation) of all pixels as fractions of their largest value."""
        weights = [manifest["pixels"]["n"] for manifest in self.manifests]
        means = [manifest["pixels"]["mean"] for manifest in self.manifests]
        squares = [manifest["pixels"]["std"] ** 2 + manifest["pixels"]["mean"] ** 2 for manifest in self.manifests]
        mean = float(np.average(means, weights=weights))
        std = float(np.sqrt(max(np.average(squares, weights=weights) - mean**2, 0.0)))
        return mean, std or 1.0  # of images that are all alike

    @property
    def channels(self) -> int:
        """1 for grayscale, 3 for colour.

        Raises:
            UserError: the data sets differ.
        """
        found = {manifest.get("channels", 1) for manifest in self.manifests}
        if len(found) > 1:
            raise UserError(f"{', '.join(self.roots)} mix grayscale and colour; ingest them again with one --channels")
        return int(found.pop())

    @property
    def tasks(self) -> list[str]:
        """The labels that any sample has."""
        return sorted(column.removeprefix(LABEL) for column in self.rows.columns if column.startswith(LABEL))

    def labels(self, task: str) -> list[str]:
        """The label of every sample for a task, empty where it has none.

        Raises:
            UserError: no sample has such a label.
        """
        if task not in self.tasks:
            known = ", ".join(self.tasks) or "nothing, it has no labels"
            raise UserError(f"the data has no label {task!r}; data.task can be: {known}")
        return self.rows.column(LABEL + task)
