"""Whether a data set is what its manifest says: every byte of every shard, here or behind a URL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..engine.errors import UserError
from .index import read_manifest
from .layout import scan
from .shards import ShardDataset
from .store.local import Missing, Store, is_remote, join, open_store, read_text

BLOCK = 8 * 2**20


def verify(folder: Path | str) -> Iterator[str]:
    """Every fault of a data set, one sentence each; none for a sound one.

    Raises:
        UserError: the folder is missing or is no data set.
    """
    root = str(folder)
    manifest = read_manifest(root)
    store = open_store(root, cache_mb=0)
    try:
        if sha256(read_text(root, "index.csv")).hexdigest() != manifest["index"]["sha256"]:
            yield "index.csv was changed after it was written"
    except Missing:
        yield "index.csv is missing"
    for fact in manifest["shards"]:
        yield from _verify_shard(store, root, fact, counted=not manifest.get("adopted"))
    if not is_remote(root):
        listed = {fact["name"] for fact in manifest["shards"]}
        yield from (
            f"{p.name} is not in the manifest" for p in sorted(Path(root).glob("*.tar")) if p.name not in listed
        )


def _verify_shard(store: Store, root: str, fact: Mapping[str, Any], *, counted: bool) -> Iterator[str]:
    name, place = fact["name"], join(root, fact["name"])
    try:
        size = store.size(place)
        if size != fact["bytes"]:
            yield f"{name} has {size} bytes, the manifest says {fact['bytes']}"
        elif fact["sha256"] and _digest(store, place, size) != fact["sha256"]:
            yield f"{name} does not match its sha256"
        elif counted and not is_remote(place) and (found := len(scan(Path(place)))) != fact["samples"]:
            yield f"{name} holds {found} samples, the manifest says {fact['samples']}"
    except Missing:
        yield f"{name} is missing"


def _digest(store: Store, place: str, size: int) -> str:
    """Hex sha256 of a shard, a block at a time."""
    state = sha256()
    for start in range(0, size, BLOCK):
        state.update(store.read(place, start, min(BLOCK, size - start)))
    return state.hexdigest()


def verify_samples(folder: Path | str) -> Iterator[str]:
    """Every sample that cannot be decoded, one sentence each: slower, and needed for sets that were only indexed."""
    shards = ShardDataset(folder)
    for i in range(len(shards)):
        try:
            shards[i].pixels[:]
        except UserError as error:
            yield str(error)
