"""What an encoder's pretraining saw of the images that are judged, by its provenance."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.config import DataSection
from ..data.shards import ShardDataset
from ..pretrain.weights.loading import read_provenance


def images_seen(shards: ShardDataset, data: DataSection, encoder: str, judged: Sequence[int]) -> int | None:
    """How many of the judged rows the encoder was pretrained on; None where that cannot be told.

    Args:
        shards: the data set.
        data: how it was opened.
        encoder: as a configuration names it.
        judged: rows.
    """
    provenance = read_provenance(encoder)
    known = {(part["dataset"], part["records"]) for part in provenance.get("data", [])}
    sources = zip(shards.roots, shards.manifests, strict=True)
    roots = {root for root, manifest in sources if (manifest["dataset"], manifest["records"]) in known}
    of = [(shards.root(i), shards.splits[i]) for i in judged]
    here = [split for root, split in of if root in roots]
    seen = provenance.get("split")
    if seen is None or not here:
        return len(here)
    if (provenance.get("split_digest", ""), provenance.get("fold")) != (shards.split_digest, data.fold):
        return None
    undivided = not any(shards.every.column("split")) and not shards.split_digest
    return len(here) if undivided else sum(split == seen.partition("-")[0] for split in here)


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
