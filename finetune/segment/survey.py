"""What the masks of a data set hold, looked at once.

CACHE/masks-DIGEST.json    {"schema", "images": {KEY: {"kind": "instances" or "classes" or null, "complete": bool,
                           "values": {"VALUE": pixels}}}}

`kind` is null where an image has no mask; `complete` is false where ingest could not use every mask of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data.record import MaskKind
from ...data.shards import Sample, ShardDataset
from ...engine.files import make_folder, read_json, write_json
from ...engine.track import Meter

SURVEY = "miram.masks/1"


@dataclass(frozen=True)
class Surveyed:
    """What the mask of one image holds."""

    kind: MaskKind | None
    complete: bool
    values: Mapping[int, int]  # how many pixels have each value


def survey(shards: ShardDataset, cache: Path) -> list[Surveyed]:
    """What every image's mask holds, in the order of the rows; read from `cache` where that was asked before.

    Raises:
        UserError: a sample is damaged.
    """
    keys = shards.rows.column("key")
    name = hashlib.sha256(json.dumps([shards.digest, keys]).encode()).hexdigest()[:32]
    path = cache / f"masks-{name}.json"
    if not path.is_file():
        make_folder(cache)
        with Meter("masks", len(shards)) as meter:
            found: dict[str, Any] = {}
            for i, key in enumerate(keys):
                found[key] = looked_at(shards[i])
                meter.advance()
        write_json(path, SURVEY, {"images": found})
    images = read_json(path, SURVEY)["images"]
    return [surveyed(images[key]) for key in keys]


def looked_at(sample: Sample) -> dict[str, Any]:
    """One image's entry."""
    lacking = dict(sample.meta.get("facts", {})).get("masks")
    if sample.mask is None:
        return {"kind": None, "complete": lacking is None, "values": {}}
    counts = np.bincount(sample.mask.ravel(), minlength=256)
    values = {str(value): int(counts[value]) for value in np.flatnonzero(counts)}
    return {"kind": sample.meta.get("mask_kind", "instances"), "complete": lacking is None, "values": values}


def surveyed(entry: Mapping[str, Any]) -> Surveyed:
    """The entry read back."""
    values = {int(value): pixels for value, pixels in entry["values"].items()}
    return Surveyed(entry["kind"], entry["complete"], values)
