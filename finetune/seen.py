"""What an encoder's pretraining saw of the images that are judged, by its provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..data.config import DataSection
from ..data.shards import ShardDataset
from ..pretrain.weights.loading import read_provenance


def lineage(provenance: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """An encoder's provenance, and those of what it started from and was taught by."""
    yield provenance
    for kin in ("init", "teacher"):
        if isinstance(provenance.get(kin), Mapping):
            yield from lineage(provenance[kin])


def data_of(provenance: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(name, digest) of the data sets that one pretraining saw; a file that was edited may not say them."""
    parts = provenance.get("data") or []
    return {(part["dataset"], part["records"]) for part in parts if {"dataset", "records"} <= set(part)}


def images_seen(shards: ShardDataset, data: DataSection, encoder: str, judged: Sequence[int]) -> int | None:
    """How many of the judged rows the encoder, or one that it comes from, was pretrained on; None: it cannot be told.

    Args:
        shards: the data set.
        data: how it was opened.
        encoder: as a configuration names it.
        judged: rows.
    """
    found: set[int] = set()
    for provenance in lineage(read_provenance(encoder)):
        rows = rows_seen(shards, data, provenance, judged)
        if rows is None:
            return None
        found.update(rows)
    return len(found)


def rows_seen(
    shards: ShardDataset, data: DataSection, provenance: Mapping[str, Any], judged: Sequence[int]
) -> list[int] | None:
    """Those of the judged rows that one pretraining saw; None where that cannot be told."""
    known = data_of(provenance)
    sources = zip(shards.roots, shards.manifests, strict=True)
    roots = {root for root, manifest in sources if (manifest["dataset"], manifest["records"]) in known}
    here = [i for i in judged if shards.root(i) in roots]
    seen = provenance.get("split")
    if seen is None or not here:
        return here
    if (provenance.get("split_digest", ""), provenance.get("fold")) != (shards.split_digest, data.fold):
        return None
    undivided = not any(shards.every.column("split")) and not shards.split_digest
    return here if undivided else [i for i in here if shards.splits[i] == seen.partition("-")[0]]


def seen(
    shards: ShardDataset,
    data: DataSection,
    encoder: str,
    judged: Sequence[int],
    whose: str = "Pretraining",
    name: str = "",
) -> str:
    """The same as a sentence for a report's notes; `whose` pretraining, and what the encoder is called."""
    if encoder.partition(":")[0] == "random":
        return f"{name or 'The encoder'} had no pretraining."
    if not read_provenance(encoder).get("data"):
        return f"{whose} is not known: the encoder does not say which images it saw."
    count = images_seen(shards, data, encoder, judged)
    if count is None:
        return f"{whose} used another split of the same data, so it may have seen judged images, without labels."
    told = f"saw {count or 'none'} of the {len(judged)} judged images, without labels"
    return f"{whose} {told}, as far as its provenance tells."
