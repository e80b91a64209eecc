"""What the masks of a data set hold, looked at once.

CACHE/masks-DIGEST.json    {"schema", "images": {KEY: {"kind": "instances" or "classes" or null, "complete": bool,
                           "values": {"VALUE": pixels}}}}

`kind` is null where an image has no mask; `complete` is false where ingest could not use every mask of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...data.masks import Held, look
from ...data.shards import ShardDataset
from ...engine.files import make_folder, read_json, write_json

SURVEY = "miram.masks/1"


def survey(shards: ShardDataset, cache: Path) -> list[Held]:
    """What every image's mask holds, in the order of the rows; read from `cache` where that was asked before.

    Raises:
        UserError: a sample is damaged.
    """
    keys = shards.rows.column("key")
    name = hashlib.sha256(json.dumps([shards.digest, keys]).encode()).hexdigest()[:32]
    path = cache / f"masks-{name}.json"
    if not path.is_file():
        make_folder(cache)
        write_json(path, SURVEY, {"images": dict(zip(keys, map(asdict, look(shards)), strict=True))})
    images = read_json(path, SURVEY)["images"]
    return [read_back(images[key]) for key in keys]


def read_back(entry: Mapping[str, Any]) -> Held:
    """One image's entry: JSON makes text of the values."""
    return Held(entry["kind"], entry["complete"], {int(value): pixels for value, pixels in entry["values"].items()})
