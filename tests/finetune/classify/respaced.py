"""Data sets whose index says other spacings than were written."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path

from miram.data.shards import ShardDataset


def changed(source: Path, out: Path, spacing: dict[int, str], dataset: str = "") -> ShardDataset:
    """A copy of a data set of which some rows (-1: all) have another spacing in the index; of another name if given."""
    shutil.copytree(source, out)
    rows = list(csv.DictReader((out / "index.csv").open()))
    for i, row in enumerate(rows):
        row["spacing_mm"] = spacing.get(i, spacing.get(-1, row["spacing_mm"]))
    with (out / "index.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["index"]["sha256"] = hashlib.sha256((out / "index.csv").read_bytes()).hexdigest()
    manifest["dataset"] = dataset or manifest["dataset"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    return ShardDataset(out)
